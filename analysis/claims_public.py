"""What the tables of `traces/public` and the generated pages say: the figures of the claims that rest on them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pandas as pd
from claims_words import Figures, percent, rounded, signed, span

from ptsim.units import listed


def planned_saving(root: Path) -> Figures:
    """The README's picture: 8 GPUs of each kind, from the table beside it."""
    rows = pd.read_csv(root / "docs" / "images" / "saving.csv")
    found = [f"of {percent(rows.saved_flops_fraction.iloc[0])} of the training FLOPs"]
    for row in rows[rows.gpus == 8].to_dict("records"):
        interval = f"{rounded(row['saved_fraction_low'], 0)} to {percent(row['saved_fraction_high'])}"
        found.append(f"{row['gpu']} {percent(row['saved_fraction'])} ({interval})")
    return found


def public(name: str, root: Path) -> pd.DataFrame:
    """A table of `traces/public`."""
    return pd.read_csv(root / "traces" / "public" / f"{name}.csv")


def macs(root: Path) -> Figures:
    """Nothing but equal counts may stand in the table."""
    rows = public("counts", root).dropna(subset=["inference_macs"])
    same = (rows.inference_macs == rows.inference_macs_torch) & (rows.training_macs == rows.training_macs_torch)
    forms = rows[rows.batch == rows.batch.min()].groupby("form").model.nunique()
    return [
        "all equal" if same.all() else f"{(~same).sum()} of {len(rows)} differ",
        f"{forms['dense']} networks dense, {forms['pruned']} of them also pruned",
    ]


def kept_bytes(root: Path) -> Figures:
    """The largest difference of each precision."""
    rows = public("counts", root)
    error = (rows.kept_bytes / rows.kept_bytes_torch - 1).abs().groupby(rows.precision).max()
    fp32, bf16 = ("all equal" if error[name] == 0 else f"within {percent(error[name], 1)}" for name in ("fp32", "bf16"))
    return [f"fp32 {fp32}; bf16 autocast {bf16}"]


def peaks(precision: str, root: Path) -> pd.Series[float]:
    """Errors of the modelled peak."""
    rows = public("counts", root).dropna(subset=["peak_bytes"])
    rows = rows[rows.precision == precision]
    return rows.peak_bytes / rows.peak_bytes_torch - 1


def peak_fp32(root: Path) -> Figures:
    """Range, and how many are close."""
    errors = peaks("fp32", root)
    close = errors.abs() < 0.0125
    return [span(errors), f"{close.sum()} of {len(errors)} within {percent(errors[close].abs().max(), 1)}"]


def peak_bf16(root: Path) -> Figures:
    """Range, and ConvNeXt's two, which are the worst."""
    errors = peaks("bf16", root)
    convnext = public("counts", root).model[errors.index].str.contains("convnext")
    worst = " and ".join(rounded(error, 1) for error in sorted(errors[convnext]))
    return [span(errors), f"ConvNeXt ({worst} %", f"within {percent(errors[~convnext].abs().max(), 1)}"]


def exact_pruning(root: Path) -> Figures:
    """The survey of torchvision's classifiers."""
    rows = public("inspect_torchvision", root)
    return [
        f"{rows.exact.sum()} of {len(rows)} exact",
        f"{rows.max_rel_error_eval.max():.1e}".replace("e-0", "e-"),
        f"{rows.max_rel_error_train.max():.1e}".replace("e-0", "e-"),
        f"up to {rows.seconds.max():.1f} s a network, {rows.seconds.sum():.1f} s together",
    ]


def timm_families(root: Path) -> Figures:
    """One network of each of timm's families."""
    rows = public("inspect_timm", root)
    crashed = rows.exact.isna() & ~rows.reason.fillna("").str.startswith("not done")
    return [
        f"{'none' if not crashed.any() else crashed.sum()} crashes",
        f"{((rows.exact == True) & (rows.share > 0)).sum()} of {len(rows)} exact",  # noqa: E712 # a column
        f"CPU seconds {rows.cpu_seconds.median():.1f} in the median, {rows.cpu_seconds.max():.0f} at most",
    ]


def planned_classifiers(root: Path) -> Figures:
    """The survey of torchvision's classifiers, planned."""
    rows = public("plan_torchvision", root)
    return [
        f"{len(rows)} planned",
        f"{rows.problem.isna().sum()} of them down to half of the inference FLOPs",
        f"CPU seconds {rows.cpu_seconds.median():.0f} in the median, {rows.cpu_seconds.max():.0f} at most",
    ]


