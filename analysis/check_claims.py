"""Does every figure that the README and the docs state stand in its source?

    python analysis/check_claims.py            # checks all claims of docs/claims.toml and the README's figures
    python analysis/check_claims.py --write    # also fills the tables of docs/accuracy.md and docs/evidence.md

A claim with a trace or a table as its source is computed again from it; one whose source is a page must find its
numbers there; one whose source is a test is checked by that test; one without a source cannot be checked here.
A paragraph or row of the README or of a page of docs that quotes a measured figure (a percentage, seconds, …) must link
its claim, and all its numbers must stand in that claim. Pages that `[[page]]` lists say how their figures were made. A
script that a command names must exist.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import msgspec
import pandas as pd

import ptsim
from ptsim.costs.flops import training_macs
from ptsim.costs.traffic import batch_norm_bytes
from ptsim.textfile import read_toml, write_whole
from ptsim.trace.pairs import held_dense
from ptsim.units import listed

ROOT = Path(__file__).resolve().parents[1]
CLAIMS = ROOT / "docs" / "claims.toml"
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?(?:e-\d+)?")
# A number with the unit of something measured; not part of a word, as the 100 of A100s.
_UNIT = r"points?|ms|µs|s|h|seconds?|minutes?|hours?|kWh|[KMG]i?B"
QUANTITY = re.compile(rf"(?<![\w.])\d[\d,]*(?:\.\d+)?(?:\s?%|\s(?:{_UNIT})\b|[- ]times as\b)")
SCRIPT = re.compile(r"\banalysis/\w+\.py\b")
BLOCK = re.compile(r"(<!-- claims: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)

Figures = list[str]  # texts that must stand in the claim's value, such as "77 %"


class Claim(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One figure that README or docs state, with where it comes from; `docs/claims.toml` says what the fields are."""

    id: str
    area: str
    claim: str
    value: str
    goal: str = ""
    command: str
    machine: str
    date: str
    source: str = ""
    seen: str = ""


