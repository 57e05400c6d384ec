"""What the training loop carries from one update to the next, and the effects at its edges."""

import contextlib
import functools
import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import jax
import numpy as np

from adabatch_jax import (
    distributed,
    metrics,
    policies,
    probing,
    progress,
    records,
    schedules,
    steps,
    terminal,
    train_state,
    workdir,
)
from adabatch_jax.checkpoint import SaveFailed
from adabatch_jax.config import changes, schedule_of, user_errors
from adabatch_jax.evaluate import evaluate
from adabatch_jax.experiment import Experiment
from adabatch_jax.host_state import HostState
from adabatch_jax.stream import EffectiveRates, InFlight, Stream, Streams, open_stream

MEASURED = ('variance', 'squared_gradient', 'variance_along', 'squared_norm')  # of a step's sums
GROWN = 2.0  # after growth a search begins at so many times the last learning rate (De et al., 2017)


class Diverged(RuntimeError):
    """Loss, gradient or weights are no longer finite; the last checkpoint is from before that."""


class Run:
    """What the loop carries from one update to the next, and the effects at its edges.

    The train state is on the devices; all else that a continued run needs is in ``host``.
    """

    def __init__(
        self, experiment: Experiment, pipeline, writer, checkpointer, state, host: HostState, began
    ):
        self.experiment, self.clock = experiment, experiment.clock
        self.pipeline, self.writer, self.checkpointer = pipeline, writer, checkpointer
        self.state: train_state.TrainState = state
        self.host = host
        self.step = int(state.step)  # updates dispatched
        # Where the last update began and ended; the clock, past what is skipped before the upcoming one.
        self.previous = self.end = self.examples_seen = int(state.examples_seen)
        self.began = began  # by ``time.perf_counter``, had nothing come between
        self.mark = time.perf_counter()  # end of the last update, or of a pause after it
        self.streams = Streams(functools.partial(open_stream, experiment, pipeline))
        self.stream: Stream | None = None
        self.has_grown = False  # the batch of the upcoming update, from the one before it
        self.in_flight: InFlight | None = None
        self.probed: tuple[int, ...] = ()  # batch sizes of probes that are running
        self.effective_rates = EffectiveRates(self.clock, experiment.learning_rate)
        self.upcoming: schedules.Update | None = None
        self.decision = policies.Decision(host.batch_size, '')  # of the upcoming update
        self.display = progress.ProgressDisplay(experiment.plan, self.examples_seen)
        now = schedule_of(experiment.config)
        self.schedule_changes, host.schedule = changes(host.schedule, now), now
        if host.upcoming is not None:
            decided = dict(host.upcoming)
            self.upcoming = self.clock.update_at(decided.pop('start'), decided['batch_size'])
            self.decision = policies.Decision(**decided)
            self.examples_seen = self.upcoming.start

    @property
    def epoch(self) -> float:
        """Progress in epochs."""
        return self.clock.epoch(self.examples_seen)

    @property
    def at_work(self) -> set[int]:
        """Batch sizes that the devices may be busy with: of this stage, the next update and probes."""
        upcoming = self.upcoming.batch_size if self.upcoming else 0
        return {self.host.batch_size, upcoming, *self.probed} - {0}

    def is_due(self, every_epochs: float) -> bool:
        """Whether the latest update has passed a multiple of an interval."""
        return self.clock.passes(every_epochs, self.previous, self.examples_seen)

    @contextlib.contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Counts the seconds of what the host does, unless the devices still work when it is done."""
        began = time.perf_counter()
        yield
        if self.in_flight is None or self.in_flight.is_ready():
            self.host.seconds[what] += time.perf_counter() - began

    def record(self, kind: str, step: int, examples_seen: int, **fields: Any) -> dict[str, Any]:
        """Writes a record of a kind at a position of the run, and returns it."""
        return self.writer.write(
            kind,
            step=step,
            epoch=self.clock.epoch(examples_seen),
            examples_seen=examples_seen,
            time=time.perf_counter() - self.began,
            **fields,
        )

    def begin(self, reason: str) -> None:
        """Writes the ``session`` record: where this process takes the run up, on what, and why."""
        reason = records.why(self, reason)
        distributed.from_first(lambda: workdir.remove_schedule(self.writer.workdir))
        self.record('session', self.step, self.examples_seen, **records.session(self, reason))
        if reason:
            self.display.say(f'epoch {self.epoch:.4g}: {reason}')
        self.mark = time.perf_counter()

    def host_state(self) -> dict[str, Any]:
        """What a checkpoint holds beside the train state, in JSON types."""
        host = asdict(self.host)
        host['max_per_device'] = self.experiment.plan.largest_microbatch
        host['seconds']['wall'] = time.perf_counter() - self.began
        host['upcoming'] = self.upcoming and {'start': self.upcoming.start, **asdict(self.decision)}
        return host

    # ---------------------------------------------------------------------------- each update

    def decide(self) -> None:
        """Chooses the update after the one that was dispatched last, by probes if the policy asks."""
        policy, name = self.experiment.policy, self.experiment.config.batch.policy
        # Several processes may not see the same times, and so would not decide the same.
        agreed = distributed.from_first if policy.observes else lambda make: make()
        if policy.probe_examples:
            self.probed = agreed(lambda: policy.probes(self.host.policy, self.examples_seen))
        if self.probed:
            with self.paused('probe'):
                probing.probe(self, self.probed)
            self.probed = ()
        before = 0 if self.schedule_changes else self.decision.batch_size

        def batch_size_at(examples_seen: int) -> int:
            decision = agreed(lambda: policy.decide(self.host.policy, examples_seen))
            with user_errors('config.batch'):
                self.decision = policies.checked(name, policy, decision, examples_seen, before)
            return self.decision.batch_size

        self.upcoming = schedules.next_update(self.clock, self.end, batch_size_at)
        start = self.upcoming.start if self.upcoming else self.clock.total_examples
        self.examples_seen = max(self.end, start)

    @property
    def changes_stage(self) -> bool:
        """Whether the upcoming update does not simply follow on the last one.

        Its batch size differs, or the clock skips what is left of an epoch for a batch that does not
        fit: either way it takes another stream of batches.
        """
        return self.upcoming.batch_size != self.host.batch_size or self.upcoming.start != self.end

    @property
    def searches(self) -> bool:
        """Whether learning rates are searched for in the step itself."""
        return self.experiment.config.learning_rate.rule != 'schedule'

    def learning_rate(self, update: schedules.Update) -> float:
        """That of an update; where it is searched for, the last that was found, or where to begin."""
        if self.searches and self.host.observed:
            return self.host.observed['learning_rate']
        factor, gain = self.experiment.learning_rate.factor, self.decision.gain
        gain = factor(update.batch_size) if gain is None else gain
        return float(self.host.lowered * gain * self.effective_rates(update))

    def ahead(self) -> list[schedules.Update]:
        """The updates to dispatch together: the upcoming one, and more if nothing comes between."""
        updates = self.clock.updates(self.upcoming.start, self.upcoming.batch_size)
        updates = list(itertools.islice(updates, max(self.stream.steps)))
        pauses, policy, seen = self.experiment.pauses_every, self.experiment.policy, self.examples_seen
        for before, update in itertools.pairwise(updates):
            if (
                update.start >= self.clock.total_examples
                or policy.decide(self.host.policy, update.start) != self.decision
                or self.experiment.snapshot_between(before, update)
                or any(self.clock.passes(every, seen, before.end) for every in pauses)
            ):
                return updates[:1]
            seen = before.end
        return updates

    def dispatch(self) -> InFlight | None:
        """Starts the next updates on the devices, without waiting for them.

        Returns:
          Those that were in flight, to be observed: never more than one dispatch is waited for.
        """
        updates = self.ahead()
        if len(updates) not in self.stream.steps:  # so few were not expected
            with self.paused('stall'):
                self.host.seconds['compile'] += self.stream.compile(len(updates))
        rates = [self.learning_rate(update) for update in updates]
        given = [GROWN if self.has_grown else 1.0] if self.searches and self.step else rates
        self.has_grown = False
        with self.timed('input'):
            batch = self.stream.take(updates)
        self.state, sums = self.stream.update(self.state, batch, updates, given)
        self.host.seconds['input'] += self.stream.waited
        self.host.other_rates |= self.decision.gain is not None
        before, self.in_flight = self.in_flight, InFlight(self.step + 1, updates, rates, sums)
        self.step += len(updates)
        self.previous, self.end = updates[-1].start, updates[-1].end
        self.examples_seen = self.end
        return before

    def observe(self, flight: InFlight | None) -> None:
        """Waits for updates that were dispatched, and takes in their sums."""
        if flight is None:
            return
        sums = {name: np.atleast_1d(x) for name, x in jax.device_get(flight.sums).items()}
        now = time.perf_counter()
        seconds, self.mark = (now - self.mark) / len(flight.updates), now
        for k, update in enumerate(flight.updates):
            step, rate = flight.step + k, flight.learning_rates[k]
            self.observe_update(step, update, rate, {name: x[k] for name, x in sums.items()}, seconds)

    def observe_update(
        self, step: int, update: schedules.Update, learning_rate: float, sums: dict, seconds: float
    ) -> None:
        """Takes in the sums of one update."""
        learning_rate = float(sums.pop('learning_rate', learning_rate))
        self.host.seconds['train'] += seconds
        self.host.gradient_evaluations += self.experiment.gradients_of_example * update.batch_size
        self.host.window = metrics.add_sums(self.host.window, {'seconds': seconds})
        self.host.observed = {'step': step, 'examples_seen': update.end, 'learning_rate': learning_rate}
        if sums.pop('non_finite'):
            self.skip(update, sums)
        else:
            self.take_in(update, sums, seconds)
        if step % self.experiment.config.log_every_steps == 0:
            with self.timed('log'):
                self.write_window()

    def take_in(self, update: schedules.Update, sums: dict[str, Any], seconds: float) -> None:
        """Adds the sums of an update to the window, and shows them to the policy."""
        statistics = {name: float(sums.pop(name)) for name in MEASURED if name in sums}
        left_out = update.batch_size - sums['count']
        self.host.window = metrics.add_sums(self.host.window, {**sums, 'left_out': left_out})
        undecoded = 0 if sums['count'] else self.host.counts['undecoded_in_a_row'] + update.batch_size
        self.host.counts['undecoded_in_a_row'] = undecoded
        if 0 < undecoded < self.clock.num_examples:  # else there is something to learn, or a mistake
            return
        if statistics and all(map(math.isfinite, statistics.values())):
            self.host.window = metrics.add_sums(self.host.window, {**statistics, 'measured': 1})
        self.host.counts['skipped_in_a_row'] = 0
        observation = policies.Observation(
            self.clock.epoch(update.start),
            update.batch_size,
            self.host.observed['learning_rate'],
            float(metrics.mean_metrics(sums)['loss']),
            math.nan if steps.CACHE.is_compiling else seconds,
            **statistics,
        )
        state = self.experiment.policy.observe(self.host.policy, observation)
        self.host.policy = policies.as_saved(state)

    def skip(self, update: schedules.Update, sums: dict[str, Any]) -> None:
        """Counts an update whose loss, gradient or weights are not finite and which was not made.

        Raises:
          Diverged: it was made, since nothing says to skip it, or too many were skipped in a row.
        """
        options = self.experiment.config.divergence
        loss = metrics.mean_metrics(sums)['loss']
        what = f'loss {loss:.4g}' + (', gradient or weights not finite' if math.isfinite(loss) else '')
        where = (
            f'update {self.host.observed["step"]}, stage {self.host.stage}, batch size '
            f'{update.batch_size}, learning rate {self.host.observed["learning_rate"]:.6g}'
        )
        self.host.counts['skipped_in_a_row'] += 1
        if options.action != 'skip' or self.host.counts['skipped_in_a_row'] > options.max_skipped:
            where += f', {self.host.counts["skipped_in_a_row"]} in a row' * (options.action == 'skip')
            raise Diverged(f'training diverged: {what} at {where}')
        self.host.counts['skipped'] += 1
        self.host.window = metrics.add_sums(self.host.window, {'skipped': 1})
        terminal.say(f'epoch {self.epoch:.4g}: skipped {where}: {what}')

    # ------------------------------------------------------------------- between the updates

    @contextlib.contextmanager
    def paused(self, what: str) -> Iterator[None]:
        """Lets the updates in flight end, and counts the seconds of what follows as ``what``."""
        flight, self.in_flight = self.in_flight, None
        self.observe(flight)
        self.host.seconds['train'] += time.perf_counter() - self.mark  # to take them in, and to log them
        with self.timed(what):
            yield
        self.mark = time.perf_counter()

    def enter_stage(self) -> None:
        """Switches to the batch size of the next update: its compiled steps and its batches."""
        update, new = self.upcoming, self.changes_stage
        with self.paused('stall'):
            if new:
                self.write_window()
            began = time.perf_counter()
            self.stream = self.streams.take(update)
            stall_seconds = time.perf_counter() - began
            if update.batch_size != self.host.batch_size:
                self.host.keep_transition(self.end, update.batch_size, self.decision.reason)
            self.has_grown = update.batch_size > self.host.batch_size
            self.host.batch_size = update.batch_size
            self.host.stage += new
            self.host.seconds['compile'] += self.stream.compile_seconds
            fields = records.stage(self, stall_seconds, continued=not new)
            self.record('stage', self.step, self.examples_seen, **fields)
            count = fields['num_microbatches']
            size = f'{update.batch_size} in {count} microbatches' if count > 1 else update.batch_size
            self.display.say(
                f'epoch {self.epoch:.4g}: stage {self.host.stage}, batch size {size}, learning rate '
                f'{self.learning_rate(update):.5g} ({self.decision.reason})'
            )
        if self.experiment.config.compile.precompile:
            for later in self.experiment.specs_after(update.batch_size, self.examples_seen):
                steps.CACHE.precompile(later)
            if following := self.experiment.stage_after(update):
                self.streams.prepare(following)

    def write_window(self) -> None:
        """Writes the ``train`` record of the updates since the last one, and shows it."""
        if not self.host.window:
            return
        sums, self.host.window = self.host.window, {}
        seen = self.host.observed
        fields = {'batch_size': self.host.batch_size, 'learning_rate': seen['learning_rate']}
        fields |= metrics.window_metrics(sums)
        self.record('train', seen['step'], seen['examples_seen'], stage=self.host.stage, **fields)
        self.display.update(seen['examples_seen'], self.host.paused_seconds, **fields)

    def evaluate(self) -> None:
        """Evaluates the current state, writes the ``eval`` record, and saves a new best state."""
        with self.paused('evaluation'):
            self.write_window()
            result = evaluate(self.state, self.experiment.eval_spec, self.pipeline)
            self.host.evaluation = {'step': self.step, 'accuracy': result['accuracy']}
            is_best = result['accuracy'] > self.host.best_accuracy
            self.host.best_accuracy = max(self.host.best_accuracy, result['accuracy'])
            split, fields = self.experiment.config.dataset.eval_split, records.evaluation(self, result)
            self.record('eval', self.step, self.examples_seen, **fields)
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
        with self.paused('checkpoint'):
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
        return distributed.from_first(lambda: records.last_summary(self.writer.workdir, self.step))

    def finish(self) -> dict[str, Any]:
        """Evaluates and saves the end of the run unless that was done, and writes the summary."""
        seen = distributed.put_everywhere(np.uint32(self.examples_seen))
        self.state = self.state.replace(examples_seen=seen)
        if self.host.evaluation is None or self.host.evaluation['step'] != self.step:
            self.evaluate()
        self.save()
        return distributed.from_first(self.write_summary)

    def write_summary(self) -> dict[str, Any]:
        """Writes the ``summary`` record, once the last checkpoint is there."""
        with self.timed('checkpoint'):
            self.checkpointer.wait()
        try:
            if self.host.decides and not self.host.other_rates and self.host.lowered == 1:
                workdir.write_schedule(self.experiment, self.host.stages, self.writer.workdir)
            summary = self.record('summary', self.step, self.examples_seen, **records.summary(self))
            self.writer.sync()
        except OSError as error:
            raise SaveFailed(f'the summary could not be written: {error.strerror}') from error
        return summary
