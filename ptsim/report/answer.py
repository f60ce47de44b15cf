"""What a manager reads first: what pruning saves, on which cluster, and how sure that is — as sentences and numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import msgspec
import pandas as pd

from ptsim.answers.validate import Validation
from ptsim.costs.tiers import tier_row
from ptsim.report.frames import averaged
from ptsim.report.numbers import (
    format_bytes,
    format_grams,
    format_joules,
    format_macs,
    format_number,
    format_seconds,
    format_usd,
    percent,
    percent_range,
    upper,
)
from ptsim.trace.pairs import PACE_TOLERANCE


class Show(Protocol):
    """A number of one quantity as text (`report.numbers`), in the unit of `like`."""

    def __call__(self, value: float, like: float | None = None, /) -> str:
        """Three significant digits and the unit."""


class Tile(msgspec.Struct, frozen=True, kw_only=True):
    """One number with a name above it, its reading below, and where it comes from."""

    name: str
    value: str
    detail: str
    origin: str


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """The head of the page. `emphasis` is the part of the headline that is set in bold; `why` explains the saving."""

    before: str
    emphasis: str
    after: str
    tiles: tuple[Tile, ...]
    certainty: str
    notices: tuple[str, ...]
    why: tuple[str, ...] = ()

    @property
    def headline(self) -> str:
        """The whole sentence."""
        return f"{self.before}{self.emphasis}{self.after}"


def answer_frame(answer: Answer) -> pd.DataFrame:
    """The numbers of the head as they stand on the page: one row a number, the sentences among them."""
    rows = [{"name": "headline", "value": answer.headline, "detail": "", "origin": ""}]
    rows += [{"name": t.name, "value": t.value, "detail": t.detail, "origin": t.origin} for t in answer.tiles]
    rows.append({"name": "how sure", "value": answer.certainty, "detail": "", "origin": ""})
    rows += [{"name": "why", "value": reason, "detail": "", "origin": ""} for reason in answer.why]
    return pd.DataFrame(rows)


def checked(validation: Validation | None, unchecked: str) -> str:
    """What predicting the recorded runs themselves adds to how sure a projection is; `unchecked` is why it cannot."""
    if validation is None:
        return f" {unchecked}" if unchecked else ""
    points = validation.saving_error_points
    return (
        " On the machine that recorded the runs, the same method is wrong by "
        f"{percent(validation.epoch_mape)} per epoch on average"
        + (f", and by {points:.1f} points for the saving." if points is not None else ".")
    )


def projected_answer(
    savings: pd.DataFrame,
    runs: pd.DataFrame,
    gpus: int,
    validation: Validation | None,
    notices: Sequence[str],
    *,
    measured: pd.DataFrame,
    excess: pd.DataFrame,
    unchecked: str = "",
) -> Answer:
    """The answer for `gpus` GPUs: the pruned setting that takes the least time there.

    Args:
        savings: `projected.savings_frame`; repeats of a setting are averaged.
        runs: `frames.runs_frame`.
        gpus: one of the sizes in `savings`.
        validation: of the runs themselves.
        notices: what a reader must know first.
        measured: `frames.measured_savings_frame`.
        excess: `projected.excess_frame` of that setting.
        unchecked: why there is no validation.
    """
    best = fastest(savings, gpus)
    run = runs[runs.run == best.run].iloc[0]
    settings = candidates(savings, gpus).setting.nunique()
    name = best.setting if settings > 1 else "pruning while training"
    emphasis, rest = _verdict(best)
    origin = f"projected{_of_planned(run)}; times: {tier_row(best.tier).label}"
    tiles = [
        *_saving_tiles(best, origin),
        *_quality_tiles(run, best),
        *_measured_tiles(measured, best.setting),
        *_bytes_tiles(best, gpus),
    ]
    return Answer(
        before=f"{_planned(run)}Training {run.model} on {run.dataset} with {gpus:,} × {best.device} ({best.cluster}): "
        f"{name} ",
        emphasis=emphasis,
        after=rest + _accuracy(best) + ".",
        tiles=tuple(tiles),
        certainty=_certainty(best, settings)
        + checked(validation, unchecked)
        + _repeats(best, run)
        + _batch_caveat(run, gpus, int(best.first_batch_per_gpu)),
        notices=tuple(notices),
        why=tuple(why(excess)) if not excess.empty else (),
    )


def candidates(savings: pd.DataFrame, gpus: int) -> pd.DataFrame:
    """The comparisons that the head chooses from on `gpus` GPUs: those that shrank while they trained, if any did.

    A run that is pruned at its end can only save at inference.
    """
    rows = savings[savings.gpus == gpus]
    return rows[rows.shrank] if rows.shrank.any() else rows


def fastest(savings: pd.DataFrame, gpus: int) -> pd.Series:
    """The pruned setting that takes the least time on `gpus` GPUs, its repeats averaged."""
    return averaged(candidates(savings, gpus), ["setting"]).sort_values("pruned_seconds").iloc[0]


def _planned(run: pd.Series) -> str:
    return "Planned, not trained. " if run.origin == "planned" else ""


def _of_planned(run: pd.Series) -> str:
    return " from a planned run" if run.origin == "planned" else ""


_OPEN = 0.0005  # shares of the dense time that are no difference on the page


def _is_open(best: pd.Series) -> bool:
    return bool(best.saved_fraction_low <= 0 <= best.saved_fraction_high and abs(best.saved_fraction) >= _OPEN)


def _verdict(best: pd.Series) -> tuple[str, str]:
    """What to set in bold, and what follows: time with its interval, then money with its own."""
    like = _unit(best, "seconds")
    dense = format_seconds(best.dense_seconds)
    if abs(best.saved_fraction) < _OPEN:
        return f"takes as long as dense training, {dense}", ""
    saves = best.saved_fraction > 0
    share = percent(abs(best.saved_fraction))
    interval = _interval(best, "seconds", format_seconds)
    if saves:
        text = f"saves {format_seconds(best.saved_seconds, like)} of {dense}"
    else:
        text = f"takes {format_seconds(-best.saved_seconds, like)} longer than the {dense} of dense training"
    rest = f" ({share}; {interval})"
    if pd.notna(best.get("saved_usd")):
        money = _interval(best, "usd", format_usd)
        rest += f" and {'saves' if saves else 'costs'} {format_usd(abs(best.saved_usd), _unit(best, 'usd'))} "
        rest += f"{'of' if saves else 'on top of'} {format_usd(best.dense_usd)} ({money})"
    return text, rest


def _accuracy(best: pd.Series) -> str:
    if pd.isna(best.get("accuracy_change")):
        return ""
    return f"; validation accuracy {100 * best.pruned_accuracy:.1f} % instead of {100 * best.dense_accuracy:.1f} %"


def _certainty(best: pd.Series, settings: int) -> str:
    word = "saving" if best.saved_fraction > 0 else "loss"
    low, high = best.saved_fraction_low, best.saved_fraction_high
    if best.saved_fraction < 0:
        low, high = -high, -low
    return (
        f"In 9 of 10 such comparisons the {word} lies between {percent_range(low, high)} of the dense time"
        + (f": whether there is a {word} at all is open. " if _is_open(best) else ". ")
        + upper(tier_row(best.tier).explanation)
        + "."
        + (
            f" Of {settings} settings that shrink in training, the fastest there is shown: {best.setting}."
            if settings > 1
            else ""
        )
    )


def _repeats(best: pd.Series, run: pd.Series) -> str:
    if best.num_runs > 1:
        return f" Means of {best.num_runs} runs of this setting; the interval is the widest of them."
    if run.stretched:
        return " Nobody has trained it at this length: that it shrinks at the same pace is assumed."
    if run.origin == "planned":
        return " Which channels would go, and with what accuracy, is assumed."
    return " This setting was trained once: how much another seed would differ is not part of the interval."


def _saving_tiles(best: pd.Series, origin: str) -> Iterator[Tile]:
    """What is saved of time, and of money, energy and CO₂ where they are known."""
    changing = best.saved_reconfiguration_seconds
    surgery = ""
    if abs(changing) > 0.1 * abs(best.saved_seconds):
        surgery = f"; starting and reconfiguring {'cost' if changing < 0 else 'save'} {format_seconds(abs(changing))}"
    yield _saving_tile(best, "Time", "seconds", format_seconds, origin, after=surgery)
    if pd.notna(best.get("saved_usd")):
        price = f" at {best.price_usd_per_gpu_hour:.2f} USD per GPU-hour"
        yield _saving_tile(best, "Money", "usd", format_usd, origin, where=price)
    if pd.notna(best.get("saved_joules")):
        yield _saving_tile(best, "Energy", "joules", format_joules, origin, where=", GPU boards")
    if pd.notna(best.get("saved_co2_grams")):
        grid = f" at {best.grid_grams_per_kwh:g} g per kWh"
        yield _saving_tile(best, "CO\u2082", "co2_grams", format_grams, origin, where=grid)


def _saving_tile(
    best: pd.Series,
    what: str,
    quantity: str,
    show: Show,
    origin: str,
    *,
    where: str = "",
    after: str = "",
) -> Tile:
    """The saving of one quantity, by the name that the columns of `projected.savings_frame` have for it."""
    saved, dense, pruned = (best[f"{which}_{quantity}"] for which in ("saved", "dense", "pruned"))
    return Tile(
        name=f"{what} {'saved' if saved >= 0 else 'lost'}",
        value=show(abs(saved), _unit(best, quantity)),
        detail=f"{show(pruned, dense)} instead of {show(dense)}{where}; {_interval(best, quantity, show)}{after}",
        origin=origin,
    )


_SMALL = 0.05  # a smaller share of the dense run has a unit of its own


def _unit(best: pd.Series, quantity: str) -> float:
    """The amount whose unit a saving and its interval have: the dense run's, or their own where they are small."""
    dense = best[f"dense_{quantity}"]
    largest = best[[f"saved_{quantity}", f"saved_{quantity}_low", f"saved_{quantity}_high"]].abs().max()
    return float(dense if largest >= _SMALL * dense else largest)


