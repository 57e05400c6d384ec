"""Two virtual CPU devices for every test, and the command line in a process of its own."""

import os
import tempfile
from importlib import metadata

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['JAX_NUM_CPU_DEVICES'] = '2'
os.environ['JAX_COMPILATION_CACHE_DIR'] = tempfile.mkdtemp(prefix='adabatch-test-cache-')
# Most of the time goes into compiling small steps. For the code as runs have it: XLA_FLAGS='' pytest.
# XLA does not start with a flag that it does not have: the third is gone from newer versions.
os.environ.setdefault(
    'XLA_FLAGS',
    '--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1'
    + ' --xla_cpu_use_fusion_emitters=false' * metadata.version('jaxlib').startswith('0.10.'),
)

import gc
import pathlib
import shutil
import subprocess
import sys

import jax
import pytest

from adabatch_jax import steps

ROOT = pathlib.Path(__file__).parent.parent
SLOWEST = (
    'accelerator',
    'distributed',
    'processes',
    'configs',
    'variance_reduction_runs',
    'faults',
    'damaged_images',
    'quickstart',
)


def pytest_collection_modifyitems(items):
    """The slowest files first, so that no process is left with one of them at the end."""
    items.sort(key=lambda item: item.path.stem.removeprefix('test_') not in SLOWEST)


@pytest.fixture(scope='session', autouse=True)
def two_devices():
    assert jax.device_count() == 2


@pytest.fixture(scope='session', autouse=True)
def private_compilation_cache():
    yield
    shutil.rmtree(os.environ['JAX_COMPILATION_CACHE_DIR'], ignore_errors=True)


@pytest.fixture(scope='module', autouse=True)
def no_compiled_code_of_other_modules():
    yield
    steps.CACHE.clear()
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def command_line():
    """Runs ``python -m adabatch_jax.main`` in a process of its own."""

    def run(*arguments, devices=2, module='adabatch_jax.main'):
        start = [sys.executable] if module is None else [sys.executable, '-m', module]
        return subprocess.run(
            [*start, *map(str, arguments)],
            cwd=ROOT,
            env=os.environ | {'JAX_NUM_CPU_DEVICES': str(devices)},
            capture_output=True,
            text=True,
            timeout=300,
        )

    run.root = ROOT
    return run
