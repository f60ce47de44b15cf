"""What recorded runs would cost elsewhere, as tidy tables: projections, savings, and where the time goes.

The projections are the simulator's; this module lays dense and pruned runs side by side, splits the layers' time by
kind of work, and carries the intervals through the differences.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import msgspec
import pandas as pd

from ptsim.costs.flops import layer_macs
from ptsim.costs.saving import saving_interval
from ptsim.costs.step import Measurements, StepTime, step_time
from ptsim.costs.tiers import worst_tier
from ptsim.costs.times import LayerTime
from ptsim.costs.traffic import network_traffic
from ptsim.hardware.catalog import is_called, load_device
from ptsim.hardware.profile import DeviceProfile
from ptsim.hardware.spec import Cluster
from ptsim.network import PRODUCTS, LayerKind, Network
from ptsim.operators import ungated
from ptsim.report import parts
from ptsim.report.frames import accuracies
from ptsim.setting import StepSetting
from ptsim.sim.options import HourPrice, Options, hour_price
from ptsim.sim.projection import RunProjection, projection_row
from ptsim.sim.run import StepCache, project
from ptsim.trace.frames import numeric
from ptsim.trace.pairs import Comparison, data_name, model_name, run_labels, setting_labels, task_of
from ptsim.trace.schema import Epoch
from ptsim.trace.trace import Trace
from ptsim.units import KWH


class LabelledRun(msgspec.Struct, frozen=True, kw_only=True):
    """A run, what it and its setting are called, and whether it was really trained (a held baseline was not)."""

    label: str
    setting: str
    trace: Trace
    trained: bool = True


class Projector:
    """Projects runs onto one cluster; every (run, size) is simulated once."""

    def __init__(
        self,
        cluster: Cluster,
        options: Options,
        *,
        grid_grams_per_kwh: float | None = None,
        device_profile: DeviceProfile | None = None,
    ) -> None:
        """What is common to all projections.

        Args:
            cluster: where.
            options: what differs from the recorded run.
            grid_grams_per_kwh: CO₂ that a kWh causes; without it, no CO₂ is reported.
            device_profile: of `ptsim calibrate gpu`; used where the cluster's GPUs are those it was measured on.
        """
        self.cluster = cluster
        self.options = options
        self.grid_grams_per_kwh = grid_grams_per_kwh
        self.device = load_device(options.device) if options.device else cluster.gpu
        fits = device_profile is not None and is_called(self.device, device_profile.device)
        self.device_profile = device_profile if fits else None
        self._caches: dict[tuple[str, int, bool, bytes], StepCache] = {}
        self._done: dict[tuple[tuple[str, int, bool, bytes], int], RunProjection] = {}

    def changed(self, cluster: Cluster, options: Options) -> Projector:
        """The same for another cluster or other options; step times that do not depend on them are shared."""
        other = Projector(
            cluster, options, grid_grams_per_kwh=self.grid_grams_per_kwh, device_profile=self.device_profile
        )
        other._caches = self._caches
        return other

    def run(self, trace: Trace, gpus: int) -> RunProjection:
        """The projection of `trace` onto `gpus` GPUs.

        Raises:
            UsageError: the cluster has fewer GPUs.
        """
        # A held baseline has its run's path, and plans that were not written may share theirs.
        key = str(trace.path), len(trace.epochs), trace.is_pruned, msgspec.json.encode(trace.run)
        if (key, gpus) not in self._done:
            cache = self._caches.setdefault(key, StepCache())
            self._done[key, gpus] = project(
                trace, self.cluster, gpus, self.options, device_profile=self.device_profile, cache=cache
            )
        return self._done[key, gpus]

    def step(self, trace: Trace, epoch: Epoch) -> StepTime:
        """The step that `epoch` trained, layer by layer, on this cluster's device."""
        measurements = Measurements.of(trace, self.device, self.device_profile)
        network = trace.networks[epoch.architecture]
        return step_time(network, self.device, trace.setting_of(epoch), measurements=measurements)

    @property
    def price(self) -> HourPrice | None:
        """Of a GPU-hour: the user's or the cluster's."""
        return hour_price(self.cluster, self.options)

    def price_columns(self, gpus: int) -> dict[str, float | str | None]:
        """The price as a number, and in words with how many GPUs are billed; empty where there is none."""
        price = self.price
        return {
            "price_usd_per_gpu_hour": None if price is None else price.usd,
            "price": "" if price is None else ": ".join(filter(None, (str(price), price.billing(gpus)))),
        }

    def grams(self, joules: float | None) -> float | None:
        """The CO₂ of an energy; None where the energy or the grid is not known."""
        if joules is None or self.grid_grams_per_kwh is None:
            return None
        return joules / KWH * self.grid_grams_per_kwh


