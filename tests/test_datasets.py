"""Data sets by name, their splits and slices, and what of one's own is refused."""

import dataclasses
import math
import os
import types

import numpy as np
import pytest
from runs import tiny

from adabatch_jax import input_pipeline
from adabatch_jax.config import ConfigError, default_config, resolve
from adabatch_jax.experiment import describe
from adabatch_jax.input_pipeline import datasets, npz


@pytest.mark.parametrize(
    'split, expected',
    [
        ('train', range(200)),
        ('train[:20%]', range(40)),
        ('train[50%:]', range(100, 200)),
        ('train[10:-10]', range(10, 190)),
        ('train[-5:]', range(195, 200)),
    ],
)
def test_splits_are_sliced_by_number_and_percent(split, expected):
    assert datasets.split_range(split, {'train': 200}) == expected


def sliced(part, size):
    """The examples of a slice of so many, also where there are none."""
    try:
        return list(datasets.split_range(f'train[{part}]', {'train': size}))
    except ValueError as error:
        assert 'which has no examples' in str(error)
        return []


@pytest.mark.parametrize('size', [1, 5, 7, 40, 50, 101])
def test_shares_of_a_split_leave_nothing_out_and_do_not_overlap(size):
    for share in range(1, 100):
        for first, second in (
            (f':{share}%', f'{share}%:'),
            (f':-{share}%', f'-{share}%:'),
            (f':{share}%', f'-{100 - share}%:'),
        ):
            assert sliced(first, size) + sliced(second, size) == list(range(size)), (first, second)


def test_a_share_from_the_end_that_rounds_to_nothing_is_not_the_whole_split():
    with pytest.raises(ValueError, match=r"'train\[-1%:\]', which has no examples; train has 40"):
        datasets.split_range('train[-1%:]', {'train': 40})


@pytest.mark.parametrize('size', [1, 5, 7, 40, 50, 101])
def test_shares_from_the_start_are_those_of_tfds(size):
    import tensorflow_datasets as tfds

    for share in range(1, 101):
        instruction = tfds.core.ReadInstruction.from_spec(f'train[:{share}%]')
        (its,) = instruction.to_absolute({'train': types.SimpleNamespace(num_examples=size)})
        assert sliced(f':{share}%', size) == list(range(size))[its.from_ : its.to]


@pytest.mark.parametrize('name', ['val.v2', 'my train', 'ü+1'])
def test_a_split_may_have_any_name_without_brackets(name):
    assert datasets.split_range(f'{name}[:50%]', {name: 10}) == range(5)
    assert datasets.split_range(name, {name: 10}) == range(10)


@pytest.mark.parametrize('split', ['train[:500%]', 'train[:201]', 'train[-201:]', 'train[101%:]'])
def test_slices_beyond_a_split_are_refused(split):
    with pytest.raises(
        ValueError, match='train_split: got .*; accepted: up to 100% or 200, the examples of train'
    ):
        datasets.split_range(split, {'train': 200}, 'train_split')


@pytest.mark.parametrize('split', ['valid', 'train[5', 'train[20:10]', 'train[a:b]', '', 'train[:0%]'])
def test_splits_that_are_not_there_are_refused(split):
    with pytest.raises(ValueError, match='split: got'):
        datasets.split_range(split, {'train': 200})


@pytest.mark.parametrize('key', ['train_split', 'eval_split'])
@pytest.mark.parametrize('name', ['digits', 'npz', 'image_folder'])
def test_a_split_that_is_not_there_is_named_by_its_key(tmp_path, name, key):
    save_npz(tmp_path)
    for split in ('train', 'test'):
        (tmp_path / split / 'a').mkdir(parents=True)
    config = default_config()
    config.dataset.update(dict(name=name, data_dir=str(tmp_path), augment='none'))
    config.dataset[key] = 'valid'
    with pytest.raises(ValueError, match=f"^{key}: got 'valid'; accepted: test, train(,|$)"):
        input_pipeline.dataset_info(config.dataset)


