"""How a device profile is written: TOML, one operator a line, every quantity with its unit; people read and cut it.

ptsim_device_profile = 1           # 2 where a step has a momentum or a proximal penalty, 3 where an operator has
                                   # depth, 4 where it was calibrated on runs, 5 where a step is data-parallel
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

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import msgspec
import tomli_w

from ptsim.consistency import MOST_COUNTED, MOST_MOMENTUM, operator_problem
from ptsim.criteria import GROUP_LASSO
from ptsim.errors import FileFormatError, NewerVersionError
from ptsim.hardware.profile import (
    Context,
    DeviceProfile,
    MachineLoad,
    Operator,
    OperatorSetting,
    OperatorShape,
    OperatorTime,
    StepMeasurement,
)
from ptsim.network import LayerKind
from ptsim.textfile import convert_toml, read_toml, write_whole
from ptsim.units import Bytes, BytesPerSecond, Hertz, Seconds, Watts, read_quantity

PROFILE_VERSION = 5  # 2: `_Step.momentum` and `proximal`; 3: `_Row.depth`; 4: `_File.runs`; 5: `_Step.data_parallel`

Name: TypeAlias = Annotated[str, msgspec.Meta(min_length=1, max_length=300)]
Count: TypeAlias = Annotated[int, msgspec.Meta(ge=1, le=MOST_COUNTED)]
NotNegative: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=MOST_COUNTED)]
Shape: TypeAlias = Annotated[tuple[Count, ...], msgspec.Meta(max_length=8)]
Momentum: TypeAlias = Annotated[float, msgspec.Meta(ge=0, le=MOST_MOMENTUM)]


class SettingText(str):
    """A setting as files write it: "fp32 contiguous"."""

    @property
    def value(self) -> OperatorSetting:
        """The setting.

        Raises:
            ValueError: the text is none.
        """
        precision, _, memory_format = self.partition(" ")
        try:
            return msgspec.convert({"precision": precision, "memory_format": memory_format}, OperatorSetting)
        except msgspec.ValidationError as error:
            expected = "a precision and a memory format such as 'fp32 contiguous'"
            raise ValueError(f"found {str(self)!r}, expected {expected}") from error


class _Form(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table of the file."""


class _Row(_Form, frozen=True, kw_only=True):
    op: Name
    kind: LayerKind
    batch: Count
    inputs: tuple[Shape, ...]
    output: Shape
    kernel: tuple[Count, Count] = (1, 1)
    stride: tuple[Count, Count] = (1, 1)
    padding: tuple[NotNegative, NotNegative] = (0, 0)
    dilation: tuple[Count, Count] = (1, 1)
    depth: tuple[Count, Count, NotNegative, Count] | None = None
    groups: Count = 1
    bias: bool = False
    inplace: bool = False
    input_needs_gradient: bool = True
    setting: SettingText
    forward: Seconds
    backward: Seconds | None = None
    weight_gradient: Seconds | None = None
    input_gradient: Seconds | None = None
    host: Seconds | None = None
    context: Context = "alone"


class _Step(_Form, frozen=True, kw_only=True):
    architecture: Name
    name: Name
    setting: SettingText
    batch: Count
    num_parameters: NotNegative
    num_tensors: NotNegative
    num_layers: Count
    num_samples: Count
    forward: Seconds
    backward: Seconds
    step: Seconds
    fastest: Seconds
    slowest: Seconds
    layers_forward: Seconds
    layers_backward: Seconds
    num_rounds: Count = 1
    optimizer_name: Name | None = None
    optimizer: Seconds | None = None
    momentum: Momentum | None = None
    regularizer: Seconds | None = None
    criterion: Name = GROUP_LASSO
    proximal: bool = False
    data_parallel: bool = False
    peak_memory: Bytes | None = None


class _Device(_Form, frozen=True, kw_only=True):
    name: Name
    kind: Literal["cpu", "cuda"]
    memory: Bytes
    num_threads: Count | None = None


class _Machine(_Form, frozen=True, kw_only=True):
    copy_bandwidth: BytesPerSecond | None = None
    launch_overhead: Seconds | None = None
    power: Watts | None = None
    sm_clock: Hertz | None = None
    reconfiguration: Seconds | None = None


class _File(_Form, frozen=True, kw_only=True):
    ptsim_device_profile: int
    created: str
    complete: bool
    device: _Device
    operators: tuple[_Row, ...] = ()
    machine: _Machine = _Machine()
    load: MachineLoad | None = None
    software: dict[str, str] = {}
    input_per_image: dict[str, Seconds] = {}
    sources: tuple[str, ...] = ()
    runs: tuple[str, ...] = ()
    step: tuple[_Step, ...] = ()


