"""What a model of one's own has to be, and what it is told where it is not."""

import contextlib
import functools
import pathlib
import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import tiny

from adabatch_jax import models, train
from adabatch_jax.config import ConfigError
from adabatch_jax.models import conv


class Wrong(nn.Module):
    """What a model of a user may get wrong."""

    num_classes: int
    how: str
    batch_norm: str = 'local'
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images, *, train):
        x = images.reshape(len(images), -1)
        if self.how == 'fails in training' and train:
            raise RuntimeError('no such luck')
        if self.how == 'nothing to train':
            return x[:, : self.num_classes]
        if self.how == 'gives bfloat16':
            x = x.astype(jnp.bfloat16)
        if self.how == 'draws' and train:
            self.make_rng('noise')
        if self.how == 'keeps':
            self.variable('cache', 'x', jnp.zeros, ()).value = x.sum()
        if self.how == 'averages' and self.is_mutable_collection('ema'):
            self.variable('ema', 'x', jnp.zeros, ())
        dtype = jnp.bfloat16 if self.how == 'in bfloat16' else jnp.float32
        out = jnp.bfloat16 if self.how == 'gives bfloat16' else None
        z = nn.Dense(
            3 if self.how == 'three classes' else self.num_classes, dtype=out, param_dtype=dtype
        )(x)
        return (z, x) if self.how == 'two results' else z


@pytest.mark.parametrize(
    'how, message',
    [
        ('fails in training', 'cannot take images of .*: RuntimeError: no such luck'),
        ('draws', 'cannot take images of .*noise'),
        ('keeps', 'cannot take images of .*cache'),
        ('averages', 'has variables in ema; accepted: params and batch_stats'),
        ('in bfloat16', 'has variables of bfloat16; accepted: float32'),
        ('gives bfloat16', 'has logits of bfloat16; accepted: float32'),
        (['a list'], 'has lists, dictionaries or arrays as fields; use tuples'),
        ('nothing to train', 'has no parameters; accepted: a network that can be trained'),
        ('three classes', r'gives \(2, 3\) for 2 images; accepted: logits \(2, 10\)'),
        ('two results', r'gives tuple for 2 images; accepted: logits'),
    ],
)
def test_a_model_that_cannot_be_trained_is_refused_by_the_plan(how, message, monkeypatch):
    monkeypatch.setitem(models.MODELS, 'wrong', functools.partial(Wrong, how=how))
    with pytest.raises(ConfigError, match=f'config.model: Wrong {message}'):
        train.plan(tiny(**{'model.name': 'wrong'}))


@pytest.mark.parametrize(
    'how, line',
    [('fails in training', "raise RuntimeError('no such luck')"), ('draws', "self.make_rng('noise')")],
)
def test_an_exception_in_a_model_is_told_with_the_line_of_its_own_that_it_came_by(how, line):
    with pytest.raises(ValueError) as error:
        models.check_model(Wrong(10, how), (8, 8, 1), 10)
    number = int(re.search(rf'\({re.escape(__file__)}, line (\d+)\)$', str(error.value))[1])
    assert pathlib.Path(__file__).read_text().splitlines()[number - 1].strip() == line


@pytest.mark.parametrize(
    'name, side, cause',
    [
        ('alexnet', 6, '6x6, padded by 2, are too small for a window of 11x11'),
        ('alexnet', 32, '1x1, padded by 0, are too small for a window of 3x3'),
        ('alexnet_cifar', 28, '1x1, padded by 0, are too small for a window of 2x2'),
        ('vgg11', 28, '1x1, padded by 0, are too small for a window of 2x2'),
    ],
)
def test_images_that_are_too_small_for_a_model_of_the_package_are_told_without_a_line(name, side, cause):
    message = rf'cannot take images of \({side}, {side}, 1\): .*images of {cause}; use larger images$'
    with pytest.raises(ValueError, match=message):
        models.check_model(models.get_model(name, 10), (side, side, 1), 10)


class StockNorm(nn.Module):
    num_classes: int
    batch_norm: str = 'local'
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images, *, train):
        x = images.reshape(len(images), -1)
        return nn.Dense(self.num_classes)(nn.BatchNorm(use_running_average=not train)(x))


@pytest.mark.parametrize('batch_norm', ['local', 'sync', 'ghost:2'])
def test_batchnorm_of_its_own_goes_with_local_statistics_alone(batch_norm, monkeypatch):
    monkeypatch.setitem(models.MODELS, 'stock', StockNorm)
    message = f"config.model.name: got a StockNorm; accepted with batch_norm '{batch_norm}': models"
    refused = pytest.raises(ConfigError, match=message)
    with contextlib.nullcontext() if batch_norm == 'local' else refused:
        train.plan(tiny(**{'model.name': 'stock', 'model.batch_norm': batch_norm}))