def _interval(best: pd.Series, quantity: str, show: Show) -> str:
    saved, low, high = (best[f"saved_{quantity}{end}"] for end in ("", "_low", "_high"))
    return _between(show, saved, low, high, _unit(best, quantity))


def _between(show: Show, value: float, low: float, high: float, like: float) -> str:
    """The 90 % interval of a saving, or of a loss, in words, in the unit of `like`; or that there is none."""
    if pd.isna(low) or pd.isna(high):
        return "no interval"
    if value < 0:
        low, high = -high, -low
    return f"90 % interval {show(low, like)} to {show(high, like)}"


def _measured_tiles(measured: pd.DataFrame, setting: str) -> Iterator[Tile]:
    rows = measured[measured.setting == setting] if not measured.empty else measured
    if rows.empty:
        return
    row = averaged(rows, ["setting"]).iloc[0]
    detail = (
        f"of the dense time on {row.device}: {format_seconds(row.pruned_seconds, row.dense_seconds)} instead of "
        f"{format_seconds(row.dense_seconds)}, reconfigurations included"
    )
    if abs(row.time_fraction - row.own_start_fraction) > PACE_TOLERANCE / 2:
        detail += f"; {percent(row.own_start_fraction)} of what it would take at the length of its first epochs"
    yield Tile(
        name="Time where it was recorded",
        value=percent(row.time_fraction),
        detail=detail,
        origin=f"measured, {row.num_runs} {'pair' if row.num_runs == 1 else 'pairs'} of runs; no interval",
    )


