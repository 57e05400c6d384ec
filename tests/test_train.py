"""Whole runs: what they write, and that a continued run ends as one never stopped."""

import dataclasses
import json
import math
import shutil

import jax
import numpy as np
import pytest
from runs import StopAt, of_kind, tiny, without_times

from adabatch_jax import checkpoint, evaluate, metrics, run, steps, train, train_state
from adabatch_jax.config import ConfigError, resolve
from adabatch_jax.input_pipeline import order

SECONDS = 'setup', 'stall', 'input', 'log', 'evaluation', 'checkpoint'
FIELDS = {
    'session': {'reason', 'num_processes', 'num_devices', 'device', 'versions'},
    'train': {
        'stage',
        'batch_size',
        'learning_rate',
        'loss',
        'accuracy',
        'examples_per_second',
    },
    'eval': {'split', 'loss', 'accuracy', 'num_examples', 'gradient_evaluations'},
    'stage': {
        'stage',
        'batch_size',
        'microbatch_size',
        'num_microbatches',
        'updates_per_dispatch',
        'learning_rate',
        'compile_seconds',
        'stall_seconds',
        'cache_hit',
        'memory_bytes',
        'reason',
    },
    'summary': {
        'updates',
        'wall_seconds',
        'train_seconds',
        'compile_seconds',
        *(f'{what}_seconds' for what in SECONDS),
        'cache_hits',
        'cache_misses',
        'final_accuracy',
        'best_accuracy',
        'params_digest',
    },
}


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """One uninterrupted run of the tiny config, shared by the tests that look at it."""
    directory = tmp_path_factory.mktemp('finished')
    return directory, train.train(tiny(), directory)


def test_records_have_the_fields_that_readers_rely_on(finished):
    directory, summary = finished
    records = metrics.read_records(directory)
    assert records[-1]['kind'] == 'summary'
    for record in records:
        common = {'kind', 'step', 'epoch', 'examples_seen', 'time'}
        assert record.keys() == common | FIELDS[record['kind']]
    assert summary.items() <= records[-1].items()
    assert {'config.json', 'plan.json', 'checkpoints'} <= {p.name for p in directory.iterdir()}
    assert list(directory.glob('events.out.tfevents.*'))


def test_run_follows_its_plan(finished):
    directory, summary = finished
    plan = json.loads((directory / 'plan.json').read_text())
    stages = of_kind(directory, 'stage')
    assert [s['batch_size'] for s in stages] == [8, 16, 32]
    for planned, taken in zip(plan['stages'], stages, strict=True):
        assert taken['step'] == planned['first_update']
        assert taken['examples_seen'] == planned['start']
        assert taken['learning_rate'] == planned['learning_rate_start']
    assert summary['updates'] == plan['num_updates']


def test_training_records_cover_every_update_of_one_batch_size_each(finished):
    directory, summary = finished
    records = of_kind(directory, 'train')
    steps_ = [0] + [r['step'] for r in records]
    assert steps_[-1] == summary['updates']
    for before, record in zip(steps_, records, strict=False):
        stage = [s for s in of_kind(directory, 'stage') if s['step'] <= before][-1]
        assert record['batch_size'] == stage['batch_size']
        assert record['examples_per_second'] > 0


def test_evaluation_counts_the_whole_split_each_time(finished):
    directory, _ = finished
    evaluations = of_kind(directory, 'eval')
    assert [math.floor(r['epoch']) for r in evaluations] == [1, 2, 3]
    assert {r['num_examples'] for r in evaluations} == {100}


def test_what_an_epoch_has_left_for_a_batch_that_has_grown_is_passed_before_the_next_begins(tmp_path):
    """10 updates with 8 of 100 examples; 64 do not fit into the 20 that are left."""
    drop = {'num_epochs': 2.0, 'dataset.remainder': 'drop', 'batch.growth_factor': 8.0}
    config = tiny(**drop, **{'batch.growth_epochs': 0.8, 'batch.max_size': 64})
    summary = train.train(config, tmp_path / 'whole')
    evaluations = [(r['step'], r['epoch']) for r in of_kind(tmp_path / 'whole', 'eval')]
    assert evaluations == [(10, 1.0), (11, 2.0)]
    assert [r['epoch'] for r in of_kind(tmp_path / 'whole', 'stage')] == [0.0, 1.0]
    with pytest.raises(train.Preempted, match='update 10, epoch 1$'):
        train.train(config, tmp_path / 'run', StopAt(9))
    assert train.train(config, tmp_path / 'run')['params_digest'] == summary['params_digest']
    for kind in ('stage', 'eval'):
        whole, stopped = (without_times(of_kind(tmp_path / name, kind)) for name in ('whole', 'run'))
        assert whole == stopped
    config.num_epochs = 1.0
    summary = train.train(config, tmp_path / 'short')
    assert (summary['updates'], summary['epoch'], summary['examples_seen']) == (10, 1.0, 100)
    assert train_state.restore(tmp_path / 'short').examples_seen == 100