class Mixed(nn.Module):
    """Something of Flax between the layers of this package, or alone."""

    num_classes: int
    layer: Callable
    entered: bool = True
    batch_norm: str = 'local'
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images, *, train):
        x = conv.enter(images) if self.entered else images
        x = self.layer(nn.Dense(4)(x))
        x = models.layers.mean_over_pixels(x) if self.entered else x.mean((1, 2))
        return nn.Dense(self.num_classes)(x)


@pytest.mark.parametrize('entered', [True, False])
@pytest.mark.parametrize(
    'layer',
    [
        lambda x: nn.Conv(4, (3, 3))(x),
        lambda x: nn.ConvTranspose(4, (3, 3))(x),
        lambda x: nn.GroupNorm(2)(x),
        lambda x: nn.InstanceNorm()(x),
        lambda x: nn.MultiHeadDotProductAttention(2)(x) if x.ndim == 5 else x,
        lambda x: nn.max_pool(x, (2, 2), padding='SAME'),
        lambda x: jax.jit(nn.avg_pool, static_argnums=(1, 2, 3))(x, (3, 3), (1, 1), 'SAME'),
        lambda x: nn.Conv(4, (1, 1))(x),
        lambda x: nn.LayerNorm()(x),
        lambda x: nn.LayerNorm(reduction_axes=(1, 2, 3))(x),
        lambda x: nn.LayerNorm(reduction_axes=(1, 2, -1))(x),
        lambda x: nn.RMSNorm(reduction_axes=(-3, -2))(x),
        lambda x: nn.RMSNorm(reduction_axes=3)(x),
        lambda x: nn.BatchNorm(use_running_average=True)(x),
        lambda x: nn.Dropout(0.5, deterministic=True)(x),
        lambda x: conv.enter(nn.Conv(4, (3, 3))(conv.leave(x))) if x.ndim == 5 else x,
    ],
)
def test_models_are_refused_where_logits_of_an_image_would_depend_on_others(layer, entered):
    model = Mixed(3, layer, entered)
    images = jnp.ones((2, 6, 6, 1)).at[1].set(jnp.nan)
    logits, _ = model.init_with_output(jax.random.key(0), images, train=False)
    is_mixed = np.isnan(logits[0]).any()
    refused = pytest.raises(ValueError, match=r'takes the examples of a batch for pixels')
    with refused if is_mixed else contextlib.nullcontext():
        models.check_model(model, (6, 6, 1), 3)
    assert not is_mixed or entered


@pytest.mark.parametrize('dims', [(), (1, 2, 3), (-2,), (1, 2), (1, 2, -1)])
def test_dropout_is_refused_where_one_image_is_dropped_with_others(dims):
    x = conv.enter(jnp.ones((50, 6, 6, 4)))
    drops = nn.Dropout(0.5, broadcast_dims=dims, deterministic=False)
    dropped = conv.leave(drops.apply({}, x, rngs={'dropout': jax.random.key(0)}))
    is_shared = (dropped == dropped[:1]).all()
    refused = pytest.raises(ValueError, match='Dropout_0, a layer of Flax, takes the examples')
    with refused if is_shared else contextlib.nullcontext():
        models.check_model(Mixed(3, lambda x: nn.Dropout(0.5, dims)(x, True)), (6, 6, 1), 3)


def test_they_are_refused_too_where_images_are_so_large_that_each_is_a_group():
    model = Mixed(3, lambda x: nn.Conv(4, (3, 3))(x))
    with pytest.raises(ValueError, match='Conv_0, a layer of Flax, takes the examples of a batch'):
        models.check_model(model, (200, 200, 1), 3)


@pytest.mark.parametrize(
    'entered, layer',
    [
        (False, lambda x: x.reshape(len(x) // 2, 2, -1).reshape(x.shape)),
        (True, lambda x: x * jnp.ones((len(x), 1, 1, 1))),
        (True, lambda x: nn.Dense(4, kernel_init=nn.with_partitioning(nn.zeros_init(), ('a', 'b')))(x)),
    ],
    ids=['pairs of examples', 'a mask of the first axis', 'another map'],
)
def test_what_fails_with_one_image_or_many_or_in_a_map_is_told_before_a_run(entered, layer):
    message = r'Mixed cannot take images of \(6, 6, 1\): .* \(.*/test_own_models.py, line \d+\)$'
    with pytest.raises(ValueError, match=message):
        models.check_model(Mixed(3, layer, entered), (6, 6, 1), 3)


def test_a_module_in_place_of_its_class_is_refused_by_the_plan(monkeypatch):
    monkeypatch.setitem(models.MODELS, 'wrong', Wrong(10, 'nothing'))
    with pytest.raises(ConfigError, match='config.model: model wrong: MODELS has a module; accepted: '):
        train.plan(tiny(**{'model.name': 'wrong'}))
