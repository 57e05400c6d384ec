"""Encoded images that cannot be decoded or read: named, left out or tried again, in whole runs too."""

import errno
import itertools
import pathlib
import threading
import time

import numpy as np
import pytest
from test_encoded_images import SIDE, make_pipeline, take, tf, write_folder

from adabatch_jax import config as config_module
from adabatch_jax import input_pipeline, main, metrics, train
from adabatch_jax.config import default_config, to_json
from adabatch_jax.input_pipeline import datasets, decoding, encoded, order

folder = pytest.fixture(write_folder)


def test_an_image_that_cannot_be_decoded_is_named(folder):
    bad = folder / 'train' / 'dog' / '3.JPEG'
    bad.write_bytes(bad.read_bytes()[:40])
    pipeline = make_pipeline(folder)
    with pytest.raises(decoding.DataError, match=r'dog/3\.JPEG: cannot be decoded.*skip_undecodable'):
        take(pipeline, 0, 6, 3)


def test_images_that_cannot_be_decoded_are_left_out_where_that_is_asked_for(folder, capsys):
    clean = take(make_pipeline(folder), 0, 6, 5)
    for name in ('dog/3.JPEG', 'eel/0.JPEG'):
        (folder / 'train' / name).write_bytes(b'no image')
    (folder / 'val' / 'cat' / '0.JPEG').write_bytes(b'')
    pipeline = make_pipeline(folder, **{'dataset.skip_undecodable': True})
    dirty = take(pipeline, 0, 6, 5)
    left_out = 0
    for a, b in zip(clean, dirty, strict=True):
        np.testing.assert_array_equal(a['example'], b['example'])
        good = b['label'] >= 0
        left_out += (~good).sum()
        np.testing.assert_array_equal(a['image'][good], b['image'][good])
        assert not b['image'][~good].any()
    assert left_out == 4  # two images, two epochs
    assert sum(b['mask'].sum() for b in pipeline.eval_batches(4)) == 5
    said = capsys.readouterr().out
    assert said.count('left out') == 3 and 'eel/0.JPEG' in said  # each is named once


def test_an_image_that_another_stream_found_damaged_is_left_out_of_one_that_has_read_ahead(folder):
    """As the next stage's first batches are made while the present one still trains."""
    clean = take(make_pipeline(folder), 0, 3, 5)
    for name in ('dog/3.JPEG', 'eel/0.JPEG'):
        (folder / 'train' / name).write_bytes(b'no image')
    pipeline = make_pipeline(folder, **{'dataset.skip_undecodable': True})
    present, ahead = (pipeline.train_batches(0, size) for size in (3, 15))
    batches = [next(present)]
    time.sleep(1)  # until it has read all that there is
    next(ahead)
    batches += [next(present) for _ in range(4)]
    assert sum((batch['label'] < 0).sum() for batch in batches) == 2
    for a, b in zip(clean, batches, strict=True):
        np.testing.assert_array_equal(a['example'], b['example'])


