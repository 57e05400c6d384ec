"""Clock, transitions and plan at the edges of what they accept."""

import dataclasses
import json
import types

import jax.numpy as jnp
import numpy as np
import pytest

from adabatch_jax import schedules
from adabatch_jax.schedules import (
    Clock,
    LearningRate,
    Transition,
    Update,
    make_plan,
    next_update,
    split_batch,
)


def test_a_run_has_an_example_at_least_and_an_epoch_less_than_32_bits_count():
    assert Clock(1, 2**32 - 2).total_examples == 2**32 - 2
    with pytest.raises(ValueError, match='fewer than 2'):
        Clock(1, 2**32 - 1)
    assert Clock(10, 0.1).total_examples == 1
    with pytest.raises(ValueError, match='at least 1'):
        Clock(10, 0.04)


def test_an_unknown_remainder_is_refused():
    with pytest.raises(ValueError, match="remainder: got 'keep'; accepted: carry, drop"):
        Clock(10, 1, 'keep')


def test_multiples_of_an_interval_lie_inside_the_run_and_are_not_too_many():
    assert Clock(10, 3).multiples(1, 'x') == (10, 20)
    assert Clock(1, 3).multiples(1, 'x') == (1, 2)
    assert len(Clock(10_000, 1).multiples(0.001, 'x')) == 999
    for every in (0.05, 0.0999):  # less than an example
        with pytest.raises(ValueError, match=r'x: got .*0.1 epochs or more'):
            Clock(10, 1).multiples(every, 'x')
    with pytest.raises(ValueError, match='1 epochs or more'):
        Clock(10, 1000).multiples(0.9, 'x')


@pytest.mark.parametrize('whole', [jnp.uint32, np.uint32, np.int64])
def test_a_clock_takes_whole_numbers_of_any_type(whole):
    """An unsigned one below 0 would be as many as it has, and a large one in float32 not itself."""
    clock, same = Clock(1000, 4, 'drop'), Clock(np.uint32(1000), np.float32(4), 'drop')
    assert (clock, json.dumps(dataclasses.asdict(clock))) == (same, json.dumps(dataclasses.asdict(same)))
    for c in (clock, same):
        update = c.update_at(whole(960), whole(64))
        assert update == Update(1000, 1064, 64) and type(update.start) is int
        assert c.updates_before(whole(960), whole(2000), whole(64)) == (15, Update(1896, 2000, 64))
        assert list(c.stretches(whole(960), whole(2000), whole(64), [1.0])) == [15]
        assert next_update(c, whole(960), lambda seen: 64) == Update(1000, 1064, 64)
        assert c.passes(1.0, whole(990), whole(1000)) and not c.passes(1.0, whole(0), whole(999))
    assert Clock(1, 2**25).epoch(whole(2**24 + 1)) == 2**24 + 1


def decays_at(*epochs):
    rate = types.SimpleNamespace(decay_at_epochs=epochs, decay_epochs=1.0)
    return schedules.decay_events(rate, Clock(10, 5))


@pytest.mark.parametrize('epochs', [(2, 1), (1, 1), (0, 1)])
def test_epochs_of_decays_that_do_not_rise_are_refused(epochs):
    with pytest.raises(ValueError, match='needs rising positive epochs'):
        decays_at(*epochs)


def test_the_rate_may_decay_after_a_single_example():
    assert decays_at(0.1, 2) == (1, 20)


@pytest.mark.parametrize('factor', [1, 0.5])
def test_growth_by_a_factor_that_is_none_is_refused(factor):
    clock = Clock(100, 9)
    for make in (
        lambda: schedules.ladder(8, factor, 64),
        lambda: schedules.geometric(clock, 8, factor, 1),
    ):
        with pytest.raises(ValueError, match=r'growth_factor: got .*; needs a number above 1'):
            make()


