"""What shapes a compiled step."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from adabatch_jax.losses import LOSSES, Loss
from adabatch_jax.variance_reduction import Saga, Svrg

AXIS_NAME = 'batch'  # of the mapped devices
STATISTICS = ('', 'norms', 'inner_products')  # of the gradients of groups
RULES = ('schedule', 'armijo', 'barzilai_borwein')  # where the step size comes from
# Groups of a device whose gradients are kept apart for inner products, at most; there are more where no
# number from 2 to this divides its microbatches.
MOST_GROUPS = 8
Batch = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Normalize:
    """uint8 images to float32 with zero mean and unit variance for each channel, on the device.

    ``mean`` and ``std`` are in units of the stored pixel values.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, images: jax.Array) -> jax.Array:
        return (images.astype(jnp.float32) - jnp.array(self.mean)) / jnp.array(self.std)


@dataclasses.dataclass(frozen=True)
class StepSpec:
    """Everything that shapes a compiled step; two equal specs share one executable.

    The learning rate is not in it: it enters the step as an array.

    Attributes:
      model: linen module; compares by its fields, the dtype of its activations among them.
      optimizer: optax transformation with a ``learning_rate`` hyperparameter; compares by identity.
      normalize: what turns stored images into the model's input.
      image_shape: height, width, channels.
      batch_size: examples over all devices and microbatches.
      num_microbatches: sequential parts of one device's share.
      train: a train step, or else an evaluation step.
      num_parts: in how many parts the images of a train step's batch come to the devices, each of
        equally many microbatches.
      skip_non_finite: whether a train step leaves the weights as they are when the loss, the gradient or
        the new weights are not finite.
      statistics: one of ``STATISTICS``: none; ``'norms'``, of the gradients of all microbatches; or
        ``'inner_products'``, of groups of microbatches, at the memory of one gradient a group.
      rule: one of ``RULES``, ``learning_rate.rule`` of the config; ``'barzilai_borwein'`` goes by
        ``statistics``.
      fraction: of the data set that a batch is; for the rule ``'barzilai_borwein'``.
      weight_decay: coefficient, and one of ``optimizers.DECAYED``, of the penalty that the optimizer
        minimises with the loss; for the rules that search.
      load: where the data set lives on the devices, what makes images and labels of it there; see
        ``input_pipeline.device.Load``. None where batches come with their images.
      num_updates: updates that one call of a train step makes, one after the other.
      loss: of each example ``[n]``, from logits and labels; a name in ``losses.LOSSES`` stands for what
        it names when the spec is made.
      reduction: what takes noise out of the gradients; it needs ``load``, to know the examples.
      snapshot: a step that adds to a snapshot of ``reduction``, rather than a train step.
      quick: compiled in less time, for a step that may be slower; on a CPU.
    """

    model: nn.Module
    optimizer: optax.GradientTransformation
    normalize: Callable[[jax.Array], jax.Array]
    image_shape: tuple[int, int, int]
    batch_size: int
    num_microbatches: int = 1
    train: bool = True
    num_parts: int = 1
    skip_non_finite: bool = False
    statistics: str = ''
    rule: str = 'schedule'
    fraction: float = 0.0
    weight_decay: tuple[float, str] = (0.0, 'all')
    load: Callable[[Batch, Batch], tuple[jax.Array, jax.Array]] | None = None
    num_updates: int = 1
    loss: str | Loss = 'cross_entropy'
    reduction: Svrg | Saga | None = None
    snapshot: bool = False
    quick: bool = False

    def __post_init__(self):
        accepted = {'statistics': STATISTICS, 'rule': RULES}
        if self.rule == 'barzilai_borwein':
            accepted['statistics'] = STATISTICS[1:]
        for name, values in accepted.items():
            if (got := getattr(self, name)) not in values:
                raise ValueError(f'{name}: got {got!r}; accepted: {", ".join(map(repr, values))}')
        loss = LOSSES.get(self.loss, self.loss)
        if not callable(loss):
            accepted = ', '.join(LOSSES)
            raise ValueError(f'loss: got {loss!r}; accepted: {accepted}, or a function such as those')
        object.__setattr__(self, 'loss', loss)

    @property
    def num_groups(self) -> int:
        """The parts of one device's share whose gradients are kept apart."""
        n = self.num_microbatches
        if self.statistics != 'inner_products':
            return 1
        few = max(k for k in range(1, MOST_GROUPS + 1) if n % k == 0)
        return few if few > 1 else n