def test_an_image_that_is_cut_off_is_left_out_wherever_a_run_begins(folder):
    """Its crop may be whole in one epoch and not in another."""
    for file in (folder / 'train').glob('*/*.JPEG'):
        rows = np.random.default_rng(0).integers(0, 256, (64, 16, 3), np.uint8)
        jpeg = tf.io.encode_jpeg(rows, quality=90).numpy()
        file.write_bytes(jpeg[: len(jpeg) * 9 // 10])
    settings = {'dataset.skip_undecodable': True, 'dataset.min_crop_area': 0.01}
    whole = take(make_pipeline(folder, **settings), 0, 5, 12)
    labels = np.concatenate([b['label'] for b in whole])
    cut = np.array(['JPEG' in make_pipeline(folder)._train.name(k) for k in range(15)])
    ids = np.concatenate([b['example'] for b in whole])
    assert (labels[~cut[ids]] >= 0).all()
    assert (labels[cut[ids]] < 0).any() and (labels[cut[ids]] >= 0).any()
    late = take(make_pipeline(folder, **settings), 30, 5, 6)
    np.testing.assert_array_equal(np.concatenate([b['label'] for b in late]), labels[30:])


def failing_reads(monkeypatch, file, fails):
    """Reads of a file fail, after all their tries, or not: as ``fails`` says of one after the other."""
    read, turns = encoded.EncodedSplit.read, iter(fails)

    def reading(split, example):
        if split.name(example).endswith(file) and next(turns):
            raise OSError(errno.EIO, 'Input/output error')
        return read(split, example)

    monkeypatch.setattr(encoded.EncodedSplit, 'read', reading)


@pytest.mark.parametrize('skip', [False, True])
def test_a_disk_that_is_back_after_a_read_failed_changes_nothing(folder, monkeypatch, capsys, skip):
    expected = take(make_pipeline(folder), 0, 5, 6)
    failing_reads(monkeypatch, 'dog/3.JPEG', itertools.chain([True], itertools.repeat(False)))
    batches = take(make_pipeline(folder, **{'dataset.skip_undecodable': skip}), 0, 5, 6)
    for a, b in zip(expected, batches, strict=True):
        for key in ('example', 'label', 'image'):
            np.testing.assert_array_equal(a[key], b[key])
    assert 'left out' not in capsys.readouterr().out


@pytest.mark.parametrize('skip', [False, True])
def test_an_image_that_cannot_be_read_is_an_error_and_never_left_out(folder, monkeypatch, skip):
    failing_reads(monkeypatch, 'dog/3.JPEG', itertools.repeat(True))
    pipeline = make_pipeline(folder, **{'dataset.skip_undecodable': skip})
    with pytest.raises(decoding.DataError, match=r'dog/3\.JPEG: could not be read \(Input/output'):
        take(pipeline, 0, 5, 3)


def test_an_image_that_was_damaged_once_is_not_left_out_where_it_cannot_be_read(folder):
    (folder / 'val' / 'dog' / '0.JPEG').write_bytes(b'no image')
    pipeline = make_pipeline(folder, **{'dataset.skip_undecodable': True})
    assert sum(batch['mask'].sum() for batch in pipeline.eval_batches(6)) == 5
    (folder / 'val' / 'dog' / '0.JPEG').unlink()
    with pytest.raises(decoding.DataError, match=r'dog/0\.JPEG: could not be read \(No such file'):
        list(pipeline.eval_batches(6))


def test_a_disk_that_fails_again_and_again_is_given_up(folder, monkeypatch):
    """It reads whenever the images are tried one by one."""
    failing_reads(monkeypatch, 'val/dog/0.JPEG', itertools.cycle([True, False]))
    with pytest.raises(decoding.DataError, match=r'val/dog/0\.JPEG: could not be read'):
        list(make_pipeline(folder).eval_batches(6))


# ----------------------------------------------------------------------------------- whole runs


def run_config(folder, **changes):
    config = default_config()
    settings = {
        'num_epochs': 4.0,
        'model.name': 'cnn',
        'dataset.name': 'image_folder',
        'dataset.data_dir': str(folder),
        'dataset.eval_split': 'val',
        'dataset.augment': 'random_resized_crop',
        'dataset.image_size': SIDE,
        'dataset.skip_undecodable': True,
        'batch.base_size': 4,
        'batch.growth_epochs': 2.0,
        'learning_rate.reference_batch_size': 4,
        'log_every_steps': 3,
    }
    config.update_from_flattened_dict(settings | changes)
    return config


def test_a_run_on_a_folder_counts_what_it_left_out_and_continues_to_the_same_weights(folder, tmp_path):
    (folder / 'train' / 'eel' / '3.JPEG').write_bytes(b'no image')
    config = run_config(folder)
    whole = train.train(config, tmp_path / 'whole')
    records = metrics.read_records(tmp_path / 'whole')
    trains = [r for r in records if r['kind'] == 'train']
    split = input_pipeline.open_split(config.dataset, 'train')
    (bad,) = (k for k in range(15) if split.name(k).endswith('eel/3.JPEG'))
    seen = order.examples_at(0, 15, 0, trains[-1]['examples_seen'])[0]
    assert sum(r.get('left_out', 0) for r in trains) == (seen == bad).sum() >= 4
    stop = threading.Event()
    stop.set()  # stops after the first update, and after each one that follows
    for _ in range(3):
        with pytest.raises(train.Preempted):
            train.train(config, tmp_path / 'stopped', stop)
    continued = train.train(config, tmp_path / 'stopped')
    assert continued['params_digest'] == whole['params_digest']


def test_an_update_none_of_whose_images_can_be_decoded_does_not_end_the_run(folder, tmp_path):
    for file in sorted((folder / 'train').glob('*/*'))[:10]:
        file.write_bytes(b'no image')
    config = run_config(
        folder, **{'batch.base_size': 2, 'batch.policy': 'plateau', 'log_every_steps': 1}
    )
    summary = train.train(config, tmp_path / 'run')
    trains = [r for r in metrics.read_records(tmp_path / 'run') if r['kind'] == 'train']
    assert summary['updates'] == len(trains) == 30
    empty = [r for r in trains if r.get('left_out') == r['batch_size']]
    assert empty and all(r['loss'] is None for r in empty)
    assert sum(r.get('left_out', 0) for r in trains) == 10 * 4


def config_file(folder, config):
    file = folder / 'config.py'
    file.write_text(
        'from adabatch_jax import config\n\n\n'
        f'def get_config():\n    return config.from_json({to_json(config)!r})\n'
    )
    return file


@pytest.mark.parametrize('where', ['train', 'val'])
def test_an_undecodable_image_ends_the_command_with_2_and_one_line(
    folder, where, tmp_path, command_line
):
    (folder / where / 'dog' / '0.JPEG').write_bytes(b'no image')
    file = config_file(tmp_path, run_config(folder, **{'dataset.skip_undecodable': False}))
    result = command_line(f'--config={file}', f'--workdir={tmp_path / "run"}')
    assert result.returncode == 2
    assert result.stderr.startswith(f'error: config.dataset: {folder}/{where}/dog/0.JPEG: cannot be')
    assert result.stderr.count('\n') == 1
    # What it offers is possible with the same work directory.
    flags = (f'--config={file}', f'--workdir={tmp_path / "run"}')
    assert main.main(['main', *flags, '--config.dataset.skip_undecodable=True']) == 0


def test_an_image_that_cannot_be_decoded_may_be_removed_before_the_first_checkpoint(folder, tmp_path):
    image = folder / 'train/dog/0.JPEG'
    image.write_bytes(b'no image')
    config = run_config(folder, **{'dataset.skip_undecodable': False})
    with pytest.raises(config_module.ConfigError, match='repair or remove it'):
        train.train(config, tmp_path / 'run')
    image.unlink()
    assert train.train(config, tmp_path / 'run')['updates'] > 0


def test_a_damaged_image_that_no_update_takes_does_not_end_a_run(folder, tmp_path):
    config = run_config(folder, **{'dataset.skip_undecodable': False, 'num_epochs': 0.6})
    taken, _ = order.examples_at(config.seed, 15, 0, 15)
    split = datasets.open_split(config.dataset, 'train')
    pathlib.Path(split.name(taken[12])).write_bytes(b'no image')  # the first one after three updates
    assert train.train(config, tmp_path / 'run')['updates'] == 3


@pytest.mark.parametrize('where', ['train', 'val'])
def test_images_none_of_which_can_be_decoded_are_no_divergence_but_a_mistake(folder, where, tmp_path):
    for image in (folder / where).glob('*/*'):
        image.write_bytes(b'no image')
    with pytest.raises(config_module.ConfigError, match='none of the images can be decoded'):
        train.train(run_config(folder), tmp_path / 'run')


def test_a_folder_that_has_other_images_than_a_run_began_with_is_refused(folder, tmp_path):
    config, stop = run_config(folder), threading.Event()
    stop.set()
    with pytest.raises(train.Preempted):
        train.train(config, tmp_path / 'run', stop)
    before = (tmp_path / 'run' / 'plan.json').read_bytes()
    (folder / 'train' / 'cat' / 'new.png').write_bytes((folder / 'train/cat/1.png').read_bytes())
    with pytest.raises(config_module.ConfigError, match='a run on 15 training examples.* has 16 now'):
        train.train(config, tmp_path / 'run')
    assert (tmp_path / 'run' / 'plan.json').read_bytes() == before
