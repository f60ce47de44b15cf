"""What a manager reads first: what pruning saves, on which cluster, and how sure that is — as sentences and numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec
import pandas as pd

from ptsim.answers.validate import Validation
from ptsim.costs.tiers import tier_row
from ptsim.report import causes
from ptsim.report.frames import averaged
from ptsim.trace.pairs import PACE_TOLERANCE
from ptsim.units import counted, format_bytes, format_quantity, format_seconds, percent


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
        + (f", and by {format_quantity('points', points)} for the saving." if points is not None else ".")
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
    """The answer for `gpus` GPUs: the pruned setting whose epochs take the least time there.

    Args:
        savings: `projected.savings_frame`; repeats of a setting are averaged.
        runs: `frames.runs_frame`.
        gpus: one of the sizes in `savings`.
        validation: of the runs themselves.
        notices: what a reader must know first.
        measured: `frames.measured_savings_frame`.
        excess: `causes.excess_frame` of that setting.
        unchecked: why there is no validation.
    """
    best = fastest(savings, gpus)
    run = runs[runs.run == best.run].iloc[0]
    settings = candidates(savings, gpus).setting.nunique()
    name = "pruning while training" if settings == 1 and best.shrank else f"“{best.setting}”"
    emphasis, rest = _verdict(best)
    origin = f"projected{_of_planned(run)}; times: {tier_row(best.tier).label}"
    by_count = f"counted{_of_planned(run)}"
    tiles = [
        *_saving_tiles(best, origin),
        *_quality_tiles(runs, best, by_count),
        *_measured_tiles(measured, best.setting),
        *_bytes_tiles(best, gpus, by_count),
    ]
    return Answer(
        before=f"{_task(run, best.epochs)} with {gpus:,} × {best.device} ({best.cluster}): {name} ",
        emphasis=emphasis,
        after=rest + _accuracy(best) + ".",
        tiles=tuple(tiles),
        certainty=_certainty(best, settings)
        + checked(validation, unchecked)
        + _repeats(best, run)
        + _batch_caveat(run, gpus, int(best.first_batch_per_gpu)),
        notices=tuple(notices),
        why=tuple(_why(excess, best)) if not excess.empty else (),
    )


def candidates(savings: pd.DataFrame, gpus: int) -> pd.DataFrame:
    """The comparisons that the head chooses from on `gpus` GPUs: of the first task on the page.

    Those that shrank while they trained, if any did; a run that is pruned at its end can only save at inference.
    """
    rows = _first_task(savings, gpus)
    return rows[rows.shrank] if rows.shrank.any() else rows


def _first_task(rows: pd.DataFrame, gpus: int) -> pd.DataFrame:
    """Those on `gpus` GPUs of the task that comes first on the page."""
    found: pd.DataFrame = rows[(rows.gpus == gpus) & (rows.task == rows.task.iloc[0])]
    return found


def fastest(savings: pd.DataFrame, gpus: int) -> pd.Series:
    """The pruned setting whose epochs take the least time on `gpus` GPUs, its repeats averaged."""
    return _quickest(candidates(savings, gpus), "pruned_seconds")


def _quickest(rows: pd.DataFrame, seconds: str) -> pd.Series:
    """The setting with the least time an epoch: a run that was stopped early is no quicker for that."""
    settings = averaged(rows, ["setting"])
    return settings.iloc[int((settings[seconds] / settings.epochs).argmin())]


def _task(run: pd.Series, epochs: float) -> str:
    planned = "Planned, not trained. " if run.origin == "planned" else ""
    return f"{planned}Training {run.model} on {run.dataset} for {counted(int(epochs), 'epoch')}"


def _of_planned(run: pd.Series) -> str:
    return " from a planned run" if run.origin == "planned" else ""


_OPEN = 0.0005  # shares of the dense time that are no difference on the page


def _verdict(best: pd.Series) -> tuple[str, str]:
    """What to set in bold, and what follows: time with its interval, then money with its own."""
    like = _unit(best, "seconds")
    dense = format_seconds(best.dense_seconds)
    interval = _interval(best, "seconds")
    if abs(best.saved_fraction) < _OPEN:
        return f"takes as long as dense training, {dense}", f" ({interval})"
    saves = best.saved_fraction > 0
    if saves:
        text = f"saves {format_seconds(best.saved_seconds, like)} of {dense}"
    else:
        text = f"takes {format_seconds(-best.saved_seconds, like)} longer than the {dense} of dense training"
    rest = f" ({percent(abs(best.saved_fraction))}; {interval})"
    if pd.notna(best.get("saved_usd")) and best.dense_usd > 0:
        money = format_quantity("usd", abs(best.saved_usd))
        rest += f" and {'saves' if saves else 'costs'} {money} {'of' if saves else 'on top of'} "
        rest += f"{format_quantity('usd', best.dense_usd)} ({_interval(best, 'usd')})"
    return text, rest


def _accuracy(best: pd.Series) -> str:
    if pd.isna(best.get("accuracy_change")):
        return ""
    return f"; validation accuracy {percent(best.pruned_accuracy)} instead of {percent(best.dense_accuracy)}"


def _certainty(best: pd.Series, settings: int) -> str:
    low, high = best.saved_fraction_low, best.saved_fraction_high
    if low < 0 < high:
        text = (
            f"In 9 of 10 such comparisons the result lies between a loss of {percent(-low)} and a saving of "
            f"{percent(high)} of the dense time: whether pruning saves time here is open. "
        )
    else:
        ends = sorted((abs(low), abs(high)))
        text = (
            f"In 9 of 10 such comparisons the {'saving' if high > 0 else 'loss'} lies between {percent(ends[0])} and "
            f"{percent(ends[1])} of the dense time. "
        )
    text += upper(tier_row(best.tier).explanation) + "."
    if settings > 1:
        text += (
            f" Of {settings} settings that shrink in training, the fastest on this cluster is shown: {best.setting}."
        )
    return text


def upper(sentence: str) -> str:
    """The sentence with a capital first letter; the rest stays."""
    return sentence[:1].upper() + sentence[1:]


def _repeats(best: pd.Series, run: pd.Series) -> str:
    if best.num_runs > 1:
        return f" Means of {best.num_runs} runs of this setting; the interval is the widest of them."
    if run.stretched:
        return " It is assumed that every network keeps its share of the run at this length."
    if run.origin == "planned":
        return " Which channels would go is assumed, and with what accuracy is not known."
    return " This setting was trained once: how much another seed would differ is not part of the interval."


def _saving_tiles(best: pd.Series, origin: str) -> Iterator[Tile]:
    """What is saved of time, and of money, energy and CO₂ where they are known."""
    changing = best.saved_reconfiguration_seconds
    surgery = ""
    if abs(changing) > 0.1 * abs(best.saved_seconds):
        more = "longer" if changing < 0 else "less"
        surgery = f"; starting and reconfiguring take {format_seconds(abs(changing))} {more}"
    yield _saving_tile(best, "Time", "seconds", origin, after=surgery)
    if pd.notna(best.get("saved_usd")):
        yield _saving_tile(best, "Money", "usd", origin, where=f" at {best.price}")
    if pd.notna(best.get("saved_joules")):
        yield _saving_tile(best, "Energy", "joules", origin, where=", GPU boards")
    if pd.notna(best.get("saved_co2_grams")):
        grid = f" at {best.grid_grams_per_kwh:g} g per kWh"
        yield _saving_tile(best, "CO\u2082", "co2_grams", origin, where=grid)


def _saving_tile(best: pd.Series, what: str, column: str, origin: str, *, where: str = "", after: str = "") -> Tile:
    """The saving of one quantity, by the name that the columns of `projected.savings_frame` have for it."""
    quantity = column.rpartition("_")[2]
    saved, dense, pruned = (best[f"{which}_{column}"] for which in ("saved", "dense", "pruned"))
    return Tile(
        name=f"{what} {'saved' if saved >= 0 else 'lost'}",
        value=format_quantity(quantity, abs(saved), _unit(best, column)),
        detail=f"{format_quantity(quantity, pruned, dense)} instead of {format_quantity(quantity, dense)}{where}; "
        f"{_interval(best, column)}{after}",
        origin=origin,
    )


_SMALL = 0.1  # a smaller share of the dense run has a unit of its own


def _unit(best: pd.Series, column: str) -> float:
    """The amount whose unit a saving and its interval have: the dense run's, or their own where they are small."""
    dense = best[f"dense_{column}"]
    largest = best[[f"saved_{column}", f"saved_{column}_low", f"saved_{column}_high"]].abs().max()
    return float(dense if largest >= _SMALL * dense else largest)


