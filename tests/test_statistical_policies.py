"""Policies driven by statistics, on problems whose answer is known, and with noise as theory has it.

A quadratic with curvature H and additive Gaussian gradient noise of covariance Sigma: gradients of
groups are drawn around ``H w``, estimated as in training, and shown to the policy.
"""

import dataclasses
import json
import math

import numpy as np
import pytest

from adabatch_jax import gradient_statistics, policies, scaling, schedules
from adabatch_jax.config import default_config
from adabatch_jax.policies import Observation

NUM_EXAMPLES = 10_000
GROUPS = 8
LEARNING_RATE = 0.5
STATISTICAL = (
    'cabs', 'big_batch', 'norm_test', 'inner_product', 'noise_scale', 'gradient_diversity', 'simigrad',
    'goodput',
)  # fmt: skip


def make(name, **changes):
    config = default_config()
    values = {
        'num_epochs': 1e4,
        'learning_rate.schedule': 'step' if name == 'seesaw' else 'constant',
        'batch.policy': name,
        'batch.base_size': 16,
        'batch.max_size': 1024,
        'batch.statistics.min_size': 4,
        'batch.statistics.decision_epochs': 0.05,
        'batch.statistics.decay': 0.995,
        'batch.statistics.max_switches': 0,
    }
    config.update_from_flattened_dict(values | changes)
    clock = schedules.Clock(NUM_EXAMPLES, config.num_epochs)
    rate = schedules.LearningRate(
        schedules.effective_schedule(config.learning_rate, clock), policies.coupling(config), 16
    )
    return policies.create(config, rate, clock)


@dataclasses.dataclass
class Quadratic:
    """``1/2 |w|^2_H`` with noise of covariance ``sigma^2 I``, at a point that stays where it is."""

    gradient: np.ndarray
    sigma: float
    seed: int = 0
    AHEAD = 64  # batches that are drawn and estimated at once

    def __post_init__(self):
        self.estimated, self.batch_size = iter(()), None
        self.rng = np.random.default_rng(self.seed)
        self.noise_scale = self.variance / max(self.squared_gradient, 1e-300)

    @property
    def variance(self):
        return self.sigma**2 * len(self.gradient)

    @property
    def squared_gradient(self):
        return float(self.gradient @ self.gradient)

    def estimate(self, batch_size):
        """Of some batches: variance, squared gradient, variance along it, squared norm."""
        noise = self.rng.standard_normal((self.AHEAD, GROUPS, len(self.gradient)))
        grads = self.gradient + noise * self.sigma / np.sqrt(batch_size / GROUPS)
        means = np.mean(grads, 1)
        q, m = np.mean(np.sum(grads**2, 2), 1), np.sum(means**2, 1)
        found = gradient_statistics.estimate(q, m, GROUPS, batch_size / GROUPS)
        scatter = np.sum((np.einsum('bgd,bd->bg', grads, means) - m[:, None]) ** 2, 1)
        along = scatter * batch_size / GROUPS / (GROUPS - 1)
        columns = found.variance, found.squared_gradient, along, m
        return zip(*(np.asarray(x, float).tolist() for x in columns), strict=True)

    def observe(self, batch_size, epoch, seconds, loss):
        statistics = next(self.estimated, None) if batch_size == self.batch_size else None
        if statistics is None:
            self.estimated, self.batch_size = self.estimate(batch_size), batch_size
            statistics = next(self.estimated)
        return Observation(epoch, batch_size, LEARNING_RATE, loss, seconds, *statistics)


def drive(policy, problem, epochs=30.0, seconds=lambda size: 1.0, loss=1.0):
    """The batch sizes that a policy takes, one behind as in training."""
    state, seen, sizes = policy.initial_state(), 0, []
    while seen < epochs * NUM_EXAMPLES:
        size = policy.decide(state, seen).batch_size
        if not sizes or size != sizes[-1]:
            sizes.append(size)
        observation = problem.observe(size, seen / NUM_EXAMPLES, seconds(size), loss)
        state = policy.observe(state, observation)
        seen += size
    return sizes, state


