"""How long does a step take that has been measured? Tier 1: the trace's own profile, never anything else.

The whole steps of a profile ran without clocks inside, its layers with them. So the whole steps decide the sums, and
the layers' times only how the sums are shared out.
"""

from __future__ import annotations

from collections.abc import Iterable

from ptsim.costs.tiers import Tier
from ptsim.costs.times import LayerTime, StepTime
from ptsim.criteria import GROUP_LASSO
from ptsim.errors import MissingMeasurementError
from ptsim.hardware.profile import Operator, OperatorSetting, OperatorTime, StepMeasurement, operator_of
from ptsim.hardware.profile_merge import mean_time
from ptsim.network import Network
from ptsim.setting import StepSetting
from ptsim.trace.schema import Profile


def find_profile(network: Network, profiles: Iterable[Profile], setting: StepSetting) -> Profile | None:
    """The last profile of exactly this architecture, mini-batch, precision and memory format; None where none is."""
    wanted = (network.id, setting.batch, setting.precision, setting.memory_format)
    found = None
    for profile in profiles:
        if (profile.architecture, profile.batch, profile.precision, profile.memory_format) == wanted:
            found = profile
    return found


def measured_step(network: Network, profiles: Iterable[Profile], setting: StepSetting) -> StepTime:
    """One training step as a profile measured it.

    The interval reaches from the fastest to the slowest whole step; with five steps it covers the true median with
    probability 1 - 2/2⁵ = 94 % whatever their distribution. Profiles without that spread get the difference between
    whole steps and the sum of their layers instead.

    Raises:
        MissingMeasurementError: no profile of this architecture, mini-batch, precision and memory format; or the
            regulariser is asked for and was not measured.
    """
    profiles = tuple(profiles)
    if setting.passes > 1:
        return measured_step(network, profiles, setting.one_pass).accumulated(setting.passes)
    profile = find_profile(network, profiles, setting)
    if profile is None:
        raise MissingMeasurementError(_what_is_missing(network, profiles, setting))
    if setting.regularizer and profile.regularizer_s <= 0:
        raise MissingMeasurementError(
            f"the profile of {network.name} ({network.id}) was taken without the regulariser: a step with it is unknown"
        )
    return recorded_step(network, profile, setting)


def recorded_step(network: Network, profile: Profile, setting: StepSetting) -> StepTime:
    """One pass of a step of `setting` as `profile` measured it, with what further passes take besides.

    Raises:
        MissingMeasurementError: a layer of the network is not in the profile.
    """
    return step_of_profile(network, profile, regularizer=setting.regularizer is not None).summing(setting)


def step_of_profile(network: Network, profile: Profile, *, regularizer: bool) -> StepTime:
    """The step that `profile` measured, shared out over the layers of `network`.

    Raises:
        MissingMeasurementError: a layer of the network is not in the profile.
    """
    layers = {layer.layer: layer for layer in profile.layers}
    absent = [layer.name for layer in network.layers if layer.name not in layers]
    if absent:
        raise MissingMeasurementError(f"the profile of {network.name} ({network.id}) lacks {', '.join(absent[:5])}")
    forward_sum = sum(layer.forward_s for layer in profile.layers)
    backward_sum = sum(layer.backward_s or 0.0 for layer in profile.layers)
    forward_share = profile.forward_s / forward_sum if forward_sum else 0.0
    backward_share = profile.backward_s / backward_sum if backward_sum else 0.0
    times = tuple(
        LayerTime(
            layer=layer.name,
            kind=layer.kind,
            forward_s=layers[layer.name].forward_s * forward_share,
            backward_s=(layers[layer.name].backward_s or 0.0) * backward_share,
            tier=Tier.MEASURED,
        )
        for layer in network.layers
    )
    left_out_s = 0.0 if regularizer else profile.regularizer_s
    parts_s = profile.forward_s + profile.backward_s + profile.optimizer_s + profile.regularizer_s
    overhead_s = max(profile.step_s - parts_s, 0.0)
    total_s = parts_s + overhead_s - left_out_s
    if profile.step_low_s is not None and profile.step_high_s is not None:
        low, high = profile.step_low_s / profile.step_s, profile.step_high_s / profile.step_s
    else:
        spread = abs(forward_sum + backward_sum - profile.forward_s - profile.backward_s) / profile.step_s
        low, high = 1 / (1 + spread), 1 + spread
    return StepTime(
        layers=times,
        optimizer_s=profile.optimizer_s,
        regularizer_s=profile.regularizer_s - left_out_s,
        overhead_s=overhead_s,
        low_s=total_s * min(low, 1.0),
        high_s=total_s * max(high, 1.0),
        tier=Tier.MEASURED,
    )


def of_profile(
    network: Network,
    profile: Profile,
    *,
    optimizer: str | None,
    criterion: str = GROUP_LASSO,
    momentum: float | None = None,
    proximal: bool = False,
) -> tuple[StepMeasurement, tuple[OperatorTime, ...]]:
    """What a device profile keeps of one profiled network: its whole step, and each of its operators once.

    Layers that are the same operator count with their mean; layers that nobody timed are left out.

    Args:
        network: what was profiled.
        profile: its measurement.
        optimizer: whose update was timed.
        criterion: whose penalty was timed, if one was.
        momentum: of the optimizer; None for its own.
        proximal: the penalty was a proximal step.
    """
    setting = OperatorSetting(precision=profile.precision, memory_format=profile.memory_format)
    layers = {layer.layer: layer for layer in profile.layers}
    same: dict[Operator, list[OperatorTime]] = {}
    for layer in network.layers:
        if (took := layers.get(layer.name)) is not None:
            operator = operator_of(layer, batch=profile.batch, setting=setting)
            time = OperatorTime(operator=operator, forward_s=took.forward_s, backward_s=took.backward_s, context="step")
            same.setdefault(operator, []).append(time)
    step = StepMeasurement(
        architecture=network.id,
        name=network.name,
        setting=setting,
        batch=profile.batch,
        optimizer=optimizer,
        momentum=momentum,
        criterion=criterion,
        proximal=proximal,
        num_parameters=network.num_learnt,
        num_tensors=len(network.gradients),
        num_layers=len(network.layers),
        num_samples=profile.num_samples,
        forward_s=profile.forward_s,
        backward_s=profile.backward_s,
        optimizer_s=profile.optimizer_s,
        regularizer_s=profile.regularizer_s or None,
        step_s=profile.step_s,
        step_low_s=profile.step_low_s or profile.step_s,
        step_high_s=profile.step_high_s or profile.step_s,
        layers_forward_s=sum(layer.forward_s for layer in profile.layers),
        layers_backward_s=sum(layer.backward_s or 0.0 for layer in profile.layers),
        peak_memory_bytes=profile.peak_memory_bytes,
    )
    return step, tuple(map(mean_time, same.values()))


def _what_is_missing(network: Network, profiles: tuple[Profile, ...], setting: StepSetting) -> str:
    wanted = f"mini-batch {setting.batch}, {setting.precision}, {setting.memory_format}"
    same = [profile for profile in profiles if profile.architecture == network.id]
    if not profiles:
        return f"no layer times of {network.name} were measured: there is not one profile in the trace"
    if not same:
        return f"none of the {len(profiles)} profiles is of the architecture {network.id} of {network.name}"
    found = "; ".join(sorted({f"mini-batch {p.batch}, {p.precision}, {p.memory_format}" for p in same}))
    return f"{network.name} ({network.id}) was profiled at {found}, not at {wanted}"