def _interval(best: pd.Series, column: str) -> str:
    """The 90 % interval of a saving or a loss, in the unit of `_unit`; says which end is which where it holds zero."""
    low, high = (best[f"saved_{column}{end}"] for end in ("_low", "_high"))
    quantity, like = column.rpartition("_")[2], _unit(best, column)
    if pd.isna(low) or pd.isna(high):
        return "no interval"
    ends = [format_quantity(quantity, abs(end), like) for end in (low, high)]
    if low < 0 < high:
        return f"90 % interval from {ends[0]} lost to {ends[1]} saved"
    return f"90 % interval {' to '.join(ends if high > 0 else reversed(ends))}"


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
        own = percent(row.own_start_fraction)
        detail += f"; {own} of what it would have taken if every epoch had been as long as its first, unpruned ones"
    yield Tile(
        name="Time where it was recorded",
        value=percent(row.time_fraction),
        detail=detail,
        origin=f"measured, {counted(row.num_runs, 'pair')} of runs; no interval",
    )


def _bytes_tiles(best: pd.Series, gpus: int, origin: str) -> Iterator[Tile]:
    if gpus > 1 and best.dense_allreduce_bytes_per_gpu > 0:
        yield Tile(
            name="All-reduced bytes per GPU",
            value=percent(best.pruned_allreduce_bytes_per_gpu / best.dense_allreduce_bytes_per_gpu),
            detail=f"of dense: {format_bytes(best.pruned_allreduce_bytes_per_gpu, best.dense_allreduce_bytes_per_gpu)} "
            f"instead of {format_bytes(best.dense_allreduce_bytes_per_gpu)} over the run",
            origin=origin,
        )


