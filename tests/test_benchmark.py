"""The benchmark: what it writes, its arithmetic, and mistakes."""

import json
import math
import pathlib
import signal
import time
import types

import jax
import jax.numpy as jnp
import pytest
from runs import tiny

from adabatch_jax import benchmark, metrics, run, terminal, timing, train

CONFIG = pathlib.Path(__file__).parent / 'small_run.py'


def measured(batch_size, forward, gradient, step):
    return benchmark.Measured(
        batch_size, batch_size, 1, 1, 2.0, 0.5, True, 0, forward, gradient, step, batch_size / step
    )


def test_relative_epochs_are_seconds_an_image_over_those_of_the_first_batch_size():
    rows = benchmark.relative_epochs([measured(10, 1.0, 3.0, 4.0), measured(40, 2.0, 4.0, 6.0)])
    # An image takes 0.1 + 0.2 s with the first, and 0.05 + 0.05 s with the second.
    assert rows[0] == {'batch_size': 10, 'forward': 1.0, 'backward': 1.0, 'both': 1.0}
    expected = {'batch_size': 40, 'forward': 2.0, 'backward': 4.0, 'both': 3.0}
    assert rows[1] == pytest.approx(expected)


def test_a_backward_pass_that_is_lost_in_the_noise_has_no_ratio():
    rows = benchmark.relative_epochs([measured(10, 1.0, 3.0, 4.0), measured(40, 2.0, 1.9, 6.0)])
    assert rows[1]['backward'] is None and rows[1]['forward'] == 2.0
    terminal.print_benchmark([measured(10, 1.0, 3.0, 4.0)], rows, {'speedup': None})


def test_predicted_seconds_are_those_of_all_updates_of_the_plan():
    plan = train.plan(tiny())  # 13, 6 and 4 updates with 8, 16 and 32
    assert [stage.num_updates for stage in plan.stages] == [13, 6, 4]
    of = [measured(8, 1, 2, 3.0), measured(16, 1, 2, 5.0), measured(32, 1, 2, 7.0)]
    assert benchmark.predicted_seconds(plan, of) == 13 * 3 + 6 * 5 + 4 * 7
    assert benchmark.predicted_seconds(plan, of[:2]) is None


def test_the_control_of_a_prediction_has_the_first_batch_size_throughout():
    config = tiny()
    of = [measured(8, 1, 2, 3.0), measured(16, 1, 2, 5.0), measured(32, 1, 2, 7.0)]
    experiment = train.fitted(config)
    found = benchmark.prediction(experiment, benchmark.control(config, experiment), of)
    assert found['fixed'] == 38 * 3  # 300 examples
    assert found['speedup'] == found['fixed'] / found['adaptive']
    config.batch.policy = 'noise_scale'
    experiment = train.fitted(config)
    control = benchmark.control(config, experiment)
    assert benchmark.prediction(experiment, control, of)['adaptive'] is None


@pytest.mark.parametrize(
    'changes, is_own',
    [
        ({}, False),
        ({'compile.updates_per_dispatch': 2}, False),
        ({'batch.gradient_statistics': True}, False),  # of the control too
        ({'batch.policy': 'noise_scale'}, True),
        ({'batch.policy': 'adascale'}, True),
        ({'batch.policy': 'plateau'}, False),
        ({'batch.policy': 'plateau', 'compile.updates_per_dispatch': 2}, True),
    ],
)
def test_a_control_is_measured_by_itself_where_its_updates_are_made_in_another_way(changes, is_own):
    config = tiny(**{'dataset.pipeline': 'device', 'batch.statistics.min_groups': 4} | changes)
    experiment = train.fitted(config)
    control = benchmark.control(config, experiment)
    assert benchmark.has_own_step(control, experiment) == is_own
    assert control.policy.planned and not control.policy.observes and control.plan.ladder == (8,)


