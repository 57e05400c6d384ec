"""What must not happen while a run trains, counted: compiles, dispatches, transfers, late beginnings."""

import concurrent.futures
import itertools
import json
import threading
import types

import jax
import numpy as np
import pytest
from runs import StopAt, of_kind, tiny

from adabatch_jax import (
    compilation_cache,
    distributed,
    experiment,
    memory,
    run,
    steps,
    stream,
    terminal,
    train,
)
from adabatch_jax.config import resolve
from adabatch_jax.steps import compiled

DEVICE = {'dataset.pipeline': 'device'}
SEVERAL = DEVICE | {'compile.updates_per_dispatch': 4}


@pytest.fixture
def guarded(monkeypatch):
    """The loop of a run, in which every transfer has to be asked for."""
    original = train.loop

    def loop(*args):
        with jax.transfer_guard('disallow'):
            return original(*args)

    monkeypatch.setattr(train, 'loop', loop)


@pytest.mark.parametrize('changes', [{}, DEVICE, SEVERAL], ids=['tf_data', 'device', 'several'])
def test_the_loop_makes_no_transfer_that_it_does_not_ask_for(guarded, tmp_path, changes):
    train.train(tiny(**changes), tmp_path)


def test_the_guard_sees_a_number_that_is_passed_to_a_step(guarded, tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, 'put_everywhere', lambda scalars: scalars)
    with pytest.raises(Exception, match='Disallowed host-to-device transfer'):
        train.train(tiny(), tmp_path)


@pytest.mark.parametrize(
    'changes, dispatches', [({}, 23), (DEVICE, 23), (SEVERAL, 8)], ids=['tf_data', 'device', 'several']
)
def test_a_dispatch_fetches_once_however_many_updates_it_makes(
    tmp_path, monkeypatch, changes, dispatches
):
    """13, 6 and 4 updates; fours of them are 3 + 1 + 1, and what is left goes one by one."""
    dispatched, fetched = [], []
    dispatch, device_get = run.Run.dispatch, jax.device_get

    def noting_dispatch(self):
        dispatched.append(self.step)
        return dispatch(self)

    def noting_get(tree):
        if isinstance(tree, dict) and 'loss' in tree:
            fetched.append(tree)
        return device_get(tree)

    monkeypatch.setattr(run.Run, 'dispatch', noting_dispatch)
    monkeypatch.setattr(jax, 'device_get', noting_get)
    monkeypatch.setattr(run, 'evaluate', lambda *_: {'loss': 1.0, 'accuracy': 0.5})
    far = {'eval_every_epochs': 100.0, 'checkpoint_every_epochs': 100.0}
    train.train(tiny(**changes | far), tmp_path)
    assert len(dispatched) == len(fetched) == dispatches


def test_a_run_compiles_for_its_next_update_while_its_data_are_read(tmp_path, monkeypatch):
    begun, parts = [], experiment.Experiment
    open_pipeline = parts.open_pipeline
    monkeypatch.setattr(memory, 'begin_compiling', lambda _, first: begun.append(first))
    monkeypatch.setattr(parts, 'open_pipeline', lambda self: begun.append('data') or open_pipeline(self))
    with pytest.raises(train.Preempted):
        train.train(tiny(), tmp_path, StopAt(14))  # 13 updates with 8 examples, and some with 16
    train.train(tiny(), tmp_path)
    train.train(tiny(), tmp_path)  # nothing is left
    train.train(tiny(num_epochs=4.0), tmp_path, allow_schedule_change=True)  # it is yet to be decided
    assert begun == [8, 'data', 16, 'data', 'data', 'data']


def test_each_step_of_a_plan_is_compiled_once_and_never_by_the_loop(tmp_path, monkeypatch):
    steps.CACHE.clear()
    threads = []
    original = steps.CACHE._compile_step

    def compile_step(spec):
        threads.append(run.steps.compiled.threading.current_thread().name)
        return original(spec)

    monkeypatch.setattr(steps.CACHE, '_compile_step', compile_step)
    train.train(tiny(**SEVERAL), tmp_path)
    # 8 for one update and for four, 16 and 32, of which no four come between two pauses, and evaluation.
    assert len(threads) == 5
    assert all(name.startswith('compile') for name in threads)


@pytest.mark.parametrize('changes', [{}, DEVICE], ids=['tf_data', 'device'])
def test_every_planned_stage_is_opened_before_it_begins(tmp_path, monkeypatch, changes):
    taken = []
    original = stream.Streams.take

    def take(self, update):
        taken.append(self._ahead is not None and self._ahead[0] == update)
        return original(self, update)

    monkeypatch.setattr(stream.Streams, 'take', take)
    train.train(tiny(**changes), tmp_path)
    assert taken == [False, True, True]


def test_a_stage_that_could_not_be_opened_ahead_says_why_where_it_is_needed():
    calls = []

    def failing(update):
        calls.append(update)
        raise ValueError('no such data')

    streams = stream.Streams(failing)
    streams.prepare('next')
    with pytest.raises(ValueError, match='no such data'):
        streams.take('next')
    streams.prepare('planned')
    with pytest.raises(ValueError, match='no such data'):
        streams.take('decided otherwise')
    streams.close()
    assert calls.count('decided otherwise') == 1


