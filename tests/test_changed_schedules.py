"""A run that is to go on with another schedule: refused, or accepted, with all that it was."""

import json
import shutil

import pytest
from runs import StopAt, of_kind, tiny

from adabatch_jax import checkpoint, metrics, run, train
from adabatch_jax.config import ConfigError

CHANGES = {'batch.growth_epochs': 0.75, 'num_epochs': 2.0, 'learning_rate.effective': 0.01}


def test_a_changed_schedule_is_refused_with_its_differences(tmp_path):
    with pytest.raises(train.Preempted):
        train.train(tiny(), tmp_path, StopAt(4))
    before = {p: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()}
    with pytest.raises(ConfigError) as refused:
        train.train(tiny(**CHANGES), tmp_path)
    for expected in (
        'num_epochs (2.0 here, 3.0 there)',
        'batch.growth_epochs',
        '--allow_schedule_change',
    ):
        assert expected in str(refused.value)
    with pytest.raises(ConfigError, match='model.name') as refused:
        train.train(tiny(**CHANGES, **{'model.name': 'resnet14'}), tmp_path, allow_schedule_change=True)
    assert 'num_epochs' not in str(refused.value)
    assert {p: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()} == before


def test_an_accepted_schedule_keeps_the_position_and_is_recorded(tmp_path):
    with pytest.raises(train.Preempted):
        train.train(tiny(), tmp_path, StopAt(9))
    train.train(tiny(**CHANGES), tmp_path, allow_schedule_change=True)
    session = of_kind(tmp_path, 'session')[-1]
    assert (session['step'], session['examples_seen']) == (10, 80)
    assert 'schedule changed: batch.growth_epochs (1.0 before, 0.75 now)' in session['reason']
    assert 'num_epochs (3.0 before, 2.0 now)' in session['reason']
    sizes = [(s['examples_seen'], s['batch_size']) for s in of_kind(tmp_path, 'stage')]
    assert sizes == [(0, 8), (80, 16), (160, 32)]
    assert json.loads((tmp_path / 'config.json').read_text())['num_epochs'] == 2.0
    assert metrics.read_records(tmp_path)[-1]['examples_seen'] >= 200
    train.train(tiny(**CHANGES), tmp_path)  # it is the run's own now
    with pytest.raises(ConfigError, match='differing'):
        train.train(tiny(), tmp_path)


def test_a_run_killed_right_after_its_schedule_changed_goes_on_with_the_new_one(tmp_path, monkeypatch):
    def killed(self):
        raise KeyboardInterrupt

    ends = []
    for kill in (False, True):
        directory = tmp_path / str(kill)
        with pytest.raises(train.Preempted):
            train.train(tiny(), directory, StopAt(9))
        if kill:
            with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
                patched.setattr(run.Run, 'dispatch', killed)
                train.train(tiny(**CHANGES), directory, allow_schedule_change=True)
            ends.append(train.train(tiny(**CHANGES), directory))
        else:
            ends.append(train.train(tiny(**CHANGES), directory, allow_schedule_change=True))
    assert ends[0]['params_digest'] == ends[1]['params_digest']


def test_another_microbatch_can_be_asked_for(tmp_path):
    with pytest.raises(train.Preempted):
        train.train(tiny(**{'batch.max_per_device': 4}), tmp_path, StopAt(4))
    smaller = tiny(**{'batch.max_per_device': 2})
    train.train(smaller, tmp_path, allow_schedule_change=True)
    assert [s['microbatch_size'] for s in of_kind(tmp_path, 'stage')] == [4, 2, 2, 2]


def sizes_from(directory, step):
    return [s['batch_size'] for s in of_kind(directory, 'stage') if s['step'] >= step]


GROWS = {
    'batch.policy': 'plateau',
    'batch.patience_epochs': 1,
    'batch.min_improvement': 0.9,
    'batch.max_size': 32,
    'num_epochs': 4.0,
}


@pytest.fixture(scope='module')
def grown(tmp_path_factory):
    """A run that was stopped at epoch 2.4 with a batch of 16, the second of three, growth to come."""
    directory = tmp_path_factory.mktemp('grown')
    with pytest.raises(train.Preempted):
        train.train(tiny(**GROWS), directory, StopAt(29))
    assert sizes_from(directory, 0) == [8, 16]
    return directory


@pytest.mark.parametrize(
    'changes, sizes',
    [
        ({'batch.max_per_device': 2}, [16, 32]),  # the state as it was: grows at epoch 3
        ({'batch.max_size': 16}, [16]),  # up to the new ceiling
        ({'batch.base_size': 4}, [16, 32]),
        ({'batch.base_size': 12, 'batch.max_size': 24}, [12, 24]),  # the nearest rung
        ({'batch.policy': 'norm_test', 'batch.statistics.decision_epochs': 9.0}, [16]),
        ({'batch.policy': 'fixed', 'batch.base_size': 4}, [4]),  # which has nothing to go on with
    ],
)
def test_a_policy_goes_on_where_it_was_as_far_as_its_ladder_allows(grown, tmp_path, changes, sizes):
    shutil.copytree(grown, tmp_path / 'run')
    train.train(tiny(**GROWS | changes), tmp_path / 'run', allow_schedule_change=True)
    (session,) = of_kind(tmp_path / 'run', 'session')[1:]
    assert sizes_from(tmp_path / 'run', session['step']) == sizes


def test_a_policy_that_begins_in_mid_run_sums_losses_from_there_on(tmp_path):
    with pytest.raises(train.Preempted):
        train.train(tiny(**GROWS | {'batch.policy': 'fixed'}), tmp_path, StopAt(20))
    train.train(tiny(**GROWS), tmp_path, allow_schedule_change=True)
    (session,) = of_kind(tmp_path, 'session')[1:]
    assert session['epoch'] > 1.5 and sizes_from(tmp_path, session['step']) == [8, 16]


def test_a_larger_batch_than_before_gets_the_microbatch_that_memory_allows(tmp_path):
    train.train(tiny(**{'batch.max_size': 8, 'num_epochs': 1.0}), tmp_path)
    changed = tiny(**{'batch.max_size': 32, 'num_epochs': 2.0, 'batch.growth_epochs': 0.5})
    train.train(changed, tmp_path, allow_schedule_change=True)
    stages = of_kind(tmp_path, 'stage')
    assert stages[-1]['batch_size'] == 32 and {s['num_microbatches'] for s in stages} == {1}


def test_a_finished_run_can_be_prolonged(tmp_path):
    first = train.train(tiny(num_epochs=1.0), tmp_path)
    longer = train.train(tiny(num_epochs=2.0), tmp_path, allow_schedule_change=True)
    assert longer['updates'] > first['updates']
    assert [r['step'] for r in of_kind(tmp_path, 'summary')] == [longer['updates']]


def test_a_checkpoint_of_a_version_that_lacked_a_key_is_continued_as_if_it_had_the_default(
    tmp_path, monkeypatch
):
    with pytest.raises(train.Preempted):
        train.train(tiny(), tmp_path, StopAt(5))
    original = checkpoint.restore

    def restore(*args, **kwargs):
        state, host = original(*args, **kwargs)
        del host['schedule']['batch.statistics.min_groups']
        return state, host

    monkeypatch.setattr(checkpoint, 'restore', restore)
    train.train(tiny(), tmp_path)
    assert of_kind(tmp_path, 'session')[-1]['reason'] == 'continues from the checkpoint of update 6'