def labelled_runs(traces: Sequence[Trace], comparisons: Sequence[Comparison]) -> list[LabelledRun]:
    """The held baselines of runs that have no dense partner, then every run that has an epoch, dense ones first.

    Where one run ended earlier than its partner, both are taken as far as they are compared.
    """
    compared: dict[str, list[Trace]] = {}
    for c in comparisons:
        compared.setdefault(c.label, []).append(c.pruned)
        compared.setdefault(c.baseline_label, []).append(c.baseline)
    held = [
        LabelledRun(label=c.baseline_label, setting=c.baseline_label, trace=c.baseline, trained=False)
        for c in comparisons
        if not c.trained
    ]
    runs = [
        LabelledRun(
            label=label,
            setting=setting,
            trace=max(compared.get(label, [trace]), key=lambda cut: len(cut.epochs)),
        )
        for label, setting, trace in zip(run_labels(traces), setting_labels(traces), traces, strict=True)
        if trace.epochs
    ]
    return held + sorted(runs, key=lambda run: run.trace.is_pruned)


def projections_frame(runs: Sequence[LabelledRun], projector: Projector, gpus: Sequence[int]) -> pd.DataFrame:
    """One row per run and cluster size: whole-run time with its 90 % interval, parts, bytes, energy and money.

    Waiting for input is empty where input is taken to keep up.
    """
    rows = []
    for run in runs:
        for size in gpus:
            p = projector.run(run.trace, size)
            rows.append(
                {
                    **projection_row(p),
                    **_setting(run, projector),
                    "accuracy": run.trace.final_accuracy if run.trained else None,
                    "input_wait_seconds": None if p.input_images_per_s is None else p.input_wait_s,
                    "epochs": len(p.epochs),
                    "first_batch_per_gpu": p.epochs[0].batch_per_gpu,
                    "last_batch_per_gpu": p.epochs[-1].batch_per_gpu,
                    **projector.price_columns(size),
                    "gpu_seconds": p.total_s * size,
                    "co2_grams": projector.grams(p.energy_j),
                    "low_co2_grams": projector.grams(p.energy_low_j),
                    "high_co2_grams": projector.grams(p.energy_high_j),
                }
            )
    return numeric(pd.DataFrame(rows))


