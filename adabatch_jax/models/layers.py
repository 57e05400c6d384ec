"""The layers that all models share."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from adabatch_jax.models.conv import (
    SPATIAL_AXES,
    Conv,
    as_written,
    fit,
    in_groups,
    in_order,
    leave,
    places,
    rows_at_once,
)

MOMENTUM = 0.9  # of the running statistics of BatchNorm
AXIS_NAME = 'batch'  # the mapped axis of the train step, over which `sync` statistics are taken

# He et al., 2015, with fan-out, as the official AdaBatch code initialises its convolutions.
fan_out_normal = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')


def torch_uniform(fan_in: int) -> Callable:
    """PyTorch's default for weights and biases: uniform in ``+-1 / sqrt(fan_in)``."""
    bound = fan_in**-0.5

    def init(key, shape, dtype=jnp.float32):
        return nn.initializers.uniform(2 * bound)(key, shape, dtype) - bound

    return init


def check_batch_norm(batch_norm: str) -> int:
    """The group size of a BatchNorm policy, 0 where it has none; ``ValueError`` for no policy."""
    name, _, size = batch_norm.partition(':')
    if name == 'ghost' and size.isdecimal() and int(size) > 1:
        return int(size)
    if batch_norm not in ('local', 'sync'):
        raise ValueError(
            f'batch_norm: got {batch_norm!r}; accepted: local, sync, or ghost:N for groups of N > 1'
        )
    return 0


class BatchNorm(nn.Module):
    """BatchNorm (Ioffe and Szegedy, 2015), over all examples or over groups of them.

    Over groups of ``group`` consecutive examples it is Hoffer et al., 2017, algorithm 1: the statistics
    of a batch of any size are those of batches of ``group``, so that they mean the same in every stage.
    The running statistics move once, by the mean over the groups. Parameters and statistics are called
    as those of ``nn.BatchNorm``, which keeps ``x`` and ``x - mean`` for the backward pass; this one has
    ``x`` alone: a seventh less memory for a training step of ResNet-20.

    Attributes:
      train: normalises by the statistics of the batch, and moves the running ones.
      dtype: of the result; statistics are float32.
      group: examples; 0 for all of them.
      axis_name: mapped axis over which statistics are taken too; not with groups.
    """

    train: bool
    dtype: Any
    group: int = 0
    axis_name: str | None = None
    momentum: float = MOMENTUM
    epsilon: float = 1e-5
    scale_init: Callable = nn.initializers.ones_init()

    @nn.compact
    def __call__(self, x):
        shape = x.shape[-1:]
        scale = self.param('scale', self.scale_init, shape, jnp.float32)
        bias = self.param('bias', nn.initializers.zeros_init(), shape, jnp.float32)
        running_mean = self.variable('batch_stats', 'mean', jnp.zeros, shape, jnp.float32)
        running_var = self.variable('batch_stats', 'var', jnp.ones, shape, jnp.float32)
        rows = rows_at_once(x) if self.train and not self.group else 1
        x = as_written(x, rows).astype(jnp.float32)
        mean, var = running_mean.value, running_var.value
        if self.train:
            mean, square = self._mean(x, rows), self._mean(lax.square(x), rows)
            if self.axis_name and not self.is_initializing():
                mean, square = lax.pmean((mean, square), self.axis_name)
            var = square - lax.square(mean)
            var = jnp.where(var <= 0, 0, var)  # not `maximum`, whose gradient wants equal recomputation
            if not self.is_initializing():
                for running, value in ((running_mean, mean), (running_var, var)):
                    value = value.reshape(-1, *shape).mean(axis=0)
                    running.value = self.momentum * running.value + (1 - self.momentum) * value
        factor = lax.rsqrt(var + self.epsilon) * scale
        offset = bias - mean * factor
        if self.train and self.group:
            factor, offset = self._of_examples(factor, x), self._of_examples(offset, x)
        elif rows > 1:
            factor, offset = jnp.tile(factor, rows), jnp.tile(offset, rows)
        return in_order((x * factor + offset).astype(self.dtype), rows)

    def _mean(self, x, rows):
        """Of each channel ``[channels]``, or of each group ``[groups, channels]``."""
        if not self.group:
            return x.mean(axis=range(x.ndim - 1)).reshape(rows, -1).mean(axis=0)
        of_examples = mean_over_pixels(x) if x.ndim > 2 else x
        if len(of_examples) % self.group:
            raise ValueError(f'{len(of_examples)} examples do not divide into groups of {self.group}')
        return of_examples.reshape(-1, self.group, x.shape[-1]).mean(axis=1)

    def _of_examples(self, of_groups, x):
        """``[groups, channels]``, once for each example, in a shape that goes with ``x``."""
        shape = list(x.shape)
        if x.ndim > 2:
            for axis in SPATIAL_AXES:
                shape[axis] = 1
        return jnp.repeat(of_groups, self.group, axis=0).reshape(shape)


def norm_layer(batch_norm: str, dtype: Any, train: bool) -> Callable[..., nn.Module]:
    """BatchNorm with the statistics that ``batch_norm`` names; running statistics when not training.

    ``local`` takes them over one device's microbatch, ``sync`` over the microbatches that all
    devices run at once, ``ghost:N`` over groups of N examples of a microbatch. Running statistics move
    by 0.1 an update, as PyTorch's do; the variance is that of the values at hand, as in Flax, of which
    PyTorch takes n / (n - 1) times. ``frozen``, for code and not for configs, takes them in training
    too, and leaves them as they are.
    """
    if batch_norm == 'frozen':
        return functools.partial(BatchNorm, train=False, dtype=dtype)
    group = check_batch_norm(batch_norm)
    axis_name = AXIS_NAME if batch_norm == 'sync' and train else None
    return functools.partial(BatchNorm, train=train, dtype=dtype, group=group, axis_name=axis_name)


