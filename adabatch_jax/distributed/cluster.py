"""What is known of the processes of a run before they are brought together."""

import contextlib

import jax
from jax._src import clusters, xla_bridge  # neither question has a public name


def check(coordinator_address: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Refuses arguments of ``join`` that do not go together, with ``ValueError``."""
    if num_processes is not None and num_processes < 1:
        raise ValueError(f'num_processes: got {num_processes}; accepted: 1 or more')
    if process_id is not None and not 0 <= process_id < (num_processes or process_id + 1):
        raise ValueError(
            f'process_id: got {process_id} of {num_processes or "?"} processes; accepted: 0 to '
            'num_processes - 1'
        )
    _, colon, port = (coordinator_address or 'host:0').rpartition(':')
    if not (colon and port.isdecimal()):
        raise ValueError(
            f'coordinator_address: got {coordinator_address!r}; accepted: HOST:PORT of the first process'
        )


def is_in_use() -> bool:
    """Whether this process has begun to use JAX by itself, so that no others can join it any more."""
    return xla_bridge.backends_are_initialized() and not jax.distributed.is_initialized()


def num_found() -> int:
    """How many processes JAX finds under SLURM, Open MPI, Kubernetes or on a TPU pod; 1: this one."""
    others = '', None, 0, [0]  # but for their number nothing is asked for
    with contextlib.suppress(Exception):  # where there is nobody to ask
        found = clusters.ClusterEnv.auto_detect_unset_distributed_params(*others, None, None)
        return found[1] or 1
    return 1
