"""Processes of one run, started by a test and ended with it."""

import os
import socket
import subprocess
import sys

from conftest import ROOT

# Of the largest weight: what another order of summation makes of it in some twenty updates.
BOUND = 1e-5
FLAGS = ('--config=tests/small_run.py', '--config.checkpoint_every_epochs=0.5')
NONE = ('SIGTERM', 'an update was seen', 10**6)


def free_port():
    with socket.socket() as probe:
        probe.bind(('localhost', 0))
        return probe.getsockname()[1]


def start(arguments, devices, environment=()):
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ
        | {'PYTHONPATH': str(ROOT), 'JAX_NUM_CPU_DEVICES': str(devices)}
        | dict(environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(started, timeout=300):
    """Output and exit status of each; none outlives the test."""
    try:
        return [(process.communicate(timeout=timeout)[0], process.returncode) for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()


def two(*beginnings):
    """Two processes with two devices each, with what their command lines begin with."""
    together = (f'--coordinator_address=localhost:{free_port()}', '--num_processes=2')
    return [
        start((*beginning, *together, f'--process_id={k}'), 2) for k, beginning in enumerate(beginnings)
    ]


def tasks(count):
    """The variables that srun sets for some tasks on one node."""
    job = {'SLURM_JOB_ID': str(free_port()), 'SLURM_STEP_NODELIST': 'localhost'}
    job['SLURM_NTASKS'] = str(count)
    return [job | {'SLURM_PROCID': str(k), 'SLURM_LOCALID': str(k)} for k in range(count)]


def commands(workdir, *faults, flags=()):
    """Two processes of the command, which get the signals at the points that ``faults`` say."""
    child, arguments = ROOT / 'tests/fault_child.py', (*FLAGS, *flags, f'--workdir={workdir}')
    return two(*((child, *fault, *arguments) for fault in faults))
