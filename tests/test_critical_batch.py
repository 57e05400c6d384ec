"""Branched probing: what it decides, and that the run it branches from does not notice."""

import types

import numpy as np
import pytest
from runs import StopAt, of_kind, tiny, without_times
from test_statistical_policies import NUM_EXAMPLES, make

from adabatch_jax import probing, train
from adabatch_jax.config import ConfigError
from adabatch_jax.policies import critical_batch

PROBING = {
    'batch.policy': 'critical_batch',
    'batch.max_size': 32,
    'batch.critical_batch.every_epochs': 0.5,
    'batch.critical_batch.probe_epochs': 0.64,
    'batch.critical_batch.tolerance': 100.0,
}


@pytest.mark.parametrize(
    'losses, expected',
    [
        ({16: 1.0, 32: 1.009, 64: 1.0099}, 64),
        ({16: 1.0, 32: 1.011, 64: 1.0}, 64),  # compared with every smaller one, not with the next
        ({16: 1.0, 32: 0.9, 64: 0.95}, 32),
        ({16: 1.0, 32: 1.02, 64: 1.03}, 16),
        ({16: critical_batch.WORST, 32: critical_batch.WORST}, 16),
        ({16: critical_batch.WORST, 32: 1.0, 64: critical_batch.WORST}, 32),
    ],
)
def test_the_critical_batch_is_the_largest_that_loses_to_no_smaller_one(losses, expected):
    assert critical_batch.tolerated(losses, 0.01) == expected


def test_a_quadratic_with_noise_tolerates_batches_up_to_its_critical_one():
    """E w^2 after n updates of w <- w - a (w + noise / sqrt(B)), a linear in B: a closed form.

    With eta = a / B, D examples and n = D / B updates, w decays by (1 - eta B)^n and noise leaves
    eta sigma^2 / (2 - eta B): both suffer where eta B comes near 2.
    """
    eta, examples, start, sigma = 1 / 600, 1024, 4.0, 1.0

    def loss(size):
        factor = (1 - eta * size) ** 2
        decayed = factor ** (examples / size)
        noise = (eta * size) ** 2 * sigma**2 / size * (1 - decayed) / (1 - factor)
        return 0.5 * (start * decayed + noise)

    losses = {size: loss(size) for size in (16, 32, 64, 128, 256, 512, 1024)}
    found = critical_batch.tolerated(losses, 0.01)
    floor = losses[16]
    assert losses[found] <= floor + 0.01 < losses[2 * found]
    assert 16 < found < 1024


def make_probing(**changes):
    values = {'num_epochs': 10.0, 'batch.critical_batch.probe_epochs': 0.25}
    return make('critical_batch', **values | changes)


def test_probes_are_due_at_their_interval_and_need_room_before_the_end():
    policy = make_probing()
    state = policy.initial_state()
    assert policy.probes(state, 2 * NUM_EXAMPLES - 1) == ()
    assert policy.probes(state, 2 * NUM_EXAMPLES) == (16, 32)
    state = policy.probed(state, 2 * NUM_EXAMPLES, {16: 1.0, 32: 1.5})
    assert policy.decide(state, 0).batch_size == 16
    assert policy.probes(state, 3 * NUM_EXAMPLES) == ()
    state = policy.probed(state, 4 * NUM_EXAMPLES, {16: 1.0, 32: 1.005})
    decision = policy.decide(state, 0)
    assert decision.batch_size == 32 and 'CriticalBatch asks for a batch of 32' in decision.reason
    assert decision.inputs == {'loss with 16': 1.0, 'loss with 32': 1.005, 'wanted': 32}
    assert policy.probes(state, 10 * NUM_EXAMPLES - 2400) == ()


def test_nothing_is_probed_once_a_larger_batch_is_no_faster():
    policy = make_probing(**{'batch.statistics.min_speedup': 1.1})
    for slower, expected in ((1.5, (16, 32)), (2.0, ())):
        timed = policy.initial_state() | {'times': {'8': [5, 1.0], '16': [5, slower]}}
        assert policy.probes(timed, 2 * NUM_EXAMPLES) == expected


