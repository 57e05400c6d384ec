"""The command line, killed from inside: ``fault_child.py SIGNAL POINT N ARGUMENTS...``.

The process gets the signal when the point is reached for the N-th time.
"""

import os
import shutil
import signal
import sys
import time

from adabatch_jax import checkpoint, evaluate, main, metrics, run, workdir
from adabatch_jax.distributed import processes

processes.HEARTBEAT_SECONDS = 10  # of one of several processes that is killed

# Where, and whether before or after it is called.
POINTS = {
    'the directory is locked': (workdir, '_lock', 'after'),
    'config.json is written, plan.json is not': (workdir, 'write_whole', 'after'),
    'a checkpoint was read': (checkpoint, 'restore', 'after'),
    'a stage is about to begin': (run.Run, 'enter_stage', 'before'),
    'a stage has begun': (run.Run, 'enter_stage', 'after'),
    'an update is on the devices': (run.Run, 'dispatch', 'after'),
    'an update was seen': (run.Run, 'observe', 'after'),
    'a record is half written': (metrics._Appended, 'flush', 'in'),
    'an evaluation is about to begin': (run.Run, 'evaluate', 'before'),
    'an evaluation is in the middle': (evaluate.distributed, 'put_ahead', 'before'),
    'an evaluation has ended': (run.Run, 'evaluate', 'after'),
    'a checkpoint is about to be written': (checkpoint.Checkpointer, 'save', 'before'),
    'a checkpoint is being written': (checkpoint.Checkpointer, 'save', 'after'),
    'a checkpoint is written, not read back': (checkpoint, '_read', 'before'),
    'a checkpoint is read back, without digests': (checkpoint, '_write_manifest', 'before'),
    'a checkpoint is not committed': (checkpoint, '_write_manifest', 'after'),
    'a checkpoint is committed': (checkpoint.Checkpointer, '_remove_old', 'before'),
    'an old checkpoint is being removed': (shutil, 'rmtree', 'before'),
    'the run is about to finish': (run.Run, 'finish', 'before'),
    'all but the summary is written': (checkpoint.Checkpointer, 'wait', 'after'),
}


def kill_at(number: int, point: str, n: int) -> None:
    owner, name, when = POINTS[point]
    original, calls = getattr(owner, name), 0

    def wrapped(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls > n and number == signal.SIGTERM:  # processes agree on an update to come: there is one
            time.sleep(0.3)
        if when == 'in' and calls == n:
            appended = args[0]
            appended._file.write(appended.waiting[: len(appended.waiting) // 2])
        if when != 'after' and calls == n:
            os.kill(os.getpid(), number)
        result = original(*args, **kwargs)
        if when == 'after' and calls == n:
            os.kill(os.getpid(), number)
        return result

    setattr(owner, name, wrapped)


if __name__ == '__main__':
    kill_at(signal.Signals[sys.argv[1]], sys.argv[2], int(sys.argv[3]))
    sys.exit(main.main(['main', *sys.argv[4:]]))
