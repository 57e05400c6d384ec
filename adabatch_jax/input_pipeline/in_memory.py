"""Data sets whose images are in host memory."""

from collections.abc import Iterator

import numpy as np

from adabatch_jax import distributed
from adabatch_jax.input_pipeline.datasets import load_split

Batch = dict[str, np.ndarray]


class InMemory:
    """The training split, and the batches of evaluation.

    Attributes:
      train: images uint8 ``[n, height, width, channels]`` and labels int32 ``[n]``.
    """

    def __init__(self, config):
        dataset = config.dataset
        self.train = load_split(dataset, dataset.train_split, config.seed)
        self._eval = load_split(dataset, dataset.eval_split, config.seed)

    def close(self) -> None:
        """Forgets the images."""
        self.train = self._eval = None

    def eval_batches(self, batch_size: int) -> Iterator[Batch]:
        """Every evaluation example once, this process's share; the last batch is padded.

        Yields:
          ``image``, ``label``, and ``mask``, float32 ``[n]``: 1 for an example, 0 for padding.
        """
        images, labels = self._eval
        rows = distributed.local_rows(batch_size)
        for start in range(0, len(labels), batch_size):
            part = slice(start + rows.start, min(start + rows.stop, len(labels)))
            image, label = images[part], labels[part]
            missing = rows.stop - rows.start - len(label)

            def pad(array, missing=missing):
                return np.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1))

            yield {
                'image': pad(image),
                'label': pad(label),
                'mask': pad(np.ones(len(label), np.float32)),
            }
