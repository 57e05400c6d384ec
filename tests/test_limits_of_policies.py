"""Policies at the edges: the first observation, the last rung, numbers that are none."""

import math

import pytest
from test_policies import make as planned
from test_policies import smith
from test_statistical_policies import make, steady

from adabatch_jax import policies
from adabatch_jax.policies import Observation, adascale, base, statistical


def observation(epoch=0.0, batch_size=16, variance=1.0, squared=1.0, along=math.nan, norm=math.nan):
    return Observation(epoch, batch_size, 0.1, 1.0, 1.0, variance, squared, along, norm)


@pytest.mark.parametrize(
    'name, ends_with',
    [
        ('big_batch', 16),
        ('norm_test', 16),
        ('inner_product', 16),
        ('gradient_diversity', 16),
        ('noise_scale', 4),
    ],
)
def test_without_noise_a_policy_shrinks_only_if_its_method_does(name, ends_with):
    policy = make(name)
    state = policy.initial_state()
    for k in range(9):
        state = policy.observe(state, observation(k / 10, variance=1e-3, along=1e-3, norm=1.0))
    assert policy.decide(state, 0).batch_size == ends_with


@pytest.mark.parametrize(
    'name, rung',
    [('big_batch', 3), ('norm_test', 3), ('inner_product', 3), ('noise_scale', 2), ('cabs', 2)],
)
def test_a_batch_that_a_test_asks_for_is_rounded_up_and_a_scale_to_the_nearest(name, rung):
    assert make(name)._rung_for(2, 20.0) == rung  # of 4, 8, 16, 32, ...; 16 is more than 10 % off


def test_the_nearest_rung_changes_at_the_geometric_means():
    # sqrt(8 x 16) = 11.3, sqrt(16 x 32) = 22.6
    sizes = (1, 11, 12, 16, 22, 23, 999)
    found = [base.nearest_rung((8, 16, 32), size)['rung'] for size in sizes]
    assert found == [0, 0, 1, 1, 1, 2, 2]


def test_only_policies_that_decide_by_what_they_see_want_every_update():
    assert not policies.PlannedPolicy(()).observes
    assert make('noise_scale').observes and make('adascale').observes


NEAREST_TO_20 = {'reason': 'goes on with 16, the nearest to 20'}


def test_plateau_goes_on_from_another_ladder_with_what_it_knows():
    policy = make('plateau', **{'batch.base_size': 8, 'batch.max_size': 32})
    start, near = policy.initial_state(), NEAREST_TO_20 | {'rung': 1}
    assert policy.continued({}, 3.7, 20) == start | {'epoch': 3} | near
    known = start | {'best_loss': 1.0, 'epochs_without': 1, 'rung': 2, 'epoch': 2}
    known['inputs'] = {'loss': 1.0}
    assert policy.continued(known, 3.7, 20) == known | {'inputs': {}} | near


def test_a_policy_of_statistics_goes_on_from_another_ladder_with_what_it_knows():
    policy = make('noise_scale')  # 4, 8, 16, ...
    start, near = policy.initial_state(), NEAREST_TO_20 | {'rung': 2}
    assert policy.continued({}, 3.7, 20) == start | {'epoch': 3.7} | near
    known = start | {'switches': 2, 'rung': 5, 'epoch': 2.5, 'sums': {'variance': 1.0}}
    known['inputs'] = {'wanted': 9.0}
    assert policy.continued(known, 3.7, 20) == known | {'inputs': {}} | near


def test_adascale_keeps_its_averages_from_the_first_one_on():
    policy = make('adascale', **{'batch.base_size': 128, 'learning_rate.reference_batch_size': 16})
    start = policy.initial_state()
    first = policy.observe(start, observation(batch_size=128, variance=32.0))
    # (32 / 16 + 1) / (32 / 128 + 1)
    assert policy.decide(first, 0).gain == pytest.approx(adascale.gain(2.0, 1.0, 8)) == 3 / 1.25
    assert policy.observe(first, observation(batch_size=128, variance=math.inf)) == first
    assert policy.continued(first, 3.7, 20) == first and policy.continued({}, 3.7, 20) == start


@pytest.mark.parametrize('name', ['adascale', 'critical_batch', 'seesaw', 'increase_dont_decay'])
def test_policies_whose_batches_go_with_a_rate_refuse_one_that_is_searched_for(name):
    changes = {'learning_rate.rule': 'armijo', 'learning_rate.schedule': 'step', 'num_epochs': 10.0}
    with pytest.raises(ValueError, match="planned learning rates only, and learning_rate.rule 'armijo'"):
        make(name, **changes | {'learning_rate.decay_epochs': 1.0})


