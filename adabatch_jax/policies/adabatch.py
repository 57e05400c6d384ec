"""AdaBatch: the batch grows by a factor at fixed intervals of epochs.

Devarakonda, Naumov and Garland, "AdaBatch: Adaptive Batch Sizes for Training Deep Neural
Networks", 2017, section 3: every T epochs ``B <- floor(beta B)`` and ``lr <- gamma_a lr``. It moves
the weights, to first order, as far an epoch as the fixed batch with ``gamma_f = gamma_a / beta``:
the decay of the effective learning rate, which is what this project's configs state.
"""

import itertools

from adabatch_jax.policies.base import PlannedPolicy, check_grows
from adabatch_jax.schedules import Clock, LearningRate, grow_at

COUPLING = 'linear'


def create(config, rate: LearningRate, clock: Clock) -> PlannedPolicy:
    """Grows by ``batch.growth_factor`` every ``batch.growth_epochs`` up to ``batch.max_size``.

    At the ceiling the decay of the effective rate alone goes on. Where there is no decay either,
    a growth would silently do nothing, which is an error.

    Raises:
      ValueError: a growth past ``batch.max_size`` leaves both batch and learning rate as they are.
    """
    batch = config.batch
    events = clock.multiples(batch.growth_epochs, 'growth_epochs')
    transitions = grow_at(clock, batch.base_size, batch.growth_factor, events, batch.max_size)
    if events:
        check_grows([t.batch_size for t in transitions], batch)
    grown = {t.examples_seen for t in transitions}
    if config.learning_rate.rule != 'schedule':  # nothing decays, whatever the batch does
        return PlannedPolicy(transitions)
    for before, event in itertools.pairwise((0, *events)):
        start, last, end = map(clock.epoch, (before, event - 1, event))
        # From the last example too: a decay in the middle of a warm-up.
        if event not in grown and rate.effective_at(end) >= rate.effective_at([start, last]).max():
            raise ValueError(
                f'max_size: got {batch.max_size}: the growth at epoch {end:g} has nothing to do, '
                'since the batch is at its ceiling and the effective learning rate does not decay '
                'there; raise batch.max_size, grow less often, or choose a schedule that decays'
            )
    return PlannedPolicy(transitions)