def savings_frame(comparisons: Sequence[Comparison], projector: Projector, gpus: Sequence[int]) -> pd.DataFrame:
    """One row per comparison and cluster size: dense, pruned and the difference of time, energy, bytes and money.

    A saving has one 90 % interval, that of pruned / dense; seconds, joules and USD follow from it.
    `accuracy_change` is in fractions, missing where the baseline was not trained.
    `last_inference_macs_per_image` is of the network that the accuracy is of: where the dense run is shorter, not that
    which the pruned run ended with.
    """
    rows = []
    for c in comparisons:
        both_whole = c.trained and c.pruned.complete and c.baseline.complete
        for size in gpus:
            dense, pruned = projector.run(c.baseline, size), projector.run(c.pruned, size)
            rows.append(
                {
                    "run": c.label,
                    "setting": c.setting,
                    "baseline": c.baseline_label,
                    "pruned": True,
                    "model": model_name(c.pruned),
                    "dataset": data_name(c.pruned),
                    "task": task_of(c.pruned),
                    "cluster": projector.cluster.name,
                    "device": projector.device.name,
                    "precision": str(c.pruned.run.precision),
                    "gpus": size,
                    "epochs": len(c.pruned.epochs),
                    "first_batch_per_gpu": pruned.epochs[0].batch_per_gpu,
                    "last_batch_per_gpu": pruned.epochs[-1].batch_per_gpu,
                    **saved_columns(dense, pruned, projector),
                    "saved_compute_seconds": dense.compute_s - pruned.compute_s,
                    "saved_communication_seconds": dense.exposed_communication_s - pruned.exposed_communication_s,
                    "saved_input_wait_seconds": None
                    if dense.input_images_per_s is None
                    else dense.input_wait_s - pruned.input_wait_s,
                    "saved_reconfiguration_seconds": dense.reconfiguration_s
                    + dense.startup_s
                    - pruned.reconfiguration_s
                    - pruned.startup_s,
                    "dense_allreduce_bytes_per_gpu": dense.allreduce_bytes_per_gpu,
                    "pruned_allreduce_bytes_per_gpu": pruned.allreduce_bytes_per_gpu,
                    "first_inference_macs_per_image": c.pruned.network_of(c.pruned.epochs[0]).forward_macs,
                    "last_inference_macs_per_image": c.pruned.final_network.forward_macs,
                    "grid_grams_per_kwh": projector.grid_grams_per_kwh,
                    **projector.price_columns(size),
                    **accuracies(c),
                    "whole_runs": both_whole,
                    "shrank": c.shrank,
                    "tier": worst_tier((dense.tier, pruned.tier)),
                }
            )
    return numeric(pd.DataFrame(rows))


def saved_columns(dense: RunProjection, pruned: RunProjection, projector: Projector) -> dict[str, float | None]:
    """What a pruned run saves against a dense one, of time, energy, CO₂ and money, with the 90 % interval of each."""
    ratio = pruned.total_s / dense.total_s
    tier = worst_tier((dense.tier, pruned.tier)) or dense.tier
    independent = math.hypot(_half_width(dense), _half_width(pruned))
    low, high = saving_interval(ratio, tier, draws=pruned.draw_spread, independent=independent)
    spread = low / ratio, high / ratio
    return {
        **_saved("seconds", dense.total_s, pruned.total_s, spread),
        "saved_fraction": 1 - ratio,
        "saved_fraction_low": 1 - high,
        "saved_fraction_high": 1 - low,
        **_saved("joules", dense.energy_j, pruned.energy_j, spread),
        **_saved("co2_grams", projector.grams(dense.energy_j), projector.grams(pruned.energy_j), spread),
        **_saved("usd", dense.cost_usd, pruned.cost_usd, spread),
    }


def _half_width(projection: RunProjection) -> float:
    """Of the logarithm of the run's time: the wider side of its 90 % interval."""
    total_s, low_s, high_s = projection.total_s, projection.low_s, projection.high_s
    return max(math.log(total_s / low_s), math.log(high_s / total_s)) if low_s > 0 else math.inf


def roofline_frame(run: LabelledRun, projector: Projector) -> pd.DataFrame:
    """One row per convolution and linear layer of the first and the last epoch: FLOPs per byte, FLOPs per second.

    Forward and backward together; bytes as the traffic model counts them. Empty where the device's peak is not known.
    """
    trace, device = run.trace, projector.device
    dense = {layer.name for layer in trace.network_of(trace.epochs[0]).layers}
    peak = device.peak_flops_per_s.get(trace.run.precision)
    rows = []
    ends = (trace.epochs[0], *(trace.epochs[-1:] if len(trace.epochs) > 1 else ()))
    for epoch in ends if peak else ():
        network, batch = trace.network_of(epoch), epoch.batch_per_gpu
        times = {time.layer: time.forward_s + time.backward_s for time in projector.step(trace, epoch).layers}
        setting = trace.setting_of(epoch)
        moved = network_traffic(network, setting.one_pass)
        for layer, traffic in zip(network.layers, moved, strict=True):
            macs = layer_macs(layer, "exact")
            flops = 2 * layer.repeats(batch, setting.passes) * macs.training
            num_bytes = setting.passes * (traffic.forward_bytes + traffic.backward_bytes)
            if layer.kind not in PRODUCTS or not (flops and num_bytes and times[layer.name]):
                continue
            rows.append(
                {
                    **_setting(run, projector),
                    "batch_per_gpu": batch,
                    "epoch": epoch.epoch,
                    "layer": ungated(layer.name, dense),
                    "flops_per_byte": flops / num_bytes,
                    "flops_per_second": flops / times[layer.name],
                    "peak_flops_per_second": peak,
                    "bandwidth_bytes_per_second": device.memory_bandwidth_bytes_per_s,
                }
            )
    return pd.DataFrame(rows)


