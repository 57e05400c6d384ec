"""Each policy's batch sizes against numbers worked by hand."""

import contextlib
import json
import types

import numpy as np
import pytest
from runs import tiny

from adabatch_jax import policies, schedules, train
from adabatch_jax.config import ConfigError, default_config
from adabatch_jax.policies import Observation
from adabatch_jax.policies.friedlander_schmidt import next_sample


def make(num_examples=50_000, remainder='drop', **changes):
    config = default_config()
    config.dataset.remainder = remainder
    config.learning_rate.decay_epochs = 20.0
    config.update_from_flattened_dict(changes)
    clock = schedules.Clock(num_examples, config.num_epochs, config.dataset.remainder)
    rate = schedules.LearningRate(
        schedules.effective_schedule(config.learning_rate, clock),
        policies.coupling(config),
        config.learning_rate.reference_batch_size,
    )
    policy = policies.create(config, rate, clock)
    plan = schedules.make_plan(clock, policy.transitions, rate, ladder=policy.ladder)
    return policy, plan


def sizes(plan):
    return [(plan.clock.epoch(s.start), s.batch_size) for s in plan.stages]


def test_fixed_has_one_stage():
    assert sizes(make(**{'batch.policy': 'fixed'})[1]) == [(0, 128)]


def test_adabatch_doubles_every_interval_up_to_its_ceiling():
    _, plan = make(**{'batch.max_size': 1024})
    assert sizes(plan) == [(0, 128), (20, 256), (40, 512), (60, 1024)]


def test_adabatch_rounds_its_growth_down():
    _, plan = make(**{'batch.base_size': 5, 'batch.growth_factor': 1.5})
    assert [size for _, size in sizes(plan)] == [5, 7, 10, 15, 22]


def test_adabatch_at_its_ceiling_leaves_the_decay_to_the_learning_rate():
    _, plan = make(**{'batch.max_size': 256})
    assert plan.stages[-1].learning_rate_end == pytest.approx(0.01 * 2 * 0.375**4)


def test_a_decay_in_a_warm_up_leaves_a_growth_past_the_ceiling_something_to_do():
    changes = {'batch.max_size': 256, 'learning_rate.warmup_epochs': 90.0}
    _, plan = make(**changes, **{'learning_rate.decay_factor': 0.9})
    assert plan.stages[-1].batch_size == 256
    with pytest.raises(ValueError, match='growth at epoch 40 has nothing to do'):
        make(**changes, **{'learning_rate.decay_factor': 1.0})


def test_growth_past_the_ceiling_with_nothing_to_do_is_refused():
    with pytest.raises(ValueError, match='growth at epoch 80 has nothing to do'):
        make(**{'batch.max_size': 1024, 'learning_rate.schedule': 'constant'})
    with pytest.raises(ValueError, match='the batch never grows'):
        make(**{'batch.max_size': 128})


def test_growth_that_rounds_down_to_nothing_is_refused():
    with pytest.raises(ValueError, match='growth_factor 1.4: the batch never grows'):
        make(**{'batch.base_size': 2, 'batch.growth_factor': 1.4})


def test_without_a_ceiling_the_ladder_ends_at_the_largest_power_that_the_data_set_holds():
    for num_examples, top in ((1023, 512), (1024, 1024), (1025, 1024)):
        policy, _ = make(num_examples, **{'batch.policy': 'plateau', 'batch.base_size': 8})
        assert policy.ladder[-1] == top


@pytest.mark.parametrize(
    'num_examples, base, every', [(50_000, 100, 0.2), (1437, 8, 2.5), (1_281_167, 256, 0.7)]
)
def test_growth_and_decay_fall_on_the_same_update(num_examples, base, every):
    _, plan = make(
        num_examples,
        'carry',
        **{
            'batch.base_size': base,
            'batch.growth_epochs': every,
            'learning_rate.decay_epochs': every,
            'learning_rate.reference_batch_size': base,
            'num_epochs': 5 * every,
        },
    )
    rates = [r for s in plan.stages for r in (s.learning_rate_start, s.learning_rate_end)]
    assert rates == pytest.approx([0.01 * 0.75**k for k in range(5) for _ in range(2)])


