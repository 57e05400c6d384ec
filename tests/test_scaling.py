"""The model of many devices, against closed forms, and what the commands make of it."""

import dataclasses
import json
import math

import pytest
from runs import tiny

from adabatch_jax import benchmark, main, scaling, schedules, train


def test_an_all_reduce_pays_latency_by_the_logarithm_and_bandwidth_for_almost_twice_the_data():
    network = scaling.Network(1e-3, 1e-6)
    assert network.all_reduce(1, 1000) == 0
    assert network.all_reduce(2, 1000) == pytest.approx(2 * 1e-3 + 1000 * 1e-6)
    assert network.all_reduce(4, 1000) == pytest.approx(4 * 1e-3 + 1500 * 1e-6)
    assert network.all_reduce(1024, 1000) == pytest.approx(20 * 1e-3 + 2 * 1023 / 1024 * 1000 * 1e-6)


def test_latency_and_bandwidth_are_found_in_measured_times():
    network = scaling.Network(3e-4, 2e-9)
    for devices in (2, 4, 6):
        seconds = {size: network.all_reduce(devices, size) for size in (2**10, 2**16, 2**22)}
        found = scaling.fit_network(devices, seconds)
        assert found.latency == pytest.approx(3e-4)
        assert found.seconds_per_byte == pytest.approx(2e-9)


def model(fixed=1.0, per_example=0.1, network=(0.0, 0.0), sizes=(1, 8, 64)):
    points = tuple((size, fixed + per_example * size) for size in sizes)
    return scaling.Model(1000, scaling.Network(*network), points)


def test_computation_is_linear_between_and_beyond_measurements():
    found = model()
    for examples in (0.5, 1, 3, 8, 20, 64, 1000):
        assert found.compute(examples) == pytest.approx(1 + 0.1 * examples)
    falling = scaling.Model(0, scaling.Network(0, 0), ((8, 1.0), (16, 2.5)))
    assert falling.compute(4) == pytest.approx(0.5)  # the line says 0.25: less than in proportion
    assert falling.compute(10) == pytest.approx(1.375)
    assert scaling.Model(0, scaling.Network(0, 0), ((8, 1.0),)).compute(4) == 0.5


def test_communication_is_taken_out_of_what_was_measured_and_comes_back_on_other_devices():
    network = scaling.Network(0.01, 1e-6)
    true = scaling.Model(5000, network, ((1, 1.1), (8, 1.8), (64, 7.4)))
    result = {
        'num_devices': 4,
        'batch_sizes': [
            {'batch_size': size, 'step_seconds': true.update(size, 4)} for size in (4, 32, 256)
        ],
        'scaling': {'gradient_bytes': 5000, 'latency': 0.01, 'seconds_per_byte': 1e-6},
    }
    found = scaling.Model.from_benchmark(result)
    for size, devices in [(64, 1), (64, 4), (64, 64), (1024, 256)]:
        assert found.update(size, devices) == pytest.approx(true.update(size, devices))
    with pytest.raises(ValueError, match="no figures of benchmark --scaling: 'scaling' is missing"):
        scaling.Model.from_benchmark({key: result[key] for key in ('num_devices', 'batch_sizes')})


def plans():
    clock = schedules.Clock(1024, 4, 'drop')
    rate = schedules.LearningRate(schedules.step_schedule(0.1, 0.5, [1, 2, 3]), 'linear', 16)
    fixed = schedules.make_plan(clock, schedules.geometric(clock, 16, 2, 4), rate)
    return fixed, schedules.make_plan(clock, schedules.geometric(clock, 16, 2, 1), rate)


def test_without_overheads_nothing_is_gained_but_what_devices_bring():
    fixed, adaptive = plans()
    ideal = model(fixed=0.0)
    for row in scaling.predictions(ideal, fixed, adaptive, [1, 2, 16]):
        assert row['fixed'] == pytest.approx(4096 * 0.1 / row['devices'])
        assert row['adaptive'] == pytest.approx(row['fixed'])
    assert ideal.run(fixed.stages, 4096) == ideal.run(fixed.stages, 16)  # one example a device
    assert ideal.run(adaptive.stages, 4096) < ideal.run(fixed.stages, 4096)


def test_a_large_batch_may_gain_more_than_the_number_of_devices():
    """The shape of the paper's claim: up to 6.25 times as fast on four devices.

    The measure is a small batch on one device, which does not fill it; four devices with large batches
    have less overhead an example each.
    """
    fixed, _ = plans()
    rate = fixed.learning_rate
    large = schedules.make_plan(fixed.clock, schedules.geometric(fixed.clock, 128, 2, 1), rate)
    rows = scaling.predictions(model(network=(1e-3, 0.0)), fixed, large, scaling.doubled(4096))
    speedup = {row['devices']: rows[0]['fixed'] / row['adaptive'] for row in rows}
    assert 1 < speedup[1] < 2 and 4 < speedup[4] < 4 * (1 / 16 + 0.1) / 0.1
    assert all(rows[0]['fixed'] / row['fixed'] < speedup[row['devices']] for row in rows)
    gained = [speedup[devices] / devices for devices in sorted(speedup)]
    assert gained == sorted(gained, reverse=True)  # each further device brings less


