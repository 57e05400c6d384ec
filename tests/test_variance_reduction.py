"""SVRG, SAGA and DynaSAGA: closed forms, and a float64 reference of whole runs."""

import itertools

import flax.linen as nn
import jax
import numpy as np
import pytest

from adabatch_jax import (
    distributed,
    input_pipeline,
    models,
    variance_reduction,
)
from adabatch_jax.config import default_config, resolve
from adabatch_jax.experiment import describe
from adabatch_jax.input_pipeline import order
from adabatch_jax.stream import open_stream


def digits(optimizer, batch_size=4, **changes):
    config = default_config()
    config.num_epochs = 2.0
    config.model.name = 'linear'
    config.dataset.update(dict(name='digits', augment='none', pipeline='device'))
    config.dataset.update(dict(train_split='train[:120]', eval_split='train[:120]'))
    config.batch.update(dict(policy='fixed', base_size=batch_size))
    config.learning_rate.update(dict(effective=0.02, schedule='constant', coupling='none'))
    config.optimizer.update(dict(name=optimizer, momentum=0.9, weight_decay=0.01))
    for key, value in changes.items():
        config.update_from_flattened_dict({key.replace('__', '.'): value})
    return config


def points(tmp_path, batch_size=4, **changes):
    """``f_i = 1/2 |x - c_i|^2`` in x, the bias: all images are 0, and c_i has a 1 at the label."""
    labels = np.random.default_rng(0).integers(3, size=40)
    for split in ('train', 'test'):
        np.savez(tmp_path / f'{split}.npz', images=np.zeros((40, 2, 2, 1), np.uint8), labels=labels)
    config = digits('svrg', batch_size, **changes)
    config.model.loss = 'squared'
    config.dataset.update(
        dict(name='npz', data_dir=str(tmp_path), train_split='train', eval_split='test')
    )
    config.optimizer.update(dict(momentum=0.0, weight_decay=0.0))
    config.optimizer.svrg.snapshot_passes = 100.0  # one snapshot is all there is
    return config, np.eye(3)[labels]


def after_updates(config, count, start=0, state=None):
    """The experiment, and the state after each of some updates."""
    experiment = describe(resolve(config))
    pipeline = experiment.open_pipeline()
    state = distributed.replicate(experiment.initial_state() if state is None else state)
    updates = experiment.clock.updates(start, config.batch.base_size)
    updates = list(itertools.islice(updates, count))
    stream, states = open_stream(experiment, pipeline, updates[0]), []
    for update in updates:
        rate = float(experiment.learning_rate(experiment.clock.epoch(update.start), update.batch_size))
        state, _ = stream.update(state, stream.take([update]), [update], [rate])
        states.append(jax.device_get(state))
        state = distributed.replicate(states[-1])
    return experiment, states


def bias(state):
    (layer,) = state.params.values()
    return layer['bias']


# ---------------------------------------------------------------------- when and how many


def snapshots(first_size, growth_factor=2.0, error_decay=0.0, rungs=(8, 16, 32, 64, 128, 200)):
    return variance_reduction.Snapshots(200, 0.5, first_size, growth_factor, error_decay, rungs)


def test_snapshots_double_until_they_hold_all_the_data():
    found = snapshots(8)
    assert [found.size(number) for number in range(8)] == [8, 16, 32, 64, 128, 200, 200, 200]
    # Half as many examples as they have until the next: 4, 8, 16, 32, 64, and from then on 100.
    starts = [0, 4, 12, 28, 60, 124, 224, 324]
    assert [found.number(start) for start in starts] == list(range(8))
    assert [found.number(start - 1) for start in starts[1:]] == list(range(7))
    assert found.size(10**6) == 200  # no overflow


def test_sizes_are_rounded_up_to_the_ladder():
    assert [snapshots(10, 1.5).size(number) for number in range(4)] == [16, 16, 32, 64]


def test_a_run_takes_snapshots_of_the_sizes_of_its_batches():
    config = digits('svrg', 8, batch__growth_factor=3.0, optimizer__svrg__first_size=12)
    found = describe(resolve(config)).snapshots
    assert [found.size(number) for number in range(4)] == [24, 24, 72, 120]


