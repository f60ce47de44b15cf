"""What a trace says: the records of one training run, one JSON object a line.

The first line is the `Run`, then architectures, profiles, epochs and reconfigurations in the order in which they
happened, and an `End`. A crashed run has no `End`. Field names carry their unit; a quantity that nobody measured is
null, never zero. A planned run has no measured quantity at all: reading one of its times raises
`MissingMeasurementError`. `SCHEMA_VERSION` grows with every change of meaning; `io.py` converts older files.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from ptsim.errors import MissingMeasurementError
from ptsim.network import MemoryFormat, Network, Precision
from ptsim.setting import ToldUpdate

# 2: layers that run once a mini-batch, and inputs that images share, are marked; 3: `Run.origin`;
# 4: `Draw`, `Epoch.passes`; 5: `Run.update`, `Architecture.penalty`
SCHEMA_VERSION = 5

Origin = Literal["recorded", "planned", "imported"]

# Bounds that nothing real exceeds, so that what is read can be added and multiplied.
Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
Positive = Annotated[int, msgspec.Meta(ge=1, le=2**53)]
Ranks = Annotated[int, msgspec.Meta(ge=1, le=10**6)]
Batch = Annotated[int, msgspec.Meta(ge=1, le=2**31)]
Size = Annotated[int, msgspec.Meta(ge=1, le=2**20)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=3.2e9)]  # a hundred years
Difference = Annotated[float, msgspec.Meta(ge=-3.2e9, le=3.2e9)]  # of two measured times
Fraction = Annotated[float, msgspec.Meta(ge=-1e-6, le=1 + 1e-6)]  # rounding included
Quantity = Annotated[float, msgspec.Meta(ge=0, le=1e18)]
Number = Annotated[float, msgspec.Meta(ge=-1e30, le=1e30)]
MOST_EPOCHS = 100_000  # of a run to train, to plan or to project; more is a slip of the keyboard, and would take hours

T = TypeVar("T")


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="record"):
    """A line of the trace; `record` names its kind."""


class Dataset(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What was trained on. `input_shape` is (channels, height, width) of one image."""

    name: str
    num_classes: Positive
    num_train: Positive
    num_validation: Count
    input_shape: tuple[Size, Size, Size]


