"""Pure train and evaluation steps, and the cache of compiled steps by batch size."""

from adabatch_jax.steps.compiled import CACHE, CompiledStep, StepCache, compile_step
from adabatch_jax.steps.pure import (
    AXIS_NAME,
    STATISTICS,
    Normalize,
    StepSpec,
    accumulate,
    apply_gradients,
    eval_step,
    train_step,
    zero_totals,
)

__all__ = [
    'AXIS_NAME',
    'CACHE',
    'STATISTICS',
    'CompiledStep',
    'Normalize',
    'StepCache',
    'StepSpec',
    'accumulate',
    'apply_gradients',
    'compile_step',
    'eval_step',
    'train_step',
    'zero_totals',
]