def read_device_profile(path: str | Path) -> DeviceProfile:
    """Read and check the profile in the TOML file `path`.

    Raises:
        FileFormatError: no such file, not TOML, not a device profile, an unknown or missing field, a quantity without
            unit or beyond its bounds, or an operator whose shapes contradict each other; names file and place.
        NewerVersionError: written by a newer ptsim.
    """
    path = Path(path)
    raw = read_toml(path)
    version = raw.get("ptsim_device_profile")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        problem = "not a device profile: expected ptsim_device_profile = 1"
        raise FileFormatError(path, problem, hint="`ptsim calibrate gpu --out FILE.toml` writes one")
    if version > PROFILE_VERSION:
        problem = f"profile version {version} is newer than the {PROFILE_VERSION} that this ptsim reads"
        raise NewerVersionError(path, problem, hint="update ptsim")
    file = convert_toml(path, raw, _File, dec_hook=_read)
    machine = file.machine
    return DeviceProfile(
        created=file.created,
        complete=file.complete,
        device=file.device.name,
        kind=file.device.kind,
        memory_bytes=round(file.device.memory),
        num_threads=file.device.num_threads,
        software=file.software,
        copy_bandwidth_bytes_per_s=_number(machine.copy_bandwidth),
        launch_overhead_s=_number(machine.launch_overhead),
        power_w=_number(machine.power),
        sm_clock_hz=_number(machine.sm_clock),
        reconfiguration_s=_number(machine.reconfiguration),
        load=file.load,
        input_s_per_image={name: float(value) for name, value in file.input_per_image.items()},
        sources=file.sources,
        runs=file.runs,
        operators=tuple(_time(path, index, row) for index, row in enumerate(file.operators)),
        steps=tuple(_measurement(path, index, step) for index, step in enumerate(file.step)),
    )


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


def _read(kind: type, value: Any) -> Any:
    """Quantities, and settings, which are a precision and a memory format."""
    if kind is not SettingText:
        return read_quantity(kind, value)
    text = SettingText(value)
    _ = text.value  # so that a wrong one is refused here, where the place is known
    return text


def _number(value: float | None) -> float | None:
    return None if value is None else float(value)


def _time(path: Path, index: int, row: _Row) -> OperatorTime:
    shape: dict[str, Any] = {field: getattr(row, field) for field in OperatorShape.__struct_fields__}
    if problem := operator_problem(row.kind, row.inputs, row.output, row.groups):
        raise FileFormatError(path, f"operators[{index}] ({row.op}) {problem}")
    return OperatorTime(
        operator=Operator(setting=row.setting.value, **shape),
        forward_s=float(row.forward),
        backward_s=_number(row.backward),
        weight_gradient_s=_number(row.weight_gradient),
        input_gradient_s=_number(row.input_gradient),
        host_s=_number(row.host),
        context=row.context,
    )


_STEP_FIELDS = (
    "architecture", "name", "batch", "num_parameters", "num_tensors", "num_layers", "num_samples", "num_rounds",
)  # fmt: skip
_STEP_SECONDS = ("forward", "backward", "step", "layers_forward", "layers_backward")


def _measurement(path: Path, index: int, step: _Step) -> StepMeasurement:
    if not step.fastest:
        raise FileFormatError(path, f"step[{index}] ({step.name}) takes no time, expected more")
    if not step.fastest <= step.step <= step.slowest:
        problem = f"step[{index}] ({step.name}) takes {step.step:g} s, expected between its fastest and its slowest"
        raise FileFormatError(path, f"{problem}, {step.fastest:g} s and {step.slowest:g} s")
    values: dict[str, Any] = {field: getattr(step, field) for field in _STEP_FIELDS}
    values |= {f"{field}_s": float(getattr(step, field)) for field in _STEP_SECONDS}
    return StepMeasurement(
        setting=step.setting.value,
        optimizer=step.optimizer_name,
        optimizer_s=_number(step.optimizer),
        momentum=step.momentum,
        regularizer_s=_number(step.regularizer),
        criterion=step.criterion,
        proximal=step.proximal,
        data_parallel=step.data_parallel,
        step_low_s=float(step.fastest),
        step_high_s=float(step.slowest),
        peak_memory_bytes=None if step.peak_memory is None else round(step.peak_memory),
        **values,
    )


_DEFAULTS = {field.name: field.default for field in msgspec.structs.fields(_Row)}


def _seconds(value: float | None) -> str | None:
    return None if value is None else f"{value * 1e6:.6g} us"


def _known(table: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in table.items() if value is not None}


def _version(profile: DeviceProfile) -> int:
    """The lowest version that has all that the profile holds: what an older ptsim can read, it shall read."""
    if any(step.data_parallel for step in profile.steps):
        return 5
    if profile.runs:
        return 4
    if any(time.operator.depth is not None for time in profile.operators):
        return 3
    return 2 if any(step.momentum is not None or step.proximal for step in profile.steps) else 1


def _text(profile: DeviceProfile) -> str:
    head = {
        "ptsim_device_profile": _version(profile),
        "created": profile.created,
        "complete": profile.complete,
        "sources": list(profile.sources),
        **({"runs": list(profile.runs)} if profile.runs else {}),
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
            "momentum": step.momentum,
            "regularizer": _seconds(step.regularizer_s),
            "criterion": None if step.criterion == GROUP_LASSO else step.criterion,
            "proximal": step.proximal or None,
            "data_parallel": step.data_parallel or None,
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
