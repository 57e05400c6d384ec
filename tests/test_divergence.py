"""Updates whose loss, gradient or weights are not finite: the run stops, skips them or falls back."""

import json
import math

import jax
import numpy as np
import pytest
from runs import StopAt, of_kind, tiny

from adabatch_jax import metrics, run, train, train_state
from adabatch_jax.config import resolve


@pytest.fixture
def broken_rate(monkeypatch):
    """Gives updates a learning rate that no weights survive, as long as it has not been lowered."""

    def at(*steps):
        original = run.Run.learning_rate

        def learning_rate(self, update):
            rate = original(self, update)
            return np.inf if self.step in steps and not self.host.counts['fall_backs'] else rate

        monkeypatch.setattr(run.Run, 'learning_rate', learning_rate)

    return at


def test_divergence_stops_with_place_and_rate_and_keeps_the_last_checkpoint(broken_rate, tmp_path):
    broken_rate(9)
    where = 'update 10, stage 0, batch size 8, learning rate inf'
    with pytest.raises(train.Diverged, match=f'gradient or weights not finite at {where}'):
        train.train(tiny(), tmp_path)
    state = train_state.restore(tmp_path)
    assert 0 < int(state.step) < 10
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


def test_skipped_updates_leave_the_weights_and_are_counted(broken_rate, tmp_path):
    broken_rate(4, 5, 9)
    config = tiny(**{'divergence.action': 'skip', 'checkpoint_every_epochs': 0.08})
    summary = train.train(config, tmp_path)
    assert (summary['skipped'], summary['updates']) == (3, 23) and 'fall_backs' not in summary
    records = of_kind(tmp_path, 'train')
    assert [(r['step'], r['skipped']) for r in records if 'skipped' in r] == [(8, 2), (12, 1)]
    assert all(np.isfinite(r['loss']) for r in records)


def test_a_skipped_update_changes_nothing_but_the_clock(broken_rate, tmp_path):
    broken_rate(4, 5)
    states = []
    for stop_at in (4, 6):
        with pytest.raises(train.Preempted):
            config = tiny(**{'divergence.action': 'skip'})
            train.train(config, tmp_path / str(stop_at), StopAt(stop_at - 1))
        states.append(train_state.restore(tmp_path / str(stop_at)))
    assert train_state.params_digest(states[0]) == train_state.params_digest(states[1])
    assert [(int(s.step), int(s.examples_seen)) for s in states] == [(4, 32), (6, 48)]


def test_too_many_skipped_updates_in_a_row_stop_the_run(broken_rate, tmp_path):
    broken_rate(4, 5, 6)
    config = tiny(**{'divergence.action': 'skip', 'divergence.max_skipped': 2})
    with pytest.raises(train.Diverged, match='at update 7, .*, 3 in a row'):
        train.train(config, tmp_path)


def test_updates_that_are_made_end_a_row_of_skipped_ones(broken_rate, tmp_path):
    broken_rate(4, 6)
    config = tiny(**{'divergence.action': 'skip', 'divergence.max_skipped': 1, 'num_epochs': 1.0})
    assert train.train(config, tmp_path)['skipped'] == 2


def test_a_test_loss_that_is_not_finite_is_divergence_and_no_best_state(tmp_path, monkeypatch):
    result = {'loss': math.inf, 'accuracy': 0.9, 'num_examples': 64}
    monkeypatch.setattr(run, 'evaluate', lambda *_: result)
    with pytest.raises(train.Diverged, match='test loss inf after update 13, stage 0, batch size 8'):
        train.train(tiny(num_epochs=1.0), tmp_path)
    assert int(train_state.restore(tmp_path).step) == 7  # the checkpoint that was due before


def test_a_window_of_skipped_updates_alone_has_no_loss(broken_rate, tmp_path):
    broken_rate(4, 5, 6, 7)
    train.train(tiny(**{'divergence.action': 'skip'}), tmp_path)
    (record,) = (r for r in of_kind(tmp_path, 'train') if r['step'] == 8)
    assert (record['loss'], record['accuracy'], record['skipped']) == (None, None, 4)


def test_wall_time_goes_on_when_a_run_falls_back(broken_rate, tmp_path, monkeypatch):
    broken_rate(9)
    begun = []
    begin = run.Run.begin
    monkeypatch.setattr(run.Run, 'begin', lambda self, why: begun.append(self.began) or begin(self, why))
    summary = train.train(tiny(**{'divergence.action': 'fall_back'}), tmp_path)
    assert summary['fall_backs'] == 1 and len(begun) == 2
    assert begun[0] == begun[1] and summary['setup_seconds'] > 0


def test_falling_back_goes_on_from_the_last_checkpoint_with_a_lower_rate(broken_rate, tmp_path):
    broken_rate(9)
    config = tiny(**{'divergence.action': 'fall_back', 'divergence.rate_factor': 0.25})
    summary = train.train(config, tmp_path)
    assert summary['fall_backs'] == 1
    session = of_kind(tmp_path, 'session')[-1]
    assert 'diverged' in session['reason'] and 'effective learning rate x 0.25' in session['reason']
    begun = session['step']
    assert 0 < begun < 10
    for record in of_kind(tmp_path, 'train'):
        full = 0.02 * 0.75 ** record['stage']
        assert record['learning_rate'] == pytest.approx(full if record['step'] < begun else full / 4)


@pytest.mark.parametrize('fall_backs', [0, 1, 2])
def test_each_time_that_a_run_falls_back_lowers_its_rate_by_the_factor(tmp_path, fall_backs):
    config = resolve(tiny(**{'divergence.rate_factor': 0.25}))
    with train.open_run(config, tmp_path, train.Attempt(fall_backs=fall_backs)) as opened:
        opened.decide()
        assert opened.learning_rate(opened.upcoming) == pytest.approx(0.02 * 0.25**fall_backs)


def test_another_factor_is_for_later_falls_and_what_fell_back_leaves_nothing_to_replay(
    broken_rate, tmp_path
):
    broken_rate(9)
    config = tiny(**{'divergence.action': 'fall_back', 'learning_rate.schedule': 'constant'})
    config.batch.policy, config.batch.max_size = 'noise_scale', 16
    train.train(config, tmp_path)
    assert not (tmp_path / 'schedule.json').exists()
    config.num_epochs, config.divergence.rate_factor = 4.0, 0.1
    train.train(config, tmp_path, allow_schedule_change=True)
    reason = of_kind(tmp_path, 'session')[-1]['reason']
    assert reason.endswith('; effective learning rate x 0.5, as the run fell back')
    last = of_kind(tmp_path, 'train')[-1]
    assert last['epoch'] > 3.5 and last['learning_rate'] == pytest.approx(
        0.5 * 0.02 * last['batch_size'] / 8
    )


def test_falling_back_ends_after_so_many_times(tmp_path):
    config = tiny(
        **{
            'learning_rate.effective': 1e30,
            'divergence.action': 'fall_back',
            'divergence.max_fall_backs': 2,
        }
    )
    with pytest.raises(train.Diverged):
        train.train(config, tmp_path)
    lines = (tmp_path / metrics.METRICS_FILE).read_text().splitlines()
    reasons = [json.loads(line).get('reason') for line in lines]
    assert [r for r in reasons if r and 'x 0.5' in r] and [r for r in reasons if r and 'x 0.25' in r]
    assert not [r for r in reasons if r and 'x 0.125' in r]
