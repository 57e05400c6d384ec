"""The first commands of the README, in full: as accurate as the control, in half of its updates."""

import pytest
from jax.tree import leaves
from runs import of_kind

from adabatch_jax.config import resolve
from adabatch_jax.experiment import describe
from adabatch_jax.main import parse

CONFIG = '--config=configs/quickstart.py'


@pytest.fixture(autouse=True)
def flags_of_users(monkeypatch):
    """The code that users have, which other tests do not compile, see ``conftest.py``."""
    monkeypatch.setenv('XLA_FLAGS', '')


def test_the_quickstart_stopped_and_continued_is_as_accurate_as_its_control_with_half_of_the_updates(
    command_line, tmp_path
):
    final = {}
    for policy in ('adabatch', 'fixed'):
        command = (CONFIG, f'--config.batch.policy={policy}', f'--workdir={tmp_path / policy}')
        if policy == 'adabatch':
            stop = ('tests/fault_child.py', 'SIGTERM', 'a stage has begun', 3)
            stopped = command_line(*stop, *command, devices=1, module=None)
            assert stopped.returncode == 143, stopped.stderr
        result = command_line(*command, devices=1)
        assert result.returncode == 0, result.stderr
        final[policy] = of_kind(tmp_path / policy, 'summary')[-1]
    assert [summary['updates'] for summary in final.values()] == [1348, 2874]
    ours, controls = (summary['final_accuracy'] for summary in final.values())
    assert min(ours, controls) >= 0.97 and ours == pytest.approx(controls, abs=0.01)
    evaluated = command_line('--mode=eval', f'--workdir={tmp_path / "adabatch"}', devices=1)
    assert f'accuracy {ours:.2%}' in evaluated.stdout, evaluated.stderr


def test_the_shapes_of_a_state_are_those_of_the_state_that_is_made():
    experiment = describe(resolve(parse(['main', CONFIG]).config))
    made, shapes = experiment.initial_state(), experiment.state_shapes
    assert [(x.shape, x.dtype) for x in leaves(made)] == [(x.shape, x.dtype) for x in leaves(shapes)]
