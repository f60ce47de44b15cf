"""What a manager reads first: what pruning saves, on which cluster, and how sure that is — as sentences and numbers."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import pandas as pd

from ptsim import units
from ptsim.validation import Validation


class Tile(msgspec.Struct, frozen=True, kw_only=True):
    """One number with a name above it and its reading below."""

    name: str
    value: str
    detail: str


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """The head of the page. `emphasis` is the part of the headline that is set in bold."""

    before: str
    emphasis: str
    after: str
    tiles: tuple[Tile, ...]
    certainty: str
    notices: tuple[str, ...]

    @property
    def headline(self) -> str:
        """The whole sentence."""
        return f"{self.before}{self.emphasis}{self.after}"


TIER_WORDS = {
    "measured": "layer times were measured on this very device, architecture and mini-batch",
    "profiled": "layer times are interpolated in a device profile of this GPU",
    "scaled": "layer times were measured on another device and carried over by the ratio of times predicted for both",
    "datasheet": "nothing was measured on this device: times come from its data sheet and fitted efficiency curves",
}


def checked(validation: Validation | None) -> str:
    """What the validation of the runs themselves adds to how sure a projection is."""
    if validation is None:
        return " Predictions could not be checked on these runs."
    points = validation.saving_error_points
    return (
        f" Checked on the recording machine, epochs are predicted within {_percent(validation.epoch_mape)} on average"
        + (f" and the saving within {points:.1f} points." if points is not None else ".")
    )


def projected_answer(
    savings: pd.DataFrame, runs: pd.DataFrame, gpus: int, validation: Validation | None, notices: Sequence[str]
) -> Answer:
    """The answer for `gpus` GPUs from `frames.savings_frame`: the pruned run that takes the least time there."""
    rows = savings[savings.gpus == gpus]
    best = rows.sort_values("pruned_seconds").iloc[0]
    run = runs[runs.run == best.run].iloc[0]
    machine = f"{gpus:,} × {best.device} ({best.cluster})"
    dense, pruned = format_seconds(best.dense_seconds), format_seconds(best.pruned_seconds)
    before = f"On {machine}, PruneTrain trains {run.model} on {run.dataset} in "
    after = f", {_percent(best.pruned_seconds / best.dense_seconds)} of the dense time."
    if abs(best.saved_fraction) < 0.0005:
        after = ": no difference."
    elif best.saved_fraction < 0:
        after = f": {_percent(-best.saved_fraction)} longer than dense."
    low, high = best.saved_fraction_low, best.saved_fraction_high
    open_question = low <= 0 <= high and abs(best.saved_fraction) >= 0.0005
    if open_question:
        after = f"{after[:-1]}, which the 90 % interval does not tell from no difference."
    certainty = (
        f"The 90 % interval of the saving is {_range(low, high)} of the dense time if the two projections err "
        f"independently, {_range(best.saved_fraction_alike_low, best.saved_fraction_alike_high)} if they err alike"
        + (f"; it may be no {'saving' if best.saved_fraction > 0 else 'loss'} at all. " if open_question else ". ")
        + TIER_WORDS.get(best.tier, best.tier).capitalize()
        + "."
        + checked(validation)
        + " Each setting was trained once, so the spread between seeds is not covered."
        + _batch_caveat(run, gpus, int(best.first_batch_per_gpu))
    )
    interval = best.saved_seconds_low, best.saved_seconds_high
    if best.saved_seconds < 0:
        interval = -interval[1], -interval[0]
    changing = best.saved_reconfiguration_seconds
    surgery = ""
    if abs(changing) > 0.1 * abs(best.saved_seconds):
        surgery = f"; reconfigurations {'cost' if changing < 0 else 'save'} {format_seconds(abs(changing))}"
    tiles = [
        Tile(
            name="Time saved" if best.saved_seconds >= 0 else "Time lost",
            value=format_seconds(abs(best.saved_seconds)),
            detail=f"{_percent(abs(best.saved_fraction))} of {dense}; 90 % interval "
            f"{format_seconds(interval[0])} to {format_seconds(interval[1])}" + surgery,
        )
    ]
    if pd.notna(best.get("saved_usd")):
        tiles.append(
            Tile(
                name="Money saved" if best.saved_usd >= 0 else "Money lost",
                value=_money(abs(best.saved_usd)),
                detail=f"{_money(best.dense_usd)} dense, {_money(best.pruned_usd)} pruned, at "
                f"{best.price_usd_per_gpu_hour:.2f} USD per GPU-hour",
            )
        )
    if pd.notna(best.get("saved_joules")):
        tiles.append(
            Tile(
                name="Energy saved" if best.saved_joules >= 0 else "Energy lost",
                value=format_joules(abs(best.saved_joules)),
                detail=f"{format_joules(best.dense_joules)} dense, {format_joules(best.pruned_joules)} pruned",
            )
        )
    tiles += _quality_tiles(run, best)
    if gpus > 1 and best.dense_allreduce_bytes_per_gpu > 0:
        share = best.pruned_allreduce_bytes_per_gpu / best.dense_allreduce_bytes_per_gpu
        tiles.append(
            Tile(
                name="All-reduced bytes per GPU",
                value=_percent(share),
                detail=f"of dense: {format_bytes(best.pruned_allreduce_bytes_per_gpu)} instead of "
                f"{format_bytes(best.dense_allreduce_bytes_per_gpu)} over the run",
            )
        )
    return Answer(
        before=before,
        emphasis=f"{pruned} instead of {dense}",
        after=after,
        tiles=tuple(tiles),
        certainty=certainty,
        notices=tuple(notices),
    )


def dense_answer(
    projections: pd.DataFrame, runs: pd.DataFrame, gpus: int, validation: Validation | None, notices: Sequence[str]
) -> Answer:
    """The answer where nothing was pruned: what training takes on `gpus` GPUs."""
    rows = projections[projections.gpus == gpus]
    row = rows.sort_values("total_seconds").iloc[0]
    run = runs[runs.run == row.run].iloc[0]
    tiles = [
        Tile(
            name="GPU time",
            value=f"{row.total_seconds * gpus / 3600:,.4g} GPU-h",
            detail=f"{gpus:,} GPUs for {format_seconds(row.total_seconds)}" if gpus > 1 else "one GPU",
        )
    ]
    if pd.notna(row.cost_usd):
        tiles.append(Tile(name="Money", value=_money(row.cost_usd), detail="for the whole run"))
    if pd.notna(row.energy_joules):
        tiles.append(Tile(name="Energy", value=format_joules(row.energy_joules), detail="all GPUs, whole run"))
    if pd.notna(run.final_accuracy):
        tiles.append(Tile(name="Validation accuracy", value=f"{run.final_accuracy:.1%}", detail="as recorded"))
    return Answer(
        before=f"On {gpus:,} × {row.device} ({row.cluster}), training {run.model} on {run.dataset} takes ",
        emphasis=format_seconds(row.total_seconds),
        after=". No pruned run was given, so there is no saving to report.",
        tiles=tuple(tiles),
        certainty=f"90 % interval {format_seconds(row.low_seconds)} to {format_seconds(row.high_seconds)}; "
        f"{TIER_WORDS.get(row.tier, row.tier)}." + checked(validation),
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
    if recorded == here:
        return ""
    return (
        f" The accuracy is that of the recorded run, whose updates took {recorded:,} images at first; here they take "
        f"{here:,}, and nobody has trained that."
    )


def _quality_tiles(run: pd.Series, best: pd.Series) -> list[Tile]:
    tiles = []
    if pd.notna(best.get("accuracy_change")):
        tiles.append(
            Tile(
                name="Validation accuracy",
                value=f"{100 * best.pruned_accuracy:.1f} %",
                detail=f"{100 * best.accuracy_change:+.1f} points against dense, one run each".replace("-", "\u2212"),
            )
        )
    elif pd.notna(run.final_accuracy):
        tiles.append(
            Tile(
                name="Validation accuracy",
                value=f"{100 * run.final_accuracy:.1f} %",
                detail="no dense run was recorded to compare with",
            )
        )
    tiles.append(
        Tile(
            name="Inference cost of the result",
            value=_percent(run.last_inference_macs_per_image / run.first_inference_macs_per_image),
            detail=f"of dense: {format_count(run.last_inference_macs_per_image, 'MAC')} instead of "
            f"{format_count(run.first_inference_macs_per_image, 'MAC')} per image",
        )
    )
    return tiles


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")


def format_seconds(value: float) -> str:
    """Three significant digits: what a projection can bear. Less than a nanosecond is rounding: 0 s."""
    value = value if abs(value) >= 1e-9 else 0.0
    return units.format_seconds(_rounded(value)).replace("-", "\u2212")


def format_bytes(value: float) -> str:
    """Three significant digits."""
    return units.format_bytes(_rounded(value))


def format_joules(value: float) -> str:
    """Three significant digits."""
    return units.format_joules(_rounded(value))


def format_count(value: float, unit: str) -> str:
    """Three significant digits."""
    return units.format_count(_rounded(value), unit)


def _percent(fraction: float) -> str:
    text = f"{100 * fraction:.1f} %" if abs(fraction) < 0.0995 else f"{100 * fraction:.0f} %"
    return text.replace("-", "\u2212")


def _range(low: float, high: float) -> str:
    digits = 0 if high - low >= 0.03 else 1
    return f"{100 * low:.{digits}f} % to {100 * high:.{digits}f} %".replace("-", "\u2212")


def _money(usd: float) -> str:
    if abs(usd) >= 100:
        return f"{usd:,.0f} USD"
    return f"{usd:,.2f} USD" if abs(usd) >= 0.01 or usd == 0 else f"{usd:.2g} USD"
