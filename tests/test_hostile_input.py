"""Configs come from others: whatever they say ends in 0 or 2 with one line, never in a traceback."""

import contextlib
import io
import os
import signal
import subprocess
import sys

import jax
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from test_main import TINY

from adabatch_jax import main, memory
from adabatch_jax.config import default_config, flatten

SECONDS = 60  # for one example; a hang, not a slow machine
DEFAULTS = flatten(default_config())
ODD = st.sampled_from(
    [
        *('', '-1', '0', '1', '2', '3', '7', '8', '9' * 30, '1_000', '0x10', 'None', 'true', 'False'),
        *('1e-9', '0.5', '1.0000001', '1e9', '1e308', 'nan', 'inf', '-inf'),
        *('()', '(1,)', '((0,8),(1,16))', '((0,8),(0,16))', '((0,0),)', '[1', "'", '%', '\\x00', 'ü'),
        *("__import__('os').getpid()", '../..', 'a b', 'digits', 'train[:50%]', 'test[3:9]'),
        *('plateau', 'stages', 'fixed', 'increase_dont_decay', 'friedlander_schmidt', 'skip', 'drop'),
        *('sqrt', 'cosine', 'polynomial', 'lars', 'kernels', 'sync', 'ghost:2', 'resnet14', 'bfloat16'),
    ]
)
VALUES = st.one_of(ODD, st.integers().map(str), st.floats().map(str), st.text(max_size=8))
OVERRIDES = st.dictionaries(st.sampled_from(sorted(DEFAULTS)), VALUES, min_size=1, max_size=4)


def call(*arguments):
    """Exit status and standard error of the command line, which gets a minute."""

    def hangs(*_):
        raise TimeoutError(f'no end after {SECONDS} s: {arguments}')

    error, before = io.StringIO(), signal.signal(signal.SIGALRM, hangs)
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stderr(error):
            return main.main(['main', *map(str, arguments)]), error.getvalue()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture
def config_file(tmp_path, monkeypatch):
    path = tmp_path / 'tiny.py'
    path.write_text(TINY)
    monkeypatch.chdir(tmp_path)  # where a relative `compile.cache_dir` makes its folder
    cache = jax.config.jax_compilation_cache_dir
    yield path
    jax.config.update('jax_compilation_cache_dir', cache)
    reset_cache()


FUZZ = dict(deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@settings(max_examples=300, **FUZZ)
@given(overrides=OVERRIDES)
def test_any_overrides_give_a_plan_or_one_line(config_file, monkeypatch, overrides):
    monkeypatch.setattr(memory, 'fit', lambda experiment: experiment)  # compiling is not what is tested
    flags = [f'--config.{key}={value}' for key, value in overrides.items()]
    status, error = call(f'--config={config_file}', '--mode=plan', *flags)
    assert status in (0, 2)
    if status == 2:
        assert error.startswith('error: ') and error.count('\n') == 1


SMALL = (
    'num_epochs',
    'log_every_steps',
    'seed',
    'divergence.',
    'optimizer.',
    'learning_rate.',
    'batch.',
)
TRAINED = st.dictionaries(
    st.sampled_from([key for key in sorted(DEFAULTS) if key.startswith(SMALL)]), ODD, max_size=3
)


@settings(max_examples=20, **FUZZ)
@given(overrides=TRAINED)
def test_any_overrides_train_or_end_with_one_line(config_file, tmp_path_factory, overrides):
    flags = [f'--config.{key}={value}' for key, value in overrides.items()]
    directory = tmp_path_factory.mktemp('fuzz') / 'run ü'
    flags += ['--config.num_epochs=0.5', f'--workdir={directory}']
    status, error = call(f'--config={config_file}', *flags)
    assert status in (0, 2, 3)
    if status:
        assert error.startswith('error: ') and error.count('\n') == 1
    if status == 2:
        assert not directory.exists()


def test_pickled_arrays_are_refused(tmp_path, config_file):
    import numpy as np

    for split in ('train', 'test'):
        np.savez(
            tmp_path / f'{split}.npz',
            images=np.zeros((8, 8, 8, 3), np.uint8),
            labels=np.array([0] * 8, object),
        )
    flags = ('--config.dataset.name=npz', f'--config.dataset.data_dir={tmp_path}', '--mode=plan')
    status, error = call(f'--config={config_file}', *flags)
    assert status == 2 and error.count('\n') == 1


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='no /dev/full')
@pytest.mark.parametrize('raised, status', [('ConfigError("a: b")', 2), ('KeyboardInterrupt', 130)])
def test_the_exit_status_stands_where_standard_error_cannot_be_written(raised, status):
    code = (
        'import sys; from absl import flags; from adabatch_jax import command_line\n'
        'from adabatch_jax.config import ConfigError\n'
        f'def command(values): raise {raised}\n'
        'sys.exit(command_line.run(["name"], "", lambda argv: flags.FlagValues(), command))'
    )
    with open('/dev/full', 'w') as full:
        assert subprocess.run([sys.executable, '-c', code], stderr=full).returncode == status