def _why(excess: pd.DataFrame, best: pd.Series) -> Iterator[str]:
    """`causes.why` of the shown run; where the head averages repeats, the first sentence says which of them this is."""
    reasons = causes.why(excess)
    if best.num_runs > 1:
        yield f"Of the {best.num_runs} runs, “{best.run}” is looked into here. {next(reasons)}"
    yield from reasons


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
    row = _quickest(_first_task(projections, gpus), "total_seconds")
    run = runs[runs.run == row.run].iloc[0]
    origin = f"projected{_of_planned(run)}; times: {tier_row(row.tier).label}"
    tiles = [
        Tile(
            name="GPU time",
            value=_gpu_time(row.total_seconds * gpus),
            detail=f"{gpus:,} GPUs for {format_seconds(row.total_seconds)}" if gpus > 1 else "one GPU",
            origin=origin,
        )
    ]
    quantities = (
        ("Money", "cost_usd", f"for the whole run at {row.price}"),
        ("Energy", "energy_joules", "all GPU boards, whole run"),
        ("CO\u2082", "co2_grams", "all GPU boards, whole run"),
    )
    for name, column, detail in quantities:
        if pd.notna(row.get(column)):
            value = format_quantity(column.rpartition("_")[2], row[column])
            tiles.append(Tile(name=name, value=value, detail=f"{detail}; {_ends(row, column)}", origin=origin))
    if pd.notna(row.accuracy):
        which = counted(row.num_runs, "run")
        detail = "of the recorded runs, mean" if row.num_runs > 1 else "of the recorded run"
        tiles.append(
            Tile(name="Validation accuracy", value=percent(row.accuracy), detail=detail, origin=f"measured, {which}")
        )
    return Answer(
        before=f"{_task(run, row.epochs)} with {gpus:,} × {row.device} ({row.cluster}) ",
        emphasis=f"takes {format_seconds(row.total_seconds)}",
        after=f" ({_ends(row, 'seconds', 'total_seconds')}). No pruned run was given, so there is no saving to report.",
        tiles=tuple(tiles),
        certainty=f"In 9 of 10 such projections the time lies in its interval. {upper(tier_row(row.tier).explanation)}."
        + checked(validation, unchecked)
        + _batch_caveat(run, gpus, int(row.first_batch_per_gpu)),
        notices=tuple(notices),
    )


def _gpu_time(seconds: float) -> str:
    number, unit = format_seconds(seconds).split(" ")
    return f"{number} GPU-{unit}"


def _ends(row: pd.Series, column: str, shown: str | None = None) -> str:
    """The 90 % interval of a projected quantity, in the unit of the quantity itself."""
    low, high, like = row[f"low_{column}"], row[f"high_{column}"], row[shown or column]
    if pd.isna(low) or pd.isna(high):
        return "no interval"
    quantity = column.rpartition("_")[2]
    return f"90 % interval {format_quantity(quantity, low, like)} to {format_quantity(quantity, high, like)}"


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


def _quality_tiles(runs: pd.DataFrame, best: pd.Series, origin: str) -> Iterator[Tile]:
    """Accuracy and inference cost of what training gives: means over the repeats of the setting."""
    rows = runs[runs.setting == best.setting]
    measured = f"measured, {counted(best.num_runs, 'run')}"
    if pd.notna(best.get("pruned_accuracy")):
        detail = "no dense run was recorded to compare with"
        if pd.notna(best.accuracy_change):
            change = format_quantity("points", 100 * abs(best.accuracy_change))
            detail = f"{change} {'above' if best.accuracy_change >= 0 else 'below'} dense"
        yield Tile(name="Validation accuracy", value=percent(best.pruned_accuracy), detail=detail, origin=measured)
    first, last = best.first_inference_macs_per_image, best.last_inference_macs_per_image
    before = "" if rows.judged.all() else "; the accuracy is that of the network before its last pruning"
    yield Tile(
        name="Inference cost of the result",
        value=percent(last / first),
        detail=f"of dense: {format_quantity('macs', last, first)} instead of {format_quantity('macs', first)} per "
        f"image{before}",
        origin=origin,
    )
