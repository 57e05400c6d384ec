"""Networks by name: ``get_model('resnet20', num_classes=10)``."""

import functools
from typing import Any

import flax.linen as nn

from adabatch_jax.models.layers import BATCH_NORMS
from adabatch_jax.models.resnet_cifar import ResNetCifar

__all__ = ['MODELS', 'get_model']

MODELS = {
    f'resnet{6 * blocks + 2}': functools.partial(ResNetCifar, blocks)
    for blocks in (1, 2, 3, 5, 7, 9, 18)
}


def get_model(name: str, num_classes: int, **options: Any) -> nn.Module:
    """A linen module, called ``module.apply(variables, images, train=...)``.

    Args:
      name: one of ``MODELS``.
      num_classes: width of the logits.
      **options: fields of the module: ``dtype`` of the activations (parameters, BatchNorm
        statistics and logits are float32), ``batch_norm`` (``'local'`` or ``'sync'``), ``width``.

    Returns:
      A module from images ``[batch, height, width, channels]`` to float32 logits
      ``[batch, num_classes]``.

    Raises:
      ValueError: an unknown name or option.
    """
    if name not in MODELS:
        raise ValueError(f'model: got {name!r}; accepted: {", ".join(MODELS)}')
    if num_classes < 1:
        raise ValueError(f'num_classes: got {num_classes}; needs at least 1')
    if options.get('batch_norm', 'local') not in BATCH_NORMS:
        raise ValueError(
            f'batch_norm: got {options["batch_norm"]!r}; accepted: {", ".join(BATCH_NORMS)}'
        )
    try:
        return MODELS[name](num_classes, **options)
    except TypeError as error:
        raise ValueError(f'model {name}: {error}') from error