def nearest(size, ladder):
    return min(ladder, key=lambda rung: abs(math.log(rung / size)))


def at_least(size, ladder):
    return next(rung for rung in ladder if rung >= size)


def problem(noise_scale, dimension=200):
    """A problem with ``tr(Sigma) / |G|^2 = noise_scale`` and ``|G| = 1``."""
    gradient = np.ones(dimension) / np.sqrt(dimension)
    return Quadratic(gradient, math.sqrt(noise_scale / dimension))


# ------------------------------------------------------------ the batch size of the formula


@pytest.mark.parametrize('asked', [8, 64, 256])  # amid the boundaries of two rungs
def test_cabs_takes_learning_rate_times_variance_over_loss(asked):
    """f = 1/2 |w|^2 with additive noise: 2 lr tr(Sigma) / |w|^2."""
    given = problem(100.0)
    policy = make('cabs')
    loss = LEARNING_RATE * given.variance / asked
    sizes, _ = drive(policy, given, loss=loss)
    assert sizes[-1] == asked


def test_cabs_ends_at_the_floor_where_the_loss_does_not_vanish_at_the_minimum():
    """f_i = 1/2 |w - a_i|^2: at the minimum the loss is tr(Sigma) / 2, and B = 2 lr = 1."""
    given = Quadratic(np.zeros(200), 1.0)
    sizes, _ = drive(make('cabs'), given, loss=given.variance / 2)
    assert sizes[-1] == 4


def test_cabs_in_reference_mode_averages_as_the_authors_do():
    """After t updates at constant statistics: (1 - 0.95^t) xi and 0.95^t + (1 - 0.95^t) F."""
    policy = make('cabs', **{'batch.cabs.reference': True})
    state, variance, loss, size, t = policy.initial_state(), 7.0, 3.0, 16, 9
    for _ in range(t):
        state = policy.observe(state, Observation(0.0, size, 0.1, loss, 1.0, variance, 1.0))
    kept = 0.95**t
    assert state['weight'] == 1.0
    assert state['sums']['variance'] == pytest.approx((1 - kept) * variance * (1 - 1 / size))
    assert state['sums']['loss'] == pytest.approx(kept + (1 - kept) * loss)


@pytest.mark.parametrize('asked', [28, 100, 400])
def test_the_noise_scale_is_found_within_a_rung(asked):
    policy = make('noise_scale')
    assert drive(policy, problem(asked))[0][-1] == nearest(asked, policy.ladder)


@pytest.mark.parametrize('theta, asked', [(1.0, 90), (0.5, 360)])
def test_big_batch_ends_at_the_noise_scale_over_theta_squared(theta, asked):
    policy = make('big_batch', **{'batch.big_batch.theta': theta})
    assert drive(policy, problem(90.0))[0][-1] == at_least(asked, policy.ladder)


@pytest.mark.parametrize('name', ['norm_test', 'big_batch'])
def test_tests_against_the_noisy_norm_end_at_the_smaller_fixed_point(name):
    """B_s (1 - theta^2) / theta^2: with theta = 0.5 three times the noise scale, not four."""
    changes = {'batch.norm_test.theta': 0.5, 'batch.big_batch.theta': 0.5}
    policy = make(name, **changes, **{'batch.big_batch.unbiased': False})
    assert drive(policy, problem(40.0))[0][-1] == at_least(3 * 40, policy.ladder) == 128
    assert at_least(4 * 40, policy.ladder) == 256


def test_the_published_big_batch_test_with_theta_one_passes_on_average_at_every_batch():
    """Its norm holds the noise: the means differ by |G|^2 > 0, whatever the batch."""
    changes = {'batch.big_batch.unbiased': False, 'batch.big_batch.theta': 1.0}
    assert drive(make('big_batch', **changes), problem(500.0))[0] == [16]


