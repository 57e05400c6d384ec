"""Goodput: examples per second times what an example is worth in a batch of that size.

Qiao et al., "Pollux: Co-adaptive Cluster Scheduling for Goodput-Optimized Deep Learning", 2021, section
3: with the noise scale ``phi = tr(Sigma) / |G|^2`` an example in a batch of B is worth ``(phi + B0) /
(phi + B)`` of one in a batch of B0. The time of an update is measured here at every batch size in use
and modelled as ``a + c B``; goodput is then largest at ``sqrt(a phi / c)``.

Noise scale without the preconditioning that Pollux has for adaptive optimizers. Decisions depend on
measured times: two runs may differ, the replay of one does not.
"""

import math

from adabatch_jax.policies.base import State
from adabatch_jax.policies.statistical import StatisticalPolicy, measured_times, quotient

COUPLING = 'linear'


class Goodput(StatisticalPolicy):
    """``sqrt(a phi / c)``, to the nearest rung.

    As long as only one batch size has been timed, its time is taken for that of any: the next rung is
    tried. Where ``|G|^2`` is not above 0, or the present rung not yet timed, the batch stays.
    """

    needs_times = True

    def wanted(self, averages: dict[str, float], state: State) -> float:
        times = measured_times(state)
        if self.ladder[state['rung']] not in times:
            return math.nan
        fixed, per_example = fit_times(times)
        noise_scale = quotient(averages['variance'], averages['squared_gradient'])
        if not per_example:  # as far as is known a larger batch costs nothing
            return math.inf if noise_scale > 0 else math.nan
        return math.sqrt(fixed * noise_scale / per_example)


def fit_times(times: dict[int, float]) -> tuple[float, float]:
    """Least squares of ``seconds = a + c * batch_size`` with a and c not negative.

    Every size counts by its relative error, since larger batches take longer in all their parts.
    """
    if len(times) == 1:
        return next(iter(times.values())), 0.0
    # Minimise sum(((a + c B) / T - 1)^2).
    u = [1 / seconds for seconds in times.values()]
    v = [size / seconds for size, seconds in times.items()]
    uu, uv, vv = (sum(x * y for x, y in zip(*p, strict=True)) for p in ((u, u), (u, v), (v, v)))
    determinant = uu * vv - uv**2
    a, c = (vv * sum(u) - uv * sum(v)) / determinant, (uu * sum(v) - uv * sum(u)) / determinant
    if a < 0:
        return 0.0, sum(v) / vv
    return (a, c) if c >= 0 else (sum(u) / uu, 0.0)


create = Goodput
