"""The search for the largest microbatch, and batches that come in parts."""

import concurrent.futures
import dataclasses
import math
import pathlib
import types

import jax
import numpy as np
import pytest

from adabatch_jax import distributed, experiment, memory, metrics, steps, train, train_state
from adabatch_jax.config import ConfigError, default_config, resolve
from adabatch_jax.experiment import describe


def make_config(**changes):
    config = default_config()
    settings = {
        'num_epochs': 3.0,
        'model.name': 'cnn',
        'dataset.name': 'synthetic',
        'dataset.num_examples': 64,
        'dataset.image_size': 8,
        'dataset.crop_padding': 1,
        'dataset.eval_batch_size': 32,
        'batch.base_size': 8,
        'batch.growth_epochs': 1.0,
        'learning_rate.reference_batch_size': 8,
        'log_every_steps': 4,
    }
    config.update_from_flattened_dict(settings | changes)
    return config


def fit(available, fixed=100, per_example=10, **changes):
    """Fits with a step that needs ``fixed`` bytes and ``per_example`` more for each of a microbatch."""
    asked = []

    def memory_of(spec):
        microbatch = spec.batch_size // jax.device_count() // spec.num_microbatches
        asked.append(microbatch)
        return fixed + per_example * microbatch

    described = describe(resolve(make_config(**changes)))
    return memory.fit(described, available, memory_of), asked


def test_what_is_compiled_for_the_search_is_what_its_stage_trains_with():
    changes = {'dataset.pipeline': 'device', 'compile.updates_per_dispatch': 2}
    described, asked = describe(resolve(make_config(**changes))), []

    def memory_of(spec):
        asked.append(spec)
        return 0

    memory.fit(described, 1, memory_of)
    memory.begin_compiling(described, 8)
    began = list(steps.CACHE._futures)
    steps.CACHE.clear()
    with_largest = described.train_specs(32)
    assert with_largest.keys() == {2} and asked == [with_largest[2]] == began[:1]


