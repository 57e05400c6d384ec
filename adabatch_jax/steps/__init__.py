"""Pure train and evaluation steps, and the cache of compiled steps by batch size."""

from adabatch_jax.steps.compiled import (
    CACHE,
    FOR_ONE_USE,
    MOST_STEPS,
    CompiledStep,
    StepCache,
    batch_shapes,
    compile_part,
    compile_step,
    cpu_options,
)
from adabatch_jax.steps.pure import (
    batch_gradient,
    batch_loss,
    eval_step,
    train_step,
    train_steps,
)
from adabatch_jax.steps.spec import STATISTICS, Normalize, StepSpec

__all__ = [
    'CACHE',
    'FOR_ONE_USE',
    'MOST_STEPS',
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
    'cpu_options',
    'eval_step',
    'train_step',
    'train_steps',
]
