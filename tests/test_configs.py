"""The shipped configs, the defaults, and their way through JSON."""

import functools
import importlib.util
import json
import math
import pathlib

import jax
import pytest

from adabatch_jax import config as configuration
from adabatch_jax import metrics, models, train
from adabatch_jax.models import resnet, resnet_cifar, vgg

CONFIGS = sorted(pathlib.Path(__file__).parent.parent.joinpath('configs').glob('*.py'))


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MODULES = {path.stem: load(path) for path in CONFIGS}
ALL = [f'{name}:{v}' for name, m in MODULES.items() for v in getattr(m, 'VARIANTS', [''])]


def config_of(name):
    """The config of ``MODULE:VARIANT``, or of ``MODULE:`` where it has no variants."""
    module, _, variant = name.partition(':')
    return MODULES[module].get_config(*[variant] if variant else [])


@pytest.fixture
def planned(monkeypatch, tmp_path):
    """Plans a config as its docstring would have it run: with its data, on one device."""
    monkeypatch.setattr(jax, 'device_count', lambda: 1)  # two would halve the ghost batches of 128

    def plan(config):
        if config.dataset.name == 'tiny_imagenet':
            config.dataset.data_dir = str(write_tiny_imagenet_metadata(tmp_path))
        return train.plan(config)

    return plan


def write_tiny_imagenet_metadata(data_dir):
    """What a plan reads of a TFDS folder: sizes and classes, no image."""
    folder = data_dir / 'tiny_imagenet' / '1.0.0'
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {'train': '30000', 'validation': '5000'}
    splits = [{'name': name, 'shardLengths': [size]} for name, size in sizes.items()]
    info = {'fileFormat': 'tfrecord', 'splits': splits}
    (folder / 'dataset_info.json').write_text(json.dumps(info))
    shape = {'dimensions': ['-1', '-1', '3']}
    features = {'image': {'image': {'shape': shape}}, 'label': {'classLabel': {'numClasses': '100'}}}
    (folder / 'features.json').write_text(json.dumps({'featuresDict': {'features': features}}))
    return data_dir


def batch_sizes(plan):
    return [stage.batch_size for stage in plan.stages]


def first_rates(plan):
    return [stage.learning_rate_start for stage in plan.stages]


# ------------------------------------------------------------------------------------- plans


@pytest.mark.parametrize('name', ALL)
def test_every_variant_has_a_plan_and_a_matched_control(name, planned):
    config = config_of(name)
    adaptive = planned(config)
    config.batch.policy = 'fixed'
    control = planned(config)
    assert adaptive.num_updates > 0
    assert len(control.stages) == 1
    assert control.stages[0].batch_size == adaptive.stages[0].batch_size
    scale = {  # the coupling rule by hand: the effective rate is what the two have in common
        'linear': lambda b: b / config.learning_rate.reference_batch_size,
        'sqrt': lambda b: math.sqrt(b / config.learning_rate.reference_batch_size),
        'none': lambda b: 1,
    }[adaptive.learning_rate.coupling]
    assert adaptive.learning_rate.coupling == control.learning_rate.coupling
    for stage in adaptive.stages:
        epoch, size = adaptive.clock.epoch(stage.start), control.stages[0].batch_size
        fixed = control.learning_rate(epoch, size)
        assert stage.learning_rate_start / scale(stage.batch_size) == pytest.approx(fixed / scale(size))


@pytest.mark.parametrize('name', MODULES)
def test_every_config_says_its_command_and_its_variants(name):
    module = MODULES[name]
    variants = getattr(module, 'VARIANTS', [])
    ending = ':VARIANT ' if variants else ' '
    assert f'--config=configs/{name}.py{ending}' in module.__doc__
    if variants:
        accepted = [module.get_config(variant).to_dict() for variant in variants]
        assert module.get_config().to_dict() in accepted
        with pytest.raises(ValueError, match='accepted: ' + ', '.join(variants)):
            module.get_config('no_such_variant')


