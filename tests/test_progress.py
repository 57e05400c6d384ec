"""Remaining time, where a later stage is faster, and what is shown without a terminal."""

import pytest
from test_train import tiny

from adabatch_jax import main, progress, schedules, train


def plan():
    clock = schedules.Clock(1000, 3, 'drop')
    rate = schedules.LearningRate(schedules.step_schedule(0.1, 0.5, [1, 2]), 'linear', 10)
    return schedules.make_plan(clock, schedules.geometric(clock, 10, 10, 1, 100), rate)


def test_remaining_time_counts_every_stage_at_its_own_speed():
    stages = plan().stages
    assert [(s.batch_size, s.num_updates) for s in stages] == [(10, 100), (100, 20)]
    seconds = {10: 1.0, 100: 4.0}  # per example two and a half times as fast
    assert progress.remaining_seconds(stages, 0, seconds) == pytest.approx(100 + 80)
    assert progress.remaining_seconds(stages, 500, seconds) == pytest.approx(50 + 80)
    assert progress.remaining_seconds(stages, 2000, seconds) == pytest.approx(40)
    assert progress.remaining_seconds(stages, 3000, seconds) == 0


def test_batch_sizes_that_were_not_timed_follow_from_those_that_were():
    assert progress.update_seconds(40, {10: 1.0}) == 4.0  # an example costs the same
    assert progress.update_seconds(40, {10: 2.0, 20: 3.0}) == pytest.approx(5.0)  # 1 + 0.1 an example
    assert progress.update_seconds(20, {10: 2.0, 20: 3.5}) == 3.5


def test_the_display_adds_pauses_as_frequent_as_so_far():
    display = progress.ProgressDisplay(plan(), 0)
    assert display.seconds_left(0, 0.0, batch_size=10, examples_per_second=0.0) is None
    left = display.seconds_left(1000, 5.0, batch_size=10, examples_per_second=10.0)
    assert left == pytest.approx(20 * 10.0 + 10.0)  # of 100 nothing is known yet
    left = display.seconds_left(2000, 10.0, batch_size=100, examples_per_second=25.0)
    assert left == pytest.approx(10 * 4.0 + 5.0)
    assert display.seconds_left(3000, 15.0, batch_size=100, examples_per_second=25.0) == 0


def test_a_quiet_run_prints_nothing_and_writes_everything(tmp_path, capsys):
    arguments = ['main', '--config=tests/small_run.py', f'--workdir={tmp_path}', '--config.num_epochs=1']
    assert main.main([*arguments, '--quiet']) == 0
    shown = capsys.readouterr()
    assert not shown.out and not shown.err
    assert (tmp_path / 'plan.json').exists() and (tmp_path / 'metrics.jsonl').exists()


def test_without_a_terminal_stages_and_evaluations_are_plain_lines(tmp_path, capsys):
    train.train(tiny(**{'num_epochs': 2.0}), tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert sum('batch size' in line for line in lines) == 2
    assert sum('accuracy' in line for line in lines) == 2
    assert not any('\x1b' in line or '━' in line for line in lines)