def fits(root: Path) -> Figures:
    """What ptsim says against what happened."""
    rows = public("fits", root)
    ran = rows[rows.ran]
    said = rows[~rows.ran & rows.fits]
    return [
        f"of {(~rows.ran).sum()} that ran out of memory {'none is' if said.empty else len(said)} said to fit",
        f"of {len(ran)} that ran {ran.fits.sum()} are",
        f"{rows.model.nunique()} networks",
    ]


def page_row(
    root: Path, *start: str, column: str = "median error %", page: str = "docs/cross_validation.md"
) -> dict[str, str]:
    """The row of a page that starts with these cells, in a table that has the column."""
    header: list[str] = []
    before: list[str] = []
    for line in (root / page).read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip().removeprefix("|").removesuffix("|").split("|")]
        if cells[0].startswith("---"):
            header = before
        elif tuple(cells[: len(start)]) == start and column in header:
            return dict(zip(header, cells, strict=True))
        before = cells
    raise ValueError(f"{page} has no row {start!r}")


def left_out(label: str, count: str = "rows") -> Callable[[Path], Figures]:
    """A row of the cross-validation's tables, by its first cell; `count` is the column that counts throughputs."""

    def figures(root: Path) -> Figures:
        row = page_row(root, label)
        return [
            f"median error {row['median error %']} %",
            f"{float(row['coverage %']):.0f} % inside the 90 % interval",
            f"{row[count]} {'published ' if count == 'rows' else ''}throughputs",
            f"{row['GPUs']} GPUs",
        ]

    return figures


def many_gpus(root: Path) -> Figures:
    """Steps of many GPUs, the GPU or the source left out; then which part is off, in the two largest sources."""
    gpu, source = (page_row(root, f"{way} left out", column="its bias, points") for way in ("GPU", "source"))
    parts = [page_row(root, "source", name) for name in ("DeepLearningExamples", "deeplearning-benchmark")]
    alone, added = (" and ".join(row[f"{part}: median error %"] for row in parts) for part in ("one GPU", "added"))
    off = "scaling efficiency off by, points"
    return [
        f"GPU left out: median error {gpu['median error %']} %, {_signed(gpu['bias %'])} % bias",
        f"{gpu['coverage %']} % inside the 90 % interval (every GPU counted once {gpu['mean coverage of GPUs %']} %)",
        f"{gpu['rows']} published throughputs",
        f"{gpu['GPUs']} GPUs",
        f"source left out: {source['median error %']} %, {_signed(source['bias %'])} % bias",
        f"one GPU's step is {alone} % off, what the others add {added} %",
        f"{source['coverage %']} % inside",
        f"scaling efficiency {gpu[off]} and {source[off]} points off",
    ]


def _signed(number: str) -> str:
    return number.replace("-", "−")


def many_gpus_later(root: Path) -> Figures:
    """Rows of two sources that no fit has seen."""
    perf, csc = (page_row(root, name) for name in ("Perf", "ml-benchmarks"))
    rows = [int(row["rows"]) for row in (perf, csc)]
    inside = [round(count * float(row["coverage %"]) / 100) for count, row in zip(rows, (perf, csc), strict=True)]
    return [
        f"Perf, {rows[0]} rows: median error {perf['median error %']} %, {perf['coverage %']} % inside",
        f"ml-benchmarks, {rows[1]} rows: {csc['median error %']} %, {inside[1]} inside",
        f"{percent(sum(inside) / sum(rows), 1)} of all are inside the 90 % interval",
        f"{sum(rows)} published throughputs",
    ]


def host_bound(root: Path) -> Figures:
    """Only the error: the interval is as wide as hosts differ."""
    row = page_row(root, "steps that may wait for the host, GPU and network left out")
    return [f"median error {row['median error %']} %", f"{row['GPUs']} GPUs"]


def whole_runs(root: Path, *runs: str) -> tuple[list[str], list[str], list[str]]:
    """Errors of the dense run, of the pruned run, and of the saving, of these rows of the page about whole runs."""
    rows = [page_row(root, run, column="whole run, dense", page="docs/validate.md") for run in runs]
    savings = [row["saving"].split("(")[1].removesuffix(" points)") for row in rows]
    dense, pruned = ([row[name].removesuffix(" %") for row in rows] for name in ("whole run, dense", "pruned"))
    return dense, pruned, savings


def quiet_runs(part: int, unit: str) -> Callable[[Path], Figures]:
    """One part of the three pairs on the quiet machine."""
    return lambda root: [f"{listed(whole_runs(root, '1', '2', '3')[part])} {unit}"]


