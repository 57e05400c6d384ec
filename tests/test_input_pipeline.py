"""Order, augmentation and batches, against NumPy and against what every example must see once."""

import collections
import gc
import itertools
import weakref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adabatch_jax import input_pipeline, schedules
from adabatch_jax.config import default_config, resolve
from adabatch_jax.input_pipeline import datasets, order


def make_pipeline(remainder='carry', augment='none', **changes):
    config = default_config()
    config.dataset.name = 'synthetic'
    config.dataset.num_examples = 50
    config.dataset.image_size = 8
    config.dataset.augment = augment
    config.dataset.crop_padding = 2
    config.dataset.remainder = remainder
    config.update_from_flattened_dict(changes)
    config = resolve(config)
    info = input_pipeline.dataset_info(config.dataset)
    clock = schedules.Clock(info.num_train, 1000, config.dataset.remainder)
    return input_pipeline.create(config, info, clock), clock


def take(pipeline, start, batch_size, count):
    return list(itertools.islice(pipeline.train_batches(start, batch_size), count))


def run_schedule(pipeline, clock, batches):
    """Example ids of a run through stages of (batch size, number of updates), and its end."""
    position, ids = 0, []
    for batch_size, count in batches:
        for batch in take(pipeline, position, batch_size, count):
            update = clock.update_at(position, batch_size)
            ids.append((update.start, batch['example']))
            position = update.end
    return ids, position


SCHEDULES = [
    [(8, 40)],
    [(4, 25), (8, 12), (16, 15)],  # transitions inside an epoch
    [(16, 5), (3, 20), (50, 3), (7, 9)],  # shrinks, a whole epoch, odd sizes
]


