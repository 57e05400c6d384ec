"""What an accelerator gets, as far as a CPU can tell: layouts, full dispatches, portable programs."""

import functools

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from runs import of_kind, tiny

from adabatch_jax import experiment, input_pipeline, models, steps, train, train_state
from adabatch_jax.config import resolve
from adabatch_jax.input_pipeline import order
from adabatch_jax.models import conv
from adabatch_jax.steps import compiled


@pytest.fixture
def backend(monkeypatch):
    """Sets what all code takes the backend for; nothing that was traced for another is used again."""

    def set_to(name):
        monkeypatch.setattr(jax, 'default_backend', lambda: name)
        steps.CACHE.clear()
        jax.clear_caches()

    yield set_to
    monkeypatch.undo()
    steps.CACHE.clear()
    jax.clear_caches()


SIZES = {'cnn': 8, 'resnet8': 8, 'wrn16_4': 4, 'alexnet_cifar': 32, 'vgg11_bn': 32, 'resnet18': 32}


@pytest.mark.parametrize('batch_norm', ['local', 'ghost:4'])
@pytest.mark.parametrize('name', SIZES)
def test_a_network_is_the_same_function_in_the_layout_of_an_accelerator(name, batch_norm, backend):
    model = models.get_model(name, 5, batch_norm=batch_norm)
    shape = (8, SIZES[name], SIZES[name], 3)
    images = jax.random.normal(jax.random.key(1), shape)

    def outputs():
        @jax.jit
        def both(key, images):
            variables = model.init(key, images, train=False)
            trained = model.apply(variables, images, train=True, mutable=['batch_stats'])
            return variables, trained, model.apply(variables, images, train=False)

        return jax.device_get(both(jax.random.key(0), images))

    backend('cpu')
    assert conv.enter(images).ndim == 5
    ours = outputs()
    backend('gpu')
    assert conv.enter(images) is images
    for a, b in zip(*map(jax.tree.leaves, (ours, outputs())), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(a).max())


def test_a_run_with_the_defaults_of_an_accelerator_is_that_of_the_cpu_up_to_rounding(backend, tmp_path):
    ends = {}
    for name in ('cpu', 'gpu'):
        backend(name)
        config = tiny(**{'dataset.num_examples': 96, 'model.batch_norm': 'ghost:4'})
        train.train(config, tmp_path / name)
        first, *_ = of_kind(tmp_path / name, 'stage')
        assert (first['updates_per_dispatch'] > 1) == (name == 'gpu')
        ends[name] = train_state.restore(tmp_path / name)
    assert int(ends['cpu'].step) == int(ends['gpu'].step) > 10
    for a, b in zip(*(jax.tree.leaves(state.params) for state in ends.values()), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-3 * np.abs(a).max())


@pytest.mark.parametrize(
    'name, side, asked, expected',
    [
        ('cpu', 32, 0, 250),  # 125 on each of two devices
        ('gpu', 32, 0, 5000),  # 2 x 4,096 would leave a batch that is hardly filled
        ('gpu', 224, 0, 218),  # 2 x 111 images of 150,528 bytes in 16 MiB: 46 batches
        ('gpu', 32, 3000, 2500),
        ('gpu', 32, 20_000, 10_000),
    ],
)
def test_evaluation_takes_equal_batches_of_what_the_devices_are_good_for(
    backend, name, side, asked, expected
):
    backend(name)
    changes = {'dataset.num_examples': 10_000, 'dataset.image_size': side}
    parts = experiment.describe(resolve(tiny(**changes | {'dataset.eval_batch_size': asked})))
    assert parts.eval_spec.batch_size == expected


