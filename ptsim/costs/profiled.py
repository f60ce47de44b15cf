"""How long does a step take on a device that `ptsim calibrate gpu` has measured? Tier 2.

A network that was measured whole is looked up. Any other is the sum of its operators, looked up or interpolated
(`interpolation`). A step without clocks inside is not that sum exactly: the ratio is learnt from the networks that were
measured both ways. What updates and regularisers take is fitted over the same networks, to their parameters and
tensors.

An operator of a kind that nobody timed takes no time where it moves nothing (a view) or next to nothing of what the
network moves, and the time of a copy as large where it only moves; any other is an error, never a guess.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence

import msgspec
import numpy as np
from scipy.optimize import nnls

from ptsim.costs.interpolation import UNKNOWN_LOG_ERROR, Estimate, Family, Interpolator, convolution_form
from ptsim.costs.tiers import Tier
from ptsim.costs.times import Z90, LayerTime, StepTime
from ptsim.costs.traffic import network_traffic
from ptsim.criteria import step_penalty
from ptsim.errors import MissingMeasurementError
from ptsim.hardware.profile import DeviceProfile, OperatorSetting, OperatorTime, StepMeasurement, operator_of
from ptsim.network import Layer, LayerKind, Network
from ptsim.optimizers import kind_of
from ptsim.setting import StepSetting

_MOVES = (LayerKind.RESHAPE, LayerKind.DROPOUT, LayerKind.CONCAT)  # as fast as a copy where nobody timed them
_NEGLIGIBLE = 0.005  # of the bytes that all layers move
_NOTHING = Estimate(seconds=0.0, log_error=0.0, family=())


def profiled_step(network: Network, profile: DeviceProfile, setting: StepSetting) -> StepTime:
    """One training step, from what was measured on the profile's device.

    The interval is 90 %: the fastest and slowest step where the network was measured whole. Otherwise it comes from
    the leave-one-out errors, taken as common to the operators of a family and independent between families, from
    the spread of whole steps around the sums of their layers, and from that of the steps of one network.

    Args:
        network: what is trained.
        profile: the device, measured.
        setting: mini-batch, precision and the like.

    Raises:
        MissingMeasurementError: the profile has nothing in this precision and format, nothing like an operator of the
            network, or no step with this optimizer or with a regulariser.
    """
    if setting.passes > 1:
        return profiled_step(network, profile, setting.one_pass).accumulated(setting.passes)
    measured = OperatorSetting(precision=setting.precision, memory_format=setting.memory_format)
    profile.check_setting(measured)
    on_gpu, copying = profile.kind == "cuda", profile.copy_bandwidth_bytes_per_s
    device = _device(
        f"{profile.called} of {profile.device}", on_gpu, profile.operators, profile.steps, measured, copying
    )
    return device.step(network, setting)


@functools.lru_cache(maxsize=8)
def _device(
    name: str,
    on_gpu: bool,
    operators: tuple[OperatorTime, ...],
    steps: tuple[StepMeasurement, ...],
    setting: OperatorSetting,
    copy_bandwidth_bytes_per_s: float | None,
) -> _Device:
    """Fitting takes a second, and a run asks for dozens of steps of one profile."""
    return _Device(name, on_gpu, operators, steps, setting, copy_bandwidth_bytes_per_s)


class _Device:
    """A device profile in one setting, ready to be asked."""

    def __init__(
        self,
        name: str,
        on_gpu: bool,
        operators: Sequence[OperatorTime],
        steps: Sequence[StepMeasurement],
        setting: OperatorSetting,
        copy_bandwidth_bytes_per_s: float | None,
    ) -> None:
        self._name = name
        self._on_gpu = on_gpu
        self._copy_bandwidth_bytes_per_s = copy_bandwidth_bytes_per_s
        self._setting = setting
        self._steps = [step for step in steps if step.setting == setting]
        self._operators = Interpolator(operators, setting)

    def step(self, network: Network, setting: StepSetting) -> StepTime:
        """See `profiled_step`."""
        batch, regularizer = setting.batch, setting.regularizer
        measured = self._measured(network, batch)
        estimates = self._layers(network, batch, whole=measured is not None)
        forward_s = sum(forward.seconds for forward, _ in estimates)
        backward_s = sum(backward.seconds for _, backward in estimates)
        optimizer_s = self._fitted(
            network,
            functools.partial(_update_seconds, setting=setting),
            f"no training step with the optimizer {setting.optimizer!r}",
        )
        regularizer_s = 0.0
        if regularizer:
            penalty_s = functools.partial(self._penalty_seconds, network, setting)
            regularizer_s = self._fitted(network, penalty_s, "no step with a regulariser")
        if measured is not None:
            ratios = _over(measured.forward_s, forward_s), _over(measured.backward_s, backward_s)
            low, high = measured.step_low_s / measured.step_s, measured.step_high_s / measured.step_s
            optimizer_s = _update_seconds(measured, setting=setting) or optimizer_s
            regularizer_s = (regularizer and self._penalty_seconds(network, setting, measured)) or regularizer_s
        else:
            ratios, ratio_error = self._ratios(forward_s + backward_s, len(network.layers))
            error = math.hypot(_common_error(estimates), ratio_error, self._jitter())
            low, high = math.exp(-Z90 * error), math.exp(Z90 * error)
        layers = tuple(
            LayerTime(
                layer=layer.name,
                kind=layer.kind,
                forward_s=forward.seconds * ratios[0],
                backward_s=backward.seconds * ratios[1],
                tier=Tier.PROFILED,
            )
            for layer, (forward, backward) in zip(network.layers, estimates, strict=True)
        )
        total_s = sum(t.forward_s + t.backward_s for t in layers) + optimizer_s + regularizer_s
        step = StepTime(
            layers=layers,
            optimizer_s=optimizer_s,
            regularizer_s=regularizer_s,
            overhead_s=0.0,  # in the layers, whose sum is made as long as whole steps are
            low_s=total_s * low,
            high_s=total_s * high,
            tier=Tier.PROFILED,
            data_parallel=any(step.data_parallel for step in ([measured] if measured else self._steps)),
        )
        return step.summing(setting)

    def _layers(self, network: Network, batch: int, *, whole: bool) -> list[tuple[Estimate, Estimate]]:
        """Of all layers; the `whole` step can be shared out among those that were timed, if there are any."""
        indices = range(len(network.layers))
        found = [self._layer(network, index, batch, whole=whole) for index in indices]
        if all(any(each[step].seconds for each in found) for step in (0, 1)):
            return found
        return [self._layer(network, index, batch, whole=False) for index in indices]

    def _layer(self, network: Network, index: int, batch: int, *, whole: bool) -> tuple[Estimate, Estimate]:
        """Both passes of a layer; of one that nobody timed nothing where the `whole` step was measured.

        Raises:
            MissingMeasurementError: nothing is known of it.
        """
        layer = network.layers[index]
        operator = operator_of(layer, batch=batch, setting=self._setting)
        forward = self._operators.estimate(operator, "forward")
        backward = self._operators.estimate(operator, "backward")
        if forward is not None:
            return forward, backward or _NOTHING
        try:
            return self._unmeasured(network, layer, batch)
        except MissingMeasurementError:
            if not whole:
                raise
            return _NOTHING, _NOTHING  # what it took is among the other layers' shares of the step

    def _unmeasured(self, network: Network, layer: Layer, batch: int) -> tuple[Estimate, Estimate]:
        """What a layer takes of whose kind nobody timed any.

        Raises:
            MissingMeasurementError: that cannot be known.
        """
        setting = StepSetting(batch=batch, precision=self._setting.precision, memory_format=self._setting.memory_format)
        names = [each.name for each in network.layers]
        moved = dict(zip(names, network_traffic(network, setting), strict=True))
        own = moved[layer.name]
        all_bytes = sum(one.forward_bytes + one.backward_bytes for one in moved.values())
        if layer.view or own.forward_bytes + own.backward_bytes <= _NEGLIGIBLE * all_bytes:
            return _NOTHING, _NOTHING
        if layer.kind in _MOVES and self._copy_bandwidth_bytes_per_s is not None:
            rate = self._copy_bandwidth_bytes_per_s
            forward, backward = (
                Estimate(seconds=num_bytes / rate, log_error=UNKNOWN_LOG_ERROR, family=(layer.kind,))
                for num_bytes in (own.forward_bytes, own.backward_bytes)
            )
            return forward, backward
        what = str(layer.kind)
        if layer.kind is LayerKind.CONV:
            what = f"{convolution_form(layer.groups, layer.in_channels)} {layer.op}"
        raise MissingMeasurementError(
            f"{self._name} has no {what} in {self._setting}, which layer {layer.name} "
            f"({layer.op}) of {network.name} needs",
            hint="`ptsim calibrate gpu --trace RUN --out FILE.toml` measures the operators of a run",
        )

    def _measured(self, network: Network, batch: int) -> StepMeasurement | None:
        fitting = [step for step in self._steps if (step.architecture, step.batch) == (network.id, batch)]
        return fitting[-1] if fitting else None

    def _ratios(self, layers_s: float, num_layers: int) -> tuple[tuple[float, float], float]:
        """Whole steps over sums of layers, forward and backward, and the spread of their logarithm.

        Networks whose layers take as long on average count most: launch gaps weigh on short layers.
        """
        timed = [step for step in self._steps if _timed_both_ways(step)]
        if not timed or not layers_s:
            return (1.0, 1.0), 0.0
        size = math.log2(layers_s / num_layers)
        forward, backward, weights = [], [], []
        for step in timed:
            own = math.log2((step.layers_forward_s + step.layers_backward_s) / step.num_layers)
            weights.append(1.0 / ((size - own) ** 2 + 0.25))
            forward.append(math.log(step.forward_s / step.layers_forward_s))
            backward.append(math.log(step.backward_s / step.layers_backward_s))
        means = float(np.average(forward, weights=weights)), float(np.average(backward, weights=weights))
        variance = float(np.average((np.array(backward) - means[1]) ** 2, weights=weights))
        return (math.exp(means[0]), math.exp(means[1])), math.sqrt(variance)

    def _jitter(self) -> float:
        """Standard deviation of the logarithm of whole steps, from the ranges in which 90 % of them lay; the median."""
        spreads = [math.log(step.step_high_s / step.step_low_s) / (2 * Z90) for step in self._steps]
        return statistics.median(spreads) if spreads else 0.0

    def _penalty_seconds(self, network: Network, setting: StepSetting, step: StepMeasurement) -> float | None:
        """What the penalty took in a step; another one takes as much longer as it moves more of the network."""
        ran = msgspec.structs.replace(setting, regularizer=step.criterion, proximal=step.proximal)
        if step.regularizer_s is None or ran == setting:
            return step.regularizer_s
        asked, other = (step_penalty(network, how, gpu=self._on_gpu).num_bytes for how in (setting, ran))
        return step.regularizer_s * asked / other if other else None

    def _fitted(self, network: Network, seconds_of: Callable[[StepMeasurement], float | None], missing: str) -> float:
        """What whole steps took for something that grows with parameters and tensors."""
        known = [(step, value) for step in self._steps if (value := seconds_of(step))]
        if not known:
            raise MissingMeasurementError(
                f"{self._name} holds {missing} in {self._setting}",
                hint="`ptsim calibrate gpu --trace RUN --out FILE.toml` measures a run with what it trains with",
            )
        features = np.array([_update_features(step.num_parameters, step.num_tensors) for step, _ in known])
        seconds = np.array([took_s for _, took_s in known])
        weights, _ = nnls(features / seconds[:, None], np.ones(len(known)))
        return float(_update_features(network.num_learnt, len(network.gradients)) @ weights)


def _over(whole_s: float, layers_s: float) -> float:
    """How much longer a pass of the whole step took than its layers; 1 where those take no time."""
    return whole_s / layers_s if layers_s else 1.0


def _timed_both_ways(step: StepMeasurement) -> bool:
    """Whether passes and layers of a step have times, so that their ratio can be told."""
    return min(step.forward_s, step.backward_s, step.layers_forward_s, step.layers_backward_s) > 0


def _update_seconds(step: StepMeasurement, *, setting: StepSetting) -> float | None:
    """What the optimizer took in a step, if it is the one of `setting`; longer with the values that momentum moves."""
    if step.optimizer != setting.optimizer or not step.optimizer_s:
        return None
    kind = kind_of(setting)
    return step.optimizer_s * kind.moved(setting.momentum) / kind.moved(step.momentum)


def _update_features(num_parameters: int, num_tensors: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return np.array([num_parameters * 1e-6, num_tensors * 1e-3])


def _common_error(estimates: Sequence[tuple[Estimate, Estimate]]) -> float:
    """Relative standard deviation of the sum: errors add up within a family, and by squares between families."""
    errors: dict[Family, float] = defaultdict(float)
    total_s = 0.0
    for estimate in (e for pair in estimates for e in pair):
        errors[estimate.family] += estimate.seconds * estimate.log_error
        total_s += estimate.seconds
    return math.sqrt(sum(error**2 for error in errors.values())) / total_s if total_s else 0.0
