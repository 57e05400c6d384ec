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
from adabatch_jax.scaling import fit_line

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
        fixed, per_example = fit_line(times)
        noise_scale = quotient(averages['variance'], averages['squared_gradient'])
        if not per_example:  # as far as is known a larger batch costs nothing
            return math.inf if noise_scale > 0 else math.nan
        return math.sqrt(fixed * noise_scale / per_example)


create = Goodput
