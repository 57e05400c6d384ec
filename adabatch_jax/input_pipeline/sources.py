"""What every data set tells of itself, its splits and their slices."""

import dataclasses
import hashlib
import numbers
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from adabatch_jax.input_pipeline.encoded import EncodedSplit

SPLITS = ('train_split', 'eval_split')  # keys of ``config.dataset``
_SPLIT = re.compile(r'([^\[\]]+)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?')  # names may come from the disk


@dataclasses.dataclass(frozen=True)
class Source:
    """One data set: its shape, its split sizes, and how to read or to open a whole split.

    ``fingerprint`` is a text of what else tells its training examples from others, where that is soon
    known.
    """

    image_shape: tuple[int, int, int]
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    sizes: dict[str, int]
    read: Callable[[str], tuple[np.ndarray, np.ndarray]] | None  # split -> images uint8, labels int32
    open: Callable[[str], EncodedSplit] | None = None  # instead of ``read``: images stay on disk
    fingerprint: str = ''

    def __post_init__(self):
        for name in ('image_shape', 'mean', 'std'):  # compiled steps are kept by them, so hashable
            value = np.atleast_1d(getattr(self, name)).tolist()
            object.__setattr__(self, name, tuple(value))
        if not isinstance(self.num_classes, numbers.Integral) or self.num_classes < 1:
            raise ValueError(f'num_classes: got {self.num_classes!r}; accepted: a whole number above 0')
        object.__setattr__(self, 'num_classes', int(self.num_classes))
        if len(self.image_shape) != 3 or not all(type(n) is int and n > 0 for n in self.image_shape):
            raise ValueError(
                f'image_shape: got {self.image_shape}; accepted: height, width and channels'
            )
        sizes = self.sizes if isinstance(self.sizes, Mapping) else {}
        if not sizes or not all(isinstance(n, numbers.Integral) for n in sizes.values()):
            raise ValueError(f'sizes: got {self.sizes}; accepted: the number of examples by split')
        channels = self.image_shape[-1]
        is_right = len(self.mean) == len(self.std) == channels and np.all(np.isfinite(self.mean))
        if not is_right or not 0 < min(self.std) <= max(self.std) < np.inf:
            raise ValueError(
                f'mean and std: got {self.mean} and {self.std}; accepted: a number for each of the '
                f'{channels} channels, std above 0'
            )


def fingerprint(*parts: bytes | np.ndarray) -> str:
    """The first 16 digits of the SHA-256 of some bytes."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]


def tfds_dir(dataset) -> pathlib.Path:
    """Where TFDS data are: ``dataset.data_dir``, or the default folder of TFDS."""
    default = os.environ.get('TFDS_DATA_DIR', '~/tensorflow_datasets')
    return pathlib.Path(os.path.expanduser(dataset.data_dir or default))


def split_name(split: str) -> str:
    """A split without its slice: ``'train'`` of ``'train[:20%]'``."""
    return split.partition('[')[0]


def used_splits(dataset, existing: Iterable[str]) -> list[str]:
    """The splits that a config trains and evaluates on, without their slices.

    Args:
      dataset: the ``dataset`` part of a config.
      existing: the splits that there are.

    Raises:
      ValueError: one that does not exist.
    """
    used = {key: split_name(dataset[key]) for key in SPLITS}
    for key, split in used.items():
        if split not in existing:
            raise ValueError(f'{key}: got {split!r}; accepted: {", ".join(existing)}')
    return list(used.values())


def split_range(split: str, sizes: dict[str, int], key: str = 'split') -> range:
    """The examples of a split such as ``'train'``, ``'train[:20%]'`` or ``'test[100:-50]'``.

    A share that is counted from the end, -20%, is the same bound as 80%: where one slice stops the other
    begins, whatever is rounded.

    Args:
      split: its name, and a slice.
      sizes: examples of each split.
      key: what a mistake is reported of.

    Raises:
      ValueError: a split that does not exist, cannot be read, or has no examples.
    """
    match = _SPLIT.fullmatch(split)
    if not match or match[1] not in sizes:
        raise ValueError(
            f'{key}: got {split!r}; accepted: {", ".join(sizes)}, and slices of them such as '
            f'{next(iter(sizes))}[:20%]'
        )
    size = sizes[match[1]]

    def bound(text):
        if text is None:
            return None
        is_share = text.endswith('%')
        number, most = int(text.removesuffix('%')), 100 if is_share else size
        if abs(number) > most:
            raise ValueError(
                f'{key}: got {split!r}; accepted: up to 100% or {size}, the examples of {match[1]}'
            )
        if is_share:
            return round((number if number >= 0 else 100 + number) * size / 100)
        return number

    chosen = range(size)[bound(match[2]) : bound(match[3])]
    if not chosen:
        raise ValueError(f'{key}: got {split!r}, which has no examples; {match[1]} has {size}')
    return chosen


def read_split(source: Source, name: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    """The whole of a split, whatever slice of it is named.

    Raises:
      ValueError: it is not what its source tells.
    """
    given = source.read(split_name(split))
    what = f'data set {name}, split {split}'
    try:
        images, labels = map(np.asarray, given)
    except (TypeError, ValueError) as error:
        raise ValueError(f'{what}: {error}; accepted: images of one shape and their labels') from error
    expected = (source.sizes[split_name(split)], *source.image_shape)
    if images.dtype != np.uint8 or labels.dtype.kind not in 'iu':
        raise ValueError(
            f'{what}: got images of {images.dtype} and labels of {labels.dtype}; expected uint8 and '
            'whole numbers'
        )
    if images.shape != expected or labels.shape != expected[:1]:
        raise ValueError(
            f'{what}: got images {images.shape} and labels {labels.shape}; expected {expected} and '
            f'{expected[:1]}'
        )
    if not 0 <= labels.min() <= labels.max() < source.num_classes:
        raise ValueError(
            f'{what}: got labels {labels.min()} to {labels.max()}; expected labels from 0 on, below '
            f'{source.num_classes}'
        )
    return images, labels