def test_a_branch_that_diverges_is_not_tolerated_and_the_top_of_the_ladder_is_not_probed():
    policy = make_probing(**{'batch.max_size': 32, 'batch.statistics.min_size': 0})
    state = policy.probed(policy.initial_state(), 100, {16: 2.0, 32: np.inf})
    assert policy.decide(state, 100).batch_size == 16
    state = policy.probed(state, 200, {16: 2.0, 32: 2.0})
    assert policy.decide(state, 200).batch_size == 32
    assert policy.probes(state, 8 * NUM_EXAMPLES) == ()


@pytest.mark.parametrize(
    'changes',
    [
        {'batch.growth_factor': 1.1, 'batch.base_size': 100, 'batch.statistics.min_size': 0},
        {'batch.statistics.hysteresis': 2.0},
    ],
)
def test_a_rung_that_is_tolerated_is_taken_however_near_it_is(changes):
    policy = make_probing(**changes)
    sizes = policy.ladder[:2]
    start = {**policy.initial_state(), 'rung': 0}
    state = policy.probed(start, 2 * NUM_EXAMPLES, dict.fromkeys(sizes, 1.0))
    assert policy.decide(state, 0).batch_size == sizes[1]


def test_a_finished_run_is_prolonged_where_a_probe_is_due(tmp_path):
    train.train(tiny(**PROBING | {'num_epochs': 1.0}), tmp_path)
    longer = train.train(tiny(**PROBING), tmp_path, allow_schedule_change=True)
    assert longer['probe_examples'] > 0
    assert [stage['batch_size'] for stage in of_kind(tmp_path, 'stage')][-1] == 32


def test_probing_leaves_the_run_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(critical_batch, 'tolerated', lambda losses, tolerance: min(losses))
    probed = train.train(tiny(**PROBING), tmp_path / 'probed')
    fixed = train.train(tiny(**PROBING | {'batch.policy': 'fixed'}), tmp_path / 'fixed')
    assert probed['params_digest'] == fixed['params_digest']
    assert probed['updates'] == fixed['updates']
    assert probed['probe_examples'] > 0 and probed['probe_seconds'] > 0
    assert 'probe_examples' not in fixed


