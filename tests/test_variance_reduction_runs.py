"""Whole runs with variance reduction: they continue, converge, and count their gradients."""

import pathlib
import runpy

import jax
import numpy as np
import pytest
from test_variance_reduction import digits, weights

from adabatch_jax import (
    analysis,
    metrics,
    train_state,
)
from adabatch_jax.config import ConfigError, resolve
from adabatch_jax.experiment import describe
from adabatch_jax.train import train


@pytest.mark.parametrize('optimizer', ['svrg', 'dynasaga'])
def test_a_stopped_run_ends_in_the_same_weights(tmp_path, optimizer):
    """Stopped in the middle of a snapshot's updates; with stages, and several updates at once."""
    config = digits(optimizer, 4, compile__updates_per_dispatch=3)
    config.batch.update(dict(policy='adabatch', growth_epochs=1.0, max_size=8))
    config.optimizer.svrg.update(dict(snapshot_passes=1.2, first_size=16, mixed=True))
    config.checkpoint_every_epochs = 0.5
    whole = train(config, tmp_path / 'whole')

    class Stop:
        asked = 0

        def is_set(self):
            self.asked += 1
            return self.asked == 7

    with pytest.raises(Exception, match='stopped and saved'):
        train(config, tmp_path / 'stopped', Stop())
    assert train(config, tmp_path / 'stopped')['params_digest'] == whole['params_digest']


def test_evaluations_count_every_gradient(tmp_path):
    config = digits('svrg', 4)
    config.optimizer.svrg.snapshot_passes = 0.5
    train(config, tmp_path)
    (*_, last) = (r for r in metrics.read_records(tmp_path) if r['kind'] == 'eval')
    assert last['gradient_evaluations'] == 2 * 240 + 4 * 120
    state = jax.device_get(train_state.restore(tmp_path))
    penalty = 0.01 / 2 * np.sum(weights(state).astype(np.float64) ** 2)
    assert last['objective'] == pytest.approx(last['loss'] + penalty, rel=1e-6)


def least_objective(config):
    """Of a linear model on all training data."""
    experiment = describe(resolve(config))
    return analysis.minimum(experiment, *analysis.fixed_examples(experiment, experiment.info.num_train))


def objectives(folder, optimizer, seed, from_zero=False):
    """Of a generated problem with 2,000 examples, after each pass, and the least there is."""
    config = digits(optimizer, 2, optimizer__saga__from_zero=from_zero)
    config.seed, config.num_epochs = seed, 3.0
    config.dataset.update(dict(name='synthetic', num_examples=2000, num_classes=4, image_size=2))
    config.dataset.update(dict(train_split='train', eval_split='train'))
    config.optimizer.update(dict(momentum=0.0))
    config.learning_rate.effective = 0.08  # about 1 / L
    config.compile.updates_per_dispatch = 50
    config.checkpoint_every_epochs = 3.0
    train(config, folder)
    return [r['objective'] for r in metrics.read_records(folder) if r['kind'] == 'eval'], config


def test_dynasaga_is_ahead_of_saga_and_sgd_after_two_passes(tmp_path):
    """Means over two seeds; SAGA from memories of zero as in its paper, and as ours."""
    methods = {
        'dynasaga': ('dynasaga', False),
        'saga': ('saga', False),
        'saga, from zero': ('saga', True),
        'sgd': ('sgd', False),
    }
    above = {name: [] for name in methods}
    for seed in range(2):
        for name, (optimizer, from_zero) in methods.items():
            values, config = objectives(tmp_path / f'{name}-{seed}', optimizer, seed, from_zero)
            above[name].append(values)
        least = least_objective(config)  # what methods do not differ in
        for values in above.values():
            values[seed] = np.array(values[seed]) - least
    found = {name: np.mean(values, axis=0) for name, values in above.items()}
    assert (found['dynasaga'] > 0).all()
    after_two, after_three = ({k: v[n] for k, v in found.items()} for n in (1, 2))
    assert after_two['dynasaga'] < after_two['saga']
    assert after_two['dynasaga'] < 0.5 * after_two['saga, from zero']
    assert after_two['dynasaga'] < 0.1 * after_two['sgd']
    assert after_three['dynasaga'] < 0.6 * after_three['saga']


convex = runpy.run_path(str(pathlib.Path(__file__).parent.parent / 'configs/convex.py'))