def test_training_learns_through_its_transitions(tmp_path):
    config = tiny(**{'num_epochs': 12.0, 'batch.growth_epochs': 4.0, 'learning_rate.effective': 0.05})
    summary = train.train(config, tmp_path)
    losses = [r['loss'] for r in of_kind(tmp_path, 'train')]
    assert losses[-1] < 0.5 * losses[0]
    assert summary['final_accuracy'] > 0.5  # chance is 0.1


def test_state_digest_and_examples_seen_are_restored_from_the_work_directory(finished):
    directory, summary = finished
    state = train_state.restore(directory)
    latest = train_state.restore(directory, 'latest')
    assert {train_state.params_digest(s) for s in (state, latest)} == {summary['params_digest']}
    assert int(state.step) == summary['updates']
    assert int(state.examples_seen) == metrics.read_records(directory)[-1]['examples_seen']


def test_the_best_state_is_restored_by_that_name(finished, tmp_path):
    directory, _ = finished
    evaluations = of_kind(directory, 'eval')
    best = max(evaluations, key=lambda record: (record['accuracy'], record['step']))
    assert train_state.restore(directory, 'best').step == best['step']
    with pytest.raises(FileNotFoundError, match='no evaluated checkpoint'):
        train_state.restore(tmp_path, 'best')
    with pytest.raises(TypeError):
        train_state.restore(directory, str(best['step']))


def test_initial_weights_are_not_made_for_a_state_that_is_read(finished, monkeypatch):
    create = train_state.create

    def only_shapes(*args):
        state = create(*args)
        assert isinstance(state.step, jax.core.Tracer)
        return state

    monkeypatch.setattr(train_state, 'create', only_shapes)
    directory, summary = finished
    assert train.train(tiny(), directory) == summary
    result = evaluate.evaluate_checkpoint(resolve(tiny()), directory)
    assert result['accuracy'] == summary['final_accuracy']


def test_the_same_config_gives_the_same_weights(finished, tmp_path):
    assert train.train(tiny(), tmp_path)['params_digest'] == finished[1]['params_digest']


def test_a_checkpoint_that_was_not_finished_is_no_checkpoint(finished, tmp_path):
    """What a process killed during a save leaves behind."""
    with pytest.raises(train.Preempted):
        train.train(tiny(), tmp_path, StopAt(4))
    folder = tmp_path / checkpoint.FOLDER
    shutil.copytree(folder / '5', folder / checkpoint.UNFINISHED / '7.orbax-checkpoint-tmp')
    assert train.train(tiny(), tmp_path)['params_digest'] == finished[1]['params_digest']


def test_what_a_run_took_up_and_on_what_is_in_its_session_records(finished, tmp_path):
    (session,) = of_kind(finished[0], 'session')
    assert (session['step'], session['reason'], session['num_devices']) == (0, 'begins', 2)
    assert session['versions']['jax'] == jax.__version__
    with pytest.raises(train.Preempted):
        train.train(tiny(), tmp_path, StopAt(4))
    train.train(tiny(), tmp_path)
    assert [s['reason'] for s in of_kind(tmp_path, 'session')] == [
        'begins',
        'continues from the checkpoint of update 5',
    ]


@pytest.mark.parametrize('stop_at', [1, 5, 12, 13, 14, 18])
def test_a_continued_run_ends_as_one_never_stopped(finished, tmp_path, stop_at):
    """Stops in the middle of a stage, in the last update before a transition and right after it."""
    with pytest.raises(train.Preempted, match=f'at update {stop_at},'):
        train.train(tiny(), tmp_path, StopAt(stop_at - 1))
    assert train.train(tiny(), tmp_path)['params_digest'] == finished[1]['params_digest']
    for kind in ('train', 'eval'):
        assert without_times(of_kind(tmp_path, kind)) == without_times(of_kind(finished[0], kind))
    stages = {r['stage']: r for r in reversed(of_kind(tmp_path, 'stage'))}
    assert [stages[k]['batch_size'] for k in range(3)] == [8, 16, 32]


