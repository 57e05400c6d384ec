"""What a checkpoint holds of a run beside the train state."""

import dataclasses
from typing import Any

COUNTS = ('skipped', 'skipped_in_a_row', 'undecoded_in_a_row', 'fall_backs', 'probe_examples')
# What keeps the devices waiting.
OVERHEADS = ('setup', 'stall', 'input', 'log', 'evaluation', 'checkpoint', 'probe')
PAUSES = ('evaluation', 'checkpoint', 'probe')  # that recur, and are no part of the seconds of ``train``
SECONDS = ('wall', 'train', 'compile', *OVERHEADS)


@dataclasses.dataclass
class HostState:
    """The part of a run that the training loop keeps on the host, in JSON types.

    ``upcoming`` and the seconds of ``wall`` are of the checkpoint that it came from: ``Run.host_state``
    brings them up to date for the next, and adds the largest microbatch, ``max_per_device``.

    Attributes:
      schedule: keys and values of the config that a run may be continued with others of.
      data: what tells the examples from others; see ``input_pipeline.DatasetInfo``.
      policy: the policy's state.
      ladder: the policy's, to which its state belongs.
      devices: how many, and what they are.
      upcoming: the next update, None where there is none: ``start``, ``batch_size``, and the ``reason``,
        ``inputs`` and ``gain`` of the decision. It was decided one observation behind, and a continued
        run must not decide it again with what has been observed since.
      stage: number of the present stage; -1 before the first.
      batch_size: of that stage.
      decides: whether the policy, or one before it in this run, decides during the run.
      coupling: of the learning rate to the batch.
      other_rates: whether some learning rates were not what the config says of their batch sizes, which
        is all that a replay knows: decisions gave gains, or the run had another schedule before.
      lowered: by what falling back has multiplied the effective learning rate, which no replay knows
        either.
      stages: where batch sizes began: ``examples_seen`` when it was decided, ``batch_size``, ``reason``.
      window: sums since the last ``train`` record.
      observed: the last update whose sums were read: ``step``, ``examples_seen``, ``learning_rate``.
      gradient_evaluations: of single examples, in updates; SVRG's are counted in its own state.
      evaluation: the last one: ``step`` and ``accuracy``.
      best_accuracy: of all evaluations.
      counts: of divergence and what was done about it, of examples in updates of which none could be
        decoded, and of examples in probes.
      seconds: from the beginning of the run: ``wall``; ``train``, between the ends of updates;
        ``compile``, of train steps, on whatever thread; ``setup``, until a process has the run's state
        and data; and ``stall`` (at the beginning of stages), ``input``, ``log``, ``evaluation``,
        ``checkpoint`` and ``probe``, these while the devices had no update to work on. What went on
        after the checkpoint that a run goes back to, when it falls back or runs out of memory, counts
        in ``wall`` alone.
    """

    schedule: dict[str, Any]
    policy: dict[str, Any]
    data: dict[str, Any] = dataclasses.field(default_factory=dict)
    ladder: list[int] = dataclasses.field(default_factory=list)
    devices: str = ''
    upcoming: dict[str, Any] | None = None
    stage: int = -1
    batch_size: int = 0
    decides: bool = False
    coupling: str = ''
    other_rates: bool = False
    lowered: float = 1.0
    stages: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    window: dict[str, float] = dataclasses.field(default_factory=dict)
    observed: dict[str, Any] = dataclasses.field(default_factory=dict)
    gradient_evaluations: int = 0
    evaluation: dict[str, Any] | None = None
    best_accuracy: float = -1.0
    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self):  # a checkpoint may come from a version that counted less
        self.counts = dict.fromkeys(COUNTS, 0) | self.counts
        self.seconds = dict.fromkeys(SECONDS, 0.0) | self.seconds

    def keep_transition(self, examples_seen: int, batch_size: int, reason: str) -> None:
        """Notes where a batch size begins, for the schedule that a replay follows."""
        if self.stages and self.stages[-1]['examples_seen'] == examples_seen:
            self.stages.pop()  # decided anew, no update since
        begun = {'examples_seen': examples_seen, 'batch_size': batch_size, 'reason': reason}
        self.stages.append(begun)

    @property
    def paused_seconds(self) -> float:
        """Seconds of ``PAUSES``."""
        return sum(self.seconds[key] for key in PAUSES)
