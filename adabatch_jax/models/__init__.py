"""Networks by name: ``get_model('resnet20', num_classes=10)``.

To add one, write a linen module that takes ``num_classes``, ``batch_norm`` and ``dtype``, and name it
in ``MODELS``. From ``conv.enter`` to ``layers.flatten``, ``layers.mean_over_pixels`` or ``conv.leave``
images are ``[groups, height, width, examples, channels]`` on a CPU: there it has layers of this package
and those that look at one pixel, as ``nn.Dense``, ``nn.LayerNorm`` and ``nn.Dropout`` do, or along the
axes 1, 2 and -1. ``check_model`` refuses others.
"""

import functools
import inspect
import numbers
import os
import traceback
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from adabatch_jax.models import alexnet, cnn, conv, linear, resnet, resnet_cifar, shapes, vgg
from adabatch_jax.models.layers import AXIS_NAME, MOMENTUM, check_batch_norm

__all__ = [
    'FAMILY_OPTIONS',
    'MODELS',
    'MOMENTUM',
    'check_batch_norm',
    'check_model',
    'frozen',
    'get_model',
]

MODELS = {
    'linear': linear.Linear,
    'cnn': cnn.CNN,
    'alexnet_cifar': alexnet.AlexNetCifar,
    'alexnet': alexnet.AlexNet,
    'alexnet_bn': functools.partial(alexnet.AlexNet, normalised=True),
}
for _depth, _repeats in vgg.DEPTHS.items():
    MODELS[f'vgg{_depth}'] = functools.partial(vgg.VGG, _repeats, False)
    MODELS[f'vgg{_depth}_bn'] = functools.partial(vgg.VGG, _repeats, True)
for _blocks in (1, 2, 3, 5, 7, 9, 18):
    MODELS[f'resnet{6 * _blocks + 2}'] = functools.partial(resnet_cifar.ResNetCifar, _blocks)
for _blocks, _widen in ((2, 4), (4, 10), (6, 2)):
    MODELS[f'wrn{6 * _blocks + 4}_{_widen}'] = functools.partial(
        resnet_cifar.WideResNet, _blocks, _widen
    )
for _depth, (_bottleneck, _depths) in resnet.DEPTHS.items():
    MODELS[f'resnet{_depth}'] = functools.partial(resnet.ResNet, _bottleneck, _depths)

# Options of one family of models, and the value of each that every other model may be asked for.
FAMILY_OPTIONS = {'shortcut': 'projection', 'zero_init_residual': False}

_KEPT = 'params', 'batch_stats'  # collections of variables, in a train state
# Where no line of a user's own is: Python and what models are made of and called by, this package too.
_LIBRARIES = (os.__file__, flax.__file__, jax.__file__, np.__file__, os.path.dirname(__file__))
_LIBRARIES = ('<string>', *(os.path.dirname(file) + os.sep for file in _LIBRARIES))


def get_model(name: str, num_classes: int, **options: Any) -> nn.Module:
    """A linen module, called ``module.apply(variables, images, train=...)``.

    Args:
      name: one of ``MODELS``.
      num_classes: width of the logits.
      **options: fields of the module: ``dtype`` of the activations (parameters, BatchNorm
        statistics and logits are float32), ``batch_norm`` (``'local'``, ``'sync'``, ``'ghost:N'``), and
        those of the family, such as ``FAMILY_OPTIONS``.

    Returns:
      A module from images ``[batch, height, width, channels]`` to float32 logits
      ``[batch, num_classes]``.

    Raises:
      ValueError: an unknown name or option, or one of another family.
    """
    if name not in MODELS:
        raise ValueError(f'name: got {name!r}; accepted: {", ".join(sorted(MODELS))}')
    if not isinstance(num_classes, numbers.Integral) or num_classes < 1:
        raise ValueError(f'num_classes: got {num_classes!r}; needs a whole number, at least 1')
    check_batch_norm(options.get('batch_norm', 'local'))
    if isinstance(MODELS[name], nn.Module):
        raise ValueError(f'model {name}: MODELS has a module; accepted: its class, or what makes one')
    for key, of_others in FAMILY_OPTIONS.items():
        if key in options and not _takes(MODELS[name], key) and (got := options.pop(key)) != of_others:
            raise ValueError(f'{key}: got {got!r}; accepted for {name}: {of_others}')
    try:
        jnp.dtype(options.get('dtype', jnp.float32))
        return MODELS[name](num_classes=num_classes, **options)
    except TypeError as error:
        raise ValueError(f'model {name}: {error}') from error


