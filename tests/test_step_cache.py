"""Compiled steps: once for each batch size, kept, tried again, in the background and from the disk."""

import dataclasses
import gc
import threading
import weakref

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from test_steps import SHAPE, TRACES, make_batch, make_spec, make_state

from adabatch_jax import compilation_cache as persistent_cache
from adabatch_jax import distributed, losses, models, steps
from adabatch_jax.config import default_config, resolve
from adabatch_jax.experiment import describe
from adabatch_jax.steps import compiled


def test_a_cleared_cache_compiles_anew():
    cache = steps.StepCache(lambda spec: steps.CompiledStep(spec, 1.0, False, 0))
    spec = make_spec()
    assert [cache.get(spec).compile_seconds for _ in range(2)] == [1.0, 0.0]
    cache.clear()
    assert cache.get(spec).compile_seconds == 1.0 and cache.num_compiles == 2


def test_the_cache_keeps_the_steps_that_were_used_last():
    cache = steps.StepCache(lambda spec: steps.CompiledStep(spec, 1.0, False, 0))
    first, second = make_spec(batch_size=2), make_spec(batch_size=4)
    others = [make_spec(batch_size=2 * k) for k in range(3, compiled.MOST_STEPS + 2)]
    for spec in (first, second, *others):
        cache.get(spec)
        assert cache.get(first).compile_seconds == 0.0
    assert cache.get(second).compile_seconds == 1.0


def test_a_step_that_fails_to_compile_keeps_nothing_of_those_who_wait_for_it_and_is_tried_again():
    def fail(spec):
        raise RuntimeError('out of memory')

    def wait(state):
        states.append(weakref.ref(state))
        with pytest.raises(RuntimeError, match='out of memory'):
            cache.get(make_spec())

    cache, states = steps.StepCache(fail), []
    for _ in range(2):
        wait(np.zeros(1))
    gc.collect()
    assert [state() for state in states] == [None, None] and cache.num_compiles == 2


def test_each_batch_size_is_traced_and_compiled_once():
    cache = steps.StepCache()
    state = make_state(make_spec())
    TRACES.clear()
    for batch_size in (16, 16, 32, 16, 32):
        for rate in (0.1, 0.03):
            step = cache.get(make_spec(batch_size=batch_size))
            state, _ = step(
                state, distributed.put(make_batch(batch_size)), np.float32(rate), np.uint32(1)
            )
    assert cache.num_compiles == 2
    assert [(8, *SHAPE), (16, *SHAPE)] == TRACES


def test_only_what_shapes_a_step_makes_a_new_one():
    cache = steps.StepCache(lambda spec: steps.CompiledStep(print, 1.0, False, 0))
    base = make_spec(momentum=0.9)
    variants = [
        base,
        make_spec(momentum=0.9),  # an equal spec
        dataclasses.replace(base, batch_size=32),
        dataclasses.replace(base, num_microbatches=2),
        dataclasses.replace(base, quick=True),
        make_spec(momentum=0.8),
        make_spec(models.get_model('resnet8', 3)),
        make_spec(models.get_model('resnet8', 3, dtype=jnp.bfloat16)),
    ]
    for spec in variants:
        cache.get(spec)
    assert cache.num_compiles == len(variants) - 1


def test_a_step_has_the_loss_that_its_name_stands_for_when_the_spec_is_made(monkeypatch):
    batch = distributed.put({**make_batch(4), 'mask': np.ones(4, np.float32)})
    for each in (1.0, 3.0):
        monkeypatch.setitem(losses.LOSSES, 'mine', lambda z, y, each=each: jnp.full(len(y), each))
        spec = dataclasses.replace(make_spec(train=False, batch_size=4), loss='mine')
        assert steps.CACHE.get(spec)(make_state(spec).variables, batch)['loss'] == 4 * each
    assert spec == dataclasses.replace(spec, loss=losses.LOSSES['mine'])
    with pytest.raises(
        ValueError, match="loss: got 'x'; accepted: cross_entropy, squared, hinge, mine, or"
    ):
        dataclasses.replace(spec, loss='x')


def test_a_step_that_was_in_use_before_counts_as_a_hit_without_compile_time():
    cache = steps.StepCache(lambda spec: steps.CompiledStep(print, 1.0, False, 0))
    first, again = cache.get(make_spec()), cache.get(make_spec())
    assert (first.compile_seconds, first.cache_hit) == (1.0, False)
    assert (again.compile_seconds, again.cache_hit) == (0.0, True)