def test_devices_pay_off_while_twice_as_many_are_half_as_fast_again():
    found = model(fixed=1.0, per_example=1.0)
    for size, devices in [(16, 1024), (64, 1024), (64, 4), (1024, 1024)]:
        paying = found.worthwhile(size, devices)
        assert paying <= min(size, devices)
        if paying > 1:
            assert found.update(size, paying // 2) >= scaling.WORTH * found.update(size, paying)
        if 2 * paying <= min(size, devices):
            assert found.update(size, paying) < scaling.WORTH * found.update(size, 2 * paying)
    assert found.worthwhile(1024, 4096) > found.worthwhile(16, 4096)  # larger batches feed more


def test_a_number_of_devices_that_does_not_gain_enough_hides_none_that_does():
    """Three devices have as many messages as four, and fall short where four pay off."""
    found = scaling.Model(0, scaling.Network(2.7, 0.0), ((1, 1.0), (96, 96.0)))
    assert found.update(96, 2) < scaling.WORTH ** math.log2(3 / 2) * found.update(96, 3)
    assert found.update(96, 2) >= scaling.WORTH * found.update(96, 4)
    assert found.worthwhile(96, 4) == 4


def test_devices_pay_off_over_which_the_batch_divides():
    found = model(fixed=0.0, per_example=1.0)
    assert found.worthwhile(18, 6) == 6 and found.worthwhile(18, 8) == 6
    assert found.worthwhile(36, 64) == 36 and found.worthwhile(7, 6) == 1


def test_a_device_computes_no_faster_past_the_last_measurement():
    found = scaling.Model(1000, scaling.Network(0.0, 0.0), ((2, 1e-3), (64, 2e-3), (128, 1.9e-3)))
    assert found.compute(96) == pytest.approx(1.95e-3)
    assert found.compute(512) == found.compute(4096) == 1.9e-3


CONFIG = 'tests/small_run.py'


@pytest.fixture(scope='module')
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp('scaling')
    arguments = ('--scaling', '--repeats=1', f'--json={folder / "a.json"}', f'--plot={folder / "a.png"}')
    assert benchmark.main(['benchmark', f'--config={CONFIG}', *arguments]) == 0
    return folder


def test_the_benchmark_measures_the_network_and_predicts_up_to_4096_devices(measured):
    result = json.loads((measured / 'a.json').read_text())
    found, sizes = result['scaling'], [m['batch_size'] for m in result['batch_sizes']]
    assert found['gradient_bytes'] == 4 * 5_466
    assert sizes == [8, 16]  # smaller ones do not split into groups of BatchNorm
    assert all(seconds > 0 for seconds in found['all_reduce_seconds'].values())
    assert [row['devices'] for row in found['predicted']] == [2**k for k in range(13)]
    assert all(row['fixed'] > 0 and row['adaptive'] > 0 for row in found['predicted'])
    assert (measured / 'a.png').read_bytes().startswith(b'\x89PNG')


def test_a_plan_for_other_devices_tells_how_many_pay_off(measured, capsys):
    local = '--config.model.batch_norm=local'
    arguments = ['main', f'--config={CONFIG}', '--mode=plan', '--devices=8', local]
    assert main.main([*arguments, f'--benchmark={measured / "a.json"}']) == 0
    output = capsys.readouterr().out
    assert '8 x 1 x 1' in output and '8 x 1 x 2' in output
    assert 'Devices that pay off' in output and 'images/s on 8' in output
    measures = [*arguments[:-1], '--config.batch.policy=plateau', '--config.batch.max_size=32']
    assert main.main([*measures, '--devices=16', f'--benchmark={measured / "a.json"}']) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    cells = [row for row in rows if row[:2] in (['-', '8'], ['-', '16'], ['-', '32'])]
    # BatchNorm's groups of 2 leave 4 devices for a batch of 8, and 8 for one of 16.
    assert [row[6] == '-' for row in cells] == [True, True, False]
    assert all(int(row[2]) <= int(row[1]) // 2 for row in cells)
    assert main.main(arguments) == 0
    assert '--benchmark=FILE' in capsys.readouterr().out
    wider = '--config.dataset.num_classes=20'
    assert main.main([*arguments, wider, f'--benchmark={measured / "a.json"}']) == 2
    error = capsys.readouterr().err
    assert '--benchmark: got figures of a network with 21,864 bytes' in error
    assert 'accepted: of one with 23,184' in error


@pytest.mark.parametrize(
    'command, arguments, message',
    [
        (main, ['--mode=plan', '--devices=3'], 'batch size 8 does not divide evenly over 3 devices'),
        (main, ['--mode=plan', '--devices=0'], '--devices'),
        (
            main,
            ['--devices=4', '--workdir=x'],
            '--devices: got 4 with --mode=train; accepted: --mode=plan',
        ),
        (main, ['--mode=plan', '--benchmark=nowhere'], '--benchmark'),
        (main, ['--mode=plan', f'--benchmark={CONFIG}'], '--benchmark'),
        (benchmark, ['--batch_sizes=2'], '--batch_sizes: batch size 2 on 2 devices'),
        (benchmark, ['--scaling', '--plot=nowhere/a.png'], '--plot'),
        (benchmark, ['--scaling', '--plot=a.xyz'], '--plot'),
        (benchmark, ['--plot=a.png'], '--plot'),
        (benchmark, ['--scaling', '--run'], '--scaling'),
        (benchmark, ['--scaling', '--config.batch.policy=noise_scale'], 'config.batch.policy'),
        (benchmark, ['--scaling', '--gigabytes_per_second=0'], 'gigabytes_per_second'),
    ],
)
def test_mistakes_are_told_in_a_line(command, arguments, message, capsys):
    assert command.main(['command', f'--config={CONFIG}', *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count('\n') == 1


def test_scaling_measures_small_shares_of_a_device_too():
    values = benchmark.define_flags([])
    values(['benchmark', '--scaling'])
    experiment = train.fitted(tiny(**{'batch.base_size': 32, 'batch.max_size': 64}))
    assert benchmark.batch_sizes(values, experiment) == [2, 8, 32, 64]


def test_one_device_needs_to_be_told_of_the_network(monkeypatch):
    monkeypatch.setattr(benchmark.jax, 'device_count', lambda: 1)
    values = benchmark.define_flags([])
    values(['benchmark', '--scaling', '--latency_us=5'])
    with pytest.raises(benchmark.ConfigError, match='one device has nothing to communicate'):
        benchmark.network(values, 1000)
    values(['benchmark', '--scaling', f'--config={CONFIG}'])
    with pytest.raises(benchmark.ConfigError, match='one device has nothing to communicate'):
        benchmark.check(values)  # before anything is measured
    values(['benchmark', '--scaling', '--latency_us=5', '--gigabytes_per_second=10'])
    network, seconds = benchmark.network(values, 1000)
    assert network == scaling.Network(pytest.approx(5e-6), pytest.approx(1e-10)) and not seconds


def test_what_is_told_of_the_network_is_taken_and_the_rest_is_measured(monkeypatch):
    there = scaling.Network(3e-4, 2e-9)
    monkeypatch.setattr(
        benchmark.timing,
        'all_reduce_seconds',
        lambda sizes, _: {n: there.all_reduce(2, n) for n in sizes},
    )
    for told, expected in (
        ([], (3e-4, 2e-9)),
        (['--latency_us=5'], (5e-6, 2e-9)),
        (['--gigabytes_per_second=10'], (3e-4, 1e-10)),
    ):
        values = benchmark.define_flags([])
        values(['benchmark', '--scaling', *told])
        network, seconds = benchmark.network(values, 1000)
        assert dataclasses.astuple(network) == pytest.approx(expected) and 1000 in seconds


def test_the_largest_share_of_a_batch_decides_how_long_an_update_takes():
    assert model(fixed=0.0).update(10, 4) == pytest.approx(0.3)  # shares of 3, 3, 2 and 2


def test_less_than_twice_the_devices_have_less_to_gain():
    found = scaling.Model(0, scaling.Network(0.0, 0.0), ((2, 1.1), (3, 1.2), (6, 2.0)))
    # 2 devices are 2.0 / 1.2 = 1.67 times as fast as 1, and 3 are 1.2 / 1.1 = 1.09 times as fast as 2.
    assert found.worthwhile(6, 3) == 2 and found.worthwhile(6, 6) == 2


def test_where_devices_do_not_pay_off_a_prediction_for_those_that_do_is_that_of_one():
    fixed, adaptive = plans()
    one, many = scaling.predictions(model(network=(1e3, 0.0)), fixed, adaptive, [1, 16])
    assert many['worthwhile'] == one['worthwhile'] == one['adaptive'] < many['adaptive']


def test_a_prediction_takes_no_devices_that_the_groups_of_batch_norm_leave_out():
    """Groups of 8 leave 2 devices for a batch of 16, though each further one would pay off."""
    fixed, _ = plans()
    grouped = dataclasses.replace(fixed, microbatch_multiple=8)
    rows = scaling.predictions(model(fixed=0.0), fixed, grouped, [1, 2, 16])
    whole = 4096 * 0.1
    assert [row['worthwhile'] for row in rows] == pytest.approx([whole, whole / 2, whole / 2])


def test_computation_is_a_tenth_of_what_was_timed_at_least():
    assert scaling.computation(2, {8: 1.0}, scaling.Network(10.0, 0.0), 1000) == ((4, 0.1),)


def test_computation_is_in_order_of_the_examples_however_it_was_measured():
    found = scaling.computation(2, {16: 3.0, 8: 2.0}, scaling.Network(0.0, 0.0), 1000)
    assert found == ((4, 2.0), (8, 3.0))


def test_devices_that_have_no_example_send_nothing():
    found = model(network=(1e-3, 1e-6))
    assert found.update(16, 4096) == found.update(16, 16)
    assert found.update(16, 16) == pytest.approx(found.compute(1) + 8e-3 + 1.875e-3)