def epoch_breakdown_frame(run: LabelledRun, projector: Projector, gpus: int) -> pd.DataFrame:
    """One row per epoch and part of the time (`report.parts`), in seconds of that epoch.

    The simulated forward and backward time, without the hooks of the gradients, is split between matrix products and
    memory-bound layers in the proportion of their times on the device alone. `OTHER` is what no part claims, such as
    waiting for stragglers.
    """
    rows = []
    for e in projector.run(run.trace, gpus).epochs:
        spent = {
            parts.PRODUCTS: e.product_s * e.num_iterations,
            parts.MEMORY_BOUND: (e.forward_s + e.backward_s - e.product_s - e.hooks_s) * e.num_iterations,
            parts.HOOKS: e.hooks_s * e.num_iterations,
            parts.UPDATE: (e.optimizer_s + e.regularizer_s) * e.num_iterations,
            parts.COMMUNICATION: e.exposed_communication_s * e.num_iterations,
            parts.INPUT: e.input_wait_s * e.num_iterations,
            parts.HOST: e.overhead_s * e.num_iterations,
        }
        spent[parts.OTHER] = max(e.total_s - sum(spent.values()), 0.0)
        rows += [
            {
                **_setting(run, projector),
                "gpus": gpus,
                "epoch": e.epoch,
                "batch_per_gpu": e.batch_per_gpu,
                "part": part,
                "seconds": seconds,
            }
            for part, seconds in spent.items()
        ]
    return pd.DataFrame(rows)


def breakdown_frame(runs: Sequence[LabelledRun], projector: Projector, gpus: Sequence[int]) -> pd.DataFrame:
    """One row per run, cluster size and part of the time, in seconds of the whole run; the parts add up to it."""
    frames = []
    for run in runs:
        for size in gpus:
            epochs = epoch_breakdown_frame(run, projector, size)
            projection = projector.run(run.trace, size)
            spent = epochs.groupby("part", sort=False).seconds.sum()
            spent[parts.CHANGES] = projection.startup_s + projection.reconfiguration_s
            frame = spent.rename("seconds").reset_index()
            for name, value in {**_setting(run, projector), "gpus": size}.items():
                frame[name] = value
            frame["first_batch_per_gpu"] = projection.epochs[0].batch_per_gpu
            frame["last_batch_per_gpu"] = projection.epochs[-1].batch_per_gpu
            frame["tier"] = str(projection.tier)
            frames.append(frame)
    return pd.concat(frames, ignore_index=True)