def test_the_inner_product_test_asks_for_a_dimension_less_than_the_norm_test():
    """Sigma = sigma^2 I: V_ip / |G|^4 = sigma^2 / |G|^2, the d-th part of the noise scale.

    Growth ends at ``B |G_B|^2 = sigma^2 / theta^2``, where ``|G_B|^2 = 1 + noise_scale / B``.
    """
    dimension, noise_scale, theta = 4, 8.0, 0.1
    changes = {'batch.inner_product.theta': theta, 'batch.norm_test.theta': theta}
    given = problem(noise_scale, dimension)
    first = make('inner_product', **changes, **{'batch.inner_product.nu': 0.0})
    asked = noise_scale / dimension / theta**2 - noise_scale
    assert drive(first, given)[0][-1] == at_least(asked, first.ladder) == 256
    assert drive(make('norm_test', **changes), given)[0][-1] == 1024


def test_the_inner_product_test_takes_noise_for_signal_where_there_is_more_of_it():
    """Where d theta^2 > 1 the norm of the batch's own gradient passes any batch."""
    changes = {'batch.inner_product.theta': 0.5, 'batch.inner_product.nu': 0.0}
    assert drive(make('inner_product', **changes), problem(5000.0, 50))[0] == [16]


def test_the_augmented_test_takes_the_larger_of_the_two():
    averages = {'variance': 900.0, 'variance_along': 8.0, 'squared_norm': 2.0}
    theta, nu = 0.5, 2.0
    changes = {'batch.inner_product.theta': theta, 'batch.inner_product.nu': nu}
    policy = make('inner_product', **changes)
    along, orthogonal = 8.0 / (theta**2 * 2.0**2), (900.0 - 8.0 / 2.0) / (nu**2 * 2.0)
    assert policy.wanted(averages, {}) == max(along, orthogonal) == orthogonal
    assert policy.wanted(averages | {'variance': 5.0}, {}) == along


def test_gradient_diversity_is_one_plus_the_noise_scale():
    policy = make('gradient_diversity', **{'batch.gradient_diversity.delta': 2.0})
    assert policy.wanted({'variance': 30.0, 'squared_gradient': 2.0}, {}) == 2 * (1 + 15)
    assert drive(policy, problem(100.0))[0][-1] == nearest(202, policy.ladder)


def test_simigrad_ends_where_the_cosine_of_two_halves_meets_its_target():
    target, noise_scale = 0.6, 40.0
    policy = make('simigrad', **{'batch.simigrad.cosine': target})
    asked = policy.wanted({'variance': noise_scale, 'squared_gradient': 1.0}, {})
    assert 1 / (1 + 2 * noise_scale / asked) == pytest.approx(target)
    assert drive(policy, problem(noise_scale))[0][-1] == nearest(120, policy.ladder)


def test_the_cosine_of_halves_is_what_simigrad_takes_it_for():
    rng, dimension, batch, noise_scale = np.random.default_rng(0), 2000, 64, 40.0
    given = problem(noise_scale, dimension)
    halves = rng.standard_normal((200, 2, dimension)) * given.sigma / np.sqrt(batch / 2) + given.gradient
    norms = np.linalg.norm(halves, axis=2)
    cosines = np.einsum('ti,ti->t', halves[:, 0], halves[:, 1]) / norms.prod(1)
    assert np.mean(cosines) == pytest.approx(1 / (1 + 2 * noise_scale / batch), rel=0.03)


@pytest.mark.parametrize('fixed, per_example', [(1.0, 0.01), (0.1, 0.01)])
def test_goodput_is_largest_at_the_root_of_fixed_time_and_noise_scale(fixed, per_example):
    """T = a + c B: goodput B / ((a + c B) (phi + B)) is largest at sqrt(a phi / c)."""
    phi = 160.0
    policy = make('goodput')
    sizes, _ = drive(policy, problem(phi), seconds=lambda size: fixed + per_example * size)
    asked = math.sqrt(fixed * phi / per_example)
    assert sizes[-1] == nearest(asked, policy.ladder)
    every = np.arange(1, 5000)
    best = every[np.argmax(every / ((fixed + per_example * every) * (phi + every)))]
    assert best == pytest.approx(asked, abs=1)


