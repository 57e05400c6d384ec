"""Image classification data sets that fit into memory: what is known of them, and their arrays."""

import dataclasses
import functools
import json
import os
import pathlib
import re
import socket
import urllib.request
from collections.abc import Callable

import numpy as np


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
    """What a run needs to know before any image is read.

    ``mean`` and ``std`` are for each channel, in units of the stored pixel values; ``num_train``
    and ``num_eval`` count the examples of the configured splits.
    """

    image_shape: tuple[int, int, int]
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_train: int
    num_eval: int


@dataclasses.dataclass(frozen=True)
class _Source:
    """One data set: its shape, its split sizes and how to read a whole split."""

    image_shape: tuple[int, int, int]
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    sizes: dict[str, int]
    read: Callable[[str], tuple[np.ndarray, np.ndarray]]  # split -> images uint8, labels int32


# ------------------------------------------------------------------------------------ digits


@functools.cache
def _digits() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """scikit-learn's 1,797 handwritten digits; a fixed fifth of them is the test split."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    images = data.images[order, :, :, None].astype(np.uint8)  # 8x8, values 0 to 16
    labels = data.target[order].astype(np.int32)
    return {'test': (images[:360], labels[:360]), 'train': (images[360:], labels[360:])}


def _digits_source(dataset, seed: int) -> _Source:
    splits = _digits()
    sizes = {name: len(labels) for name, (_, labels) in splits.items()}
    return _Source((8, 8, 1), 10, (4.88,), (6.02,), sizes, splits.__getitem__)


# --------------------------------------------------------------------------------- synthetic


def _synthetic_source(dataset, seed: int) -> _Source:
    """Classes that differ in a random low-resolution pattern under noise; made, not read."""
    shape = (dataset.image_size, dataset.image_size, 3)
    count, num_classes = dataset.num_examples, dataset.num_classes

    def read(split):
        rng = np.random.default_rng((seed, ('train', 'test').index(split)))
        coarse = -(-dataset.image_size // 4)
        patterns = np.random.default_rng(seed).normal(size=(num_classes, coarse, coarse, 3))
        labels = rng.integers(num_classes, size=count, dtype=np.int32)
        images = patterns.repeat(4, 1).repeat(4, 2)[labels, : shape[0], : shape[1]]
        images = 128 + 32 * (images + rng.normal(size=(count, *shape)))
        return np.clip(images, 0, 255).astype(np.uint8), labels

    sizes = {'train': count, 'test': count}
    return _Source(shape, num_classes, (128.0,) * 3, (45.0,) * 3, sizes, read)


# --------------------------------------------------------------------------------------- npz


@functools.lru_cache(maxsize=4)
def _read_npz(path: pathlib.Path, modified: float) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of one file, kept until it changes."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            images, labels = arrays['images'], arrays['labels']
    except Exception as error:  # a damaged zip raises many kinds
        raise ValueError(f'data set npz: cannot read {path}: {error}') from error
    if images.dtype != np.uint8 or images.ndim != 4 or not len(images):
        raise ValueError(
            f'data set npz: {path}: images has dtype {images.dtype} and shape {images.shape}; '
            'accepted: uint8 [n, height, width, channels]'
        )
    if labels.shape != images.shape[:1] or labels.dtype.kind not in 'iu' or labels.min() < 0:
        raise ValueError(
            f'data set npz: {path}: labels has dtype {labels.dtype} and shape {labels.shape}; '
            f'accepted: {len(images)} whole numbers from 0 on'
        )
    return images, labels.astype(np.int32)


def _npz_source(dataset, seed: int) -> _Source:
    """``data_dir/SPLIT.npz`` with ``images`` uint8 [n, height, width, channels] and ``labels``."""
    folder = pathlib.Path(os.path.expanduser(dataset.data_dir))
    files = {path.stem: path for path in sorted(folder.glob('*.npz'))}
    if not dataset.data_dir or not files:
        raise FileNotFoundError(
            f'data set npz: no .npz file in {str(folder)!r}; set dataset.data_dir to a folder with '
            'train.npz and test.npz, each with the arrays images (uint8) and labels'
        )

    def read(split):
        return _read_npz(files[split], files[split].stat().st_mtime)

    used = [_split_name(split) for split in (dataset.train_split, dataset.eval_split)]
    for split in used:
        if split not in files:
            raise ValueError(f'data split: got {split!r}; accepted: {", ".join(files)}')
    images, labels = read(used[0])
    counts = np.stack(  # of each pixel value: exact moments without a copy of the images in float
        [np.bincount(images[..., c].ravel(), minlength=256) for c in range(images.shape[3])]
    )
    share = counts / counts.sum(axis=1, keepdims=True)
    mean = share @ np.arange(256)
    std = np.sqrt(share @ np.arange(256) ** 2 - mean**2)
    return _Source(
        images.shape[1:],
        int(labels.max()) + 1,
        tuple(mean.tolist()),
        tuple(np.maximum(std, 1e-3).tolist()),
        {split: len(read(split)[1]) for split in used},
        read,
    )


# -------------------------------------------------------------------------------------- TFDS


def tensorflow():
    """TensorFlow, quiet and off the accelerator, which is JAX's; imported only where it is used."""
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
    os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')  # unused here, and announced at length
    import tensorflow

    tensorflow.config.set_visible_devices([], 'GPU')
    return tensorflow