def _bytes_tiles(best: pd.Series, gpus: int) -> Iterator[Tile]:
    if gpus > 1 and best.dense_allreduce_bytes_per_gpu > 0:
        yield Tile(
            name="All-reduced bytes per GPU",
            value=percent(best.pruned_allreduce_bytes_per_gpu / best.dense_allreduce_bytes_per_gpu),
            detail=f"of dense: {format_bytes(best.pruned_allreduce_bytes_per_gpu, best.dense_allreduce_bytes_per_gpu)} "
            f"instead of {format_bytes(best.dense_allreduce_bytes_per_gpu)} over the run",
            origin="counted",
        )


_LEAST_GAP, _LEAST_SHARE, _FLOOR = 0.03, 0.15, 0.3


def why(excess: pd.DataFrame) -> Iterator[str]:
    """Why time does not shrink as the MACs do, the weightiest reasons first. Takes `projected.excess_frame`."""
    macs = float(excess.macs_fraction.iloc[0])
    pruned_s, dense_s = excess.pruned_seconds.sum(), excess.dense_seconds.sum()
    lead = (
        f"The pruned run has {percent(macs)} of the training MACs and takes {percent(pruned_s / dense_s)} of the time"
    )
    if pruned_s / dense_s - macs < _LEAST_GAP:
        yield f"{lead}: here time follows the MACs."
        return
    yield f"{lead}."
    total = excess.excess_seconds.clip(lower=0).sum()
    floor = float(excess.floor_fraction.iloc[0])
    for row in excess.sort_values("excess_seconds", ascending=False).to_dict("records"):
        if row["excess_seconds"] < _LEAST_SHARE * total:
            break
        left = percent(row["pruned_seconds"] / row["dense_seconds"]) if row["dense_seconds"] > 0 else "more than all"
        reasons = _REASONS | _LAUNCH_REASONS if floor >= _FLOOR else _REASONS
        yield reasons[row["part"]].format(share=percent(row["pruned_seconds"] / pruned_s), left=left)
    if floor >= _FLOOR:
        yield (
            f"Launch-bound: a pruned step on a single image would take {percent(min(floor, 1.0))} of the time of "
            "the whole mini-batch. That much is launches and the least times of kernels, which no pruning shortens."
        )