def plateau_config():
    return tiny(
        **{
            'batch.policy': 'plateau',
            'batch.patience_epochs': 1,
            'batch.min_improvement': 0.6,  # hardly an epoch is good enough: it grows
            'batch.max_size': 32,
            'num_epochs': 5.0,
            'learning_rate.coupling': 'none',
        }
    )


def test_a_run_that_decides_from_its_loss_continues_with_the_same_decisions(tmp_path):
    whole = train.train(plateau_config(), tmp_path / 'whole')
    grown = of_kind(tmp_path / 'whole', 'stage')
    assert len(grown) >= 2 and 'relative improvement' in grown[-1]['reason']
    boundary = grown[-1]['step']
    for stop_at in (3, boundary - 1, boundary, boundary + 1):
        directory = tmp_path / str(stop_at)
        with pytest.raises(train.Preempted):
            train.train(plateau_config(), directory, StopAt(stop_at - 1))
        assert train.train(plateau_config(), directory)['params_digest'] == whole['params_digest']


def test_a_batch_that_does_not_fit_into_the_rest_of_an_epoch_keeps_clock_and_data_together(tmp_path):
    """From 88 of 100 examples on, a batch of 16 does not fit: the next update starts at 100."""
    config = tiny(
        **{
            'batch.policy': 'stages',
            'batch.stages': ((0, 8), (0.88, 16), (1, 8)),
            'num_epochs': 2.0,
            'dataset.remainder': 'drop',
        }
    )
    whole = train.train(config, tmp_path / 'whole')
    plan = json.loads((tmp_path / 'whole' / 'plan.json').read_text())
    assert [(s['start'], s['num_updates']) for s in plan['stages']] == [(0, 11), (100, 12)]
    assert whole['updates'] == 23
    assert [s['batch_size'] for s in of_kind(tmp_path / 'whole', 'stage')] == [8, 8]
    for stop_at in (10, 11, 12):
        with pytest.raises(train.Preempted):
            train.train(config, tmp_path / str(stop_at), StopAt(stop_at - 1))
        again = train.train(config, tmp_path / str(stop_at))
        assert (again['updates'], again['params_digest']) == (23, whole['params_digest'])


def test_every_update_gets_the_batch_of_its_position(tmp_path, monkeypatch):
    """The position that the pipeline serves is the clock's, through every kind of transition."""
    served, asked = [], []
    original = run.Run.dispatch

    def dispatch(self):
        def noting(updates):
            batch = stream.take(updates)
            served.append(np.asarray(batch['label']).ravel())
            asked.append((*updates, self.pipeline))
            return batch

        stream, self.stream = self.stream, dataclasses.replace(self.stream, take=noting)
        before = original(self)
        self.stream = stream
        return before

    monkeypatch.setattr(run.Run, 'dispatch', dispatch)
    stages = ((0, 8), (0.3, 20), (0.88, 16), (1, 8), (1.5, 4))
    for remainder in ('drop', 'carry'):
        config = tiny(
            **{
                'batch.policy': 'stages',
                'batch.stages': stages,
                'num_epochs': 2.0,
                'dataset.remainder': remainder,
            }
        )
        train.train(config, tmp_path / remainder)
    for labels, (update, pipeline) in zip(served, asked, strict=True):
        examples, _ = order.examples_at(0, 100, update.start, update.batch_size)
        np.testing.assert_array_equal(labels, pipeline._labels[examples])


def test_a_finished_run_is_left_as_it_is(finished):
    directory, summary = finished
    before = (directory / 'metrics.jsonl').read_bytes()
    assert train.train(tiny(), directory)['params_digest'] == summary['params_digest']
    assert (directory / 'metrics.jsonl').read_bytes() == before


def test_continuing_in_the_same_process_compiles_nothing(tmp_path):
    changes = {'num_epochs': 1.0, 'batch.growth_epochs': 0.5, 'eval_every_epochs': 0.5}
    config = tiny(**{'model.batch_norm': 'ghost:4'} | changes)  # which no other test has
    before = steps.CACHE.num_compiles
    with pytest.raises(train.Preempted):
        train.train(config, tmp_path, StopAt(8))  # in the second stage, after an evaluation
    started = steps.CACHE.num_compiles
    assert started - before == 3  # two batch sizes and the evaluation
    train.train(config, tmp_path)
    assert steps.CACHE.num_compiles == started
    assert of_kind(tmp_path, 'stage')[-1]['cache_hit']


