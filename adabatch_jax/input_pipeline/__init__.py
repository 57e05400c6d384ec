"""From a position in the stream of examples to batches of images.

The order of examples and their augmentation are pure functions of (seed, epoch, example): no
iterator has a state that would have to be saved, and a change of batch size neither repeats nor
skips an example.
"""

import functools
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
from adabatch_jax.input_pipeline.order import growing_sample
from adabatch_jax.input_pipeline.sources import Source

__all__ = [
    'SOURCES',
    'DataError',
    'DatasetInfo',
    'Load',
    'Source',
    'create',
    'dataset_info',
    'growing_sample',
    'load_on_device',
    'load_split',
    'open_split',
]

# Images of a data set that `dataset.pipeline=auto` keeps on every accelerator: seven times CIFAR-10.
DEVICE_BYTES = 2**30


def load_on_device(config, info: DatasetInfo, needed: bool = False) -> Load | None:
    """What makes batches on the device, where ``dataset.pipeline`` puts the data there.

    ``auto`` does so on an accelerator, for images in memory that do not take much of its own, and where
    TensorFlow is not installed.

    Args:
      config: the resolved config of a run.
      info: what ``dataset_info`` says of its data.
      needed: whether the run can do with nothing else: ``auto`` is ``device`` then.

    Raises:
      ValueError: images that stay on disk shall be on the device, or others shall not though they have
        to.
    """
    dataset, wanted = config.dataset, config.dataset.pipeline
    if needed and wanted == 'auto':
        wanted = 'device'
    if needed and wanted == 'tf_data':
        raise ValueError(
            f"pipeline: got 'tf_data'; accepted with optimizer {config.optimizer.name!r}: device, auto "
            '(it goes back to single examples)'
        )
    if wanted == 'tf_data' or (info.is_encoded and wanted == 'auto'):
        return None
    if info.is_encoded and needed:
        raise ValueError(
            f'name: got {dataset.name!r}, whose images stay on disk; accepted with optimizer '
            f'{config.optimizer.name!r}: data sets in memory'
        )
    if info.is_encoded:
        raise ValueError(
            f"pipeline: got 'device'; accepted for {dataset.name}: tf_data (its images stay on disk)"
        )
    load = Load(info.num_train, info.image_shape, *order.augmentation(dataset))
    if wanted == 'auto' and importlib.util.find_spec('tensorflow') is not None:
        return load if jax.default_backend() != 'cpu' and load.num_bytes() <= DEVICE_BYTES else None
    return load


def create(config, info: DatasetInfo, clock, load: Load | None = None, examples_at=None):
    """The pipeline that ``config.dataset`` describes, its data loaded or found.

    Args:
      config: the resolved config of a run.
      info: what ``dataset_info`` says of its data.
      clock: the run's ``schedules.Clock``.
      load: what ``load_on_device`` says.
      examples_at: with ``load``, the order to take examples in instead of ``order.examples_at``: a
        function of a position and a number of examples.

    Raises:
      ValueError, FileNotFoundError: an unknown, missing or unusable data set.
    """
    if load is not None:
        in_epochs = functools.partial(order.examples_at, config.seed, clock.num_examples)
        return DevicePipeline(config, load, examples_at or in_epochs)
    # TensorFlow is imported only when it is used.
    if info.is_encoded:
        from adabatch_jax.input_pipeline.decoding import EncodedPipeline

        return EncodedPipeline(config, info, clock)
    from adabatch_jax.input_pipeline.tf_data import TfDataPipeline

    return TfDataPipeline(config, clock)
