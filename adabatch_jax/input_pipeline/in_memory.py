"""Data sets whose images are in host memory."""

from collections.abc import Iterator

import numpy as np

from adabatch_jax import distributed
from adabatch_jax.input_pipeline.datasets import load_split

Batch = dict[str, np.ndarray]


class InMemory:
    """The batches of evaluation; subclasses add those of training."""

    def __init__(self, config):
        self._eval = load_split(config.dataset, config.dataset.eval_split, config.seed)

    def close(self) -> None:
        """Forgets the images."""
        self._eval = None

    def eval_batches(self, batch_size: int) -> Iterator[Batch]:
        """Every evaluation example once, this process's share; the last batch is padded.

        Yields:
          ``image``, ``label``, and ``mask``, float32 ``[n]``: 1 for an example, 0 for padding.
        """
        images, labels = self._eval
        rows = distributed.local_rows(batch_size)
        for start in range(0, len(labels), batch_size):
            part = slice(start + rows.start, min(start + rows.stop, len(labels)))
            batch = {'image': images[part], 'label': labels[part]}
            batch['mask'] = np.ones(len(batch['label']), np.float32)
            missing = rows.stop - rows.start - len(batch['label'])
            yield {k: np.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1)) for k, x in batch.items()}
