"""VGG for small images: configurations A, B, D and E with one linear layer.

Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", 2015, table
1, in the form of the official AdaBatch code: convolutions with bias, BatchNorm after them where named,
five poolings, and a linear layer of N(0, 0.01) from what is left.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from adabatch_jax.models.conv import Conv, enter
from adabatch_jax.models.layers import Classifier, fan_out_normal, flatten, max_pool, norm_layer

WIDTHS = (64, 128, 256, 512, 512)
DEPTHS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


class VGG(nn.Module):
    """``sum(repeats)`` convolutions and a linear layer, for images of 32x32 and larger."""

    repeats: tuple[int, ...]
    normalised: bool
    num_classes: int
    batch_norm: str = 'local'
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images, *, train: bool):
        norm = norm_layer(self.batch_norm, self.dtype, train)
        x = enter(images.astype(self.dtype))
        for width, repeat in zip(WIDTHS, self.repeats, strict=True):
            for _ in range(repeat):
                x = Conv(width, (3, 3), padding=1, kernel_init=fan_out_normal, dtype=self.dtype)(x)
                x = nn.relu(norm()(x) if self.normalised else x)
            x = max_pool(x, 2, 2)
        small, zero = nn.initializers.normal(0.01), nn.initializers.zeros_init()
        return Classifier(self.num_classes, small, zero)(flatten(x))