def test_step_times_are_fitted_exactly_where_they_are_linear_and_never_negative():
    assert scaling.fit_line({8: 1.16, 32: 1.64, 64: 2.28}) == pytest.approx((1.0, 0.02))
    assert scaling.fit_line({8: 1.0}) == (1.0, 0.0)
    assert scaling.fit_line({8: 2.0, 16: 1.0})[1] == 0.0
    fixed, per_example = scaling.fit_line({8: 1.0, 16: 4.0})
    assert fixed == 0.0 and per_example > 0


# --------------------------------------------------------------------------- the limits


@pytest.mark.parametrize('name', STATISTICAL)
def test_without_noise_no_policy_grows(name):
    given = Quadratic(np.ones(20), 0.0)
    sizes, _ = drive(make(name), given, epochs=5, seconds=lambda size: 0.01 * size)
    assert max(sizes) == 16 or name == 'goodput'  # which tries one rung to know its time
    assert max(sizes) <= 32


@pytest.mark.parametrize('name', STATISTICAL)
def test_with_noise_only_a_policy_grows_to_the_top_or_stays(name):
    """Where ``|G|^2`` is 0 its estimate changes sign: quotients are then large or held."""
    given = Quadratic(np.zeros(100), 1.0, seed=1)
    sizes, _ = drive(make(name), given, loss=1e-6)
    assert sizes == sorted(sizes) or name in ('noise_scale', 'goodput')
    assert set(sizes) <= set(make(name).ladder)
    if name in ('cabs', 'simigrad', 'norm_test', 'big_batch'):
        assert sizes[-1] >= 512


@pytest.mark.parametrize('name', STATISTICAL)
def test_statistics_that_are_not_finite_leave_the_state_as_it_was(name):
    policy = make(name)
    good = Observation(0.0, 16, 0.1, 1.0, 1.0, 2.0, 1.0, 1.0, 1.0)
    state = policy.observe(policy.initial_state(), good)
    for bad in (math.nan, math.inf):
        broken = Observation(99.0, 16, 0.1, 1.0, 1.0, bad, bad, bad, bad)
        assert policy.observe(state, broken) == state


@pytest.mark.parametrize('name', [*STATISTICAL, 'adascale'])
def test_state_survives_json_without_changing_a_decision(name):
    policy, given = make(name), problem(200.0)
    _, state = drive(policy, given, epochs=2, seconds=lambda size: 1 + 0.01 * size)
    assert json.loads(json.dumps(state, allow_nan=False)) == state
    copy = json.loads(json.dumps(state))
    observation = given.observe(64, 9.0, 1.0, 1.0)
    assert policy.observe(copy, observation) == policy.observe(state, observation)


def test_a_decision_that_rests_on_measured_times_tells_them():
    policy = make('goodput')
    _, state = drive(policy, problem(200.0), epochs=2, seconds=lambda size: 1 + 0.01 * size)
    inputs = policy.decide(state, 0).inputs
    assert inputs['seconds_of_64'] == pytest.approx(1.64)
    assert not [key for key in make('noise_scale').initial_state()['inputs'] if 'seconds' in key]


# ----------------------------------------------------------------- steps on the ladder


def steady(policy, wanted, state=None, epochs=(0.0, 10.0), size=None, seconds=1.0):
    """Decisions on statistics that ask for one batch size, without noise."""
    state = state or policy.initial_state()
    for epoch in np.arange(*epochs, 0.05):
        now = policy.decide(state, 0).batch_size
        time = seconds(now) if callable(seconds) else seconds
        state = policy.observe(state, Observation(epoch, size or now, 0.1, 1.0, time, wanted, 1.0))
    return state


@pytest.mark.parametrize('options', [{}, {'batch.statistics.min_speedup': 1.1}], ids=str)
def test_a_batch_size_that_was_not_timed_yet_is_not_left_for_a_larger_one(options):
    policy = make('goodput' if not options else 'noise_scale', **options)
    base = policy.initial_state()['rung']
    state = steady(policy, 1000.0, seconds=math.nan)
    assert state['rung'] == base and state['times'] == {}
    assert steady(policy, 1000.0, state, (10.0, 20.0))['rung'] > base