def test_a_step_that_does_not_compile_raises_where_it_is_needed_and_may_be_tried_again():
    outcomes = [RuntimeError('no memory'), steps.CompiledStep(print, 1.0, False, 0)]

    def compile_step(spec):
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    cache = steps.StepCache(compile_step)
    with pytest.raises(RuntimeError, match='no memory'):
        cache.get(make_spec())
    assert cache.get(make_spec()).compile_seconds == 1.0


def test_what_has_not_begun_to_compile_can_be_given_up_and_asked_for_again():
    begun, go_on = threading.Event(), threading.Event()

    def compile_step(spec):
        begun.set()
        go_on.wait(60)
        return steps.CompiledStep(print, float(spec.batch_size), False, 0)

    cache = steps.StepCache(compile_step)
    cache.precompile(make_spec(batch_size=8))
    waiting = cache.precompile(make_spec(batch_size=16))
    assert begun.wait(60)
    cache.cancel_waiting()
    assert waiting.cancelled() and cache.is_compiling
    go_on.set()
    assert cache.get(make_spec(batch_size=8)).compile_seconds == 8
    assert not cache.is_compiling
    assert cache.get(make_spec(batch_size=16)).compile_seconds == 16


def test_persistent_cache_is_used_by_the_second_compilation(tmp_path):
    before = {
        name: getattr(jax.config, name)
        for name in (
            'jax_compilation_cache_dir',
            'jax_persistent_cache_min_compile_time_secs',
            'jax_persistent_cache_min_entry_size_bytes',
        )
    }
    persistent_cache.enable(str(tmp_path))
    try:
        spec = make_spec(batch_size=24)
        first, second = steps.compile_step(spec), steps.compile_step(spec)
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
    assert list(tmp_path.glob('jaxlib-*/*'))
    assert not first.cache_hit
    if not second.cache_hit:
        pytest.skip('this CPU rejects reloaded executables')


def test_a_step_that_is_compiled_quickly_makes_the_same_update_up_to_rounding(monkeypatch):
    monkeypatch.setenv('XLA_FLAGS', '')
    spec = dataclasses.replace(make_spec(models.get_model('cnn', 3), momentum=0.9), quick=True)
    states = []
    slow = {'xla_cpu_use_fusion_emitters': True, 'xla_backend_optimization_level': 3}
    for options in (slow, steps.compiled._QUICK):
        monkeypatch.setattr(steps.compiled, '_QUICK', options)
        step = steps.compile_step(spec)
        state, _ = step(make_state(spec), distributed.put(make_batch()), np.float32(0.01), np.uint32(0))
        states.append(state.params)
    chex.assert_trees_all_close(*states, rtol=1e-4, atol=1e-5)


def test_options_of_xla_are_those_for_quick_steps_that_it_knows_and_that_are_not_set(monkeypatch):
    asked = []
    lowered = jax.stages.Lowered
    compile_ = lowered.compile
    monkeypatch.setattr(
        lowered,
        'compile',
        lambda self, compiler_options: [
            asked.append(compiler_options),
            compile_(self, compiler_options),
        ][1],
    )
    options = {
        'xla_backend_optimization_level': 0,
        'xla_of_another_version': 1,
        'xla_llvm_disable_expensive_passes': True,
    }
    monkeypatch.setattr(steps.compiled, '_QUICK', options)
    monkeypatch.setenv('XLA_FLAGS', '--xla_llvm_disable_expensive_passes=false')
    step = steps.compile_step(dataclasses.replace(make_spec(), quick=True))
    assert callable(step.executable)
    known = {'xla_backend_optimization_level': 0}
    assert asked == [known | {'xla_of_another_version': 1}, known]
    asked.clear()
    steps.compile_step(make_spec())
    assert asked == [{}]


def test_every_step_of_a_config_that_asks_for_it_is_compiled_quickly():
    for quick in (False, True):
        config = default_config()
        config.dataset.name, config.dataset.pipeline, config.optimizer.name = 'digits', 'device', 'svrg'
        config.model.name, config.compile.quick = 'linear', quick
        config.dataset.augment, config.batch.policy = 'none', 'fixed'
        experiment = describe(resolve(config))
        made = [experiment.eval_spec, *experiment.stage_specs(128)]
        assert len(made) == 3 and all(spec.quick == quick for spec in made)
