"""optax chains by name. The learning rate stays outside: the train step sets it for every update."""

import functools

import optax


@functools.cache
def create(
    name: str, *, momentum: float = 0.9, nesterov: bool = False, weight_decay: float = 0.0
) -> optax.GradientTransformation:
    """An optimizer whose state holds ``learning_rate`` as a hyperparameter.

    Set it before an update with ``optax.tree.set(opt_state, learning_rate=...)``. Equal arguments
    give the same object, so that compiled steps can be found again by their optimizer.

    Args:
      name: ``'sgd'``: ``v <- m v + g + wd w``, ``w <- w - lr v`` with the learning rate outside the
        buffer, which needs no momentum correction when the rate changes (Goyal et al., 2017,
        section 3).
      momentum: m; 0 keeps no buffer.
      nesterov: look-ahead momentum.
      weight_decay: coefficient of every parameter, added to its gradient.

    Raises:
      ValueError: an unknown name.
    """
    if name != 'sgd':
        raise ValueError(f'optimizer: got {name!r}; accepted: sgd')

    def chain(learning_rate):
        return optax.chain(
            optax.add_decayed_weights(weight_decay) if weight_decay else optax.identity(),
            optax.trace(momentum, nesterov) if momentum else optax.identity(),
            optax.scale_by_learning_rate(learning_rate),
        )

    return optax.inject_hyperparams(chain)(learning_rate=0.0)
