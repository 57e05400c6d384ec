"""From a position in the stream of examples to batches of images.

The order of examples and their augmentation are pure functions of (seed, epoch, example): no
iterator has a state that would have to be saved, and a change of batch size neither repeats nor
skips an example.
"""

import importlib.util

import jax

from adabatch_jax.input_pipeline import order
from adabatch_jax.input_pipeline.datasets import (
    SOURCES,
    DataError,
    DatasetInfo,
    dataset_info,
    load_split,
    open_split,
)
from adabatch_jax.input_pipeline.device import DevicePipeline, Load
from adabatch_jax.input_pipeline.sources import Source

__all__ = [
    'SOURCES',
    'DataError',
    'DatasetInfo',
    'Load',
    'Source',
    'create',
    'dataset_info',
    'load_on_device',
    'load_split',
    'open_split',
]

# Images of a data set that `dataset.pipeline=auto` keeps on every accelerator: four times CIFAR-10.
DEVICE_BYTES = 2**30


def load_on_device(config, info: DatasetInfo) -> Load | None:
    """What makes batches on the device, where ``dataset.pipeline`` puts the data there.

    ``auto`` does so on an accelerator, for images in memory that do not take much of its own, and where
    TensorFlow is not installed.

    Raises:
      ValueError: images that stay on disk shall be on the device.
    """
    dataset = config.dataset
    if dataset.pipeline == 'tf_data' or (info.is_encoded and dataset.pipeline == 'auto'):
        return None
    if info.is_encoded:
        raise ValueError(
            f"pipeline: got 'device'; accepted for {dataset.name}: tf_data (its images stay on disk)"
        )
    load = Load(config.seed, info.num_train, info.image_shape, *order.augmentation(dataset))
    if dataset.pipeline == 'auto' and importlib.util.find_spec('tensorflow') is not None:
        return load if jax.default_backend() != 'cpu' and load.num_bytes() <= DEVICE_BYTES else None
    return load


def create(config, info: DatasetInfo, clock, load: Load | None = None):
    """The pipeline that ``config.dataset`` describes, its data loaded or found.

    Args:
      config: the resolved config of a run.
      info: what ``dataset_info`` says of its data.
      clock: the run's ``schedules.Clock``.
      load: what ``load_on_device`` says.

    Raises:
      ValueError, FileNotFoundError: an unknown, missing or unusable data set.
    """
    if load is not None:
        return DevicePipeline(config, clock, load)
    # TensorFlow is imported only when it is used.
    if info.is_encoded:
        from adabatch_jax.input_pipeline.decoding import EncodedPipeline

        return EncodedPipeline(config, info, clock)
    from adabatch_jax.input_pipeline.tf_data import TfDataPipeline

    return TfDataPipeline(config, clock)
