"""The same run in any layout of processes and devices, each with its own share of every batch."""

import json

import numpy as np
import pytest
from conftest import ROOT
from layout_child import BASIS, RUNS, SHARED
from several_processes import BOUND, finish, free_port, start

from adabatch_jax import distributed, metrics, schedules
from adabatch_jax.input_pipeline import order

LAYOUTS = {  # processes, devices of each, and what they train
    '1 x 4': (1, 4, list(RUNS)),
    '2 x 2': (2, 2, list(RUNS)),
    '4 x 1': (4, 1, ['accumulated', 'local', 'noise scale']),
}
CASES = [(layout, name) for layout, (*_, names) in LAYOUTS.items() for name in names]


# -------------------------------------------------------------------- the same run in any layout


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """What each process of each layout took part in, and the weights, by layout and name of the run."""
    found = {}
    for layout, (num_processes, devices, names) in LAYOUTS.items():
        out, port = tmp_path_factory.mktemp('layout'), free_port()
        child = ROOT / 'tests/layout_child.py'
        ends = finish(
            [start((child, out, port, num_processes, k, *names), devices) for k in range(num_processes)]
        )
        assert [status for _, status in ends] == [0] * num_processes, ends
        for name in names:
            of_processes = [
                json.loads((out / f'{name}-{k}.json').read_text()) for k in range(num_processes)
            ]
            with np.load(out / f'{name}.npz') as file:
                found[layout, name] = of_processes, list(file.values())
        found[layout] = out
    return found


@pytest.mark.parametrize('layout, name', CASES)
def test_all_processes_take_the_same_updates_and_end_in_the_same_weights(runs, layout, name):
    processes_, _ = runs[layout, name]
    taken = [[update[:2] for update in process['updates']] for process in processes_]
    assert all(updates == taken[0] for updates in taken)
    assert len({process['digest'] for process in processes_}) == 1
    assert all(process['evaluations'] == processes_[0]['evaluations'] for process in processes_)


@pytest.mark.parametrize('layout, name', [case for case in CASES if case[1] != 'in parts'])
def test_the_processes_have_every_example_of_a_batch_once(runs, layout, name):
    """Against the order of examples, drawn here from its seeds: also past the end of an epoch."""
    processes_, _ = runs[layout, name]
    n = BASIS['dataset.num_examples']
    stream = np.concatenate([np.random.default_rng((0, epoch)).permutation(n) for epoch in range(4)])
    for updates in zip(*(process['updates'] for process in processes_), strict=True):
        start, size, _ = updates[0]
        assert sum((examples for _, _, examples in updates), []) == stream[start : start + size].tolist()


@pytest.mark.parametrize(
    'layout, name', [case for case in CASES if case[0] != '1 x 4' and case[1] != 'goodput']
)
def test_a_run_is_the_same_in_any_layout(runs, layout, name):
    (alone, *_), expected = runs['1 x 4', name]
    (first, *_), weights = runs[layout, name]
    assert [u[:2] for u in first['updates']] == [u[:2] for u in alone['updates']]
    largest = max(np.abs(x).max() for x in expected)
    for x, y in zip(weights, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=BOUND * largest)
    for a, b in zip(first['evaluations'], alone['evaluations'], strict=True):
        assert a['num_examples'] == b['num_examples'] == BASIS['dataset.num_examples']
        assert abs(a['loss'] - b['loss']) < BOUND * b['loss']


def test_runs_change_their_batch_inside_epochs_and_by_decisions(runs):
    for name in RUNS:
        (alone, *_), _ = runs['1 x 4', name]
        sizes = [size for _, size, _ in alone['updates']]
        assert len(set(sizes)) > 1, name
        inside = [s for (s, a, _), b in zip(alone['updates'][1:], sizes, strict=False) if a != b]
        assert any(start % BASIS['dataset.num_examples'] for start in inside) or name == 'local'


@pytest.mark.parametrize('layout', ['2 x 2', '4 x 1'])
def test_shared_arrays_are_those_of_the_first_process_bit_for_bit(runs, layout):
    for k in range(LAYOUTS[layout][0]):
        with np.load(runs[layout] / f'shared-{k}.npz') as file:
            received = list(file.values())
        for x, y in zip(received, SHARED, strict=True):
            assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes())


@pytest.mark.parametrize('layout', LAYOUTS)
def test_every_process_gets_the_smallest_and_the_largest_value_of_all(runs, layout):
    num_processes = LAYOUTS[layout][0]
    for k in range(num_processes):
        extremes = json.loads((runs[layout] / f'extremes-{k}.json').read_text())
        assert extremes == [0, num_processes - 1]


# ------------------------------------------------------------------------ each has its own share


@pytest.mark.parametrize('num_processes', [1, 2, 4])
def test_a_process_reads_its_share_of_each_batch_and_nothing_else(monkeypatch, num_processes):
    """Twelve updates that change their size inside an epoch, some in two parts a device."""
    clock, seed = schedules.Clock(50, 10), 3
    shares = []
    for k in range(num_processes):
        monkeypatch.setattr(distributed.devices.jax, 'process_count', lambda: num_processes)
        monkeypatch.setattr(distributed.devices.jax, 'process_index', lambda k=k: k)
        monkeypatch.setattr(distributed.devices.jax, 'local_device_count', lambda: 4 // num_processes)
        position, drawn = 0, []
        for size, parts in [(8, 1), (16, 2), (40, 1), (8, 2)]:
            batches = order.update_examples(seed, clock, position, size, parts)
            for _ in range(3):
                parts_ = [next(batches)[0] for _ in range(parts)]
                per_device = [x.reshape(4 // num_processes, -1) for x in parts_]
                drawn.append(np.concatenate(per_device, 1).ravel())
                position += size
        shares.append(drawn)
    position = 0
    for batch in zip(*shares, strict=True):
        together = np.concatenate(batch)
        assert len({len(share) for share in batch}) == 1
        expected, _ = order.examples_at(seed, 50, position, len(together))
        np.testing.assert_array_equal(together, expected)
        position += len(together)


# ------------------------------------------------------------------------------ no deadlock


def test_a_thousand_small_updates_on_four_devices_of_the_cpu(command_line, tmp_path):
    """Collectives of many updates in flight would wait for threads that never run (XLA's CPU client)."""
    done = command_line(
        *('--config=tests/small_run.py', f'--workdir={tmp_path}', '--config.dataset.pipeline=device'),
        *('--config.batch.policy=fixed', '--config.num_epochs=63', '--config.eval_every_epochs=63'),
        *('--config.checkpoint_every_epochs=63', '--config.log_every_steps=100'),
        devices=4,
    )
    assert done.returncode == 0, done.stderr
    assert metrics.read_records(tmp_path)[-1]['updates'] == 1008
