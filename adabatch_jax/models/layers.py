"""The layers that all models share."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

AXIS_NAME = 'batch'  # the mapped axis of the train step, over which `sync` statistics are taken
BATCH_NORMS = ('local', 'sync')

# He et al., 2015, with fan-out, as the official AdaBatch code initialises its convolutions.
fan_out_normal = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')


def torch_uniform(fan_in: int) -> Callable:
    """PyTorch's default for weights and biases: uniform in ``+-1 / sqrt(fan_in)``."""
    bound = fan_in**-0.5

    def init(key, shape, dtype=jnp.float32):
        return nn.initializers.uniform(2 * bound)(key, shape, dtype) - bound

    return init


def norm_layer(batch_norm: str, dtype: Any, train: bool, **options) -> Callable[..., nn.Module]:
    """BatchNorm with the statistics that ``batch_norm`` names; running statistics when not training.

    ``local`` takes them over one device's microbatch, ``sync`` over the microbatches that all
    devices run at once. Running statistics move by 0.1 an update, as PyTorch's do.
    """

    def layer(**more):
        return nn.BatchNorm(
            use_running_average=not train,
            momentum=0.9,
            epsilon=1e-5,
            dtype=dtype,
            axis_name=AXIS_NAME if batch_norm == 'sync' and train else None,
            **(options | more),
        )

    return layer


class Classifier(nn.Module):
    """Linear layer to the classes, in float32 whatever the activations are, PyTorch's default init."""

    num_classes: int

    @nn.compact
    def __call__(self, x):
        init = torch_uniform(x.shape[-1])
        return nn.Dense(self.num_classes, kernel_init=init, bias_init=init, dtype=jnp.float32)(
            x.astype(jnp.float32)
        )
