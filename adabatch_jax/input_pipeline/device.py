"""Data sets that live on the devices: a batch is made of them there, inside the compiled step.

The host sends which examples an update takes, and nothing else. Their order is that of the other
pipelines, and so are their pixels.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adabatch_jax import distributed
from adabatch_jax.input_pipeline import order
from adabatch_jax.input_pipeline.in_memory import InMemory


@dataclasses.dataclass(frozen=True)
class Load:
    """Takes examples from a data set on the device and augments them.

    The seed of the augmentation comes with the data: a step is the same for all seeds.

    Attributes:
      num_examples: in the data set.
      image_shape: height, width, channels.
      padding: pixels of zeros around the stored images, before a random crop.
      flip: whether to mirror half of the images.
    """

    num_examples: int
    image_shape: tuple[int, int, int]
    padding: int
    flip: bool

    def data_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Of the data set as it is stored: images with their padding, so that a crop is one copy.

        With it, ``seed`` of the augmentation.
        """
        height, width, channels = self.image_shape
        stored = (self.num_examples, height + 2 * self.padding, width + 2 * self.padding, channels)
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

        def crop(index, offset):
            start = (index, *offset, 0)
            return jax.lax.dynamic_slice(data['image'], start, (1, *self.image_shape))[0]

        images = jax.vmap(crop)(index, offsets)
        if self.flip:
            images = jnp.where(mirrored[:, None, None, None], images[:, :, ::-1], images)
        return images, data['label'][index]


class DevicePipeline(InMemory):
    """Training batches of data that every device has; evaluation batches from the host."""

    def __init__(self, config, load: Load, examples_at: Callable):
        super().__init__(config)
        self._examples_at = examples_at
        images, labels = self.train
        padding = (load.padding, load.padding)
        images = np.pad(images, ((0, 0), padding, padding, (0, 0)))
        data = {'image': images, 'label': labels, 'seed': np.uint32(config.seed)}
        self._data = distributed.put_everywhere(data)
        self.train = None

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
