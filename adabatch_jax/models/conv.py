"""The convolution that all models share: ``nn.Conv``, with fast forms of it on the CPU.

XLA's CPU backend hands a convolution to a library (YNNPACK) when images are NHWC, kernels HWIO, the
images are not dilated, and input or output has more than 16 channels. The library shares out the
positions of an image among the cores, not the images of a batch: one core works, the others wait. So
the columns of all examples are laid side by side,

    images[batch, height, width, channels]  ->  rows[1, height, width * batch, channels]

as one image, whose neighbouring columns are ``batch`` pixels apart: a kernel with dilation ``batch``.
Then all cores work at the speed of a large matrix product. What the library does not take is written
as something that it does:

    few channels      two output rows at once, as 32 channels: a kernel one row taller, with a row of
                      zeros below or above, moves by two rows
    strides           each block of stride x stride pixels becomes the channels of one pixel
    input gradient    convolve the incoming gradient with the kernel turned by 180 degrees, its
                      channel axes swapped
    kernel gradient   convolve the images with the incoming gradient, examples taking the place of the
                      channels, and channels lying side by side as the examples did; in chunks of
                      examples that stay in a core's cache
    1x1 kernels, and kernels larger than the output: a sum of matrix products, one for each position in
                      the kernel

The same mathematics, summed in another order. On other backends this is ``nn.Conv``'s own operation.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_LAYOUT = ('NHWC', 'HWIO', 'NHWC')
# A chunk of the kernel gradient: as many examples, at most 64, as have this many activations, which stay
# in the cores' caches; larger ones take up to twice as long an example.
_CHUNK_ACTIVATIONS = 2**19


def rows_first() -> bool:
    """Whether images are ``[height, width, batch, channels]`` inside a model: on the CPU."""
    return jax.default_backend() == 'cpu'


def batch_axis() -> int:
    return 2 if rows_first() else 0


def spatial_axes() -> tuple[int, int]:
    return (0, 1) if rows_first() else (1, 2)


def enter(images: jax.Array) -> jax.Array:
    """Images ``[batch, height, width, channels]`` in the layout that models compute in."""
    return jnp.transpose(images, (1, 2, 0, 3)) if rows_first() else images


def leave(x: jax.Array) -> jax.Array:
    """The inverse of ``enter``."""
    return jnp.transpose(x, (2, 0, 1, 3)) if rows_first() else x


class Conv(nn.Module):
    """2-D convolution of images in the layout of the backend, see ``enter``.

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
        convolve = _convolve_rows if rows_first() else _convolve
        x = convolve(x.astype(self.dtype), kernel.astype(self.dtype), tuple(self.strides), self.padding)
        if self.use_bias:
            bias = self.param('bias', self.bias_init, (self.features,), jnp.float32)
            x = x + bias.astype(self.dtype)
        return x


def _convolve(x: jax.Array, kernel: jax.Array, strides: tuple[int, int], padding: int) -> jax.Array:
    return lax.conv_general_dilated(x, kernel, strides, [(padding,) * 2] * 2, dimension_numbers=_LAYOUT)


def _convolve_rows(x, kernel, strides, padding):
    """Images ``[height, width, batch, channels]``: whichever form is fast."""
    outputs = [
        (size + 2 * padding - k) // stride + 1
        for size, k, stride in zip(x.shape[:2], kernel.shape, strides, strict=False)
    ]
    overhangs = any(k > out for k, out in zip(kernel.shape, outputs, strict=False))
    if x.shape[-1] >= 16 and (overhangs or kernel.shape[:2] == (1, 1)):
        return _sum_of_products(x, kernel, strides, padding, outputs)
    if strides != (1, 1):
        return _strided(x, kernel, strides, padding, outputs)
    return _convolve_dense(x, kernel, ((padding,) * 2,) * 2)


def _sum_of_products(x, kernel, strides, padding, outputs):
    """A matrix product for each position in the kernel; differentiates into matrix products."""
    x = jnp.pad(x, ((padding, padding), (padding, padding), (0, 0), (0, 0)))
    total = 0
    for row, column in np.ndindex(*kernel.shape[:2]):
        rows = slice(row, row + (outputs[0] - 1) * strides[0] + 1, strides[0])
        columns = slice(column, column + (outputs[1] - 1) * strides[1] + 1, strides[1])
        seen = x[rows, columns]
        total += jnp.einsum('hwbi,io->hwbo', seen, kernel[row, column])
    return total