def residual_conv(features: int, kernel: int, stride: int, dtype: Any) -> nn.Module:
    """The convolution of residual networks: no bias, since BatchNorm follows it."""
    return Conv(
        features,
        (kernel, kernel),
        (stride, stride),
        padding=kernel // 2,
        use_bias=False,
        kernel_init=fan_out_normal,
        dtype=dtype,
    )


def relu_of_sum(x, y):
    """ReLU of ``x + y``, for the end of a residual block.

    XLA's CPU backend computes an operation of one array anew for each operation that takes its result,
    with what it is made of: after ``nn.relu`` those were the sums of all blocks before, each time. Of a
    choice between two it keeps the result. On two cores an update of ResNet-110 with 128 examples took
    1.00 s, and takes 0.76.
    """
    x = x + y
    return jnp.where(x <= 0, 0, x)


def max_pool(x, window: int, stride: int, padding: int = 0):
    """The largest of each ``window x window`` pixels; the gradient goes to the first of equals.

    For small windows: pixel by pixel, without XLA's operations for windows, which fuse with nothing, and
    whose gradient is a scatter on a GPU. There what is kept for the gradient is where each largest was;
    on a CPU, where that took longer, what each comparison gave.

    Raises:
      ValueError: images that are smaller than a window.
    """
    return (_first_largest if in_groups() else _largest)(x, window, stride, padding)


def _pixels(x, window, stride, padding):
    """What is at each place of the windows, row by row."""
    outputs = places(x, (window, window), (stride, stride), padding)
    around = [(padding, padding) if axis in SPATIAL_AXES else (0, 0) for axis in range(x.ndim)]
    x = jnp.pad(x, around, constant_values=-jnp.inf) if padding else x
    rows, columns = ((n - 1) * stride + 1 for n in outputs)
    for i, j in itertools.product(range(window), repeat=2):
        yield x[:, i : i + rows : stride, j : j + columns : stride]


def _stays(found, value):
    return (value <= found) | jnp.isnan(found)


def _first_largest(x, window, stride, padding):
    values = _pixels(x, window, stride, padding)
    return functools.reduce(lambda a, b: jnp.where(_stays(a, b), a, b), values)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _largest(x, window, stride, padding):
    """The same, with a gradient of its own."""
    return _first_largest(x, window, stride, padding)


def _largest_forward(x, window, stride, padding):
    """Keeps the number of each largest pixel in its window."""
    found, *values = _pixels(x, window, stride, padding)
    number = jnp.zeros(found.shape, np.min_scalar_type(window**2))
    for k, value in enumerate(values, 1):
        stays = _stays(found, value)
        found, number = jnp.where(stays, found, value), jnp.where(stays, number, number.dtype.type(k))
    return found, (number, x.shape)


def _largest_backward(window, stride, padding, residuals, change):
    """Each pixel looks into the windows that it is in, whether it was their largest.

    Padded images are taken as blocks of ``stride x stride`` pixels. A pixel is in a window that begins
    with its block, in one that begins with the block before, and so on, each time at another place.
    """
    number, shape = residuals
    before = (window - 1) // stride
    numbers = np.full(2 * [(before + 1) * stride], window**2, number.dtype)  # that is no place's
    numbers[:window, :window] = np.arange(window**2).reshape(window, window)
    numbers = numbers.reshape(before + 1, stride, before + 1, stride, *[1] * (len(shape) - 3))

    def of_blocks(x, *blocks):
        """What is of windows that begin so many blocks before, for all pixels of a block."""
        for axis, k in zip(SPATIAL_AXES, blocks, strict=True):
            x = fit(x, axis, k, x.shape[axis] + before)
        return jnp.expand_dims(x, (2, 4))

    x = 0
    for i, j in itertools.product(range(before + 1), repeat=2):
        is_largest = of_blocks(number, i, j) == np.expand_dims(numbers[i, :, j], 1)
        x += jnp.where(is_largest, of_blocks(change, i, j), 0)
    x = x.reshape(shape[0], x.shape[1] * stride, x.shape[3] * stride, *shape[3:])
    for axis in SPATIAL_AXES:
        x = fit(x, axis, -padding, shape[axis])
    return (x,)


_largest.defvjp(_largest_forward, _largest_backward)


def mean_over_pixels(x):
    """``[batch, channels]``."""
    return x.mean(axis=SPATIAL_AXES).reshape(-1, x.shape[-1])


def flatten(x):
    """``[batch, values]``, in the order of ``[height, width, channels]``."""
    x = leave(x)
    return x.reshape(len(x), -1)


class Classifier(nn.Module):
    """Linear layer to the classes, in float32 whatever the activations are.

    ``kernel_init`` and ``bias_init``: PyTorch's default where they are None.
    """

    num_classes: int
    kernel_init: Callable | None = None
    bias_init: Callable | None = None

    @nn.compact
    def __call__(self, x):
        default = torch_uniform(x.shape[-1])
        return nn.Dense(
            self.num_classes,
            kernel_init=self.kernel_init or default,
            bias_init=self.bias_init or default,
            dtype=jnp.float32,
            precision='highest',  # or an accelerator would round to less
        )(x.astype(jnp.float32))