def test_a_control_is_predicted_from_the_step_of_policy_fixed(tmp_path, capsys):
    file = tmp_path / 'result.json'
    measures = ['--config.batch.policy=noise_scale', '--config.batch.max_size=16']
    measures += ['--config.batch.statistics.min_groups=4', '--repeats=1', f'--json={file}']
    assert benchmark.main(['benchmark', f'--config={CONFIG}', *measures]) == 0
    result = json.loads(file.read_text())
    (first, _), own = result['batch_sizes'], result['fixed']
    assert (first['microbatch_size'], first['num_microbatches']) == (2, 2)
    assert (own['batch_size'], own['microbatch_size'], own['num_microbatches']) == (8, 4, 1)
    assert result['predicted_seconds']['fixed'] == pytest.approx(2 * 128 // 8 * own['step_seconds'])
    assert 'fixed: with a step of its own' in capsys.readouterr().out


def test_measured_seconds_are_those_of_an_update(monkeypatch):
    """Where every call takes one: a pass has a part of the batch, the step makes several updates."""
    monkeypatch.setattr(timing, 'enough_calls', lambda call: 1)
    monkeypatch.setattr(timing, 'seconds_of_a_call', lambda call, calls: 1.0)
    bench = object.__new__(timing.Bench)
    bench.batch_size, bench.num_updates, bench.num_parts, bench.split = 12, 4, 3, (2, 6)
    bench.seconds, bench.calls = {}, {}
    bench.cold = types.SimpleNamespace(compile_seconds=5.0)
    bench.step = types.SimpleNamespace(compile_seconds=0.5, cache_hit=True, memory_bytes=9)
    bench.measure(None, real=True)
    assert bench.finish() == timing.Measured(
        batch_size=12,
        microbatch_size=2,
        num_microbatches=6,
        updates_per_dispatch=4,
        compile_seconds=5.0,
        cached_compile_seconds=0.5,
        cache_hit=True,
        memory_bytes=9,
        forward_seconds=3.0,
        gradient_seconds=3.0,
        step_seconds=0.25,
        images_per_second=48.0,
        input_images_per_second=48.0,
    )


def test_the_seconds_of_a_call_are_the_mean_of_those_that_were_made(monkeypatch):
    monkeypatch.setattr(timing, 'time', types.SimpleNamespace(perf_counter=iter([1.0, 7.0]).__next__))
    assert timing.seconds_of_a_call(lambda: jnp.zeros(()), 3) == 2.0


def test_each_device_adds_up_an_array_of_the_bytes_that_are_asked_for(monkeypatch):
    def bytes_of_a_device(call, calls):
        return call().nbytes / jax.device_count()

    monkeypatch.setattr(timing, 'enough_calls', lambda call: 1)
    monkeypatch.setattr(timing, 'seconds_of_a_call', bytes_of_a_device)
    assert timing.all_reduce_seconds([64, 256], 1) == {64: 64, 256: 256}


def test_shares_of_the_wall_time_add_up():
    summary = {'wall_seconds': 10.0, 'train_seconds': 7.0, 'input_seconds': 0.5, 'log_seconds': 0.25}
    found = benchmark.shares(summary | {'stall_seconds': 1.0, 'evaluation_seconds': 0.5})
    assert found['steps'] == 0.625 and found['stall'] == 0.1 and found['checkpoint'] == 0
    assert sum(found.values()) == pytest.approx(1)


def test_all_the_time_that_records_take_is_taken_from_the_updates(tmp_path, monkeypatch):
    """Also of those that are written in a pause, so that what is left for the steps is theirs."""
    write = run.Run.record

    def slow(self, kind, *args, **fields):
        if kind == 'train':
            time.sleep(0.1)
        return write(self, kind, *args, **fields)

    monkeypatch.setattr(run.Run, 'record', slow)
    config = tiny(num_epochs=1.5, checkpoint_every_epochs=0.08, log_every_steps=1)
    summary = train.train(config, tmp_path)  # every update is logged in a pause
    assert summary['log_seconds'] > 0.1 * (summary['updates'] - 1)
    assert benchmark.shares(summary)['steps'] > 0


@pytest.mark.parametrize(
    'arguments',
    [
        ['--batch_sizes=8,32'],
        ['--input=real'],
        ['--config.dataset.pipeline=device', '--config.compile.updates_per_dispatch=2', '--input=real'],
        ['--config.dataset.pipeline=device', '--config.compile.updates_per_dispatch=2'],
        ['--config.batch.max_per_device=2'],
    ],
    ids=' '.join,
)
def test_results_are_whole_and_consistent(arguments, tmp_path, capsys):
    file = tmp_path / 'result.json'
    host = '--config.dataset.pipeline=tf_data'  # unless the arguments say otherwise
    command = ['benchmark', f'--config={CONFIG}', f'--json={file}', '--repeats=1', host, *arguments]
    assert benchmark.main(command) == 0
    result = json.loads(file.read_text())
    sizes = [8, 32] if '8,32' in arguments[0] else [8, 16]
    assert [m['batch_size'] for m in result['batch_sizes']] == sizes
    for m in result['batch_sizes']:
        assert m['images_per_second'] == pytest.approx(m['batch_size'] / m['step_seconds'])
        assert all(m[f'{part}_seconds'] > 0 for part in ('forward', 'gradient', 'step', 'compile'))
        assert m['microbatch_size'] * m['num_microbatches'] * 2 == m['batch_size']
        assert ('--input=real' in arguments) == (m['input_images_per_second'] is not None)
    assert (result['predicted_seconds']['adaptive'] is None) == (sizes == [8, 32])
    shown = capsys.readouterr().out
    assert 'images/s' in shown and 'Time of an epoch' in shown


def test_a_batch_that_comes_in_parts_is_timed_as_a_whole(tmp_path, monkeypatch):
    from adabatch_jax import experiment

    monkeypatch.setattr(experiment, 'PART_BYTES', 2 * 8 * 8 * 3)
    file = tmp_path / 'result.json'
    command = ['benchmark', f'--config={CONFIG}', f'--json={file}', '--repeats=1', '--batch_sizes=16']
    for source in ('synthetic', 'real'):
        chosen = [f'--input={source}', '--config.batch.max_per_device=2']
        chosen.append('--config.dataset.pipeline=tf_data')
        assert benchmark.main([*command, *chosen]) == 0
        (m,) = json.loads(file.read_text())['batch_sizes']
        assert m['num_microbatches'] == 4 and math.isfinite(m['step_seconds'])


def test_a_run_tells_where_its_time_went(tmp_path, capsys):
    file = tmp_path / 'result.json'
    assert benchmark.main(['benchmark', f'--config={CONFIG}', '--run', f'--json={file}']) == 0
    result = json.loads(file.read_text())
    assert sum(result['shares'].values()) == pytest.approx(1, abs=0.02)
    assert result['shares']['steps'] > 0 and result['shares']['evaluation'] > 0
    assert [stage['batch_size'] for stage in result['stages']] == [8, 16]
    assert 'Wall time' in capsys.readouterr().out


def test_a_run_that_could_not_be_saved_is_told_in_a_line(monkeypatch, capsys):
    def full(config, directory, stop):
        raise train.SaveFailed('no room for the checkpoint')

    monkeypatch.setattr(train, 'train', full)
    assert benchmark.main(['benchmark', f'--config={CONFIG}', '--run']) == 2
    told = 'error: --run: no room for the checkpoint; make room, or set TMPDIR\n'
    assert capsys.readouterr().err == told


def test_sigterm_ends_a_benchmark_and_leaves_nothing_behind(tmp_path, monkeypatch, capsys):
    def stopped(config, directory, stop):
        signal.raise_signal(signal.SIGTERM)
        assert stop.is_set() and list(tmp_path.iterdir())
        raise train.Preempted('stopped')

    monkeypatch.setattr(benchmark.tempfile, 'tempdir', str(tmp_path))
    monkeypatch.setattr(train, 'train', stopped)
    assert benchmark.main(['benchmark', f'--config={CONFIG}', '--run']) == 143
    assert capsys.readouterr().err == 'stopped: of a benchmark nothing is kept\n'
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    'arguments, message',
    [
        ([], '--config: missing'),
        ([f'--config={CONFIG}', '--batch_sizes=8,x'], "--batch_sizes: got 'x'"),
        ([f'--config={CONFIG}', '--batch_sizes=3'], "--batch_sizes: got '3'"),
        ([f'--config={CONFIG}', '--json=nowhere/x.json'], "--json: got 'nowhere/x.json'"),
        ([f'--config={CONFIG}', '--json=/proc/x.json'], '/proc/x.json'),
        ([f'--config={CONFIG}', '--scaling', '--plot=/proc/x.png'], '/proc/x.png'),
        ([f'--config={CONFIG}', '--input=none'], 'input'),
        ([f'--config={CONFIG}', '--repeats=0'], 'repeats'),
        ([f'--config={CONFIG}', '--run', '--batch_sizes=8'], '--batch_sizes: got --run as well'),
        ([f'--config={CONFIG}', '--run', '--scaling'], '--scaling: got --run as well'),
        ([f'--config={CONFIG}', '--scaling', '--latency_us=inf'], '--latency_us: got inf; accepted'),
        ([f'--config={CONFIG}', '--scaling', '--gigabytes_per_second=nan'], 'got nan; accepted'),
        ([f'--config={CONFIG}', '--config.model.nam=x'], 'config.model.nam: unknown key'),
    ],
)
def test_a_mistake_is_one_line_and_exit_status_2(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(timing, 'measure', None)  # found before anything is measured
    assert benchmark.main(['benchmark', *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith('error: ') and message in error and len(error.splitlines()) == 1


def test_a_file_that_can_be_written_is_left_as_it_is_until_there_are_results(tmp_path):
    (tmp_path / 'old').write_text('kept')
    for name in ('old', 'new'):
        benchmark.check_can_be_written(tmp_path / name)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [('old', 'kept')]


def test_the_final_summary_counts_what_kept_the_devices_waiting(tmp_path):
    train.train(tiny(num_epochs=1.0), tmp_path)
    summary = metrics.read_records(tmp_path)[-1]
    assert {
        'stall_seconds',
        'input_seconds',
        'evaluation_seconds',
        'checkpoint_seconds',
    } <= summary.keys()
