"""Each limit of a config's values, from both sides."""

import math

import pytest

from adabatch_jax import accepted_values
from adabatch_jax.config import default_config, flatten

DEFAULTS = flatten(default_config())
TINY = 5e-324  # the smallest positive number
LIMITS = {  # refused, accepted
    'num_epochs': ((0.0, -1.0, math.inf, math.nan), (TINY, 1, 2.0**127)),
    'learning_rate.effective': ((0.0, math.inf, 2.0**127 * 1.001), (TINY, 2.0**127)),
    'learning_rate.decay_factor': ((0.0, 1.001, math.inf), (TINY, 1.0)),
    'learning_rate.decay_at_epochs': (
        ((0,), (-1,), (math.inf,), (math.nan,), (True,), ('1',)),
        ((), (TINY, 1)),
    ),
    'optimizer.weight_decay': ((-TINY, math.inf), (0, 0.0)),
    'optimizer.momentum': ((-TINY, 1.0), (0.0, 0.999)),
    'batch.base_size': ((0, True, 8.0), (1,)),
    'batch.growth_factor': ((1.0,), (1.0000001,)),
    'batch.max_size': ((-1, 2**63), (0, 2**63 - 1)),
    'batch.stages': (((1,),), ((), ([0, 8],))),
    'batch.simigrad.cosine': ((0.0, 1.0), (TINY, 0.999)),
    'batch.statistics.min_groups': ((1,), (2,)),
    'dataset.image_size': ((-1, 2**16), (0, 2**16 - 1)),
    'dataset.num_classes': ((-1, 2**24), (0, 2**24 - 1)),
    'dataset.min_crop_area': ((0.0, 1.001), (TINY, 1.0)),
    'divergence.rate_factor': ((0.0, 1.0), (TINY, 0.999)),
    'analysis.trace_samples': ((1, -1), (0, 2)),
    'model.loss': (('mse',), ('hinge',)),
    'seed': ((-1, 2**32), (0, 2**32 - 1)),
}


@pytest.mark.parametrize('key', LIMITS)
def test_a_value_is_accepted_up_to_its_limits_and_refused_beyond(key):
    refused, accepted = LIMITS[key]
    for value in accepted:
        accepted_values.check(DEFAULTS | {key: value}, DEFAULTS)
    for value in refused:
        with pytest.raises(ValueError, match=f'^{key}: got .*; accepted: '):
            accepted_values.check(DEFAULTS | {key: value}, DEFAULTS)


@pytest.mark.parametrize('value', [-1.0, 0.0, 1e30, math.nan])
def test_whatever_a_factor_is_what_is_accepted_is_said_the_same(value):
    with pytest.raises(ValueError, match='accepted: a number above 0, up to 1$'):
        accepted_values.check(DEFAULTS | {'learning_rate.decay_factor': value}, DEFAULTS)
