"""Short runs for tests, and what they look at of them."""

import threading

from adabatch_jax import metrics
from adabatch_jax.config import default_config


class StopAt(threading.Event):
    """Set from its n-th look on: a preemption in the n-th update."""

    def __init__(self, n):
        super().__init__()
        self.left = n

    def is_set(self):
        self.left -= 1
        return self.left < 0


def of_kind(directory, kind):
    return [r for r in metrics.read_records(directory) if r['kind'] == kind]


def without_times(records):
    timed = {'time', 'examples_per_second', 'compile_seconds', 'stall_seconds', 'cache_hit'}
    return [{k: v for k, v in r.items() if k not in timed} for r in records]


def tiny(**changes):
    config = default_config()
    values = {
        'num_epochs': 3.0,
        'log_every_steps': 4,
        'model.name': 'cnn',
        'dataset.name': 'synthetic',
        'dataset.num_examples': 100,
        'dataset.image_size': 8,
        'dataset.crop_padding': 1,
        'dataset.eval_batch_size': 64,
        'batch.base_size': 8,
        'batch.growth_epochs': 1.0,
        'learning_rate.effective': 0.02,
        'learning_rate.reference_batch_size': 8,
        'checkpoint_every_epochs': 0.5,
    }
    config.update_from_flattened_dict(values | changes)
    return config