def test_growth_past_the_data_set_is_refused():
    with pytest.raises(ValueError, match='batch size 1024 is larger than the data set'):
        make(num_examples=1000)


def test_listed_stages_may_grow_and_shrink():
    stages = ((0, 128), (10.5, 512), (20, 64))
    _, plan = make(**{'batch.policy': 'stages', 'batch.stages': stages, 'dataset.remainder': 'carry'})
    assert [s.batch_size for s in plan.stages] == [128, 512, 64]
    assert [s.start for s in plan.stages] == [0, 525_056, 1_000_192]


@pytest.mark.parametrize(
    'stages, message',
    [
        ((), 'stages: got none first; the first stage has to start at epoch 0'),
        (((1, 8),), 'start at epoch 0'),
        (((0, 8), (5, 16), (5, 32)), 'out of order'),
        (((0, 8), (5, 16), (2, 32)), 'out of order'),
        (((0, 8), (100, 16)), 'outside the run'),
        (((0, -8),), 'positive whole batch size'),
        (((0, 8.5),), 'positive whole batch size'),
        (((0, True),), 'positive whole batch size'),
        (((True, 8),), 'positive whole batch size'),
        ((7,), 'accepted: \\(start epoch, batch size\\)'),
    ],
)
def test_malformed_lists_of_stages_are_refused(stages, message):
    with pytest.raises(ValueError, match=message):
        make(**{'batch.policy': 'stages', 'batch.stages': stages})


def smith(**changes):
    protocol = {
        'batch.policy': 'increase_dont_decay',
        'num_epochs': 200.0,
        'learning_rate.effective': 0.1,
        'learning_rate.decay_factor': 0.2,
        'learning_rate.decay_at_epochs': (60, 120, 160),
        'dataset.remainder': 'carry',
    }
    return make(**(protocol | changes))[1]


def test_increase_dont_decay_holds_the_rate_and_grows_at_the_decay_epochs():
    plan = smith()
    assert [s.batch_size for s in plan.stages] == [128, 640, 3200, 16000]
    rates = [r for s in plan.stages for r in (s.learning_rate_start, s.learning_rate_end)]
    assert rates == pytest.approx([0.1] * 8)


def test_increase_dont_decay_decays_again_at_the_ceiling():
    plan = smith(**{'batch.max_size': 640})
    assert [s.batch_size for s in plan.stages] == [128, 640]
    assert plan.stages[1].learning_rate_start == pytest.approx(0.1)
    assert plan.stages[1].learning_rate_end == pytest.approx(0.1 * 0.2 * 0.2)
    partly = smith(**{'batch.max_size': 320})
    assert partly.stages[1].learning_rate_start == pytest.approx(0.1 * 2.5 * 0.2)


def test_increase_dont_decay_grows_by_the_exact_inverse_of_the_decay():
    plan = smith(**{'batch.base_size': 96, 'learning_rate.decay_factor': 0.75})
    assert plan.stages[1].batch_size == 128


def test_increase_dont_decay_needs_a_schedule_that_decays():
    with pytest.raises(ValueError, match='needs learning_rate.schedule step'):
        smith(**{'learning_rate.schedule': 'cosine'})
    with pytest.raises(ValueError, match='needs linear'):
        smith(**{'learning_rate.coupling': 'none'})


def test_friedlander_schmidt_samples_grow_in_exact_arithmetic():
    samples = [1]
    while len(samples) < 15:
        samples.append(next_sample(samples[-1], 1.1, 10_000))
    assert samples == [1, 3, 5, 7, 9, 11, 14, 17, 20, 23, 27, 31, 36, 41, 47]
    assert [next_sample(b, 1.1, 10_000) for b in (50, 90, 100, 110)] == [56, 100, 111, 122]
    assert next_sample(500, 1.1, 512) == 512


