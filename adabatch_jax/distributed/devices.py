"""Devices: the mesh, the shardings, and how a batch gets onto them."""

import collections
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXIS_NAME = 'batch'


def mesh() -> Mesh:
    """All devices along one axis, ``'batch'``, process after process, as ``pmap`` takes them."""
    by_process = (jax.local_devices(process_index=k) for k in range(jax.process_count()))
    return Mesh(np.array(list(itertools.chain(*by_process))), (AXIS_NAME,))


def replicated() -> NamedSharding:
    """One copy on every device, without a leading device axis."""
    return NamedSharding(mesh(), PartitionSpec())


def sharded() -> NamedSharding:
    """The leading axis, one entry for each device, spread over the devices."""
    return NamedSharding(mesh(), PartitionSpec(AXIS_NAME))


def replicate(tree: Any) -> Any:
    """A copy of a pytree on every device, in buffers that a step may take over.

    What comes straight from the host can share its memory, and is not donated; what comes out of a
    compiled function is.
    """
    return _copy(put_everywhere(tree))


@jax.jit  # one for all calls, or each of them would compile it anew
def _copy(tree):
    return jax.tree.map(jnp.copy, tree)


def put_everywhere(tree: Any) -> Any:
    """Puts arrays on all devices, a copy on each; a step that donates needs ``replicate``.

    Every process gives the same; ``processes.share`` sees to that where it is not certain.
    """
    sharding = replicated()

    def put_one(x):
        if isinstance(x, jax.Array) and x.sharding == sharding:
            return x
        return jax.make_array_from_process_local_data(sharding, np.asarray(x))

    return jax.tree.map(put_one, tree)


def is_out_of_memory(error: Exception) -> bool:
    """Whether JAX raised an error because a device's memory did not suffice."""
    return 'RESOURCE_EXHAUSTED' in str(error)


def local_rows(batch_size: int) -> slice:
    """The examples of a global batch that this process's devices work on."""
    share = batch_size // jax.process_count()
    return slice(jax.process_index() * share, (jax.process_index() + 1) * share)


def split_parts(array: np.ndarray, num_parts: int) -> list[np.ndarray]:
    """Splits this process's rows into parts that each hold equally many of every device's.

    The first part has the first rows of every device, in the order that ``put`` expects.
    """
    if num_parts == 1:
        return [array]
    per_device = array.reshape(jax.local_device_count(), num_parts, -1, *array.shape[1:])
    return [per_device[:, k].reshape(-1, *array.shape[1:]) for k in range(num_parts)]


def put(batch: Any) -> Any:
    """Puts this process's share of a batch on its devices.

    Args:
      batch: pytree of host arrays ``[examples of this process, ...]``.

    Returns:
      Global arrays ``[devices, examples of a device, ...]``; the copies run asynchronously.
    """
    devices = jax.local_device_count()
    return put_split(jax.tree.map(lambda x: x.reshape(devices, -1, *x.shape[1:]), batch))


def put_split(batch: Any) -> Any:
    """As ``put``, for host arrays ``[devices of this process, ...]``."""
    sharding = sharded()
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def put_ahead(batches: Iterable[Any]) -> Iterator[Any]:
    """Puts batches on the devices two ahead of their use.

    What making a batch raises is raised in its turn: nobody may ask for that batch.
    """

    def made():
        try:
            yield from map(put, batches)
        except Exception as error:
            yield error

    ahead = made()
    queue = collections.deque(itertools.islice(ahead, 2))
    while queue:
        batch = queue.popleft()
        if isinstance(batch, Exception):
            raise batch
        yield batch
        queue.extend(itertools.islice(ahead, 1))