# What keeps a part of the time from shrinking with the MACs. {share}: of the pruned run; {left}: of its dense time.
_REASONS = {
    "loss and host gaps": "Host-bound: for {share} of the pruned run the GPU waits for the host, which launches a "
    "narrow layer no faster than a wide one. A larger mini-batch, CUDA graphs or compilation shorten that; pruning "
    "does not.",
    "convolutions and linear layers": "Convolutions and linear layers take {left} of their dense time: with few "
    "channels, tiles and waves of the GPU's multipliers stay partly empty.",
    "memory-bound layers": "Memory-bound layers (BatchNorm, activations, sums) take {left} of their dense time: they "
    "move bytes, and bytes shrink with the channels, not with their square.",
    "optimizer and regulariser": "The group lasso's gradient and the update take {share} of the pruned run.",
    "exposed communication": "Exposed communication takes {left} of its dense time: small messages cost latency, not "
    "bandwidth.",
    "input wait": "Waiting for input takes {share} of the pruned run: data arrive no faster for a smaller network.",
    "start and reconfiguration": "Starting and reconfiguring take {share} of the pruned run; a dense run starts once.",
    "other": "Waiting for stragglers takes {share} of the pruned run.",
}

# The same where launches and the least times of kernels make up much of a step.
_LAUNCH_REASONS = {
    "convolutions and linear layers": "Convolutions and linear layers take {left} of their dense time: their kernels "
    "are so short that their least times count.",
    "memory-bound layers": "Memory-bound layers (BatchNorm, activations, sums) take {left} of their dense time: their "
    "kernels are so short that their least times count, whatever they move.",
}


