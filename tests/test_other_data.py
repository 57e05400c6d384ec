"""A run goes on with the data that it began with, and is measured on them, in all processes."""

import json
import shutil

import numpy as np
import pytest
from runs import StopAt, tiny
from several_processes import FLAGS, finish, two
from test_encoded_images import write_folder

from adabatch_jax import analysis, input_pipeline, train
from adabatch_jax.config import ConfigError, resolve
from adabatch_jax.evaluate import evaluate_checkpoint


def draw(count, classes=10, scale=1):
    rng = np.random.default_rng(count)
    images = rng.integers(16, size=(count, 8, 8, 1), dtype=np.uint8) * np.uint8(scale)
    return images, np.arange(count) % classes


def write(folder, train, test):
    folder.mkdir(parents=True, exist_ok=True)
    for split, (images, labels) in {'train': train, 'test': test}.items():
        np.savez(folder / f'{split}.npz', images=images, labels=labels)


def files(directory):
    return {path: path.read_bytes() for path in directory.rglob('*') if path.is_file()}


def relabelled(count):
    images, labels = draw(count)
    return images, np.roll(labels, 1)


OTHERS = {  # what is there now, and what is said of it
    'brighter': ((draw(100, scale=15), draw(60)), 'data with mean .*, and the data set has'),
    'half': ((draw(50), draw(60)), 'a run on 100 training examples, and the data set has 50 now'),
    'relabelled': ((relabelled(100), draw(60)), 'data with fingerprint .*, and the data set has'),
    'one class less': ((draw(100, 9), draw(60, 9)), 'num_classes 10, and the data set has 9 now'),
    'other test images': ((draw(100), draw(10)), 'num_eval 60, and the data set has 10 now'),
}


@pytest.fixture(scope='module')
def stopped(tmp_path_factory):
    folder = tmp_path_factory.mktemp('stopped')
    write(folder / 'data', draw(100), draw(60))
    config = tiny(
        **{'dataset.name': 'npz', 'dataset.data_dir': str(folder / 'data'), 'model.name': 'linear'}
    )
    with pytest.raises(train.Preempted):
        train.train(config, folder / 'run', StopAt(5))
    return folder, config


@pytest.mark.parametrize('other', OTHERS)
def test_a_run_whose_data_were_replaced_is_neither_continued_nor_measured_on_them(stopped, other):
    folder, config = stopped
    (data, expected), before = OTHERS[other], files(folder / 'run')
    write(folder / 'data', *data)
    try:
        with pytest.raises(ConfigError, match=f'workdir: there is .*{expected}'):
            train.train(config, folder / 'run')
        measures = [
            lambda: evaluate_checkpoint(resolve(config), folder / 'run'),
            lambda: analysis.analyze(resolve(config), folder / 'run', progress=print),
        ]
        for measure in measures[other == 'other test images' :]:  # which may be evaluated on
            with pytest.raises(ConfigError, match=expected):
                measure()
        assert files(folder / 'run') == before
    finally:
        write(folder / 'data', draw(100), draw(60))
    assert evaluate_checkpoint(resolve(config), folder / 'run')['num_examples'] == 60


def of_source(num_classes, mean, std):
    sizes = {'train': 12, 'test': 12}
    source = input_pipeline.Source((6, 5, 1), num_classes, mean, std, sizes, lambda split: None)
    same = source.image_shape, source.num_classes, source.mean, source.std
    return input_pipeline.DatasetInfo(12, 12, *same, False, '')


def test_data_are_the_same_whatever_the_last_digits_of_their_moments_and_the_kind_of_their_numbers():
    plain, other = of_source(3, (7.3,), (1.1,)), of_source(np.int64(3), 7.3 + 1e-14, [1.1 - 1e-14])
    saved = json.loads(json.dumps(other.as_saved()))
    assert plain.as_saved() == saved
    plain.check({'data': saved})
    with pytest.raises(ValueError, match=r'data with std \[1.1\], and the data set has \[1.2\] now'):
        of_source(3, 7.3, 1.2).check({'data': saved})
    with pytest.raises(ValueError, match='num_classes: got 2.5; accepted: a whole number above 0'):
        of_source(2.5, 7.3, 1.1)


def test_classes_that_were_renamed_are_other_data(tmp_path):
    folder = write_folder(tmp_path)
    changes = {'dataset.name': 'image_folder', 'dataset.data_dir': str(folder)}
    changes |= {'dataset.eval_split': 'val', 'dataset.augment': 'none', 'batch.max_size': 8}
    config = tiny(**changes, **{'model.name': 'linear', 'num_epochs': 1.0})
    train.train(config, tmp_path / 'run')
    for split in ('train', 'val'):
        if (folder / split / 'cat').exists():
            shutil.move(folder / split / 'cat', folder / split / 'zebra')
    with pytest.raises(ConfigError, match='data with fingerprint .* bring it back as it was'):
        evaluate_checkpoint(resolve(config), tmp_path / 'run')


@pytest.mark.parametrize('mode', ['train', 'eval'])
def test_processes_with_data_of_their_own_are_refused(tmp_path, mode):
    """Each has a shard as its data set, as other frameworks ask for."""
    for k in range(2):
        write(tmp_path / f'shard{k}', draw(64, scale=1 + 14 * k), draw(60))
    flags = ('-m', 'adabatch_jax.main', *FLAGS, '--config.dataset.name=npz')
    flags += (f'--workdir={tmp_path / "run"}', '--config.model.name=linear')
    commands = [(*flags, f'--config.dataset.data_dir={tmp_path / f"shard{k}"}') for k in range(2)]
    if mode == 'eval':
        ends = finish(two(commands[0], commands[0]), timeout=120)
        assert [status for _, status in ends] == [0, 0], ends
        commands = [(*command, '--mode=eval') for command in commands]
    ends = finish(two(*commands), timeout=120)
    assert [status for _, status in ends] == [2, 2], ends
    assert 'config.dataset, mean: got ' in ends[0][0] + ends[1][0]
