"""From a position in the stream of examples to batches of images.

The order of examples and their augmentation are pure functions of (seed, epoch, example): no
iterator has a state that would have to be saved, and a change of batch size neither repeats nor
skips an example.
"""

from adabatch_jax.input_pipeline.datasets import (
    DataError,
    DatasetInfo,
    dataset_info,
    load_split,
    open_split,
)

__all__ = ['DataError', 'DatasetInfo', 'create', 'dataset_info', 'load_split', 'open_split']


def create(config, info: DatasetInfo, clock):
    """The pipeline that ``config.dataset`` describes, its data loaded or found.

    Args:
      config: the resolved config of a run.
      info: what ``dataset_info`` says of its data.
      clock: the run's ``schedules.Clock``.

    Raises:
      ValueError, FileNotFoundError: an unknown, missing or unusable data set.
    """
    # TensorFlow is imported only when it is used.
    if info.is_encoded:
        from adabatch_jax.input_pipeline.decoding import EncodedPipeline

        return EncodedPipeline(config, info, clock)
    from adabatch_jax.input_pipeline.tf_data import TfDataPipeline

    return TfDataPipeline(config, clock)
