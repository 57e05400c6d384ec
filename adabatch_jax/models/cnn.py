"""The smallest network that has what the others have: for tests, first steps and slow machines."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from adabatch_jax.models.conv import enter
from adabatch_jax.models.layers import Classifier, mean_over_pixels, norm_layer, residual_conv


class CNN(nn.Module):
    """Two convolutions with BatchNorm, the second with stride 2, and one linear layer."""

    num_classes: int
    batch_norm: str = 'local'
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images, *, train: bool):
        norm = norm_layer(self.batch_norm, self.dtype, train)
        x = enter(images.astype(self.dtype))
        for features, stride in ((16, 1), (32, 2)):
            x = nn.relu(norm()(residual_conv(features, 3, stride, self.dtype)(x)))
        return Classifier(self.num_classes)(mean_over_pixels(x))
