"""Residual networks for small images: ResNet-(6n + 2).

He, Zhang, Ren and Sun, "Deep Residual Learning for Image Recognition", 2016, section 4.2, with the
projection shortcuts (1x1 convolution and BatchNorm) of the official AdaBatch code.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from adabatch_jax.models.conv import Conv
from adabatch_jax.models.layers import Classifier, fan_out_normal, norm_layer


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    features: int
    stride: int
    batch_norm: str
    dtype: Any

    @nn.compact
    def __call__(self, x, *, train: bool):
        norm = norm_layer(self.batch_norm, self.dtype, train)

        def conv(features, kernel, stride):
            return Conv(
                features,
                (kernel, kernel),
                (stride, stride),
                padding=kernel // 2,
                use_bias=False,
                kernel_init=fan_out_normal,
                dtype=self.dtype,
            )

        y = nn.relu(norm()(conv(self.features, 3, self.stride)(x)))
        y = norm()(conv(self.features, 3, 1)(y))
        if x.shape != y.shape:
            x = norm()(conv(self.features, 1, self.stride)(x))
        return nn.relu(x + y)


class ResNetCifar(nn.Module):
    """``6 * blocks + 2`` weight layers; images ``[batch, height, width, channels]`` to logits."""

    blocks: int
    num_classes: int
    width: int = 16
    batch_norm: str = 'local'
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images, *, train: bool):
        norm = norm_layer(self.batch_norm, self.dtype, train)
        x = Conv(
            self.width,
            (3, 3),
            padding=1,
            use_bias=False,
            kernel_init=fan_out_normal,
            dtype=self.dtype,
        )(images.astype(self.dtype))
        x = nn.relu(norm()(x))
        for group in range(3):
            for block in range(self.blocks):
                stride = 2 if group > 0 and block == 0 else 1
                x = Block(self.width * 2**group, stride, self.batch_norm, self.dtype)(x, train=train)
        return Classifier(self.num_classes)(x.mean(axis=(1, 2)))