@pytest.mark.parametrize('network', ['vgg19_bn', 'resnet20'])
def test_cifar_large_batch_doubles_to_16384_while_the_learning_rate_halves(network, planned):
    plan = planned(config_of(f'cifar_large_batch:{network}_adaptive'))
    assert batch_sizes(plan) == [1024, 2048, 4096, 8192, 16384]
    assert [stage.num_updates for stage in plan.stages] == [
        20 * (50_000 // b) for b in batch_sizes(plan)
    ]
    first = plan.stages[0]
    assert first.learning_rate_start == pytest.approx(0.1)  # the baseline's
    assert first.learning_rate_end == pytest.approx(0.1 * 1024 / 128)
    assert first_rates(plan)[1:] == pytest.approx([0.4, 0.2, 0.1, 0.05])


def test_cifar_large_batch_controls_warm_up_from_the_baseline_to_their_own_learning_rate(planned):
    for kind, size in {'fixed': 1024, 'large': 16384, 'baseline': 128}.items():
        plan = planned(config_of(f'cifar_large_batch:resnet20_{kind}'))
        assert batch_sizes(plan) == [size]
        assert plan.num_updates == 100 * (50_000 // size)
        assert plan.learning_rate(0, size) == pytest.approx(0.1)
        for epoch, decay in {5: 1, 19.99: 1, 20: 0.25, 40: 0.25**2, 80: 0.25**4}.items():
            assert plan.learning_rate(epoch, size) == pytest.approx(0.1 * size / 128 * decay)


@pytest.mark.parametrize('growth, largest', [(2, 32_768), (4, 131_072), (8, 524_288)])
def test_imagenet_batch_grows_at_epochs_30_and_60_as_the_learning_rate_falls(growth, largest, planned):
    plan = planned(config_of(f'imagenet_adabatch:resnet50_adaptive_{growth}'))
    assert batch_sizes(plan) == [8192, 8192 * growth, largest]
    assert [stage.start for stage in plan.stages] == [0, 30 * 1_281_167, 60 * 1_281_167]
    assert plan.num_updates == sum(30 * (1_281_167 // size) for size in batch_sizes(plan))
    assert first_rates(plan)[0] == pytest.approx(0.1)
    peak = plan.stages[0].learning_rate_end
    assert peak == pytest.approx(0.1 * 32)
    assert first_rates(plan)[1:] == pytest.approx([peak * 0.1 * growth, peak * (0.1 * growth) ** 2])


@pytest.mark.parametrize('network, rate', [('alexnet', 0.01), ('alexnet_bn', 0.1), ('resnet50', 0.1)])
def test_imagenet_controls_start_at_the_learning_rate_of_their_network(network, rate, planned):
    small = planned(config_of(f'imagenet_adabatch:{network}_small'))
    fixed = planned(config_of(f'imagenet_adabatch:{network}_fixed'))
    assert batch_sizes(small) + batch_sizes(fixed) == [256, 8192]
    assert first_rates(small) + first_rates(fixed) == pytest.approx([rate, rate])
    for epoch, decay in {5: 1, 30: 0.1, 60: 0.01}.items():
        assert small.learning_rate(epoch, 256) == pytest.approx(rate * decay)
        assert fixed.learning_rate(epoch, 8192) == pytest.approx(rate * decay * 32)


@pytest.mark.parametrize(
    'variant, sizes, factors',  # the factors of the learning rate from epochs 0, 60, 120 and 160 on
    [
        ('decay', [128], [1, 1 / 5, 1 / 25, 1 / 125]),
        ('hybrid', [128, 640], [1, 1, 1 / 5, 1 / 25]),
        ('increase', [128, 640, 3200], [1, 1, 1, 1 / 5]),
    ],
)
def test_smith_variants_hold_the_learning_rate_while_the_batch_grows(variant, sizes, factors, planned):
    config = config_of(f'smith_wrn16_4:{variant}')
    plan = planned(config)
    assert batch_sizes(plan) == sizes
    for epoch, factor in zip((0, 60, 120, 160), factors, strict=True):
        now = [s for s in plan.stages if plan.clock.epoch(s.start) < epoch + 1][-1]
        assert plan.learning_rate(epoch, now.batch_size) == pytest.approx(0.1 * factor)
    group = int(config.model.batch_norm.removeprefix('ghost:'))
    assert all(stage.microbatch_size % group == 0 for stage in plan.stages)


def test_goyal_warms_up_from_the_baselines_learning_rate_to_32_times_it(planned):
    baseline = planned(config_of('goyal_resnet50:baseline'))
    large = planned(config_of('goyal_resnet50:large'))
    assert batch_sizes(baseline) + batch_sizes(large) == [256, 8192]
    assert large.learning_rate(0, 8192) == pytest.approx(0.1)
    assert large.learning_rate(2.5, 8192) == pytest.approx((0.1 + 3.2) / 2)
    for epoch, decay in {5: 1, 30: 0.1, 60: 0.01, 80: 0.001, 89: 0.001}.items():
        assert large.learning_rate(epoch, 8192) == pytest.approx(3.2 * decay)
        assert baseline.learning_rate(epoch, 256) == pytest.approx(0.1 * decay)


def test_lars_warms_up_to_32_and_falls_to_zero_with_the_square_of_what_is_left(planned):
    plan = planned(config_of('lars_resnet50:'))
    assert batch_sizes(plan) == [32_768]
    assert plan.num_updates == math.ceil(100 * 1_281_167 / 32_768)
    assert plan.learning_rate(0, 32_768) == pytest.approx(1)
    for epoch in (10, 40, 55, 99):
        left = (100 - epoch) / 90
        assert plan.learning_rate(epoch, 32_768) == pytest.approx(32 * left**2)


def test_tiny_imagenet_takes_its_sizes_from_its_folder(planned):
    plan = planned(config_of('tiny_imagenet_resnet18:'))
    assert batch_sizes(plan) == [64, 128, 256, 512, 1024]
    assert plan.num_updates == sum(30_000 // size for size in batch_sizes(plan))
    assert first_rates(plan) == pytest.approx([0.05 * 0.75**k for k in range(5)])


# ------------------------------------------------------------------------------ shrunken runs

# One config for each file, network, policy and optimizer, and the epoch of its first change of batch or
# learning rate.
SHRUNKEN = {
    'cifar10_resnet20_adabatch:': 20,
    'cifar_adabatch:cifar10_alexnet_adaptive': 20,
    'cifar_adabatch:cifar10_alexnet_small': 20,
    'cifar_adabatch:cifar100_vgg19_bn_adaptive': 20,
    'cifar_adabatch:cifar100_vgg19_bn_large': 20,
    'cifar_adabatch:cifar100_resnet20_adaptive': 20,
    'cifar_adabatch:cifar100_resnet20_small': 20,
    'cifar_large_batch:vgg19_bn_adaptive': 20,
    'cifar_large_batch:vgg19_bn_fixed': 20,
    'cifar_large_batch:resnet20_adaptive': 20,
    'cifar_large_batch:resnet20_large': 20,
    'goyal_resnet50:large': 30,
    'imagenet_adabatch:alexnet_adaptive_8': 30,
    'imagenet_adabatch:alexnet_small': 30,
    'imagenet_adabatch:alexnet_bn_adaptive_4': 30,
    'imagenet_adabatch:alexnet_bn_fixed': 30,
    'imagenet_adabatch:resnet50_adaptive_2': 30,
    'imagenet_adabatch:resnet50_fixed': 30,
    'lars_resnet50:': 50,  # has none: a point on its curve
    'quickstart:': 8,
    'smith_wrn16_4:increase': 60,
    'smith_wrn16_4:decay': 60,
    'tiny_imagenet_resnet18:': 1,
}
# Shallow networks of the families, for tests only.
SHALLOW = {
    'small_resnet': functools.partial(resnet.ResNet, False, (1, 1)),
    'small_bottleneck_resnet': functools.partial(resnet.ResNet, True, (1, 1)),
    'small_vgg_bn': functools.partial(vgg.VGG, (1,) * 5, True),
    'small_wide_resnet': functools.partial(resnet_cifar.WideResNet, 1, 1),
}
# A shallower network of the same family, and the smallest images that suit it.
RELATIVES = {
    'alexnet': ('alexnet', 63),
    'alexnet_bn': ('alexnet_bn', 63),
    'alexnet_cifar': ('alexnet_cifar', 32),
    'resnet8': ('resnet8', 8),
    'resnet18': ('small_resnet', 8),
    'resnet20': ('resnet8', 8),
    'resnet50': ('small_bottleneck_resnet', 8),
    'vgg19_bn': ('small_vgg_bn', 32),
    'wrn16_4': ('small_wide_resnet', 8),
}


def shrink(config, first_event):
    """The same experiment on 32 made examples, batches 8 and 16, and ``first_event`` after 8 examples.

    Everything that is measured in epochs shrinks alike; optimizer, policy, coupling and factors stay.
    """
    scale = 4 * first_event
    config.num_epochs /= scale
    config.log_every_steps = 1
    config.model.name, side = RELATIVES[config.model.name]
    if config.model.batch_norm.startswith('ghost'):
        config.model.batch_norm = 'ghost:4'
    config.dataset.update(
        name='synthetic', num_examples=32, image_size=side, num_classes=10, eval_split='test',
        augment='pad_crop', eval_resize=0, eval_batch_size=32,
    )  # fmt: skip
    config.batch.base_size = config.learning_rate.reference_batch_size = 8
    config.batch.max_size = 16
    config.batch.growth_epochs /= scale
    rate = config.learning_rate
    rate.warmup_epochs /= scale
    rate.decay_epochs /= scale
    rate.decay_at_epochs = tuple(epoch / scale for epoch in rate.decay_at_epochs)
    return scale


@pytest.mark.parametrize('name', SHRUNKEN)
def test_a_shrunken_run_trains_with_the_settings_of_its_config(name, planned, monkeypatch, tmp_path):
    original, config = config_of(name), config_of(name)
    plan = planned(original)
    monkeypatch.undo()  # the run has the two devices
    for network, make in SHALLOW.items():
        monkeypatch.setitem(models.MODELS, network, make)
    scale = shrink(config, SHRUNKEN[name])
    summary = train.train(config, tmp_path / 'run')
    assert summary['updates'] >= 2

    written = configuration.from_json((tmp_path / 'run' / 'config.json').read_text())
    assert written.optimizer == original.optimizer
    assert written.batch.policy == original.batch.policy
    records = list(metrics.read_records(tmp_path / 'run'))
    updates = [record for record in records if record['kind'] == 'train']
    sizes = [record['batch_size'] for record in updates]
    assert sizes == [8] + [8 if original.batch.policy == 'fixed' else 16] * (len(updates) - 1)
    for record, update in zip(updates, train.plan(config).updates(), strict=True):
        epoch = scale * update.start / 32
        expected = plan.learning_rate.effective_at(epoch) * record['batch_size'] / 8
        assert record['learning_rate'] == pytest.approx(expected, rel=1e-6)
    losses = [record['loss'] for record in records if record['kind'] in ('train', 'eval')]
    assert len(losses) > len(updates)
    assert all(map(math.isfinite, losses))


def test_every_file_has_a_shrunken_run_with_each_network_policy_and_optimizer():
    def parts(name):
        config = config_of(name)
        return name.partition(':')[0], config.model.name, config.batch.policy, config.optimizer.name

    # Those are small as they are: test_variance_reduction_runs.py trains them.
    convex = [name for name in ALL if name.startswith('convex:')]
    assert {parts(name) for name in [*SHRUNKEN, *convex]} == {parts(name) for name in ALL}


# ---------------------------------------------------------------------------------- the keys


def test_decays_follow_the_growth_unless_they_are_set():
    config = configuration.default_config()
    config.batch.growth_epochs = 7.0
    assert configuration.resolve(config).learning_rate.decay_epochs == 7.0
    config.learning_rate.decay_epochs = 3.0
    assert configuration.resolve(config).learning_rate.decay_epochs == 3.0


def test_a_resolved_config_resolves_to_itself():
    resolved = configuration.resolve(configuration.default_config())
    assert configuration.resolve(resolved) == resolved


def test_config_survives_json_and_names_what_differs():
    config = configuration.default_config()
    config.batch.stages = ((0, 8), (1.5, 16))
    config.num_epochs = 12.5
    restored = configuration.from_json(configuration.to_json(config))
    assert restored.to_dict() == config.to_dict()
    restored.batch.base_size = 256
    restored.dataset.data_dir = '/elsewhere'
    assert configuration.differences(config, restored) == ['batch.base_size (128 here, 256 there)']


def test_numbers_beyond_single_precision_are_refused():
    for key in ('optimizer.weight_decay', 'learning_rate.effective', 'batch.noise_scale.scale'):
        config = configuration.default_config()
        config.update_from_flattened_dict({key: 1e39})
        with pytest.raises(configuration.ConfigError, match=f'{key}: got 1e.39; .* precision can hold'):
            configuration.resolve(config)


def test_unknown_keys_raise_at_once():
    config = configuration.default_config()
    with pytest.raises(AttributeError, match='base_sise'):
        config.batch.base_sise = 3
    with pytest.raises(TypeError):
        config.num_epochs = 'ten'
