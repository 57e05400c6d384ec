"""Pure train and evaluation steps, and the cache of compiled steps by batch size."""

from adabatch_jax.steps.compiled import (
    CACHE,
    MOST_STEPS,
    CompiledStep,
    StepCache,
    batch_shapes,
    compile_part,
    compile_step,
    for_one_use,
)
from adabatch_jax.steps.pure import (
    batch_gradient,
    batch_loss,
    eval_step,
    train_step,
    train_steps,
)
from adabatch_jax.steps.spec import RULES, STATISTICS, Normalize, StepSpec

__all__ = [
    'CACHE',
    'MOST_STEPS',
    'RULES',
    'STATISTICS',
    'CompiledStep',
    'Normalize',
    'StepCache',
    'StepSpec',
    'batch_gradient',
    'batch_loss',
    'batch_shapes',
    'compile_part',
    'compile_step',
    'eval_step',
    'for_one_use',
    'train_step',
    'train_steps',
]