def test_friedlander_schmidt_uses_the_rung_at_or_above_the_sample():
    _, plan = make(
        num_examples=1000,
        **{'batch.policy': 'friedlander_schmidt', 'batch.base_size': 1, 'batch.max_size': 32},
    )
    # Samples 1, 3, 5, 7, 9, 11, 14, 17, ...: one update of 1 and of 4, two of 8, three of 16.
    assert [(s.batch_size, s.num_updates) for s in plan.stages[:4]] == [(1, 1), (4, 1), (8, 2), (16, 3)]
    assert plan.stages[4].batch_size == 32 and len(plan.stages) == 5


def plateau(losses_by_epoch, patience=2, batch_size=4):
    policy, _ = make(
        num_examples=8,
        **{
            'batch.policy': 'plateau',
            'batch.base_size': batch_size,
            'batch.max_size': 8,
            'batch.patience_epochs': patience,
        },
    )
    state, chosen = policy.initial_state(), []
    for epoch, losses in enumerate(losses_by_epoch):
        for k, loss in enumerate(losses):
            state = policy.observe(state, Observation(epoch + k / len(losses), 4, 0.1, loss))
        chosen.append(policy.decide(state, 8 * epoch).batch_size)
    return chosen, policy.decide(state, 0)


def test_plateau_keeps_the_batch_while_the_loss_falls():
    assert plateau([[8], [4], [2], [1], [0.5]])[0] == [4] * 5


def test_plateau_grows_after_its_patience_and_says_why():
    chosen, decision = plateau([[2], [1], [1], [0.999], [1]])
    assert chosen == [4, 4, 4, 4, 8]
    assert 'for 2 epochs' in decision.reason and 'on 1' in decision.reason
    assert decision.inputs == {'loss': 0.999, 'best_loss': 1, 'epochs_without': 2}


def test_plateau_judges_the_mean_over_the_epoch():
    assert plateau([[3, 1], [1, 3], [4, 0], [2, 2]])[0] == [4, 4, 4, 8]


def test_plateau_stays_at_the_top_of_its_ladder():
    assert plateau([[1]] * 12, patience=1)[0][-1] == 8


def test_plateau_state_is_plain_json():
    policy, _ = make(**{'batch.policy': 'plateau', 'batch.max_size': 512})
    state = policy.observe(policy.initial_state(), Observation(0.0, 128, 0.1, 2.5))
    assert json.loads(json.dumps(state)) == state


def test_a_policy_of_ones_own_has_to_name_its_coupling(monkeypatch):
    monkeypatch.setitem(policies.POLICIES, 'mine', types.SimpleNamespace(create=None))
    with pytest.raises(ValueError, match="policy: got 'mine', which names no coupling; .* 'linear' or"):
        make(**{'batch.policy': 'mine'})


def test_a_state_is_what_a_checkpoint_gives_back():
    state = {'sizes': [1, 2], 'loss': np.float64(0.1), 'best': None, 'of': {'8': {'seen': True}}}
    saved = policies.as_saved(state)
    assert saved == state and type(saved['loss']) is float


@pytest.mark.parametrize(
    'state, message',
    [
        ({'loss': np.float32(1)}, r"state\['loss'\] of a policy: got np.float32.1.0., a float32"),
        ({'a': [1, {'sizes': (1, 2)}]}, r"state\['a'\]\[1\]\['sizes'\] of .* a tuple; accepted: dict"),
        ({'seen': {8: 1}}, r"state\['seen'\] of a policy: got the key 8; accepted: dict with strings"),
        ({'sum': np.zeros(2)}, 'an? ndarray'),
    ],
)
def test_a_state_that_a_checkpoint_would_change_is_refused(state, message):
    with pytest.raises(TypeError, match=message):
        policies.as_saved(state)


