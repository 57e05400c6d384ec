"""What a config describes: data, clock, policy, plan, model and optimizer, before anything runs."""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import optax

from adabatch_jax import (
    input_pipeline,
    models,
    optimizers,
    policies,
    reducing,
    schedules,
    steps,
    train_state,
    variance_reduction,
)
from adabatch_jax.config import ConfigError, user_errors

# Examples that a dispatch is filled up with on an accelerator, by several updates with small batches.
DISPATCH_EXAMPLES = 4096
# Stretches between pauses that are looked at, for the numbers of updates that dispatches will have.
LOOKED_AT = 1000
# Batch sizes whose steps are compiled before their stage: with up to three steps of each, those of the
# present stage and the evaluation, no more than ``steps.StepCache`` keeps.
SIZES_AHEAD = (steps.MOST_STEPS - 1) // 3 - 1
# Images that a device evaluates at once: on a CPU what its caches hold, else as many as a dispatch has,
# of so many bytes at most.
CPU_EVALUATES = 125
EVALUATED_BYTES = 2**24
# Images that one device is given at once; host and devices hold several such parts of a batch.
PART_BYTES = 2**28
SEARCHED = (
    'Learning rates are searched for on each batch ({}), without schedule and coupling; '
    'shown: where the search begins.'
)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """The parts of a run, each usable by itself.

    Attributes:
      load: makes images and labels on the devices; None where the data set does not live there.
      statistics: of the gradients, which are measured; see ``policies.Policy``.
      note: for people who read the plan.
      reduction: takes noise out of the gradients, with SVRG and SAGA.
      snapshots: when SVRG takes them, and of how many examples.
    """

    config: ml_collections.FrozenConfigDict
    info: input_pipeline.DatasetInfo
    clock: schedules.Clock
    learning_rate: schedules.LearningRate
    policy: policies.Policy
    plan: schedules.Plan
    model: nn.Module
    has_batch_norm: bool
    optimizer: optax.GradientTransformation
    load: input_pipeline.Load | None
    statistics: str
    note: str
    reduction: variance_reduction.Svrg | variance_reduction.Saga | None = None
    snapshots: variance_reduction.Snapshots | None = None
    examples_at: Callable | None = None  # the order of examples, if it is not that of epochs

    def initial_state(self) -> train_state.TrainState:
        """The train state before the first update, on the device of ``steps.for_one_use``."""
        device, options = steps.for_one_use()
        with jax.default_device(device):
            return self._create(options)

    @property
    def state_shapes(self) -> train_state.TrainState:
        """Shapes and dtypes of the train state, for one that is read instead of made."""
        return jax.eval_shape(self._create)

    def _create(self, compiler_options: dict[str, Any] | None = None) -> train_state.TrainState:
        of_data = self.info.image_shape, self.config.seed, self.reduction
        return train_state.create(self.model, self.optimizer, *of_data, compiler_options)

    def open_pipeline(self):
        """The input pipeline, its data loaded or found; see ``input_pipeline.create``."""
        with user_errors('config.dataset'):
            return input_pipeline.create(self.config, self.info, self.clock, self.load, self.examples_at)

    @property
    def part_size(self) -> int:
        """Images that a device is given at once at most."""
        return max(1, PART_BYTES // math.prod(self.info.image_shape))

    def train_spec(self, batch_size: int, num_updates: int = 1) -> steps.StepSpec:
        """The train step of a batch size, for one update or several at once."""
        rule, optimizer = self.config.learning_rate.rule, self.config.optimizer
        is_penalised = rule != 'schedule' and optimizer.name in optimizers.PENALISED
        microbatch, num_microbatches = self.plan.split(batch_size)
        # A batch whose images are too many for memory comes to the devices in parts, unless they are
        # there, or a step size is searched for on it as a whole.
        fit = max(1, self.part_size // microbatch)
        if rule != 'schedule' or self.load:
            fit = num_microbatches
        in_part = next(n for n in range(min(fit, num_microbatches), 0, -1) if num_microbatches % n == 0)
        return self._step(
            batch_size=batch_size,
            num_microbatches=num_microbatches,
            num_parts=num_microbatches // in_part,
            skip_non_finite=self.config.divergence.action == 'skip',
            statistics=self.statistics,
            rule=rule,
            fraction=batch_size / self.info.num_train,
            weight_decay=(optimizer.weight_decay if is_penalised else 0.0, optimizer.decayed),
            load=self.load,
            num_updates=num_updates,
            reduction=self.reduction,
        )

    def updates_per_dispatch(self, batch_size: int) -> int:
        """How many updates are made at once where nothing comes between them."""
        config = self.config
        if not self.load or self.policy.observes or config.learning_rate.rule != 'schedule':
            return 1
        if config.compile.updates_per_dispatch or jax.default_backend() == 'cpu':
            return max(1, min(config.compile.updates_per_dispatch, self.plan.num_updates))
        most = max(1, DISPATCH_EXAMPLES // batch_size)
        every, n = min(self.pauses_every), self.info.num_train
        examples = self.clock.examples(every)
        between = examples // batch_size  # from one pause to the next, or one more
        if self.clock.remainder == 'drop':
            between = examples // n * (n // batch_size) + examples % n // batch_size
        between = max(1, between)
        return between // math.ceil(between / most)  # in as few dispatches, of equal length

    @property
    def pauses_every(self) -> tuple[float, float]:
        """Epochs between evaluations, and between checkpoints: no dispatch goes past either."""
        return self.config.eval_every_epochs, self.config.checkpoint_every_epochs

    def train_specs(self, batch_size: int) -> dict[int, steps.StepSpec]:
        """The train steps that a batch size should need, by the number of updates that they make.

        A single update is made where those left before a pause are too few. Steps that will not be used
        are left out, since a stage waits until all of its own are compiled; one that turns out to be
        needed is compiled then.
        """
        count = self.updates_per_dispatch(batch_size)
        stretches = itertools.chain.from_iterable(
            self.clock.stretches(stage.start, stage.end, batch_size, self.pauses_every)
            for stage in self.plan.stages
            if stage.batch_size == batch_size and count > 1
        )
        counts = set() if self.snapshots is None else {count, 1}
        for updates in itertools.islice(stretches, LOOKED_AT):
            if updates >= count:
                counts.add(count)
            if updates % count:
                counts.add(1)
        counts = counts or {count, 1}
        return {n: self.train_spec(batch_size, n) for n in sorted(counts, reverse=True)}

    def snapshot_spec(self, batch_size: int) -> steps.StepSpec:
        """The step that makes snapshots for variance reduction from parts of a stage's batch size."""
        return dataclasses.replace(self.train_spec(batch_size), snapshot=True)

    def stage_specs(self, batch_size: int) -> list[steps.StepSpec]:
        """All steps that a stage trains with."""
        snapshot = [self.snapshot_spec(batch_size)] if self.snapshots else []
        return [*snapshot, *self.train_specs(batch_size).values()]

    def stage_after(self, update: schedules.Update) -> schedules.Update | None:
        """The first update of the stage that follows the one of an update, where that is planned."""
        if not self.policy.planned:
            return None
        for stage in self.plan.stages:
            if stage.start > update.start and stage.batch_size != update.batch_size:
                return self.clock.update_at(stage.start, stage.batch_size)
        return None

    def specs_after(self, batch_size: int, examples_seen: int) -> list[steps.StepSpec]:
        """The steps that a stage may need or be followed by soon, in the order of their need."""
        policy = self.policy
        if policy.planned:
            sizes = [t.batch_size for t in policy.transitions if t.examples_seen > examples_seen]
        else:
            sizes = [size for size in policy.ladder if size > batch_size][:1]
            if policy.may_shrink:
                sizes += [size for size in policy.ladder if size < batch_size][-1:]
        usable = filter(self.plan.can_split, list(dict.fromkeys(sizes))[:SIZES_AHEAD])
        specs = (spec for size in usable for spec in self.stage_specs(size))
        return [self.eval_spec, *specs]

    def snapshot_between(self, before: schedules.Update, update: schedules.Update) -> bool:
        """Whether a snapshot comes between two updates."""
        if self.snapshots is None:
            return False
        return self.snapshots.number(before.start) != self.snapshots.number(update.start)

    def with_microbatches_up_to(self, max_per_device: int) -> 'Experiment':
        """The same experiment with its batches split for a largest microbatch; 0 for no limit."""
        with user_errors('config.batch'):
            plan = self.plan.with_microbatches_up_to(max_per_device)
        return dataclasses.replace(self, plan=plan)

    def in_parts(self) -> 'Experiment':
        """The same experiment with microbatches of no more images than a device is given at once."""
        at_once = max(self.part_size, self.plan.microbatch_multiple)
        has_larger = self.plan.largest_microbatch > at_once
        return self.with_microbatches_up_to(at_once) if has_larger else self

    def normalised_over(self, stage: schedules.Stage) -> int:
        """Examples that BatchNorm takes its statistics over in a stage; 0 without BatchNorm."""
        policy = self.model.batch_norm
        if not self.has_batch_norm or policy == 'frozen':
            return 0
        devices = self.plan.num_devices if policy == 'sync' else 1
        return models.check_batch_norm(policy) or stage.microbatch_size * devices

    @property
    def gradients_of_example(self) -> int:
        """Gradients of each example that an update takes; SVRG counts its own."""
        return 2 if self.config.learning_rate.rule == 'barzilai_borwein' else 1  # either end of a step

    @property
    def gradient_bytes(self) -> int:
        """What the devices add up in an update."""
        leaves = jax.tree.leaves(self.state_shapes.params)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)

    @property
    def eval_spec(self) -> steps.StepSpec:
        """The evaluation step; its batches are of equal size, rounded up to the devices."""
        devices, num_eval, of_device = jax.device_count(), self.info.num_eval, CPU_EVALUATES
        if jax.default_backend() != 'cpu':
            of_device = max(1, EVALUATED_BYTES // math.prod(self.info.image_shape))
            of_device = min(of_device, DISPATCH_EXAMPLES)
        num_batches = math.ceil(num_eval / (self.config.dataset.eval_batch_size or of_device * devices))
        size = math.ceil(num_eval / num_batches / devices) * devices
        return self._step(batch_size=size, train=False)

    def _step(self, **of_batch_size: Any) -> steps.StepSpec:
        """What the steps of all batch sizes have in common, and what is of one."""
        return steps.StepSpec(
            self.model,
            self.optimizer,
            steps.Normalize(self.info.mean, self.info.std),
            self.info.image_shape,
            loss=self.config.model.loss,
            quick=self.config.compile.quick,
            **of_batch_size,
        )


def describe(
    config: ml_collections.FrozenConfigDict,
    num_devices: int | None = None,
    begun_on_others: bool = False,
) -> Experiment:
    """Builds the parts of a resolved config and refuses what would fail later in its run.

    Args:
      config: from ``config.resolve``.
      num_devices: to plan for, where they are others than those at hand.
      begun_on_others: whether other devices may have trained a part; see ``make_plan``.

    Raises:
      ConfigError: naming the key, the value and what is accepted.
    """
    with user_errors('config.dataset'):
        info = input_pipeline.dataset_info(config.dataset, config.seed)
    with user_errors('config'):
        clock = schedules.Clock(info.num_train, config.num_epochs, config.dataset.remainder)
    rule, action = config.learning_rate.rule, config.divergence.action
    if rule != 'schedule' and action != 'stop':
        raise ConfigError(
            f'config.divergence.action: got {action!r}; accepted with learning_rate.rule {rule!r}: stop '
            '(a search never takes a step to a loss that is not finite)'
        )
    rate = _learning_rate(config, clock)
    policy = _policy(config, rate, clock)
    is_measured = config.batch.gradient_statistics or rule == 'barzilai_borwein'
    statistics = policy.statistics or ('norms' if is_measured else '')
    searched = SEARCHED.format(rule) if rule != 'schedule' else ''
    note = ' '.join(filter(None, [policy.note, policies.control(config, policy), searched]))
    plan = _plan(config, clock, policy, rate, statistics, num_devices, begun_on_others)
    model, has_batch_norm = _model(config, info)
    with user_errors('config.optimizer'):
        options = {key: value for key, value in config.optimizer.items() if key not in ('svrg', 'saga')}
        optimizer = optimizers.create(**options)
    is_reduced = config.optimizer.name in optimizers.REDUCED
    with user_errors('config.dataset'):
        load = input_pipeline.load_on_device(config, info, needed=is_reduced)
    experiment = Experiment(
        config=config,
        info=info,
        clock=clock,
        learning_rate=rate,
        policy=policy,
        plan=plan,
        model=model,
        has_batch_norm=has_batch_norm,
        optimizer=optimizer,
        load=load,
        statistics=statistics,
        note=note,
    )
    return reducing.reduced(experiment) if is_reduced else experiment


def _model(config, info) -> tuple[nn.Module, bool]:
    """The model, and whether it has BatchNorm."""
    with user_errors('config.model'):
        model = models.get_model(
            config.model.name,
            info.num_classes,
            dtype=jnp.dtype(config.model.dtype),
            batch_norm=config.model.batch_norm,
            **_family_options(config.model),
        )
        has_batch_norm = 'batch_stats' in models.check_model(model, info.image_shape, info.num_classes)
        if has_batch_norm and model.batch_norm != 'local':
            models.frozen(model, info.image_shape, f'batch_norm {model.batch_norm!r}')
    return model, has_batch_norm


def _family_options(model) -> dict[str, Any]:
    """Those that are not as every model has them: one of a user's own may have a default of its own."""
    return {key: model[key] for key, other in models.FAMILY_OPTIONS.items() if model[key] != other}


def _learning_rate(config, clock) -> schedules.LearningRate:
    options, growth_epochs = config.learning_rate, config.batch.growth_epochs
    with user_errors('config.batch'):
        coupling = policies.coupling(config)
        is_interval = options.schedule == 'step' and not options.decay_at_epochs
        if is_interval and options.decay_epochs == growth_epochs:  # which it follows where it is not set
            clock.multiples(growth_epochs, 'growth_epochs')
    with user_errors('config.learning_rate'):
        effective = schedules.effective_schedule(options, clock)
        if options.rule != 'schedule':  # where the first search begins
            effective = options.effective
        return schedules.LearningRate(effective, coupling, options.reference_batch_size)


def _policy(config, rate, clock) -> policies.Policy:
    with user_errors('config.batch'):
        policy = policies.create(config, rate, clock)
        if (got := policy.statistics) not in steps.STATISTICS:
            raise ValueError(f'policy: got statistics {got!r}; accepted: {steps.STATISTICS}')
    return policy


def _plan(config, clock, policy, rate, statistics, num_devices, begun_on_others) -> schedules.Plan:
    with user_errors('config.model'):
        group = models.check_batch_norm(config.model.batch_norm) or 1
    with user_errors('config.batch'):
        return schedules.make_plan(
            clock,
            policy.transitions,
            rate,
            num_devices=num_devices or jax.device_count(),
            max_per_device=config.batch.max_per_device or policy.max_per_device,
            microbatch_multiple=group,
            min_groups=config.batch.statistics.min_groups if statistics else 1,
            ladder=policy.ladder,
            planned=policy.planned,
            begun_on_others=begun_on_others,
        )


def fixed(config: ml_collections.ConfigDict, batch_size: int) -> ml_collections.ConfigDict:
    """The config with one batch size throughout: with a run's first one its control.

    The learning rate goes with the batch size as the run's does; see ``policies.control_coupling``.
    """
    config = config.copy_and_resolve_references()
    config.learning_rate.coupling = policies.control_coupling(config)
    config.batch.policy, config.batch.base_size = 'fixed', batch_size
    return config
