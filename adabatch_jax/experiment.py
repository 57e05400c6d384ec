"""What a config describes: data, clock, policy, plan, model and optimizer, before anything runs."""

import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import optax

from adabatch_jax import input_pipeline, models, optimizers, policies, schedules, steps
from adabatch_jax.config import user_errors


@dataclasses.dataclass(frozen=True)
class Experiment:
    """The parts of a run, each usable by itself."""

    config: ml_collections.FrozenConfigDict
    info: input_pipeline.DatasetInfo
    clock: schedules.Clock
    learning_rate: schedules.LearningRate
    policy: policies.Policy
    plan: schedules.Plan
    model: nn.Module
    optimizer: optax.GradientTransformation

    def train_spec(self, batch_size: int) -> steps.StepSpec:
        """The train step of a batch size."""
        _, num_microbatches = schedules.split_batch(
            batch_size, self.plan.num_devices, self.config.batch.max_per_device
        )
        return steps.StepSpec(
            self.model,
            self.optimizer,
            steps.Normalize(self.info.mean, self.info.std),
            self.info.image_shape,
            batch_size,
            num_microbatches,
        )

    @property
    def eval_spec(self) -> steps.StepSpec:
        """The evaluation step; its batch is no larger than the split, rounded up to the devices."""
        devices = self.plan.num_devices
        wanted = min(self.config.dataset.eval_batch_size, self.info.num_eval)
        size = math.ceil(wanted / devices) * devices
        return dataclasses.replace(
            self.train_spec(devices), batch_size=size, num_microbatches=1, train=False
        )


def describe(config: ml_collections.FrozenConfigDict) -> Experiment:
    """Builds the parts of a resolved config and refuses what would fail later in its run.

    Raises:
      ConfigError: naming the key, the value and what is accepted.
    """
    with user_errors('config.dataset'):
        info = input_pipeline.dataset_info(config.dataset, config.seed)
        side = min(info.image_shape[:2])
        if config.dataset.crop_padding > side:
            raise ValueError(
                f'crop_padding: got {config.dataset.crop_padding}; accepted: up to the {side} pixels of '
                "an image's side"
            )
    with user_errors('config'):
        clock = schedules.Clock(info.num_train, config.num_epochs, config.dataset.remainder)
    with user_errors('config.learning_rate'):
        rate = schedules.LearningRate(
            schedules.effective_schedule(config.learning_rate, clock),
            config.learning_rate.coupling,
            config.learning_rate.reference_batch_size,
        )
    with user_errors('config.batch'):
        policy = policies.create(config, rate, clock)
        plan = schedules.make_plan(
            clock,
            policy.transitions,
            rate,
            num_devices=jax.device_count(),
            max_per_device=config.batch.max_per_device,
            ladder=policy.ladder,
            planned=policy.planned,
        )
    with user_errors('config.model'):
        model = models.get_model(
            config.model.name,
            info.num_classes,
            dtype=jnp.dtype(config.model.dtype),
            batch_norm=config.model.batch_norm,
            **_family_options(config.model),
        )
        check_images(model, info.image_shape)
        if group := models.check_batch_norm(config.model.batch_norm):
            for size in plan.ladder:
                micro, _ = schedules.split_batch(size, plan.num_devices, config.batch.max_per_device)
                if micro % group:
                    raise ValueError(
                        f'batch_norm: got {config.model.batch_norm!r}, but the microbatches of batch '
                        f'size {size} have {micro} examples; use a multiple of {group}'
                    )
    with user_errors('config.optimizer'):
        optimizer = optimizers.create(**config.optimizer)
    return Experiment(config, info, clock, rate, policy, plan, model, optimizer)


def _family_options(model) -> dict[str, Any]:
    """Options of one family of models, where they are not the default; other families have none."""
    options = {'shortcut': 'projection', 'zero_init_residual': False}
    return {key: model[key] for key, default in options.items() if model[key] != default}


def check_images(model: nn.Module, image_shape: tuple[int, int, int]) -> None:
    """Raises ``ValueError`` where a model cannot take images of a shape."""
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    init = functools.partial(model.init, train=False)
    try:
        jax.eval_shape(init, jax.random.key(0), images)
    except Exception as error:  # whatever a layer makes of an image that has shrunk to nothing
        raise ValueError(f'{type(model).__name__} cannot take images of {image_shape}') from error