@pytest.mark.parametrize('name', ['cifar10', 'cifar100'])
def test_cifar_has_the_moments_of_the_official_code_of_adabatch(tmp_path, name):
    config = default_config()
    config.dataset.update(dict(name=name, data_dir=str(tmp_path)))
    info = input_pipeline.dataset_info(config.dataset)
    assert info.mean == pytest.approx(255 * np.array([0.4914, 0.4822, 0.4465]))
    assert info.std == pytest.approx(255 * np.array([0.2023, 0.1994, 0.2010]))


def test_splits_that_are_made_have_the_same_classes_and_other_examples_and_a_seed_its_own():
    config = default_config()
    config.dataset.update(dict(name='synthetic', num_examples=400, num_classes=4, image_size=8))
    wanted = (('train', 3), ('test', 3), ('train', 4))
    splits = [datasets.load_split(config.dataset, split, seed) for split, seed in wanted]
    train, test, other = (
        np.stack([images[labels == k].mean(0) for k in range(4)]) for images, labels in splits
    )
    # Means of about 100 examples with noise of 32 differ by 3.6 on average, those of classes by 36.
    assert 2 < np.abs(train - test).mean() < 6 < 20 < np.abs(train - test[::-1]).mean()
    assert np.abs(train - other).mean() > 20 and (splits[0][1] != splits[2][1]).any()


@pytest.fixture
def own(monkeypatch):
    """A data set of one's own, of 12 images, with labels as given."""

    def add(labels, **changes):
        images = np.zeros((12, 8, 8, 1), np.uint8)
        fields = {'mean': [100.0], 'std': np.array([50.0])} | changes
        fields = {'image_shape': [8, 8, 1], 'sizes': {'train': 12, 'test': 12}} | fields

        def create(dataset, seed):
            read = lambda split: (images, labels)  # noqa: E731
            return input_pipeline.Source(num_classes=2, read=read, **fields)

        monkeypatch.setitem(input_pipeline.SOURCES, 'own', create)
        config = default_config()
        config.dataset.name = 'own'
        return config.dataset

    return add


@pytest.mark.parametrize('labels', [np.arange(12, dtype=np.uint8) % 2, [0, 1] * 6])
def test_labels_of_an_own_data_set_may_be_whole_numbers_of_any_type(own, labels):
    found = datasets.load_split(own(labels), 'test[:4]')[1]
    assert found.dtype == np.int32 and found.tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize('labels', [np.arange(12) % 3, np.arange(12) % 2 - 1])
def test_labels_of_an_own_data_set_are_those_of_its_classes(own, labels):
    with pytest.raises(ValueError, match='got labels .*; expected labels from 0 on, below 2'):
        datasets.load_split(own(labels), 'test')


@pytest.mark.parametrize('labels', [np.zeros(8, int), np.zeros(24, int), np.zeros((12, 1), int)])
def test_an_own_data_set_has_a_label_for_each_image(own, labels):
    with pytest.raises(ValueError, match=r'and labels \(.*expected \(12, 8, 8, 1\) and \(12,\)'):
        datasets.load_split(own(labels), 'test')


@pytest.mark.parametrize(
    'changes', [{'std': (0.0,)}, {'mean': (1.0, 2.0, 3.0)}, {'mean': math.nan}, {'std': [math.inf]}]
)
def test_an_own_data_set_has_moments_for_each_channel(own, changes):
    with pytest.raises(ValueError, match='accepted: a number for each of the 1 channels, std above 0'):
        input_pipeline.dataset_info(own(np.zeros(12, int), **changes))