class Page(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A page whose figures are no claims: what they are, and how they were made."""

    page: str
    figures: str
    command: str
    machine: str
    date: str
    seen: str = ""


def read_pages(path: Path = CLAIMS) -> tuple[Page, ...]:
    """The pages that say of themselves where their figures come from."""
    return msgspec.convert(read_toml(path).get("page", []), tuple[Page, ...])


def read_claims(path: Path = CLAIMS) -> tuple[Claim, ...]:
    """All claims, in the order of the file.

    Raises:
        ValueError: two claims have one id.
    """
    claims = msgspec.convert(read_toml(path)["claim"], tuple[Claim, ...])
    ids = [claim.id for claim in claims]
    if len(set(ids)) < len(ids):
        raise ValueError(f"claims of one id: {sorted({name for name in ids if ids.count(name) > 1})}")
    return claims


def read_recorded(root: Path, folder: str, name: str) -> ptsim.Trace:
    """The run NAME in `traces/FOLDER`."""
    return ptsim.read_trace(root / "traces" / folder / f"{name}.jsonl")


def totals(trace: ptsim.Trace) -> dict[str, float]:
    """What a recorded run did in all, and the MACs of its last network."""
    return {
        "flops": sum(training_macs(trace.network_of(e), images=e.num_images) for e in trace.epochs),
        "bn": sum(batch_norm_bytes(trace.network_of(e)) * e.num_images for e in trace.epochs),
        "time": sum(e.time.wall_s for e in trace.epochs) + sum(r.duration_s for r in trace.reconfigurations),
        "inference": trace.network_of(trace.epochs[-1]).forward_macs,
    }


def recorded(name: str, root: Path, folder: str = "cifar10-resnet20", beside: str = "dense") -> dict[str, float]:
    """FLOPs, BatchNorm traffic and time of a run in `traces/FOLDER`, relative to the run recorded beside it."""
    dense, run = (read_recorded(root, folder, n) for n in (beside, name))
    theirs, ours = totals(dense), totals(run)
    accuracies = {"dense": dense.epochs[-1].validation_accuracy, "accuracy": run.epochs[-1].validation_accuracy}
    return {key: ours[key] / theirs[key] for key in ours} | accuracies


def percent(value: float, digits: int = 0) -> str:
    """77 % of 0.77, with the minus sign of the text."""
    return f"{100 * value:.{digits}f} %".replace("-", "−")


def planned_saving(root: Path) -> Figures:
    """The README's picture: 8 GPUs of each kind, from the table beside it."""
    rows = pd.read_csv(root / "docs" / "images" / "saving.csv")
    found = [f"of {percent(rows.saved_flops_fraction.iloc[0])} of the training FLOPs"]
    for row in rows[rows.gpus == 8].itertuples():
        interval = f"{100 * row.saved_fraction_low:.0f} to {percent(row.saved_fraction_high)}"
        found.append(f"{row.gpu} {percent(row.saved_fraction)} ({interval})")
    return found


def recorded_pair(root: Path) -> Figures:
    """The pair whose times compare."""
    of = recorded("prunetrain-r0.2", root)
    return [
        f"training FLOPs {percent(of['flops'])}, BatchNorm traffic {percent(of['bn'])}, "
        f"inference FLOPs {percent(of['inference'])}, time {percent(of['time'])} of dense",
        f"{percent(of['accuracy'], 1)} against {percent(of['dense'], 1)}",
    ]


def recorded_saving(root: Path, *, folder: str, run: str, beside: str = "dense") -> Figures:
    """What was saved of the time for each part that was saved of the FLOPs."""
    of = recorded(run, root, folder, beside)
    return [
        f"training FLOPs {percent(of['flops'])}, BatchNorm traffic {percent(of['bn'])}, "
        f"inference FLOPs {percent(of['inference'])}, time {percent(of['time'])} of dense",
        f"saved time over saved FLOPs {(1 - of['time']) / (1 - of['flops']):.1f}",
        f"{percent(of['accuracy'], 1)} against {percent(of['dense'], 1)}",
    ]


def recorded_seeds(root: Path, *, folder: str, pairs: dict[str, str]) -> Figures:
    """The same pair with several seeds: `pairs` names each run and the dense one that was recorded beside it."""
    found = [recorded(run, root, folder, beside) for run, beside in pairs.items()]
    percents = {key: listed([f"{100 * of[key]:.0f}" for of in found]) for key in ("flops", "bn", "inference", "time")}
    ratios = [f"{(1 - of['time']) / (1 - of['flops']):.1f}" for of in found]
    lost = [f"{100 * (of['dense'] - of['accuracy']):.1f}" for of in found]
    return [
        f"training FLOPs {percents['flops']} %, BatchNorm traffic {percents['bn']} %, "
        f"inference FLOPs {percents['inference']} %, time {percents['time']} % of dense",
        f"saved time over saved FLOPs {listed(ratios)}",
        f"accuracy {listed(lost)} points lower",
    ]


def recorded_pace(root: Path, *, folder: str, run: str) -> Figures:
    """The time of both runs at the pace of their own first ten epochs, and what the run's profiles say of it."""
    own = []
    for name in (run, "dense"):
        seconds = [epoch.time.wall_s for epoch in read_recorded(root, folder, name).epochs]
        own.append(percent(sum(seconds) / len(seconds) / (sum(seconds[:10]) / 10)))
    trace = read_recorded(root, folder, run)
    step_s = {profile.architecture: profile.step_s for profile in trace.profiles}
    mean_s = sum(step_s[epoch.architecture] for epoch in trace.epochs) / len(trace.epochs)
    profiled = percent(mean_s / step_s[trace.epochs[0].architecture])
    return [f"pruned {own[0]}, dense {own[1]}", f"by the profiles of its networks {profiled}"]


def recorded_dynamic(root: Path, *, folder: str, run: str, beside: str) -> Figures:
    """A growing mini-batch beside a fixed one: same pruning settings, other steps."""
    of = recorded(run, root, folder, beside)
    sizes = [epoch.batch_per_gpu for epoch in read_recorded(root, folder, run).epochs]
    grown = " to ".join(str(size) for size in dict.fromkeys(sizes))
    return [
        f"mini-batch {grown}",
        f"training FLOPs {percent(of['flops'])}, time {percent(of['time'])} of the fixed one's",
        f"{percent(of['accuracy'], 1)} against {percent(of['dense'], 1)}",
    ]


def recorded_modes(root: Path, *, folder: str, gating: str, union: str) -> Figures:
    """Gating beside union: FLOPs of the last network and of the run, of the unpruned network's; times."""
    found, last_s = [], []
    for mode, name in (("gating", gating), ("union", union)):
        trace = read_recorded(root, folder, name)
        own, dense = totals(trace), totals(held_dense(trace))
        inference, whole = (own[key] / dense[key] for key in ("inference", "flops"))
        found.append(f"{mode}: inference FLOPs {percent(inference)}, training FLOPs {percent(whole)} of dense")
        last_s.append(sum(epoch.time.wall_s for epoch in trace.epochs[-10:]) / 10)
    of = recorded(gating, root, folder, union)
    return [
        *found,
        f"time of gating {percent(of['time'])} of union's",
        f"last ten epochs {last_s[0]:.0f} against {last_s[1]:.0f} s each",
        f"{percent(of['accuracy'], 1)} against {percent(of['dense'], 1)}",
    ]


def recorded_layers(root: Path, *, folder: str, run: str) -> Figures:
    """The last network beside the first, by kind of layer, from the profiles that the run took of them."""
    from saving_by_layer import recorded_tables

    tables = recorded_tables(read_recorded(root, folder, run))
    kinds, last = tables["kinds"].set_index("kind"), tables["steps"].iloc[-1]
    names = {"conv": "convolutions", "batch_norm": "BatchNorm", "activation": "ReLU", "elementwise": "additions"}
    left = ", ".join(f"{text} {percent(kinds.time_left[kind])}" for kind, text in names.items())
    lost = [f"{100 * kinds.lost_share[kind]:.1f}" for kind in names]
    return [
        f"MACs {percent(last.macs_left)}, step {percent(last.time_left)} of dense",
        left,
        f"{listed(lost)} points",
        f"saved time over saved MACs {last.saved_time_per_saved_macs:.1f}",
    ]


def recorded_steps(root: Path, *, folder: str) -> Figures:
    """The step of the last network alone, and with its channels rounded up, as measured on an idle machine."""
    rows = pd.read_csv(root / "traces" / folder / "by_layer" / "steps.csv").set_index("network")
    one, *rounded = (rows.loc[f"pruned, multiple of {multiple}"] for multiple in (1, 8, 16))
    found = [
        f"MACs {percent(one.macs_left)}, step {percent(one.time_left)} of dense",
        f"saved time over saved MACs {one.saved_time_per_saved_macs:.1f}",
    ]
    return found + [f"MACs {percent(row.macs_left)}, step {percent(row.time_left)}" for row in rounded]


def recorded_r03(root: Path) -> Figures:
    """Counted from the trace; its time is relative to its own unpruned epochs, as `table1.py` computes it."""
    of = recorded("prunetrain-r0.3", root)
    return [f"training FLOPs {percent(of['flops'])} of dense", f"accuracy {percent(of['accuracy'], 1)}"]


def recorded_gating(root: Path) -> Figures:
    """Inference FLOPs of both modes."""
    gating, union = recorded("gating-r0.2", root), recorded("prunetrain-r0.2", root)
    return [f"inference FLOPs {percent(gating['inference'])} where union has {percent(union['inference'])}"]


def public(name: str, root: Path) -> pd.DataFrame:
    """A table of `traces/public`."""
    return pd.read_csv(root / "traces" / "public" / f"{name}.csv")


def macs(root: Path) -> Figures:
    """Nothing but equal counts may stand in the table."""
    rows = public("counts", root).dropna(subset=["inference_macs"])
    same = (rows.inference_macs == rows.inference_macs_torch) & (rows.training_macs == rows.training_macs_torch)
    return ["all equal" if same.all() else f"{(~same).sum()} of {len(rows)} differ"]


def kept_bytes(root: Path) -> Figures:
    """The largest difference of each precision."""
    rows = public("counts", root)
    error = (rows.kept_bytes / rows.kept_bytes_torch - 1).abs().groupby(rows.precision).max()
    return [
        f"fp32 {'all equal' if error['fp32'] == 0 else percent(error['fp32'], 1)}",
        f"bf16 autocast within {percent(error['bf16'], 1)}",
    ]


def peaks(precision: str, root: Path) -> pd.Series[float]:
    """Errors of the modelled peak."""
    rows = public("counts", root).dropna(subset=["peak_bytes"])
    rows = rows[rows.precision == precision]
    return rows.peak_bytes / rows.peak_bytes_torch - 1


def span(errors: pd.Series[float], digits: int = 1) -> str:
    """From the lowest to the highest, as in "−3.6 to +1.2 %"."""
    return f"{100 * errors.min():+.{digits}f} to {100 * errors.max():+.{digits}f} %".replace("-", "−")


def peak_fp32(root: Path) -> Figures:
    """Range, and how many are close."""
    errors = peaks("fp32", root)
    return [span(errors), f"{(errors.abs() < 0.0125).sum()} of {len(errors)} within 1.2 %"]


def peak_bf16(root: Path) -> Figures:
    """Range, and ConvNeXt's two, which are the worst."""
    errors = peaks("bf16", root)
    worst = errors.sort_values()
    return [span(errors), f"within {percent(worst.iloc[2:].abs().max(), 1)}"]


def exact_pruning(root: Path) -> Figures:
    """The survey of torchvision's classifiers."""
    rows = public("inspect_torchvision", root)
    return [
        f"{rows.exact.sum()} of {len(rows)} exact",
        f"{rows.max_rel_error_eval.max():.1e}".replace("e-0", "e-"),
        f"{rows.max_rel_error_train.max():.1e}".replace("e-0", "e-"),
        f"up to {rows.seconds.max():.0f} s",
    ]


def timm_families(root: Path) -> Figures:
    """One network of each of timm's families."""
    rows = public("inspect_timm", root)
    return [
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
    ]


def page_row(root: Path, *start: str, column: str = "median error %") -> dict[str, str]:
    """The row of the cross-validation's page that starts with these cells, in a table that has the column."""
    header: list[str] = []
    for line in (root / "docs" / "cross_validation.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split("|")]
        if "median error %" in cells:
            header = cells
        if tuple(cells[: len(start)]) == start and column in header:
            return dict(zip(header, cells, strict=True))
    raise ValueError(f"docs/cross_validation.md has no row {start!r}")


def left_out(label: str) -> Callable[[Path], Figures]:
    """A row of the cross-validation's tables, by its first cell."""

    def figures(root: Path) -> Figures:
        row = page_row(root, label)
        return [
            f"median error {row['median error %']} %",
            f"{float(row['coverage %']):.0f} % inside the 90 % interval",
        ]

    return figures


def many_gpus(root: Path) -> Figures:
    """Steps of many GPUs, the GPU or the source left out; then which part is off, source by source."""
    gpu, source = (page_row(root, f"{way} left out", column="its bias, points") for way in ("GPU", "source"))
    parts = [page_row(root, "source", name) for name in ("DeepLearningExamples", "deeplearning-benchmark")]
    alone, added = (" and ".join(row[f"{part}: median error %"] for row in parts) for part in ("one GPU", "added"))
    return [
        f"GPU left out: median error {gpu['median error %']} %, {gpu['coverage %']} % inside the 90 % interval",
        f"source left out: {source['median error %']} %",
        f"one GPU's step is {alone} % off, what the others add {added} %",
        f"{source['coverage %']} % inside",
    ]


def many_gpus_later(root: Path) -> Figures:
    """Rows of two sources that no fit has seen."""
    dlperf, pycls = (page_row(root, name) for name in ("DLPerf", "pycls"))
    return [
        f"DLPerf, {dlperf['rows']} rows: median error {dlperf['median error %']} %",
        f"pycls, {pycls['rows']} rows in fp32: {pycls['median error %']} %, {pycls['coverage %']} % inside",
    ]


def host_bound(root: Path) -> Figures:
    """Only the error: the interval is as wide as hosts differ."""
    return left_out("steps that may wait for the host, GPU and network left out")(root)[:1]


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
    errors = [100 * rows[rows["size"] == size].time_error for size in (1024, 16384)]
    spans = [f"{e.max():.0f} to {e.min():.0f} %".replace("-", "−") for e in errors]
    return [f"1 KiB {spans[0]}", f"16 KiB {spans[1]}"]


def lab_steps(root: Path) -> Figures:
    """Every step's error, in the order of the rates."""
    rows = lab(2, root)
    found = []
    for what in ("dense", "pruned"):
        errors = [f"{100 * error:+.1f}".replace("-", "−") for error in rows[rows.what == f"step {what}"].time_error]
        found.append(f"{what} {listed(errors)} %")
    return found


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
    """The run with ratio 0.2 imitated for one of its own strength and for one of another."""
    rows = public("carry_over", root).set_index(["imitated", "left_out"])
    found = []
    for left_out_run in ("gating-r0.2", "prunetrain-r0.3"):
        row = rows.loc[("prunetrain-r0.2", left_out_run)]
        points = [f"{abs(row[f'{name}_points']):.1f}" for name in ("epoch", "inference", "training", "bn")]
        found.append(f"{listed(points)} points")
    return found


_VGG11 = {"folder": "cifar10-vgg11", "run": "prunetrain-r0.25"}
_RESNET32 = {"folder": "cifar10-resnet32", "run": "prunetrain-r0.25"}
CHECKS: dict[str, Callable[[Path], Figures]] = {
    "planned-saving": planned_saving,
    "recorded-pair": recorded_pair,
    "recorded-vgg11": partial(recorded_saving, **_VGG11),
    "recorded-vgg11-pace": partial(recorded_pace, **_VGG11),
    "recorded-vgg11-steps": partial(recorded_steps, folder="cifar10-vgg11"),
    "recorded-resnet18": partial(recorded_saving, folder="cifar10-resnet18-64", run="prunetrain-r0.2"),
    "recorded-resnet18-steps": partial(recorded_steps, folder="cifar10-resnet18-64"),
    "recorded-resnet32": partial(recorded_saving, **_RESNET32),
    "recorded-seeds": partial(
        recorded_seeds,
        folder="cifar10-resnet32",
        pairs={
            "prunetrain-r0.25": "dense",
            "seed2-prunetrain-r0.25": "seed2-dense",
            "seed3-prunetrain-r0.25": "seed3-dense",
        },
    ),
    "recorded-resnet32-pace": partial(recorded_pace, **_RESNET32),
    "recorded-resnet32-steps": partial(recorded_steps, folder="cifar10-resnet32"),
    "recorded-resnet32-layers": partial(recorded_layers, **_RESNET32),
    "recorded-dynamic": partial(recorded_dynamic, folder="cifar10-resnet32", run="batch-dynamic", beside="batch-fixed"),
    "recorded-modes": partial(recorded_modes, folder="cifar10-resnet32", gating="mode-gating", union="mode-union"),
    "recorded-r03": recorded_r03,
    "recorded-gating": recorded_gating,
    "macs": macs,
    "kept-bytes": kept_bytes,
    "peak-fp32": peak_fp32,
    "peak-bf16": peak_bf16,
    "exact-pruning": exact_pruning,
    "timm-families": timm_families,
    "planned-classifiers": planned_classifiers,
    "fits": fits,
    "network-left-out": left_out("network left out, GPU in the fit"),
    "gpu-left-out": left_out("GPU left out"),
    "both-left-out": left_out("GPU and network left out"),
    "later-rows": left_out("mini-batches of 16 to 1,280, all"),
    "host-bound": host_bound,
    "many-gpus": many_gpus,
    "many-gpus-later": many_gpus_later,
    "carried-over": carried_over,
    "lab-allreduce": lab_allreduce,
    "lab-small": lab_small,
    "lab-steps": lab_steps,
    "lab-bytes": lab_bytes,
    "lab-four": lab_four,
}


def how_checked(claim: Claim) -> str:
    """How a reader, or this script, can check the claim without running its command again."""
    if claim.id in CHECKS:
        return "computed again from the source"
    if claim.source.endswith(".md"):
        return "the figures stand on the page"
    if claim.source.endswith(".py"):
        return "by the test itself"
    return "only by its command: nothing was kept"


def wrong_claims(claims: tuple[Claim, ...], root: Path = ROOT) -> Iterator[str]:
    """One sentence for every figure that its source does not bear out."""
    for claim in claims:
        for script in SCRIPT.findall(claim.command):
            if not (root / script).is_file():
                yield f"{claim.id}: its command names {script}, which is not there"
        if claim.source and not (root / claim.source).exists():
            yield f"{claim.id}: there is no {claim.source}"
        elif claim.id in CHECKS:
            for text in CHECKS[claim.id](root):
                if text not in claim.value:
                    yield f"{claim.id}: {claim.source} says {text!r}, the claim {claim.value!r}"
        elif claim.source.endswith(".md"):
            page = numbers((root / claim.source).read_text(encoding="utf-8"))
            for number in numbers(claim.value) - page:
                yield f"{claim.id}: {number} does not stand in {claim.source}"


def numbers(text: str) -> set[str]:
    """Every number in the text, as written, but for its sign."""
    return {match.group().rstrip(",") for match in NUMBER.finditer(text)}


def wrong_pages(claims: tuple[Claim, ...], pages: tuple[Page, ...], root: Path = ROOT) -> Iterator[str]:
    """One sentence for every figure of the README and of docs/ that neither a claim nor its page accounts for."""
    listed = {page.page for page in pages}
    for page in pages:
        if not (root / page.page).is_file():
            yield f"{page.page} is listed and not there"
        for script in SCRIPT.findall(page.command):
            if not (root / script).is_file():
                yield f"{page.page}: its command names {script}, which is not there"
    yield from wrong_quotes((root / "README.md").read_text(encoding="utf-8"), claims)
    made = {f"docs/{name}.md" for name in TABLES}
    for path in sorted((root / "docs").glob("*.md")):
        name = path.relative_to(root).as_posix()
        if name not in listed | made:
            for problem in wrong_quotes(path.read_text(encoding="utf-8"), claims, only_quantities=True):
                yield f"{name}: {problem}"


def wrong_quotes(page: str, claims: tuple[Claim, ...], *, only_quantities: bool = False) -> Iterator[str]:
    """One sentence for every paragraph or row that quotes a measured figure without a claim, or a number not in it.

    Code and quoted text are no claims of ours, and "90 % interval" says what an interval is. With `only_quantities`
    a paragraph may have other numbers beside the measured ones.
    """
    known = {claim.id: claim for claim in claims}
    text = re.sub(r"^```.*?^```", "", page, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"`[^`\n]*`|\"[^\"\n]*\"|90 %\s+intervals?", "", text)
    for block in re.split(r"\n\s*\n|\n(?=[|*-])", text):
        ids = re.findall(r"accuracy\.md#([\w-]+)", block)
        shown = re.sub(r"\]\([^)]*\)", "]", block)
        quantities = {number for found in QUANTITY.findall(shown) for number in numbers(found)}
        if not ids and not quantities:
            continue
        if not ids:
            yield f"no claim is linked by: {' '.join(block.split())[:100]!r}"
        elif unknown := [name for name in ids if name not in known]:
            yield f"no claim is called {unknown[0]!r}"
        else:
            said = numbers(" ".join(known[name].claim + " " + known[name].value for name in ids))
            for number in sorted((quantities if only_quantities else numbers(shown)) - said):
                yield f"{number} stands in no claim that this links: {' '.join(block.split())[:100]!r}"


def accuracy_table(claims: tuple[Claim, ...]) -> str:
    """Claims by area: what was measured, and by which command."""
    text = ""
    for area in dict.fromkeys(claim.area for claim in claims):
        text += f"\n## {area}\n\n| claim | value | goal | command | machine | date |\n|---|---|---|---|---|---|\n"
        for c in claims:
            if c.area == area:
                anchor = f'<a id="{c.id}"></a>{c.claim}'
                text += f"| {anchor} | {c.value} | {c.goal or '–'} | `{c.command}` | {c.machine} | {c.date} |\n"
    return text


def evidence_table(claims: tuple[Claim, ...]) -> str:
    """Claims with their sources, and the pages whose figures are none."""
    text = "\n| claim | value | source | command | machine | date | how it is checked | seen before it was fixed |\n"
    text += "|---|---|---|---|---|---|---|---|\n"
    for c in claims:
        source = f"`{c.source}`" if c.source else "–"
        made = f"`{c.command}` | {c.machine} | {c.date} | {how_checked(c)} | {c.seen or 'nothing'}"
        text += f"| [{c.id}](accuracy.md#{c.id}) | {c.value} | {source} | {made} |\n"
    text += (
        "\n| page | its figures | command | machine | date | seen before they were fixed |\n|---|---|---|---|---|---|\n"
    )
    for p in read_pages():
        text += f"| `{p.page}` | {p.figures} | `{p.command}` | {p.machine} | {p.date} | {p.seen or 'nothing'} |\n"
    return text


TABLES = {"accuracy": accuracy_table, "evidence": evidence_table}


def filled(page: str, claims: tuple[Claim, ...]) -> str:
    """The page with its table made anew."""
    return BLOCK.sub(lambda m: f"{m.group(1)}{TABLES[m.group(2)](claims)}\n{m.group(3)}", page)


def main(argv: list[str] | None = None) -> int:
    """Check, and with --write fill the pages; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="fill the tables of docs/accuracy.md and docs/evidence.md")
    arguments = parser.parse_args(argv)
    claims = read_claims()
    wrong = [*wrong_claims(claims), *wrong_pages(claims, read_pages())]
    for name in TABLES:
        path = ROOT / "docs" / f"{name}.md"
        page = path.read_text(encoding="utf-8")
        new = filled(page, claims)
        if arguments.write:
            write_whole(path, new)
        elif new != page:
            wrong.append(f"docs/{name}.md is not what docs/claims.toml says: python analysis/check_claims.py --write")
    print("\n".join(wrong) if wrong else f"{len(claims)} claims agree with their sources")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