def _strided(x, kernel, strides, padding, outputs):
    """With stride 1: each block of ``strides`` pixels becomes the channels of one pixel."""
    pads, blocks = [], []
    for axis, (k, stride, out) in enumerate(zip(kernel.shape, strides, outputs, strict=False)):
        low = -(-padding // stride)  # blocks before the images, which thus need not be moved
        shift = low * stride - padding
        size = -(-(shift + k) // stride)
        kernel = _fit(kernel, axis, shift, size * stride)
        pads.append((low, 0))
        x = _fit(x, axis, 0, (out + size - 1 - low) * stride)  # all that the outputs see, and no more
        blocks.append((x.shape[axis] // stride, stride, size))
    (rows, down, tall), (columns, across, wide) = blocks
    x = x.reshape(rows, down, columns, across, *x.shape[2:]).transpose(0, 2, 4, 1, 3, 5)
    kernel = kernel.reshape(tall, down, wide, across, *kernel.shape[2:]).transpose(0, 2, 1, 3, 4, 5)
    features = kernel.shape[-1]
    return _convolve_dense(
        x.reshape(*x.shape[:3], -1), kernel.reshape(tall, wide, -1, features), tuple(pads)
    )


def _fit(x, axis, low, size):
    """Zeros before, and zeros or a cut behind, for a size."""
    pads = [(0, 0, 0)] * x.ndim
    pads[axis] = (low, size - low - x.shape[axis], 0)
    return lax.pad(x, jnp.zeros((), x.dtype), pads)


def _dense(x, kernel, pads):
    """Stride 1, on rows in which the pixels of all examples lie side by side."""
    height, width, batch, channels = x.shape
    rows, _, _, features = kernel.shape
    out = height + sum(pads[0]) - rows + 1
    down = 1
    if max(channels, features) <= 16:
        down, pads = 2, ((pads[0][0], pads[0][1] + out % 2), pads[1])
        kernel = jnp.concatenate([_fit(kernel, 0, low, rows + 1) for low in range(2)], 3)
    y = lax.conv_general_dilated(
        x.reshape(1, height, width * batch, channels),
        kernel,
        (down, 1),
        (pads[0], tuple(p * batch for p in pads[1])),
        rhs_dilation=(1, batch),
        dimension_numbers=_LAYOUT,
    )
    if down > 1:
        y = y.reshape(y.shape[1], -1, down, features).transpose(0, 2, 1, 3)
    return y.reshape(-1, width + sum(pads[1]) - kernel.shape[1] + 1, batch, features)[:out]


def _forward(x, kernel, pads):
    return _dense(x, kernel, pads), (x, kernel)


def _backward(pads, residuals, dy):
    x, kernel = residuals
    turned = jnp.swapaxes(kernel[::-1, ::-1], 2, 3)
    opposite = tuple(tuple(k - 1 - p for p in pad) for k, pad in zip(kernel.shape, pads, strict=False))
    return _dense(dy, turned, opposite), _kernel_gradient(x, kernel, pads, dy)


def _kernel_gradient(x, kernel, pads, dy):
    height, width, batch, channels = x.shape

    def of(x, dy):
        result = lax.conv_general_dilated(
            jnp.swapaxes(x, 2, 3).reshape(1, height, width * channels, -1),
            dy,
            (1, 1),
            (pads[0], tuple(p * channels for p in pads[1])),
            rhs_dilation=(1, channels),
            dimension_numbers=_LAYOUT,
            preferred_element_type=jnp.float32,
        )
        return result.reshape(kernel.shape)

    largest = max(x.size, dy.size) // batch
    chunk = max(1, min(64, _CHUNK_ACTIVATIONS // largest))
    whole = batch // chunk * chunk
    total = jnp.zeros(kernel.shape, jnp.float32)
    if whole:

        def add(total, k):
            part = [lax.dynamic_slice_in_dim(a, k * chunk, chunk, 2) for a in (x, dy)]
            return total + of(*part), None

        total, _ = lax.scan(add, total, jnp.arange(whole // chunk))
    if whole < batch:
        total = total + of(x[:, :, whole:], dy[:, :, whole:])
    return total.astype(kernel.dtype)


_convolve_dense = jax.custom_vjp(_dense, nondiff_argnums=(2,))
_convolve_dense.defvjp(_forward, _backward)
