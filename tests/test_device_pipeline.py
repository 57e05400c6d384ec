"""Data on the device: the same examples, pixels and weights as through tf.data, without TensorFlow."""

import itertools
import json

import jax
import numpy as np
import pytest
from runs import StopAt, of_kind, tiny, without_times

from adabatch_jax import distributed, experiment, input_pipeline, steps, train, train_state
from adabatch_jax.config import ConfigError, default_config, resolve

DEVICE = {'dataset.pipeline': 'device'}
SEVERAL = DEVICE | {'compile.updates_per_dispatch': 4}


def pipeline_of(**changes):
    parts = experiment.describe(resolve(tiny(**changes)))
    return parts, input_pipeline.create(parts.config, parts.info, parts.clock, parts.load)


@pytest.mark.parametrize('remainder', ['carry', 'drop'])
@pytest.mark.parametrize('augment', ['none', 'pad_crop', 'pad_crop_flip'])
def test_examples_and_pixels_are_those_of_tf_data(augment, remainder):
    changes = {'dataset.augment': augment, 'dataset.remainder': remainder, 'seed': 2**31 + 7}
    _, through_host = pipeline_of(**changes | {'dataset.pipeline': 'tf_data'})
    parts, on_device = pipeline_of(**changes | DEVICE)
    load = jax.jit(parts.load)
    updates = list(itertools.islice(parts.clock.updates(64, 24), 8))  # through the end of an epoch
    taken = on_device.take(updates)
    for k, expected in enumerate(itertools.islice(through_host.train_batches(64, 24), 8)):
        examples = {name: taken[name][:, k].reshape(-1) for name in ('example', 'epoch')}
        images, labels = load(taken['data'], examples)
        np.testing.assert_array_equal(examples['example'], expected['example'])
        np.testing.assert_array_equal(images, expected['image'])
        np.testing.assert_array_equal(labels, expected['label'])


def test_the_steps_of_one_seed_are_those_of_all():
    changes = DEVICE | {'dataset.name': 'digits', 'dataset.augment': 'pad_crop_flip'}
    a, b = (experiment.describe(resolve(tiny(**changes, seed=seed))) for seed in (0, 1))
    assert a.train_spec(8) == b.train_spec(8)


def test_one_update_and_several_take_the_same_examples():
    parts, pipeline = pipeline_of(**DEVICE)
    updates = list(itertools.islice(parts.clock.updates(40, 8), 3))
    together = pipeline.take(updates)
    assert together['example'].shape == (2, 3, 4)
    for k, update in enumerate(updates):
        alone = pipeline.take([update])
        np.testing.assert_array_equal(alone['example'], together['example'][:, k])
        np.testing.assert_array_equal(alone['epoch'], together['epoch'][:, k])


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """A run of each kind: through tf.data, from the device, and several updates at once."""
    kinds = {'host': {'dataset.pipeline': 'tf_data'}, 'device': DEVICE, 'several': SEVERAL}
    runs = {}
    for name, changes in kinds.items():
        directory = tmp_path_factory.mktemp(name)
        runs[name] = directory, train.train(tiny(**changes), directory)
    return runs


@pytest.mark.parametrize('kind', ['device', 'several'])
def test_a_run_has_the_records_of_one_through_tf_data(whole, kind):
    for record in ('train', 'eval', 'stage'):
        ours, theirs = (without_times(of_kind(whole[name][0], record)) for name in (kind, 'host'))
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            for rounded in ('loss', 'accuracy', 'memory_bytes', 'updates_per_dispatch'):
                x, y = a.pop(rounded, 0), b.pop(rounded, 0)
                assert rounded not in ('loss', 'accuracy') or x == pytest.approx(y, rel=1e-3, abs=0.02)
            assert a == b


