"""Runs that go on with fewer devices, or with more."""

import jax
import numpy as np
import pytest
from conftest import ROOT
from runs import StopAt, of_kind

from adabatch_jax import continuation, main, train, train_state
from adabatch_jax.config import ConfigError, resolve, schedule_of
from adabatch_jax.experiment import describe

SMALL_RUN = ROOT / 'tests' / 'small_run.py'


@pytest.fixture(scope='module')
def on_two_devices(tmp_path_factory):
    directory = tmp_path_factory.mktemp('whole')
    train.train(main.parse(['main', f'--config={SMALL_RUN}']).config, directory)
    return directory


# Batches of the first stage do not divide over eight devices.
@pytest.mark.parametrize('devices, stop', [(1, 5), (4, 5), (8, 18)])
def test_a_run_of_two_devices_ends_the_same_on_others_up_to_the_order_of_sums(
    on_two_devices, devices, stop, tmp_path, command_line
):
    with pytest.raises(train.Preempted):
        train.train(main.parse(['main', f'--config={SMALL_RUN}']).config, tmp_path, StopAt(stop))
    result = command_line(f'--config={SMALL_RUN}', f'--workdir={tmp_path}', devices=devices)
    assert result.returncode == 0, result.stderr
    assert of_kind(tmp_path, 'session')[-1]['num_devices'] == devices
    sizes = [
        [(s['step'], s['batch_size']) for s in of_kind(directory, 'stage') if s['step'] != stop + 1]
        for directory in (on_two_devices, tmp_path)
    ]
    assert sizes[0] == sizes[1]
    ours, theirs = (train_state.restore(directory) for directory in (on_two_devices, tmp_path))
    assert int(ours.step) == int(theirs.step)
    for a, b in zip(jax.tree.leaves(ours.params), jax.tree.leaves(theirs.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize(
    'policy, seen, upcoming, changes, refused',
    [
        ('adabatch', 64, 8, {}, 8),
        ('adabatch', 128, 16, {}, None),
        ('adabatch', 256, None, {}, None),
        ('adabatch', 128, 8, {'batch.growth_epochs': 1.5}, None),
        ('adabatch', 64, 16, {'batch.growth_epochs': 0.5}, 8),
        ('plateau', 64, 16, {}, None),  # never goes back
        ('plateau', 64, 16, {'batch.patience_epochs': 9}, 8),
        ('noise_scale', 64, 16, {}, 8),
        ('noise_scale', 256, None, {}, None),
    ],
)
def test_devices_have_to_share_the_batches_that_are_still_to_come(
    policy, seen, upcoming, changes, refused
):
    """``changes`` are those of the schedule before."""
    config = main.parse(['main', f'--config={SMALL_RUN}', f'--config.batch.policy={policy}']).config
    config.batch.max_size = 16
    experiment = describe(resolve(config), num_devices=8, begun_on_others=True)
    host = {'schedule': schedule_of(experiment.config) | changes}
    host['upcoming'] = upcoming and {'batch_size': upcoming}
    if refused is None:
        continuation.check_devices(experiment, host, seen)
    else:
        with pytest.raises(ConfigError, match=f'batch size {refused} on 8 devices'):
            continuation.check_devices(experiment, host, seen)