def test_shrinking_batches_train_and_reuse_their_steps(tmp_path):
    stages = ((0, 8), (0.5, 32), (1, 8))
    steps.CACHE.clear()
    before = steps.CACHE.num_compiles
    train.train(tiny(**{'batch.policy': 'stages', 'batch.stages': stages}), tmp_path)
    assert [s['batch_size'] for s in of_kind(tmp_path, 'stage')] == [8, 32, 8]
    assert steps.CACHE.num_compiles - before == 3  # two batch sizes and the evaluation


def test_microbatches_are_recorded_and_train(tmp_path):
    train.train(tiny(**{'num_epochs': 1.0, 'batch.max_per_device': 2}), tmp_path)
    (stage,) = of_kind(tmp_path, 'stage')
    assert (stage['microbatch_size'], stage['num_microbatches']) == (2, 2)


def test_latest_and_best_checkpoints_are_kept(finished):
    directory, summary = finished
    folder = directory / checkpoint.FOLDER
    evaluations = of_kind(directory, 'eval')
    best = max(evaluations, key=lambda r: (r['accuracy'], r['step']))
    assert checkpoint.steps(folder)[-1] == summary['updates']
    assert checkpoint.best_step(folder) == best['step']
    assert len(checkpoint.steps(folder)) <= 3


def test_the_end_of_a_run_is_saved_with_its_evaluation(tmp_path):
    changes = {'eval_every_epochs': 0.4, 'checkpoint_every_epochs': 0.25, 'num_epochs': 1.0}
    summary = train.train(tiny(**changes), tmp_path)
    folder = tmp_path / checkpoint.FOLDER
    accuracy = {r['step']: r['accuracy'] for r in of_kind(tmp_path, 'eval')}
    assert summary['updates'] in accuracy
    assert accuracy[checkpoint.best_step(folder)] == max(accuracy.values())


def test_divergence_names_where_and_keeps_the_last_checkpoint(tmp_path):
    config = tiny(**{'learning_rate.effective': 1e20, 'learning_rate.warmup_epochs': 1.0})
    with pytest.raises(train.Diverged, match='update .* batch size 8, learning rate'):
        train.train(config, tmp_path)
    assert not of_kind(tmp_path, 'summary')


def test_a_work_directory_of_another_config_is_refused_with_the_keys(finished):
    directory, _ = finished
    before = {p: p.read_bytes() for p in directory.rglob('*') if p.is_file()}
    with pytest.raises(ConfigError, match=r'seed \(1 here, 0 there\)'):
        train.train(tiny(seed=1), directory)
    assert {p: p.read_bytes() for p in directory.rglob('*') if p.is_file()} == before


def test_keys_that_do_not_change_the_result_may_differ(finished):
    directory, summary = finished
    config = tiny(**{'dataset.eval_batch_size': 32, 'compile.precompile': False})
    assert train.train(config, directory)['params_digest'] == summary['params_digest']


def test_files_of_an_unknown_run_are_not_touched(tmp_path):
    (tmp_path / 'metrics.jsonl').write_text('{"kind": "train"}\n')
    with pytest.raises(ConfigError, match='holds metrics.jsonl but no config.json'):
        train.train(tiny(), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ['metrics.jsonl']


def test_restore_without_checkpoint_says_what_there_is(finished, tmp_path):
    with pytest.raises(FileNotFoundError, match='no checkpoint in'):
        train_state.restore(tmp_path)
    with pytest.raises(FileNotFoundError, match='it has those of steps'):
        train_state.restore(finished[0], step=10_000)


def test_digest_tells_states_apart_by_a_single_bit(finished):
    state = train_state.restore(finished[0])
    leaves, tree = jax.tree.flatten(state.params)
    leaves[0] = np.nextafter(np.asarray(leaves[0]), np.inf)
    other = state.replace(params=jax.tree.unflatten(tree, leaves))
    assert train_state.params_digest(other) != train_state.params_digest(state)
    assert train_state.params_digest(state.replace(step=state.step + 1)) == (
        train_state.params_digest(state)
    )
