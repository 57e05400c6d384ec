"""Data sets that live on the devices: a batch is made of them there, inside the compiled step.

The host sends which examples an update takes, and nothing else. Their order is that of the other
pipelines, and so are their pixels.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from adabatch_jax import distributed
from adabatch_jax.input_pipeline import order
from adabatch_jax.input_pipeline.datasets import load_split
from adabatch_jax.input_pipeline.in_memory import InMemory


@dataclasses.dataclass(frozen=True)
class Load:
    """Takes examples from a data set on the device and augments them.

    The seed of the augmentation comes with the data: a step is the same for all seeds.

    Attributes:
      num_examples: in the data set.
      image_shape: height, width, channels.
      padding: pixels of zeros around an image, before a random crop.
      flip: whether to mirror half of the images.
    """

    num_examples: int
    image_shape: tuple[int, int, int]
    padding: int
    flip: bool

    def data_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Of the data set as it is stored, and of the ``seed`` of its augmentation.

        An image is a row of a matrix: of arrays with more axes a TPU would make a copy in another layout
        with every call of a step, five times as large as the data.
        """
        stored = (self.num_examples, math.prod(self.image_shape))
        return {
            'image': jax.ShapeDtypeStruct(stored, jnp.uint8),
            'label': jax.ShapeDtypeStruct((self.num_examples,), jnp.int32),
            'seed': jax.ShapeDtypeStruct((), jnp.uint32),
        }

    def num_bytes(self) -> int:
        """Of a device's memory that the data set takes."""
        return sum(x.size * x.dtype.itemsize for x in self.data_shapes().values())

    def __call__(self, data: dict, examples: dict) -> tuple[jax.Array, jax.Array]:
        """Images and labels of an epoch's examples.

        Args:
          data: arrays of ``data_shapes``.
          examples: ``example``, indices in the data set, and ``epoch``, both int32 ``[n]``.

        Returns:
          Images uint8 ``[n, height, width, channels]`` and labels int32 ``[n]``.
        """
        index = examples['example']
        offsets, mirrored = order.crop_and_flip(
            data['seed'], examples['epoch'], index, self.padding, self.flip, jnp
        )
        images = data['image'][index].reshape(-1, *self.image_shape)
        if self.padding:
            images = _crop(images, offsets, self.padding)
        if self.flip:
            images = jnp.where(mirrored[:, None, None, None], images[:, :, ::-1], images)
        return images, data['label'][index]


def _crop(images: jax.Array, offsets: jax.Array, padding: int) -> jax.Array:
    """A window of its own size from each image ``[n, height, width, channels]`` with zeros around it.

    Args:
      images: of any dtype.
      offsets: of the windows from the top and the left, int32 ``[n, 2]`` in ``[0, 2 * padding]``.
      padding: pixels of zeros on every side.
    """
    shape, around = images.shape[1:], (padding, padding)
    padded = jnp.pad(images, ((0, 0), around, around, (0, 0)))
    if jax.default_backend() != 'tpu':
        return jax.vmap(lambda x, offset: lax.dynamic_slice(x, (*offset, 0), shape))(padded, offsets)
    # A TPU would slice one image after the other. It chooses among all windows at once.
    for axis, size in ((1, shape[0]), (2, shape[1])):
        offset = offsets[:, axis - 1][:, None, None, None]
        windows = [lax.slice_in_dim(padded, k, k + size, axis=axis) for k in range(2 * padding + 1)]
        padded = windows[0]
        for k in range(1, len(windows)):
            padded = jnp.where(offset == k, windows[k], padded)
    return padded


class DevicePipeline(InMemory):
    """Training batches of data that every device has; evaluation batches from the host."""

    def __init__(self, config, load: Load, examples_at: Callable):
        images, labels = load_split(config.dataset, config.dataset.train_split, config.seed)
        super().__init__(config)
        self._examples_at = examples_at
        rows = images.reshape(len(images), -1)
        data = {'image': rows, 'label': labels, 'seed': np.uint32(config.seed)}
        try:
            self._data = jax.block_until_ready(distributed.put_everywhere(data))
        except jax.errors.JaxRuntimeError as error:
            if not distributed.is_out_of_memory(error):
                raise
            raise ValueError(
                f'pipeline: got {config.dataset.pipeline!r}, and a device has no room for the '
                f'{load.num_bytes() / 2**30:.3g} GiB of {config.dataset.name}; choose a shorter '
                "train_split, or 'tf_data' where the optimizer takes it"
            ) from error

    def close(self) -> None:
        """Forgets the data."""
        super().close()
        self._data = None

    def take(self, updates: Sequence[Any]) -> dict[str, Any]:
        """What the train step makes the batches of some updates of.

        Args:
          updates: ``schedules.Update``s, all of one batch size.

        Returns:
          ``data``, and ``example`` and ``epoch``, int32 ``[devices, examples of a device]``; for
          several updates ``[devices, updates, examples of a device]``.
        """
        rows = distributed.local_rows(updates[0].batch_size)
        drawn = [
            self._examples_at(update.start + rows.start, rows.stop - rows.start) for update in updates
        ]
        return self._put(drawn)

    def take_examples(self, examples: np.ndarray, epoch: int) -> dict[str, Any]:
        """The same for a batch of given examples, all in one epoch; see ``Svrg.snapshot``."""
        rows = distributed.local_rows(len(examples))
        here = examples[rows.start : rows.stop]
        return self._put([(here, np.full(len(here), epoch))])

    def _put(self, drawn: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
        """Examples and epochs of one update or several, on the devices."""
        arrays = {}
        for name, of_updates in zip(('example', 'epoch'), zip(*drawn, strict=True), strict=True):
            per_device = np.stack(
                [x.reshape(jax.local_device_count(), -1) for x in of_updates], axis=1
            ).astype(np.int32)
            arrays[name] = per_device[:, 0] if len(drawn) == 1 else per_device
        return {**distributed.put_split(arrays), 'data': self._data}
