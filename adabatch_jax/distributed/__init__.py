"""Many devices, many processes: where a batch goes, and how processes begin, agree and end."""

from adabatch_jax.distributed.devices import (
    AXIS_NAME,
    local_rows,
    mesh,
    put,
    put_ahead,
    put_everywhere,
    put_split,
    replicate,
    replicated,
    sharded,
    split_parts,
)
from adabatch_jax.distributed.processes import (
    asked_to_stop,
    fail,
    from_first,
    is_alone,
    is_first,
    is_joined,
    join,
    share,
    smallest,
)

__all__ = [
    'AXIS_NAME',
    'asked_to_stop',
    'fail',
    'from_first',
    'is_alone',
    'is_first',
    'is_joined',
    'join',
    'local_rows',
    'mesh',
    'put',
    'put_ahead',
    'put_everywhere',
    'put_split',
    'replicate',
    'replicated',
    'share',
    'sharded',
    'smallest',
    'split_parts',
]
