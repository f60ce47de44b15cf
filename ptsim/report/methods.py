"""What a report's numbers rest on: the tier of every time, the source of every constant, and how runs were made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import pandas as pd

from ptsim.costs.input import find_pipeline
from ptsim.costs.scaling import load_scaling
from ptsim.costs.tiers import tier_row
from ptsim.hardware.spec import Cluster, Device
from ptsim.report import specs
from ptsim.report.facts import Facts
from ptsim.report.figures.style import gpus as format_gpus
from ptsim.report.projected import LabelledRun, Projector
from ptsim.report.tables import Table, make_table
from ptsim.sim.options import Options
from ptsim.trace.pairs import data_name, device_name, model_name, run_labels
from ptsim.trace.trace import Trace
from ptsim.units import format_bandwidth, format_bytes, format_peak, format_seconds, in_turn, listed, percent

COUNTING = (
    (
        "MACs",
        "Multiply–accumulates of the forward pass, as fvcore counts them; 1 MAC is 2 FLOPs. Training adds as many for "
        "the weight gradient and, in layers whose input needs one, for the input gradient.",
    ),
    (
        "epochs",
        "Count from 0, as in the traces: epoch 0 trains the first network, and a run of 90 epochs ends with epoch 89.",
    ),
    (
        "all-reduce bytes",
        "Those of the gradients, 4 bytes a parameter, once per update. Of p GPUs in a ring each sends 2(p−1)/p of "
        "that.",
    ),
    (
        "projection",
        "Each distinct architecture and mini-batch is simulated once as a step of PyTorch's DistributedDataParallel "
        "(buckets, overlap with the backward pass) and multiplied by its iterations. Reconfigurations are added: the "
        "time to change the network, as recorded (as assumed where nobody measured it), and the cost of wrapping it "
        "anew.",
    ),
    (
        "energy",
        "That of the GPU boards, without hosts, switches and cooling. Their power depends on what they are doing, "
        "within the board's limits.",
    ),
    (
        "intervals",
        "90 %: in 9 of 10 such cases the true value lies inside. Where times were measured on the GPU itself, the "
        "width comes from the spread of those measurements and from how far off interpolation between them is; "
        "elsewhere it is the spread of the errors that the same way of predicting made on published measurements. All "
        "layers and epochs of a run are taken to err in the same direction. A saving has one interval, that of the "
        "ratio of the two runs; seconds, joules and USD follow from it. Repeats with other seeds are drawn as their "
        "mean, with the widest interval of the repeats.",
    ),
)

Row = dict[str, str]


def assumptions_table(facts: Facts) -> Table:
    """What every projected number rests on: where each time comes from, and the source of each constant."""
    runs = facts.labelled
    precisions = {str(run.trace.run.precision) for run in runs}
    rows = [*_planned_rows(runs), *_tier_rows(runs, facts.projector, facts.focus)]
    for projector in facts.projectors:
        cluster = projector.cluster
        of = [*_network_rows(cluster), *_device_rows(projector.device, precisions), *_price_rows(projector)]
        if len(facts.projectors) > 1:
            of = [row | {"what": f"{cluster.name}: {row['what']}"} for row in of]
        rows += of
    rows += _option_rows(facts.projector)
    return make_table(specs.ASSUMPTIONS, pd.DataFrame(rows))


def methods_facts(runs: Sequence[Trace]) -> tuple[tuple[str, str], ...]:
    """How the runs were made, from their own first records, and how everything is counted."""
    shared = _shared_settings(runs)
    facts = [
        fact
        for label, trace in zip(run_labels(runs), runs, strict=True)
        for fact in _run_facts(label, trace, shared if len(runs) > 1 else {})
    ]
    if len(runs) > 1:
        facts.append(("configuration of all", ", ".join(f"{name} {_plain(value)}" for name, value in shared.items())))
    return (*facts, ("software", _software(runs)), *COUNTING)


def _planned_rows(runs: Sequence[LabelledRun]) -> Iterator[Row]:
    """What planned and imported runs take for given."""
    for run in runs:
        for assumption in run.trace.run.assumed:
            yield _row(f"{run.trace.run.origin}: {run.label}", assumption.what, assumption.source)


def _tier_rows(runs: Sequence[LabelledRun], projector: Projector, gpus: int) -> Iterator[Row]:
    """Which runs and epochs a tier made the times of; what is said of several runs is said once."""
    said: dict[tuple[str, str, str], list[str]] = {}
    for run in runs:
        projection = projector.run(run.trace, gpus)
        tiers: dict[str, list[int]] = {}
        for epoch in projection.epochs:
            tiers.setdefault(epoch.tier, []).append(epoch.epoch)
        for tier, epochs in tiers.items():
            words = tier_row(tier).label, tier_row(tier).explanation
            said.setdefault((f"step time, {_which(epochs)}", *words), []).append(run.label)
        if network := projection.network_tier:
            words = tier_row(network).label, tier_row(network).all_reduce_explanation
            said.setdefault((f"all-reduce times, {format_gpus(gpus)}", *words), []).append(run.label)
        stated = {assumption.note for assumption in run.trace.run.assumed}
        for note in [note for note in projection.notes if note not in stated]:
            said.setdefault(("", "note", note), []).append(run.label)
    for (what, value, source), labels in said.items():
        who = "all runs" if len(labels) == len(runs) else "; ".join(labels)
        yield _row(f"{what}: {who}" if what else who, value, source)


def _which(epochs: Sequence[int]) -> str:
    """Epochs in words, neighbours by their ends: "epochs 0 to 4 and 9"."""
    stretches: list[list[int]] = []
    for epoch in epochs:
        if stretches and epoch == stretches[-1][1] + 1:
            stretches[-1][1] = epoch
        else:
            stretches.append([epoch, epoch])
    words = [f"{first} to {last}" if first < last else f"{first}" for first, last in stretches]
    return f"{'epochs' if len(epochs) > 1 else 'epoch'} {listed(words)}"


def _network_rows(cluster: Cluster) -> Iterator[Row]:
    for field, name, link in (
        ("intra", "GPU to GPU, one direction", cluster.intra if cluster.links_inside else None),
        ("inter", "node to node, one direction", cluster.inter),
    ):
        if link is not None:
            latency = f", {format_seconds(link.latency_s)}" if link.latency_s is not None else ""
            value = f"{link.name}, {format_bandwidth(link.bandwidth_bytes_per_s)}{latency}"
            yield _row(name, value, _source(cluster.sources, field))
    for measured in cluster.tables:
        jitter = percent(measured.relative_jitter) if measured.relative_jitter else "unknown"
        value = f"measured table, {len(measured.size_bytes)} sizes, jitter {jitter}"
        yield _row(f"all-reduce on {format_gpus(measured.num_gpus)}", value, measured.source)


def _device_rows(device: Device, precisions: set[str]) -> Iterator[Row]:
    yield _row(f"{device.name}: memory", format_bytes(device.memory_bytes), _source(device.sources, "memory"))
    bandwidth = format_bandwidth(device.memory_bandwidth_bytes_per_s)
    yield _row(f"{device.name}: memory bandwidth", bandwidth, _source(device.sources, "memory_bandwidth"))
    for precision, peak in device.peak_flops_per_s.items():
        if str(precision) in precisions:
            yield _row(f"{device.name}: {precision} peak", format_peak(peak), _source(device.sources, "peak"))


def _price_rows(projector: Projector) -> Iterator[Row]:
    price = projector.price
    if price is None:
        yield _row("price", "none", "no price, so no money is reported")
    else:
        yield _row("price", str(price), price.source)


def _option_rows(projector: Projector) -> Iterator[Row]:
    options, cluster = projector.options, projector.cluster
    if projector.grid_grams_per_kwh is not None:
        yield _row(
            "CO₂ of a kWh", f"{projector.grid_grams_per_kwh:g} g", "given by the user; of the boards' energy only"
        )
    yield _row(
        "overlap",
        "the default of the kind of link" if options.contention is None else f"{100 * options.contention:.0f} % slower",
        f"computation and communication slow each other down while both run ({_contention()}, unless given); the "
        "interval covers half to one and a half times that",
    )
    if cluster.library == "nccl":
        fitted = load_scaling()
        slower, hook = f"computation {100 * fitted.slowdown:.1f} % longer", format_seconds(fitted.tensor_s)
        nodes = f"and {100 * fitted.straggle:.1f} % more for every doubling of the nodes"
        yield _row(
            "on several GPUs",
            f"{slower}, {nodes}; {hook} per gradient tensor",
            "fitted on published steps of one GPU and of several (docs/cross_validation.md); a device profile that was "
            "recorded on one of several GPUs (ptsim import kineto) has it already",
        )
    yield _input_row(options, cluster)
    yield _row(
        "mini-batch",
        f"{options.scaling} scaling",
        "every GPU keeps the recorded mini-batch"
        if options.scaling == "weak"
        else "the recorded global mini-batch is split over the GPUs",
    )


def _contention() -> str:
    """By how much on which links, as shipped: "over TCP by 5 %, elsewhere by 20 %"."""
    fitted = load_scaling().contention
    links = {kind: f"over {kind.upper()}" for kind in fitted if kind != "other"} | {"other": "elsewhere"}
    return ", ".join(f"{where} by {100 * fitted[kind]:.0f} %" for kind, where in links.items())


def _input_row(options: Options, cluster: Cluster) -> Row:
    if options.input != "none":
        value = f"{options.input} on {cluster.cores_per_node} cores per node"
        return _row("input pipeline", value, find_pipeline(options.input).source)
    if options.input_images_per_s is not None:
        return _row("input pipeline", f"{options.input_images_per_s} images/s", "given by the user")
    return _row("input pipeline", "keeps up", "an assumption: storage and decoding are not modelled")


def _run_facts(label: str, trace: Trace, shared: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    run = trace.run
    data, device = run.dataset, run.device
    shape = " × ".join(map(str, data.input_shape))
    where = in_turn(map(format_gpus, trace.world_sizes)) if device.kind != "cpu" else device.kind.upper()
    if trace.is_planned:
        began = f"{where}; planned {run.created}" + (", after a run on " + device_name(trace)) * trace.is_stretched
    else:
        began = (
            f"{where} {device_name(trace)}{f', driver {device.driver}' * bool(device.driver)}; started {run.created}"
        )
    images = f"{data.num_train:,} training and {data.num_validation:,} validation images"
    yield (
        label,
        f"{model_name(trace)} on {data_name(trace)}: {images} of {shape}, {data.num_classes} classes; "
        f"{run.precision}, {run.memory_format.replace('_', ' ')}, seed {run.seed}; {began}"
        + (f"; revision {run.git_revision[:12]}" if run.git_revision else "")
        + ".",
    )
    own = [f"{name} {_plain(value)}" for name, value in _settings(trace).items() if name not in shared]
    if own:
        yield f"{label}: configuration", ", ".join(own)


def _settings(trace: Trace) -> dict[str, object]:
    """The run's configuration without what was not set, and without the data's place on somebody's disk."""
    values = trace.run.hyperparameters.items()
    return {name: value for name, value in values if value is not None and value != "" and name != "data_dir"}


def _shared_settings(runs: Sequence[Trace]) -> dict[str, object]:
    first, *others = [_settings(trace) for trace in runs]
    return {name: value for name, value in first.items() if all(other.get(name) == value for other in others)}


def _software(runs: Sequence[Trace]) -> str:
    used = dict.fromkeys(", ".join(f"{name} {version}" for name, version in t.run.versions.items()) for t in runs)
    return "; ".join(text for text in used if text) or "not recorded"


def _row(what: str, value: str, source: str) -> Row:
    return {"what": what, "value": value, "source": source}


def _source(sources: dict[str, str], field: str) -> str:
    return sources.get(field) or sources.get("default") or "not stated"


def _plain(value: object) -> str:
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_plain, value)) + "]"
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else f"{value}"
