"""AlexNet for small images, and for ImageNet with and without BatchNorm.

The small one is that of the official AdaBatch code. The large one is Krizhevsky's "One weird trick for
parallelizing convolutional neural networks", 2014, as torchvision has it (the network of the AdaBatch
paper's ImageNet runs); ``alexnet_bn`` has BatchNorm after every convolution and hidden layer instead of
dropout, for LARS (You, Gitman and Ginsburg, 2017). Initialisation is PyTorch's default throughout.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from adabatch_jax.models.conv import Conv, enter
from adabatch_jax.models.layers import Classifier, flatten, max_pool, norm_layer, torch_uniform


def _conv(x, features, kernel, stride, padding, dtype, use_bias=True):
    init = torch_uniform(kernel * kernel * x.shape[-1])
    return Conv(
        features,
        (kernel, kernel),
        (stride, stride),
        padding=padding,
        use_bias=use_bias,
        kernel_init=init,
        bias_init=init,
        dtype=dtype,
    )(x)


class AlexNetCifar(nn.Module):
    """Five convolutions and one linear layer, for images of 32x32 and a little more."""

    num_classes: int
    batch_norm: str = 'local'  # it has none; taken so that all models take the same options
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images, *, train: bool):
        x = enter(images.astype(self.dtype))
        x = max_pool(nn.relu(_conv(x, 64, 11, 4, 5, self.dtype)), 2, 2)
        x = max_pool(nn.relu(_conv(x, 192, 5, 1, 2, self.dtype)), 2, 2)
        for features in (384, 256, 256):
            x = nn.relu(_conv(x, features, 3, 1, 1, self.dtype))
        x = max_pool(x, 2, 2)
        return Classifier(self.num_classes)(flatten(x))


class AlexNet(nn.Module):
    """Five convolutions and three linear layers, for images of 224x224."""

    num_classes: int
    normalised: bool = False  # BatchNorm instead of dropout
    batch_norm: str = 'local'
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images, *, train: bool):
        norm = norm_layer(self.batch_norm, self.dtype, train)

        def activate(x):
            return nn.relu(norm()(x) if self.normalised else x)

        x = enter(images.astype(self.dtype))
        for features, kernel, stride, padding, pool in (
            (64, 11, 4, 2, True),
            (192, 5, 1, 2, True),
            (384, 3, 1, 1, False),
            (256, 3, 1, 1, False),
            (256, 3, 1, 1, True),
        ):
            x = activate(_conv(x, features, kernel, stride, padding, self.dtype, not self.normalised))
            if pool:
                x = max_pool(x, 3, 2)
        x = flatten(x)
        for _ in range(2):
            if not self.normalised:
                x = nn.Dropout(0.5, deterministic=not train)(x)
            init = torch_uniform(x.shape[-1])
            x = nn.Dense(
                4096,
                use_bias=not self.normalised,
                kernel_init=init,
                bias_init=init,
                dtype=self.dtype,
            )(x)
            x = activate(x)
        return Classifier(self.num_classes)(x)
