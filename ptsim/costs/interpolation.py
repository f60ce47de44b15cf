"""How long does an operator take whose neighbours were measured?

Between measured operators of one family (same operator, kernel and stride) the time of a pass is

    log t(x) = log R(x) + g(x)

R is a physical model fitted to the family itself: products on whole tiles of channels, bytes moved, a constant, each
with a weight that is not negative; it makes the stairs of tile quantisation. g is a Gaussian process over the octaves
of pixels, channels and kernel (exponential covariance): near measured operators it holds what else the device does,
far from them it says nothing, and it knows how little it knows. The tile, the length scale of g and the share of noise
are those under which each operator, predicted from the others, is most likely (Rasmussen & Williams, 2006, §5.4.2).
Own code, because scikit-learn's regressor offers the marginal likelihood only, and no such mean function.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from ptsim.hardware.profile import Operator, OperatorSetting, OperatorTime
from ptsim.network import LayerKind
from ptsim.operators import is_transposed, second_features

Pass = Literal["forward", "backward"]
Family = tuple[object, ...]
Floats = NDArray[np.float64]

_TILES = (1, 4, 8, 16, 32, 64)
_LENGTH_SCALES = (0.7, 2.0, 6.0, 20.0)  # of g, in octaves
_NOISES = (0.01, 0.1, 0.5)  # variance of a repetition, as a fraction of that between operators
# Variance, likewise, of what operators alone take less or more than in a step: all of one family, and each by itself.
_OFFSET, _APARTS = 1.0, (0.1, 0.3, 1.0)
_FEWEST = 24  # convolutions of a family; with fewer it is joined with its relatives
_FEWEST_MOVING = 8  # the same of operators whose time follows their bytes alone
_DEGREES_OF_FREEDOM = 4  # that the physical model and the hyper-parameters take from the samples
_MULTIPLIES = (LayerKind.CONV, LayerKind.LINEAR)
UNKNOWN_LOG_ERROR = math.log(2.0)  # of a time that nothing can be compared to


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of one pass of one operator; `log_error` is the standard deviation of its logarithm, 0 if measured."""

    seconds: float
    log_error: float
    family: Family


class Interpolator:
    """All operators that a profile measured in one setting."""

    def __init__(self, times: Iterable[OperatorTime], setting: OperatorSetting) -> None:
        self._samples: dict[Pass, list[tuple[Operator, float, bool]]] = {"forward": [], "backward": []}
        self._known: dict[tuple[Pass, Operator], float] = {}
        self._without_backward: set[Operator] = set()
        for time in sorted(times, key=lambda time: time.context):  # "step" after "alone": it is the better one
            if time.operator.setting == setting:
                self._take(time)

    def estimate(self, operator: Operator, which: Pass) -> Estimate | None:
        """The pass's time, measured or interpolated; None where nothing of its kind was measured.

        Backward is 0 where autograd was seen to have no node for it.
        """
        known = self._known.get((which, operator))
        if known is not None:
            return Estimate(seconds=known, log_error=0.0, family=_families(operator, which)[0])
        if which == "backward" and operator in self._without_backward:
            return Estimate(seconds=0.0, log_error=0.0, family=())
        for family in _families(operator, which):
            curve = self._curve(family, which)
            if curve is not None:
                seconds, log_error = curve.estimate(operator)
                return Estimate(seconds=seconds, log_error=log_error, family=family)
        return None

    def _take(self, time: OperatorTime) -> None:
        operator, inside = time.operator, time.context == "step"
        values: list[tuple[Pass, Operator, float | None]] = [
            ("forward", operator, time.forward_s),
            ("backward", operator, time.backward_s),
        ]
        if operator.input_needs_gradient:  # a first layer computes the weight gradient alone
            first = msgspec.structs.replace(operator, input_needs_gradient=False)
            values.append(("backward", first, time.weight_gradient_s))
        for which, measured, seconds in values:
            if seconds is not None and seconds > 0:
                self._known[which, measured] = seconds
                self._samples[which].append((measured, seconds, inside))
        if time.backward_s is None:
            self._without_backward.add(operator)

    @functools.cache  # noqa: B019 - an interpolator lives as long as its profile
    def _curve(self, family: Family, which: Pass) -> _Curve | None:
        samples = [sample for sample in self._samples[which] if family in _families(sample[0], which)]
        fewest = _FEWEST if samples and samples[0][0].kind in _MULTIPLIES else _FEWEST_MOVING
        return _Curve(samples) if len(samples) >= (1 if len(family) == 1 else fewest) else None


