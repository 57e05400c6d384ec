"""The convolution that all models share: ``nn.Conv``, with fast forms on the CPU and some GPUs.

XLA's CPU backend hands a convolution to a library (YNNPACK) when images are NHWC, kernels HWIO, the
images are not dilated, and input or output has more than 16 channels. The library shares out the
positions of an image among the cores, not the images of a batch: one core works, the others wait. So
the columns of a group of examples are laid side by side,

    images[batch, height, width, channels]  ->  x[groups, height, width, examples, channels]
                                            ->  rows[groups, height, width * examples, channels]

as one image, whose neighbouring columns are ``examples`` pixels apart: a kernel with dilation
``examples``. Then all cores work at the speed of a large matrix product, and at the same speed whatever
the batch size is, since the rows of a group fit into the cores' caches. What the library does not take
is written as something that it does:

    few channels      two output rows at once, as 32 channels: a kernel one row taller, with a row of
                      zeros below or above, moves by two rows
    strides           each block of stride x stride pixels becomes the channels of one pixel
    input gradient    convolve the incoming gradient with the kernel turned by 180 degrees, its
                      channel axes swapped
    kernel gradient   convolve the images with the incoming gradient, examples taking the place of the
                      channels, and channels lying side by side as the examples did; in chunks, see
                      ``_CHUNK_SUM``
    1x1 kernels       a matrix product, its kernel gradient as any other
    kernels larger than the output: a matrix product, the kernel as a matrix from all pixels of an image
                      to all of its output; where few images are not worth making that, or it would be
                      large, one with all that the kernel sees at each place, side by side

The same mathematics, summed in another order.

On other backends this is ``nn.Conv``'s own operation, but for few channels in bfloat16 on Hopper GPUs
and newer ones. There strides are made as above, where images come in, and else neighbouring columns are
taken for one column with all of their channels, which moves nothing in memory,

    images[batch, height, width, channels]  ->  x[batch, height, width / columns, columns * channels]

and the kernel gets zeros where it does not reach from a column to another: cuDNN's kernels make 64
channels at once, or throw work for as many away. On an H200 updates of ResNet-20 with 128 and 2,048
examples took 1.90 and 9.90 ms, and take 1.62 and 6.87; of an update of ResNet-50 with 256, 35.9 ms, the
first convolution took 2.8, and takes 1.1.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_LAYOUT = ('NHWC', 'HWIO', 'NHWC')
SPATIAL_AXES = (1, 2)  # height and width of ``x`` inside a model, on every backend
# Pixels of an image's size that a group of examples has, so that the rows that a kernel looks at stay
# in a core's cache, and neighbouring pixels do not lie a large power of two apart.
_GROUP_PIXELS = 2**16
# The library goes through the whole sum of a matrix product for each tile of the result, so that what is
# summed has to stay in a core's cache. A kernel gradient sums over examples and pixels: in chunks of so
# many, some rows of the images of some examples.
_CHUNK_SUM = 2**12
_CHUNK_EXAMPLES = 16, 64  # at least, for the sake of the innermost loop, and at most
_MOST_ROWS_OF_CHUNKS = 16  # each is an operation to compile
_FEWEST_CHANNELS = 16  # for a kernel larger than the output to become a matrix
_FEWEST_FOR_MATRIX = 64  # images
_LARGEST_MATRIX = 16  # times the kernel
_FEW_CHANNELS = 16  # that the library does not take
_GPU_CHANNELS = 64  # that a GPU makes at once
_IMAGE_CHANNELS = 4  # of an image, at most


def in_groups() -> bool:
    """Whether images are ``[groups, height, width, examples, channels]`` inside a model: on the CPU."""
    return jax.default_backend() == 'cpu'


def group_size(batch: int, pixels: int) -> int:
    """Examples of a group: the divisor of the batch size that is nearest to the best.

    As a ratio, and one that is too large is nearer than one that is too small: with 50 examples instead
    of 64 the library takes a fifth longer for an image, with 100 or 125 not at all.
    """
    best = max(1, _GROUP_PIXELS // pixels)
    divisors = (size for size in range(1, batch + 1) if batch % size == 0)
    return min(divisors, key=lambda size: max(size / best, (best / size) ** 3))


def several_groups(height: int, width: int) -> int:
    """A batch size that makes groups in ``enter``: more of them than an image is high."""
    return (height + 1) * max(1, _GROUP_PIXELS // (height * width))


def enter(images: jax.Array) -> jax.Array:
    """Images ``[batch, height, width, channels]`` in the layout that models compute in."""
    if not in_groups():
        return images
    batch, height, width, channels = images.shape
    size = group_size(batch, height * width)
    return images.reshape(-1, size, height, width, channels).transpose(0, 2, 3, 1, 4)


def leave(x: jax.Array) -> jax.Array:
    """The inverse of ``enter``."""
    return x.transpose(0, 3, 1, 2, 4).reshape(-1, *x.shape[1:3], x.shape[-1]) if in_groups() else x


def rows_at_once(x: jax.Array) -> int:
    """Rows of the images ``x`` that a convolution of few channels wrote at once."""
    few = in_groups() and x.ndim == 5 and x.shape[-1] <= _FEW_CHANNELS
    return 2 if few and x.shape[1] % 2 == 0 else 1


def as_written(x: jax.Array, rows: int) -> jax.Array:
    """Images in the order in which a convolution wrote them, ``rows`` at once, as their channels.

    ``[groups, height / rows, width, examples, rows * channels]``: sums over that need no copy.
    """
    if rows == 1:
        return x
    groups, height, *pixels, channels = x.shape
    x = x.reshape(groups, height // rows, rows, -1, channels).transpose(0, 1, 3, 2, 4)
    return x.reshape(groups, height // rows, *pixels, rows * channels)


def in_order(x: jax.Array, rows: int) -> jax.Array:
    """The inverse of ``as_written``."""
    if rows == 1:
        return x
    groups, height, *pixels, channels = x.shape
    x = x.reshape(groups, height, -1, rows, channels // rows).transpose(0, 1, 3, 2, 4)
    return x.reshape(groups, height * rows, *pixels, channels // rows)


def places(x: jax.Array, window: Sequence[int], strides: Sequence[int], padding: int) -> list[int]:
    """How many places images inside a model have for a window; ``ValueError`` for none."""
    sizes = [x.shape[axis] for axis in SPATIAL_AXES]
    found = [(n + 2 * padding - k) // s + 1 for n, k, s in zip(sizes, window, strides, strict=True)]
    if min(found) < 1:
        raise ValueError(
            f'images of {sizes[0]}x{sizes[1]}, padded by {padding}, are too small for a window of '
            f'{window[0]}x{window[1]}; use larger images'
        )
    return found


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
        if x.ndim != (5 if in_groups() else 4):
            raise ValueError(f'got images {x.shape}; a model takes them through `enter` first')
        places(x, self.kernel_size, self.strides, self.padding)  # at least one
        shape = (*self.kernel_size, x.shape[-1], self.features)
        kernel = self.param('kernel', self.kernel_init, shape, jnp.float32)
        convolve = _convolve_groups if in_groups() else _convolve
        x = convolve(x.astype(self.dtype), kernel.astype(self.dtype), tuple(self.strides), self.padding)
        if self.use_bias:
            bias = self.param('bias', self.bias_init, (self.features,), jnp.float32)
            x = x + bias.astype(self.dtype)
        return x


def _convolve(x: jax.Array, kernel: jax.Array, strides: tuple[int, int], padding: int) -> jax.Array:
    """Images ``[batch, height, width, channels]``."""
    pads = ((padding, padding),) * 2
    if x.dtype.itemsize <= 2 and _wastes_channels():
        if strides != (1, 1) and x.shape[-1] <= _IMAGE_CHANNELS:
            (x, kernel, pads), strides = _in_blocks(x, kernel, strides, padding), (1, 1)
            x = x.transpose(0, 1, 3, 2, 4, 5).reshape(*x.shape[:2], x.shape[3], -1)
        elif (columns := _columns_at_once(x, kernel, strides, padding)) > 1:
            return _convolve_columns(x, kernel, padding, columns)
    return lax.conv_general_dilated(x, kernel, strides, pads, dimension_numbers=_LAYOUT)


def _convolve_columns(x, kernel, padding, columns):
    """Stride 1, with as many neighbouring columns taken for one."""
    batch, height, width, channels = x.shape
    rows, _, _, features = kernel.shape
    reach = -(-padding // columns)  # of the kernel, to either side
    wide = 2 * reach + 1
    of_columns = [fit(kernel, 1, columns * reach - padding + k, columns * wide) for k in range(columns)]
    y = lax.conv_general_dilated(
        x.reshape(batch, height, width // columns, columns * channels),
        jnp.stack(of_columns, 3).reshape(rows, wide, columns * channels, columns * features),
        (1, 1),
        ((padding, padding), (reach, reach)),
        dimension_numbers=_LAYOUT,
    )
    return y.reshape(batch, y.shape[1], width, features)


def _columns_at_once(x, kernel, strides, padding) -> int:
    """Neighbouring columns of images that are taken for one."""
    _, width, *channels = kernel.shape
    if strides != (1, 1) or not 1 < width == 2 * padding + 1:
        return 1
    most = max(1, _GPU_CHANNELS // max(channels))
    return next(n for n in range(most, 0, -1) if x.shape[2] % n == 0)


def _wastes_channels() -> bool:
    """Whether convolutions of few channels take as long as those of many: on Hopper GPUs and newer."""
    generation, _, _ = getattr(jax.devices()[0], 'compute_capability', '').partition('.')
    return jax.default_backend() == 'gpu' and generation.isdecimal() and int(generation) >= 9


def _convolve_groups(x, kernel, strides, padding):
    """Images ``[groups, height, width, examples, channels]``: whichever form is fast."""
    outputs = places(x, kernel.shape[:2], strides, padding)
    if np.any(np.greater(kernel.shape[:2], outputs)) and x.shape[-1] >= _FEWEST_CHANNELS:
        many = x.shape[0] * x.shape[3] >= _FEWEST_FOR_MATRIX
        copies = np.prod(x.shape[1:3]) * np.prod(outputs) / np.prod(kernel.shape[:2])
        product = _matrix_product if many and copies <= _LARGEST_MATRIX else _of_patches
        return product(x, kernel, strides, padding, outputs)
    if kernel.shape[:2] == (1, 1) and not padding:
        return _convolve_dense(x[:, :: strides[0], :: strides[1]], kernel, ((0, 0), (0, 0)))
    if strides != (1, 1):
        x, kernel, pads = _in_blocks(x, kernel, strides, padding)
        x = jnp.concatenate([x[:, :, i, :, j] for i, j in np.ndindex(*strides)], -1)
        return _convolve_dense(x, kernel, pads)
    return _convolve_dense(x, kernel, ((padding,) * 2,) * 2)


def _matrix_product(x, kernel, strides, padding, outputs):
    """With one matrix from the pixels of an image to those of its output; without their padding."""
    for axis, (size, stride, out) in enumerate(zip(x.shape[1:3], strides, outputs, strict=True)):
        seen = [fit(kernel, 2 * axis, p * stride - padding, size) for p in range(out)]
        kernel = jnp.stack(seen, axis)
    return jnp.einsum('ghwei,pqhwio->gpqeo', x, kernel)


def _of_patches(x, kernel, strides, padding, outputs):
    """With the kernel as a matrix, from all that it sees at a place; differentiates into products."""
    x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0), (0, 0)))
    seen = []
    for row, column in np.ndindex(*kernel.shape[:2]):
        rows = slice(row, row + (outputs[0] - 1) * strides[0] + 1, strides[0])
        columns = slice(column, column + (outputs[1] - 1) * strides[1] + 1, strides[1])
        seen.append(x[:, rows, columns])
    return jnp.concatenate(seen, -1) @ kernel.reshape(-1, kernel.shape[-1])


def _in_blocks(x, kernel, strides, padding):
    """For stride 1: each block of ``strides`` pixels is to become the channels of one pixel.

    Images as ``[n, rows, stride, columns, stride, ...]``; kernel and padding for what they become.
    """
    outputs, pads, blocks = places(x, kernel.shape[:2], strides, padding), [], []
    for axis, (stride, out) in enumerate(zip(strides, outputs, strict=True)):
        low = -(-padding // stride)  # blocks before the images, which thus need not be moved
        shift = low * stride - padding
        size = -(-(shift + kernel.shape[axis]) // stride)
        kernel = fit(kernel, axis, shift, size * stride)
        pads.append((low, 0))
        x = fit(x, axis + 1, 0, (out + size - 1 - low) * stride)  # all that the outputs see, no more
        blocks.append((x.shape[axis + 1] // stride, stride, size))
    (rows, down, tall), (columns, across, wide) = blocks
    kernel = kernel.reshape(tall, down, wide, across, *kernel.shape[2:]).transpose(0, 2, 1, 3, 4, 5)
    kernel = kernel.reshape(tall, wide, -1, kernel.shape[-1])
    return x.reshape(-1, rows, down, columns, across, *x.shape[3:]), kernel, tuple(pads)


def fit(x, axis, low, size):
    """Zeros, or a cut, before and behind along an axis, so that it has ``size`` elements.

    The old first one comes to ``low``.
    """
    pads = [(0, 0, 0)] * x.ndim
    pads[axis] = (low, size - low - x.shape[axis], 0)
    return lax.pad(x, jnp.zeros((), x.dtype), pads)


def _convolve_dense(x, kernel, pads):
    """Stride 1: images ``[groups, height, width, examples, channels]``.

    As rows they go in and are kept for the kernel gradient: XLA computes anew for each shape that an
    array is asked for in.
    """
    examples = x.shape[3]
    y = _convolve_rows(x.reshape(*x.shape[:2], -1, x.shape[-1]), kernel, pads, examples)
    return y.reshape(*y.shape[:2], -1, examples, y.shape[-1])


def _rows(x, kernel, pads, examples):
    """Stride 1, on rows in which the pixels of a group's examples lie side by side."""
    rows, columns, channels, features = kernel.shape
    if rows == columns == 1 and not np.any(pads):
        return x @ kernel[0, 0]
    out = x.shape[1] + sum(pads[0]) - rows + 1
    down = 1
    if max(channels, features) <= _FEW_CHANNELS:
        down, pads = 2, ((pads[0][0], pads[0][1] + out % 2), pads[1])
        kernel = jnp.concatenate([fit(kernel, 0, low, rows + 1) for low in range(2)], 3)
    y = lax.conv_general_dilated(
        x,
        kernel,
        (down, 1),
        (pads[0], tuple(p * examples for p in pads[1])),
        rhs_dilation=(1, examples),
        dimension_numbers=_LAYOUT,
    )
    return in_order(y, down)[:, :out]