def test_noise_beside_no_gradient_asks_for_all_there_is_and_nothing_beside_nothing_for_nothing():
    simigrad, goodput = make('simigrad'), make('goodput')
    for squared in (0.0, -1.0):
        assert simigrad.wanted({'variance': 0.5, 'squared_gradient': squared}, {}) == math.inf
        assert math.isnan(simigrad.wanted({'variance': 0.0, 'squared_gradient': squared}, {}))
    timed = {'rung': 2, 'times': {'16': [2, 1.0]}}
    assert math.isnan(goodput.wanted({'variance': 0.0, 'squared_gradient': 1.0}, timed))


def test_a_time_counts_once_an_update_after_the_first_was_timed():
    times = {'times': {'8': [1, 0.0], '16': [2, 0.5]}}
    assert statistical.measured_times(times) == {16: 0.5}


def transitions(name, **changes):
    policy = make(name, **changes)
    return [(t.examples_seen, t.batch_size) for t in policy.transitions]


def seesaw(**changes):
    return transitions('seesaw', **changes | {'learning_rate.decay_factor': 0.25})


def test_seesaw_climbs_two_rungs_at_once_where_the_rate_falls_that_far():
    changes = {'num_epochs': 30.0, 'learning_rate.decay_epochs': 10.0, 'batch.growth_factor': 2.0}
    assert seesaw(**changes) == [(0, 16), (100_000, 64), (200_000, 256)]


def test_seesaw_finds_the_decays_of_a_run_of_few_examples():
    changes = {'num_epochs': 0.9, 'learning_rate.decay_epochs': 0.3, 'batch.growth_factor': 4.0}
    assert seesaw(**changes) == [(0, 16), (3000, 64), (6000, 256)]


def test_increase_dont_decay_that_could_never_grow_is_refused_unless_nothing_ever_decays():
    with pytest.raises(ValueError, match='the batch never grows'):
        smith(**{'batch.max_size': 128})
    (stage,) = smith(**{'learning_rate.decay_at_epochs': (300,)}).stages
    assert stage.batch_size == 128


def test_friedlander_schmidt_goes_on_from_each_rung_and_ends_with_the_run():
    changes = {'batch.policy': 'friedlander_schmidt', 'batch.base_size': 8, 'batch.max_size': 32}
    # Samples of 8, 10, 12, 15, 18, ...: an update of 8, three of 16.
    policy, plan = planned(1000, 'carry', **changes)
    assert [(s.batch_size, s.num_updates) for s in plan.stages][:2] == [(8, 1), (16, 3)]
    assert policy.transitions[-1].batch_size == 32
    policy, _ = planned(1000, 'carry', **changes, num_epochs=0.008)
    assert [t.batch_size for t in policy.transitions] == [8]


def test_listed_stages_may_have_batches_of_one_example_and_have_to_begin():
    listed = {'batch.policy': 'stages', 'batch.stages': ((0, 1), (1, 2))}
    _, plan = planned(100, 'carry', **listed)
    assert [stage.batch_size for stage in plan.stages] == [1, 2]
    with pytest.raises(ValueError, match='starts at epoch inf, outside the run'):
        planned(100, 'carry', **listed | {'batch.stages': ((0, 8), (math.inf, 16))})


def test_the_throughput_guard_compares_with_what_was_trained_where_rungs_are_leapt_over():
    changes = {'batch.statistics.min_speedup': 1.1, 'batch.statistics.max_rungs': 2}
    policy = make('noise_scale', **changes)
    state = steady(policy, 100_000.0, seconds=lambda size: size / 16)  # no batch is faster than another
    assert policy.ladder[-1] > 64 and policy.decide(state, 0).batch_size == 64


@pytest.mark.parametrize('hysteresis', [0.0, 0.1])
@pytest.mark.parametrize('theta', [0.5, 0.9, 0.96])
def test_the_norm_test_grows_as_long_as_it_asks_for_more_than_its_hysteresis(theta, hysteresis):
    changes = {'batch.norm_test.theta': theta, 'batch.statistics.hysteresis': hysteresis}
    policy = make('norm_test', **changes, **{'batch.max_size': 65536, 'batch.statistics.min_size': 0})
    size = policy.decide(steady(policy, 1e4), 0).batch_size
    allowed = (1 + hysteresis) * theta**2
    end = (1 - allowed) / allowed * 1e4  # where noise and gradient pass, at a noise scale of 1e4
    assert size == next(rung for rung in policy.ladder if rung >= end)
