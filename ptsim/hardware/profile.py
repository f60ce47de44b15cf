"""What has been measured on one device with `ptsim calibrate gpu`: operators, whole steps, copies and launches.

The file is TOML, one operator a line, every quantity with its unit, so that people can read, diff and cut it:

    ptsim_device_profile = 1
    created = "2026-11-22T13:00:00Z"
    complete = true                    # false while measuring, and after an interruption: it can be resumed

    operators = [
      { op = "conv2d", kind = "conv", setting = "fp32 contiguous", batch = 128, inputs = [[16, 32, 32]],
        output = [16, 32, 32], kernel = [3, 3], padding = [1, 1], forward = "1.2 ms", weight_gradient = "1.9 ms",
        input_gradient = "1.1 ms", backward = "3.0 ms", context = "alone" },
    ]

    [device]
    name = "AMD EPYC"
    kind = "cpu"
    …
    [machine]
    copy_bandwidth = "11.2 GB/s"
    launch_overhead = "4 us"

    [[step]]                           # whole training steps of one network, without clocks inside
    …
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import tomli_w

from ptsim.errors import FileFormatError, MissingMeasurementError, NewerVersionError
from ptsim.network import Layer, LayerKind, MemoryFormat, Precision
from ptsim.textfile import plain_error, read_toml, write_whole
from ptsim.units import Dimension, parse_quantity

PROFILE_VERSION = 1

Context = Literal["step", "alone"]


class Setting(msgspec.Struct, frozen=True, kw_only=True, order=True):
    """How operators were run: number format of the products and layout of the activations."""

    precision: Precision
    memory_format: MemoryFormat

    def __str__(self) -> str:
        return f"{self.precision} {self.memory_format}"


class OperatorShape(msgspec.Struct, frozen=True, kw_only=True):
    """What an operator computes, by what `Layer` says without names and counts."""

    op: str
    kind: LayerKind
    batch: int
    inputs: tuple[tuple[int, ...], ...]
    output: tuple[int, ...]
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    bias: bool = False
    inplace: bool = False
    input_needs_gradient: bool = True


class Operator(OperatorShape, frozen=True, kw_only=True, cache_hash=True):
    """All that decides an operator's time on a given device."""

    setting: Setting


def operator_of(layer: Layer, *, batch: int, setting: Setting) -> Operator:
    """The operator that `layer` is at a mini-batch of `batch`."""
    return Operator(
        kind=layer.kind,
        op=layer.op,
        setting=setting,
        batch=layer.repeats(batch),
        inputs=layer.input_shapes,
        output=layer.output_shape,
        kernel=layer.kernel_size,
        stride=layer.stride,
        padding=layer.padding,
        dilation=layer.dilation,
        groups=layer.groups,
        bias=layer.bias,
        inplace=layer.inplace,
        input_needs_gradient=layer.input_needs_gradient,
    )


class OperatorTime(msgspec.Struct, frozen=True, kw_only=True, cache_hash=True):
    """Median seconds of one operator for its whole mini-batch.

    Attributes:
        weight_gradient_s, input_gradient_s: each computed alone; None where not measured or not computed.
        backward_s: the whole backward pass, None where autograd has no node.
        host_s: what the host needs to launch forward and backward, None on a CPU.
        context: "step" inside a training step (caches as training leaves them), "alone" in a loop of its own.
    """

    operator: Operator
    forward_s: float
    backward_s: float | None
    weight_gradient_s: float | None = None
    input_gradient_s: float | None = None
    host_s: float | None = None
    context: Context = "alone"


class StepMeasurement(msgspec.Struct, frozen=True, kw_only=True, cache_hash=True):
    """Whole training steps of one network, without clocks inside: medians of steps, means over `num_rounds`.

    `num_samples` steps were taken in all rounds together. `layers_forward_s` and `layers_backward_s` are the sums of
    its layers' times with a clock around each; the regulariser's time is None where it was not measured.
    """

    architecture: str
    name: str
    setting: Setting
    batch: int
    optimizer: str | None
    num_parameters: int
    num_tensors: int
    num_layers: int
    num_samples: int
    forward_s: float
    backward_s: float
    optimizer_s: float | None
    regularizer_s: float | None
    step_s: float
    step_low_s: float
    step_high_s: float
    layers_forward_s: float
    layers_backward_s: float
    peak_memory_bytes: int | None = None
    num_rounds: int = 1