@pytest.fixture(scope='module')
def convex_runs(tmp_path_factory):
    """How far each method of the convex problem ends above the minimum, and its last evaluation."""
    found = {}
    for method in convex['METHODS']:
        folder, config = tmp_path_factory.mktemp(method), convex['get_config'](f'generated_{method}')
        config.num_epochs = config.checkpoint_every_epochs = config.eval_every_epochs = 40.0
        config.dataset.num_examples = 400
        train(config, folder)
        (*_, found[method]) = (r for r in metrics.read_records(folder) if r['kind'] == 'eval')
    least = least_objective(config)  # what methods do not differ in
    return {method: (last['objective'] - least, last) for method, last in found.items()}


def test_the_noise_of_sgd_is_gone_with_every_variance_reduced_method(convex_runs):
    above = {method: value for method, (value, _) in convex_runs.items()}
    assert all(-1e-6 < value < 0.2 for value in above.values()), above  # the model begins at log 4
    for method in ('svrg', 'svrg_growing', 'svrg_mixed', 'saga', 'dynasaga'):
        assert above[method] < 0.1 * above['sgd'], above


def test_gradients_are_counted_as_they_are_taken_whatever_the_rule_was_before(tmp_path):
    config = digits('sgd', 16, dataset__remainder='drop', optimizer__momentum=0.0)  # 7 updates an epoch
    config.learning_rate.rule = 'barzilai_borwein'
    train(config, tmp_path)
    config.num_epochs, config.learning_rate.rule = 3.0, 'schedule'
    train(config, tmp_path, allow_schedule_change=True)
    counted = [r['gradient_evaluations'] for r in metrics.read_records(tmp_path) if r['kind'] == 'eval']
    assert counted == [7 * 16 * each for each in (2, 4, 5)]


def test_evaluations_are_counted_with_every_method(convex_runs):
    for method, (_, last) in convex_runs.items():
        each = last['gradient_evaluations'] / last['examples_seen']
        if method.startswith('svrg'):
            assert 2 < each <= 2.6
        else:
            assert each == (2 if method == 'norm_test' else 1)


def test_many_parts_of_a_snapshot_do_not_wait_for_one_another(tmp_path):
    """Hundreds of computations with a sum over devices each: on a CPU they must not pile up."""
    config = digits('svrg', 2, model__name='cnn')
    config.dataset.train_split = 'train[:800]'
    config.num_epochs, config.learning_rate.effective = 0.2, 1e-3
    config.optimizer.svrg.snapshot_passes = 0.05
    assert train(config, tmp_path)['updates'] == 80


@pytest.mark.parametrize(
    'optimizer, changes, message',
    [
        ('svrg', {'dataset.pipeline': 'tf_data'}, "pipeline: got 'tf_data'; accepted with optimizer"),
        ('svrg', {'learning_rate.rule': 'armijo'}, "rule: got 'armijo'; accepted with optimizer 'svrg'"),
        ('saga', {'model.name': 'cnn'}, "model.name: got 'cnn'; accepted with optimizer 'saga': linear"),
        ('dynasaga', {'dataset.augment': 'pad_crop'}, "augment: got 'pad_crop'; accepted with"),
        ('sgd', {'model.loss': 'huber'}, "model.loss: got 'huber'; accepted: cross_entropy"),
        ('svrg', {'optimizer.svrg.growth_factor': 1.0}, 'growth_factor: got 1.0; accepted: a number'),
        (
            'svrg',
            {'optimizer.svrg.growth_factor': 1.0000001, 'optimizer.svrg.first_size': 8},
            'svrg.growth_factor: got 1.0000001',
        ),
        (
            'svrg',
            {'optimizer.svrg.snapshot_passes': 1e-6, 'num_epochs': 1000.0},
            'svrg.snapshot_passes: got 1e-06, which',
        ),
        (
            'svrg',
            {'optimizer.svrg.snapshot_passes': 1000.0, 'num_epochs': 2.4e7},
            'svrg.snapshot_passes: got 1000, which makes up to 5,76',
        ),
        ('sgd', {'model.batch_norm': 'frozen'}, "model.batch_norm: got 'frozen'; accepted: local, sync"),
    ],
)
def test_mistakes_name_the_key(optimizer, changes, message):
    config = digits(optimizer)
    config.update_from_flattened_dict(changes)
    with pytest.raises(ConfigError) as error:
        describe(resolve(config))
    assert message in str(error.value)