def _turned(kernel, pads):
    """Kernel and padding of the convolution that takes a gradient back to the images."""
    opposite = tuple(tuple(k - 1 - p for p in pad) for k, pad in zip(kernel.shape, pads, strict=False))
    return jnp.swapaxes(kernel[::-1, ::-1], 2, 3), opposite


def _rows_forward(x, kernel, pads, examples):
    return _rows(x, kernel, pads, examples), (x, kernel)


def _rows_backward(pads, examples, residuals, dy):
    x, kernel = residuals
    of_kernel = _kernel_gradient(x, dy, kernel.shape, pads, examples).astype(kernel.dtype)
    return _convolve_rows(dy, *_turned(kernel, pads), examples), of_kernel


def _in_chunks(x, dy, shape, pads, examples):
    """The gradient of a kernel of some shape, in float32."""
    groups, height, channels = *x.shape[:2], x.shape[-1]
    out, columns, features = dy.shape[1], dy.shape[2] // examples, dy.shape[-1]
    fewest_rows = -(-out // _MOST_ROWS_OF_CHUNKS)
    wanted = np.clip(_CHUNK_SUM // (fewest_rows * columns), *_CHUNK_EXAMPLES)
    together = max(1, int(wanted) // examples)  # groups
    rows = max(fewest_rows, _CHUNK_SUM // (columns * together * examples))

    def add(total, x, dy):
        x = x.reshape(len(x), height, -1, examples, channels)
        x = x.transpose(1, 2, 4, 0, 3).reshape(1, height, x.shape[2] * channels, -1)
        x = lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), (*pads[0], 0), (0, 0, 0), (0, 0, 0)))
        dy = dy.reshape(len(dy), out, columns, examples, features)
        dy = dy.transpose(1, 2, 0, 3, 4).reshape(out, columns, -1, features)
        for row in range(0, out, rows):
            part = dy[row : row + rows]
            total += lax.conv_general_dilated(
                x[:, row : row + len(part) + shape[0] - 1],
                part,
                (1, 1),
                ((0, 0), tuple(p * channels for p in pads[1])),
                rhs_dilation=(1, channels),
                dimension_numbers=_LAYOUT,
                preferred_element_type=jnp.float32,
            )
        return total

    whole = groups // together * together
    total = jnp.zeros((1, shape[0], shape[1] * channels, features), jnp.float32)
    if whole:

        def step(total, k):
            part = [lax.dynamic_slice_in_dim(a, k * together, together) for a in (x, dy)]
            return add(total, *part), None

        total, _ = lax.scan(step, total, jnp.arange(whole // together))
    if whole < groups:
        total = add(total, x[whole:], dy[whole:])
    return total.reshape(shape)


def _in_chunks_forward(x, dy, shape, pads, examples):
    return _in_chunks(x, dy, shape, pads, examples), (x, dy)


def _in_chunks_backward(shape, pads, examples, residuals, change):
    x, dy = residuals
    change = change.astype(x.dtype)
    of_x = _convolve_rows(dy, *_turned(change, pads), examples)
    return of_x, _convolve_rows(x, change, pads, examples)


# Both are linear in each argument, and the derivatives of the one are made of the other, so that
# derivatives of any order (curvature.py) are as fast as the first.
_convolve_rows = jax.custom_vjp(_rows, nondiff_argnums=(2, 3))
_convolve_rows.defvjp(_rows_forward, _rows_backward)
_kernel_gradient = jax.custom_vjp(_in_chunks, nondiff_argnums=(2, 3, 4))
_kernel_gradient.defvjp(_in_chunks_forward, _in_chunks_backward)