def test_examples_of_probes_are_those_of_all_updates_of_their_branches(tmp_path, monkeypatch):
    taken = []
    take = probing.branch_losses

    def counted(run, sizes, num_examples):
        taken.extend(size * -(-num_examples // size) for size in sizes)
        return take(run, sizes, num_examples)

    monkeypatch.setattr(probing, 'branch_losses', counted)
    summary = train.train(tiny(**PROBING), tmp_path)
    assert summary['probe_examples'] == sum(taken) > 0


def test_compiling_for_a_branch_counts_as_compiling(monkeypatch):
    stream = types.SimpleNamespace(compile_seconds=1.5)
    monkeypatch.setattr(probing, 'open_stream', lambda *_: stream)
    clock = types.SimpleNamespace(update_at=lambda *_: None, updates=lambda *_: ())
    host = types.SimpleNamespace(seconds={'compile': 1.0})
    run = types.SimpleNamespace(
        experiment=None, pipeline=None, clock=clock, host=host, state={}, examples_seen=0
    )
    probing.branch_losses(run, (8, 16), 64)
    assert host.seconds == {'compile': 1.0 + 2 * 1.5}


def test_a_branch_trains_as_a_run_with_its_batch_size_would(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        critical_batch, 'tolerated', lambda losses, tolerance: seen.append(losses) or min(losses)
    )
    train.train(tiny(**PROBING), tmp_path / 'probed')
    changes = {'batch.policy': 'stages', 'batch.stages': ((0.0, 8), (0.56, 16)), 'log_every_steps': 1}
    train.train(tiny(**changes), tmp_path / 'stages')
    begin, length = 56, 64  # the first probe: at the first update that begins past half an epoch
    half = [
        record
        for record in of_kind(tmp_path / 'stages', 'train')
        if begin + length // 2 + 16 <= record['examples_seen'] < begin + length + 16
    ]
    assert {record['batch_size'] for record in half} == {16}
    assert seen[0][16] == pytest.approx(np.mean([record['loss'] for record in half]), rel=1e-5)


def test_losses_of_weights_that_do_not_move_are_the_same_for_every_batch_size(tmp_path, monkeypatch):
    seen, wanted = [], {'learning_rate.effective': 1e-9, 'optimizer.momentum': 0.0}
    monkeypatch.setattr(
        critical_batch, 'tolerated', lambda losses, tolerance: seen.append(losses) or min(losses)
    )
    # Of 82 examples the largest batch leaves 18: the others would end elsewhere if they took those.
    wanted |= {'model.batch_norm': 'ghost:2', 'batch.critical_batch.probe_epochs': 0.82}
    train.train(tiny(**PROBING | wanted | {'batch.statistics.max_rungs': 2}), tmp_path)
    for losses in seen:
        assert losses == pytest.approx(dict.fromkeys((8, 16, 32), losses[8]), rel=1e-5)
    assert len({round(losses[8], 3) for losses in seen}) > 1  # the examples matter


def test_a_run_that_probes_grows_and_is_continued_and_replayed_exactly(tmp_path):
    ends = [train.train(tiny(**PROBING), tmp_path / 'whole')]
    stages = of_kind(tmp_path / 'whole', 'stage')
    assert [stage['batch_size'] for stage in stages] == [8, 16, 32]
    assert {'loss with 8', 'loss with 16', 'wanted'} <= stages[1]['inputs'].keys()
    for n in (5, 6):  # updates until the next stop
        with pytest.raises(train.Preempted):
            train.train(tiny(**PROBING), tmp_path / 'stopped', StopAt(n))
    ends.append(train.train(tiny(**PROBING), tmp_path / 'stopped'))
    replay = {'batch.policy': 'replay', 'batch.replay': str(tmp_path / 'whole')}
    ends.append(train.train(tiny(**PROBING | replay), tmp_path / 'replay'))
    assert len({end['params_digest'] for end in ends}) == 1
    assert ends[0]['probe_examples'] == ends[1]['probe_examples']
    whole, stopped = (without_times(of_kind(tmp_path / d, 'train')) for d in ('whole', 'stopped'))
    assert whole == stopped


def test_probes_too_short_for_the_ladder_are_a_mistake_and_their_cost_is_in_the_plan():
    short = PROBING | {'batch.critical_batch.probe_epochs': 0.5}
    with pytest.raises(ConfigError, match=r'critical_batch.probe_epochs: got 0.5, 50 examples; needs'):
        train.plan(tiny(**short))
    with pytest.raises(ConfigError, match=r'probe_epochs: got 9, and the run has .* epochs; accepted'):
        train.plan(tiny(**PROBING | {'batch.critical_batch.probe_epochs': 9.0}))
    note = train.fitted(tiny(**PROBING)).policy.note
    assert note == 'Probes, beside these updates: at most 5 x 2 branches of 64 examples.'


def test_a_branch_whose_batch_leaves_out_the_rest_of_the_epoch_has_a_loss_all_the_same(tmp_path, capsys):
    """Of 100 examples 36 are left: the branch with 64 begins with the next epoch, and has one update."""
    changes = {
        'dataset.num_examples': 100,
        'dataset.remainder': 'drop',
        'batch.base_size': 16,
        'batch.max_size': 64,
        'batch.critical_batch.probe_epochs': 1.3,
        'batch.statistics.max_rungs': 2,
    }
    train.train(tiny(**PROBING | changes | {'num_epochs': 3.0}), tmp_path)
    probed = [line for line in capsys.readouterr().out.splitlines() if 'probed batch sizes' in line]
    assert probed[0].startswith('epoch 0.64: ') and ' with 64' in probed[0]
    assert not any('nan' in line for line in probed)