class _Curve:
    """One family's physical model, and a Gaussian process for what it leaves over."""

    def __init__(self, samples: Sequence[tuple[Operator, float, bool]]) -> None:
        operators = [operator for operator, _, _ in samples]
        times = np.array([seconds for _, seconds, _ in samples])
        inside = np.array([is_inside for _, _, is_inside in samples])
        self._places = np.array([_place(operator) for operator in operators])
        distances = _distances(self._places, self._places)
        best = -math.inf
        alone = np.outer(~inside, ~inside).astype(float)
        aparts = _APARTS if inside.any() and not inside.all() else (0.0,)
        if not inside.any():  # then there is nothing that they differ from
            alone[:] = 0.0
        tiles = _TILES if operators[0].kind in _MULTIPLIES else (1,)
        for tile in tiles:
            features = np.array([_features(operator, tile) for operator in operators])
            weights, _ = nnls(features / times[:, None], np.ones(len(times)))
            if not weights.any():
                continue
            residuals = np.log(times / (features @ weights))
            for length_scale, noise, apart in itertools.product(_LENGTH_SCALES, _NOISES, aparts):
                near = np.exp(-distances / length_scale)
                covariance = near + noise * np.eye(len(times)) + alone * (_OFFSET + apart * near)
                inverse = np.linalg.inv(covariance)
                weighted = inverse @ residuals
                precision = np.diag(inverse)
                left_out = weighted / precision  # each residual minus its prediction from the others
                variance = float(np.mean(left_out**2 * precision))
                fit = -0.5 * len(times) * math.log(max(variance, 1e-12)) + 0.5 * float(np.log(precision).sum())
                if fit > best:
                    best, self._tile, self._weights, self._length_scale = fit, tile, weights, length_scale
                    self._inverse, self._pull, self._variance, self._noise = inverse, weighted, variance, noise
        distinct = len(set(operators))
        self._few = distinct <= _DEGREES_OF_FREEDOM
        self._variance *= distinct / max(distinct - _DEGREES_OF_FREEDOM, 1)

    def estimate(self, operator: Operator) -> tuple[float, float]:
        """Seconds, and the standard deviation of their logarithm."""
        near = np.exp(-_distances(_place(operator)[None, :], self._places)[0] / self._length_scale)
        seconds = float(_features(operator, self._tile) @ self._weights * np.exp(near @ self._pull))
        if self._few:
            return seconds, UNKNOWN_LOG_ERROR
        unknown = 1.0 + self._noise - float(near @ self._inverse @ near)
        return seconds, math.sqrt(self._variance * max(unknown, 0.0))


def _distances(a: Floats, b: Floats) -> Floats:
    """Euclidean, in octaves, between all places of `a` and all of `b`."""
    distances: Floats = np.sqrt(((a[:, None, :] - b[None, :, :]) ** 2).sum(axis=2))
    return distances


def convolution_form(groups: int, in_channels: int) -> Literal["dense", "grouped", "depthwise"]:
    """How a convolution's channels are connected: kernels of the three have little in common."""
    if groups == 1:
        return "dense"
    return "depthwise" if groups == in_channels else "grouped"


def _families(operator: Operator, which: Pass) -> tuple[Family, ...]:
    """From the narrowest to the widest that may stand for the operator."""
    kind: object = operator.kind
    if operator.kind is LayerKind.CONV:
        kind = (operator.kind, operator.op, convolution_form(operator.groups, operator.inputs[0][0]))
        form = operator.kernel, operator.stride, operator.dilation
    else:
        form = operator.kernel, operator.stride, (1, 1)
    if which == "backward" and operator.kind in _MULTIPLIES:
        kind = (kind, operator.input_needs_gradient)
    if operator.kind is LayerKind.CONV:
        return (kind, operator.op, form), (kind,)
    if operator.kind is LayerKind.POOL:
        return (kind, operator.op, form), (kind, operator.op), (kind,)
    return (kind, operator.op, operator.inplace), (kind, operator.op), (kind,)


def _products(operator: Operator, tile: int) -> float:
    """Multiply–accumulates when channels are filled up to whole tiles."""
    if operator.kind is LayerKind.CONV:
        inputs, outputs = operator.inputs[0][0] // operator.groups, operator.output[0]
        image = operator.inputs[0] if is_transposed(operator.op) else operator.output  # where a filter is laid on
        pixels = math.prod(image[1:]) * math.prod(operator.kernel)
    elif operator.kind is LayerKind.LINEAR:
        inputs, outputs = operator.inputs[0][-1], operator.output[-1] * second_features(operator.op, operator.inputs)
        pixels = math.prod(operator.output[:-1])
    else:
        return 0.0
    tiled = (-(-inputs // tile)) * (-(-outputs // tile)) * tile**2
    return float(operator.batch * pixels * tiled)


def _features(operator: Operator, tile: int) -> Floats:
    """What costs time: products, bytes moved, being called at all."""
    elements = sum(math.prod(shape) for shape in (*operator.inputs, operator.output))
    weights = 0
    if operator.kind is LayerKind.CONV:
        weights = operator.output[0] * operator.inputs[0][0] // operator.groups * math.prod(operator.kernel)
    elif operator.kind is LayerKind.LINEAR:
        weights = operator.output[-1] * operator.inputs[0][-1] * second_features(operator.op, operator.inputs)
    size = operator.setting.precision.activation_bytes
    return np.array([_products(operator, tile) * 1e-9, (operator.batch * elements * size + 4 * weights) * 1e-6, 1e-3])


def _place(operator: Operator) -> Floats:
    """Where the operator lies among its family, in octaves: pixels, channels in and out, kernel and stride."""
    source, target = operator.inputs[0] if operator.inputs else (1,), operator.output or (1,)
    channels_first = len(target) == 3 or operator.kind in (LayerKind.CONV, LayerKind.BATCH_NORM)
    pixels = operator.batch * math.prod(target[1:] if channels_first else target[:-1])
    return np.log2(
        [
            max(pixels, 1),
            max(source[0] if channels_first else source[-1], 1),
            max(target[0] if channels_first else target[-1], 1),
            math.prod(operator.kernel),
            math.prod(operator.stride),
        ]
    )
