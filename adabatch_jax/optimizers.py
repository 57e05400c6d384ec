"""optax chains by name. The learning rate stays outside: the train step sets it for every update."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

SAGA = ('saga', 'dynasaga')
REDUCED = ('svrg', *SAGA)  # SGD on gradients with less noise, see variance_reduction
OPTIMIZERS = ('sgd', 'lars', 'lars_optax', 'lamb', 'adam', 'adamw', 'adagrad', *REDUCED)
# Weight decay is part of their gradient, as that of a penalty: they minimise the loss and the penalty.
PENALISED = ('sgd', 'adam', 'adagrad', *REDUCED)
DECAYED = ('all', 'kernels')


def is_kernel(params: Any) -> Any:
    """True for weights of layers, false for biases and BatchNorm parameters, which are vectors."""
    return jax.tree.map(lambda x: jnp.ndim(x) > 1, params)


def penalty(params: Any, weight_decay: float, decayed: str) -> jax.Array:
    """``wd / 2 |w|^2`` over the parameters that are decayed: what weight decay adds to the loss."""
    chosen = [w for w in jax.tree.leaves(params) if decayed == 'all' or is_kernel(w)]
    return weight_decay / 2 * optax.tree.norm(chosen, squared=True)


def scale_by_lars(
    learning_rate: jax.Array, trust_coefficient: float, weight_decay: float, eps: float
) -> optax.GradientTransformation:
    """The layer-wise rate of LARS in the paper's form, applied before the momentum buffer.

    ``lr * eta * |w| / (|g| + wd |w| + eps) * (g + wd w)`` for kernels, the ratio 1 where either norm
    is 0; ``lr * g`` for biases and BatchNorm parameters. You, Gitman and Ginsburg, "Large Batch
    Training of Convolutional Networks", 2017, equation 6 and algorithm 1. optax.lars differs: it
    divides by the norm of ``g + wd w``. With either, a change of the learning rate reaches the buffer
    update by update.
    """

    def update_leaf(g, w):
        if jnp.ndim(w) <= 1:
            return learning_rate * g
        w_norm, g_norm = jnp.linalg.norm(w), jnp.linalg.norm(g)
        ratio = trust_coefficient * w_norm / (g_norm + weight_decay * w_norm + eps)
        ratio = jnp.where((w_norm > 0) & (g_norm > 0), ratio, 1.0)
        return learning_rate * ratio * (g + weight_decay * w)

    return optax.stateless(lambda updates, params: jax.tree.map(update_leaf, updates, params))


def _is_hyperparameter(path, _) -> bool:
    """Or what is kept of a schedule in its place; a parameter of the model may have the same name."""
    return any(getattr(key, 'name', '').startswith('hyperparams') for key in path[-2:-1])


def learning_rates(opt_state: Any) -> list[Any]:
    """What the state of an optimizer holds as ``learning_rate``: one scalar for those of ``create``.

    None without such a hyperparameter; a scalar and the schedule's state where that is a schedule.
    """
    found = optax.tree.get_all_with_path(opt_state, 'learning_rate', _is_hyperparameter)
    return [value for _, value in found]


def with_learning_rate(opt_state: Any, learning_rate: jax.typing.ArrayLike) -> Any:
    """The state of an optimizer for an update with a learning rate, a float32 scalar."""
    return optax.tree.set(opt_state, _is_hyperparameter, learning_rate=learning_rate)


@functools.cache
def create(
    name: str,
    *,
    momentum: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    decayed: str = 'all',
    trust_coefficient: float = 0.001,
    beta1: float = 0.9,
    beta2: float = 0.999,
    epsilon: float = 1e-8,
) -> optax.GradientTransformation:
    """An optimizer whose state holds ``learning_rate`` as a hyperparameter.

    Set it before an update with ``with_learning_rate``. Equal arguments give the same object, so that
    compiled steps can be found again by their optimizer.

    Args:
      name: one of ``OPTIMIZERS``. ``sgd``: ``v <- m v + g + wd w``, ``w <- w - lr v``, with the
        learning rate outside the buffer, which needs no momentum correction when the rate changes
        (Goyal et al., 2017, section 3). ``svrg``, ``saga``, ``dynasaga``: the same, of gradients with
        less noise, see ``variance_reduction``. ``lars``: see ``scale_by_lars``. The others are optax's.
      momentum: m of sgd and LARS; 0 keeps no buffer, but in optax's LARS.
      nesterov: look-ahead momentum of sgd and LARS.
      weight_decay: coefficient; added to the gradient, or to the update for adamw and lamb.
      decayed: ``'all'`` parameters, or ``'kernels'``: neither biases nor BatchNorm parameters, as
        Goyal et al., 2017, leave out those of BatchNorm. LARS always leaves out both.
      trust_coefficient: eta of LARS.
      beta1: decay of the first moment of adam, adamw and lamb.
      beta2: decay of their second moment.
      epsilon: added to a denominator; with adagrad to the sum of squares under its root.

    Raises:
      ValueError: an unknown name, or an unknown choice of ``decayed``.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f'name: got {name!r}; accepted: {", ".join(OPTIMIZERS)}')
    if decayed not in DECAYED:
        raise ValueError(f'decayed: got {decayed!r}; accepted: {", ".join(DECAYED)}')
    mask = is_kernel if decayed == 'kernels' else None
    decay = optax.add_decayed_weights(weight_decay, mask) if weight_decay else optax.identity()
    buffer = optax.trace(momentum, nesterov) if momentum else optax.identity()

    def build(learning_rate):
        down = optax.scale_by_learning_rate(learning_rate)
        if name in ('sgd', *REDUCED):
            return optax.chain(decay, buffer, down)
        if name == 'lars':
            rates = scale_by_lars(learning_rate, trust_coefficient, weight_decay, epsilon)
            return optax.chain(rates, buffer, optax.scale(-1.0))
        if name == 'lars_optax':
            return optax.lars(
                learning_rate,
                weight_decay,
                weight_decay_mask=is_kernel,
                trust_coefficient=trust_coefficient,
                eps=epsilon,
                trust_ratio_mask=is_kernel,
                momentum=momentum,
                nesterov=nesterov,
            )
        if name == 'lamb':
            return optax.lamb(learning_rate, beta1, beta2, epsilon, 0.0, weight_decay, mask)
        if name == 'adamw':
            return optax.adamw(
                learning_rate, beta1, beta2, epsilon, weight_decay=weight_decay, mask=mask
            )
        if name == 'adam':
            return optax.chain(decay, optax.scale_by_adam(beta1, beta2, epsilon), down)
        if name == 'adagrad':
            return optax.chain(decay, optax.scale_by_rss(eps=epsilon), down)
        raise ValueError(f'name: got {name!r}, which is in OPTIMIZERS; create does not make it')

    return optax.inject_hyperparams(build)(learning_rate=0.0)