# Image shape, classes, mean and standard deviation of the training pixels in units of 255, sizes.
# The official AdaBatch code normalises CIFAR-100 with CIFAR-10's figures; so do we.
_CIFAR = ((32, 32, 3), (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010), (50_000, 10_000))
_TFDS = {
    'cifar10': (*_CIFAR, 10),
    'cifar100': (*_CIFAR, 100),
    'mnist': ((28, 28, 1), (0.1307,), (0.3081,), (60_000, 10_000), 10),
    'fashion_mnist': ((28, 28, 1), (0.2860,), (0.3530,), (60_000, 10_000), 10),
}


def _tfds_sizes(folder: pathlib.Path) -> dict[str, int]:
    """Split sizes from the metadata that TFDS keeps beside the data, without TensorFlow."""
    infos = sorted(folder.glob('*/dataset_info.json'))
    if not infos:
        return {}
    splits = json.loads(infos[-1].read_text())['splits']
    return {split['name']: sum(map(int, split['shardLengths'])) for split in splits}


def _download(builder, name: str, data_dir: pathlib.Path, given: bool) -> None:
    """Downloads into TFDS's default folder; a folder that was given is read only.

    TFDS itself tries for minutes where no name can be resolved.
    """
    cause = 'nothing is downloaded into a folder that was given'
    if not given:
        try:
            if not urllib.request.getproxies():
                socket.getaddrinfo('storage.googleapis.com', 443)
            return builder.download_and_prepare()
        except Exception as error:  # no network, no space, a changed address: many kinds
            cause = f'the download failed with {type(error).__name__}: {error}'
    raise FileNotFoundError(
        f'data set {name}: not found in {str(data_dir)!r}, and {cause[:200]}; run "tfds build {name} '
        '--data_dir=DIR" on a machine with a network and set dataset.data_dir=DIR, which then holds '
        f'{name}/'
    )


def _tfds_source(dataset, seed: int) -> _Source:
    name = dataset.name
    shape, mean, std, (num_train, num_test), num_classes = _TFDS[name]
    default = os.environ.get('TFDS_DATA_DIR', '~/tensorflow_datasets')
    data_dir = pathlib.Path(os.path.expanduser(dataset.data_dir or default))

    def read(split):
        tensorflow()
        import tensorflow_datasets as tfds

        builder = tfds.builder(name, data_dir=data_dir)
        if not builder.is_prepared():
            _download(builder, name, data_dir, given=bool(dataset.data_dir))
        parts = tfds.as_numpy(builder.as_dataset(split=split, batch_size=1000, shuffle_files=False))
        parts = [(part['image'], part['label'].astype(np.int32)) for part in parts]
        return tuple(np.concatenate(arrays) for arrays in zip(*parts, strict=True))

    published = {'train': num_train, 'test': num_test}
    sizes = _tfds_sizes(data_dir / name) or published
    scaled = (tuple(255 * x for x in values) for values in (mean, std))
    return _Source(shape, num_classes, *scaled, sizes, read)


# ---------------------------------------------------------------------------------- interface

_SOURCES = {
    'digits': _digits_source,
    'synthetic': _synthetic_source,
    'npz': _npz_source,
    **dict.fromkeys(_TFDS, _tfds_source),
}
_SPLIT = re.compile(r'(\w+)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?')


def _source(dataset, seed: int) -> _Source:
    if dataset.name not in _SOURCES:
        raise ValueError(f'name: got {dataset.name!r}; accepted: {", ".join(_SOURCES)}')
    return _SOURCES[dataset.name](dataset, seed)


def _split_name(split: str) -> str:
    return split.partition('[')[0]


def split_range(split: str, sizes: dict[str, int]) -> range:
    """The examples of a split such as ``'train'``, ``'train[:20%]'`` or ``'test[100:-50]'``.

    Raises:
      ValueError: a split that does not exist, cannot be read, or has no examples.
    """
    match = _SPLIT.fullmatch(split)
    if not match or match[1] not in sizes:
        raise ValueError(
            f'data split: got {split!r}; accepted: {", ".join(sizes)}, and slices of them such as '
            f'{next(iter(sizes))}[:20%]'
        )
    size = sizes[match[1]]

    def bound(text):
        if text is None:
            return None
        return round(int(text[:-1]) * size / 100) if text.endswith('%') else int(text)

    chosen = range(size)[bound(match[2]) : bound(match[3])]
    if not chosen:
        raise ValueError(f'data split: got {split!r}, which has no examples; {match[1]} has {size}')
    return chosen


def dataset_info(dataset, seed: int = 0) -> DatasetInfo:
    """What ``config.dataset`` describes; reads no images, except for ``npz``.

    Args:
      dataset: the ``dataset`` part of a config.
      seed: for ``synthetic``.

    Raises:
      ValueError, FileNotFoundError: an unknown data set or split, or one without its files.
    """
    source = _source(dataset, seed)
    return DatasetInfo(
        source.image_shape,
        source.num_classes,
        source.mean,
        source.std,
        len(split_range(dataset.train_split, source.sizes)),
        len(split_range(dataset.eval_split, source.sizes)),
    )


def load_split(dataset, split: str, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 ``[n, height, width, channels]`` and labels int32 ``[n]`` of a split.

    Raises:
      ValueError, FileNotFoundError: data that is missing, or is not what it should be.
    """
    source = _source(dataset, seed)
    chosen = split_range(split, source.sizes)
    images, labels = source.read(_split_name(split))
    expected = (source.sizes[_split_name(split)], *source.image_shape)
    if images.shape != expected or labels.max() >= source.num_classes:
        raise ValueError(
            f'data set {dataset.name}, split {split}: got images {images.shape} and labels up to '
            f'{labels.max()}; expected {expected} and labels below {source.num_classes}'
        )
    part = slice(chosen.start, chosen.stop)
    return images[part], labels[part]
