"""``--mode=analyze``: a run measured, and what it refuses."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adabatch_jax import analysis, losses
from adabatch_jax.config import ConfigError, default_config, resolve
from adabatch_jax.experiment import describe
from adabatch_jax.train import train


def config_of(name='cnn', **analysis_options):
    config = default_config()
    config.num_epochs = 1.0
    config.checkpoint_every_epochs = 0.5
    config.model.name = name
    config.dataset.update(
        dict(name='synthetic', num_examples=48, image_size=8, crop_padding=1, pipeline='device')
    )
    config.batch.update(dict(base_size=8, growth_epochs=1.0, policy='fixed'))
    small = dict(num_examples=20, batch_size=8, subspace=5, lanczos_steps=4, trace_samples=2)
    config.analysis.update(small | analysis_options)
    return config


def test_the_loss_is_that_of_all_examples_whatever_the_batch_size():
    """Its derivatives too, with a last batch that is not full."""
    experiment = describe(resolve(config_of()))
    state = experiment.initial_state()
    images, labels = analysis.fixed_examples(experiment, 20)
    assert len(labels) == 20 and images.shape == (20, 8, 8, 3)

    def of(batch_size):
        loss = analysis.Loss(experiment, state.batch_stats, images, labels, batch_size)
        value, grads = loss.value_and_grad(state.params)
        products = (loss.hessian_product, loss.gauss_newton_product)
        return value, grads, *(product(state.params, state.params) for product in products)

    spec = experiment.eval_spec
    logits = spec.model.apply(state.variables, spec.normalize(jnp.asarray(images)), train=False)
    expected = np.mean(np.asarray(losses.cross_entropy(logits, labels)), dtype=np.float64)
    assert of(8)[0] == pytest.approx(expected, rel=1e-6)
    for got, want in zip(*(jax.tree.leaves(of(size)) for size in (8, 20)), strict=True):
        got, want = np.asarray(got), np.asarray(want)
        np.testing.assert_allclose(got, want, atol=2e-5 * max(1, np.abs(want).max()))


def test_every_checkpoint_is_analyzed_and_told(tmp_path, command_line):
    train(config_of(), tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()}
    result = command_line('--mode=analyze', f'--workdir={tmp_path}')
    assert result.returncode == 0, result.stderr
    records = [json.loads(line) for line in (tmp_path / 'analysis.jsonl').read_text().splitlines()]
    assert [record['step'] for record in records] == [3, 6]
    for record in records:
        assert record['num_examples'] == 20 and record['loss'] > 0
        assert [(s['epsilon'], s['dimensions']) for s in record['sharpness']] == [
            (epsilon, dimensions) for epsilon in (1e-3, 5e-4) for dimensions in (5466, 5)
        ]
        assert all(s['value'] > 0 for s in record['sharpness'])
        assert len(record['hessian_eigenvalues']) == len(record['gauss_newton_residuals']) == 4
        assert 'optimum' not in record
    assert 'Hessian, eigenvalue 1' in result.stdout and 'update 6' in result.stdout
    for path, content in before.items():  # nothing else was touched
        assert path.read_bytes() == content
    latest = command_line('--mode=analyze', f'--workdir={tmp_path}', '--checkpoint=latest')
    assert latest.returncode == 0
    (record,) = map(json.loads, (tmp_path / 'analysis.jsonl').read_text().splitlines())
    assert record['step'] == 6 and record['hessian_trace'] == records[1]['hessian_trace']
    (tmp_path / 'checkpoints/6/host/metadata').write_text('{}')
    damaged = command_line('--mode=analyze', f'--workdir={tmp_path}')
    assert damaged.returncode == 0
    assert damaged.stderr.startswith('warning: the checkpoint of update 6 is damaged')
    assert damaged.stderr.count('\n') == 1 and 'no other is left' not in damaged.stderr
    (record,) = map(json.loads, (tmp_path / 'analysis.jsonl').read_text().splitlines())
    assert record == records[0] | {'seconds': record['seconds']}
    with pytest.raises(ConfigError, match='the checkpoint of update 6 is damaged'):
        analysis.analyze(resolve(config_of()), tmp_path, 'latest')


def test_the_least_objective_of_a_linear_model_is_where_its_gradient_vanishes(tmp_path):
    """Against Newton's method in float64, written out for two classes."""
    config = config_of('linear', lanczos_steps=0, trace_samples=0)
    config.dataset.num_classes, config.dataset.augment = 2, 'none'
    config.optimizer.weight_decay = 0.1
    experiment = describe(resolve(config))
    images, labels = analysis.fixed_examples(experiment, 48)
    found = analysis.minimum(experiment, images, labels)
    x = (images - np.array(experiment.info.mean)) / np.array(experiment.info.std)
    x = np.concatenate([x.reshape(48, -1), np.ones((48, 1))], 1)
    # By symmetry the two columns are opposite: w and -w, with the margin 2 x w.
    y, w = np.where(labels == 1, 1.0, -1.0), np.zeros(193)
    for _ in range(30):
        p = 1 / (1 + np.exp(2 * y * (x @ w)))
        gradient = -2 * x.T @ (p * y) / 48 + 2 * 0.1 * w
        hessian = 4 * (x.T * (p * (1 - p))) @ x / 48 + 2 * 0.1 * np.eye(193)
        w -= np.linalg.solve(hessian, gradient)
    expected = np.mean(np.log1p(np.exp(-2 * y * (x @ w)))) + 0.1 * w @ w
    assert found == pytest.approx(expected, abs=1e-10)
    train(config, tmp_path)
    (*_, record) = analysis.analyze(resolve(config), tmp_path)
    assert record['optimum'] == found


def test_mistakes_are_told_in_a_line(tmp_path, command_line):
    result = command_line('--mode=analyze', f'--workdir={tmp_path / "none"}')
    assert result.returncode == 2 and 'no run in' in result.stderr
    with pytest.raises(ConfigError, match='no checkpoint in'):
        analysis.analyze(resolve(config_of()), tmp_path)
    config = config_of()
    config.analysis.epsilons = (1e-3, -1.0)
    with pytest.raises(ConfigError, match='analysis.epsilons: got -1.0'):
        resolve(config)
    with pytest.raises(ConfigError, match='analysis.trace_samples: got 1; accepted: 0, or at least 2'):
        resolve(config_of(trace_samples=1))


def test_the_subspace_is_measured_only_where_it_is_one():
    experiment = describe(resolve(config_of('linear', subspace=10_000, lanczos_steps=0)))
    images, labels = analysis.fixed_examples(experiment, 20)
    state = experiment.initial_state()
    loss = analysis.Loss(experiment, {}, images, labels, 20)
    found = analysis.measure(loss, state.params, experiment.config.analysis)
    assert [s['dimensions'] for s in found['sharpness']] == [1930, 1930]


def test_what_is_measured_does_not_depend_on_the_dtype_of_activations():
    def loss(dtype):
        config = config_of()
        config.model.dtype = dtype
        experiment = describe(resolve(config))
        state = experiment.initial_state()
        images, labels = analysis.fixed_examples(experiment, 20)
        return analysis.Loss(experiment, state.batch_stats, images, labels, 20).value_and_grad(
            state.params
        )[0]

    assert loss('bfloat16') == loss('float32')