@pytest.mark.parametrize(
    'changes, message',
    [
        ({'image_shape': (8, 8)}, r'^image_shape: got \(8, 8\); accepted: height, width and channels$'),
        ({'image_shape': (8, 8.0, 1)}, r'^image_shape: got \(8.0, 8.0, 1.0\); accepted'),
        ({'sizes': {}}, '^sizes: got {}; accepted: the number of examples by split$'),
        ({'sizes': 300}, '^sizes: got 300; accepted: the number of examples by split$'),
        ({'sizes': {'train': 12.0}}, "^sizes: got {'train': 12.0}; accepted"),
    ],
)
def test_an_own_data_set_has_images_of_one_shape_and_splits(own, changes, message):
    with pytest.raises(ValueError, match=message):
        input_pipeline.dataset_info(own(np.zeros(12, int), **changes))


def test_a_function_for_a_data_set_that_returns_none_is_named(own, monkeypatch):
    dataset = own(np.zeros(12, int))
    monkeypatch.setitem(input_pipeline.SOURCES, 'own', lambda dataset, seed: None)
    with pytest.raises(ValueError, match=r"^name: got 'own', .* returns a NoneType; accepted"):
        input_pipeline.dataset_info(dataset)


def test_a_source_in_place_of_its_function_is_named(own, monkeypatch):
    dataset = own(np.zeros(12, int))
    source = input_pipeline.SOURCES['own'](dataset, 0)
    monkeypatch.setitem(input_pipeline.SOURCES, 'own', source)
    with pytest.raises(ValueError, match=r"^name: got 'own', which in SOURCES is a Source; accepted: a"):
        input_pipeline.dataset_info(dataset)


def test_the_moments_of_one_channel_may_be_numbers(own):
    info = input_pipeline.dataset_info(own(np.zeros(12, int), mean=3.0, std=2.0))
    assert (info.mean, info.std) == ((3.0,), (2.0,))


@pytest.mark.parametrize('given', [None, ([np.zeros((8, 8, 1)), np.zeros((9, 8, 1))], [0, 1]), 'abc'])
def test_what_an_own_data_set_reads_has_to_be_images_and_labels(own, monkeypatch, given):
    dataset = own(np.zeros(12, int))
    source = input_pipeline.SOURCES['own'](dataset, 0)
    broken = dataclasses.replace(source, read=lambda split: given)
    monkeypatch.setitem(input_pipeline.SOURCES, 'own', lambda dataset, seed: broken)
    with pytest.raises(ValueError, match='data set own, split test: .*; accepted: images of one shape'):
        datasets.load_split(dataset, 'test')


def save_npz(folder, count=12, labels=None, **arrays):
    rng = np.random.default_rng(0)
    images = rng.integers(256, size=(count, 6, 5, 3), dtype=np.uint8)
    labels = np.arange(count) % 3 if labels is None else labels
    for split in ('train', 'test'):
        np.savez(folder / f'{split}.npz', **({'images': images, 'labels': labels} | arrays))
    return images, labels


def test_npz_that_was_replaced_is_read_anew(tmp_path):
    for labels in (np.zeros(12, int), np.ones(12, int)):
        save_npz(tmp_path, labels=labels)
        os.utime(tmp_path / 'train.npz', (labels[0], labels[0]))
        np.testing.assert_array_equal(datasets.load_split(npz_config(tmp_path), 'train')[1], labels)


def test_npz_folder_may_hold_other_files(tmp_path):
    save_npz(tmp_path)
    np.savez(tmp_path / 'stats.npz', mean=0.0)
    assert input_pipeline.dataset_info(npz_config(tmp_path)).num_eval == 12


def npz_config(folder):
    config = default_config()
    config.dataset.update(dict(name='npz', data_dir=str(folder)))
    return config.dataset