@pytest.mark.parametrize('padding', [0, 1, 4])
def test_every_backend_cuts_the_windows_that_numpy_does(backend, padding):
    rng, count = np.random.default_rng(0), 40
    load = input_pipeline.Load(count, (6, 5, 3), padding, flip=True)
    images = rng.integers(1, 256, (count, 6, 5, 3), np.uint8)
    data = {'image': images.reshape(count, -1), 'label': np.arange(count), 'seed': np.uint32(7)}
    examples = {'example': rng.permutation(count).astype(np.int32), 'epoch': np.arange(count)}
    index, around = examples['example'], (padding, padding)
    padded = np.pad(images, ((0, 0), around, around, (0, 0)))
    offsets, mirrored = order.crop_and_flip(7, examples['epoch'], index, padding, flip=True)
    assert 0 < mirrored.sum() < count and offsets.min() == 0 and offsets.max() == 2 * padding
    windows = [padded[k, y : y + 6, x : x + 5] for k, (y, x) in zip(index, offsets, strict=True)]
    expected = [x[:, ::-1] if flip else x for x, flip in zip(windows, mirrored, strict=True)]
    for name in ('cpu', 'gpu', 'tpu'):
        backend(name)
        found, labels = jax.jit(lambda data, examples: load(data, examples))(data, examples)
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(labels, index)


@pytest.mark.parametrize('platform', ['cuda', 'tpu'])
@pytest.mark.parametrize(
    'changes',
    [
        {'model.name': 'resnet20', 'model.dtype': 'bfloat16'},
        {'model.name': 'resnet50', 'model.batch_norm': 'sync', 'dataset.image_size': 64},
        {'model.name': 'vgg19_bn', 'dataset.image_size': 32, 'optimizer.name': 'lars'},
        {'batch.policy': 'noise_scale', 'model.name': 'alexnet_cifar', 'dataset.image_size': 32},
        {'batch.policy': 'inner_product', 'batch.max_per_device': 2, 'model.batch_norm': 'ghost:2'},
        {'batch.policy': 'big_batch', 'learning_rate.rule': 'barzilai_borwein'},
        {'model.name': 'linear', 'dataset.augment': 'none', 'optimizer.name': 'saga'},
        {'optimizer.name': 'svrg', 'divergence.action': 'skip'},
    ],
    ids=lambda changes: ' '.join(map(str, changes.values())),
)
def test_steps_are_programs_for_accelerators_made_of_operations_that_xla_has_everywhere(
    changes, platform, backend, monkeypatch
):
    def program(spec, shapes, fn, in_axes, out_axes=None, donate=()):
        step = jax.pmap(fn, compiled.AXIS_NAME, in_axes=in_axes, out_axes=out_axes)
        exported = jax.export.export(jax.jit(lambda *args: step(*args)), platforms=[platform])
        return exported(*shapes).mlir_module()

    monkeypatch.setattr(compiled, '_compile', program)
    monkeypatch.setattr(conv, '_wastes_channels', lambda: platform == 'cuda')
    backend('gpu')
    parts = experiment.describe(resolve(tiny(**changes)))
    for spec in (*parts.train_specs(8).values(), parts.eval_spec):
        assert 'custom_call' not in compiled._compile_spec(spec)


def test_a_tpu_makes_no_copy_of_the_data_for_a_batch(backend, monkeypatch):
    """By its compiler, which needs no TPU, and is no part of the tests' requirements."""
    pytest.importorskip('libtpu')
    monkeypatch.setenv('TPU_SKIP_MDS_QUERY', '1')
    monkeypatch.setenv('TPU_ACCELERATOR_TYPE', 'v5litepod-4')
    monkeypatch.setenv('TPU_WORKER_HOSTNAMES', 'localhost')
    devices = topologies.get_topology_desc(platform='tpu', topology_name='v5e:2x2').devices[:2]
    monkeypatch.setattr(jax, 'pmap', functools.partial(jax.pmap, devices=devices))
    backend('tpu')
    config = tiny(**{'dataset.num_examples': 50_000, 'dataset.image_size': 32})
    parts = experiment.describe(resolve(config))
    for spec in parts.train_specs(128).values():
        assert steps.compile_step(spec).memory_bytes < 1.5 * parts.load.num_bytes()
