"""What has been measured on one device: operators, whole steps, copies and launches. `profile_file.py` has the file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import msgspec

from ptsim.criteria import GROUP_LASSO
from ptsim.errors import MissingMeasurementError
from ptsim.network import Layer, LayerKind, MemoryFormat, Precision
from ptsim.operators import num_taps

Context = Literal["step", "alone"]


class OperatorSetting(msgspec.Struct, frozen=True, kw_only=True, order=True):
    """How operators were run: number format of the products and layout of the activations."""

    precision: Precision
    memory_format: MemoryFormat

    def __str__(self) -> str:
        return f"{self.precision} {self.memory_format}"


class OperatorShape(msgspec.Struct, frozen=True, kw_only=True):
    """What an operator computes, by what `Layer` says without names and counts.

    The depth of a convolution's kernel is in its height too: no older file names it by itself.
    """

    op: str
    kind: LayerKind
    batch: int
    inputs: tuple[tuple[int, ...], ...]
    output: tuple[int, ...]
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    depth: tuple[int, int, int, int] | None = None
    groups: int = 1
    bias: bool = False
    inplace: bool = False
    input_needs_gradient: bool = True


class Operator(OperatorShape, frozen=True, kw_only=True, cache_hash=True):
    """All that decides an operator's time on a given device."""

    setting: OperatorSetting


def operator_of(layer: Layer, *, batch: int, setting: OperatorSetting) -> Operator:
    """The operator that `layer` is at a mini-batch of `batch`; what is folded into that belongs to the operator's."""
    images, inputs, output = layer.repeats(batch), layer.input_shapes, layer.output_shape
    if layer.kind is LayerKind.CONV:
        folded, output = layer.unfolded(output)
        images, inputs = images * folded, tuple(layer.unfolded(shape)[1] for shape in inputs)
    return Operator(
        kind=layer.kind,
        op=layer.op,
        setting=setting,
        batch=images,
        inputs=inputs,
        output=output,
        kernel=_kernel(layer),
        stride=layer.stride,
        padding=layer.padding,
        dilation=layer.dilation,
        depth=layer.depth,
        groups=layer.groups,
        bias=layer.bias,
        inplace=layer.inplace,
        input_needs_gradient=layer.input_needs_gradient,
    )


def _kernel(layer: Layer) -> tuple[int, int]:
    """(height, width) of the windows; a filter's depth, which a layer does not name, counts with its height."""
    if layer.kind is not LayerKind.CONV or layer.spatial_axes < 3:
        return layer.kernel_size
    width = layer.kernel_size[1]
    return max(num_taps(layer) // width, 1), width


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
    its layers' times with a clock around each. Parameters and tensors are those that get a gradient. The momentum is
    None for the optimizer's own. The time of the regulariser, `criterion`, as a gradient or as a `proximal` step, is
    None where it was not measured.
    A `data_parallel` step was recorded on one of several GPUs: its backward pass holds the hooks of the gradients, and
    what collectives beside it slow it down, but no waiting for them.
    """

    architecture: str
    name: str
    setting: OperatorSetting
    batch: int
    optimizer: str | None
    momentum: float | None = None
    criterion: str = GROUP_LASSO
    proximal: bool = False
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
    data_parallel: bool = False


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
            said.append(f"other programs kept {self.other_cores:.1f} of {self.num_cores} CPU cores busy")
        if self.waited is not None and self.waited > _MAY_WAIT:
            said.append(f"the measurement waited for a CPU core {self.waited:.0%} of the time")
        if self.drift is not None and self.drift > _MAY_DRIFT:
            said.append(f"the same kernel took up to {self.drift:.2f} times as long from one moment to another")
        return "; ".join(said) or None


_OTHERS_MAY_USE, _MAY_WAIT, _MAY_DRIFT = 0.25, 0.05, 1.15
_FEW_STEPS = 5  # whose range holds two thirds of all


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
        sources: files that the steps come from: traces, or recordings of another profiler.
        runs: the fingerprints of those that are traces, which their copies have as well.
        called: what sentences call it; files do not say it.
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
    runs: tuple[str, ...] = ()
    operators: tuple[OperatorTime, ...] = ()
    steps: tuple[StepMeasurement, ...] = ()
    called: str = "the device profile"

    @property
    def disturbance(self) -> str | None:
        """What a user must know before trusting its times: the machine was not quiet. None if it was."""
        said = None if self.load is None else self.load.disturbance(self.num_threads)
        return None if said is None else f"{self.called} was not measured on a quiet machine: {said}"

    def doubts(self, versions: Mapping[str, str] | None = None, *, num_gpus: int | None = None) -> tuple[str, ...]:
        """Sentences that belong beside every number made from this profile.

        Args:
            versions: of the software that the predicted run used; None if the prediction is of no run.
            num_gpus: on which is predicted; None for several numbers of them.
        """
        said = [] if self.disturbance is None else [self.disturbance]
        mine, theirs = self.software.get("torch"), (versions or {}).get("torch")
        if mine and theirs and _release(mine) != _release(theirs):
            said.append(f"{self.called} was measured with torch {mine}, the run used torch {theirs}")
        most = max((step.num_samples for step in self.steps), default=_FEW_STEPS)
        if most < _FEW_STEPS:
            share = (most - 1) / (most + 1)  # of further values, in the range of so many
            said.append(
                f"the spread of steps is that of the {most} in {self.called}; on average {share:.0%} of all steps "
                "lie in such a range"
            )
        if num_gpus == 1 and any(step.data_parallel for step in self.steps):
            said.append(
                f"{self.called} was recorded on one of several GPUs: its steps hold what their gradients' hooks "
                "and the collectives beside them cost, which a single GPU does not pay"
            )
        return tuple(said)

    @property
    def settings(self) -> tuple[OperatorSetting, ...]:
        """Precisions and memory formats that something was measured in."""
        return tuple(sorted({t.operator.setting for t in self.operators} | {s.setting for s in self.steps}))

    def check_device(self, name: str) -> None:
        """Refuse to speak for another device.

        Raises:
            MissingMeasurementError: the profile was taken on another device than `name`.
        """
        if name != self.device:
            raise MissingMeasurementError(
                f"{self.called} was measured on {self.device!r}, not on {name!r}",
                hint=f"run `ptsim calibrate gpu --out FILE.toml` on {name}",
            )

    def check_setting(self, setting: OperatorSetting) -> None:
        """Refuse to speak for another precision or memory format.

        Raises:
            MissingMeasurementError: nothing was measured in `setting`.
        """
        if setting not in self.settings:
            known = ", ".join(map(str, self.settings)) or "nothing yet"
            raise MissingMeasurementError(
                f"{self.called} of {self.device} holds {known}, not {setting}",
                hint=f"run `ptsim calibrate gpu --precision {setting.precision} --memory-format "
                f"{setting.memory_format} --out FILE.toml`",
            )


def _release(version: str) -> str:
    """The version without what it was built for: 2.11.0+cu130 and 2.11.0 are the same code."""
    return version.partition("+")[0]