def test_several_updates_at_once_give_the_weights_of_one_after_the_other():
    parts, pipeline = pipeline_of(**SEVERAL)
    updates = list(itertools.islice(parts.clock.updates(0, 8), 4))
    rates = np.linspace(0.02, 0.01, 4, dtype=np.float32)
    clocks = np.array([update.end for update in updates], np.uint32)

    def fresh():
        shape = parts.info.image_shape
        return distributed.replicate(train_state.create(parts.model, parts.optimizer, shape))

    one, several = (steps.compile_step(spec) for _, spec in sorted(parts.train_specs(8).items()))
    state, losses = fresh(), []
    for update, rate, clock in zip(updates, rates, clocks, strict=True):
        state, sums = one(state, pipeline.take([update]), rate, clock)
        losses.append(float(sums['loss']))
    together, sums = several(fresh(), pipeline.take(updates), rates, clocks)
    np.testing.assert_allclose(sums['loss'], losses, rtol=1e-4)
    assert int(together.step) == 4 and int(together.examples_seen) == 32
    for a, b in zip(*map(jax.tree.leaves, (state, together)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize('stop_at', [1, 3, 4])
def test_a_run_of_several_updates_at_once_continues_to_the_same_weights(whole, tmp_path, stop_at):
    with pytest.raises(train.Preempted):
        train.train(tiny(**SEVERAL), tmp_path, StopAt(stop_at))
    summary = train.train(tiny(**SEVERAL), tmp_path)
    assert summary['params_digest'] == whole['several'][1]['params_digest']


def test_updates_are_dispatched_together_up_to_whatever_comes_between(tmp_path, monkeypatch):
    """Stages of 13, 6 and 4 updates; evaluations and checkpoints end a dispatch."""
    dispatched = []
    original = train.Run.ahead

    def ahead(self):
        updates = original(self)
        dispatched.append(updates)
        return updates

    monkeypatch.setattr(train.Run, 'ahead', ahead)
    train.train(tiny(**SEVERAL), tmp_path)
    assert {len(updates) for updates in dispatched} == {1, 4}
    assert all(len({u.batch_size for u in updates}) == 1 for updates in dispatched)
    for updates in dispatched:
        # Half an epoch is 50 examples: nobody but the last update of a dispatch passes a multiple.
        assert all(u.start // 50 == u.end // 50 for u in updates[:-1])
    seen = list(itertools.chain.from_iterable(dispatched))
    assert all(a.end == b.start for a, b in itertools.pairwise(seen))


def test_policies_that_look_at_every_update_get_them_one_by_one():
    parts = experiment.describe(resolve(tiny(**SEVERAL | {'batch.policy': 'noise_scale'})))
    assert parts.updates_per_dispatch(8) == 1
    planned = {'batch.policy': 'adascale', 'batch.base_size': 16}  # but for its learning rates
    parts = experiment.describe(resolve(tiny(**SEVERAL | planned)))
    assert parts.updates_per_dispatch(16) == 1
    parts = experiment.describe(resolve(tiny(**SEVERAL)))
    assert parts.updates_per_dispatch(8) == 4
    many = {'compile.updates_per_dispatch': 10**9}
    parts = experiment.describe(resolve(tiny(**SEVERAL | many)))
    assert parts.updates_per_dispatch(8) == parts.plan.num_updates == 23


def test_an_accelerator_gets_full_dispatches_and_the_data(monkeypatch):
    monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
    parts = experiment.describe(resolve(tiny(**{'dataset.num_examples': 2 * 8 * 4096})))
    assert parts.load is not None
    assert parts.updates_per_dispatch(8) * 8 == experiment.DISPATCH_EXAMPLES == 4096
    assert parts.updates_per_dispatch(8192) == 1
    monkeypatch.setattr(input_pipeline, 'DEVICE_BYTES', 1000)
    assert experiment.describe(resolve(tiny())).load is None


def test_a_dispatch_is_no_longer_than_what_lies_between_two_pauses(monkeypatch):
    monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
    parts = experiment.describe(resolve(tiny(**{'dataset.num_examples': 12_000})))
    # Every half epoch, 6,000 examples: 750 updates, of which 512 at most at once; 93; 1.
    assert [parts.updates_per_dispatch(size) for size in (8, 64, 4096)] == [375, 46, 1]


@pytest.mark.parametrize(
    'changes, expected',
    [
        # An epoch of 50,000 is 390, 195, 97, 48 and 24 updates.
        ({}, {128: [30], 256: [15], 512: [7, 1], 1024: [4], 2048: [2]}),
        ({'checkpoint_every_epochs': 0.5}, {128: [27, 1], 256: [13, 1], 512: [8, 1]}),
        ({'dataset.remainder': 'carry'}, {128: [30, 1], 256: [15, 1]}),
        ({'checkpoint_every_epochs': 2.5}, {128: [30, 1], 256: [15, 1], 512: [7, 1]}),
        ({'eval_every_epochs': 2.0, 'checkpoint_every_epochs': 1e9}, {128: [31, 1], 2048: [2]}),
        ({'eval_every_epochs': 2.0, 'checkpoint_every_epochs': 2.0}, {128: [31, 1], 256: [15]}),
        ({'eval_every_epochs': 1e-6}, {128: [1], 2048: [1]}),
        ({'dataset.num_examples': 1000, 'batch.max_size': 512}, {2000: [1]}),  # for the benchmark only
        (
            {'batch.growth_epochs': 0.05, 'num_epochs': 1.0},
            {128: [1], 256: [1], 512: [1], 1024: [1]},
        ),
        ({'optimizer.name': 'svrg'}, {128: [30, 1]}),  # snapshots come in between
        ({'batch.policy': 'noise_scale'}, {128: [1]}),
    ],
)
def test_a_stage_waits_for_no_step_that_its_pauses_do_not_ask_for(changes, expected, monkeypatch):
    monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
    base = {'dataset.num_examples': 50_000, 'dataset.remainder': 'drop', 'num_epochs': 100.0}
    base |= {'eval_every_epochs': 1.0, 'checkpoint_every_epochs': 1.0, 'batch.base_size': 128}
    base |= {'batch.max_size': 2048, 'batch.growth_epochs': 20.0}
    parts = experiment.describe(resolve(tiny(**base | changes)))
    assert {size: list(parts.train_specs(size)) for size in expected} == expected


def test_an_update_that_was_not_expected_gets_its_step_when_it_comes(whole, tmp_path, monkeypatch):
    original = experiment.Experiment.train_specs

    def largest(self, batch_size):
        specs = original(self, batch_size)
        return {max(specs): specs[max(specs)]}

    steps.CACHE.clear()
    monkeypatch.setattr(experiment.Experiment, 'train_specs', largest)
    summary = train.train(tiny(**SEVERAL), tmp_path)
    assert summary['params_digest'] == whole['several'][1]['params_digest']
    entered = of_kind(tmp_path, 'stage')
    assert summary['compile_seconds'] > sum(record['compile_seconds'] for record in entered)
    assert [record['updates_per_dispatch'] for record in entered] == [4, 1, 1]


@pytest.mark.parametrize('several', [1, 2, 4])
def test_the_skipped_rest_of_an_epoch_ends_with_its_evaluation(tmp_path, several):
    changes = {
        'compile.updates_per_dispatch': several,
        'dataset.remainder': 'drop',
        'batch.policy': 'stages',
        'batch.stages': ((0.0, 8), (0.88, 16), (2.0, 8)),
        'checkpoint_every_epochs': 1.0,
    }
    train.train(tiny(**DEVICE | changes), tmp_path)
    # A batch of 16 does not fit behind 88 of 100 examples: the next epoch begins with it.
    assert [record['examples_seen'] for record in of_kind(tmp_path, 'eval')] == [100, 200, 300]


def test_data_that_a_device_has_no_room_for_are_refused_and_other_failures_are_loud(monkeypatch):
    def fails_with(message):
        def put(_):
            raise jax.errors.JaxRuntimeError(message)

        monkeypatch.setattr(distributed, 'put_everywhere', put)

    parts = experiment.describe(resolve(tiny(**DEVICE)))
    fails_with('RESOURCE_EXHAUSTED: Out of memory')
    with pytest.raises(ConfigError, match=r"config.dataset.pipeline: got 'device', .* GiB of synthetic"):
        parts.open_pipeline()
    fails_with('INTERNAL: something else')
    with pytest.raises(jax.errors.JaxRuntimeError, match='something else'):
        parts.open_pipeline()


def test_images_that_stay_on_disk_are_refused(tmp_path):
    for k in range(2):
        (tmp_path / 'train' / str(k)).mkdir(parents=True)
        (tmp_path / 'train' / str(k) / 'x.jpg').write_bytes(b'x')
    config = default_config()
    config.dataset.update(dict(name='image_folder', data_dir=str(tmp_path), pipeline='device'))
    config.dataset.update(dict(eval_split='train', augment='none'))
    config.batch.update(dict(policy='fixed', base_size=2))
    with pytest.raises(
        ConfigError, match="config.dataset.pipeline: got 'device'; accepted for image_fo"
    ):
        experiment.describe(resolve(config))


WITHOUT_TENSORFLOW = """
import importlib.machinery, sys
finder = importlib.machinery.PathFinder
original = finder.find_spec
def find_spec(name, *args):
    return None if name in ('tensorflow', 'tensorflow_datasets') else original(name, *args)
finder.find_spec = find_spec
from adabatch_jax import main
status = main.main(['main', *sys.argv[1:]])
assert not any(name.startswith('tensorflow') for name in sys.modules)
sys.exit(status)
"""


@pytest.mark.parametrize('pipeline', ['auto', 'device', 'tf_data'])
def test_without_tensorflow_only_what_needs_it_is_refused(command_line, tmp_path, pipeline):
    folder = tmp_path / 'data'
    folder.mkdir()
    rng = np.random.default_rng(0)
    for split in ('train', 'test'):
        images = rng.integers(256, size=(40, 8, 8, 3), dtype=np.uint8)
        np.savez(folder / f'{split}.npz', images=images, labels=np.arange(40) % 4)
    result = command_line(
        '-c', WITHOUT_TENSORFLOW, '--config=configs/quickstart.py', f'--workdir={tmp_path / "run"}',
        '--config.dataset.name=npz', f'--config.dataset.data_dir={folder}',
        f'--config.dataset.pipeline={pipeline}', '--config.num_epochs=2',
        '--config.batch.growth_epochs=1', module=None,
    )  # fmt: skip
    if pipeline == 'tf_data':
        assert result.returncode == 2
        assert result.stderr.startswith(
            'error: config.dataset: this data set or pipeline needs TensorFl'
        )
    else:
        assert result.returncode == 0, result.stderr
        assert (
            json.loads((tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()[-1])['updates'] == 4
        )
