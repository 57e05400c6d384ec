"""Residual networks for small images: ResNet-(6n + 2) and Wide ResNet-(6n + 4)-k.

He, Zhang, Ren and Sun, "Deep Residual Learning for Image Recognition", 2016, section 4.2, with the
projection shortcuts (1x1 convolution and BatchNorm) of the official AdaBatch code, or with that paper's
own identity shortcuts, padded with zero channels. Zagoruyko and Komodakis, "Wide Residual Networks",
2016: pre-activation blocks, k times wider.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import lax

from adabatch_jax.models.conv import SPATIAL_AXES, enter
from adabatch_jax.models.layers import (
    Classifier,
    mean_over_pixels,
    norm_layer,
    relu_of_sum,
    residual_conv,
)

SHORTCUTS = ('projection', 'identity')


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    features: int
    stride: int
    batch_norm: str
    dtype: Any
    shortcut: str = 'projection'

    @nn.compact
    def __call__(self, x, *, train: bool):
        norm = norm_layer(self.batch_norm, self.dtype, train)
        y = nn.relu(norm()(residual_conv(self.features, 3, self.stride, self.dtype)(x)))
        y = norm()(residual_conv(self.features, 3, 1, self.dtype)(y))
        if x.shape != y.shape and self.shortcut == 'projection':
            x = norm()(residual_conv(self.features, 1, self.stride, self.dtype)(x))
        elif x.shape != y.shape:
            more = y.shape[-1] - x.shape[-1]
            for axis in SPATIAL_AXES:
                x = lax.slice_in_dim(x, 0, None, self.stride, axis)
            x = jnp.pad(x, (*[(0, 0)] * (x.ndim - 1), (more // 2, more - more // 2)))
        return relu_of_sum(x, y)


class ResNetCifar(nn.Module):
    """``6 * blocks + 2`` weight layers; images ``[batch, height, width, channels]`` to logits."""

    blocks: int
    num_classes: int
    width: int = 16
    shortcut: str = 'projection'
    batch_norm: str = 'local'
    dtype: Any = jnp.float32

    def __post_init__(self):
        if self.shortcut not in SHORTCUTS:
            raise ValueError(f'shortcut: got {self.shortcut!r}; accepted: {", ".join(SHORTCUTS)}')
        super().__post_init__()

    @nn.compact
    def __call__(self, images, *, train: bool):
        norm = norm_layer(self.batch_norm, self.dtype, train)
        x = residual_conv(self.width, 3, 1, self.dtype)(enter(images.astype(self.dtype)))
        x = nn.relu(norm()(x))
        for group in range(3):
            for block in range(self.blocks):
                stride = 2 if group > 0 and block == 0 else 1
                features = self.width * 2**group
                x = Block(features, stride, self.batch_norm, self.dtype, self.shortcut)(x, train=train)
        return Classifier(self.num_classes)(mean_over_pixels(x))


class WideBlock(nn.Module):
    """Pre-activation block: BatchNorm and ReLU before each of two 3x3 convolutions."""

    features: int
    stride: int
    batch_norm: str
    dtype: Any

    @nn.compact
    def __call__(self, x, *, train: bool):
        norm = norm_layer(self.batch_norm, self.dtype, train)
        y = nn.relu(norm()(x))
        if x.shape[-1] != self.features or self.stride != 1:
            x = residual_conv(self.features, 1, self.stride, self.dtype)(y)
        y = residual_conv(self.features, 3, self.stride, self.dtype)(y)
        y = residual_conv(self.features, 3, 1, self.dtype)(nn.relu(norm()(y)))
        return x + y


class WideResNet(nn.Module):
    """``6 * blocks + 4`` weight layers, ``widen`` times as wide as ``ResNetCifar``."""

    blocks: int
    widen: int
    num_classes: int
    batch_norm: str = 'local'
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images, *, train: bool):
        x = residual_conv(16, 3, 1, self.dtype)(enter(images.astype(self.dtype)))
        for group in range(3):
            for block in range(self.blocks):
                stride = 2 if group > 0 and block == 0 else 1
                features = 16 * self.widen * 2**group
                x = WideBlock(features, stride, self.batch_norm, self.dtype)(x, train=train)
        x = nn.relu(norm_layer(self.batch_norm, self.dtype, train)()(x))
        return Classifier(self.num_classes)(mean_over_pixels(x))