def test_a_decision_moves_one_rung_unless_more_are_allowed():
    for most in (1, 3):
        policy = make('noise_scale', **{'batch.statistics.max_rungs': most})
        state, rungs = policy.initial_state(), [policy.initial_state()['rung']]
        for epoch in np.arange(0, 3, 0.06):
            state = policy.observe(state, Observation(epoch, 16, 0.1, 1.0, 1.0, 1000.0, 1.0))
            rungs.append(state['rung'])
        assert max(np.diff(rungs)) == most and policy.ladder[rungs[-1]] == 1024


def test_between_decisions_lie_the_epochs_that_were_asked_for():
    policy = make('noise_scale', **{'batch.statistics.decision_epochs': 1.0})
    state, changed = policy.initial_state(), []
    for epoch in np.arange(0, 5, 0.1):
        before, state = state, policy.observe(state, Observation(epoch, 16, 0.1, 1.0, 1.0, 1000.0, 1.0))
        if state['rung'] != before['rung']:
            changed.append(epoch)
    assert changed == pytest.approx([1, 2, 3, 4])


def test_a_size_within_the_hysteresis_of_a_boundary_changes_nothing_in_either_direction():
    boundary = math.sqrt(16 * 32)
    for factor, grown in ((1.05, 16), (0.95, 16), (1.15, 32)):
        policy = make('noise_scale')
        state = steady(policy, boundary * factor)
        assert policy.decide(state, 0).batch_size == grown
        back = steady(policy, boundary * 0.95, state, (10.0, 40.0))
        assert policy.decide(back, 0).batch_size == grown  # 32 needs 0.91 of the boundary to go back


def test_noise_around_a_boundary_does_not_make_the_batch_swing():
    policy = make('noise_scale', **{'batch.statistics.decay': 0.999})
    sizes, _ = drive(policy, problem(math.sqrt(64 * 128)), epochs=200)
    assert len(sizes) <= 5  # up to 64 or 128, and at most once from one to the other


def test_after_the_allowed_switches_the_batch_stays():
    policy = make('noise_scale', **{'batch.statistics.max_switches': 2})
    assert policy.decide(steady(policy, 1000.0), 0).batch_size == 64


def test_the_throughput_guard_ends_growth_where_the_last_rung_brought_too_little():
    policy = make('noise_scale', **{'batch.statistics.min_speedup': 1.1})
    state = steady(policy, 1000.0, seconds=lambda size: max(1.0, size / 64))  # saturates at 64
    assert policy.decide(state, 0).batch_size == 128


def test_times_of_other_devices_are_forgotten_and_nothing_else():
    policy = make('noise_scale', **{'batch.statistics.min_speedup': 1.1})
    state = steady(policy, 1000.0, seconds=lambda size: 1.0)
    assert state['times'] and policy.on_other_devices(state) == state | {'times': {}}


def test_averages_remember_examples_not_updates():
    policy = make('noise_scale')
    one = policy.averaged({'sums': {}, 'weight': 0.0}, {'variance': 3.0}, 64)
    four = {'sums': {}, 'weight': 0.0}
    for _ in range(4):
        four = policy.averaged(four, {'variance': 3.0}, 16)
    assert one['weight'] == pytest.approx(four['weight'])
    assert one['sums']['variance'] / one['weight'] == pytest.approx(3.0)


def test_the_reason_tells_the_numbers_and_the_inputs_hold_them():
    policy = make('noise_scale')
    decision = policy.decide(steady(policy, 1000.0, epochs=(0.0, 0.1)), 0)
    assert decision.reason.endswith(
        'NoiseScale asks for a batch of 1000 (variance 1000, squared gradient 1): from 16 to 32'
    )
    assert decision.inputs == pytest.approx({'variance': 1000, 'squared_gradient': 1, 'wanted': 1000})


def test_a_ladder_that_misses_the_base_size_is_refused():
    with pytest.raises(ValueError, match='max_size: got 64 with min_size 128 and growth_factor 2'):
        make('cabs', **{'batch.statistics.min_size': 128, 'batch.max_size': 64})
    with pytest.raises(ValueError, match='base_size: got 16, which growth by 2 from min_size 5'):
        make('cabs', **{'batch.statistics.min_size': 5})