def layers_frame(run: LabelledRun, projector: Projector) -> pd.DataFrame:
    """One row per epoch and layer of one run: time of one image on the cluster's device, both ways, and its tier.

    A layer that pruning has removed has no row from then on. One that is gated keeps its name and its row: its channels
    are those that it computes itself, its time is that of its gather or scatter, too.
    """
    rows = []
    dense = {layer.name for epoch in run.trace.epochs[:1] for layer in run.trace.network_of(epoch).layers}
    times: dict[tuple[str, StepSetting], dict[str, list[LayerTime]]] = {}
    for epoch in run.trace.epochs:
        network = run.trace.network_of(epoch)
        key = epoch.architecture, run.trace.setting_of(epoch)
        if key not in times:
            times[key] = _by_dense_name(projector.step(run.trace, epoch), network, dense)
        for name, pieces in times[key].items():
            layer = network.layer(pieces[0].layer)
            forward_s, backward_s = sum(piece.forward_s for piece in pieces), sum(piece.backward_s for piece in pieces)
            rows.append(
                {
                    "run": run.label,
                    "setting": run.setting,
                    "pruned": run.trace.is_pruned,
                    "device": projector.device.name,
                    "precision": str(run.trace.run.precision),
                    "batch_per_gpu": epoch.batch_per_gpu,
                    "epoch": epoch.epoch,
                    "layer": name,
                    "gated": layer.name != name,
                    "kind": str(layer.kind),
                    "in_channels": layer.in_channels,
                    "out_channels": layer.out_channels,
                    "forward_macs_per_image": layer.forward_macs,
                    "forward_seconds_per_image": forward_s / epoch.batch_per_gpu,
                    "backward_seconds_per_image": backward_s / epoch.batch_per_gpu,
                    "seconds_per_image": (forward_s + backward_s) / epoch.batch_per_gpu,
                    "tier": str(worst_tier(piece.tier for piece in pieces)),
                }
            )
    return pd.DataFrame(rows)


def _by_dense_name(step: StepTime, network: Network, dense: Collection[str]) -> dict[str, list[LayerTime]]:
    """The times of what is left of the layers of the dense network, by their names there; a gate comes last."""
    found: dict[str, list[LayerTime]] = {}
    for time in step.layers:
        if not network.layer(time.layer).is_removed:
            pieces = found.setdefault(ungated(time.layer, dense), [])
            pieces.insert(len(pieces) if time.kind is LayerKind.RESHAPE else 0, time)
    return found


def first_and_last_layers(layers: pd.DataFrame) -> pd.DataFrame:
    """One row per layer of the first epoch in `layers_frame`, with what is left of it in the last epoch."""
    before = layers[layers.epoch == layers.epoch.min()].set_index("layer")
    after = layers[layers.epoch == layers.epoch.max()].set_index("layer")
    marks = {False: "", True: ", gated"}
    channels = [
        frame.in_channels.astype(str) + " → " + frame.out_channels.astype(str) + frame.gated.map(marks)
        for frame in (before, after)
    ]
    last_seconds = after.seconds_per_image.reindex(before.index)
    return pd.DataFrame(
        {
            "layer": before.index,
            "kind": before.kind.str.replace("_", " "),
            "first_channels": channels[0],
            "last_channels": channels[1].reindex(before.index).fillna("removed"),
            "first_macs_per_image": before.forward_macs_per_image,
            "last_macs_per_image": after.forward_macs_per_image.reindex(before.index),
            "first_seconds_per_image": before.seconds_per_image,
            "last_seconds_per_image": last_seconds,
            "last_fraction": last_seconds.fillna(0.0) / before.seconds_per_image,
            "tier": before.tier,
        }
    ).reset_index(drop=True)


def _saved(
    unit: str, dense: float | None, pruned: float | None, spread: tuple[float, float]
) -> dict[str, float | None]:
    """Dense, pruned, saved, and the 90 % interval of what is saved, as columns of `unit`.

    `spread` holds the ends of the interval of pruned / dense, over its middle. Price and power are common to both
    runs, so that the time's ratio decides the interval of money and energy too. No end can save more than the dense
    run takes.
    """
    low = high = saved = None
    if dense is not None and pruned is not None:
        saved, low, high = dense - pruned, dense - pruned * spread[1], dense - pruned * spread[0]
    return {
        f"dense_{unit}": dense,
        f"pruned_{unit}": pruned,
        f"saved_{unit}": saved,
        f"saved_{unit}_low": low,
        f"saved_{unit}_high": high,
    }


def _setting(run: LabelledRun, projector: Projector) -> dict[str, str | bool | int]:
    return {
        "run": run.label,
        "setting": run.setting,
        "pruned": run.trace.is_pruned,
        "trained": run.trained,
        "model": model_name(run.trace),
        "dataset": data_name(run.trace),
        "task": task_of(run.trace),
        "cluster": projector.cluster.name,
        "device": projector.device.name,
        "precision": str(run.trace.run.precision),
    }
