"""Going on after running out of memory, with smaller microbatches."""

import dataclasses
import gc
import json
import weakref

import jax
import pytest
from test_memory import make_config

from adabatch_jax import experiment, memory, metrics, steps, train
from adabatch_jax.config import ConfigError, resolve
from adabatch_jax.experiment import describe
from adabatch_jax.policies import critical_batch


class Failing:
    """A cache of steps that run out of memory above a microbatch, when they run or are compiled."""

    def __init__(self, monkeypatch, largest, message='RESOURCE_EXHAUSTED: Out of memory', when='get'):
        real, self.failures = getattr(steps.CACHE, when), 0

        def get(spec):
            step = real(spec)
            share = spec.batch_size // jax.device_count()
            if not spec.train or share // spec.num_microbatches <= largest:
                return step
            if when == '_compile_step':
                raise jax.errors.JaxRuntimeError(message)

            def run(state, *_):
                jax.tree.map(lambda x: x.delete(), state)  # as donated buffers may be
                self.failures += 1
                raise jax.errors.JaxRuntimeError(message)

            return dataclasses.replace(step, executable=run)

        monkeypatch.setattr(steps.CACHE, when, get)


def test_a_run_that_runs_out_of_memory_goes_on_with_half_the_microbatch(tmp_path, monkeypatch, capsys):
    expected = train.train(make_config(**{'batch.max_per_device': 4}), tmp_path / 'expected')
    cache = Failing(monkeypatch, largest=4)
    summary = train.train(make_config(), tmp_path / 'run')
    assert cache.failures == 1
    assert summary['params_digest'] == expected['params_digest']
    assert 'out of memory; microbatches of at most 4 examples' in capsys.readouterr().out
    entered = [r for r in metrics.read_records(tmp_path / 'run') if r['kind'] == 'stage']
    assert [r['microbatch_size'] for r in entered] == [4, 4, 4]  # a reader takes the last of a step
    plan = json.loads((tmp_path / 'run' / 'plan.json').read_text())
    assert [stage['microbatch_size'] for stage in plan['stages']] == [4, 4, 4]


@pytest.mark.parametrize('when', ['get', '_compile_step'])
def test_the_attempt_that_ran_out_of_memory_is_gone_before_the_next_begins(tmp_path, monkeypatch, when):
    monkeypatch.setattr(steps.CACHE, '_futures', {})
    Failing(monkeypatch, largest=4, when=when)
    runs, alive = [], []
    open_pipeline = experiment.Experiment.open_pipeline

    def noting(self):
        alive.append([run() for run in runs if run() is not None])
        return open_pipeline(self)

    class Noted(train.Run):
        def __init__(self, *args):
            super().__init__(*args)
            runs.append(weakref.ref(self))

    monkeypatch.setattr(train, 'Run', Noted)
    monkeypatch.setattr(experiment.Experiment, 'open_pipeline', noting)
    gc.disable()  # memory has to be there at once
    try:
        train.train(make_config(**{'batch.max_per_device': 16}), tmp_path)
    finally:
        gc.enable()
    assert alive == [[], []]


def test_an_evaluation_that_runs_out_of_memory_names_its_batch_size(tmp_path, monkeypatch):
    real = steps.CACHE.get

    def get(spec):
        def run(*_):
            raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory')

        return real(spec) if spec.train else run

    with monkeypatch.context() as patch:
        patch.setattr(steps.CACHE, 'get', get)
        with pytest.raises(ConfigError, match='dataset.eval_batch_size: got 32, and the device ran out'):
            train.train(make_config(), tmp_path)
    summary = train.train(make_config(**{'dataset.eval_batch_size': 8}), tmp_path)
    assert summary['updates'] == 8 + 4 + 2


def test_a_probe_before_the_first_update_may_run_out_of_memory_as_an_update_may(tmp_path, monkeypatch):
    cache = Failing(monkeypatch, largest=8)  # a probe's 32, not what the run trains with
    probes = {'batch.policy': 'critical_batch', 'batch.base_size': 16, 'batch.max_size': 32}
    probes |= {'batch.critical_batch.probe_epochs': 1.0, 'batch.critical_batch.every_epochs': 9.0}
    policy = critical_batch.CriticalBatch
    monkeypatch.setattr(policy, 'probes', lambda self, _, seen: () if seen else self.ladder)
    monkeypatch.setattr(policy, 'probed', lambda self, state, *_: state)
    train.train(make_config(**probes), tmp_path)
    assert cache.failures == 1
    told = [r['reason'] for r in metrics.read_records(tmp_path) if r['kind'] == 'session']
    assert told == ['update 1: out of memory; microbatches of at most 8 examples']


def test_a_smaller_microbatch_is_told_from_batches_that_these_devices_can_split():
    """Others may have trained the 7."""
    described, error = describe(resolve(make_config())), RuntimeError('RESOURCE_EXHAUSTED')
    assert memory.smaller_microbatch(error, described, {7, 16}) == 4


def test_other_failures_of_a_step_are_not_hidden(tmp_path, monkeypatch):
    Failing(monkeypatch, largest=4, message='INTERNAL: something else')
    with pytest.raises(jax.errors.JaxRuntimeError, match='something else'):
        train.train(make_config(), tmp_path)


def test_running_out_of_memory_with_the_smallest_microbatch_is_loud(tmp_path, monkeypatch):
    cache = Failing(monkeypatch, largest=0)
    with pytest.raises(jax.errors.JaxRuntimeError, match='RESOURCE_EXHAUSTED'):
        train.train(make_config(), tmp_path)
    assert cache.failures == 3  # microbatches of 4, 2 and 1


PROBING = {
    'num_epochs': 2.0,
    'batch.policy': 'critical_batch',
    'batch.max_size': 32,
    'batch.critical_batch.every_epochs': 0.5,
    'batch.critical_batch.probe_epochs': 1.0,
}


def test_a_probe_that_runs_out_of_memory_halves_the_microbatch_of_the_probe(tmp_path, monkeypatch):
    """The run itself has batches of 8, whose microbatch of 4 stays."""
    cache = Failing(monkeypatch, largest=8)
    train.train(make_config(**PROBING), tmp_path)
    assert cache.failures == 1
    records = metrics.read_records(tmp_path)
    told = [r['reason'] for r in records if r['kind'] == 'session']
    assert 'microbatches of at most 8 examples' in told[-1]
    assert [r['microbatch_size'] for r in records if r['kind'] == 'stage'][0] == 4


class Late:
    """What an update gives that ran out of memory, as JAX tells when it is read."""

    def is_ready(self):
        return True

    def __array__(self, *_, **__):
        raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory')


def test_the_last_batch_of_a_stage_may_be_the_one_that_ran_out_of_memory(tmp_path, monkeypatch):
    """It is seen to have failed when the smaller batch of the next stage is to come."""
    real, calls = steps.CACHE.get, []

    def get(spec):
        step = real(spec)

        def run(state, *arguments):
            state, sums = step(state, *arguments)
            calls.append(spec.batch_size)
            return state, {name: Late() for name in sums} if calls == [32, 32] else sums

        return dataclasses.replace(step, executable=run) if spec.train else step

    monkeypatch.setattr(steps.CACHE, 'get', get)
    shrinks = {'batch.policy': 'stages', 'batch.stages': ((0, 32), (1, 8)), 'num_epochs': 2.0}
    train.train(make_config(**shrinks), tmp_path)
    told = [r['reason'] for r in metrics.read_records(tmp_path) if r['kind'] == 'session']
    assert 'microbatches of at most 8 examples' in told[-1]
