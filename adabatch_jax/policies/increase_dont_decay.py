"""Increase the batch where the schedule would decay the learning rate.

Smith, Kindermans, Ying and Le, "Don't Decay the Learning Rate, Increase the Batch Size", 2018: where
the schedule says ``lr / f``, keep ``lr`` and use the batch ``f B``; once the batch reaches its
ceiling, decay the learning rate again.

In this project's rule the effective rate decays in either case, and linear coupling to the grown
batch holds the learning rate up. That also makes the hybrids exact: a batch that may grow by less
than ``f``, for its ceiling or for rounding, leaves the rest to the learning rate.
"""

from fractions import Fraction

from adabatch_jax.policies.base import PlannedPolicy, check_grows
from adabatch_jax.schedules import Clock, LearningRate, decay_events, grow_at

COUPLING = 'linear'
NEEDS_SCHEDULE = True


def create(config, rate: LearningRate, clock: Clock) -> PlannedPolicy:
    """Grows by ``1 / learning_rate.decay_factor`` at the decay epochs of the step schedule.

    Raises:
      ValueError: the schedule is no step schedule, or the coupling would not hold the rate.
    """
    batch, learning_rate = config.batch, config.learning_rate
    if learning_rate.schedule != 'step' or learning_rate.decay_factor == 1:
        raise ValueError(
            f'policy increase_dont_decay: got schedule {learning_rate.schedule!r} with decay_factor '
            f'{learning_rate.decay_factor:g}; needs learning_rate.schedule step and a factor below 1'
        )
    if rate.coupling != 'linear':
        raise ValueError(
            f'policy increase_dont_decay: got coupling {rate.coupling!r}; needs linear, which holds the '
            'learning rate up while the effective rate decays'
        )
    events = [e for e in decay_events(learning_rate, clock) if e < clock.total_examples]
    growth = 1 / Fraction(str(learning_rate.decay_factor))
    transitions = grow_at(clock, batch.base_size, growth, events, batch.max_size)
    if events:
        check_grows([t.batch_size for t in transitions], batch)
    return PlannedPolicy(transitions)