# Two devices and a largest batch of 32: shares of 16.
@pytest.mark.parametrize(
    'available, largest', [(1000, 16), (260, 16), (259, 8), (180, 8), (179, 4), (130, 2), (110, 1)]
)
def test_the_largest_microbatch_that_fits_is_found(available, largest):
    described, asked = fit(available)
    assert asked[-1] == largest
    assert len(asked) <= 5
    for stage, size in zip(described.plan.stages, (8, 16, 32), strict=True):
        assert stage.microbatch_size == min(largest, size // 2)
        spec = described.train_spec(size)
        assert spec.num_microbatches == stage.num_microbatches == size // 2 // stage.microbatch_size


def test_the_processes_take_the_microbatch_of_the_one_whose_step_needs_most(monkeypatch):
    others = iter([float('inf'), 260.0, 180.0])  # in each pass; here the same steps need 260, 120, 110
    monkeypatch.setattr(distributed, 'largest', lambda needed: max(needed, next(others)))
    _, asked = fit(200)
    assert asked == [16, 2, 1]


def test_a_step_too_large_to_compile_is_tried_smaller():
    config = describe(resolve(make_config()))
    sizes = []

    def memory_of(spec):
        sizes.append(16 // spec.num_microbatches)
        return float('inf') if sizes[-1] > 2 else 1

    assert memory.fit(config, 100, memory_of).plan.max_per_device == 2
    assert sizes == [16, 2]


def test_no_other_batch_has_a_larger_microbatch_than_the_one_that_was_measured():
    config = make_config(**{'batch.policy': 'stages', 'dataset.num_examples': 1280})
    config.batch.stages = ((0, 376), (1, 640))
    needs = {}

    def memory_of(spec):
        microbatch = spec.batch_size // jax.device_count() // spec.num_microbatches
        needs[microbatch] = 100 + 10 * microbatch
        return needs[microbatch]

    plan = memory.fit(describe(resolve(config)), 1000, memory_of).plan
    largest = plan.split(640)[0]
    assert needs[largest] <= 1000
    assert all(stage.microbatch_size <= largest for stage in plan.stages)


@pytest.mark.parametrize('max_per_device', [0, 3, 5, 8, 16])
def test_the_largest_microbatch_as_the_limit_splits_every_batch_the_same(max_per_device):
    plan = describe(resolve(make_config(**{'batch.max_per_device': max_per_device}))).plan
    again = dataclasses.replace(plan, max_per_device=plan.largest_microbatch)
    assert [again.split(size) for size in plan.ladder] == [plan.split(size) for size in plan.ladder]


def test_microbatches_stay_multiples_of_the_groups_of_ghost_batchnorm():
    described, _ = fit(170, **{'model.batch_norm': 'ghost:4'})
    assert [stage.microbatch_size for stage in described.plan.stages] == [4, 4, 4]


def test_what_fits_nowhere_is_refused():
    with pytest.raises(ConfigError, match=r'max_per_device: got 0, but the step of batch size 32'):
        fit(105)


def test_a_given_microbatch_is_not_searched_for():
    described, asked = fit(1, **{'batch.max_per_device': 4})
    assert asked == [] and described.plan.max_per_device == 4


def test_memory_is_that_of_the_compiled_step_and_falls_with_the_microbatch():
    described = describe(resolve(make_config()))
    whole = described.train_spec(32)
    split = dataclasses.replace(whole, num_microbatches=8)
    assert memory.step_bytes(whole) == steps.CACHE.get(whole).memory_bytes
    assert memory.step_bytes(whole) > memory.step_bytes(split) > 0
    assert 2**30 < memory.device_bytes() < 2**50


def test_an_accelerator_that_does_not_tell_its_memory_asks_for_a_microbatch(monkeypatch):
    gpu = types.SimpleNamespace(platform='gpu', device_kind='Some GPU', memory_stats=lambda: None)
    monkeypatch.setattr(jax, 'local_devices', lambda: [gpu])
    with pytest.raises(ConfigError, match='max_per_device: got 0, and the Some GPU does not tell'):
        memory.device_bytes()


def test_the_memory_of_an_accelerator_is_what_its_allocator_may_take(monkeypatch):
    stats = {'bytes_limit': 1000, 'bytes_in_use': 7, 'bytes_reserved': 30, 'peak_bytes_in_use': 800}
    gpu = types.SimpleNamespace(platform='gpu', device_kind='Some GPU', memory_stats=lambda: stats)
    monkeypatch.setattr(jax, 'local_devices', lambda: [gpu])
    assert memory.device_bytes() == 1000


def test_a_step_may_take_a_part_of_the_memory_of_the_process_that_has_least(monkeypatch):
    seen = []
    monkeypatch.setattr(memory, 'device_bytes', lambda: 1000)
    monkeypatch.setattr(distributed, 'smallest', lambda value: seen.append(value) or 110)
    described, _ = fit(None)
    assert seen == [850] and described.plan.largest_microbatch == 1


def test_devices_share_what_a_container_allows(monkeypatch):
    limits = {'memory.max': '1001\n', 'memory.limit_in_bytes': 'max\n'}
    monkeypatch.setattr(pathlib.Path, 'read_text', lambda path: limits[path.name])
    assert memory.device_bytes() == 1001 // jax.local_device_count()


def test_a_step_that_cannot_be_compiled_for_want_of_memory_is_too_large_and_other_failures_are_loud(
    monkeypatch,
):
    def fails_with(message):
        compiled = concurrent.futures.Future()
        compiled.set_exception(jax.errors.JaxRuntimeError(message))
        monkeypatch.setattr(steps.CACHE, 'precompile', lambda spec: compiled)

    fails_with('RESOURCE_EXHAUSTED: out of memory')
    assert memory.step_bytes(None) == float('inf')
    fails_with('INTERNAL: something else')
    with pytest.raises(jax.errors.JaxRuntimeError, match='something else'):
        memory.step_bytes(None)


def test_no_step_is_compiled_whose_microbatch_is_larger_than_what_a_device_is_given(monkeypatch):
    asked = []
    monkeypatch.setattr(steps.CACHE, 'precompile', asked.append)
    config = make_config(**{'batch.base_size': 16})
    size = math.prod(describe(resolve(config)).info.image_shape)
    for given, first_as_well in ((32, True), (8, True), (4, False)):  # a device's share is 8 and 32
        asked.clear()
        monkeypatch.setattr(experiment, 'PART_BYTES', given * size)
        described = describe(resolve(config))
        memory.begin_compiling(described, 16)
        assert all(
            spec.batch_size // jax.device_count() // spec.num_microbatches <= given for spec in asked
        )
        assert [spec.batch_size for spec in asked] == [64] + [16] * first_as_well


def test_a_continued_run_keeps_the_microbatch_that_was_found(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(memory, 'fit', lambda experiment: experiment.with_microbatches_up_to(2))
        with train.open_run(resolve(make_config()), tmp_path, train.Attempt()) as run:
            run.decide()
            run.enter_stage()
            run.dispatch()
            run.decide()
            run.save()
        patch.setattr(memory, 'fit', lambda experiment: experiment)  # does not search again
        train.train(make_config(), tmp_path)
    entered = [r for r in metrics.read_records(tmp_path) if r['kind'] == 'stage']
    assert [r['microbatch_size'] for r in entered] == [2, 2, 2, 2]


@pytest.mark.parametrize(
    'changes, over',
    [
        ({}, [4, 8, 16]),
        ({'batch.max_per_device': 4}, [4, 4, 4]),
        ({'model.batch_norm': 'sync'}, [8, 16, 32]),
        ({'model.batch_norm': 'sync', 'batch.max_per_device': 4}, [8, 8, 8]),
        ({'model.batch_norm': 'ghost:2'}, [2, 2, 2]),
        ({'model.name': 'alexnet_cifar', 'dataset.image_size': 32}, [0, 0, 0]),
    ],
)
def test_a_plan_knows_how_many_examples_are_behind_each_statistic(changes, over):
    described = describe(resolve(make_config(**changes)))
    assert [described.normalised_over(stage) for stage in described.plan.stages] == over


def test_a_run_whose_batches_come_in_parts_trains_as_one_whose_do_not(tmp_path, monkeypatch, capsys):
    config = make_config(**{'batch.max_per_device': 2, 'checkpoint_every_epochs': 1.0})
    train.train(config, tmp_path / 'whole')
    assert 'stage 2, batch size 32 in 8 microbatches, learning rate' in capsys.readouterr().out
    monkeypatch.setattr(experiment, 'PART_BYTES', 2 * 2 * 8 * 8 * 3)  # two microbatches of two images
    described = describe(resolve(config))
    assert [described.train_spec(size).num_parts for size in (8, 16, 32)] == [1, 2, 4]
    train.train(config, tmp_path / 'parts')
    losses = [
        [r['loss'] for r in metrics.read_records(tmp_path / name) if r['kind'] == 'train']
        for name in ('whole', 'parts')
    ]
    np.testing.assert_allclose(*losses, rtol=1e-4)
    whole, parts = (train_state.restore(tmp_path / name) for name in ('whole', 'parts'))
    for a, b in zip(*map(jax.tree.leaves, (whole.variables, parts.variables)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_a_microbatch_has_no_more_images_than_a_device_is_given_at_once(monkeypatch):
    monkeypatch.setattr(experiment, 'PART_BYTES', 2 * 8 * 8 * 3)
    described, asked = fit(1000)
    assert asked == [2] and described.plan.largest_microbatch == 2
    grouped, _ = fit(1000, **{'model.batch_norm': 'ghost:4'})
    assert grouped.plan.largest_microbatch == 4
