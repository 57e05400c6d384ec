"""The shipped configs, the defaults, and their way through JSON."""

import importlib.util
import pathlib

import pytest

from adabatch_jax import config as configuration
from adabatch_jax import train

CONFIGS = sorted(pathlib.Path(__file__).parent.parent.joinpath('configs').glob('*.py'))


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_every_config_has_a_plan_and_says_its_command(path):
    module = load(path)
    plan = train.plan(module.get_config())
    assert plan.num_updates > 0
    assert f'--config=configs/{path.name}' in module.__doc__


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_every_config_has_a_matched_control(path):
    config = load(path).get_config()
    adaptive = train.plan(config)
    config.batch.policy = 'fixed'
    control = train.plan(config)
    assert control.stages[0].batch_size == adaptive.stages[0].batch_size
    for epoch in range(int(config.num_epochs)):
        assert adaptive.learning_rate(epoch, 128) == control.learning_rate(epoch, 128)


def test_decays_follow_the_growth_unless_they_are_set():
    config = configuration.default_config()
    config.batch.growth_epochs = 7.0
    assert configuration.resolve(config).learning_rate.decay_epochs == 7.0
    config.learning_rate.decay_epochs = 3.0
    assert configuration.resolve(config).learning_rate.decay_epochs == 3.0


def test_config_survives_json_and_names_what_differs():
    config = configuration.default_config()
    config.batch.stages = ((0, 8), (1.5, 16))
    config.num_epochs = 12.5
    restored = configuration.from_json(configuration.to_json(config))
    assert restored.to_dict() == config.to_dict()
    restored.batch.base_size = 256
    restored.dataset.data_dir = '/elsewhere'
    assert configuration.differences(config, restored) == ['batch.base_size (128 here, 256 there)']


def test_unknown_keys_raise_at_once():
    config = configuration.default_config()
    with pytest.raises(AttributeError, match='base_sise'):
        config.batch.base_sise = 3
    with pytest.raises(TypeError):
        config.num_epochs = 'ten'
