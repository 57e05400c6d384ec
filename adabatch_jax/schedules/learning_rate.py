"""The effective learning rate over epochs, and its coupling to the batch size."""

import dataclasses
import functools
import itertools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from adabatch_jax.schedules.clock import Clock

AT_ONCE = 32  # epochs whose rates are worked out together
COUPLINGS = {'linear': 1.0, 'sqrt': 0.5, 'none': 0.0}
ENDING = ('cosine', 'polynomial')  # schedules that go to 0 at the end of the run


def step_schedule(value: float, decay_factor: float, epochs: Iterable[float]) -> optax.Schedule:
    """``value`` times ``decay_factor`` for every one of ``epochs`` that has passed."""
    return optax.piecewise_constant_schedule(value, dict.fromkeys(epochs, decay_factor))


def decay_events(rate, clock: Clock) -> tuple[int, ...]:
    """The positions at which a step schedule decays, on whole examples as growths of the batch are.

    At the epochs ``rate.decay_at_epochs``, or where there are none every ``rate.decay_epochs``.
    """
    if not rate.decay_at_epochs:
        return clock.multiples(rate.decay_epochs, 'decay_epochs')
    events = tuple(clock.examples(epoch) for epoch in rate.decay_at_epochs)
    if any(b <= a for a, b in itertools.pairwise((0, *events))):
        raise ValueError(
            f'decay_at_epochs: got {tuple(rate.decay_at_epochs)}; needs rising positive epochs'
        )
    return events


def effective_schedule(rate, clock: Clock) -> optax.Schedule:
    """The effective learning rate over epochs that ``config.learning_rate`` describes.

    Linear warm-up is a factor that rises from ``warmup_initial`` to 1 over ``warmup_epochs``; the
    decays of a step schedule stay where they are (Goyal et al., 2017, section 2.2), a cosine or
    polynomial decay begins when warm-up ends and reaches 0 at the end of the run.

    Args:
      rate: an object with the keys of ``config.learning_rate`` as attributes.
      clock: of the run.
    """
    num_epochs, warmup = clock.num_epochs, rate.warmup_epochs
    if not 0 <= warmup < num_epochs:
        raise ValueError(
            f'warmup_epochs: got {warmup:g}; accepted: from 0 to below num_epochs ({num_epochs:g})'
        )
    value, decay_length = rate.effective, num_epochs - warmup
    if rate.schedule == 'constant':
        schedule = optax.constant_schedule(value)
    elif rate.schedule == 'step':
        events = [clock.epoch(event) for event in decay_events(rate, clock)]
        schedule = step_schedule(value, rate.decay_factor, events)
    elif rate.schedule == 'cosine':
        cosine = optax.cosine_decay_schedule(value, decay_length)
        schedule = optax.join_schedules([optax.constant_schedule(value), cosine], [warmup])
    elif rate.schedule == 'polynomial':
        schedule = optax.polynomial_schedule(value, 0.0, rate.power, decay_length, warmup)
    else:
        raise ValueError(
            f'schedule: got {rate.schedule!r}; accepted: constant, step, cosine, polynomial'
        )
    if warmup == 0:
        return schedule
    ramp = optax.linear_schedule(rate.warmup_initial, 1.0, warmup)
    return lambda epoch: schedule(epoch) * ramp(epoch)


@dataclasses.dataclass(frozen=True)
class LearningRate:
    """``effective(epoch) * (batch_size / reference_batch_size) ** p``.

    Attributes:
      effective: optax schedule over training progress in epochs, or a number for a constant one: the
        learning rate at the reference batch size. Never over the step count, since a step is worth a
        different amount of data in each stage.
      coupling: ``'linear'`` (p = 1), ``'sqrt'`` (p = 1/2) or ``'none'`` (p = 0).
      reference_batch_size: the batch size for which the effective rate is stated.
    """

    effective: optax.ScalarOrSchedule
    coupling: str = 'linear'
    reference_batch_size: int = 128

    def __post_init__(self):
        if not callable(self.effective):
            object.__setattr__(self, 'effective', optax.constant_schedule(self.effective))
        if self.coupling not in COUPLINGS:
            raise ValueError(f'coupling: got {self.coupling!r}; accepted: {", ".join(COUPLINGS)}')
        if self.reference_batch_size < 1:
            raise ValueError(f'reference_batch_size: got {self.reference_batch_size}; needs >= 1')

    def __call__(self, epoch, batch_size):
        """Learning rate of an update that starts at ``epoch``; numbers or arrays, in float64."""
        rate = self.factor(batch_size) * self.effective_at(epoch)
        return rate if np.ndim(rate) else float(rate)

    def factor(self, batch_size):
        """What the effective rate is multiplied by for a batch size; a number or an array."""
        return (np.asarray(batch_size) / self.reference_batch_size) ** COUPLINGS[self.coupling]

    def effective_at(self, epoch) -> np.ndarray:
        """The effective rate at an epoch or an array of epochs, in float64.

        Worked out on the host in double precision: in float32 the last update before a decay
        at epoch 60 of ImageNet would round to the decay, and the question would queue behind the
        training step on an accelerator. An epoch has the same rate whichever it is asked for with.
        """
        host, epochs = _host_device(), np.asarray(epoch, np.float64)
        filled = np.resize(epochs, (-(-epochs.size // AT_ONCE), AT_ONCE))
        with jax.enable_x64(True), jax.default_device(host):
            rates = jax.device_get(self._compiled(jax.device_put(filled, host)))
        return np.ravel(rates)[: epochs.size].reshape(epochs.shape)

    def _effective_at(self, epoch):
        return jnp.asarray(self.effective(epoch), jnp.float64).reshape(())

    @functools.cached_property
    def _compiled(self):
        # One after the other, and always as many: a polynomial of one alone was rounded otherwise.
        one_by_one = functools.partial(lax.map, self._effective_at)
        return jax.jit(functools.partial(lax.map, one_by_one))


def _host_device():
    try:
        return jax.local_devices(backend='cpu')[0]
    except RuntimeError:  # JAX_PLATFORMS leaves the CPU out
        return None
