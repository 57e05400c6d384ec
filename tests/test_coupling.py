"""What a policy does to the learning rate: gains, growth in place of decay, and couplings."""

import json

import pytest
from test_statistical_policies import NUM_EXAMPLES, drive, make, problem

from adabatch_jax import policies, schedules
from adabatch_jax.config import default_config, resolve
from adabatch_jax.policies import adascale

# ------------------------------------------------------------------------------ adascale


def test_the_gain_of_adascale_lies_between_one_and_the_scale():
    assert adascale.gain(1.0, 0.0, 8) == 8 and adascale.gain(0.0, 1.0, 8) == 1
    assert adascale.gain(0.0, 0.0, 8) == 1 and adascale.gain(2.0, -1.0, 8) == 8
    for variance in (0.1, 1.0, 10.0):
        r, phi = adascale.gain(variance, 1.0, 8), 16 * variance
        assert 1 < r < 8
        assert r / 8 == pytest.approx((phi + 16) / (phi + 8 * 16))  # Pollux' efficiency, B0 = 16


def test_adascale_measures_its_gain_and_leaves_the_batch_as_planned():
    policy = make('adascale', **{'batch.base_size': 128, 'learning_rate.reference_batch_size': 16})
    sizes, state = drive(policy, problem(64.0))
    assert sizes == [128]
    decision = policy.decide(state, 0)
    assert decision.gain == pytest.approx(adascale.gain(64 / 16, 1.0, 8), rel=0.1)
    assert policy.decide(policy.initial_state(), 0).gain == 1.0


def test_adascale_takes_the_square_root_of_its_gain_for_adam():
    changes = {'batch.base_size': 128, 'learning_rate.reference_batch_size': 16}
    sgd, adam = (make('adascale', **changes, **{'optimizer.name': name}) for name in ('sgd', 'adam'))
    noisy = {'variance': 16.0, 'squared_gradient': 0.0}
    assert sgd.decide(noisy, 0).gain == 8 and adam.decide(noisy, 0).gain == 8**0.5


def test_the_gain_of_adascale_takes_the_place_of_any_coupling():
    config = default_config()
    config.batch.policy = 'adascale'
    for coupling in ('auto', 'linear'):
        config.learning_rate.coupling = coupling
        assert policies.coupling(config) == 'none'


def test_seesaw_needs_a_coupling():
    with pytest.raises(ValueError, match="policy seesaw: got coupling 'none'; needs linear or sqrt"):
        make('seesaw', **{'learning_rate.coupling': 'none', 'learning_rate.schedule': 'cosine'})


# -------------------------------------------------------------------------------- seesaw