def test_the_error_of_a_snapshot_falls_as_asked_for():
    found, n = snapshots(20, error_decay=0.8), 200

    def variance(size):  # of a mean without replacement, of examples with variance 1
        return 1 / size * (1 - size / n)

    for number in range(6):
        assert variance(found.wanted(number)) == pytest.approx(variance(20) * 0.8 ** (2 * number))


def test_a_snapshot_draws_without_replacement_and_anew_each_time():
    found = snapshots(64)
    first, second = found.batch(0, 0), found.batch(0, 1)
    assert len(set(first)) == 64 and len(set(second)) == 128
    assert set(first) - set(second)
    assert list(found.batch(0, 0)) == list(first) and list(found.batch(1, 0)) != list(first)


def test_a_snapshot_is_not_what_an_epoch_begins_with():
    found = snapshots(64)
    for number in range(2):
        batch = found.batch(0, number)
        assert set(batch) != set(order.epoch_order(0, number, 200)[: len(batch)])


# --------------------------------------------------------------------------------- SVRG


@pytest.mark.parametrize('first_size', [8, 40])
def test_svrg_on_quadratics_has_no_noise_and_goes_to_the_mean_of_its_batch(tmp_path, first_size):
    config, targets = points(tmp_path, optimizer__svrg__first_size=first_size)
    experiment, states = after_updates(config, 6)
    batch = experiment.snapshots.batch(0, 0)
    assert len(batch) == first_size
    x, rate = np.zeros(3), 0.02
    for state in states:
        x = x - rate * (x - targets[batch].mean(0))
        np.testing.assert_allclose(bias(state), x, atol=1e-6)


def test_mixed_svrg_is_unbiased_whatever_its_batch_is(tmp_path):
    """The mean of the directions over all the data is the gradient, exactly, for each batch."""
    for seed in range(3):
        config, targets = points(tmp_path, optimizer__svrg__first_size=8, optimizer__svrg__mixed=True)
        config.seed = seed
        # One update moves away from the snapshot, so that the correction is not zero; then an epoch
        # without moving shows the direction of every example once.
        experiment, (state, *_) = after_updates(config, 1)
        assert 8 <= len(experiment.snapshots.batch(seed, 0)) < 40
        directions = []
        for start in range(0, 40, 4):
            _, (moved,) = after_updates(config, 1, start, state)
            directions.append((bias(state) - bias(moved)) / 0.02)
        np.testing.assert_allclose(np.mean(directions, 0), bias(state) - targets.mean(0), atol=1e-5)
        assert np.std(directions, 0).max() > 0.05  # each by itself is not


def features(experiment, view=lambda images: images):
    images, labels = input_pipeline.load_split(
        experiment.config.dataset, experiment.config.dataset.train_split
    )
    x = (view(images) - np.array(experiment.info.mean)) / np.array(experiment.info.std)
    x = np.concatenate([x.reshape(len(x), -1), np.ones((len(x), 1))], 1)
    return x, labels


def slopes(w, x, labels):
    """The derivative of softmax regression's loss by the logits of each example, in float64."""
    z = x @ w
    p = np.exp(z - z.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True) - np.eye(10)[labels]


def weights(state):
    (layer,) = state.params.values()
    return np.concatenate([layer['kernel'], layer['bias'][None]])