def of_ones_own(monkeypatch, create):
    module = types.SimpleNamespace(create=create, COUPLING='linear')
    monkeypatch.setitem(policies.POLICIES, 'mine', module)
    return make(1000, **{'batch.policy': 'mine', 'num_epochs': 2.0})


def test_a_policy_of_ones_own_may_compute_with_numpy(monkeypatch):
    sizes = np.array([8, 16])

    def create(config, rate, clock):
        starts = np.arange(2) * clock.num_examples
        return policies.PlannedPolicy(map(schedules.Transition, starts, sizes, 'ab'))

    policy, plan = of_ones_own(monkeypatch, create)
    assert policy.ladder == (8, 16) and [stage.batch_size for stage in plan.stages] == [8, 16]
    json.dumps(plan.to_dict())


class Decides(policies.Policy):
    transitions, planned = (schedules.Transition(0, 8, ''),), False
    ladder = (np.int64(8),)

    def __init__(self, **own):
        vars(self).update(own)


@pytest.mark.parametrize(
    'create, message',
    [
        (lambda *_: None, "policy: got 'mine', which creates a NoneType; accepted: a Policy"),
        (
            lambda *_: policies.Policy(),
            'creates a Policy; accepted: .* transitions, ladder, planned',
        ),
        (lambda *_: Decides(), r"policy: got 'mine' with the ladder \(np.int64\(8\),\); accepted: int"),
        (lambda *_: Decides(ladder=(4,)), r"'mine' with a transition to 8 and the ladder \(4,\); acc"),
        (
            lambda *_: policies.PlannedPolicy([schedules.Transition(0.5, 8, '')]),
            'examples_seen of a transition: got 0.5; accepted: whole numbers of examples',
        ),
    ],
)
def test_a_policy_of_ones_own_that_is_none_is_refused(monkeypatch, create, message):
    with pytest.raises(ValueError, match=message):
        of_ones_own(monkeypatch, create)


@pytest.mark.parametrize(
    'own, size, examples_seen, message',
    [
        ({'planned': True}, 16, 24, '16 after 24 examples; accepted: 8, as its transitions say'),
        ({}, 16, 0, '16 after 0 examples; accepted: 8, as its transitions say'),
        ({}, 8, 24, '8 after 24 examples; accepted: 16 or more, or may_shrink = True'),
        ({'planned': True}, 8, 24, ''),
        ({'may_shrink': True}, 8, 24, ''),
        ({}, 16, 24, ''),
    ],
)
def test_decisions_are_what_a_policy_has_announced(own, size, examples_seen, message):
    mine, decision = Decides(ladder=(8, 16), **own), policies.Decision(size, '')
    refused = pytest.raises(ValueError, match=f"got 'mine', which decides on batch size {message}")
    with refused if message else contextlib.nullcontext():
        assert policies.checked('mine', mine, decision, examples_seen, before=16) is decision


def test_a_policy_without_transitions_is_refused_by_the_plan(monkeypatch):
    module = types.SimpleNamespace(create=lambda *_: policies.PlannedPolicy([]), COUPLING='linear')
    monkeypatch.setitem(policies.POLICIES, 'mine', module)
    with pytest.raises(ConfigError, match='config.batch: got none first; the first stage has to start'):
        train.plan(tiny(**{'batch.policy': 'mine'}))


@pytest.mark.parametrize('gain', [-1.0, 0.0, float('nan'), float('inf')])
def test_the_learning_rate_is_multiplied_by_positive_numbers_only(gain):
    with pytest.raises(ValueError, match='gain of a decision: got .*; accepted: positive numbers'):
        policies.Decision(8, '', gain=gain)


def test_unknown_policy_lists_what_exists():
    with pytest.raises(ValueError, match="got 'adabtach'; accepted: adabatch, adascale, .*, fixed"):
        make(**{'batch.policy': 'adabtach'})
