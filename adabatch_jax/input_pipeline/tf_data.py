"""tf.data for images in memory: batches of any size from any position, augmented in whole batches."""

from collections.abc import Iterator

import numpy as np

from adabatch_jax import distributed
from adabatch_jax.input_pipeline import order
from adabatch_jax.input_pipeline.datasets import as_numpy_iterator, load_split, tensorflow
from adabatch_jax.input_pipeline.in_memory import Batch, InMemory

tf = tensorflow()


class TfDataPipeline(InMemory):
    """Training and evaluation batches of this process, from arrays in host memory."""

    def __init__(self, config, clock):
        images, self._labels = load_split(config.dataset, config.dataset.train_split, config.seed)
        super().__init__(config)
        self._images = tf.constant(images)
        self._seed = config.seed
        self._clock = clock
        self._padding, self._flip = order.augmentation(config.dataset)

    def close(self) -> None:
        """Forgets the images; tf.data keeps its generators, and through them the pipeline."""
        super().close()
        self._images = None

    def train_batches(self, start: int, batch_size: int, num_parts: int = 1) -> Iterator[Batch]:
        """This process's share of every batch from position ``start`` on, without end.

        Args:
          start: examples seen before the first batch.
          batch_size: examples of a batch over all processes.
          num_parts: in how many parts each batch comes, one after the other.

        Yields:
          ``image`` uint8 ``[n, height, width, channels]``, ``label`` int32 ``[n]`` and ``example``,
          the index in the training split, int32 ``[n]``.
        """
        rows = distributed.local_rows(batch_size)
        size = (rows.stop - rows.start) // num_parts

        def draws():
            for examples, epochs in order.update_examples(
                self._seed, self._clock, start, batch_size, num_parts
            ):
                offsets, mirrored = order.crop_and_flip(
                    self._seed, epochs, examples, self._padding, self._flip
                )
                yield examples.astype(np.int32), self._labels[examples], offsets, mirrored

        signature = (
            tf.TensorSpec([size], tf.int32),
            tf.TensorSpec([size], tf.int32),
            tf.TensorSpec([size, 2], tf.int32),
            tf.TensorSpec([size], tf.bool),
        )
        dataset = (
            tf.data.Dataset.from_generator(draws, output_signature=signature)
            .map(self._images_of, num_parallel_calls=2, deterministic=True)
            .prefetch(2)
        )
        return as_numpy_iterator(dataset)

    def _images_of(self, examples, labels, offsets, mirrored):
        """Gathers, pads, crops and mirrors a whole batch: two gathers, no loop over examples."""
        images = tf.gather(self._images, examples)
        if self._padding or self._flip:
            height, width = images.shape[1:3]
            padding = [self._padding, self._padding]
            images = tf.pad(images, [[0, 0], padding, padding, [0, 0]])
            columns = tf.range(width)
            columns = tf.where(mirrored[:, None], columns[::-1], columns)
            rows = offsets[:, :1] + tf.range(height)
            images = tf.gather(images, rows, axis=1, batch_dims=1)
            images = tf.gather(images, offsets[:, 1:] + columns, axis=2, batch_dims=1)
        return {'image': images, 'label': labels, 'example': examples}