@pytest.mark.parametrize('mixed, max_per_device', [(False, 0), (True, 0), (True, 2)])
def test_svrg_is_that_of_an_independent_reference(mixed, max_per_device):
    """With momentum and weight decay, over three snapshots that grow, on two devices."""
    config = digits('svrg', 8, optimizer__svrg__snapshot_passes=1.5, optimizer__svrg__mixed=mixed)
    config.batch.max_per_device = max_per_device
    config.optimizer.svrg.first_size = 12  # rounded up to 16, then 32, 64
    experiment, states = after_updates(config, 12)
    x, labels = features(experiment)
    w = buffer = np.zeros((65, 10))
    evaluations, number = 0, -1
    for k, state in enumerate(states):
        # 16, 32 and 64 examples, 24, 48 and 96 until the next.
        if (at := np.searchsorted([24, 72], 8 * k, 'right')) != number:
            number, there = int(at), w
            batch = experiment.snapshots.batch(0, number)
            mean = x[batch].T @ slopes(there, x[batch], labels[batch]) / len(batch)
            evaluations += len(batch)
        index = order.examples_at(0, 120, 8 * k, 8)[0]
        inside = np.isin(index, batch) if mixed else np.ones(8, bool)
        direction = x[index].T @ slopes(w, x[index], labels[index]) / 8
        direction -= x[index].T @ (inside[:, None] * slopes(there, x[index], labels[index])) / 8
        direction += inside.mean() * mean
        evaluations += 8 + inside.sum()
        buffer = 0.9 * buffer + direction + 0.01 * w
        w = w - 0.02 * buffer
        np.testing.assert_allclose(weights(state), w, atol=2e-6)
        assert int(state.reduction['evaluations']) == evaluations
    assert number == 2


class WithDropout(nn.Module):
    """A small network with BatchNorm and dropout."""

    num_classes: int
    batch_norm: str = 'local'
    dtype: str = 'float32'

    @nn.compact
    def __call__(self, images, *, train):
        x = nn.Dense(8)(images.reshape(len(images), -1))
        x = models.layers.norm_layer(self.batch_norm, self.dtype, train)()(x)
        return nn.Dense(self.num_classes)(nn.Dropout(0.5, deterministic=not train)(nn.relu(x)))


def test_at_the_snapshot_itself_every_batch_has_the_same_direction(monkeypatch):
    """With crops, dropout and BatchNorm: both gradients see the same, and cancel."""
    monkeypatch.setitem(models.MODELS, 'with_dropout', WithDropout)
    config = digits('svrg', 8, model__name='with_dropout', dataset__augment='pad_crop')
    config.dataset.crop_padding = 2
    config.optimizer.update(dict(momentum=0.0, weight_decay=0.0))
    experiment, (state, *_) = after_updates(config, 1)
    rate = float(experiment.learning_rate(0.0, 8))
    begun = experiment.initial_state()
    expected = jax.tree.map(
        lambda w, mu: w - rate * mu, jax.device_get(begun.params), state.reduction['gradient']
    )
    for got, want in zip(*map(jax.tree.leaves, (state.params, expected)), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-7)
    moving = jax.tree.map(lambda g: np.abs(g).max(), state.reduction['gradient'])
    assert max(jax.tree.leaves(moving)) > 1e-3


def test_a_snapshot_sees_the_crops_of_the_epoch_that_it_is_taken_in():
    """And what fills up its last part counts for nothing."""
    config = digits('svrg', 8, dataset__augment='pad_crop', dataset__train_split='train[:124]')
    config.dataset.crop_padding = 2

    def cropped(images):
        padded = np.pad(images, [(0, 0), (2, 2), (2, 2), (0, 0)])
        offsets, _ = order.crop_and_flip(0, np.ones(124, int), np.arange(124), 2, False)
        return np.stack([x[i : i + 8, j : j + 8] for x, (i, j) in zip(padded, offsets, strict=True)])

    experiment, (state,) = after_updates(config, 1, start=124)
    x, labels = features(experiment, cropped)
    mean = x.T @ slopes(np.zeros((65, 10)), x, labels) / 124
    np.testing.assert_allclose(
        weights(state.replace(params=state.reduction['gradient'])), mean, atol=1e-6
    )
    assert int(state.reduction['evaluations']) == 124 + 2 * 8


def test_running_statistics_are_those_of_the_snapshots_batch_and_stay():
    """Of its whole parts: what fills up the last one would count twice."""
    config = digits('svrg', 8, model__name='cnn', dataset__train_split='train[:124]')
    experiment, states = after_updates(config, 3)
    images, _ = input_pipeline.load_split(experiment.config.dataset, 'train[:124]')
    spec, begun = experiment.eval_spec, experiment.initial_state()
    sums = None
    for part in experiment.snapshots.batch(0, 0)[:120].reshape(-1, 2, 4):  # a device's by themselves
        for index in part:
            _, moved = experiment.reduction.estimator.apply(
                begun.variables, spec.normalize(images[index]), train=True, mutable=['batch_stats']
            )
            of_part = jax.tree.map(
                lambda new, old: (new - old) / 0.1 + old, moved['batch_stats'], begun.batch_stats
            )
            sums = of_part if sums is None else jax.tree.map(np.add, sums, of_part)
    for state in states:
        for got, want in zip(*map(jax.tree.leaves, (state.batch_stats, sums)), strict=True):
            np.testing.assert_allclose(got, want / 30, rtol=2e-4, atol=2e-4)


