"""What each value of a config may be by itself: kinds, ranges and choices."""

import math
from collections.abc import Mapping
from typing import Any

_POSITIVE = (
    'num_epochs',
    'eval_every_epochs',
    'checkpoint_every_epochs',
    'log_every_steps',
    'dataset.num_examples',
    'analysis.num_examples',
    'analysis.batch_size',
    'analysis.iterations',
    'analysis.eigenvalues',
    'batch.base_size',
    'batch.growth_epochs',
    'batch.patience_epochs',
    'batch.statistics.max_rungs',
    'batch.cabs.scale',
    'batch.big_batch.theta',
    'batch.critical_batch.every_epochs',
    'batch.critical_batch.probe_epochs',
    'batch.norm_test.theta',
    'batch.inner_product.theta',
    'batch.noise_scale.scale',
    'batch.gradient_diversity.delta',
    'learning_rate.effective',
    'learning_rate.power',
    'learning_rate.reference_batch_size',
    'optimizer.svrg.snapshot_passes',
)
_NOT_NEGATIVE = (
    'seed',
    'dataset.crop_padding',
    'dataset.eval_batch_size',
    'dataset.image_size',
    'dataset.eval_resize',
    'dataset.num_classes',
    'batch.max_size',
    'batch.max_per_device',
    'compile.updates_per_dispatch',
    'analysis.subspace',
    'analysis.lanczos_steps',
    'analysis.trace_samples',
    'batch.min_improvement',
    'batch.critical_batch.tolerance',
    'batch.statistics.min_size',
    'batch.statistics.decision_epochs',
    'batch.statistics.hysteresis',
    'batch.statistics.max_switches',
    'batch.statistics.min_speedup',
    'batch.inner_product.nu',
    'divergence.max_skipped',
    'divergence.max_fall_backs',
    'learning_rate.decay_epochs',
    'learning_rate.warmup_epochs',
    'learning_rate.warmup_initial',
    'optimizer.svrg.first_size',
    'optimizer.saga.first_size',
    'optimizer.weight_decay',
    'optimizer.trust_coefficient',
    'optimizer.epsilon',
)
_LARGEST = 2.0**127  # half of what float32 can hold
_UP_TO_ONE = ('learning_rate.decay_factor', 'dataset.min_crop_area')
_WITHIN_ONE = ('divergence.rate_factor', 'batch.simigrad.cosine')
_BELOW_ONE = (
    'optimizer.momentum',
    'optimizer.beta1',
    'optimizer.beta2',
    'optimizer.svrg.error_decay',
    'batch.statistics.decay',
)
_ABOVE_ONE = ('batch.growth_factor', 'batch.update_growth_factor', 'optimizer.svrg.growth_factor')
CHOICES = {
    'model.loss': ('cross_entropy', 'squared', 'hinge'),
    'model.dtype': ('float32', 'bfloat16'),
    'dataset.remainder': ('carry', 'drop'),
    'dataset.pipeline': ('auto', 'tf_data', 'device'),
    'learning_rate.rule': ('schedule', 'armijo', 'barzilai_borwein'),
    'learning_rate.coupling': ('auto', 'linear', 'sqrt', 'none'),
    'divergence.action': ('stop', 'skip', 'fall_back'),
}


def check(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Checks every value of a config.

    Args:
      given: values by key, such as ``batch.base_size``.
      defaults: the same keys, with values of the accepted kinds.

    Raises:
      ValueError: naming the key, the value received and what is accepted.
    """
    for key, default in defaults.items():
        kinds = (float, int) if isinstance(default, float) else (type(default),)
        if type(given[key]) not in kinds:
            raise ValueError(f'{key}: got {given[key]!r}; accepted: a value such as {default!r}')
    for key in ('learning_rate.decay_at_epochs', 'analysis.epsilons'):
        for value in given[key]:
            if type(value) is bool or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ValueError(f'{key}: got {value!r}; accepted: positive numbers')
    for entry in given['batch.stages']:
        if not isinstance(entry, tuple | list):
            raise ValueError(f'batch.stages: got {entry!r}; accepted: (start epoch, batch size)')

    def require(keys, accepted, is_good):
        for key in keys:
            value = given[key]
            if not (-math.inf < value < math.inf and is_good(value)):
                raise ValueError(f'{key}: got {value}; accepted: {accepted}')

    require(_POSITIVE, 'a positive number', lambda value: value > 0)
    require(_NOT_NEGATIVE, 'zero or a positive number', lambda value: value >= 0)
    require(_ABOVE_ONE, 'a number above 1', lambda value: value > 1)
    require(_UP_TO_ONE, 'a number above 0, up to 1', lambda value: 0 < value <= 1)
    require(_WITHIN_ONE, 'a number above 0, below 1', lambda value: 0 < value < 1)
    require(_BELOW_ONE, 'a number from 0 to below 1', lambda value: 0 <= value < 1)
    require(('analysis.trace_samples',), '0, or at least 2', lambda value: value != 1)
    require(('batch.statistics.min_groups',), 'at least 2', lambda value: value >= 2)
    # Together these keep a layer below 2^63 bytes, the most that XLA counts.
    require(('dataset.image_size',), 'a whole number below 2^16', lambda value: value < 2**16)
    require(('dataset.num_classes',), 'a whole number below 2^24', lambda value: value < 2**24)
    require(('seed',), 'a whole number below 2^32', lambda value: value < 2**32)
    integers = [key for key, default in defaults.items() if type(default) is int]
    require(integers, 'a whole number below 2^63', lambda value: abs(value) < 2**63)
    floats = [key for key, default in defaults.items() if isinstance(default, float)]
    require(floats, 'no more than single precision can hold', lambda value: abs(value) <= _LARGEST)
    for key, accepted in CHOICES.items():
        if given[key] not in accepted:
            raise ValueError(f'{key}: got {given[key]!r}; accepted: {", ".join(accepted)}')