class DeviceInfo(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The device that ran, as its driver names it; `NO_DEVICE` where nothing ran."""

    name: str
    kind: Literal["cpu", "cuda", "none"]
    memory_bytes: Count | None
    num_threads: Positive | None = None
    max_sm_clock_hz: Quantity | None = None
    max_memory_clock_hz: Quantity | None = None
    power_limit_w: Quantity | None = None
    driver: str | None = None

    def must_exist(self) -> tuple[Literal["cpu", "cuda"], int]:
        """Kind and memory of a device that really ran.

        Raises:
            MissingMeasurementError: it is `NO_DEVICE`.
        """
        if self.kind == "none" or self.memory_bytes is None:
            raise MissingMeasurementError("nothing was measured on any device: the run is planned")
        return self.kind, self.memory_bytes


NO_DEVICE = DeviceInfo(name="no device", kind="none", memory_bytes=None)


class Assumption(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One thing that a planned or imported run takes for given: what, and from where."""

    what: str
    source: str

    @property
    def note(self) -> str:
        """The assumption as a projection's note says it."""
        return f"assumed: {self.what} ({self.source})"


class UpdateCosts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an optimizer keeps and moves for every parameter, the run's momentum included: fp32 values.

    `accesses` are read and written by one update in torch's default form, `fused_accesses` where one kernel does it.
    """

    num_states: Annotated[int, msgspec.Meta(ge=0, le=1000)]
    accesses: Annotated[int, msgspec.Meta(ge=0, le=10_000)]
    fused_accesses: Annotated[int, msgspec.Meta(ge=0, le=10_000)]

    def told(self, optimizer: str) -> ToldUpdate:
        """The same for the setting of a step, of the optimizer called `optimizer`."""
        return ToldUpdate(optimizer=optimizer, **msgspec.structs.asdict(self))


class PenaltyCosts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What adding a criterion's penalty to the gradients of a network takes on a GPU."""

    num_bytes: Count
    num_launches: Annotated[int, msgspec.Meta(ge=0, le=10**7)]


class Run(Record, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="run"):
    """The first line: everything that decides the run.

    Attributes:
        hyperparameters: the whole resolved configuration; its keys are those of the run's TOML file.
        origin: "recorded" by ptsim while it trained, "planned" (nobody has trained it: nothing in it is measured), or
            "imported" from measurements of another program.
        assumed: what a planned or imported run takes for given.
        update: of an optimizer that is not ptsim's own, so that the trace is enough without its package, or that keeps
            other than its row says, as Adam with amsgrad does.
    """

    schema_version: int
    created: str  # as `units.time_stamp` writes it; of older recorded runs with +00:00 in place of Z
    model: str
    dataset: Dataset
    hyperparameters: dict[str, Any]
    seed: int
    precision: Precision
    memory_format: MemoryFormat
    world_size: Ranks
    backend: str | None
    device: DeviceInfo
    versions: dict[str, str]
    git_revision: str | None
    origin: Origin = "recorded"
    assumed: tuple[Assumption, ...] = ()
    update: UpdateCosts | None = None


class Architecture(Record, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="architecture"):
    """A network that the run trained, written once, before the first record that names its id.

    Attributes:
        penalty: of a criterion that is not ptsim's own, so that the trace is enough without its package.
    """

    id: str
    network: Network
    penalty: PenaltyCosts | None = None


class LayerProfile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Median time of one layer at the profile's mini-batch; `backward_s` is null where autograd has no node for it."""

    layer: str
    forward_s: Seconds
    backward_s: Seconds | None


class Profile(Record, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="profile"):
    """Per-layer times of one architecture, measured on the run's device.

    `step_s` is the median of whole training steps measured without per-layer timers, `forward_s` and `backward_s`
    its parts; per-layer times are scaled by nothing and need not add up to them (timers cost time themselves).
    `step_low_s` and `step_high_s` are the fastest and the slowest of the `num_samples` whole steps (of twenty or more
    the 5th and 95th percentile).
    """

    architecture: str
    batch: Batch
    precision: Precision
    memory_format: MemoryFormat
    device: str
    num_samples: Positive
    layers: tuple[LayerProfile, ...]
    forward_s: Seconds
    backward_s: Seconds
    optimizer_s: Seconds
    regularizer_s: Seconds
    step_s: Seconds
    step_low_s: Seconds | None = None
    step_high_s: Seconds | None = None
    peak_memory_bytes: Count | None = None


class EpochTime(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Seconds of one training epoch on rank 0; `wall_s` is the whole training epoch without validation.

    The parts sum to at most `wall_s`; what is missing is loop overhead. `backward_s` includes the communication
    that it hides, `exposed_communication_s` is what it could not hide.
    """

    wall_s: Seconds
    data_wait_s: Seconds
    forward_s: Seconds
    backward_s: Seconds
    regularizer_s: Seconds
    optimizer_s: Seconds
    exposed_communication_s: Difference
    validation_s: Seconds


class StepDistribution(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Spread of the iterations' durations within an epoch (seconds), the source of jitter."""

    median_s: Seconds
    p10_s: Seconds
    p90_s: Seconds
    std_s: Seconds


class DeviceUse(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What NVML saw of one GPU while the epoch trained, not validated (means; energy and memory are totals)."""

    energy_j: Quantity | None = None
    power_w: Quantity | None = None
    sm_clock_hz: Quantity | None = None
    memory_clock_hz: Quantity | None = None
    temperature_c: Annotated[float, msgspec.Meta(ge=-273.15, le=1000)] | None = None
    utilization: Fraction | None = None  # fraction of time with a kernel running, 0..1
    peak_memory_bytes: Count | None = None


class LayerDensity(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Fractions that are not sparse in one layer of the *current* architecture, threshold 1e-4 (paper, Fig. 12)."""

    layer: str
    input_channels: Fraction
    output_channels: Fraction
    weights: Fraction


class Epoch(Record, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="epoch"):
    """One epoch. `epoch` counts from 0; losses are means over images; accuracies are fractions 0..1.

    Losses and accuracies that nobody measured are null. `channel_sparsity` and `weight_sparsity` are relative to the
    *first* architecture of the run: what is removed counts as sparse; in a planned run nothing else does.
    `allreduce_bytes` is the gradient payload that every rank reduced over the epoch.

    Attributes:
        penalty_coefficient: λ; 0 without the group lasso, null for a group lasso whose λ nobody knows.
        passes: forward and backward passes of an iteration, whose gradients accumulate over its mini-batch.
        measured_time, measured_step: `time` and `step` of the file; null where nobody measured them. Who needs them
            reads `time` and `step`.
    """

    epoch: Count
    architecture: str
    batch_per_gpu: Batch
    world_size: Ranks
    learning_rate: Quantity | None
    num_iterations: Positive
    num_images: Positive
    penalty_coefficient: Quantity | None
    train_loss: Number | None
    penalty: Number | None
    train_accuracy: Fraction | None
    validation_loss: Number | None
    validation_accuracy: Fraction | None
    channel_sparsity: Fraction
    weight_sparsity: Fraction
    measured_time: EpochTime | None = msgspec.field(name="time")
    measured_step: StepDistribution | None = msgspec.field(name="step")
    allreduce_bytes: Count
    peak_memory_bytes: Count | None  # the allocator's while training, without the images that ptsim keeps on the device
    device: DeviceUse | None = None
    passes: Positive = 1
    densities: tuple[LayerDensity, ...] = ()
    channel_maxima: dict[str, tuple[Number, ...]] | None = None  # per layer, largest |w| per output channel

    def iterations_with(self, batch_per_gpu: int, world_size: int) -> int:
        """Its iterations with such mini-batches on so many ranks: every image is trained on, as in the run itself.

        What fills no mini-batch is one more iteration.
        """
        if (batch_per_gpu, world_size) == (self.batch_per_gpu, self.world_size):
            return self.num_iterations
        return math.ceil(self.num_images / (batch_per_gpu * world_size))

    @property
    def regularized(self) -> bool:
        """Whether the group lasso's gradient was part of the steps."""
        return self.penalty_coefficient is None or self.penalty_coefficient > 0

    @property
    def time(self) -> EpochTime:
        """The measured seconds.

        Raises:
            MissingMeasurementError: nobody measured them, as in a planned run.
        """
        return _measured(self.measured_time, f"the time of epoch {self.epoch}")

    @property
    def step(self) -> StepDistribution:
        """The measured spread of the iterations' durations.

        Raises:
            MissingMeasurementError: nobody measured it, as in a planned run.
        """
        return _measured(self.measured_step, f"the steps of epoch {self.epoch}")

    @property
    def mean_power_w(self) -> float | None:
        """Of its GPU while it trained, by its energy: what a board says of its power is a mean over up to a second.

        The mean of the samples where no energy was told; None where nobody measured either, or the time.
        """
        if self.device is None or self.measured_time is None:
            return None
        wall_s = self.measured_time.wall_s
        return self.device.power_w if self.device.energy_j is None or not wall_s else self.device.energy_j / wall_s


class Reconfiguration(Record, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="reconfiguration"):
    """A shrinking of the network after epoch `epoch` (its first new epoch is `epoch + 1`).

    `duration_s` is everything that the run paid for it: decision, surgery, re-wrapping, re-profiling excluded. It is
    null in the file (`measured_duration_s`) where nobody measured it. `learning_rate_scale` is the factor on the
    planned rate from then on, for the mini-batch that has grown since the run began.
    """

    epoch: Count
    before: str
    after: str
    channels_removed: Count
    layers_removed: tuple[str, ...]
    measured_duration_s: Seconds | None = msgspec.field(name="duration_s")
    batch_before: Batch
    batch_after: Batch
    learning_rate_scale: Quantity = 1.0
    predicted_memory_bytes: Count | None = None
    notes: tuple[str, ...] = ()

    @property
    def duration_s(self) -> float:
        """The measured seconds.

        Raises:
            MissingMeasurementError: nobody measured them, as in a planned run.
        """
        return _measured(self.measured_duration_s, f"the reconfiguration after epoch {self.epoch}")


class Draw(Record, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="draw"):
    """Other networks that a planned run could have: another trajectory that agrees with what was given.

    Attributes:
        seed: that it was drawn with.
        architectures: (first epoch that trains it, id), ascending from epoch 0; an epoch after the last one marks what
            the run ends with.
    """

    seed: int
    architectures: tuple[tuple[Count, str], ...]


class End(Record, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="end"):
    """The last line of a run that stopped in an orderly way.

    `energy_j` is that of the epochs whose energy was measured, of one GPU.
    """

    status: Literal["clean", "interrupted", "failed"]
    reason: str | None
    epochs: Count
    final_accuracy: Fraction | None
    wall_s: Seconds | None
    num_iterations: Count
    energy_j: Quantity | None = None


def _measured(value: T | None, what: str) -> T:
    if value is None:
        raise MissingMeasurementError(f"{what} was not measured: the run is planned, or its recorder took no times")
    return value


AnyRecord = Run | Architecture | Profile | Epoch | Reconfiguration | Draw | End


def gone_share(left: int, first: int) -> float:
    """A sparsity: the fraction of `first` channels or weights that is not left; of what has grown, nothing is gone."""
    return 1 - left / first if left < first else 0.0
