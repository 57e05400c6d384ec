"""Two virtual CPU devices for every test, and small runs to look at."""

import os

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['JAX_NUM_CPU_DEVICES'] = '2'

import pathlib
import subprocess
import sys

import jax
import pytest

from adabatch_jax.config import default_config

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope='session', autouse=True)
def two_devices():
    assert jax.device_count() == 2


@pytest.fixture(scope='session', autouse=True)
def private_compilation_cache(tmp_path_factory):
    jax.config.update('jax_compilation_cache_dir', str(tmp_path_factory.mktemp('cache')))


@pytest.fixture
def tiny_config():
    """A run of a second or two: 128 made images, batch 8 doubling to 32 over three epochs."""
    config = default_config()
    config.num_epochs = 3.0
    config.log_every_steps = 4
    config.model.name = 'resnet8'
    config.dataset.name = 'synthetic'
    config.dataset.num_examples = 100
    config.dataset.image_size = 8
    config.dataset.crop_padding = 1
    config.dataset.eval_batch_size = 64
    config.batch.base_size = 8
    config.batch.growth_epochs = 1.0
    config.learning_rate.effective = 0.02
    config.learning_rate.reference_batch_size = 8
    return config


@pytest.fixture
def command_line():
    """Runs ``python -m adabatch_jax.main`` in a process of its own."""

    def run(*arguments, devices=2, module='adabatch_jax.main', **options):
        environment = os.environ | {'JAX_NUM_CPU_DEVICES': str(devices)}
        return subprocess.run(
            [sys.executable, '-m', module, *map(str, arguments)],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            **options,
        )

    return run
