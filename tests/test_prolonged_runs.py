"""What a run leaves behind for others, where several of its promises meet."""

import errno
import json

import pytest
from runs import StopAt, of_kind, tiny
from test_statistical_runs import CONFIG

from adabatch_jax import comparison, run, train, workdir
from adabatch_jax.config import ConfigError

SHORT = CONFIG | {'num_epochs': 2.0}
PROLONGED = CONFIG | {'num_epochs': 3.0, 'batch.policy': 'fixed'}


def test_a_run_that_was_prolonged_is_replayed_as_a_whole_and_not_before_its_end(tmp_path):
    directory = tmp_path / 'run'
    train.train(tiny(**SHORT), directory)
    replay = {'batch.policy': 'replay', 'batch.replay': str(directory)}
    of_first = train.plan(tiny(**SHORT | replay))
    with pytest.raises(train.Preempted):
        train.train(tiny(**PROLONGED), directory, StopAt(3), allow_schedule_change=True)
    with pytest.raises(ConfigError, match='config.batch.replay: got .*; accepted: the work directory'):
        train.plan(tiny(**PROLONGED | replay))
    train.train(tiny(**PROLONGED), directory)
    trained = [(s['examples_seen'], s['batch_size']) for s in of_kind(directory, 'stage')]
    of_all = train.plan(tiny(**PROLONGED | replay))
    assert {(stage.start, stage.batch_size) for stage in of_all.stages} <= set(trained)
    assert [s.batch_size for s in of_all.stages] == [*(s.batch_size for s in of_first.stages), 8]


def test_a_run_with_gains_of_its_learning_rate_leaves_nothing_to_replay(tmp_path):
    """The rates of a part would be another's: a run of noise_scale goes on with adascale, then not."""
    for epochs, policy in ((0.5, 'noise_scale'), (0.8, 'adascale'), (1.1, 'noise_scale')):
        changes = {'num_epochs': epochs, 'batch.policy': policy}
        train.train(tiny(**CONFIG | changes), tmp_path, allow_schedule_change=True)
        assert (tmp_path / 'schedule.json').exists() == (epochs == 0.5)
    replay = {'batch.policy': 'replay', 'batch.replay': str(tmp_path)}
    with pytest.raises(ConfigError, match='whose batch sizes, and no gains of its learning rates, were'):
        train.plan(tiny(**CONFIG | replay))


@pytest.mark.parametrize(
    'later',
    [
        {'batch.policy': 'norm_test'},  # without coupling
        {'learning_rate.effective': 0.01},
        {'learning_rate.schedule': 'cosine', 'num_epochs': 2.5},  # another end than before
        {'batch.statistics.hysteresis': 0.2, 'num_epochs': 2.5},
    ],
)
def test_only_a_run_that_kept_its_learning_rates_leaves_something_to_replay(tmp_path, later):
    first = {key: later[key] for key in ('learning_rate.schedule',) if key in later}
    config = CONFIG | {'num_epochs': 2.0} | first
    with pytest.raises(train.Preempted):
        train.train(tiny(**config), tmp_path, StopAt(3))
    for _ in range(2):  # also when it is continued once more, with what it has now
        with pytest.raises(train.Preempted):
            train.train(tiny(**config | later), tmp_path, StopAt(1), allow_schedule_change=True)
    train.train(tiny(**config | later), tmp_path)
    assert (tmp_path / 'schedule.json').exists() == ('batch.statistics.hysteresis' in later)


def test_a_replay_of_a_run_that_is_another_now_is_refused_and_left_as_it_is(tmp_path):
    source, directory = tmp_path / 'source', tmp_path / 'replay'
    train.train(tiny(**SHORT), source)
    config = tiny(**SHORT | {'batch.policy': 'replay', 'batch.replay': str(source)})
    with pytest.raises(train.Preempted):
        train.train(config, directory, StopAt(3))
    schedule = json.loads((source / 'schedule.json').read_text())
    other = schedule | {'stages': schedule['stages'][:1]}
    (source / 'schedule.json').write_text(json.dumps(other))
    before = {path: path.read_bytes() for path in directory.rglob('*') if path.is_file()}
    with pytest.raises(ConfigError, match='stages .*: batch size 16 from .* on, now no further one;'):
        train.train(config, directory)
    assert {path: path.read_bytes() for path in directory.rglob('*') if path.is_file()} == before
    (source / 'schedule.json').write_text(json.dumps(schedule))
    assert train.train(config, directory)['kind'] == 'summary'


def test_a_schedule_that_cannot_be_written_at_the_end_is_tried_again_by_the_same_command(
    tmp_path, monkeypatch
):
    def full(*_):
        raise OSError(errno.ENOSPC, 'No space left on device')

    with monkeypatch.context() as patch:
        patch.setattr(workdir, 'write_schedule', full)
        with pytest.raises(train.SaveFailed, match='No space left on device'):
            train.train(tiny(**SHORT), tmp_path)
    assert not of_kind(tmp_path, 'summary')
    train.train(tiny(**SHORT), tmp_path)
    assert json.loads((tmp_path / 'schedule.json').read_text())['num_epochs'] == 2.0


def test_a_plan_that_is_there_needs_no_room_on_the_disk(tmp_path, monkeypatch):
    with pytest.raises(train.Preempted):
        train.train(tiny(), tmp_path, StopAt(3))

    def full(path, text):
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(workdir, 'write_whole', full)
    assert train.train(tiny(), tmp_path)['kind'] == 'summary'


def test_a_run_that_ends_and_one_that_has_ended_give_the_same_record(tmp_path):
    ended = train.train(tiny(num_epochs=1.0), tmp_path)
    assert ended == train.train(tiny(num_epochs=1.0), tmp_path) == of_kind(tmp_path, 'summary')[0]


@pytest.mark.parametrize('key', ['final_accuracy', 'best_accuracy'])
def test_an_end_that_lacks_what_its_readers_need_is_written_anew(tmp_path, key):
    ended = train.train(tiny(num_epochs=1.0), tmp_path)
    file = tmp_path / 'metrics.jsonl'
    file.write_text(file.read_text().replace(f'"{key}"', '"lost"'))
    again = train.train(tiny(num_epochs=1.0), tmp_path)
    assert again[key] == ended[key] and comparison.read_run(tmp_path).summary == again


def test_updates_count_once_when_a_run_killed_behind_a_transition_has_another_schedule(
    tmp_path, monkeypatch
):
    def killed(self):
        if self.host.stage:
            raise KeyboardInterrupt
        return dispatch(self)

    dispatch = run.Run.dispatch
    changes = {'num_epochs': 2.0, 'dataset.num_examples': 104, 'log_every_steps': 1000}
    changes |= {'eval_every_epochs': 4.0, 'checkpoint_every_epochs': 1.0}
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(run.Run, 'dispatch', killed)
        train.train(tiny(**changes), tmp_path)
    assert [r['step'] for r in of_kind(tmp_path, 'train')] == [13]
    train.train(tiny(**changes | {'batch.policy': 'fixed'}), tmp_path, allow_schedule_change=True)
    assert [r['step'] for r in of_kind(tmp_path, 'train')] == [26]


def test_every_evaluation_has_the_training_record_of_the_updates_before_it(tmp_path):
    train.train(tiny(num_epochs=2.0, log_every_steps=1000, eval_every_epochs=0.5), tmp_path)
    evaluated, trained = ([r['step'] for r in of_kind(tmp_path, kind)] for kind in ('eval', 'train'))
    assert len(evaluated) == 4 and set(evaluated) <= set(trained)