def test_growth_has_no_ceiling_unless_one_is_given():
    grown = schedules.grow_at(Clock(100, 9), 8, 2, (100, 200))
    assert [t.batch_size for t in grown] == [8, 16, 32]


def test_a_reference_of_one_example_is_a_batch_and_one_of_none_is_not():
    assert LearningRate(0.2, 'linear', 1)(0.0, 8) == 1.6
    with pytest.raises(ValueError, match='reference_batch_size: got 0; needs >= 1'):
        LearningRate(0.2, 'linear', 0)
    with pytest.raises(ValueError, match="coupling: got 'cubic'; accepted: linear, sqrt, none"):
        LearningRate(0.2, 'cubic')


def test_there_are_as_many_groups_as_asked_for_also_where_devices_do_not_divide_them():
    assert split_batch(24, 3, min_groups=4) == (4, 2)  # 3 x 1 would be 3
    assert split_batch(128, 4) == (32, 1)


def test_the_plan_of_a_file_has_its_stages_in_epochs():
    clock, effective = Clock(100, 2, 'drop'), schedules.step_schedule(1.0, 0.5, [1])
    rate, grown = LearningRate(effective, 'linear', 8), schedules.geometric(clock, 8, 2, 1)
    written = make_plan(clock, grown, rate, num_devices=2, max_per_device=4).to_dict()
    keys = ('start_epoch', 'end_epoch', 'num_updates', 'num_microbatches')
    assert [[s[key] for key in keys] for s in written['stages']] == [[0, 1, 12, 1], [1, 2, 6, 2]]
    assert written['planned'] and written['num_updates'] == 18


def test_a_stage_that_is_over_before_its_first_update_skips_nothing():
    # The fourth update of 2 ends where the stage of 5 does; the next ones are again of 2.
    transitions = [Transition(0, 2, ''), Transition(7, 5, ''), Transition(8, 2, '')]
    (stage,) = make_plan(Clock(10, 1, 'drop'), transitions, LearningRate(0.1)).stages
    assert (stage.start, stage.end, stage.num_updates) == (0, 10, 5)


@pytest.mark.parametrize('remainder', ['carry', 'drop'])
def test_stretches_end_where_an_update_passes_a_multiple(remainder):
    rng = np.random.default_rng(0)
    for _ in range(200):
        clock = Clock(int(rng.integers(5, 300)), 5.0, remainder)
        size = int(rng.integers(1, clock.num_examples + 1))
        start, stop = sorted(map(int, rng.integers(0, clock.total_examples + 1, 2)))
        every = [float(x) for x in rng.choice([1e-6, 0.1, 0.5, 1.0, 1.5, 2.0, 2.5, 1e9], 2)]
        expected, seen, count = [], clock.update_at(start, size).start, 0
        for update in clock.updates(start, size):  # one by one
            if update.start >= stop:
                break
            count += 1
            if any(clock.passes(interval, seen, update.end) for interval in every):
                expected.append(count)
                count = 0
            seen = update.end
        expected += [count] if count else []
        assert list(clock.stretches(start, stop, size, every)) == expected


@pytest.mark.parametrize(
    'batch_size, devices, options, told',
    [
        (8, 1, {'min_groups': 16}, '1 device: got 8 examples .*[(]16 parts .*: batch.statistics.min_gr'),
        (8, 8, {'min_groups': 2**62 + 1}, f'got 1 example .* into {2**59 + 1} or more .* [(]'),
        (8, 2, {'min_groups': 2, 'multiple_of': 3}, '[(]multiples of 3: model.batch_norm[)]$'),
        (6, 1, {'max_per_device': 2, 'multiple_of': 3}, '3 or more microbatches of at most 2 .*norm[)]'),
    ],
)
def test_a_batch_that_cannot_be_split_is_told_with_the_keys_that_ask_for_it(
    batch_size, devices, options, told
):
    with pytest.raises(ValueError, match=told):
        split_batch(batch_size, devices, **options)