def _takes(make: Any, option: str) -> bool:
    try:
        inspect.signature(make).bind_partial(**{option: None})
    except TypeError:
        return False
    return True


def check_model(model: nn.Module, image_shape: tuple[int, int, int], num_classes: int) -> dict[str, Any]:
    """The shapes of a model's variables.

    Raises:
      ValueError: one that cannot take images of a shape, with the line of its own that an exception came
        by; or that is no classifier that can be trained here.
    """
    try:
        hash(model)  # compiled steps are kept by it, and so are its shapes
    except TypeError as error:
        name = type(model).__name__
        raise ValueError(f'{name} has lists, dictionaries or arrays as fields; use tuples') from error
    return _shapes(model, tuple(image_shape), num_classes, jax.default_backend())


@functools.lru_cache(64)  # to trace a network takes up to a second
def _shapes(model: nn.Module, image_shape, num_classes: int, backend: str) -> dict[str, Any]:
    """As for ``check_model``; a network's convolutions depend on the backend.

    The model is called as in a run: to make its weights with one image, else inside a map over devices,
    with any number of images, so that a CPU may have several groups of them.
    """
    sizes = 2, conv.several_groups(*image_shape[:2])
    few, many = (jax.ShapeDtypeStruct((n, *image_shape), jnp.float32) for n in sizes)
    mesh, whole = jax.sharding.AbstractMesh((1,), (AXIS_NAME,)), jax.sharding.PartitionSpec()

    def as_in_a_run(key, few, many):
        local = model.clone(batch_norm='local')  # of no groups, and without other devices
        variables = local.init(key, few[:1], train=False)

        def both(variables):
            kept = {name: variables[name] for name in _KEPT if name in variables}
            rngs = {'dropout': key}
            outputs, _ = local.apply(kept, many, train=True, mutable=['batch_stats'], rngs=rngs)
            return local.apply(kept, few, train=False), outputs

        mapped = jax.shard_map(both, mesh=mesh, in_specs=whole, out_specs=whole, check_vma=False)
        return variables, *mapped(variables)

    name = type(model).__name__
    try:
        variables, *outputs = shapes.eval_shape(as_in_a_run, jax.random.key(0), few, many)
    except Exception as error:  # whatever a layer makes of an image that has shrunk to nothing
        cause = next(iter(str(error).splitlines()), '')
        raise ValueError(
            f'{name} cannot take images of {image_shape}: {type(error).__name__}: {cause}{_place(error)}'
        ) from error
    for n, x in zip(sizes, outputs, strict=True):
        shape, wanted = getattr(x, 'shape', type(x).__name__), (n, num_classes)
        if shape != wanted:
            raise ValueError(f'{name} gives {shape} for {n} images; accepted: logits {wanted}')
    if others := set(variables) - set(_KEPT):
        others = ', '.join(sorted(others))
        raise ValueError(f'{name} has variables in {others}; accepted: {" and ".join(_KEPT)}')
    if 'params' not in variables:
        raise ValueError(f'{name} has no parameters; accepted: a network that can be trained')
    for what, arrays in {'variables': variables, 'logits': outputs}.items():
        if dtypes := {leaf.dtype for leaf in jax.tree.leaves(arrays)} - {jnp.dtype(jnp.float32)}:
            raise ValueError(f'{name} has {what} of {dtypes.pop()}; accepted: float32')
    return variables


@functools.lru_cache(64)
def frozen(model: nn.Module, image_shape: tuple[int, int, int], used_with: str) -> nn.Module:
    """The model with running statistics in training too.

    Args:
      model: as accepted by ``check_model``.
      image_shape: of the images that it takes.
      used_with: what asks for such models, for the message.

    Raises:
      ValueError: one that moves them all the same, or knows no ``batch_norm='frozen'``.
    """
    model = model.clone(batch_norm='frozen')
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)

    def check(key, images):
        variables = model.init(key, images, train=False)
        return model.apply(variables, images, train=True, rngs={'dropout': key})

    try:
        jax.eval_shape(check, jax.random.key(0), images)
    except Exception as error:  # with 'local' there was none
        raise ValueError(
            f'name: got a {type(model).__name__}; accepted with {used_with}: models whose BatchNorm '
            "leaves its running statistics alone with batch_norm='frozen', as layers.norm_layer does"
        ) from error
    return model


def _place(error: Exception) -> str:
    """In brackets the last line outside of ``_LIBRARIES`` on the way to an error, if there is one."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(_LIBRARIES)]
    return f' ({own[-1].filename}, line {own[-1].lineno})' if own else ''
