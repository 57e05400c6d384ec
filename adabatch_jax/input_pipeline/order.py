"""The order of examples and the random draws of their augmentation, as functions of the position."""

import functools
from collections.abc import Iterator

import numpy as np

from adabatch_jax import distributed


@functools.lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, num_examples: int) -> np.ndarray:
    """The permutation of ``[0, num_examples)`` in which an epoch goes through the data, int64."""
    order = np.random.default_rng((seed, epoch)).permutation(num_examples)
    order.setflags(write=False)
    return order


def examples_at(seed: int, num_examples: int, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The ``count`` examples from position ``start`` of the stream of epochs on.

    Returns:
      Their indices in the split, int64 ``[count]``, and the epoch of each, int64 ``[count]``.
    """
    positions = np.arange(start, start + count)
    epochs, offsets = np.divmod(positions, num_examples)
    examples = np.empty(count, np.int64)
    for epoch in range(epochs[0], epochs[-1] + 1):
        here = epochs == epoch
        examples[here] = epoch_order(seed, epoch, num_examples)[offsets[here]]
    return examples, epochs


def sample_sizes(positions, num_examples: int, first_size: int, doubling: bool = False):
    """m of DynaSAGA at some positions of the stream, int64: examples of the sample to draw from.

    ``min(max(m_0, ceil(t / 2)), N)``: one more with every second example; with ``doubling`` twice as
    many whenever t is beyond 2 m (Daneshmand, Lucchi and Hofmann, "Starting Small: Learning with
    Adaptive Sample Sizes", 2016).
    """
    if doubling:
        doublings = np.ceil(np.log2(np.maximum(1, positions / (2 * first_size))))
        sizes = first_size * 2.0**doublings
    else:
        sizes = np.maximum(first_size, (positions + 1) // 2)
    return np.minimum(sizes, num_examples).astype(np.int64)


def growing_sample(
    seed: int, num_examples: int, first_size: int, doubling: bool, start: int, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """As ``examples_at``, with replacement from a sample that grows: the order of DynaSAGA.

    The sample is a prefix of one permutation. Where it grows by one example, that is the one to take;
    else one is drawn from it. From ``first_size = num_examples`` on it is uniform: the order of SAGA.
    """
    positions = np.arange(start, start + count)
    sizes = sample_sizes(positions, num_examples, first_size, doubling)
    before = sample_sizes(np.maximum(positions - 1, 0), num_examples, first_size, doubling)
    no_epoch = np.full(count, 0xFFFFFFFF)  # other draws than those of any augmentation
    drawn = random_bits(seed, no_epoch, positions, 1)[:, 0] % sizes
    index = np.where((sizes > before) & (not doubling), sizes - 1, drawn)
    return epoch_order(seed, 0, num_examples)[index], positions // num_examples


def update_examples(
    seed: int, clock, start: int, batch_size: int, num_parts: int = 1
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """This process's examples of every update from position ``start`` on, without end.

    Args:
      seed: of the order.
      clock: the run's ``schedules.Clock``.
      start: examples seen before the first update.
      batch_size: examples of an update over all processes.
      num_parts: each update comes in so many parts, one after the other; a part has the next
        examples of every device.

    Yields:
      Indices in the split and the epoch of each, as ``examples_at`` does.
    """
    rows = distributed.local_rows(batch_size)
    for update in clock.updates(start, batch_size):
        drawn = examples_at(seed, clock.num_examples, update.start + rows.start, rows.stop - rows.start)
        yield from zip(*(distributed.split_parts(array, num_parts) for array in drawn), strict=True)


def augmentation(dataset) -> tuple[int, bool]:
    """What ``dataset.augment`` says of images in memory: pixels of padding, and whether to mirror."""
    padding = 0 if dataset.augment == 'none' else dataset.crop_padding
    return padding, dataset.augment == 'pad_crop_flip'


def random_bits(seed: int, epochs, examples, draws: int, xp=np):
    """Independent uint32 draws for each (seed, epoch, example), ``[examples, draws]``.

    A counter-based generator: each word is mixed in with the finaliser of MurmurHash3 (Appleby,
    public domain), in 32-bit arithmetic, which NumPy and a device do alike.

    Args:
      seed: of 32 bits at most.
      epochs: of each example.
      examples: indices, of as many.
      draws: of each.
      xp: ``numpy``, or ``jax.numpy`` to draw inside a compiled function.
    """
    words = (seed, 0, epochs[:, None], examples[:, None], np.arange(draws))
    state = xp.zeros((len(examples), draws), np.uint32)
    for word in words:
        state = (state ^ xp.asarray(word, np.uint32)) + np.uint32(0x9E3779B9)
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
            state = (state ^ (state >> np.uint32(shift))) * np.uint32(factor)
    return state


def crop_and_flip(seed: int, epochs, examples, padding: int, flip: bool, xp=np) -> tuple:
    """Offsets of a random crop from padded images, and which images to mirror; ``xp`` as above.

    Returns:
      Offsets from the top and the left, int32 ``[examples, 2]`` in ``[0, 2 * padding]``, and
      mirrored, bool ``[examples]``.
    """
    bits = random_bits(seed, epochs, examples, 3, xp)
    offsets = (bits[:, :2] % np.uint32(2 * padding + 1)).astype(np.int32)
    return offsets, (bits[:, 2] >> np.uint32(31)).astype(bool) & flip
