"""Clock, plan and learning rates against numbers worked by hand and against brute force."""

import dataclasses
import itertools
import math

import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adabatch_jax import schedules
from adabatch_jax.config import default_config
from adabatch_jax.schedules import Clock, LearningRate, Transition, make_plan

HALVING = LearningRate(schedules.step_schedule(1.0, 0.5, [1, 2]), 'linear', 4)


def paper_rate(num_epochs=100):
    return LearningRate(schedules.step_schedule(0.01, 0.375, [20, 40, 60, 80]), 'linear', 128)


def rate_config(**changes):
    rate = ml_collections.ConfigDict(
        dict(
            effective=0.1,
            schedule='constant',
            decay_factor=0.1,
            decay_epochs=30.0,
            decay_at_epochs=(),
            power=2.0,
            warmup_epochs=0.0,
            warmup_initial=0.0,
        )
    )
    rate.update(changes)
    return rate


def test_paper_protocol_has_15080_updates_and_its_control_39000():
    clock = Clock(50_000, 100, 'drop')
    adaptive = make_plan(clock, schedules.geometric(clock, 128, 2, 20, 2048), paper_rate())
    fixed = make_plan(clock, [Transition(0, 128, '')], paper_rate())
    assert [s.batch_size for s in adaptive.stages] == [128, 256, 512, 1024, 2048]
    assert [s.num_updates for s in adaptive.stages] == [7800, 3900, 1940, 960, 480]
    assert adaptive.num_updates == 15_080
    assert fixed.num_updates == 39_000


def test_paper_protocol_for_alexnet_has_7520_updates_and_its_control_19500():
    clock = Clock(50_000, 100, 'drop')
    adaptive = make_plan(clock, schedules.geometric(clock, 256, 2, 20, 4096), paper_rate())
    assert adaptive.num_updates == 7_520
    assert make_plan(clock, [Transition(0, 256, '')], paper_rate()).num_updates == 19_500


def test_paper_learning_rates_fall_by_three_quarters_a_stage():
    clock = Clock(50_000, 100, 'drop')
    plan = make_plan(clock, schedules.geometric(clock, 128, 2, 20, 2048), paper_rate())
    rates = [s.learning_rate_start for s in plan.stages]
    np.testing.assert_allclose(rates, [0.01 * 0.75**k for k in range(5)], rtol=1e-12)
    assert [s.learning_rate_end for s in plan.stages] == rates


