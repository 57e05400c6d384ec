"""The order of examples and their augmentation, against what they are said to be."""

import types

import numpy as np
import pytest

from adabatch_jax.input_pipeline import order


def finalised(h):
    """The finaliser of MurmurHash3 for 32 bits, in Python's integers."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        h = (h ^ (h >> shift)) * factor % 2**32
    return h


def test_random_bits_are_those_of_the_finaliser_in_every_version():
    seed, epochs, examples = 2**32 - 1, [0, 7], [2**31, 3]
    bits = order.random_bits(seed, np.array(epochs), np.array(examples), 4)
    for row, epoch, example in zip(bits, epochs, examples, strict=True):
        for draw in range(4):
            state = 0
            for word in (seed, 0, epoch, example, draw):
                state = finalised(((state ^ word) + 0x9E3779B9) % 2**32)
            assert row[draw] == state


@pytest.mark.parametrize('padding', [0, 1, 3])
def test_crops_go_from_one_edge_to_the_other_equally_often(padding):
    zeros, examples = np.zeros(500, int), np.arange(500)
    offsets, mirrored = order.crop_and_flip(0, zeros, examples, padding, True)
    for axis in (0, 1):
        counts = np.bincount(offsets[:, axis])
        assert len(counts) == 2 * padding + 1 and counts.min() > 0.6 * 500 / (2 * padding + 1)
    assert 200 < mirrored.sum() < 300
    assert not order.crop_and_flip(0, zeros, examples, padding, False)[1].any()


@pytest.mark.parametrize(
    'augment, expected', [('none', (0, False)), ('pad_crop', (4, False)), ('pad_crop_flip', (4, True))]
)
def test_images_are_padded_and_mirrored_only_where_that_is_asked_for(augment, expected):
    dataset = types.SimpleNamespace(augment=augment, crop_padding=4)
    assert order.augmentation(dataset) == expected


def test_the_epochs_of_a_growing_sample_are_whole_numbers_of_the_clock():
    _, epochs = order.growing_sample(3, 50, 4, False, 40, 70)
    np.testing.assert_array_equal(epochs, [0] * 10 + [1] * 50 + [2] * 10)
    assert epochs.dtype == np.int64


def test_an_order_that_is_kept_for_others_cannot_be_written_to():
    with pytest.raises(ValueError, match='read-only'):
        order.epoch_order(0, 0, 5)[0] = 1
