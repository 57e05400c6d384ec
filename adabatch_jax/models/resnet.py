"""Residual networks for ImageNet: ResNet-18, 34, 50, 101 and 152.

He et al., 2016, table 1, in the variant "v1.5": a bottleneck has its stride in the 3x3 convolution. With
``zero_init_residual`` the last BatchNorm scale of every block starts at 0, so that each block starts
as the identity (Goyal et al., 2017, section 5.1).
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from adabatch_jax.models.conv import enter
from adabatch_jax.models.layers import (
    Classifier,
    max_pool,
    mean_over_pixels,
    norm_layer,
    relu_of_sum,
    residual_conv,
)

DEPTHS = {
    18: (False, (2, 2, 2, 2)),
    34: (False, (3, 4, 6, 3)),
    50: (True, (3, 4, 6, 3)),
    101: (True, (3, 4, 23, 3)),
    152: (True, (3, 8, 36, 3)),
}


class ResNet(nn.Module):
    """Images ``[batch, height, width, channels]``, usually 224x224, to logits."""

    bottleneck: bool
    depths: tuple[int, ...]
    num_classes: int
    zero_init_residual: bool = False
    batch_norm: str = 'local'
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images, *, train: bool):
        norm = norm_layer(self.batch_norm, self.dtype, train)
        last_scale = nn.initializers.constant(0.0 if self.zero_init_residual else 1.0)

        def conv(x, features, kernel, stride=1):
            return residual_conv(features, kernel, stride, self.dtype)(x)

        def block(x, width, stride):
            features = width * 4 if self.bottleneck else width
            if self.bottleneck:
                y = nn.relu(norm()(conv(x, width, 1)))
                y = nn.relu(norm()(conv(y, width, 3, stride)))
                y = norm(scale_init=last_scale)(conv(y, features, 1))
            else:
                y = nn.relu(norm()(conv(x, width, 3, stride)))
                y = norm(scale_init=last_scale)(conv(y, features, 3))
            if x.shape != y.shape:
                x = norm()(conv(x, features, 1, stride))
            return relu_of_sum(x, y)

        x = nn.relu(norm()(conv(enter(images.astype(self.dtype)), 64, 7, 2)))
        x = max_pool(x, 3, 2, padding=1)
        for group, depth in enumerate(self.depths):
            for index in range(depth):
                x = block(x, 64 * 2**group, 2 if group > 0 and index == 0 else 1)
        return Classifier(self.num_classes)(mean_over_pixels(x))