def test_matched_runs_have_the_same_rate_per_example_in_every_epoch():
    rate = paper_rate()
    for epoch in np.arange(0, 100, 0.5):
        size = 128 * 2 ** int(epoch // 20)
        assert rate(epoch, size) / size == pytest.approx(rate(epoch, 128) / 128)


def test_carry_continues_the_batch_into_the_next_epoch():
    clock = Clock(10, 2, 'carry')
    updates = list(itertools.islice(clock.updates(0, 4), 5))
    assert [(u.start, u.end) for u in updates] == [(0, 4), (4, 8), (8, 12), (12, 16), (16, 20)]


def test_drop_moves_the_clock_to_the_end_of_the_epoch():
    clock = Clock(10, 2, 'drop')
    updates = list(itertools.islice(clock.updates(0, 4), 4))
    assert [(u.start, u.end) for u in updates] == [(0, 4), (4, 10), (10, 14), (14, 20)]


def test_a_transition_in_mid_epoch_drops_what_the_larger_batch_does_not_fit_into():
    clock = Clock(10, 1.5, 'drop')
    plan = make_plan(clock, [Transition(0, 2, ''), Transition(6, 8, '')], HALVING)
    assert [(s.start, s.end, s.num_updates) for s in plan.stages] == [(0, 6, 3), (10, 20, 1)]


@settings(max_examples=200, deadline=None)
@given(
    num_examples=st.integers(8, 60),
    num_epochs=st.floats(0.3, 6),
    remainder=st.sampled_from(['carry', 'drop']),
    sizes=st.lists(st.integers(1, 8), min_size=1, max_size=5),
    gaps=st.lists(st.integers(1, 100), min_size=4, max_size=4),
)
def test_plan_is_the_sequence_of_updates_that_the_loop_takes(
    num_examples, num_epochs, remainder, sizes, gaps
):
    clock = Clock(num_examples, num_epochs, remainder)
    starts = [0, *itertools.accumulate(gaps)]
    transitions = tuple(Transition(a, b, '') for a, b in zip(starts, sizes, strict=False))
    plan = make_plan(clock, transitions, HALVING)

    taken, position = [], 0
    while update := schedules.next_update(
        clock, position, lambda at: schedules.transition_at(transitions, at).batch_size
    ):
        taken.append(update)
        position = update.end
    assert list(plan.updates()) == taken
    assert plan.num_updates == len(taken)
    assert all(stage.num_updates for stage in plan.stages)
    for stage in plan.stages:
        assert taken[stage.first_update].start == stage.start
        assert taken[stage.first_update + stage.num_updates - 1].end == stage.end


@settings(max_examples=100, deadline=None)
@given(
    num_examples=st.integers(8, 60),
    remainder=st.sampled_from(['carry', 'drop']),
    sizes=st.lists(st.integers(1, 8), min_size=1, max_size=30),
)
def test_no_example_is_used_twice_in_an_epoch_whatever_the_batch_sizes(num_examples, remainder, sizes):
    clock = Clock(num_examples, 100, remainder)
    position, used = 0, []
    for size in sizes:
        update = clock.update_at(position, size)
        used.extend(range(update.start, update.start + size))
        position = update.end
    assert len(set(used)) == len(used)
    if remainder == 'carry':
        assert used == list(range(sum(sizes)))


@pytest.mark.parametrize(
    'epoch, expected', [(0, 0.1), (29.9999999, 0.1), (30, 0.01), (59.99999992, 0.01), (60, 0.001)]
)
def test_step_schedule_decays_at_and_not_before_its_epochs(epoch, expected):
    schedule = schedules.effective_schedule(rate_config(schedule='step'), Clock(1000, 90))
    assert LearningRate(schedule, 'none')(epoch, 128) == pytest.approx(expected, rel=1e-12)


def test_last_update_before_a_decay_keeps_the_rate_on_imagenet():
    """One example before epoch 60 is 59.9999992, which single precision rounds to 60."""
    clock = Clock(1_281_167, 90)
    rate = LearningRate(schedules.step_schedule(1.0, 0.1, [30, 60]))
    boundary = clock.examples(60)
    assert rate(clock.epoch(boundary - 1), 128) == pytest.approx(0.1)
    assert rate(clock.epoch(boundary), 128) == pytest.approx(0.01)


def test_listed_decay_epochs_replace_the_interval():
    schedule = schedules.effective_schedule(
        rate_config(schedule='step', decay_factor=0.2, decay_at_epochs=(60, 120, 160)),
        Clock(1000, 200),
    )
    rate = LearningRate(schedule, 'none')
    rates = [rate(e, 1) for e in (59.9, 60, 119.9, 120, 159.9, 160, 199)]
    np.testing.assert_allclose(rates, [0.1, 0.02, 0.02, 0.004, 0.004, 0.0008, 0.0008], rtol=1e-12)


def test_cosine_falls_from_the_end_of_warmup_to_zero_at_the_end():
    config = rate_config(schedule='cosine', warmup_epochs=10.0)
    rate = LearningRate(schedules.effective_schedule(config, Clock(1000, 110)), 'none')
    rates = [rate(e, 1) for e in (0, 5, 10, 35, 60, 110)]
    quarter = 0.1 * 0.5 * (1 + math.cos(math.pi / 4))
    np.testing.assert_allclose(rates, [0, 0.05, 0.1, quarter, 0.05, 0], atol=1e-12)


def test_polynomial_falls_with_its_power():
    config = rate_config(schedule='polynomial', warmup_epochs=5.0)
    rate = LearningRate(schedules.effective_schedule(config, Clock(1000, 90)), 'none')
    expected = [0.1, 0.1 * (1 - 17 / 85) ** 2, 0.1 * 0.5**2, 0]
    np.testing.assert_allclose([rate(e, 1) for e in (5, 22, 47.5, 90)], expected, atol=1e-12)


def test_warmup_rises_linearly_from_its_initial_fraction():
    config = rate_config(schedule='step', warmup_epochs=5.0, warmup_initial=0.1)
    rate = LearningRate(schedules.effective_schedule(config, Clock(1000, 90)), 'none')
    expected = [0.01, 0.055, 0.1, 0.1, 0.01]
    np.testing.assert_allclose([rate(e, 1) for e in (0, 2.5, 5, 29.9, 30)], expected, rtol=1e-12)


@pytest.mark.parametrize('coupling, expected', [('linear', 0.8), ('sqrt', 0.4), ('none', 0.2)])
def test_coupling_scales_the_rate_with_the_batch(coupling, expected):
    rate = LearningRate(optax.constant_schedule(0.2), coupling, 128)
    assert rate(0.0, 512) == pytest.approx(expected, rel=1e-12)
    assert rate(0.0, 128) == pytest.approx(0.2, rel=1e-12)
    many = rate(np.array([0.0, 1.0, 2.0]), np.array([512, 512, 128]))
    np.testing.assert_allclose(many, [expected, expected, 0.2], rtol=1e-12)
    np.testing.assert_allclose(rate.effective_at(np.arange(3.0)), [0.2] * 3, rtol=1e-12)
    assert LearningRate(0.2, coupling, 128)(0.0, 512) == rate(0.0, 512)


def test_optax_schedule_of_a_plan_gives_its_learning_rates_by_update():
    clock = Clock(50, 3, 'drop')
    plan = make_plan(clock, schedules.geometric(clock, 4, 2, 1), HALVING)
    schedule = plan.learning_rate_schedule()
    # 12, 6 and 3 updates; the rate halves at epochs 1 and 2 while the batch doubles.
    np.testing.assert_allclose([schedule(k) for k in range(plan.num_updates)], np.ones(21))
    falling = make_plan(clock, [Transition(0, 4, '')], HALVING).learning_rate_schedule()
    assert [float(falling(k)) for k in (0, 11, 12, 23, 24, 35, 99)] == [1, 1, 0.5, 0.5] + [0.25] * 3
    updates, _ = optax.sgd(schedule).update(jnp.ones(()), optax.sgd(schedule).init(jnp.ones(())))
    assert float(updates) == -1.0


@pytest.mark.parametrize(
    'batch_size, devices, limit, expected',
    [(128, 1, 0, (128, 1)), (128, 4, 0, (32, 1)), (2048, 2, 256, (256, 4)), (96, 1, 64, (48, 2))],
)
def test_batch_splits_into_the_fewest_equal_microbatches(batch_size, devices, limit, expected):
    assert schedules.split_batch(batch_size, devices, limit) == expected


@pytest.mark.parametrize(
    'transitions, message',
    [
        ([Transition(0, 10, '')], 'batch size 10 does not divide evenly over 4 devices'),
        ([Transition(0, 128, '')], 'batch size 128 is larger than the data set'),
        ([Transition(4, 8, '')], 'has to start at epoch 0'),
        ([Transition(0, 8, ''), Transition(60, 16, ''), Transition(30, 32, '')], 'out of order'),
    ],
)
def test_plan_refuses_what_would_fail_later(transitions, message):
    with pytest.raises(ValueError, match=message):
        make_plan(Clock(100, 3), transitions, HALVING, num_devices=4)


def test_the_plan_of_a_run_that_other_devices_began_has_no_split_where_there_is_none():
    transitions = [Transition(0, 8, ''), Transition(50, 16, '')]
    plan = make_plan(Clock(100, 1), transitions, HALVING, num_devices=16, begun_on_others=True)
    assert [(s.microbatch_size, s.num_microbatches) for s in plan.stages] == [(0, 0), (1, 1)]
    assert plan.ladder == (8, 16) and plan.usable == (16,) and plan.largest_microbatch == 1
    assert plan.with_microbatches_up_to(1) == dataclasses.replace(plan, max_per_device=1)
    with pytest.raises(ValueError, match='batch size 8 does not divide evenly over 16 devices'):
        plan.split(8)
    with pytest.raises(ValueError, match='batch size: got 0'):
        make_plan(Clock(100, 1), [Transition(0, 0, '')], HALVING, begun_on_others=True)
    none = make_plan(Clock(100, 1), transitions, HALVING, num_devices=5, begun_on_others=True)
    assert none.usable == () and none.largest_microbatch == 0


def test_stages_of_one_batch_size_that_touch_are_one_stage():
    transitions = [Transition(0, 8, 'a'), Transition(9, 4, 'b'), Transition(16, 8, 'c')]
    plan = make_plan(Clock(100, 1), transitions, HALVING)  # no update begins in [9, 16)
    assert [(s.batch_size, s.num_updates) for s in plan.stages] == [(8, 13)]


@pytest.mark.parametrize(
    'arguments', [(0, 1), (10.5, 1), ('10', 1), (10, 0), (10, -1), (10, math.nan), (10, math.inf)]
)
def test_clock_refuses_runs_without_examples_or_end(arguments):
    with pytest.raises(ValueError):
        Clock(*arguments)


def test_clock_refuses_runs_that_its_32_bits_cannot_count():
    with pytest.raises(ValueError, match='2\\^32'):
        Clock(2**20, 4096)


def test_rates_worked_out_ahead_are_those_of_each_update():
    from adabatch_jax.stream import EffectiveRates

    clock = schedules.Clock(100, 9, 'drop')
    rate = schedules.LearningRate(schedules.step_schedule(0.3, 0.37, [2, 5]), 'linear', 8)
    rates, position = EffectiveRates(clock, rate), 0
    for size, count in [(8, 300), (16, 5), (8, 40)]:  # past what was worked out, and another size
        for _, update in zip(range(count), clock.updates(position, size), strict=False):
            assert rates(update) == float(rate.effective_at(clock.epoch(update.start)))
            position = update.end


@pytest.mark.parametrize('schedule', ['constant', 'step', 'cosine', 'polynomial'])
def test_an_epoch_has_the_same_rate_bit_for_bit_whichever_it_is_asked_for_with(schedule):
    config = default_config().learning_rate
    config.update({'schedule': schedule, 'warmup_epochs': 5.0, 'decay_epochs': 20.0})
    effective = schedules.effective_schedule(config, Clock(1437, 100.0, 'carry'))
    rate = schedules.LearningRate(effective, 'linear', 128)
    epochs = np.random.default_rng(0).uniform(0, 100, (5, 7))
    one_by_one = [[rate.effective_at(epoch) for epoch in row] for row in epochs]
    np.testing.assert_array_equal(rate.effective_at(epochs), one_by_one)


@pytest.mark.parametrize(
    'every, size, count', [(0.5, 1437, 200), (1 / 3, 50_000, 300), (0.1, 1437, 1000)]
)
def test_an_interval_is_due_as_often_as_it_fits_and_at_the_ends_of_epochs(every, size, count):
    clock = Clock(size, 100.0, 'drop')
    updates = itertools.takewhile(lambda u: u.start < clock.total_examples, clock.updates(0, 16))
    ends = [update.end for update in updates]
    due = [
        after for before, after in itertools.pairwise([0, *ends]) if clock.passes(every, before, after)
    ]
    assert len(due) == count
    assert {k * size for k in range(1, 101)} <= set(due)