@pytest.mark.parametrize('optimizer, factor', [('adam', 0.5), ('sgd', 1.0)])
def test_seesaw_turns_decays_into_growth_and_keeps_the_rest_of_the_rule(optimizer, factor):
    """A decay by 4: Adam halves its rate, SGD keeps it, and the batch is four times as large."""
    changes = {
        'num_epochs': 30.0, 'optimizer.name': optimizer, 'learning_rate.decay_factor': 0.25,
        'learning_rate.decay_epochs': 10.0, 'batch.growth_factor': 4.0,
    }  # fmt: skip
    policy = make('seesaw', **changes)
    assert [(t.examples_seen, t.batch_size) for t in policy.transitions] == [
        (0, 16), (100_000, 64), (200_000, 256),
    ]  # fmt: skip
    config = default_config()
    config.update_from_flattened_dict({'batch.policy': 'seesaw', 'optimizer.name': optimizer})
    rate = schedules.LearningRate(lambda epoch: 0.25 ** (epoch // 10), policies.coupling(config), 16)
    assert rate(10.0, 64) == pytest.approx(factor)


def test_seesaw_saves_the_updates_that_the_integral_of_a_cosine_says():
    changes = {'num_epochs': 200.0, 'learning_rate.schedule': 'cosine', 'batch.growth_factor': 1.1}
    policy = make('seesaw', **changes, **{'batch.base_size': 10, 'batch.max_size': 10_000})
    clock = schedules.Clock(NUM_EXAMPLES, 200.0)
    plan = schedules.make_plan(
        clock, policy.transitions, schedules.LearningRate(lambda epoch: epoch * 0 + 1.0)
    )
    assert plan.num_updates * 10 / clock.total_examples == pytest.approx(0.5, rel=0.06)


def test_seesaw_without_a_fall_is_refused():
    with pytest.raises(ValueError, match='never falls to 1/2 of its highest rate'):
        make('seesaw', **{'learning_rate.schedule': 'constant'})


# ------------------------------------------------------------------------------ coupling


@pytest.mark.parametrize(
    'name, optimizer, expected',
    [
        ('adabatch', 'sgd', 'linear'), ('adabatch', 'adamw', 'sqrt'), ('cabs', 'sgd', 'none'),
        ('big_batch', 'sgd', 'none'), ('norm_test', 'lamb', 'none'), ('simigrad', 'sgd', 'sqrt'),
        ('noise_scale', 'adam', 'sqrt'),
    ],
)  # fmt: skip
def test_each_policy_has_its_own_coupling_and_the_config_overrides_it(name, optimizer, expected):
    config = default_config()
    config.update_from_flattened_dict({'batch.policy': name, 'optimizer.name': optimizer})
    assert policies.coupling(config) == expected
    config.learning_rate.coupling = 'linear'
    assert policies.coupling(config) == 'linear'


def test_every_policy_but_the_replay_declares_a_coupling():
    for name, module in policies.POLICIES.items():
        assert name == 'replay' or module.COUPLING in schedules.COUPLINGS


@pytest.mark.parametrize(
    'changes, expected',
    [
        ({'batch.policy': 'norm_test'}, 'none'),
        ({'batch.policy': 'simigrad'}, 'sqrt'),
        ({'batch.policy': 'adabatch'}, ''),
        ({'batch.policy': 'norm_test', 'learning_rate.reference_batch_size': 64}, ''),
        ({'batch.policy': 'norm_test', 'learning_rate.coupling': 'linear'}, ''),
        ({'batch.policy': 'adascale'}, ''),
    ],
)
def test_the_plan_tells_the_coupling_that_a_control_needs(changes, expected):
    """Its first batch size has to get the learning rate that the policy gives it."""
    config = default_config()
    config.update_from_flattened_dict({'batch.base_size': 64} | changes)
    policy = policies.create(resolve(config), None, schedules.Clock(1000, 9))
    said = policies.control(resolve(config), policy)
    assert said.endswith(f'coupling={expected}.') if expected else said == ''
    if expected:
        control = config.copy_and_resolve_references()
        control.batch.policy, control.learning_rate.coupling = 'fixed', expected
        assert policies.coupling(control) == policies.coupling(config)


def begins_with(config):
    """The first batch size of a run and its coupled learning rate, before any gain."""
    coupling = policies.coupling(config)
    rate = schedules.LearningRate(0.1, coupling, config.learning_rate.reference_batch_size)
    policy = policies.create(resolve(config), rate, schedules.Clock(1000, 9))
    first = policy.transitions[0].batch_size
    return first, rate(0.0, first), policies.control(resolve(config), policy)


@pytest.mark.parametrize(
    'changes, expected',
    [
        ({'batch.policy': 'stages'}, '--config.batch.base_size=32'),
        ({'batch.policy': 'adascale'}, '--config.batch.base_size=32'),
        ({'batch.policy': 'stages', 'batch.base_size': 32}, ''),
        ({'batch.policy': 'adascale', 'batch.stages': ()}, ''),
        ({'batch.policy': 'replay'}, '--config.batch.base_size=32 --config.learning_rate.coupling=sqrt'),
        ({'batch.policy': 'replay', 'batch.base_size': 32}, '--config.learning_rate.coupling=sqrt'),
    ],
)
def test_the_plan_tells_the_batch_that_a_control_needs(changes, expected, tmp_path):
    """It begins with the batch that the run begins with, at the rate that the coupling gives that."""
    stages = [{'examples_seen': 0, 'batch_size': 32, 'reason': 'begins'}]
    found = {'policy': 'simigrad', 'num_examples': 1000, 'num_epochs': 9, 'coupling': 'sqrt'}
    found |= {'statistics': 'norms', 'max_per_device': 16, 'stages': stages}
    (tmp_path / 'schedule.json').write_text(json.dumps(found))
    config = default_config()
    given = {'batch.base_size': 64, 'batch.stages': ((0, 32), (1, 64)), 'batch.replay': str(tmp_path)}
    config.update_from_flattened_dict(given | changes)
    first, rate, said = begins_with(config)
    assert said == (f'Its control: --config.batch.policy=fixed {expected}.' if expected else '')
    flags = dict(flag.removeprefix('--config.').split('=') for flag in expected.split())
    control = config.copy_and_resolve_references()
    control.batch.policy = 'fixed'
    control.batch.base_size = int(flags.get('batch.base_size', control.batch.base_size))
    control.learning_rate.coupling = flags.get('learning_rate.coupling', 'auto')
    assert begins_with(control)[0] == first
    if changes['batch.policy'] != 'adascale':  # which has its gain in place of a coupling
        assert begins_with(control)[1] == rate
