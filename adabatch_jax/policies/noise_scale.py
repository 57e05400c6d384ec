"""The gradient noise scale: batches at which noise and signal are of one size.

McCandlish, Kaplan, Amodei and the OpenAI Dota team, "An Empirical Model of Large-Batch Training", 2018,
section 2.2: ``B_simple = tr(Sigma) / |G|^2``. Well below it examples are used best, well above it
further examples are wasted. It tells the trend of the critical batch size, not its value: that is for
``batch.noise_scale.scale`` to set.
"""

from adabatch_jax.policies.base import State
from adabatch_jax.policies.statistical import StatisticalPolicy, quotient

COUPLING = 'linear'


class NoiseScale(StatisticalPolicy):
    """``scale * variance / squared_gradient``, to the nearest rung."""

    def wanted(self, averages: dict[str, float], state: State) -> float:
        return self.own.scale * quotient(averages['variance'], averages['squared_gradient'])


create = NoiseScale
