"""Encoded images: folders of classes, the order of examples, and windows against NumPy."""

import gc
import itertools
import weakref

import numpy as np
import pytest

from adabatch_jax import analysis, input_pipeline, schedules
from adabatch_jax.config import default_config, resolve
from adabatch_jax.experiment import describe
from adabatch_jax.input_pipeline import datasets, order

tf = datasets.tensorflow()

CLASSES = ('cat', 'dog', 'eel')
SIDE = 8


def picture(seed, height=12, width=16):
    """A smooth picture, so that JPEG keeps it nearly as it is."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    slopes = rng.uniform(-6, 6, (2, 3))
    pixels = 128 + rows[..., None] * slopes[0] + columns[..., None] * slopes[1]
    return np.clip(pixels, 0, 255).astype(np.uint8)


def write_folder(tmp_path):
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


folder = pytest.fixture(write_folder)


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
    info = input_pipeline.dataset_info(dataset_config(folder))
    assert (info.image_shape, info.num_classes, info.num_train, info.num_eval) == ((8, 8, 3), 3, 15, 6)


def test_the_images_of_a_folder_are_in_the_same_order_in_every_version(folder):
    split = input_pipeline.open_split(dataset_config(folder), 'train')
    paths = sorted(str(path) for path in (folder / 'train').glob('*/*'))
    expected = [paths[k] for k in np.random.default_rng(0).permutation(15)]
    assert [split.name(k) for k in range(15)] == expected


def dataset_config(folder, **changes):
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
    split = input_pipeline.open_split(dataset_config(folder), 'train[:50%]')
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
        config.dataset.update(dataset_config(folder, augment='random_resized_crop'))
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


def test_crops_are_mirrored_where_their_last_draw_says(folder):
    for k, file in enumerate((folder / 'train').glob('*/*')):
        pixels = np.random.default_rng(k).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
        file.write_bytes(tf.io.encode_png(pixels).numpy())
    (augmented,) = take(make_pipeline(folder, **{'dataset.min_crop_area': 1.0}), 0, 30, 1)
    whole = make_pipeline(folder, **{'dataset.augment': 'none', 'dataset.eval_resize': SIDE})
    (plain,) = take(whole, 0, 30, 1)
    examples, epochs = order.examples_at(0, 15, 0, 30)
    mirrored = order.random_bits(0, epochs, examples, 23)[:, -1] >= 2**31
    expected = np.where(mirrored[:, None, None, None], plain['image'][:, :, ::-1], plain['image'])
    np.testing.assert_array_equal(augmented['image'], expected)
    assert 5 < mirrored.sum() < 25


def test_images_are_made_smaller_by_weights_of_a_triangle_and_rounded(folder):
    pixels = np.zeros((2 * SIDE, 2 * SIDE, 3), np.uint8)
    pixels[:, 6] = 255
    for file in (folder / 'val').glob('*/*'):
        file.write_bytes(tf.io.encode_png(pixels).numpy())
    (batch,) = make_pipeline(folder, **{'dataset.eval_resize': SIDE}).eval_batches(6)
    row = np.array([0, 0, 32, 96, 0, 0, 0, 0])  # an eighth of 255, and three eighths
    np.testing.assert_array_equal(batch['image'], np.broadcast_to(row[:, None], (6, SIDE, SIDE, 3)))


def test_evaluation_takes_224_of_256_pixels_where_no_size_is_asked_for(folder):
    window = make_pipeline(folder)._central_window(None, 256, 320)
    assert [int(value) for value in window] == [16, 48, 224, 224]


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
        input_pipeline.dataset_info(dataset_config(folder))


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
        input_pipeline.dataset_info(dataset_config(folder, **changes))


def test_hidden_files_and_folders_are_no_examples_and_no_classes(folder):
    (folder / 'train' / 'cat' / '._0.JPEG').write_bytes(b'of an archive made on a Mac')
    (folder / 'train' / '.cache').mkdir()
    info = input_pipeline.dataset_info(dataset_config(folder))
    assert (info.num_train, info.num_classes) == (15, 3)


def test_an_image_added_to_a_folder_is_seen_by_the_next_run(folder):
    assert input_pipeline.dataset_info(dataset_config(folder)).num_train == 15
    more = folder / 'train' / 'cat' / 'new.jpg'
    more.write_bytes((folder / 'train' / 'cat' / '0.JPEG').read_bytes())
    assert input_pipeline.dataset_info(dataset_config(folder)).num_train == 16


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