def test_examples_without_gradient_are_skipped_ever_longer():
    zeros = np.arange(8)
    assert list(variance_reduction.evaluations_to_skip(zeros)) == [0, 1, 1, 2, 4, 8, 16, 32]


def test_snapshots_leave_out_what_had_no_gradient_and_come_back_to_it():
    config = digits('svrg', 8, model__loss='hinge', optimizer__svrg__skip_zeros=True)
    config.learning_rate.effective = 0.05
    config.optimizer.momentum, config.num_epochs = 0.0, 40.0
    config.optimizer.svrg.snapshot_passes = 1.0
    experiment, states = after_updates(config, 15 * 30)
    x, labels = features(experiment)
    in_a_row, left = np.zeros(120, int), np.zeros(120, int)
    skipped_in_all = 0
    for number in range(1, 30):
        before, after = states[15 * number - 1], states[15 * number]
        z = x @ weights(before)
        margins = np.where(np.eye(10, dtype=bool)[labels], z, -z)
        if number == 1:  # all gradients are there at 0
            assert not states[0].reduction['zeros_in_a_row'].any()
        clear = np.abs(margins - 1.5).min(1) > 1e-4  # of rounding
        is_zero = (margins > 1.5).all(1)
        skipped = left > 0
        np.testing.assert_array_equal(after.reduction['skipped'], skipped)
        left = np.where(skipped, left - 1, 0)
        in_a_row = np.where(skipped, in_a_row, np.where(is_zero, in_a_row + 1, 0))
        wait = np.where(in_a_row > 0, 2 ** np.maximum(0, in_a_row - 2), 0)
        left = np.where(skipped, left, wait)
        np.testing.assert_array_equal(after.reduction['zeros_in_a_row'][clear], in_a_row[clear])
        in_a_row, left = (np.array(after.reduction[k]) for k in ('zeros_in_a_row', 'skips_left'))
        new = int(after.reduction['evaluations']) - int(before.reduction['evaluations'])
        inside = order.examples_at(0, 120, 15 * 8 * number, 8)[0]
        assert new == 120 - skipped.sum() + 8 + (~skipped[inside]).sum()
        # What is left out counts as 0 in the mean.
        gradients = np.where(np.eye(10)[labels], -1, 1) * np.clip(1.5 - margins, 0, 1)
        mean = x.T @ (gradients * ~skipped[:, None]) / 120
        np.testing.assert_allclose(
            weights(after.replace(params=after.reduction['gradient'])), mean, atol=1e-5
        )
        skipped_in_all += skipped.sum()
    assert skipped_in_all > 200


def test_an_example_that_a_snapshot_left_out_counts_with_its_own_gradient_alone():
    config = digits('svrg', 8, optimizer__svrg__skip_zeros=True, optimizer__svrg__snapshot_passes=100.0)
    config.optimizer.update(dict(momentum=0.0, weight_decay=0.0))
    experiment, (state,) = after_updates(config, 1)  # its snapshot is of weights of 0
    (x, labels), w = features(experiment), weights(state)
    index = order.examples_at(0, 120, 8, 8)[0]
    x, labels, skipped = x[index], labels[index], np.arange(120) == index[3]
    _, (after,) = after_updates(
        config, 1, 8, state.replace(reduction=state.reduction | {'skipped': skipped})
    )
    there = slopes(0 * w, x, labels) * ~skipped[index][:, None]
    direction = x.T @ (slopes(w, x, labels) - there) / 8
    direction += weights(state.replace(params=state.reduction['gradient']))
    np.testing.assert_allclose(weights(after), w - 0.02 * direction, atol=1e-6)
