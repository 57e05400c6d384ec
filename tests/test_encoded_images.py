"""Encoded images: folders and records, windows against NumPy, resuming, and what is wrong with them."""

import errno
import gc
import itertools
import json
import threading
import time
import weakref

import numpy as np
import pytest

from adabatch_jax import analysis, input_pipeline, main, metrics, schedules, train
from adabatch_jax import config as config_module
from adabatch_jax.config import default_config, resolve, to_json
from adabatch_jax.experiment import describe
from adabatch_jax.input_pipeline import datasets, encoded, order

tf = datasets.tensorflow()
from adabatch_jax.input_pipeline import decoding  # noqa: E402

CLASSES = ('cat', 'dog', 'eel')
SIDE = 8


def picture(seed, height=12, width=16):
    """A smooth picture, so that JPEG keeps it nearly as it is."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    slopes = rng.uniform(-6, 6, (2, 3))
    pixels = 128 + rows[..., None] * slopes[0] + columns[..., None] * slopes[1]
    return np.clip(pixels, 0, 255).astype(np.uint8)


@pytest.fixture
def folder(tmp_path):
    """``train`` with 4 + 5 + 6 images, ``val`` with 2 of each class; JPEG and one PNG each."""
    for split, counts in (('train', (4, 5, 6)), ('val', (2, 2, 2))):
        for label, (name, count) in enumerate(zip(CLASSES, counts, strict=True)):
            where = tmp_path / split / name
            where.mkdir(parents=True)
            for k in range(count):
                pixels = picture(100 * label + k, 12 + k, 16)
                encode = tf.io.encode_png if k == 1 else lambda p: tf.io.encode_jpeg(p, quality=100)
                suffix = 'png' if k == 1 else 'JPEG'
                (where / f'{k}.{suffix}').write_bytes(encode(pixels).numpy())
    return tmp_path


def make_pipeline(data_dir, **changes):
    config = default_config()
    settings = {
        'dataset.name': 'image_folder',
        'dataset.data_dir': str(data_dir),
        'dataset.eval_split': 'val',
        'dataset.augment': 'random_resized_crop',
        'dataset.image_size': SIDE,
    }
    config.update_from_flattened_dict(settings | changes)
    config = resolve(config)
    info = input_pipeline.dataset_info(config.dataset)
    clock = schedules.Clock(info.num_train, 1000, config.dataset.remainder)
    return input_pipeline.create(config, info, clock)


def take(pipeline, start, batch_size, count, **options):
    return list(itertools.islice(pipeline.train_batches(start, batch_size, **options), count))


def test_folders_are_classes_and_splits(folder):
    pipeline = make_pipeline(folder)
    split = pipeline._train
    assert np.bincount(split.labels).tolist() == [4, 5, 6]
    assert all(CLASSES[split.labels[k]] in split.name(k) for k in range(15))
    info = input_pipeline.dataset_info(_dataset(folder))
    assert (info.image_shape, info.num_classes, info.num_train, info.num_eval) == ((8, 8, 3), 3, 15, 6)


def test_the_images_of_a_folder_are_in_the_same_order_in_every_version(folder):
    split = input_pipeline.open_split(_dataset(folder), 'train')
    paths = sorted(str(path) for path in (folder / 'train').glob('*/*'))
    expected = [paths[k] for k in np.random.default_rng(0).permutation(15)]
    assert [split.name(k) for k in range(15)] == expected


def _dataset(folder, **changes):
    config = default_config()
    config.dataset.update(
        dict(
            name='image_folder', data_dir=str(folder), eval_split='val', augment='none', image_size=SIDE
        )
        | changes
    )
    return config.dataset


def test_a_slice_of_a_folder_has_examples_of_every_class(folder):
    for k in range(30):
        (folder / 'train' / 'cat' / f'more{k}.jpg').write_bytes(b'')
        (folder / 'train' / 'eel' / f'more{k}.jpg').write_bytes(b'')
    split = input_pipeline.open_split(_dataset(folder), 'train[:50%]')
    assert len(split) == 38
    assert set(split.labels) == {0, 1, 2}


def test_every_example_comes_once_an_epoch_with_its_label_over_changing_batches(folder):
    pipeline = make_pipeline(folder)
    batches = take(pipeline, 0, 2, 4) + take(pipeline, 8, 6, 2) + take(pipeline, 20, 10, 1)
    ids = np.concatenate([b['example'] for b in batches])
    labels = np.concatenate([b['label'] for b in batches])
    assert sorted(ids[:15]) == sorted(ids[15:]) == list(range(15))
    np.testing.assert_array_equal(labels, pipeline._train.labels[ids])
    np.testing.assert_array_equal(ids, order.examples_at(0, 15, 0, 30)[0])


def test_pixels_depend_on_the_example_and_epoch_not_on_the_batch_or_where_a_run_began(folder):
    pipeline = make_pipeline(folder)
    whole = np.concatenate([b['image'] for b in take(pipeline, 0, 6, 10)])
    tail = np.concatenate([b['image'] for b in take(pipeline, 22, 2, 19)])
    np.testing.assert_array_equal(whole[22:], tail)
    first, second = (
        dict(zip(ids, whole[part], strict=True))
        for part in (slice(0, 15), slice(15, 30))
        for ids in [order.examples_at(0, 15, part.start, 15)[0]]
    )
    assert np.mean([(first[k] != second[k]).any() for k in range(15)]) > 0.8


def test_what_is_analyzed_is_the_same_for_every_seed_and_not_augmented(folder):
    def fixed(seed):
        config = default_config()
        config.seed, config.model.name = seed, 'cnn'
        config.dataset.update(_dataset(folder, augment='random_resized_crop'))
        config.batch.update(dict(policy='fixed', base_size=4))
        return analysis.fixed_examples(describe(resolve(config)), 8)

    (images, labels), (again, _) = fixed(0), fixed(5)
    np.testing.assert_array_equal(images, again)
    assert images.shape == (8, SIDE, SIDE, 3) and len(set(labels)) == 3
    plain = make_pipeline(folder, **{'dataset.augment': 'none'})
    (whole,) = take(plain, 0, 15, 1)
    everything = {image.tobytes() for image in whole['image']}
    assert {image.tobytes() for image in images} <= everything


def test_parts_of_a_batch_hold_the_next_rows_of_every_device(folder):
    pipeline = make_pipeline(folder, **{'dataset.augment': 'none'})
    (whole,) = take(pipeline, 0, 12, 1)
    parts = take(pipeline, 0, 12, 3, num_parts=3)
    for key in ('example', 'image'):
        rows = whole[key].reshape(2, 3, 2, *whole[key].shape[1:])  # two devices, three parts
        for k, part in enumerate(parts):
            np.testing.assert_array_equal(part[key], rows[:, k].reshape(4, *whole[key].shape[1:]))


def reference_window(words, height, width, min_area):
    """The window of a random-resized crop, in plain Python."""
    uniform = [int(word) / 2**32 for word in words]
    for area_draw, ratio_draw in zip(uniform[:10], uniform[10:20], strict=True):
        area = height * width * (min_area + area_draw * (1 - min_area))
        ratio = np.exp((2 * ratio_draw - 1) * np.log(4 / 3))
        h, w = round(np.sqrt(area / ratio)), round(np.sqrt(area * ratio))
        if 1 <= h <= height and 1 <= w <= width:
            return int(uniform[20] * (height - h + 1)), int(uniform[21] * (width - w + 1)), h, w
    h, w = min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))
    return (height - h + 1) // 2, (width - w + 1) // 2, h, w


@pytest.mark.parametrize('height, width', [(64, 64), (500, 375), (7, 90), (90, 7), (1, 1)])
def test_random_windows_are_those_of_the_definition(folder, height, width):
    pipeline = make_pipeline(folder)
    words = order.random_bits(3, np.arange(200), np.arange(200), 23).astype(np.int64)
    for row in words:
        window = [int(v) for v in pipeline._random_window(tf.constant(row), height, width)]
        expected = reference_window(row, height, width, 0.08)
        assert window == list(expected)
        top, left, h, w = window
        assert 0 <= top <= top + h <= height and 0 <= left <= left + w <= width


def test_random_windows_cover_the_range_of_areas_and_aspects(folder):
    pipeline = make_pipeline(folder, **{'dataset.min_crop_area': 0.25})
    words = order.random_bits(0, np.zeros(2000, int), np.arange(2000), 23).astype(np.int64)
    windows = np.array([pipeline._random_window(tf.constant(w), 400, 400) for w in words[:400]])
    area = windows[:, 2] * windows[:, 3] / 400**2
    ratio = windows[:, 3] / windows[:, 2]
    assert 0.24 < area.min() < 0.3 and 0.9 < area.max() <= 1
    assert 0.74 < ratio.min() < 0.8 and 1.25 < ratio.max() < 1.34


def test_evaluation_takes_the_centre_as_resizing_and_cropping_would(folder):
    """A picture as large as the crop is asked to be: only cropped, so its pixels can be compared."""
    where = folder / 'val' / 'cat'
    for file in where.iterdir():
        file.unlink()
    pixels = np.random.default_rng(0).integers(0, 256, (20, 14, 3), np.uint8)
    (where / 'a.png').write_bytes(tf.io.encode_png(pixels).numpy())
    pipeline = make_pipeline(folder, **{'dataset.eval_resize': 14})
    (batch,) = pipeline.eval_batches(6)
    assert batch['mask'].tolist() == [1, 1, 1, 1, 1, 0]  # one fewer than a batch
    (cat,) = np.flatnonzero((batch['label'] == 0) & (batch['mask'] == 1))
    np.testing.assert_array_equal(batch['image'][cat], pixels[6:14, 3:11])


def test_evaluation_counts_every_image_once(folder):
    pipeline = make_pipeline(folder)
    batches = list(pipeline.eval_batches(4))
    assert [b['mask'].sum() for b in batches] == [4, 2]
    labels = np.concatenate([b['label'] for b in batches])
    assert sorted(labels) == [-1, -1, 0, 0, 1, 1, 2, 2]


# ------------------------------------------------------------------------------- TFDS records


def write_records(folder, counts, labels=None, file_format='tfrecord'):
    """A TFDS data set ``pictures`` without TFDS: metadata, and ``counts`` records a file."""
    folder = folder / 'pictures' / '1.10.0'
    folder.mkdir(parents=True)
    shape = {'dimensions': ['-1', '-1', '3']}
    features = {'image': {'image': {'shape': shape}}, 'label': {'classLabel': {'numClasses': '3'}}}
    (folder / 'features.json').write_text(json.dumps({'featuresDict': {'features': features}}))
    splits = [{'name': 'train', 'shardLengths': [str(c) for c in counts]}]
    info = {'fileFormat': file_format, 'splits': splits}
    (folder / 'dataset_info.json').write_text(json.dumps(info))
    labels = iter(labels or itertools.cycle(range(3)))
    for shard, count in enumerate(counts):
        path = folder / f'pictures-train.tfrecord-{shard:05d}-of-{len(counts):05d}'
        with tf.io.TFRecordWriter(str(path)) as writer:
            for k in range(count):
                jpeg = tf.io.encode_jpeg(picture(1000 * shard + k), quality=100).numpy()
                feature = {
                    'image': tf.train.Feature(bytes_list=tf.train.BytesList(value=[jpeg])),
                    'label': tf.train.Feature(int64_list=tf.train.Int64List(value=[next(labels)])),
                }
                example = tf.train.Example(features=tf.train.Features(feature=feature))
                writer.write(example.SerializeToString())
    return folder


RECORDS = {'dataset.name': 'pictures', 'dataset.eval_split': 'train[:50%]'}


def test_records_are_read_at_random_as_they_were_written(tmp_path):
    older = tmp_path / 'pictures' / '1.9.0'
    older.mkdir(parents=True)
    (older / 'dataset_info.json').write_text('an older version, and no JSON')
    write_records(tmp_path, (5, 4))
    pipeline = make_pipeline(tmp_path, **RECORDS, **{'dataset.augment': 'none'})
    batches = take(pipeline, 4, 6, 4)
    ids = np.concatenate([b['example'] for b in batches])
    labels = np.concatenate([b['label'] for b in batches])
    np.testing.assert_array_equal(ids, order.examples_at(0, 9, 4, 24)[0])
    np.testing.assert_array_equal(labels, ids % 3)
    (folder,) = (tmp_path / 'pictures').glob('1.10.0')
    data = tf.data.TFRecordDataset(sorted(map(str, folder.glob('*.tfrecord-*'))))
    assert [pipeline._train.read(k) for k in range(9)] == list(data.as_numpy_iterator())


def test_records_that_are_cut_off_or_missing_are_refused_by_name(tmp_path):
    folder = write_records(tmp_path, (5, 4))
    first, second = sorted(folder.glob('*.tfrecord-*'))
    whole = second.read_bytes()
    second.write_bytes(whole[:-7])
    with pytest.raises(ValueError, match=rf'{second.name}.*inside a record'):
        make_pipeline(tmp_path, **RECORDS)
    second.write_bytes(first.read_bytes())
    with pytest.raises(ValueError, match=rf'{second.name}.*5 records, its data set says 4'):
        make_pipeline(tmp_path, **RECORDS)
    second.unlink()
    with pytest.raises(FileNotFoundError, match=second.name):
        make_pipeline(tmp_path, **RECORDS)


@pytest.mark.parametrize('label', [3, -1])
def test_labels_out_of_range_in_records_are_refused_by_name(tmp_path, label):
    write_records(tmp_path, (5,), labels=[0, 1, 2, label, 0])
    pipeline = make_pipeline(tmp_path, **RECORDS)
    with pytest.raises(decoding.DataError, match=rf'of-00001.*got label {label}; accepted: 0 to 2'):
        take(pipeline, 0, 4, 3)


def test_a_damaged_record_is_named_or_left_out(tmp_path):
    folder = write_records(tmp_path, (5, 4))
    first = min(folder.glob('*.tfrecord-*'))
    content = bytearray(first.read_bytes())
    content[12:30] = b'\xfb' * 18  # of the first record, after its header
    first.write_bytes(content)
    with pytest.raises(decoding.DataError, match=rf'{first.name}, byte 12: .*not a tf.train.Example'):
        take(make_pipeline(tmp_path, **RECORDS), 0, 9, 1)
    (batch,) = take(make_pipeline(tmp_path, **RECORDS, **{'dataset.skip_undecodable': True}), 0, 9, 1)
    np.testing.assert_array_equal(batch['label'] < 0, batch['example'] == 0)


@pytest.mark.parametrize(
    'text',
    [
        '{',
        '[]',
        'null',
        '{}',
        '{"splits": null}',
        '{"splits": []}',
        '{"splits": ["train"]}',
        '{"splits": [{}]}',
    ],
)
@pytest.mark.parametrize('name', ['pictures', 'cifar10'])
def test_metadata_that_cannot_be_read_is_refused_by_folder(tmp_path, text, name):
    folder = write_records(tmp_path, (2,))
    (folder / 'dataset_info.json').write_text(text)
    folder.parent.rename(tmp_path / name)
    with pytest.raises(ValueError, match=rf"{name}/1.10.0' is not a TFDS folder"):
        input_pipeline.dataset_info(_dataset(tmp_path, name=name))


def test_a_version_that_was_not_built_to_its_end_is_passed_over(tmp_path):
    folder = write_records(tmp_path, (2,))
    unfinished = folder.with_name('1.11.0.incompleteAB')
    unfinished.mkdir()
    (unfinished / 'dataset_info.json').write_bytes((folder / 'dataset_info.json').read_bytes())
    info = input_pipeline.dataset_info(_dataset(tmp_path, name='pictures', eval_split='train'))
    assert info.num_train == 2


def test_an_empty_split_does_not_make_the_others_unusable(tmp_path):
    folder = write_records(tmp_path, (2,))
    info = json.loads((folder / 'dataset_info.json').read_text())
    info['splits'].append({'name': 'test'})  # as TFDS writes it
    (folder / 'dataset_info.json').write_text(json.dumps(info))
    info = input_pipeline.dataset_info(_dataset(tmp_path, name='pictures', eval_split='train'))
    assert info.num_train == 2


@pytest.mark.parametrize('name', ['pictures', 'cifar10'])
def test_other_file_formats_are_refused_by_the_plan(tmp_path, name):
    write_records(tmp_path, (2,), file_format='array_record').parent.rename(tmp_path / name)
    with pytest.raises(ValueError, match="'array_record'; accepted: tfrecord"):
        input_pipeline.dataset_info(_dataset(tmp_path, name=name))


@pytest.mark.parametrize('name', ['pictures', 'mnist'])
def test_other_features_are_refused_by_the_plan(tmp_path, name):
    folder = write_records(tmp_path, (2,))
    features = folder / 'features.json'
    features.write_text(features.read_text().replace('{"image": {"image"', '{"img": {"image"'))
    folder.parent.rename(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name}/.*' is not .* with the features image and label"):
        input_pipeline.dataset_info(_dataset(tmp_path, name=name))


def test_imagenet_can_be_planned_without_its_data_and_says_how_to_get_it(tmp_path):
    dataset = _dataset(tmp_path, name='imagenet2012', eval_split='validation', image_size=0)
    info = input_pipeline.dataset_info(dataset)
    assert (info.num_train, info.num_eval, info.num_classes) == (1_281_167, 50_000, 1000)
    assert info.image_shape == (224, 224, 3)
    with pytest.raises(FileNotFoundError, match='fetched by hand'):
        input_pipeline.open_split(dataset, 'train')


# ----------------------------------------------------------------------------------- mistakes


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


@pytest.mark.parametrize('channels', [1, 3, 4])
def test_a_bmp_may_have_a_byte_for_each_channel(folder, channels):
    from PIL import Image

    for file in (folder / 'val' / 'cat').iterdir():
        file.unlink()
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, channels), np.uint8)
    Image.fromarray(pixels[..., 0] if channels == 1 else pixels).save(folder / 'val' / 'cat' / 'a.bmp')
    pipeline = make_pipeline(folder, **{'dataset.eval_resize': SIDE})
    (batch,) = pipeline.eval_batches(5)
    expected = np.broadcast_to(pixels[..., :3], (1, SIDE, SIDE, 3))
    np.testing.assert_array_equal(batch['image'][batch['label'] == 0], expected)


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


@pytest.mark.parametrize(
    'break_it, message',
    [
        (lambda f: (f / 'train' / 'fox').mkdir(), r"class folder '.*train/fox' has no images"),
        (lambda f: (f / 'val' / 'fox').mkdir(), r"val/fox' is a class that the training split does not"),
    ],
)
def test_folders_that_do_not_fit_are_refused_by_name(folder, break_it, message):
    break_it(folder)
    with pytest.raises(ValueError, match=message):
        input_pipeline.dataset_info(_dataset(folder))


@pytest.mark.parametrize(
    'changes, message',
    [
        ({'data_dir': '/nowhere'}, "no folders in '/nowhere'"),
        ({'eval_split': 'test'}, "got 'test'; accepted: train, val"),
        ({'num_classes': 5}, 'num_classes: got 5, but the data has 3'),
        (
            {'augment': 'pad_crop'},
            "augment: got 'pad_crop'; accepted for image_folder: none, random",
        ),
        ({'name': 'digits', 'augment': 'random_resized_crop'}, 'accepted for digits: none, pad_crop'),
        ({'eval_resize': 7}, r'eval_resize: got 7; accepted: at least image_size \(8\), or 0'),
    ],
)
def test_settings_that_do_not_fit_the_data_are_refused(folder, changes, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        input_pipeline.dataset_info(_dataset(folder, **changes))


def test_an_image_added_to_a_folder_is_seen_by_the_next_run(folder):
    assert input_pipeline.dataset_info(_dataset(folder)).num_train == 15
    more = folder / 'train' / 'cat' / 'new.jpg'
    more.write_bytes((folder / 'train' / 'cat' / '0.JPEG').read_bytes())
    assert input_pipeline.dataset_info(_dataset(folder)).num_train == 16


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


def test_a_closed_pipeline_leaves_no_threads(folder):
    pipeline = make_pipeline(folder)
    take(pipeline, 0, 4, 2)
    assert any(t.is_alive() for t in pipeline._readers._threads)
    pipeline.close()
    assert not [t for t in pipeline._readers._threads if t.join(10) or t.is_alive()]


def test_a_closed_pipeline_keeps_no_tables_of_its_images(folder):
    """tf.data keeps the generators of a process's pipelines; a notebook trains again and again."""
    pipeline = make_pipeline(folder)
    take(pipeline, 0, 4, 2)
    list(pipeline.eval_batches(4))
    tables = [weakref.ref(split) for split in (pipeline._train, pipeline._eval)]
    pipeline.close()
    for thread in pipeline._readers._threads:
        thread.join(10)
    gc.collect()
    assert [table() for table in tables] == [None, None]
