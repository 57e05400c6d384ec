"""Image classification data sets by name: what is known of them, and how to get at their examples."""

import dataclasses
import functools
import os
import pathlib
import re
import socket
import urllib.request
from collections.abc import Mapping
from typing import Any

import numpy as np

from adabatch_jax import distributed
from adabatch_jax.input_pipeline import encoded
from adabatch_jax.input_pipeline.encoded import EncodedSplit
from adabatch_jax.input_pipeline.encoded_sources import image_folder_source, records_source
from adabatch_jax.input_pipeline.npz import npz_source
from adabatch_jax.input_pipeline.sources import (
    SPLITS,
    Source,
    read_split,
    split_name,
    split_range,
    tfds_dir,
)


class DataError(ValueError):
    """Data that a run cannot use, found while it reads them."""


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
    """What a run needs to know before any image is read.

    ``mean`` and ``std`` are for each channel, in units of the stored pixel values; ``num_train``
    and ``num_eval`` count the examples of the configured splits. ``is_encoded``: the images stay on
    disk and are decoded when they are needed. ``fingerprint`` is that of the ``Source``.
    """

    num_train: int
    num_eval: int
    image_shape: tuple[int, int, int]
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    is_encoded: bool
    fingerprint: str

    def as_saved(self) -> dict[str, Any]:
        """In JSON types, as a checkpoint holds it; of the moments what no order of summation changes."""
        moments = {key: [float(f'{x:.6g}') for x in getattr(self, key)] for key in ('mean', 'std')}
        return {**dataclasses.asdict(self), **moments, 'image_shape': list(self.image_shape)}

    def check(self, saved: Mapping[str, Any], but: tuple[str, ...] = ()) -> None:
        """Refuses data that are others than those of a run.

        Args:
          saved: what a checkpoint holds beside the train state; ``data`` is ``as_saved`` of the run's.
          but: what may differ.

        Raises:
          ValueError: naming the first that does.
        """
        for key, now in self.as_saved().items():
            was = saved.get('data', {}).get(key, now)
            if was != now and key not in but:
                what = f'data with {key} {was}'
                if key == 'num_train':
                    what = f'{was} training example{"s" * (was != 1)}'
                raise ValueError(
                    f'there is a run on {what}, and the data set has {now} now; bring it back as it '
                    'was, or choose another --workdir'
                )


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


def _digits_source(dataset, seed: int) -> Source:
    splits = _digits()
    sizes = {name: len(labels) for name, (_, labels) in splits.items()}
    return Source((8, 8, 1), 10, (4.88,), (6.02,), sizes, splits.__getitem__)


# --------------------------------------------------------------------------------- synthetic


