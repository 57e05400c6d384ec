"""Checkpoints: device state and host state, saved and restored as one item by Orbax."""

import json
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint import checkpoint_managers

FOLDER = 'checkpoints'
UNEVALUATED = -1.0  # instead of an accuracy


def _metric(metrics: dict[str, float]) -> float:
    return metrics['accuracy']


class Checkpointer:
    """Saves asynchronously; keeps the two latest checkpoints and the one of best accuracy."""

    def __init__(self, directory: str | os.PathLike):
        self._manager = ocp.CheckpointManager(
            pathlib.Path(directory).absolute(),
            options=ocp.CheckpointManagerOptions(
                best_fn=_metric,
                best_mode='max',
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(
                    [
                        checkpoint_managers.LatestN(2),
                        checkpoint_managers.BestN(get_metric_fn=_metric, n=1),
                    ]
                ),
            ),
        )

    def save(self, step: int, state: Any, host: dict[str, Any], accuracy: float | None = None) -> None:
        """Begins to save; the state's buffers may be donated as soon as this returns.

        Args:
          step: updates taken, the name of the checkpoint.
          state: pytree of arrays.
          host: JSON-able state of the host.
          accuracy: of an evaluation of this very state, for keeping the best; None without one.
        """
        if step in self._manager.all_steps():
            return  # the end of the run, saved already
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), host=ocp.args.JsonSave(host))
        metrics = {'accuracy': UNEVALUATED if accuracy is None else accuracy}
        self._manager.save(step, args=args, metrics=metrics, force=True)

    def close(self) -> None:
        """Waits for what is being saved; raises what went wrong with it."""
        try:
            self._manager.wait_until_finished()
        finally:
            self._manager.close()


def steps(directory: str | os.PathLike) -> list[int]:
    """The committed checkpoints in a folder, oldest first."""
    folder = pathlib.Path(directory)
    if not folder.is_dir():
        return []
    committed = [path for path in folder.iterdir() if (path / '_CHECKPOINT_METADATA').is_file()]
    return sorted(int(path.name) for path in committed if path.name.isdecimal())


def best_step(directory: str | os.PathLike) -> int | None:
    """The checkpoint whose evaluation had the best accuracy, None where none was evaluated."""
    scored = []
    for step in steps(directory):
        try:
            metrics = json.loads(pathlib.Path(directory, str(step), 'metrics/metrics').read_text())
            if metrics['accuracy'] > UNEVALUATED:
                scored.append((metrics['accuracy'], step))
        except (OSError, ValueError, KeyError):
            continue
    return max(scored, default=(0, None))[1]


def restore(
    directory: str | os.PathLike, step: int | None = None, target: Any = None
) -> tuple[Any, dict[str, Any]]:
    """Reads a checkpoint onto all devices of this process's run, however many wrote it.

    Args:
      directory: the folder of the checkpoints.
      step: which one; None for the latest.
      target: pytree of arrays or shapes that gives the structure; None for the structure that was
        saved, in dictionaries.

    Returns:
      The pytree of replicated arrays, and the host state.

    Raises:
      FileNotFoundError: there is no such checkpoint.
    """
    directory = pathlib.Path(directory).absolute()
    existing = steps(directory)
    if not existing or (step is not None and step not in existing):
        what = 'no checkpoint' if step is None else f'no checkpoint of step {step}'
        have = f'; it has those of steps {", ".join(map(str, existing))}' if existing else ''
        raise FileNotFoundError(f'{what} in {str(directory)!r}{have}')
    step = existing[-1] if step is None else step
    everywhere = NamedSharding(Mesh(np.array(jax.devices()), ('batch',)), PartitionSpec())
    with ocp.CheckpointManager(
        directory,
        options=ocp.CheckpointManagerOptions(create=False),
        item_handlers={
            'state': ocp.StandardCheckpointHandler(),
            'host': ocp.JsonCheckpointHandler(),
        },
    ) as manager:
        if target is None:
            target = manager.item_metadata(step)['state'].tree
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), target
        )
        args = ocp.args.Composite(state=ocp.args.StandardRestore(shapes), host=ocp.args.JsonRestore())
        restored = manager.restore(step, args=args)
    # Restored buffers may not be donatable; those that come out of a compiled function are.
    copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))
    return copy(restored['state']), restored['host']
