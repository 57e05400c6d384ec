"""The train state, and what users import to look at a trained run.

In a notebook::

    from adabatch_jax import models, train_state
    state = train_state.restore('runs/quickstart')
    model = models.get_model('resnet8', num_classes=10)
    logits = model.apply(state.variables, images, train=False)

``images`` are float32 ``[batch, height, width, channels]``, normalised as in training, by
``experiment.describe(config.resolve(workdir.read_config('runs/quickstart'))).eval_spec.normalize``.
"""

import os
from typing import Any, Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax


@flax.struct.dataclass
class TrainState:
    """Everything on the devices that an update changes.

    Attributes:
      step: int32 scalar, updates taken.
      examples_seen: uint32 scalar, the clock.
      params: pytree of float32 arrays.
      batch_stats: BatchNorm running statistics, float32; empty for a model without.
      opt_state: the optimizer's state.
      rng: uint32 [2], root random key of the run; updates fold their number into it.
      reduction: what variance reduction keeps, see ``variance_reduction``; empty without.
    """

    step: jax.Array
    examples_seen: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any
    rng: jax.Array
    reduction: Any = flax.struct.field(default_factory=dict)

    @property
    def variables(self) -> dict[str, Any]:
        """What ``model.apply`` takes."""
        return {'params': self.params, 'batch_stats': self.batch_stats}


def create(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    image_shape: tuple[int, int, int],
    seed: int = 0,
    reduction: Any = None,
    compiler_options: dict[str, Any] | None = None,
) -> TrainState:
    """A fresh state; the same seed gives the same state on any number of devices.

    Args:
      model: a linen module, called ``model.apply(variables, images, train=...)``.
      optimizer: an optax transformation.
      image_shape: height, width, channels.
      seed: root of the initialisation and of the run's random key.
      reduction: ``variance_reduction.Svrg`` or ``Saga``, if one is used.
      compiler_options: of ``jax.jit``, for what makes it; none where JAX traces this call.
    """
    init_key, run_key = jax.random.split(jax.random.PRNGKey(seed))

    def initialise(key):
        images = jnp.zeros((1, *image_shape))
        logits, variables = model.init_with_output(key, images, train=False)
        params = variables['params']
        reduced = reduction.init(params, logits.shape[-1]) if reduction else {}
        return params, variables.get('batch_stats', {}), optimizer.init(params), reduced

    made = jax.jit(initialise, compiler_options=compiler_options)(init_key)
    params, batch_stats, opt_state, reduced = made
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        examples_seen=jnp.zeros((), jnp.uint32),
        params=params,
        batch_stats=batch_stats,
        opt_state=opt_state,
        rng=run_key,
        reduction=reduced,
    )


def restore(
    workdir: str | os.PathLike,
    step: int | Literal['latest', 'best'] | None = None,
    target: TrainState | None = None,
) -> TrainState:
    """The state that a work directory holds, on the default device, however many it was trained on.

    Args:
      workdir: a run's work directory.
      step: the update to restore; ``'best'`` for the one with the best accuracy in an evaluation,
        ``'latest'`` or None for the latest that was saved and is not damaged.
      target: a state of the same structure, from ``create``. Without one, ``opt_state`` comes back
        as plain dictionaries; everything else is the same.

    Raises:
      FileNotFoundError: no checkpoint there, or not that one; the message lists what exists.
      checkpoint.Damaged: its files are not what was written.
      ValueError: it does not hold the arrays of ``target``.
      TypeError: ``step`` is none of these.
    """
    from adabatch_jax import checkpoint

    folder = os.path.join(os.path.expanduser(workdir), checkpoint.FOLDER)
    tree, _ = checkpoint.restore(folder, step, target)
    tree = jax.tree.map(jnp.array, tree)
    return tree if isinstance(tree, TrainState) else TrainState(**tree)


def param_count(state_or_params: Any) -> int:
    """Number of trainable scalars in a state or in a pytree of parameters."""
    params = getattr(state_or_params, 'params', state_or_params)
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))


def params_digest(state: TrainState) -> str:
    """SHA-256 of parameters and batch statistics: equal digests are equal weights, bit for bit.

    See ``checkpoint.tree_digest`` for what is hashed.
    """
    from adabatch_jax import checkpoint

    return checkpoint.tree_digest({'params': state.params, 'batch_stats': state.batch_stats})