def _synthetic_source(dataset, seed: int) -> Source:
    """Classes that differ in a random low-resolution pattern under noise; made, not read."""
    side = dataset.image_size or 32
    shape = (side, side, 3)
    count, num_classes = dataset.num_examples, dataset.num_classes or 10

    def read(split):
        rng = np.random.default_rng((seed, ('train', 'test').index(split)))
        coarse = -(-side // 4)
        patterns = np.random.default_rng(seed).normal(size=(num_classes, coarse, coarse, 3))
        labels = rng.integers(num_classes, size=count, dtype=np.int32)
        images = patterns[labels].repeat(4, 1).repeat(4, 2)[:, :side, :side]
        images = 128 + 32 * (images + rng.normal(size=(count, *shape)))
        return np.clip(images, 0, 255).astype(np.uint8), labels

    sizes = {'train': count, 'test': count}
    return Source(shape, num_classes, (128.0,) * 3, (45.0,) * 3, sizes, read)


# -------------------------------------------------------------------------------------- TFDS


def tensorflow():
    """TensorFlow, quiet and off the accelerator, which is JAX's; imported only where it is used."""
    if os.environ.get('TF_CPP_MIN_LOG_LEVEL') in (None, '1'):  # importing JAX sets 1
        os.environ['TF_CPP_MIN_LOG_LEVEL'] = '3'  # what matters is raised as well
    os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')  # unused here, and announced at length
    try:
        import tensorflow
    except ImportError as error:
        raise ValueError(
            'this data set or pipeline needs TensorFlow, which cannot be imported; accepted without it: '
            "digits, synthetic and npz, with dataset.pipeline 'device'"
        ) from error

    try:
        tensorflow.config.set_visible_devices([], 'GPU')
    except RuntimeError as error:  # it cannot give back what it has begun to use
        raise ValueError(
            'this data set or pipeline needs TensorFlow off the GPU, and it uses one in this process '
            'already; accepted: a new process (in a notebook, restart the kernel) that trains before '
            'it uses TensorFlow'
        ) from error
    return tensorflow


def num_cores() -> int:
    """Cores that this process may use: how many images or batches tf.data works on at once."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()


def as_numpy_iterator(dataset):
    """The elements of a tf.data pipeline, without autotuning.

    Its thread sleeps for up to a minute between two looks at the pipeline, and whoever forgets the
    iterator waits until it wakes (TensorFlow 2.21): at the end of a stage, with the devices idle.
    """
    options = tensorflow().data.Options()
    options.autotune.enabled = False
    return dataset.with_options(options).as_numpy_iterator()


# Image shape, classes, mean and standard deviation of the training pixels in units of 255, sizes.
# The official AdaBatch code normalises CIFAR-100 with CIFAR-10's figures; so do we.
_CIFAR = ((32, 32, 3), (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010), (50_000, 10_000))
_TFDS = {
    'cifar10': (*_CIFAR, 10),
    'cifar100': (*_CIFAR, 100),
    'mnist': ((28, 28, 1), (0.1307,), (0.3081,), (60_000, 10_000), 10),
    'fashion_mnist': ((28, 28, 1), (0.2860,), (0.3530,), (60_000, 10_000), 10),
}


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
        f'{name}/VERSION/'
    )


def _tfds_source(dataset, seed: int) -> Source:
    name = dataset.name
    shape, mean, std, (num_train, num_test), num_classes = _TFDS[name]
    data_dir = tfds_dir(dataset)

    def read(split):
        tf = tensorflow()
        try:
            import tensorflow_datasets as tfds
        except ImportError as error:
            raise ValueError(
                f'data set {name}: needs tensorflow-datasets, which cannot be imported: {error}'
            ) from error

        def prepared() -> pathlib.Path:
            if encoded.tfds_folder(data_dir, name) is None:
                builder = tfds.builder(name, data_dir=data_dir)
                _download(builder, name, data_dir, given=bool(dataset.data_dir))
            return encoded.tfds_folder(data_dir, name)

        distributed.from_first(lambda: str(prepared()))  # on a shared disk it is there for all then
        folder = prepared()
        info = encoded.records_info(folder)
        try:
            builder = tfds.builder_from_directory(folder)
            parts = builder.as_dataset(split=split, batch_size=1000, shuffle_files=False)
            parts = [(p['image'], p['label'].astype(np.int32)) for p in tfds.as_numpy(parts)]
        except (tf.errors.OpError, FileNotFoundError, ValueError) as error:
            encoded.records_split(info, split)  # names a file that is not whole
            cause = re.sub(r'\{\{.*?\}\} *| *\[Op:.*', '', str(getattr(error, 'message', error)))
            raise ValueError(f'data set {name}: cannot read {str(folder)!r}: {cause}') from error
        return tuple(np.concatenate(arrays) for arrays in zip(*parts, strict=True))

    sizes = {'train': num_train, 'test': num_test}
    if folder := encoded.tfds_folder(data_dir, name):
        sizes = encoded.records_info(folder).sizes
    scaled = (tuple(255 * x for x in values) for values in (mean, std))
    return Source(shape, num_classes, *scaled, sizes, read)


# ---------------------------------------------------------------------------------- interface

# By name: from the ``dataset`` part of a config and the seed, a ``Source``.
SOURCES = {
    'digits': _digits_source,
    'synthetic': _synthetic_source,
    'npz': npz_source,
    'image_folder': image_folder_source,
    'imagenet2012': records_source,
    'tiny_imagenet': records_source,
    **dict.fromkeys(_TFDS, _tfds_source),
}


def _source(dataset, seed: int) -> Source:
    create = SOURCES.get(dataset.name)
    if create is None and encoded.tfds_folder(tfds_dir(dataset), dataset.name) is not None:
        create = records_source
    if create is None:
        raise ValueError(
            f'name: got {dataset.name!r}; accepted: {", ".join(SOURCES)}, and TFDS folders in '
            'dataset.data_dir'
        )
    source = create(dataset, seed) if callable(create) else create
    if not callable(create) or not isinstance(source, Source):
        found = 'whose function in SOURCES returns' if callable(create) else 'which in SOURCES is'
        raise ValueError(
            f'name: got {dataset.name!r}, {found} a {type(source).__name__}; accepted: a function that '
            'returns a Source'
        )
    of_kind = ('random_resized_crop',) if source.open else ('pad_crop', 'pad_crop_flip')
    augmentations = ('none', *of_kind)
    if dataset.augment not in augmentations:
        raise ValueError(
            f'augment: got {dataset.augment!r}; accepted for {dataset.name}: {", ".join(augmentations)}'
        )
    if dataset.num_classes not in (0, source.num_classes):
        raise ValueError(
            f'num_classes: got {dataset.num_classes}, but the data has {source.num_classes} classes; '
            'set 0 to take the number from the data'
        )
    return source


def dataset_info(dataset, seed: int = 0) -> DatasetInfo:
    """What ``config.dataset`` describes, from sizes and names alone; only ``npz`` is read for it.

    Args:
      dataset: the ``dataset`` part of a config.
      seed: for ``synthetic``.

    Raises:
      ValueError, FileNotFoundError: an unknown data set or split, or one without its files.
    """
    source = _source(dataset, seed)
    side = min(source.image_shape[:2])
    if source.open and 0 < dataset.eval_resize < side:
        raise ValueError(
            f'eval_resize: got {dataset.eval_resize}; accepted: at least image_size ({side}), or 0'
        )
    if dataset.augment.startswith('pad_crop') and dataset.crop_padding > side:
        raise ValueError(
            f"crop_padding: got {dataset.crop_padding}; accepted: up to the {side} pixels of an image's "
            'side'
        )
    return DatasetInfo(
        *(len(split_range(dataset[key], source.sizes, key)) for key in SPLITS),
        source.image_shape,
        source.num_classes,
        source.mean,
        source.std,
        source.open is not None,
        source.fingerprint,
    )


def open_split(dataset, split: str) -> EncodedSplit:
    """Where the examples of a split lie, for a data set whose images stay on disk.

    Raises:
      ValueError, FileNotFoundError: files that are missing, or are not what they should be.
    """
    source = _source(dataset, 0)
    return source.open(split_name(split)).part(split_range(split, source.sizes))


def load_split(dataset, split: str, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 ``[n, height, width, channels]``, read-only, and labels int32 ``[n]`` of a split.

    Raises:
      ValueError, FileNotFoundError: data that is missing, or is not what it should be.
    """
    source = _source(dataset, seed)
    chosen = split_range(split, source.sizes)
    images, labels = read_split(source, dataset.name, split)
    part = slice(chosen.start, chosen.stop)
    images = images[part]  # a view of what the source may keep for other runs of this process
    images.setflags(write=False)
    return images, labels[part].astype(np.int32)