def test_a_second_run_of_a_config_compiles_nothing(command_line, tmp_path, monkeypatch):
    """In a process of its own each, on machines where the persistent cache works."""
    config = tiny(**DEVICE)
    (tmp_path / 'config.json').write_text(json.dumps(config.to_dict()))
    code = (
        'import json, sys\n'
        'from adabatch_jax import train\n'
        'from adabatch_jax.config import from_json\n'
        'config = from_json(open(sys.argv[1]).read())\n'
        'print(json.dumps(train.train(config, sys.argv[2])))\n'
    )
    monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', str(tmp_path / 'cache'))
    results = [
        command_line('-c', code, tmp_path / 'config.json', tmp_path / name, module=None)
        for name in ('first', 'second')
    ]
    assert all(result.returncode == 0 for result in results), results[0].stderr
    first, second = (json.loads(result.stdout.splitlines()[-1]) for result in results)
    assert first['cache_misses'] > 0 and not any(
        r['cache_hit'] for r in of_kind(tmp_path / 'first', 'stage')
    )
    if not second['cache_hits']:
        pytest.skip('this CPU rejects reloaded executables')
    assert second['cache_misses'] == 0
    assert all(r['cache_hit'] for r in of_kind(tmp_path / 'second', 'stage'))


def test_time_counts_only_where_the_devices_had_nothing_to_do(tmp_path):
    """What the host does beside a step that still runs costs nothing."""

    class Working:
        def __init__(self, ready):
            self.ready = ready

        def is_ready(self):
            return self.ready

    host = run.HostState({}, {})
    counted = object.__new__(run.Run)
    counted.host = host
    for flight, expected in ((Working(False), False), (Working(True), True), (None, True)):
        host.seconds['log'] = 0.0
        counted.in_flight = flight
        with counted.timed('log'):
            np.ones(1000).sum()
        assert (host.seconds['log'] > 0) == expected


def test_hits_and_misses_are_counted_over_all_threads():
    """Of a cache that is empty at first, on machines where it works."""
    parts = experiment.describe(resolve(tiny(**DEVICE)))
    before = compilation_cache.totals()
    with compilation_cache.empty(), concurrent.futures.ThreadPoolExecutor(1) as pool:
        first, second = (pool.submit(steps.compile_step, parts.eval_spec).result() for _ in range(2))
    hits, misses = (b - a for a, b in zip(before, compilation_cache.totals(), strict=True))
    assert not first.cache_hit and misses > 0
    assert second.cache_hit == (hits > 0)


def test_a_step_of_which_anything_had_to_be_compiled_is_no_hit(monkeypatch):
    """Two hits of its parts with a miss, two hits without, and none where nothing was looked for."""
    counts = iter([(0, 0), (2, 1), (2, 1), (4, 1), (4, 1), (4, 1)])
    monkeypatch.setattr(compilation_cache, 'counts', counts.__next__)
    executable = types.SimpleNamespace(memory_analysis=lambda: None)
    monkeypatch.setattr(compiled, '_compile_spec', lambda spec: executable)
    assert [steps.compile_step(None).cache_hit for _ in range(3)] == [False, True, False]


def test_a_step_that_is_being_compiled_is_kept_however_many_wait_for_their_turn():
    go_on = threading.Event()
    cache = steps.StepCache(lambda spec: go_on.wait(60))
    first, *_ = (cache.precompile(number) for number in range(compiled.MOST_STEPS + 1))
    again = cache.precompile(0)
    go_on.set()
    assert again is first and cache.num_compiles == compiled.MOST_STEPS + 1


def test_without_a_persistent_cache_nothing_is_said_to_come_from_it(tmp_path, monkeypatch, capsys):
    cache = jax.config.jax_compilation_cache_dir
    monkeypatch.delenv('JAX_COMPILATION_CACHE_DIR')
    try:
        summary = train.train(tiny(**{'num_epochs': 0.5, 'compile.cache_dir': ''}), tmp_path)
    finally:
        jax.config.update('jax_compilation_cache_dir', cache)
    assert not {'cache_hits', 'cache_misses'} & summary.keys()
    terminal.print_stages([], summary)
    assert 'no persistent cache of compiled code' in capsys.readouterr().out


def test_the_time_that_devices_wait_for_parts_of_a_batch_is_counted_as_input(tmp_path, monkeypatch):
    """By a clock that moves ten seconds with each part: 4, 8 and 16 examples a device come by twos."""
    seconds = 0.0
    islice = itertools.islice

    def slow(parts, count):
        def wait():
            nonlocal seconds
            for part in islice(parts, count):
                jax.block_until_ready(jax.live_arrays())
                seconds += 10.0
                yield part

        return wait()

    monkeypatch.setattr(experiment, 'PART_BYTES', 2 * 8 * 8 * 3)
    monkeypatch.setattr(stream, 'itertools', types.SimpleNamespace(islice=slow, chain=itertools.chain))
    clock = types.SimpleNamespace(perf_counter=lambda: seconds)
    monkeypatch.setattr(steps.compiled, 'time', clock)
    config = tiny(**{'batch.max_per_device': 2})
    summary = train.train(config, tmp_path)
    parts = sum(stage.num_updates * stage.batch_size // 4 for stage in train.plan(config).stages)
    assert 10 * parts <= summary['input_seconds'] < 10 * parts + 60


def test_a_run_with_many_batch_sizes_compiles_each_once_and_keeps_few_steps(tmp_path):
    stages = tuple((0.4 * k, 2 * k + 2) for k in range(compiled.MOST_STEPS + 3))
    steps.CACHE.clear()
    before = steps.CACHE.num_compiles
    changes = {'batch.policy': 'stages', 'batch.stages': stages, 'num_epochs': 0.4 * len(stages)}
    train.train(tiny(**changes | {'batch.max_per_device': 64}), tmp_path)
    assert [s['batch_size'] for s in of_kind(tmp_path, 'stage')] == [size for _, size in stages]
    assert steps.CACHE.num_compiles - before == len(stages) + 1  # and the evaluation
    assert len(steps.CACHE._futures) == compiled.MOST_STEPS
