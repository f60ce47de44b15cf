"""How long does a step take on another device, or at another mini-batch, than it was measured at?

Layer by layer `t_measured · predicted_there / predicted_here`: what the prediction gets wrong about a layer on both
sides cancels out of the ratio.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from ptsim.costs.datasheet import waiting_share
from ptsim.costs.measured import step_of_profile
from ptsim.costs.tiers import Tier
from ptsim.costs.times import LayerTime, StepTime
from ptsim.network import Network
from ptsim.setting import StepSetting
from ptsim.trace.schema import Profile


def nearest_profile(network: Network, profiles: Iterable[Profile], setting: StepSetting) -> Profile | None:
    """The profile of this architecture, precision and memory format whose mini-batch is nearest by ratio, or None."""
    wanted, batch = (network.id, setting.precision, setting.memory_format), setting.batch
    fitting = [p for p in profiles if (p.architecture, p.precision, p.memory_format) == wanted]
    return min(reversed(fitting), key=lambda p: max(p.batch / batch, batch / p.batch), default=None)


def scaled_step(network: Network, profile: Profile, *, here: StepTime, there: StepTime, regularizer: bool) -> StepTime:
    """The measured step carried over to the device and mini-batch of `there`.

    A measured layer holds its kernels and the wait for their launch. `waiting_share` says how much of the step was
    waiting. That share of every part is as long there as here, or shorter where less waiting is predicted; only the
    rest follows the ratio of kernels. What the GPU is predicted to wait longer there than here comes on top. So a step
    that waits for its host on both sides stays about as long as it was. A regulariser that is asked for and was not
    measured is the prediction's own. The interval is the prediction's, relative to its value: what the ratio cancels is
    not known for a device without measurements.

    Args:
        network: what was profiled.
        profile: its measurement.
        here: the prediction for the device and mini-batch of the profile.
        there: the prediction for the wanted device and mini-batch.
        regularizer: whether the penalty's gradient is computed.
    """
    measured = step_of_profile(network, profile, regularizer=regularizer and profile.regularizer_s > 0)
    waiting = waiting_share(measured.compute_s, here)
    still_waiting = waiting * min(1.0, there.overhead_s / here.overhead_s) if waiting else 0.0

    def carried(seconds: float, ratio: float) -> float:
        return seconds * ((1 - waiting) * ratio + still_waiting)

    forward, backward = _ratio(there.forward_s, here.forward_s), _ratio(there.backward_s, here.backward_s)
    layers = tuple(
        LayerTime(
            layer=at.layer,
            kind=at.kind,
            forward_s=carried(at.forward_s, _ratio(b.forward_s, a.forward_s, forward)),
            backward_s=carried(at.backward_s, _ratio(b.backward_s, a.backward_s, backward)),
            tier=Tier.SCALED,
        )
        for at, a, b in zip(measured.layers, here.layers, there.layers, strict=True)
    )
    regularizer_s = carried(measured.regularizer_s, _ratio(there.regularizer_s, here.regularizer_s))
    if regularizer and profile.regularizer_s <= 0:
        regularizer_s = there.regularizer_s
    step = StepTime(
        layers=layers,
        optimizer_s=carried(measured.optimizer_s, _ratio(there.optimizer_s, here.optimizer_s)),
        regularizer_s=regularizer_s,
        overhead_s=carried(measured.overhead_s, 1.0) + max(0.0, there.overhead_s - here.overhead_s),
        low_s=0.0,
        high_s=0.0,
        tier=Tier.SCALED,
    )
    total_s = step.compute_s
    return msgspec.structs.replace(
        step,
        low_s=total_s * _ratio(there.low_s, there.compute_s),
        high_s=total_s * _ratio(there.high_s, there.compute_s),
    )


def _ratio(there_s: float, here_s: float, otherwise: float = 1.0) -> float:
    return there_s / here_s if here_s > 0 and there_s > 0 else otherwise