def one_pair(run: str) -> Callable[[Path], Figures]:
    """All parts of one pair, the run with this number on the page."""

    def figures(root: Path) -> Figures:
        (dense,), (pruned,), (saving,) = whole_runs(root, run)
        missed = abs(float(saving.replace("−", "-"))) > 3 or abs(float(dense.replace("−", "-"))) > 5
        return [f"dense {dense} %, pruned {pruned} %, saving {saving} points off" + (": missed" if missed else "")]

    return figures


def calibrated_savings(root: Path) -> Figures:
    """The interval of a saving on a calibrated device: what the page says of sums, of GPUs and of a ResNet-50."""
    text = " ".join((root / "docs" / "saving.md").read_text(encoding="utf-8").split())
    found = re.search(r"correlation of ([\d.]+):.*same for all ratios: ([\d.]+)%.*sums are inside \(([^;]*);", text)
    if found is None:
        raise ValueError("docs/saving.md does not say how sure a saving on a calibrated device is")
    gpus = re.findall(r" ([\d.]+)%", found.group(3))
    row = page_row(root, "0.69", column="interpolated", page="docs/saving.md")
    return [
        f"correlation of {found.group(1)}",
        f"in 90 % of the sums the logarithm of the ratio is off by at most {found.group(2)} %",
        f"{listed(gpus)} % of a left-out GPU's sums are inside",
        f"For a ResNet-50 at 69 % of the dense time ±{row['interpolated']} points (missed), "
        f"from a data sheet ±{row['data sheet']}",
    ]


def lab(ranks: int, root: Path) -> pd.DataFrame:
    """The lab's rows with the message size in a column of its own."""
    rows = public("cluster_lab", root)
    rows = rows[rows.ranks == ranks].copy()
    rows["size"] = pd.to_numeric(rows.what.str.extract(r"all-reduce (\d+)", expand=False))
    return rows


def lab_allreduce(root: Path) -> Figures:
    """Two ranks, from 64 KiB."""
    rows = lab(2, root)
    return [span(rows[rows["size"] >= 65536].time_error)]


def lab_small(root: Path) -> Figures:
    """Two ranks, 1 and 16 KiB."""
    rows = lab(2, root)
    errors = [rows[rows["size"] == size].time_error for size in (1024, 16384)]
    spans = [f"{rounded(e.max(), 0)} to {percent(e.min())}" for e in errors]
    return [f"1 KiB {spans[0]}", f"16 KiB {spans[1]}"]


def lab_steps(root: Path) -> Figures:
    """Every step's error, in the order of the rates."""
    rows = lab(2, root)
    errors = {what: list(rows[rows.what == f"step {what}"].time_error) for what in ("dense", "pruned")}
    found = [f"{what} {listed([signed(error) for error in steps])} %" for what, steps in errors.items()]
    missed = [abs(error) > 0.1 for steps in errors.values() for error in steps]
    return [*found, f"{sum(missed)} of {len(missed)} missed"]


def lab_bytes(root: Path) -> Figures:
    """The largest difference."""
    return [f"within {percent(lab(2, root).bytes_error.abs().max(), 2)}"]


def lab_four(root: Path) -> Figures:
    """Four ranks: three groups of sizes, and bytes."""
    rows = lab(4, root)
    size, error = rows["size"], rows.time_error
    return [
        f"from 512 KiB {span(error[size >= 524288])}",
        f"64 KiB {span(error[size == 65536])}",
        f"1 KiB and 16 KiB {span(error[size <= 16384], 0)}",
        f"bytes within {percent(rows.bytes_error.abs().max(), 1)}",
    ]


def carried_over(root: Path) -> Figures:
    """The run with ratio 0.2 imitated for one of its own strength, for one of another, and for that one again, told."""
    records = public("carry_over", root).to_dict("records")
    rows = {row["left_out"]: row for row in records if row["imitated"] == "prunetrain-r0.2"}

    def points(left_out_run: str, *columns: str) -> str:
        row = rows[left_out_run]
        return f"{listed([f'{abs(row[column]):.1f}' for column in columns])} points"

    all_four = [f"{name}_points" for name in ("epoch", "inference", "training", "bn")]
    told = points("prunetrain-r0.3", *(f"told_{name}_points" for name in ("epoch", "training", "bn")))
    return [
        f"same penalty ratio (0.2, to gating): {points('gating-r0.2', *all_four)}",
        f"another ratio (0.2 to 0.3): {points('prunetrain-r0.3', *all_four)}",
        f"with its inference FLOPs given, the other three errors: {told}",
    ]


