"""Remaining time, where a later stage is faster, and what is shown without a terminal."""

import pytest
from rich.console import Console
from runs import tiny

from adabatch_jax import main, progress, schedules, terminal, train


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


@pytest.mark.parametrize(
    'size, told',
    [
        (1, ('1 update, 1 epoch of 1 example, ', 'batch size 1,')),
        (4096, ('1 update, ', 'of 4,096 examples, ', 'batch size 4,096,', '1 x 1 x 4,096')),
    ],
)
def test_a_plan_writes_one_and_thousands_alike_wherever_it_counts(size, told, capsys):
    clock = schedules.Clock(size, 1)
    rate = schedules.LearningRate(0.1, 'linear', size)
    planned = schedules.make_plan(clock, [schedules.Transition(0, size, '')], rate)
    terminal.print_plan(planned, lambda stage: 0)
    shown = ' '.join(capsys.readouterr().out.split())
    assert all(text in shown for text in told), shown


@pytest.mark.parametrize('is_terminal', [True, False])
def test_no_digit_of_a_table_is_cut_off_however_narrow_the_terminal_is(is_terminal, capsys, monkeypatch):
    narrow = Console(width=20, force_terminal=is_terminal, highlight=False)
    monkeypatch.setattr(terminal, 'console', narrow)
    terminal.print_plan(plan(), lambda stage: 0)
    shown = capsys.readouterr().out
    assert '1 x 1 x 100' in shown and '0.1' in shown and '…' not in shown


def test_an_output_that_cannot_hold_a_character_is_worth_no_run(command_line, tmp_path, monkeypatch):
    monkeypatch.setenv('PYTHONIOENCODING', 'ascii')
    folder = tmp_path / 'größe'
    folder.mkdir()
    (folder / 'config.json').write_text('{"seed": 1}')
    done = command_line(folder, f'--out={folder / "page.html"}', module='adabatch_jax.report')
    assert done.returncode == 0 and 'gr??e' in done.stdout, done.stderr