def dense_answer(
    projections: pd.DataFrame,
    runs: pd.DataFrame,
    gpus: int,
    validation: Validation | None,
    notices: Sequence[str],
    *,
    unchecked: str = "",
) -> Answer:
    """The answer where nothing was pruned: what training takes on `gpus` GPUs; `unchecked`: why without validation."""
    row = averaged(projections[projections.gpus == gpus], ["setting"]).sort_values("total_seconds").iloc[0]
    run = runs[runs.run == row.run].iloc[0]
    origin = f"projected{_of_planned(run)}; times: {tier_row(row.tier).label}"
    tiles = [
        Tile(
            name="GPU time",
            value=f"{format_number(row.total_seconds * gpus / 3600)} GPU-h",
            detail=f"{gpus:,} GPUs for {format_seconds(row.total_seconds)}" if gpus > 1 else "one GPU",
            origin=origin,
        )
    ]
    quantities: tuple[tuple[str, str, str, Show], ...] = (
        ("Money", "cost_usd", "for the whole run", format_usd),
        ("Energy", "energy_joules", "all GPU boards, whole run", format_joules),
        ("CO\u2082", "co2_grams", "all GPU boards, whole run", format_grams),
    )
    for name, column, detail, show in quantities:
        if pd.notna(row.get(column)):
            interval = _between(show, row[column], row[f"low_{column}"], row[f"high_{column}"], row[column])
            tiles.append(Tile(name=name, value=show(row[column]), detail=f"{detail}; {interval}", origin=origin))
    if pd.notna(run.final_accuracy):
        tiles.append(
            Tile(
                name="Validation accuracy",
                value=f"{100 * run.final_accuracy:.1f} %",
                detail="of the recorded run",
                origin="measured, 1 run",
            )
        )
    interval = _between(format_seconds, row.total_seconds, row.low_seconds, row.high_seconds, row.total_seconds)
    return Answer(
        before=f"{_planned(run)}Training {run.model} on {run.dataset} with {gpus:,} × {row.device} ({row.cluster}) ",
        emphasis=f"takes {format_seconds(row.total_seconds)}",
        after=f" ({interval}). No pruned run was given, so there is no saving to report.",
        tiles=tuple(tiles),
        certainty=f"In 9 of 10 such projections the time lies in its interval. {upper(tier_row(row.tier).explanation)}."
        + checked(validation, unchecked)
        + _batch_caveat(run, gpus, int(row.first_batch_per_gpu)),
        notices=tuple(notices),
    )


def recorded_answer(runs: pd.DataFrame, notices: Sequence[str]) -> Answer:
    """The answer where nothing can be projected: what was recorded."""
    run = runs.iloc[0]
    seconds = run.measured_seconds
    return Answer(
        before=f"{run.model} on {run.dataset} was trained on {run.device} for ",
        emphasis=format_seconds(seconds) if pd.notna(seconds) else "less than an epoch",
        after=".",
        tiles=(),
        certainty="",
        notices=tuple(notices),
    )


def _batch_caveat(run: pd.Series, gpus: int, batch_per_gpu: int) -> str:
    """What the recorded accuracy does not cover: updates of another size."""
    recorded, here = int(run.num_gpus * run.first_batch_per_gpu), gpus * batch_per_gpu
    if recorded == here or pd.isna(run.final_accuracy):
        return ""
    return (
        f" The accuracy is that of the recorded run, whose updates took {recorded:,} images at first; here they take "
        f"{here:,}, and no run has shown what accuracy that gives."
    )


def _quality_tiles(run: pd.Series, best: pd.Series) -> Iterator[Tile]:
    runs = f"measured, {best.num_runs} {'run' if best.num_runs == 1 else 'runs'}"
    if pd.notna(best.get("accuracy_change")):
        yield Tile(
            name="Validation accuracy",
            value=f"{100 * best.pruned_accuracy:.1f} %",
            detail=f"{100 * best.accuracy_change:+.1f} points against dense".replace("-", "\u2212"),
            origin=runs,
        )
    elif pd.notna(run.final_accuracy):
        yield Tile(
            name="Validation accuracy",
            value=f"{100 * run.final_accuracy:.1f} %",
            detail="no dense run was recorded to compare with",
            origin=runs,
        )
    before = "" if run.judged else "; the accuracy is that of the network before its last pruning"
    yield Tile(
        name="Inference cost of the result",
        value=percent(run.last_inference_macs_per_image / run.first_inference_macs_per_image),
        detail=f"of dense: {format_macs(run.last_inference_macs_per_image, run.first_inference_macs_per_image)} "
        f"instead of {format_macs(run.first_inference_macs_per_image)} per image{before}",
        origin="counted",
    )