def benchmark(root: Path, name: str, start: str) -> pd.Series[float]:
    """The values of a benchmark's figures whose names start so, by what follows in the name."""
    rows = public("benchmarks", root)
    rows = rows[(rows.benchmark == name) & rows.figure.str.startswith(start)]
    if rows.empty:
        raise ValueError(f"the benchmark {name} has no figure that starts with {start!r}")
    return rows.set_index(rows.figure.str.removeprefix(start)).value


def regulariser(root: Path) -> Figures:
    """The penalty's share of a step."""
    share = benchmark(root, "engine", "the penalty's gradient, ")["of the step"]
    return [f"{share:.2f} %"]


def reconfiguration(root: Path) -> Figures:
    """The median of the turns."""
    return [f"{benchmark(root, 'engine', 'one reconfiguration of ')['torchvision:resnet50']:.2f} s"]


def dense_engine(root: Path) -> Figures:
    """The median ratio of the turns, and the median time of either loop."""
    ratio = benchmark(root, "training", "plain loop over ptsim, ")["the median ratio of 3 turns"]
    loops = benchmark(root, "training", "20 iterations of resnet20 at mini-batch 128 on cpu, ")
    return [
        f"{ratio:.2f} times as fast",
        f"({loops['ptsim']:.1f} s against {loops['plain loop']:.1f} s for 20 iterations)",
    ]


def recorder(root: Path) -> Figures:
    """What the recorder adds to the least of the rounds."""
    added = benchmark(root, "recorder", "the recorder adds to the least")
    rounds = benchmark(root, "recorder", "a step without a recorder, CPU time, the least of ").index[0]
    return [f"{added['']:.0f} µs, the least of {rounds}: {added[', share']:.2f} % of a step of 100 ms"]


def simulator_symmetric(root: Path) -> Figures:
    """Whole runs on equal GPUs, and link by link."""
    every = benchmark(root, "simulator", "whole run of 182 epochs, ")
    links = benchmark(root, "simulator", "the same link by link, GPUs: ")
    return [f"{every.min():.2f} to {every.max():.2f} s", f"link by link {links['1024']:.2f} s at 1,024 GPUs"]


def simulator_unequal(root: Path) -> Figures:
    """A step of 1,024 GPUs, and the memory for 16,384."""
    steps = benchmark(root, "simulator", "one step, simulated GPU by GPU, GPUs: ")
    peak = benchmark(root, "simulator", "peak memory of a fresh process for GPUs: ")
    return [f"{steps['1024']:.2f} s for 1,024 GPUs", f"{peak['16384']:.2f} GiB of memory for 16,384"]


def sweep(root: Path) -> Figures:
    """Its time, rate and speed-up on two processes."""
    found = benchmark(root, "simulator", "a sweep of 10,000 configurations, processes: 2")
    return [
        f"{found['']:.0f} s on two processes: {found[', configurations a second']:.0f} a second, "
        f"{found[', of 2 times one process']:.0f} % of twice one process"
    ]


CHECKS: dict[str, Callable[[Path], Figures]] = {
    "planned-saving": planned_saving,
    "macs": macs,
    "kept-bytes": kept_bytes,
    "peak-fp32": peak_fp32,
    "peak-bf16": peak_bf16,
    "exact-pruning": exact_pruning,
    "regulariser": regulariser,
    "reconfiguration": reconfiguration,
    "dense-engine": dense_engine,
    "recorder": recorder,
    "simulator-symmetric": simulator_symmetric,
    "simulator-unequal": simulator_unequal,
    "sweep": sweep,
    "timm-families": timm_families,
    "planned-classifiers": planned_classifiers,
    "fits": fits,
    "network-left-out": left_out("network left out, GPU in the fit"),
    "gpu-left-out": left_out("GPU left out"),
    "both-left-out": left_out("GPU and network left out"),
    "later-rows": left_out("mini-batches of 16 to 1,280, all", count="number"),
    "host-bound": host_bound,
    "whole-run-dense": quiet_runs(0, "%"),
    "whole-run-pruned": quiet_runs(1, "%"),
    "whole-run-saving": quiet_runs(2, "points off"),
    "whole-run-before": one_pair("4"),
    "whole-run-busy": one_pair("5"),
    "saving-interval-calibrated": calibrated_savings,
    "many-gpus": many_gpus,
    "many-gpus-later": many_gpus_later,
    "carried-over": carried_over,
    "lab-allreduce": lab_allreduce,
    "lab-small": lab_small,
    "lab-steps": lab_steps,
    "lab-bytes": lab_bytes,
    "lab-four": lab_four,
}
