"""What a step time is of, and what it is: seconds per layer and part, the tier each came from, and an interval."""

from __future__ import annotations

import msgspec

from ptsim.hardware.catalog import measured_device
from ptsim.hardware.profile import DeviceProfile
from ptsim.hardware.spec import Device
from ptsim.network import PRODUCTS, LayerKind
from ptsim.optimizers import OPTIMIZERS, kind_of
from ptsim.setting import StepSetting
from ptsim.trace.schema import Profile
from ptsim.trace.trace import Trace

Z90 = 1.645  # standard deviations from the mean to either end of the middle 90 % of a normal distribution
SUM_ACCESSES = 3  # values that the sum of two gradients moves for every parameter: two are read, one is written


class LayerTime(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of one layer for the whole mini-batch; backward is weight and input gradient together."""

    layer: str
    kind: LayerKind
    forward_s: float
    backward_s: float
    tier: str


class StepTime(msgspec.Struct, frozen=True, kw_only=True):
    """One training step without communication.

    Attributes:
        layers: in forward order; of all passes.
        overhead_s: what a step costs beyond its layers (loss, host gaps); 0 where the tier folds it into the layers.
        low_s, high_s: 90 % interval of `compute_s`, from the residuals of the tier.
        tier: the worst tier that contributed.
        passes: forward and backward passes whose gradients accumulate into the one update.
        data_parallel: recorded on one of several GPUs: backward holds the gradients' hooks, and what collectives slow
            it down.
        whole_s: part of `optimizer_s`: what a GPU does for all parameters whatever part of them it updates. Casts of
            weights and gradients to and from half precision, and where there are several passes `again_s`.
        again_s: what every pass but the first takes besides: gradients that are added up, and casts where they are not
            in the passes already.
        older: factor in `high_s` for software that may be older than today's, which is as long among many GPUs.
    """

    layers: tuple[LayerTime, ...]
    optimizer_s: float
    regularizer_s: float
    overhead_s: float
    low_s: float
    high_s: float
    tier: str
    passes: int = 1
    data_parallel: bool = False
    whole_s: float = 0.0
    again_s: float = 0.0
    older: float = 1.0

    @property
    def forward_s(self) -> float:
        """Seconds of the forward pass."""
        return sum(layer.forward_s for layer in self.layers)

    @property
    def backward_s(self) -> float:
        """Seconds of the backward pass."""
        return sum(layer.backward_s for layer in self.layers)

    @property
    def product_s(self) -> float:
        """Seconds of both passes in convolutions, linear layers and matrix products."""
        return sum(layer.forward_s + layer.backward_s for layer in self.layers if layer.kind in PRODUCTS)

    @property
    def compute_s(self) -> float:
        """Seconds of the whole step on one device."""
        return self.forward_s + self.backward_s + self.optimizer_s + self.regularizer_s + self.overhead_s

    def scaled(self, factor: float) -> StepTime:
        """The step with every time of it multiplied by `factor`."""
        if factor == 1:
            return self
        layers = tuple(
            msgspec.structs.replace(layer, forward_s=factor * layer.forward_s, backward_s=factor * layer.backward_s)
            for layer in self.layers
        )
        return msgspec.structs.replace(self, layers=layers, **{name: factor * getattr(self, name) for name in _TIMES})

    def accumulated(self, passes: int) -> StepTime:
        """The step of `passes` passes that each take as long as this step's one, and of one penalty and update.

        The interval is as wide relative to the step as before.
        """
        if passes == self.passes:
            return self
        times = passes / self.passes
        again_s = (passes - self.passes) * self.again_s
        step = msgspec.structs.replace(
            self,
            layers=tuple(
                msgspec.structs.replace(layer, forward_s=times * layer.forward_s, backward_s=times * layer.backward_s)
                for layer in self.layers
            ),
            overhead_s=times * self.overhead_s,
            optimizer_s=self.optimizer_s + again_s,
            whole_s=self.whole_s + again_s,
            passes=passes,
        )
        return self._as_wide(step)

    def summing(self, setting: StepSetting) -> StepTime:
        """A measured step of one pass, with what a further pass takes to add its gradients to those that are there.

        Nobody measured that: a value is taken to move as fast as one of the update, which was measured. Casts are part
        of the passes.
        """
        moved = kind_of(setting).moved(setting.momentum)
        again_s = SUM_ACCESSES / moved * self.optimizer_s if moved else 0.0
        return msgspec.structs.replace(self, again_s=again_s)

    def updating(self, share: float) -> StepTime:
        """The step of a GPU that updates this share of the parameters, as where the optimizer's state is sharded.

        The interval is as wide relative to the step as before.
        """
        if share == 1:
            return self
        own_s = self.whole_s + share * (self.optimizer_s - self.whole_s)
        return self._as_wide(msgspec.structs.replace(self, optimizer_s=own_s))

    def _as_wide(self, step: StepTime) -> StepTime:
        """That step with an interval as wide relative to it as this one's."""
        wider = step.compute_s / self.compute_s if self.compute_s else 1.0
        return msgspec.structs.replace(step, low_s=wider * self.low_s, high_s=wider * self.high_s)


# What `StepTime` holds in seconds besides its layers.
_TIMES = ("optimizer_s", "regularizer_s", "overhead_s", "low_s", "high_s", "whole_s", "again_s")


class Measurements(msgspec.Struct, frozen=True, kw_only=True):
    """What has been measured and may be used instead of the data sheet.

    Attributes:
        profiles: of a trace.
        source_device: the catalog's device that they were taken on; None where the catalog does not know it.
        optimizer, momentum: whose update their steps had; None for the one that is asked for.
        device_profile: of `ptsim calibrate gpu`; used for the device that it was measured on.
    """

    profiles: tuple[Profile, ...] = ()
    source_device: Device | None = None
    optimizer: str | None = None
    momentum: float | None = None
    device_profile: DeviceProfile | None = None

    @classmethod
    def of(cls, trace: Trace | None, device: Device, device_profile: DeviceProfile | None = None) -> Measurements:
        """What a run and a device profile measured, for steps on `device`, which may be the one that the run had."""
        if trace is None:
            return cls(device_profile=device_profile)
        # What an update of another package moves is not known where an older trace does not tell.
        known = trace.told_update is not None or trace.optimizer in OPTIMIZERS
        return cls(
            profiles=trace.own_profiles,
            source_device=measured_device(trace.run.device.name, device),
            optimizer=trace.optimizer if known else None,
            momentum=trace.momentum,
            device_profile=device_profile,
        )

    def ran(self, setting: StepSetting) -> StepSetting:
        """`setting` with the update that the profiles' steps had."""
        if self.optimizer is None:
            return setting
        return msgspec.structs.replace(setting, optimizer=self.optimizer, momentum=self.momentum)