@pytest.mark.parametrize('batches', SCHEDULES)
def test_carry_shows_every_example_once_per_epoch_over_any_schedule(batches):
    pipeline, clock = make_pipeline('carry')
    ids, end = run_schedule(pipeline, clock, batches)
    stream = np.concatenate([i for _, i in ids])
    assert len(stream) == end
    for epoch in range(end // 50):
        assert sorted(stream[50 * epoch : 50 * (epoch + 1)]) == list(range(50))


# Of each whole epoch of a schedule: what is left of its 50 where the next batch is larger.
DROPPED = [[2] * 6, [2, 2, 6, 2, 10, 2, 2, 2, 2], [2, 0, 8, 0, 0, 0, 1]]


@pytest.mark.parametrize('batches, dropped', [*zip(SCHEDULES, DROPPED, strict=True)])
def test_drop_shows_once_in_an_epoch_all_but_its_partial_batch_over_any_schedule(batches, dropped):
    pipeline, clock = make_pipeline('drop')
    ids, end = run_schedule(pipeline, clock, batches)
    seen = collections.defaultdict(list)
    for start, examples in ids:
        assert start // 50 == (start + len(examples) - 1) // 50, 'a batch crosses epochs'
        seen[start // 50].extend(examples)
    assert all(len(set(examples)) == len(examples) for examples in seen.values())
    assert [50 - len(seen[epoch]) for epoch in range(end // 50)] == dropped


def test_a_change_of_batch_size_in_mid_epoch_keeps_the_order():
    pipeline, _ = make_pipeline()
    whole = np.concatenate([b['example'] for b in take(pipeline, 0, 10, 10)])
    tail = np.concatenate([b['example'] for b in take(pipeline, 24, 4, 19)])
    np.testing.assert_array_equal(whole[24:], tail)


def test_epochs_differ_in_order_and_seeds_differ_in_order():
    first, second = order.epoch_order(0, 0, 1000), order.epoch_order(0, 1, 1000)
    assert (first != second).mean() > 0.9
    assert all((x != order.epoch_order(1, 0, 1000)).mean() > 0.9 for x in (first, second))


def test_the_order_of_a_seed_and_epoch_is_the_same_in_every_version():
    expected = np.random.default_rng((5, 2)).permutation(100)
    np.testing.assert_array_equal(order.epoch_order(5, 2, 100), expected)


def test_images_that_are_made_are_those_of_the_seed():
    pipeline, _ = make_pipeline(seed=5)
    config = default_config()
    config.dataset.update(dict(name='synthetic', num_examples=50, image_size=8))
    (train,), (test,) = take(pipeline, 0, 50, 1), pipeline.eval_batches(50)
    images, _ = datasets.load_split(config.dataset, 'train', seed=5)
    np.testing.assert_array_equal(train['image'], images[train['example']])
    np.testing.assert_array_equal(test['image'], datasets.load_split(config.dataset, 'test', seed=5)[0])


def test_augmentation_depends_on_the_example_and_epoch_not_on_the_batch():
    pipeline, _ = make_pipeline(augment='pad_crop_flip')

    def pixels(start, batch_size, count):
        seen = {}
        for k, batch in enumerate(take(pipeline, start, batch_size, count)):
            for j, (example, image) in enumerate(zip(batch['example'], batch['image'], strict=True)):
                seen[(start + k * batch_size + j) // 50, example] = image
        return seen

    small, large = pixels(0, 4, 25), pixels(0, 25, 4)
    assert small.keys() == large.keys() and len(small) == 100
    assert all(np.array_equal(small[key], large[key]) for key in small)
    changed = [not np.array_equal(small[0, e], small[1, e]) for e in range(50)]
    assert np.mean(changed) > 0.8


def test_crop_and_flip_are_those_of_a_loop_over_padded_images():
    pipeline, _ = make_pipeline(augment='pad_crop_flip')
    config = default_config()
    config.dataset.update(dict(name='synthetic', num_examples=50, image_size=8))
    images, labels = datasets.load_split(config.dataset, 'train')
    (batch,) = take(pipeline, 60, 20, 1)
    examples, epochs = order.examples_at(0, 50, 60, 20)
    offsets, mirrored = order.crop_and_flip(0, epochs, examples, 2, True)
    assert mirrored.any() and not mirrored.all()
    for k, example in enumerate(examples):
        top, left = offsets[k]
        expected = np.pad(images[example], [(2, 2), (2, 2), (0, 0)])[top : top + 8, left : left + 8]
        expected = expected[:, ::-1] if mirrored[k] else expected
        np.testing.assert_array_equal(batch['image'][k], expected)
    np.testing.assert_array_equal(batch['label'], labels[examples])


def test_random_draws_are_uniform_and_uncorrelated():
    epochs, examples = np.divmod(np.arange(100_000), 1000)
    bits = order.random_bits(3, epochs, examples, 3)
    unit = bits / 2**32
    # Means of 100,000 uniform draws deviate by 0.0009; bounds at five of those.
    np.testing.assert_allclose(unit.mean(axis=0), 0.5, atol=5 * 12**-0.5 / 100_000**0.5)
    assert np.abs(np.corrcoef(unit.T) - np.eye(3)).max() < 5 / 100_000**0.5
    assert np.abs(np.corrcoef(unit[:-1, 0], unit[1:, 0])[0, 1]) < 5 / 100_000**0.5
    assert np.abs(np.corrcoef(unit[:-1000, 0], unit[1000:, 0])[0, 1]) < 5 / 100_000**0.5


@settings(max_examples=30, deadline=None)
@given(num_eval=st.integers(1, 40), batch_size=st.integers(1, 24))
def test_evaluation_counts_every_example_once(num_eval, batch_size):
    pipeline, _ = make_pipeline(**{'dataset.eval_split': f'test[:{num_eval}]'})
    images, labels = [], []
    for batch in pipeline.eval_batches(batch_size):
        assert batch['image'].shape == (batch_size, 8, 8, 3)
        real = batch['mask'] == 1
        images.append(batch['image'][real])
        labels.append(batch['label'][real])
    expected_images, expected_labels = pipeline._eval
    assert len(expected_labels) == num_eval
    np.testing.assert_array_equal(np.concatenate(images), expected_images)
    np.testing.assert_array_equal(np.concatenate(labels), expected_labels)


def test_digits_are_split_without_overlap():
    config = default_config()
    config.dataset.name = 'digits'
    info = input_pipeline.dataset_info(config.dataset)
    assert (info.num_train, info.num_eval, info.image_shape) == (1437, 360, (8, 8, 1))
    images, labels = datasets.load_split(config.dataset, 'train')
    assert images.dtype == np.uint8 and set(labels) == set(range(10))
    np.testing.assert_allclose(images.mean(), info.mean[0], rtol=0.02)
    np.testing.assert_allclose(images.std(), info.std[0], rtol=0.02)


def test_the_digits_of_each_split_are_the_same_in_every_version():
    from sklearn.datasets import load_digits

    config = default_config()
    config.dataset.name = 'digits'
    target = load_digits().target[np.random.default_rng(0).permutation(1797)]
    for split, expected in (('test', target[:360]), ('train', target[360:])):
        np.testing.assert_array_equal(datasets.load_split(config.dataset, split)[1], expected)


def test_images_and_labels_cannot_be_changed_for_later_runs():
    dataset = default_config().dataset
    dataset.name = 'digits'
    images, labels = datasets.load_split(dataset, 'train')
    with pytest.raises(ValueError, match='read-only'):
        images[:] = 0
    kept, labels[:] = labels.copy(), 0
    np.testing.assert_array_equal(datasets.load_split(dataset, 'train')[1], kept)


@pytest.mark.parametrize('side, labels', [(4, [0, 1, 2]), (8, [0, 1, 4])])
def test_npz_to_evaluate_on_is_refused_by_the_plan_where_it_is_not_as_that_to_train_on(
    tmp_path, side, labels
):
    for split, width, classes in (('train', 8, [0, 1, 2]), ('test', side, labels)):
        images = np.zeros((3, 8, width, 1), np.uint8)
        np.savez(tmp_path / f'{split}.npz', images=images, labels=classes)
    dataset = default_config().dataset
    dataset.update(name='npz', data_dir=str(tmp_path))
    with pytest.raises(ValueError, match='^data set npz, split test: got .*; expected '):
        input_pipeline.dataset_info(dataset)


def test_a_closed_pipeline_keeps_no_images():
    """tf.data keeps the generators of a process's pipelines; a notebook trains again and again."""
    pipeline, _ = make_pipeline()
    next(iter(pipeline.train_batches(0, 4)))
    images = weakref.ref(pipeline._images)
    pipeline.close()
    gc.collect()
    assert images() is None


def test_pipelines_have_no_autotuning_whose_thread_would_be_waited_for():
    """Until it woke, up to a minute after the pipeline was forgotten at the end of a stage."""
    import tensorflow as tf

    from adabatch_jax.input_pipeline import datasets

    class Recorder:
        def with_options(self, options):
            self.options = options
            return tf.data.Dataset.range(3)

    recorder = Recorder()
    assert [int(x) for x in datasets.as_numpy_iterator(recorder)] == [0, 1, 2]
    assert recorder.options.autotune.enabled is False
    assert datasets.num_cores() >= 1