def test_npz_folder_gives_its_shape_moments_and_images(tmp_path):
    images, labels = save_npz(tmp_path)
    info = input_pipeline.dataset_info(npz_config(tmp_path))
    assert (info.image_shape, info.num_classes, info.num_train) == ((6, 5, 3), 3, 12)
    np.testing.assert_allclose(info.mean, images.mean(axis=(0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(info.std, images.std(axis=(0, 1, 2)), rtol=1e-9)
    loaded = datasets.load_split(npz_config(tmp_path), 'test[:5]')
    np.testing.assert_array_equal(loaded[0], images[:5])
    np.testing.assert_array_equal(loaded[1], labels[:5])


def test_npz_has_the_moments_and_classes_of_its_training_images(tmp_path):
    images = np.zeros((4, 8, 8, 1), np.uint8)
    images[::2] = 10
    save_npz(tmp_path, images=images, labels=np.arange(4))
    np.savez(tmp_path / 'test.npz', images=0 * images, labels=np.zeros(4, int))
    info = input_pipeline.dataset_info(npz_config(tmp_path))
    assert (info.num_classes, info.mean, info.std) == (4, (5.0,), (5.0,))


def test_a_channel_of_one_value_is_divided_by_a_thousandth(tmp_path):
    images = np.full((4, 8, 8, 2), 9, np.uint8)
    images[::2, ..., 0] = 7
    save_npz(tmp_path, images=images, labels=np.arange(4))
    assert input_pipeline.dataset_info(npz_config(tmp_path)).std == pytest.approx((1.0, 1e-3))


def test_moments_are_exact_in_parts_and_of_images_of_one_value(monkeypatch):
    images = np.random.default_rng(0).integers(256, size=(11, 6, 5, 3), dtype=np.uint8)
    monkeypatch.setattr(npz, '_COUNTED', 4 * 6 * 5 * 3)
    mean, std = npz._moments(images)
    np.testing.assert_allclose(mean, images.mean(axis=(0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(std, images.std(axis=(0, 1, 2)), rtol=1e-9)
    for value in range(256):
        mean, std = npz._moments(np.full((7, 3, 3, 1), value, np.uint8))
        assert mean == pytest.approx(value) and std == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    'arrays, message',
    [
        ({'images': np.zeros((12, 6, 5, 3))}, 'accepted: uint8'),
        ({'labels': np.zeros(11, int)}, 'whole numbers from 0'),
        (
            {'labels': np.full(12, -1)},
            'int64 and shape .12,., -1 to -1; accepted: 12 whole numbers from 0',
        ),
        ({'labels': np.array([0] * 11 + [2**32 + 1])}, '0 to 4294967297; .* below 1,048,576'),
        ({'labels': np.array([0] * 11 + [2**63 + 1], np.uint64)}, '0 to 9223372036854775809'),
        ({'labels': np.array([0] * 11 + [2**31 - 1], np.int32)}, '0 to 2147483647'),
        ({'labels': np.array([{}] * 12, object)}, 'cannot read'),
    ],
)
def test_npz_with_wrong_arrays_is_refused(tmp_path, arrays, message):
    save_npz(tmp_path, **arrays)
    with pytest.raises(ValueError, match=message):
        input_pipeline.dataset_info(npz_config(tmp_path))


def test_npz_that_is_missing_or_damaged_is_refused_by_name(tmp_path):
    with pytest.raises(FileNotFoundError, match='no .npz file in'):
        input_pipeline.dataset_info(npz_config(tmp_path))
    save_npz(tmp_path)
    (tmp_path / 'train.npz').write_bytes((tmp_path / 'train.npz').read_bytes()[:300])
    with pytest.raises(ValueError, match='cannot read .*train.npz'):
        input_pipeline.dataset_info(npz_config(tmp_path))


def test_tfds_data_that_is_missing_names_the_folder_and_the_way_out(tmp_path):
    config = default_config()
    config.dataset.data_dir = str(tmp_path)
    assert input_pipeline.dataset_info(config.dataset).num_train == 50_000  # the plan needs no data
    with pytest.raises(FileNotFoundError) as raised:
        datasets.load_split(config.dataset, 'train')
    assert str(tmp_path) in str(raised.value) and 'tfds build cifar10' in str(raised.value)


def test_tfds_data_is_read_from_its_folder(tmp_path):
    """A folder in TFDS's own format, made here with TFDS's own writer."""
    import tensorflow_datasets as tfds

    rng = np.random.default_rng(0)
    images = rng.integers(256, size=(30, 32, 32, 3), dtype=np.uint8)
    tfds.dataset_builders.store_as_tfds_dataset(
        name='cifar10',
        version='3.0.2',
        data_dir=tmp_path,
        split_datasets={
            name: [(k, {'id': str(k), 'image': x, 'label': k % 10}) for k, x in enumerate(part)]
            for name, part in (('train', images[:20]), ('test', images[20:]))
        },
        features=tfds.features.FeaturesDict(
            {
                'id': tfds.features.Text(),
                'image': tfds.features.Image(shape=(32, 32, 3), encoding_format='png'),
                'label': tfds.features.ClassLabel(num_classes=10),
            }
        ),
        disable_shuffling=True,
    )
    config = default_config()
    config.dataset.data_dir = str(tmp_path)
    info = input_pipeline.dataset_info(config.dataset)
    assert (info.num_train, info.num_eval) == (20, 10)
    loaded, labels = datasets.load_split(config.dataset, 'train[5:]')
    np.testing.assert_array_equal(loaded, images[5:20])
    np.testing.assert_array_equal(labels, np.arange(5, 20) % 10)
    # Another version than that of TFDS's own code is read as well; damage is told with its file.
    folder = (tmp_path / 'cifar10/3.0.2').rename(tmp_path / 'cifar10/3.0.1')
    np.testing.assert_array_equal(datasets.load_split(config.dataset, 'train')[0], images[:20])
    train, test = (next(folder.glob(f'*-{split}.tfrecord-*')) for split in ('train', 'test'))
    whole = train.read_bytes()
    train.write_bytes(whole[:-9])
    with pytest.raises(ValueError, match=f'{train.name}.* ends inside a record'):
        datasets.load_split(config.dataset, 'train')
    train.write_bytes(whole[:50] + bytes(4) + whole[54:])
    with pytest.raises(ValueError, match='cannot read .*3.0.1.: corrupted record at 12$'):
        datasets.load_split(config.dataset, 'train')
    test.unlink()
    with pytest.raises(FileNotFoundError, match=f'{test.name}.* is missing; fetch the data set again'):
        datasets.load_split(config.dataset, 'test')
    # One that comes after the plan is checked before it is read.
    source = input_pipeline.SOURCES['cifar10'](config.dataset, 0)
    described = folder / 'dataset_info.json'
    described.write_text(described.read_text().replace('tfrecord', 'array_record'))
    with pytest.raises(ValueError, match="'array_record'; accepted: tfrecord"):
        source.read('train')


def test_unknown_data_set_lists_what_exists():
    config = default_config()
    config.dataset.name = 'cifar'
    with pytest.raises(ValueError, match="name: got 'cifar'; accepted: digits, synthetic, npz"):
        input_pipeline.dataset_info(config.dataset)


def test_tensorflow_that_holds_a_gpu_already_is_told_with_the_way_out(monkeypatch):
    config = datasets.tensorflow().config

    def fixed(devices, kind):
        raise RuntimeError('Visible devices cannot be modified after being initialized')

    monkeypatch.setattr(config, 'set_visible_devices', fixed)
    with pytest.raises(ValueError, match='uses one in this process already; .* restart the kernel'):
        datasets.tensorflow()


def test_images_that_are_too_many_for_memory_are_a_mistake_in_the_data_set():
    dataset = {'dataset.image_size': 2**16 - 1, 'dataset.num_classes': 2**24 - 1}
    experiment = describe(resolve(tiny(**dataset)))
    with pytest.raises(ConfigError, match='^config.dataset: Unable to allocate .* PiB'):
        experiment.open_pipeline()
