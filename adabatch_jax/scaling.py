"""How long a run takes on any number of devices: measured computation, modelled communication.

An update with a batch of B examples on P devices takes

    compute(B / P) + 2 ceil(log2 P) alpha + 2 (P - 1) / P n beta

``compute`` comes from measurements of what a device takes for its share of a batch. The rest is the cost
of adding up gradients of n bytes by recursive halving and doubling, with a latency of alpha seconds a
message and beta seconds a byte (Rabenseifner's algorithm, in Thakur, Rabenseifner and Gropp,
"Optimization of Collective Communication Operations in MPICH", 2005). Nothing of it is hidden behind
computation, all devices are alike, and so are all links between them: the model says how a run scales,
not to the second how long it takes.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from adabatch_jax.schedules import Plan, Stage

# Twice the devices pay off where they train at least so many times as fast.
WORTH = 1.5


@dataclasses.dataclass(frozen=True)
class Network:
    """What communication costs.

    Attributes:
      latency: seconds of a message, alpha.
      seconds_per_byte: beta.
    """

    latency: float
    seconds_per_byte: float

    def all_reduce(self, num_devices: int, num_bytes: int) -> float:
        """Seconds in which devices add up ``num_bytes`` of each."""
        messages, part = _steps(num_devices)
        return messages * self.latency + part * num_bytes * self.seconds_per_byte


def _steps(num_devices: int) -> tuple[int, float]:
    """How often latency is paid, and for which multiple of the data bandwidth."""
    return 2 * math.ceil(math.log2(num_devices)), 2 * (num_devices - 1) / num_devices


def fit_network(num_devices: int, seconds: dict[int, float]) -> Network:
    """The network that explains measured times best.

    Args:
      num_devices: that they were measured on, two or more.
      seconds: of an all-reduce, by its bytes.
    """
    fixed, per_byte = fit_line(seconds)
    messages, part = _steps(num_devices)
    return Network(fixed / messages, per_byte / part)


def fit_line(seconds: dict[int, float]) -> tuple[float, float]:
    """Least squares of ``seconds = a + c * size``, a and c not negative, by relative errors.

    Relative, since larger sizes take longer in all their parts. One size is taken for the time of any.

    Args:
      seconds: by size, one or more.
    """
    if len(seconds) == 1:
        return next(iter(seconds.values())), 0.0
    # Minimise sum(((a + c size) / time - 1)^2).
    u = [1 / time for time in seconds.values()]
    v = [size / time for size, time in seconds.items()]
    uu, uv, vv = (sum(x * y for x, y in zip(*p, strict=True)) for p in ((u, u), (u, v), (v, v)))
    determinant = uu * vv - uv**2
    a, c = (vv * sum(u) - uv * sum(v)) / determinant, (uu * sum(v) - uv * sum(u)) / determinant
    if a < 0:
        return 0.0, sum(v) / vv
    return (a, c) if c >= 0 else (sum(u) / uu, 0.0)


@dataclasses.dataclass(frozen=True)
class Model:
    """A run's updates on any number of devices.

    Attributes:
      gradient_bytes: what an update adds up over the devices.
      network: between them.
      computation: seconds by the examples of a device, measured, in order of the examples.
    """

    gradient_bytes: int
    network: Network
    computation: tuple[tuple[float, float], ...]

    @classmethod
    def from_benchmark(cls, result: dict[str, Any], gradient_bytes: int | None = None) -> 'Model':
        """The model of what ``benchmark --scaling --json`` wrote.

        Args:
          result: what the file holds.
          gradient_bytes: of the network that it is wanted for; None for the one that was measured.

        Raises:
          ValueError: it did not write that, or measured another network.
        """
        try:
            scaling, num_devices = result['scaling'], result['num_devices']
            network = Network(scaling['latency'], scaling['seconds_per_byte'])
            num_bytes = scaling['gradient_bytes']
            updates = {m['batch_size']: m['step_seconds'] for m in result['batch_sizes']}
        except (KeyError, TypeError) as error:
            raise ValueError(f'no figures of benchmark --scaling: {error} is missing') from error
        if num_bytes != (gradient_bytes or num_bytes):
            raise ValueError(
                f'got figures of a network with {num_bytes:,} bytes of gradients; accepted: of one with '
                f"{gradient_bytes:,}, as the config's has"
            )
        return cls(num_bytes, network, computation(num_devices, updates, network, num_bytes))

    def compute(self, examples: float) -> float:
        """Seconds that a device computes for its share of a batch.

        Linear between two measurements, and past the last, but no less than that; below the first as the
        line through the first two says, but no less than in proportion to the examples.
        """
        points = self.computation
        if len(points) == 1:
            return points[0][1] * examples / points[0][0]
        pairs = list(itertools.pairwise(points))
        (x0, y0), (x1, y1) = next((p for p in pairs if examples <= p[1][0]), pairs[-1])
        seconds = y0 + (examples - x0) * (y1 - y0) / (x1 - x0)
        least = points[-1][1] if examples > points[-1][0] else 0.0
        return max(seconds, least, points[0][1] * min(examples / points[0][0], 1))

    def update(self, batch_size: int, num_devices: int) -> float:
        """Seconds of an update; of more devices than examples, some have nothing to do."""
        num_devices = min(num_devices, batch_size)
        share = math.ceil(batch_size / num_devices)
        return self.compute(share) + self.network.all_reduce(num_devices, self.gradient_bytes)

    def worthwhile(
        self, batch_size: int, num_devices: int, can_split: Callable[[int], bool] | None = None
    ) -> int:
        """How many of some devices pay off: more, as long as twice as many would gain ``WORTH``.

        Args:
          batch_size: in examples.
          num_devices: at most.
          can_split: over which numbers of devices; where left out, those that it divides over.
        """
        found, can_split = 1, can_split or (lambda count: batch_size % count == 0)
        for more in filter(can_split, range(2, min(num_devices, batch_size) + 1)):
            gain = WORTH ** math.log2(more / found)
            if self.update(batch_size, found) >= gain * self.update(batch_size, more):
                found = more
            elif more >= 2 * found:  # below that, the cost of one more message alone may hide the gain
                break
        return found

    def run(self, stages: Iterable[Stage], num_devices: int) -> float:
        """Seconds of all updates, on all devices."""
        return sum(stage.num_updates * self.update(stage.batch_size, num_devices) for stage in stages)

    def worthwhile_run(self, plan: Plan, num_devices: int) -> float:
        """Seconds of all updates, in each stage on devices that pay off and can share its batch."""
        total = 0.0
        for stage in plan.stages:
            can_split = functools.partial(plan.can_split, stage.batch_size)
            paying = self.worthwhile(stage.batch_size, num_devices, can_split)
            total += stage.num_updates * self.update(stage.batch_size, paying)
        return total


def computation(
    num_devices: int, updates: dict[int, float], network: Network, gradient_bytes: int
) -> tuple[tuple[float, float], ...]:
    """What a device computes, from updates measured on some devices: their time less communication.

    Args:
      num_devices: that they were measured on.
      updates: seconds by batch size.
      network: between the devices.
      gradient_bytes: what an update adds up.
    """
    spent = network.all_reduce(num_devices, gradient_bytes)
    return tuple(
        # Noise may make communication alone look longer than the whole.
        (size / num_devices, max(seconds - spent, seconds / 10))
        for size, seconds in sorted(updates.items())
    )


def doubled(most: int) -> list[int]:
    """1, 2, 4, ... up to ``most``."""
    return [2**k for k in range(most.bit_length())]


def predictions(model: Model, fixed: Plan, adaptive: Plan, devices: Sequence[int]) -> list[dict]:
    """What two plans take on some numbers of devices.

    Returns:
      For each number ``devices``, and seconds ``fixed``, ``adaptive`` and ``worthwhile``: the adaptive
      run with as many devices in each stage as pay off there.
    """
    return [
        {
            'devices': count,
            'fixed': model.run(fixed.stages, count),
            'adaptive': model.run(adaptive.stages, count),
            'worthwhile': model.worthwhile_run(adaptive, count),
        }
        for count in devices
    ]
