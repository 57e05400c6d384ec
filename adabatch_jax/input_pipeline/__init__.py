"""From a position in the stream of examples to batches of images.

The order of examples and their augmentation are pure functions of (seed, epoch, example): no
iterator has a state that would have to be saved, and a change of batch size neither repeats nor
skips an example.
"""

from adabatch_jax.input_pipeline.datasets import DatasetInfo, dataset_info, load_split

__all__ = ['DatasetInfo', 'create', 'dataset_info', 'load_split']


def create(config, clock):
    """The pipeline that ``config.dataset`` describes, its data loaded.

    Args:
      config: the resolved config of a run.
      clock: the run's ``schedules.Clock``.

    Raises:
      ValueError, FileNotFoundError: an unknown, missing or unusable data set.
    """
    from adabatch_jax.input_pipeline.tf_data import TfDataPipeline  # TensorFlow only when used

    return TfDataPipeline(config, clock)
