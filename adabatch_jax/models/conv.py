"""The convolution that all models share: ``nn.Conv``, with fast gradients on the CPU.

XLA's CPU backend turns a convolution into a fast library call when it is in the canonical layout
(images NHWC, kernels HWIO), inside loops and outside. The gradients that automatic differentiation
writes are not, and get slower per image as the batch grows. Here both gradients are written in the
canonical layout: the same mathematics, summed in another order.

    input gradient    convolve the incoming gradient with the kernel turned by 180 degrees, its
                      channel axes swapped
    kernel gradient   convolve the images with the incoming gradient, channels taking the place of the
                      batch and the batch that of the channels; in chunks of a few examples, since
                      the library is fast for few input channels

Where the kernel is larger than the output (3x3 on 2x2, the last layers of VGG on CIFAR) that library
call takes a hundred times as long as its arithmetic would. There, and for 1x1 kernels, the convolution
is a sum of matrix products, one for each position in the kernel.

On other backends this is ``nn.Conv``'s own operation.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_LAYOUT = ('NHWC', 'HWIO', 'NHWC')
# A chunk of the kernel gradient: as many examples, at most 32, as have this many activations. One
# megabyte stays in a core's cache; measured on layers from 64x64x64 to 4x4x512.
_CHUNK_ACTIVATIONS = 2**18


class Conv(nn.Module):
    """2-D convolution of images ``[batch, height, width, channels]``.

    Attributes:
      features: output channels.
      kernel_size: height and width of the kernel.
      strides: vertical and horizontal step.
      padding: zeros on every side.
      use_bias: adds a learned bias.
      dtype: of the computation; parameters are float32.
    """

    features: int
    kernel_size: Sequence[int]
    strides: Sequence[int] = (1, 1)
    padding: int = 0
    use_bias: bool = True
    kernel_init: Callable = nn.initializers.lecun_normal()
    bias_init: Callable = nn.initializers.zeros_init()
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        shape = (*self.kernel_size, x.shape[-1], self.features)
        kernel = self.param('kernel', self.kernel_init, shape, jnp.float32)
        convolve = _convolve_cpu if jax.default_backend() == 'cpu' else _convolve
        x = convolve(x.astype(self.dtype), kernel.astype(self.dtype), tuple(self.strides), self.padding)
        if self.use_bias:
            bias = self.param('bias', self.bias_init, (self.features,), jnp.float32)
            x = x + bias.astype(self.dtype)
        return x


def _convolve(x: jax.Array, kernel: jax.Array, strides: tuple[int, int], padding: int) -> jax.Array:
    return lax.conv_general_dilated(x, kernel, strides, [(padding,) * 2] * 2, dimension_numbers=_LAYOUT)


def _convolve_cpu(x, kernel, strides, padding):
    """Whichever form is fast; products of matrices with very few columns, as of images, are not."""
    outputs = [
        (size + 2 * padding - k) // stride + 1
        for size, k, stride in zip(x.shape[1:3], kernel.shape, strides, strict=False)
    ]
    overhangs = any(k > out for k, out in zip(kernel.shape, outputs, strict=False))
    if x.shape[-1] >= 16 and (overhangs or kernel.shape[:2] == (1, 1)):
        return _sum_of_products(x, kernel, strides, padding, outputs)
    return _convolve_canonical(x, kernel, strides, padding)


def _sum_of_products(x, kernel, strides, padding, outputs):
    """A matrix product for each position in the kernel; differentiates into matrix products."""
    x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    total = 0
    for row, column in np.ndindex(*kernel.shape[:2]):
        rows = slice(row, row + (outputs[0] - 1) * strides[0] + 1, strides[0])
        columns = slice(column, column + (outputs[1] - 1) * strides[1] + 1, strides[1])
        seen = x[:, rows, columns]
        total += jnp.einsum('bhwi,io->bhwo', seen, kernel[row, column])
    return total


def _forward(x, kernel, strides, padding):
    return _convolve(x, kernel, strides, padding), (x, kernel)


def _backward(strides, padding, residuals, dy):
    x, kernel = residuals
    return _input_gradient(x, kernel, strides, padding, dy), _kernel_gradient(
        x, kernel, strides, padding, dy
    )


def _input_gradient(x, kernel, strides, padding, dy):
    pads = []
    for size, k, stride, out in zip(x.shape[1:3], kernel.shape, strides, dy.shape[1:3], strict=False):
        low = k - 1 - padding
        spread = (out - 1) * stride + 1
        pads.append((low, size - spread - low + k - 1))
    turned = jnp.swapaxes(kernel[::-1, ::-1], 2, 3)
    return lax.conv_general_dilated(
        dy, turned, (1, 1), pads, lhs_dilation=strides, dimension_numbers=_LAYOUT
    )


def _kernel_gradient(x, kernel, strides, padding, dy):
    pads = []
    for size, k, stride, out in zip(x.shape[1:3], kernel.shape, strides, dy.shape[1:3], strict=False):
        pads.append((padding, (out - 1) * stride + k - size - padding))

    def of(x, dy):
        result = lax.conv_general_dilated(
            jnp.transpose(x, (3, 1, 2, 0)),  # channels as the batch, the batch as channels
            jnp.transpose(dy, (1, 2, 0, 3)),
            (1, 1),
            pads,
            rhs_dilation=strides,
            dimension_numbers=_LAYOUT,
            preferred_element_type=jnp.float32,
        )
        return jnp.transpose(result, (1, 2, 0, 3))

    largest = max(math.prod(x.shape[1:]), math.prod(dy.shape[1:]))
    chunk = max(1, min(32, _CHUNK_ACTIVATIONS // largest))
    whole = len(x) // chunk * chunk
    total = jnp.zeros(kernel.shape, jnp.float32)
    if whole:
        chunks = [a[:whole].reshape(-1, chunk, *a.shape[1:]) for a in (x, dy)]
        total, _ = lax.scan(lambda sum_, part: (sum_ + of(*part), None), total, chunks)
    if whole < len(x):
        total = total + of(x[whole:], dy[whole:])
    return total.astype(kernel.dtype)


_convolve_canonical = jax.custom_vjp(_convolve, nondiff_argnums=(2, 3))
_convolve_canonical.defvjp(_forward, _backward)