class MachineLoad(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How quiet the machine was while it was measured; None where nothing tells.

    Attributes:
        num_cores: processors that the machine has.
        other_cores: how many of them everything but the measurement kept busy, in the mean.
        waited: fraction of the time for which the measuring thread was ready and got no processor.
        drift: how much longer the same small kernel took at the slow moments (90th percentile) than at the fast ones.
    """

    num_cores: Annotated[int, msgspec.Meta(ge=1)]
    other_cores: Annotated[float, msgspec.Meta(ge=0)] | None = None
    waited: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    drift: Annotated[float, msgspec.Meta(ge=1)] | None = None

    def disturbance(self, num_threads: int | None) -> str | None:
        """What disturbed measurements with `num_threads`, as a sentence without its end; None if nothing much did.

        The bounds are where this machine's step times moved by more than the 5 % that a prediction may be off.
        """
        said = []
        free = max(self.num_cores - (num_threads or 1), 1)
        if self.other_cores is not None and self.other_cores > _OTHERS_MAY_USE * free:
            said.append(f"other programs kept {self.other_cores:.1f} of {self.num_cores} processor cores busy")
        if self.waited is not None and self.waited > _MAY_WAIT:
            said.append(f"the measurement got no processor for {self.waited:.0%} of the time")
        if self.drift is not None and self.drift > _MAY_DRIFT:
            said.append(f"the same kernel took up to {self.drift:.2f} times as long from one moment to another")
        return "; ".join(said) or None


_OTHERS_MAY_USE, _MAY_WAIT, _MAY_DRIFT = 0.25, 0.05, 1.15


class DeviceProfile(msgspec.Struct, frozen=True, kw_only=True):
    """One device, measured.

    Attributes:
        device: as its driver names it.
        num_threads: of torch on a CPU; times with another number are another device's.
        copy_bandwidth_bytes_per_s: bytes read plus bytes written of a large copy, per second.
        launch_overhead_s: shortest time from one small operator to the next.
        power_w, sm_clock_hz: means under load while calibrating.
        input_s_per_image: what an epoch takes beyond its training steps, per image of a process; by data set.
        reconfiguration_s: median seconds of one reconfiguration in the calibrated traces.
        load: how quiet the machine was, None where nobody looked.
        sources: traces that the steps come from.
    """

    created: str
    complete: bool
    device: str
    kind: Literal["cpu", "cuda"]
    memory_bytes: int
    num_threads: int | None
    software: dict[str, str]
    copy_bandwidth_bytes_per_s: float | None = None
    launch_overhead_s: float | None = None
    power_w: float | None = None
    sm_clock_hz: float | None = None
    reconfiguration_s: float | None = None
    load: MachineLoad | None = None
    input_s_per_image: dict[str, float] = {}
    sources: tuple[str, ...] = ()
    operators: tuple[OperatorTime, ...] = ()
    steps: tuple[StepMeasurement, ...] = ()

    @property
    def disturbance(self) -> str | None:
        """What a user must know before trusting its times: the machine was not quiet. None if it was."""
        said = None if self.load is None else self.load.disturbance(self.num_threads)
        return None if said is None else f"the device profile was not measured on a quiet machine: {said}"

    def doubts(self, versions: Mapping[str, str] | None = None) -> tuple[str, ...]:
        """Sentences that belong beside every number made from this profile.

        Args:
            versions: of the software that the predicted run used; None if the prediction is of no run.
        """
        said = [] if self.disturbance is None else [self.disturbance]
        mine, theirs = self.software.get("torch"), (versions or {}).get("torch")
        if mine and theirs and _release(mine) != _release(theirs):
            said.append(f"the device profile was measured with torch {mine}, the run used torch {theirs}")
        return tuple(said)

    @property
    def settings(self) -> tuple[Setting, ...]:
        """Precisions and memory formats that something was measured in."""
        return tuple(sorted({t.operator.setting for t in self.operators} | {s.setting for s in self.steps}))

    def check_device(self, name: str) -> None:
        """Refuse to speak for another device.

        Raises:
            MissingMeasurementError: the profile was taken on another device than `name`.
        """
        if name != self.device:
            raise MissingMeasurementError(
                f"the device profile was measured on {self.device!r}, not on {name!r}",
                hint=f"run `ptsim calibrate gpu` on {name}",
            )

    def check_setting(self, setting: Setting) -> None:
        """Refuse to speak for another precision or memory format.

        Raises:
            MissingMeasurementError: nothing was measured in `setting`.
        """
        if setting not in self.settings:
            known = ", ".join(map(str, self.settings)) or "nothing yet"
            raise MissingMeasurementError(
                f"the device profile of {self.device} holds {known}, not {setting}",
                hint=f"run `ptsim calibrate gpu --precision {setting.precision} --memory-format "
                f"{setting.memory_format}`",
            )


def read_device_profile(path: str | Path) -> DeviceProfile:
    """Read and check the profile in the TOML file `path`.

    Raises:
        FileFormatError: no such file, not TOML, not a device profile, an unknown or missing field, a quantity without
            unit, not positive or in a wrong unit; names file and place.
        NewerVersionError: written by a newer ptsim.
    """
    path = Path(path)
    raw = read_toml(path)
    version = raw.get("ptsim_device_profile")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise FileFormatError(
            path, "not a device profile: expected ptsim_device_profile = 1", hint="`ptsim calibrate gpu` writes one"
        )
    if version > PROFILE_VERSION:
        problem = f"profile version {version} is newer than the {PROFILE_VERSION} that this ptsim reads"
        raise NewerVersionError(path, problem, hint="update ptsim")
    try:
        return _from_file(path, msgspec.convert(raw, _File))
    except msgspec.ValidationError as error:
        raise FileFormatError(path, plain_error(error)) from error


def write_device_profile(path: str | Path, profile: DeviceProfile) -> None:
    """Write `profile` whole or not at all: an interruption leaves the file that was there before.

    Raises:
        FileFormatError: it cannot be written: a full disk, no right to.
    """
    path = Path(path)
    try:
        write_whole(path, _text(profile))
    except OSError as error:
        kept = "; what was saved before is still there" if path.exists() else ""
        raise FileFormatError(path, f"cannot be written: {error.strerror}{kept}") from error


def _release(version: str) -> str:
    """The version without what it was built for: 2.11.0+cu130 and 2.11.0 are the same code."""
    return version.partition("+")[0]


class _Row(OperatorShape, frozen=True, kw_only=True, forbid_unknown_fields=True):
    setting: str
    forward: str
    backward: str | None = None
    weight_gradient: str | None = None
    input_gradient: str | None = None
    host: str | None = None
    context: Context = "alone"


class _Step(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    architecture: str
    name: str
    setting: str
    batch: int
    num_parameters: int
    num_tensors: int
    num_layers: int
    num_samples: int
    forward: str
    backward: str
    step: str
    fastest: str
    slowest: str
    layers_forward: str
    layers_backward: str
    num_rounds: int = 1
    optimizer_name: str | None = None
    optimizer: str | None = None
    regularizer: str | None = None
    peak_memory: str | None = None


class _Device(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    kind: Literal["cpu", "cuda"]
    memory: str
    num_threads: int | None = None


class _Machine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    copy_bandwidth: str | None = None
    launch_overhead: str | None = None
    power: str | None = None
    sm_clock: str | None = None
    reconfiguration: str | None = None


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    ptsim_device_profile: int
    created: str
    complete: bool
    device: _Device
    operators: tuple[_Row, ...] = ()
    machine: _Machine = _Machine()
    load: MachineLoad | None = None
    software: dict[str, str] = {}
    input_per_image: dict[str, str] = {}
    sources: tuple[str, ...] = ()
    step: tuple[_Step, ...] = ()


def _from_file(path: Path, file: _File) -> DeviceProfile:
    def number(place: str, text: str, dimension: Dimension) -> float:
        try:
            value = parse_quantity(text, dimension)
        except ValueError as error:
            raise FileFormatError(path, f"{place}: {error}") from error
        if value < 0 or (value == 0 and dimension != "seconds"):
            raise FileFormatError(path, f"{place}: {text!r} is not positive")
        return value

    def maybe(place: str, text: str | None, dimension: Dimension) -> float | None:
        return None if text is None else number(place, text, dimension)

    def setting(place: str, text: str) -> Setting:
        precision, _, memory_format = text.partition(" ")
        try:
            return msgspec.convert({"precision": precision, "memory_format": memory_format}, Setting)
        except msgspec.ValidationError as error:
            expected = "a precision and a memory format such as 'fp32 contiguous'"
            raise FileFormatError(path, f"{place}: found {text!r}, expected {expected}") from error

    operators = []
    for index, row in enumerate(file.operators):
        place = f"operators[{index}] ({row.op})"
        if row.batch < 1:
            raise FileFormatError(path, f"{place}: batch is {row.batch}, expected at least 1")
        operators.append(
            OperatorTime(
                operator=Operator(
                    setting=setting(f"{place}.setting", row.setting),
                    **{field: getattr(row, field) for field in OperatorShape.__struct_fields__},
                ),
                forward_s=number(f"{place}.forward", row.forward, "seconds"),
                backward_s=maybe(f"{place}.backward", row.backward, "seconds"),
                weight_gradient_s=maybe(f"{place}.weight_gradient", row.weight_gradient, "seconds"),
                input_gradient_s=maybe(f"{place}.input_gradient", row.input_gradient, "seconds"),
                host_s=maybe(f"{place}.host", row.host, "seconds"),
                context=row.context,
            )
        )
    steps = []
    for index, step in enumerate(file.step):
        place = f"step[{index}] ({step.name})"
        values: dict[str, Any] = {field: getattr(step, field) for field in _STEP_FIELDS}
        values |= {f"{field}_s": number(f"{place}.{field}", getattr(step, field), "seconds") for field in _STEP_SECONDS}
        memory = maybe(f"{place}.peak_memory", step.peak_memory, "bytes")
        steps.append(
            StepMeasurement(
                setting=setting(f"{place}.setting", step.setting),
                optimizer=step.optimizer_name,
                optimizer_s=maybe(f"{place}.optimizer", step.optimizer, "seconds"),
                regularizer_s=maybe(f"{place}.regularizer", step.regularizer, "seconds"),
                step_low_s=number(f"{place}.fastest", step.fastest, "seconds"),
                step_high_s=number(f"{place}.slowest", step.slowest, "seconds"),
                peak_memory_bytes=None if memory is None else round(memory),
                **values,
            )
        )
    machine = file.machine
    return DeviceProfile(
        created=file.created,
        complete=file.complete,
        device=file.device.name,
        kind=file.device.kind,
        memory_bytes=round(number("device.memory", file.device.memory, "bytes")),
        num_threads=file.device.num_threads,
        software=file.software,
        copy_bandwidth_bytes_per_s=maybe("machine.copy_bandwidth", machine.copy_bandwidth, "bytes_per_s"),
        launch_overhead_s=maybe("machine.launch_overhead", machine.launch_overhead, "seconds"),
        power_w=maybe("machine.power", machine.power, "watts"),
        sm_clock_hz=maybe("machine.sm_clock", machine.sm_clock, "hertz"),
        reconfiguration_s=maybe("machine.reconfiguration", machine.reconfiguration, "seconds"),
        load=file.load,
        input_s_per_image={
            name: number(f"input_per_image.{name}", text, "seconds") for name, text in file.input_per_image.items()
        },
        sources=file.sources,
        operators=tuple(operators),
        steps=tuple(steps),
    )


_STEP_FIELDS = (
    "architecture", "name", "batch", "num_parameters", "num_tensors", "num_layers", "num_samples", "num_rounds",
)  # fmt: skip
_STEP_SECONDS = ("forward", "backward", "step", "layers_forward", "layers_backward")
_DEFAULTS = {field.name: field.default for field in msgspec.structs.fields(_Row)}


def _seconds(value: float | None) -> str | None:
    return None if value is None else f"{value * 1e6:.6g} us"


def _known(table: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in table.items() if value is not None}


def _text(profile: DeviceProfile) -> str:
    head = {
        "ptsim_device_profile": PROFILE_VERSION,
        "created": profile.created,
        "complete": profile.complete,
        "sources": list(profile.sources),
    }
    bandwidth, power, clock = profile.copy_bandwidth_bytes_per_s, profile.power_w, profile.sm_clock_hz
    tail = {
        "device": _known(
            {
                "name": profile.device,
                "kind": profile.kind,
                "memory": f"{profile.memory_bytes} B",
                "num_threads": profile.num_threads,
            }
        ),
        "machine": _known(
            {
                "copy_bandwidth": None if bandwidth is None else f"{bandwidth / 1e9:.6g} GB/s",
                "launch_overhead": _seconds(profile.launch_overhead_s),
                "reconfiguration": _seconds(profile.reconfiguration_s),
                "power": None if power is None else f"{power:.6g} W",
                "sm_clock": None if clock is None else f"{clock / 1e6:.6g} MHz",
            }
        ),
        **({} if profile.load is None else {"load": _load(profile.load)}),
        "software": profile.software,
        "input_per_image": {name: _seconds(value) for name, value in profile.input_s_per_image.items()},
        "step": [_step_table(step) for step in profile.steps],
    }
    rows = "".join(f"  {_inline(_row(time))},\n" for time in profile.operators)
    return f"{tomli_w.dumps(head)}\noperators = [\n{rows}]\n\n{tomli_w.dumps(tail)}"


def _load(load: MachineLoad) -> dict[str, Any]:
    known = _known(msgspec.structs.asdict(load))
    return {key: value if isinstance(value, int) else round(value, 4) for key, value in known.items()}


def _row(time: OperatorTime) -> dict[str, Any]:
    operator = time.operator
    row = {
        **{field: getattr(operator, field) for field in OperatorShape.__struct_fields__},
        "setting": str(operator.setting),
        "forward": _seconds(time.forward_s),
        "backward": _seconds(time.backward_s),
        "weight_gradient": _seconds(time.weight_gradient_s),
        "input_gradient": _seconds(time.input_gradient_s),
        "host": _seconds(time.host_s),
        "context": time.context,
    }
    return {key: value for key, value in row.items() if value is not None and value != _DEFAULTS[key]}


def _step_table(step: StepMeasurement) -> dict[str, Any]:
    memory = step.peak_memory_bytes
    return _known(
        {
            "setting": str(step.setting),
            "optimizer_name": step.optimizer,
            "optimizer": _seconds(step.optimizer_s),
            "regularizer": _seconds(step.regularizer_s),
            "fastest": _seconds(step.step_low_s),
            "slowest": _seconds(step.step_high_s),
            "peak_memory": None if memory is None else f"{memory} B",
            **{field: getattr(step, field) for field in _STEP_FIELDS},
            **{field: _seconds(getattr(step, f"{field}_s")) for field in _STEP_SECONDS},
        }
    )


def _inline(table: Mapping[str, Any]) -> str:
    return "{ " + ", ".join(f"{key} = {_value(value)}" for key, value in table.items()) + " }"


def _value(value: Any) -> str:
    """A TOML value on one line; JSON's strings and numbers are TOML's too."""
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_value, value)) + "]"
    return msgspec.json.encode(value).decode()


def merge_operators(known: Iterable[OperatorTime], new: Iterable[OperatorTime]) -> tuple[OperatorTime, ...]:
    """Both, each operator and context once; of two measurements the new one."""
    merged = {(time.operator, time.context): time for time in known}
    merged |= {(time.operator, time.context): time for time in new}
    return tuple(merged.values())


def mean_time(times: Sequence[OperatorTime]) -> OperatorTime:
    """The mean of measurements of one operator in one context; a pass that some of them lack is that of the others."""

    def mean(values: Iterable[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return statistics.fmean(known) if known else None

    return msgspec.structs.replace(
        times[0],
        forward_s=statistics.fmean(time.forward_s for time in times),
        backward_s=mean(time.backward_s for time in times),
        weight_gradient_s=mean(time.weight_gradient_s for time in times),
        input_gradient_s=mean(time.input_gradient_s for time in times),
        host_s=mean(time.host_s for time in times),
    )


def with_round(steps: Sequence[StepMeasurement], new: StepMeasurement) -> tuple[StepMeasurement, ...]:
    """The steps with one more round of one network: all its times become the means over its rounds.

    The range of its steps becomes that of all rounds together, so that it holds what the device's speed drifted.
    """
    key = (new.architecture, new.setting, new.batch, new.optimizer)
    old = next((step for step in steps if (step.architecture, step.setting, step.batch, step.optimizer) == key), None)
    if old is None:
        return (*steps, new)
    num_rounds = old.num_rounds + new.num_rounds

    def mean(field: str) -> float | None:
        before, after = getattr(old, field), getattr(new, field)
        if before is None or after is None:
            return before if after is None else after  # type: ignore[no-any-return] # getattr's
        return (old.num_rounds * before + new.num_rounds * after) / num_rounds  # type: ignore[no-any-return] # getattr's

    joined = msgspec.structs.replace(
        new,
        num_samples=old.num_samples + new.num_samples,
        num_rounds=num_rounds,
        peak_memory_bytes=max(filter(None, (old.peak_memory_bytes, new.peak_memory_bytes)), default=None),
        **{field: mean(field) for field in StepMeasurement.__struct_fields__ if field.endswith("_s")},
    )
    joined = msgspec.structs.replace(
        joined,
        step_low_s=min(old.step_low_s, new.step_low_s),
        step_high_s=max(old.step_high_s, new.step_high_s),
    )
    return tuple(joined if step is old else step for step in steps)
