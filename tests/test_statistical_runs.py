"""Whole runs whose batch sizes are decided by statistics: records, replay, kills, one device."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from conftest import ROOT
from fault_child import POINTS
from runs import StopAt, of_kind, tiny, without_times

from adabatch_jax import policies, schedules, steps, train, train_state
from adabatch_jax.config import ConfigError, resolve
from adabatch_jax.experiment import describe

CONFIG = {
    'num_epochs': 4.0,
    'batch.policy': 'noise_scale',
    'batch.max_size': 32,
    'batch.noise_scale.scale': 1000.0,
    'batch.statistics.decision_epochs': 0.3,
    'batch.statistics.decay': 0.9,
}


@pytest.fixture(scope='module')
def decided(tmp_path_factory):
    directory = tmp_path_factory.mktemp('decided')
    return directory, train.train(tiny(**CONFIG), directory)


def test_decisions_are_stage_records_with_their_inputs_and_a_reason_in_words(decided):
    directory, _ = decided
    first, *later = of_kind(directory, 'stage')
    assert 'inputs' not in first and [s['batch_size'] for s in later] == [16, 32]
    for stage in later:
        inputs = stage['inputs']
        assert 'NoiseScale asks for' in stage['reason']
        if inputs['wanted'] is not None:
            ratio = inputs['variance'] / inputs['squared_gradient']
            assert inputs['wanted'] == pytest.approx(1000 * ratio)
    records = of_kind(directory, 'train')
    assert all(r['gradient_variance'] > 0 for r in records)


def test_updates_are_not_timed_while_steps_are_compiled(tmp_path, monkeypatch):
    config = tiny(**CONFIG | {'batch.policy': 'goodput', 'num_epochs': 2.0})
    monkeypatch.setattr(steps.StepCache, 'is_compiling', True)
    train.train(config, tmp_path)
    assert len(of_kind(tmp_path, 'stage')) == 1


def test_a_finished_run_replays_to_the_same_weights(decided, tmp_path):
    directory, summary = decided
    config = tiny(**CONFIG | {'batch.policy': 'replay', 'batch.replay': str(directory)})
    plan = train.plan(config)
    stages = of_kind(directory, 'stage')
    assert plan.planned and [s.batch_size for s in plan.stages] == [s['batch_size'] for s in stages]
    assert [s.start for s in plan.stages] == [s['examples_seen'] for s in stages]
    again = train.train(config, tmp_path)
    assert again['params_digest'] == summary['params_digest']
    assert not (tmp_path / 'schedule.json').exists()
    replayed = of_kind(tmp_path, 'stage')
    assert [s['microbatch_size'] for s in replayed] == [s['microbatch_size'] for s in stages]


@pytest.mark.parametrize(
    'changes',
    [
        {'batch.policy': 'goodput'},  # by times that no other run measures again
        {'batch.policy': 'norm_test'},
        {'batch.policy': 'plateau', 'batch.patience_epochs': 1, 'batch.min_improvement': 0.9},
    ],
    ids=lambda changes: changes['batch.policy'],
)
def test_a_run_that_was_stopped_and_continued_replays_to_the_same_weights(
    changes, tmp_path, monkeypatch
):
    monkeypatch.setattr(steps.StepCache, 'is_compiling', False)  # all updates are timed
    changes = CONFIG | {'batch.gradient_statistics': True} | changes  # the steps of `decided`
    with pytest.raises(train.Preempted):
        train.train(tiny(**changes), tmp_path / 'run', StopAt(8))
    summary = train.train(tiny(**changes), tmp_path / 'run')
    replay = {'batch.policy': 'replay', 'batch.replay': str(tmp_path / 'run')}
    again = train.train(tiny(**changes | replay), tmp_path / 'again')
    assert again['params_digest'] == summary['params_digest']
    assert len(of_kind(tmp_path / 'again', 'stage')) > 1


def test_a_schedule_tells_the_largest_microbatch_of_its_run(decided):
    schedule = json.loads((decided[0] / 'schedule.json').read_text())
    assert schedule['max_per_device'] == train.plan(tiny(**CONFIG)).largest_microbatch > 0


def test_a_schedule_that_is_none_or_of_other_data_is_a_mistake(decided, tmp_path):
    replay = {'batch.policy': 'replay', 'batch.replay': str(tmp_path)}
    with pytest.raises(ConfigError, match=r'config.batch.replay: got .*; accepted: the work directory'):
        train.plan(tiny(**replay))
    (tmp_path / 'schedule.json').write_text('{"stages": [{}]}')
    with pytest.raises(ConfigError, match='is not the schedule of a run'):
        train.plan(tiny(**replay))
    schedule = json.loads((decided[0] / 'schedule.json').read_text())
    for key, value in (('num_examples', '100'), ('max_per_device', 16.0), ('coupling', None)):
        (tmp_path / 'schedule.json').write_text(json.dumps(schedule | {key: value}))
        with pytest.raises(ConfigError, match='is not the schedule of a run: .*in place of'):
            train.plan(tiny(**replay))
    for key, value in (('examples_seen', 1.5), ('batch_size', 8.0), ('batch_size', '8')):
        stages = [schedule['stages'][0] | {key: value}]
        (tmp_path / 'schedule.json').write_text(json.dumps(schedule | {'stages': stages}))
        with pytest.raises(ConfigError, match='is not the schedule of a run: .*in place of int'):
            train.plan(tiny(**replay))
    for change, message in (
        ({'max_per_device': -3}, 'no negative numbers'),
        ({'statistics': 'all'}, "got statistics 'all'; accepted: .'', 'norms', 'inner_products'"),
    ):
        (tmp_path / 'schedule.json').write_text(json.dumps(schedule | change))
        with pytest.raises(ConfigError, match=message):
            train.plan(tiny(**replay))
    other = {'batch.policy': 'replay', 'batch.replay': str(decided[0]), 'dataset.num_examples': 99}
    with pytest.raises(ConfigError, match='had 100 training examples, this one has 99'):
        train.plan(tiny(**other))


@pytest.mark.parametrize('policy', ['noise_scale', 'adascale'])
def test_a_run_stopped_anywhere_decides_as_one_that_was_not(policy, tmp_path):
    changes = CONFIG | {'batch.policy': policy, 'learning_rate.reference_batch_size': 4}
    ends = [train.train(tiny(**changes), tmp_path / 'whole')]
    for n in (2, 9, 7):  # updates until the next stop
        with pytest.raises(train.Preempted):
            train.train(tiny(**changes), tmp_path / 'stopped', StopAt(n))
    ends.append(train.train(tiny(**changes), tmp_path / 'stopped'))
    assert ends[0]['params_digest'] == ends[1]['params_digest']
    whole, stopped = (
        [s for s in without_times(of_kind(tmp_path / name, 'stage')) if 'continued' not in s['reason']]
        for name in ('whole', 'stopped')
    )
    assert whole == stopped


KILLED_AT = (
    'an update is on the devices',
    'an update was seen',
    'a stage is about to begin',
    'a stage has begun',
    'a checkpoint is committed',
    'a checkpoint is being written',
)


def command(directory, *start):
    overrides = ['--config.batch.policy=noise_scale', '--config.batch.max_size=32']
    overrides += [
        '--config.batch.noise_scale.scale=1000',
        '--config.batch.statistics.decision_epochs=0.3',
    ]
    config = f'--config={ROOT / "tests/small_run.py"}'
    return [sys.executable, *start, config, f'--workdir={directory}', *overrides]


def run(arguments, devices=2):
    environment = os.environ | {'JAX_NUM_CPU_DEVICES': str(devices), 'PYTHONPATH': str(ROOT)}
    return subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, timeout=300)


def test_a_run_killed_again_and_again_makes_the_same_decisions(tmp_path):
    whole, killed = tmp_path / 'whole', tmp_path / 'killed'
    assert run(command(whole, '-m', 'adabatch_jax.main')).returncode == 0
    points = random.Random(0).sample(KILLED_AT, 4)
    assert set(points) <= set(POINTS)
    for n, point in enumerate(points, 2):
        result = run(command(killed, 'tests/fault_child.py', 'SIGKILL', point, str(n)))
        assert result.returncode in (0, -signal.SIGKILL)
    assert run(command(killed, '-m', 'adabatch_jax.main')).returncode == 0
    ends = [of_kind(directory, 'summary')[-1]['params_digest'] for directory in (whole, killed)]
    assert ends[0] == ends[1]
    schedules = [json.loads((d / 'schedule.json').read_text()) for d in (whole, killed)]
    assert schedules[0] == schedules[1] and len(schedules[0]['stages']) > 1


def test_with_one_group_the_step_splits_the_batch_in_two(tmp_path):
    code = (
        'from runs import tiny; from adabatch_jax import train; '
        'changes = {"batch.policy": "noise_scale", "batch.base_size": 8, "batch.max_size": 16}; '
        'print([train.plan(tiny(**changes)).split(n) for n in (8, 16)], '
        'train.plan(tiny()).split(8))'
    )
    environment = os.environ | {'JAX_NUM_CPU_DEVICES': '1', 'PYTHONPATH': str(ROOT / 'tests')}
    result = subprocess.run(
        [sys.executable, '-c', code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert result.stdout.strip() == '[(4, 2), (8, 2)] (8, 1)', result.stderr


def test_as_many_groups_make_the_same_decisions_on_any_devices(tmp_path):
    for devices in (1, 4):
        arguments = command(tmp_path / f'{devices}', '-m', 'adabatch_jax.main')
        assert run([*arguments, '--config.batch.statistics.min_groups=4'], devices).returncode == 0
    one, four = (
        [(s['step'], s['batch_size'], s['num_microbatches']) for s in of_kind(tmp_path / name, 'stage')]
        for name in ('1', '4')
    )
    assert len(four) > 1 and {split for _, _, split in four} == {1}
    assert one == [(step, batch_size, 4) for step, batch_size, _ in four]
    ours, theirs = (train_state.restore(tmp_path / name).params for name in ('1', '4'))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6)


def test_any_policy_can_have_its_run_measured(tmp_path):
    config = tiny(**{'batch.gradient_statistics': True, 'num_epochs': 0.5})
    train.train(config, tmp_path)
    for record in of_kind(tmp_path, 'train'):
        assert record['gradient_variance'] > 0 and 'squared_gradient' in record


@dataclasses.dataclass(frozen=True)
class Frozen(policies.Policy):
    transitions: tuple = (schedules.Transition(0, 8, ''),)
    ladder: tuple = (8,)
    planned: bool = True
    note: str = 'Always 8.'


def test_a_policy_that_several_runs_share_is_left_as_it_is(monkeypatch):
    shared = Frozen()
    mine = types.SimpleNamespace(create=lambda *_: shared, COUPLING='none')
    monkeypatch.setitem(policies.POLICIES, 'mine', mine)
    measured = tiny(**{'batch.policy': 'mine', 'batch.gradient_statistics': True})
    for _ in range(2):
        experiment = describe(resolve(measured))
        assert (experiment.statistics, experiment.note) == ('norms', 'Always 8.')
    measured.learning_rate.rule, measured.batch.gradient_statistics = 'armijo', False
    experiment = describe(resolve(measured))
    assert experiment.statistics == '' and experiment.note.startswith('Always 8. Learning rates are')
    assert shared == Frozen()


@pytest.mark.parametrize('decision', [None, 8, policies.Decision(12, '')])
def test_what_a_policy_decides_has_to_be_a_decision_for_its_ladder(tmp_path, monkeypatch, decision):
    decides = type('Decides', (Frozen,), {'decide': lambda *_: decision})
    mine = types.SimpleNamespace(create=lambda *_: decides(), COUPLING='none')
    monkeypatch.setitem(policies.POLICIES, 'mine', mine)
    with pytest.raises(ConfigError, match=r"batch.policy: got 'mine', .* one of the batch sizes 8$"):
        train.train(tiny(**{'batch.policy': 'mine'}), tmp_path)


def test_a_batch_that_shrinks_unannounced_ends_a_run(tmp_path, monkeypatch):
    sizes = {'decide': lambda self, _, seen: policies.Decision(8 if seen < 16 else 4, '')}
    decides = type('Decides', (Frozen,), sizes)
    mine = types.SimpleNamespace(
        create=lambda *_: decides(ladder=(4, 8), planned=False), COUPLING='none'
    )
    monkeypatch.setitem(policies.POLICIES, 'mine', mine)
    with pytest.raises(
        ConfigError, match=r'batch size 4 after 16 examples; accepted: 8 or more, or may'
    ):
        train.train(tiny(**{'batch.policy': 'mine'}), tmp_path)


def test_adascale_trains_with_rates_between_those_of_the_two_batch_sizes(tmp_path):
    changes = {
        'batch.policy': 'adascale',
        'batch.base_size': 16,
        'learning_rate.reference_batch_size': 4,
    }
    config = tiny(**changes, **{'learning_rate.schedule': 'constant', 'num_epochs': 1.0})
    train.train(config, tmp_path)
    rates = [r['learning_rate'] for r in of_kind(tmp_path, 'train')]
    assert all(0.02 < rate <= 0.08 for rate in rates)
