"""What the training loop carries from one update to the next, and the effects at its edges."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from adabatch_jax import (
    metrics,
    policies,
    probing,
    schedules,
    steps,
    terminal,
    train_state,
    workdir,
)
from adabatch_jax.checkpoint import SaveFailed
from adabatch_jax.config import changes, schedule_of
from adabatch_jax.evaluate import evaluate
from adabatch_jax.experiment import Experiment
from adabatch_jax.host_state import HostState

STATISTICS = ('variance', 'squared_gradient', 'variance_along', 'squared_norm')  # of a step's sums
GROWN = 2.0  # times the last learning rate is where a search begins after growth (De et al., 2017)


class Diverged(RuntimeError):
    """Loss, gradient or weights are no longer finite; the last checkpoint is from before that."""


@dataclasses.dataclass(frozen=True)
class InFlight:
    """An update that was dispatched and whose sums have not been read; ``step`` counts from 1."""

    step: int
    update: schedules.Update
    learning_rate: float
    sums: dict[str, jax.Array]


class Run:
    """What the loop carries from one update to the next, and the effects at its edges.

    The train state is on the devices; all else that a continued run needs is in ``host``.
    """

    def __init__(self, experiment: Experiment, pipeline, writer, checkpointer, state, host: HostState):
        self.experiment, self.clock = experiment, experiment.clock
        self.pipeline, self.writer, self.checkpointer = pipeline, writer, checkpointer
        self.state: train_state.TrainState = state
        self.host = host
        self.step = int(state.step)  # updates dispatched
        self.examples_seen = self.previous = int(state.examples_seen)
        self.began = time.perf_counter() - host.seconds['wall']
        self.mark = time.perf_counter()  # end of the last update, or of a pause after it
        self.step_fn: Callable | None = None
        self.batches: Iterator[Any] = iter(())
        self.has_grown = False  # the batch of the upcoming update, from the one before it
        self.in_flight: InFlight | None = None
        self.upcoming: schedules.Update | None = None
        self.decision: policies.Decision | None = None  # of the upcoming update
        self.display = terminal.ProgressDisplay(self.clock, self.examples_seen)
        now = schedule_of(experiment.config)
        self.schedule_changes, host.schedule = changes(host.schedule, now), now
        if any(change.startswith('batch.') for change in self.schedule_changes):  # another ladder
            host.policy = experiment.policy.initial_state()
        if self.step == 0 or self.schedule_changes:
            self.decide()
        elif host.upcoming is not None:
            decided = dict(host.upcoming)
            self.upcoming = self.clock.update_at(decided.pop('start'), decided['batch_size'])
            self.decision = policies.Decision(**decided)

    @property
    def epoch(self) -> float:
        return self.clock.epoch(self.examples_seen)

    def is_due(self, every_epochs: float) -> bool:
        """Whether the latest update has passed a multiple of an interval."""
        interval = max(1, self.clock.examples(every_epochs))
        return self.examples_seen // interval > self.previous // interval

    def record(self, kind: str, step: int, examples_seen: int, **fields: Any) -> None:
        """Writes a record of a kind at a position of the run."""
        self.writer.write(
            kind,
            step=step,
            epoch=self.clock.epoch(examples_seen),
            examples_seen=examples_seen,
            time=time.perf_counter() - self.began,
            **fields,
        )

    def begin(self, reason: str) -> None:
        """Writes the ``session`` record: where this process takes the run up, on what, and why."""
        if self.step:
            reason = f'continues from the checkpoint of update {self.step}; {reason}'.removesuffix('; ')
        if self.schedule_changes:
            reason = f'{reason}; schedule changed: {"; ".join(self.schedule_changes)}'
        self.record(
            'session',
            self.step,
            self.examples_seen,
            reason=reason or 'begins',
            num_devices=jax.device_count(),
            device=jax.devices()[0].device_kind,
            versions=metrics.versions(),
        )
        if reason:
            self.display.say(f'epoch {self.epoch:.4g}: {reason}')

    def host_state(self) -> dict[str, Any]:
        """What a checkpoint holds beside the train state, in JSON types."""
        host = dataclasses.asdict(self.host)
        host['max_per_device'] = self.experiment.plan.largest_microbatch
        host['seconds']['wall'] = time.perf_counter() - self.began
        upcoming = self.upcoming
        host['upcoming'] = upcoming and {'start': upcoming.start, **dataclasses.asdict(self.decision)}
        return host

    # ---------------------------------------------------------------------------- each update

    def decide(self) -> None:
        """Chooses the update after the one that was dispatched last, by probes if the policy asks."""
        if sizes := self.experiment.policy.probes(self.host.policy, self.examples_seen):
            self.probe(sizes)

        def batch_size_at(examples_seen: int) -> int:
            self.decision = self.experiment.policy.decide(self.host.policy, examples_seen)
            return self.decision.batch_size

        self.upcoming = schedules.next_update(self.clock, self.examples_seen, batch_size_at)

    def probe(self, sizes: tuple[int, ...]) -> None:
        """Shows the policy how branches with other batch sizes train from here."""
        policy, began = self.experiment.policy, time.perf_counter()
        with self.paused():
            losses = probing.branch_losses(self, sizes, policy.probe_examples)
        self.host.policy = policy.probed(self.host.policy, self.examples_seen, losses)
        self.host.counts['probe_examples'] += len(sizes) * policy.probe_examples
        self.host.seconds['probe'] += time.perf_counter() - began
        found = ', '.join(f'{loss:.4f} with {size}' for size, loss in losses.items())
        self.display.say(f'epoch {self.epoch:.4g}: probed batch sizes, loss {found}')

    @property
    def changes_stage(self) -> bool:
        """Whether the upcoming update does not simply follow on the last one.

        Its batch size differs, or the clock skips what is left of an epoch for a batch that does not
        fit: either way it takes another stream of batches.
        """
        return (
            self.upcoming.batch_size != self.host.batch_size or self.upcoming.start != self.examples_seen
        )

    @property
    def searches(self) -> bool:
        """Whether learning rates are searched for in the step itself."""
        return self.experiment.config.learning_rate.rule != 'schedule'

    def learning_rate(self, update: schedules.Update) -> float:
        """That of an update; where it is searched for, the last that was found, or where to begin."""
        if self.searches and self.host.observed:
            return self.host.observed['learning_rate']
        lowered = self.experiment.config.divergence.rate_factor ** self.host.counts['fall_backs']
        rate, epoch = self.experiment.learning_rate, self.clock.epoch(update.start)
        if self.decision.gain is None:
            return lowered * rate(epoch, update.batch_size)
        return lowered * self.decision.gain * float(rate.effective_at(epoch))

    def dispatch(self) -> InFlight:
        """Starts the next update on the devices, without waiting for it."""
        update = self.upcoming
        rate = given = self.learning_rate(update)
        if self.searches and self.step:
            given = GROWN if self.has_grown else 1.0
        self.has_grown = False
        clock = np.uint32(update.end)
        self.state, sums = self.step_fn(self.state, next(self.batches), np.float32(given), clock)
        self.step += 1
        self.previous, self.examples_seen = self.examples_seen, update.end
        return InFlight(self.step, update, rate, sums)

    def observe(self) -> None:
        """Waits for the update in flight, if there is one, and takes in its sums."""
        if self.in_flight is None:
            return
        flight, self.in_flight = self.in_flight, None
        sums = jax.device_get(flight.sums)
        found = float(sums.pop('learning_rate', flight.learning_rate))
        flight = dataclasses.replace(flight, learning_rate=found)
        now = time.perf_counter()
        seconds, self.mark = now - self.mark, now
        self.host.seconds['train'] += seconds
        self.host.window = metrics.add_sums(self.host.window, {'seconds': seconds})
        self.host.observed = {
            'step': flight.step,
            'examples_seen': flight.update.end,
            'learning_rate': flight.learning_rate,
        }
        if sums.pop('non_finite'):
            self.skip(flight, sums)
        else:
            self.take_in(flight, sums, seconds)
        if flight.step % self.experiment.config.log_every_steps == 0:
            self.write_window()

    def take_in(self, flight: InFlight, sums: dict[str, Any], seconds: float) -> None:
        """Adds the sums of an update to the window, and shows them to the policy."""
        statistics = {name: float(sums.pop(name)) for name in STATISTICS if name in sums}
        left_out = flight.update.batch_size - sums['count']
        self.host.window = metrics.add_sums(self.host.window, {**sums, 'left_out': left_out})
        if statistics and all(map(math.isfinite, statistics.values())):
            self.host.window = metrics.add_sums(self.host.window, {**statistics, 'measured': 1})
        self.host.counts['skipped_in_a_row'] = 0
        self.host.policy = self.experiment.policy.observe(
            self.host.policy,
            policies.Observation(
                self.clock.epoch(flight.update.start),
                flight.update.batch_size,
                flight.learning_rate,
                float(metrics.mean_metrics(sums)['loss']),
                seconds,
                **statistics,
            ),
        )

    def skip(self, flight: InFlight, sums: dict[str, Any]) -> None:
        """Counts an update whose loss, gradient or weights are not finite and which was not made.

        Raises:
          Diverged: it was made, since nothing says to skip it, or too many were skipped in a row.
        """
        options = self.experiment.config.divergence
        loss = metrics.mean_metrics(sums)['loss']
        what = f'loss {loss:.4g}' + (', gradient or weights not finite' if math.isfinite(loss) else '')
        where = (
            f'update {flight.step}, stage {self.host.stage}, batch size {flight.update.batch_size}, '
            f'learning rate {flight.learning_rate:.6g}'
        )
        self.host.counts['skipped_in_a_row'] += 1
        if options.action != 'skip' or self.host.counts['skipped_in_a_row'] > options.max_skipped:
            skipped = options.action == 'skip'
            in_a_row = f', {self.host.counts["skipped_in_a_row"]} in a row' if skipped else ''
            raise Diverged(f'training diverged: {what} at {where}{in_a_row}')
        self.host.counts['skipped'] += 1
        self.host.window = metrics.add_sums(self.host.window, {'skipped': 1})
        self.display.say(f'epoch {self.epoch:.4g}: skipped {where}: {what}')

    # ------------------------------------------------------------------- between the updates

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Lets the update in flight end, and keeps what follows out of the training time."""
        self.observe()
        yield
        self.mark = time.perf_counter()

    def enter_stage(self) -> None:
        """Switches to the batch size of the next update: its compiled step and its batches."""
        update, new = self.upcoming, self.changes_stage
        with self.paused():
            if new:
                self.write_window()
            waiting_since = time.perf_counter()
            self.step_fn, self.batches = self.experiment.stream(self.pipeline, update)
            stall_seconds = time.perf_counter() - waiting_since
        if update.batch_size != self.host.batch_size:
            self.keep_transition(update.batch_size)
        self.has_grown = update.batch_size > self.host.batch_size
        self.host.batch_size = update.batch_size
        self.host.stage += new
        self.host.seconds['compile'] += self.step_fn.compile_seconds
        microbatch_size, num_microbatches = self.experiment.plan.split(update.batch_size)
        reason = self.decision.reason
        self.record(
            'stage',
            self.step,
            self.examples_seen,
            stage=self.host.stage,
            batch_size=update.batch_size,
            microbatch_size=microbatch_size,
            num_microbatches=num_microbatches,
            learning_rate=self.learning_rate(update),
            compile_seconds=self.step_fn.compile_seconds,
            stall_seconds=stall_seconds,
            cache_hit=self.step_fn.cache_hit,
            memory_bytes=self.step_fn.memory_bytes,
            reason=reason if new else f'continued: {reason}',
            **({'inputs': self.decision.inputs} if self.decision.inputs else {}),
        )
        self.display.say(
            f'epoch {self.epoch:.4g}: stage {self.host.stage}, batch size {update.batch_size}, learning '
            f'rate {self.learning_rate(update):.5g} ({reason})'
        )
        if self.experiment.config.compile.precompile:
            for later in self.experiment.specs_after(update.batch_size, self.examples_seen):
                steps.CACHE.precompile(later)

    def keep_transition(self, batch_size: int) -> None:
        """Notes where a batch size begins, for the schedule that a replay follows."""
        stages = self.host.stages
        if stages and stages[-1]['examples_seen'] == self.examples_seen:  # decided anew, no update since
            stages.pop()
        decided = {'batch_size': batch_size, 'reason': self.decision.reason}
        stages.append({'examples_seen': self.examples_seen, **decided})

    def write_window(self) -> None:
        """Writes the ``train`` record of the updates since the last one, and shows it."""
        if not self.host.window:
            return
        sums, self.host.window = self.host.window, {}
        seen = self.host.observed
        fields = {'batch_size': self.host.batch_size, 'learning_rate': seen['learning_rate']}
        fields |= metrics.window_metrics(sums)
        self.record('train', seen['step'], seen['examples_seen'], stage=self.host.stage, **fields)
        self.display.update(seen['examples_seen'], **fields)

    def evaluate(self) -> None:
        """Evaluates the current state, writes the ``eval`` record, and saves a new best state."""
        with self.paused():
            result = evaluate(self.state, self.experiment.eval_spec, self.pipeline)
        self.host.evaluation = {'step': self.step, 'accuracy': result['accuracy']}
        is_best = result['accuracy'] > self.host.best_accuracy
        self.host.best_accuracy = max(self.host.best_accuracy, result['accuracy'])
        split = self.experiment.config.dataset.eval_split
        self.record('eval', self.step, self.examples_seen, split=split, **result)
        if not math.isfinite(result['loss']):  # of weights that are finite, but too large
            raise Diverged(
                f'training diverged: {split} loss {result["loss"]} after update {self.step}, stage '
                f'{self.host.stage}, batch size {self.host.batch_size}, learning rate '
                f'{self.host.observed["learning_rate"]:.6g}'
            )
        self.display.say(
            f'epoch {self.epoch:.4g}: {split} loss {result["loss"]:.4f}, accuracy '
            f'{result["accuracy"]:.2%}'
        )
        if is_best:
            self.save()

    def save(self) -> None:
        """Begins to save a checkpoint; training goes on while it is written."""
        with self.paused():
            evaluated = self.host.evaluation is not None and self.host.evaluation['step'] == self.step
            accuracy = self.host.evaluation['accuracy'] if evaluated else None
            try:
                self.writer.sync()  # a run that goes on from a checkpoint finds the records before it
            except OSError as error:
                self.checkpointer.failed(self.step, error)
            else:
                self.checkpointer.save(self.step, self.state, self.host_state(), accuracy)

    def written_summary(self) -> dict[str, Any] | None:
        """The summary that an earlier process wrote of this position, if it did."""
        records = reversed(metrics.read_records(self.writer.workdir))
        last = next((r for r in records if r['kind'] == 'summary'), None)
        return last if last and last['step'] == self.step else None

    def finish(self) -> dict[str, Any]:
        """Evaluates and saves the end of the run unless that was done, and writes the summary."""
        with self.paused():
            self.write_window()
        if self.host.evaluation is None or self.host.evaluation['step'] != self.step:
            self.evaluate()
        self.save()
        summary = {
            'updates': self.step,
            'wall_seconds': time.perf_counter() - self.began,
            'train_seconds': self.host.seconds['train'],
            'compile_seconds': self.host.seconds['compile'],
            'final_accuracy': self.host.evaluation['accuracy'],
            'best_accuracy': self.host.best_accuracy,
            'params_digest': train_state.params_digest(self.state),
        }
        summary |= {key: n for key, n in self.host.counts.items() if n and key != 'skipped_in_a_row'}
        if probe_seconds := self.host.seconds['probe']:
            summary['probe_seconds'] = probe_seconds
        self.checkpointer.wait()
        if not self.experiment.policy.planned:
            workdir.write_schedule(self.experiment, self.host.stages, self.writer.workdir)
        self.record('summary', self.step, self.examples_seen, **summary)
        try:
            self.writer.sync()
        except OSError as error:
            raise SaveFailed(f'the summary could not be written: {error.strerror}') from error
        return summary
