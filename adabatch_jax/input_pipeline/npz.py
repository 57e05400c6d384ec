"""Data sets of one's own in NumPy's files, ``SPLIT.npz``."""

import functools
import os
import pathlib

import numpy as np

from adabatch_jax.input_pipeline.sources import Source, fingerprint, read_split, used_splits

_COUNTED = 2**24  # bytes of images
_MOST_CLASSES = 2**20  # of labels in a file; more are taken for a mistake


@functools.lru_cache(maxsize=4)
def _read_npz(path: pathlib.Path, modified: float) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of one file, kept until it changes."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            images, labels = arrays['images'], arrays['labels']
    except Exception as error:  # a damaged zip raises many kinds
        raise ValueError(f'data set npz: cannot read {path}: {error}') from error
    if images.dtype != np.uint8 or images.ndim != 4 or not images.size:
        raise ValueError(
            f'data set npz: {path}: images has dtype {images.dtype} and shape {images.shape}; '
            'accepted: uint8 [n, height, width, channels]'
        )
    is_right = labels.shape == images.shape[:1] and labels.dtype.kind in 'iu'
    if not is_right or labels.min() < 0 or labels.max() >= _MOST_CLASSES:
        values = f', {labels.min()} to {labels.max()}' if is_right else ''
        raise ValueError(
            f'data set npz: {path}: labels has dtype {labels.dtype} and shape {labels.shape}{values}; '
            f'accepted: {len(images)} whole numbers from 0 on, below {_MOST_CLASSES:,}'
        )
    return images, labels.astype(np.int32)


@functools.lru_cache(maxsize=4)
def _npz_facts(path: pathlib.Path, modified: float) -> tuple[np.ndarray, np.ndarray, str]:
    """Mean and standard deviation of each channel, and the fingerprint, of one file."""
    images, labels = _read_npz(path, modified)
    of_examples = fingerprint(np.ascontiguousarray(images), labels.astype('<i4'))
    return *_moments(images), of_examples


def _moments(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Exact mean and standard deviation of each channel, the same on every machine.

    From counts of the 256 values, some images at a time: NumPy counts in a copy eight times as large.
    """
    counts = np.zeros((images.shape[3], 256), np.int64)
    together = max(1, _COUNTED // images[0].size)
    for first in range(0, len(images), together):
        for channel, values in enumerate(np.moveaxis(images[first : first + together], 3, 0)):
            counts[channel] += np.bincount(values.ravel(), minlength=256)
    total, value = counts.sum(axis=1), np.arange(256)  # whole numbers: no order of summation matters
    mean = counts @ value / total
    return mean, np.sqrt(np.maximum(0, counts @ value**2 / total - mean**2))


def npz_source(dataset, seed: int) -> Source:
    """``data_dir/SPLIT.npz`` with ``images`` uint8 [n, height, width, channels] and ``labels``."""
    folder = pathlib.Path(os.path.expanduser(dataset.data_dir))
    files = {path.stem: path for path in sorted(folder.glob('*.npz'))}
    if not dataset.data_dir or not files:
        raise FileNotFoundError(
            f'data set npz: no .npz file in {str(folder)!r}; set dataset.data_dir to a folder with '
            'train.npz and test.npz, each with the arrays images (uint8) and labels'
        )

    def file(split):
        return files[split], files[split].stat().st_mtime

    def read(split):
        return _read_npz(*file(split))

    used = used_splits(dataset, files)
    images, labels = read(used[0])
    mean, std, of_examples = _npz_facts(*file(used[0]))
    sizes = {split: len(read(split)[1]) for split in used}
    shape, num_classes = images.shape[1:], int(labels.max()) + 1
    source = Source(
        shape, num_classes, mean, np.maximum(std, 1e-3), sizes, read, fingerprint=of_examples
    )
    for split in used:
        read_split(source, 'npz', split)
    return source
