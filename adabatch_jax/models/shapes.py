"""What a model makes of shapes, and whether its layers take the examples of a batch for pixels.

On a CPU ``conv.enter`` gives images five axes, ``[groups, height, width, examples, channels]``. Layers
of Flax that look at several pixels would look along the last axes before the channels, without a word:
a convolution along width and examples, the statistics of GroupNorm along all examples of a group. And
so would those that are told to look along axis 3. The axes of an image are 1, 2 and -1 in any layout.
"""

from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from adabatch_jax.models.conv import enter, in_groups

_WINDOWS = (nn.Conv, nn.ConvLocal, nn.ConvTranspose)
_WHOLE_IMAGES = (nn.GroupNorm, nn.InstanceNorm, nn.MultiHeadDotProductAttention)
_AXES = {nn.LayerNorm: 'reduction_axes', nn.RMSNorm: 'reduction_axes', nn.Dropout: 'broadcast_dims'}
_OF_EXAMPLES = {0, 3}


def eval_shape(function: Callable, key: jax.Array, *batches: jax.ShapeDtypeStruct) -> Any:
    """As ``jax.eval_shape``, of a function that calls models.

    Args:
      function: of the others.
      key: for random numbers.
      *batches: images ``[batch, height, width, channels]``.

    Raises:
      ValueError: a layer or a window of pooling would take examples for pixels.
    """
    entered = [jax.eval_shape(enter, images).shape for images in batches if in_groups()]
    # As they are, or where a model has made images smaller before, all examples in a group.
    groups_and_examples = {(1, len(images)) for images in batches} | {shape[::3] for shape in entered}

    def is_entered(shape):
        return len(shape) == 5 and in_groups() and shape[::3] in groups_and_examples

    def refuse(what):
        raise ValueError(
            f'{what} takes the examples of a batch for pixels in the layout of conv.enter; accepted '
            'there: layers that look at one pixel or along the axes 1, 2 and -1, and those of '
            'adabatch_jax.models; call conv.leave first, or do without conv.enter'
        )

    def call(method, args, kwargs, context):
        layer = context.module
        is_wide = isinstance(layer, _WHOLE_IMAGES)
        if isinstance(layer, _WINDOWS):
            is_wide = max(np.max(layer.kernel_size), np.max(layer.strides or 1)) > 1
        for kind, axes in _AXES.items():
            if isinstance(layer, kind):
                axes = np.atleast_1d(getattr(layer, axes)) % 5
                is_wide = not _OF_EXAMPLES.isdisjoint(axes)
        if is_wide and any(is_entered(np.shape(x)) for x in jax.tree.leaves((args, kwargs))):
            refuse(f'{"/".join(layer.path)}, a layer of Flax,')
        return method(*args, **kwargs)

    with nn.intercept_methods(call):
        jaxpr, shapes = jax.make_jaxpr(function, return_shape=True)(key, *batches)
    for equation in _equations(jaxpr):
        window = equation.params.get('window_dimensions', ())
        if len(window) == 5 and window[3] > 1 and is_entered(equation.invars[0].aval.shape):
            refuse('pooling')
    return shapes


def _equations(jaxpr) -> Iterator[Any]:
    """Also of the functions that are called in it."""
    for equation in getattr(jaxpr, 'eqns', ()):
        yield equation
        for inner in jax.tree.leaves(equation.params):
            yield from _equations(inner)
