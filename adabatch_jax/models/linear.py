"""Linear classification: a convex problem, whose minimum can be known."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp


class Linear(nn.Module):
    """``x W + b`` of the pixels x of an image, from zero: softmax regression with ``cross_entropy``.

    ``batch_norm`` is there for the sake of other models, and has no effect.
    """

    num_classes: int
    batch_norm: str = 'local'
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images, *, train: bool):
        x = images.reshape(len(images), -1).astype(self.dtype)
        z = nn.Dense(
            self.num_classes,
            kernel_init=nn.initializers.zeros_init(),
            dtype=self.dtype,
            precision='highest',  # or an accelerator would round to less than float32
        )(x)
        return z.astype(jnp.float32)
