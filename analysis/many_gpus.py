"""How wrong are steps of many GPUs that no fit has seen? Published rows left out by GPU and by source.

    python analysis/many_gpus.py        # cross_validate prints the same table into docs/cross_validation.md

A row's own chip (or source) is left out everywhere: of the rows of one GPU, of single layers, and of the rows of many
GPUs that say what scaling costs.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from fit_efficiency import Problem, evidence
from fit_scaling import Case as ManyCase
from fit_scaling import cases, cluster_of, controls, mean_step, network_cases
from fit_scaling import fit as fit_scaling
from public_rows import (
    Case,
    alone_table,
    layer_cases,
    many_table,
    network_name,
    network_table,
    networks,
    setting_of,
    steps_per_update,
    training_table,
    version_of,
)
from residuals import chip_name, correlation, ends

from ptsim.answers.predict import predict
from ptsim.costs.datasheet import Fit, ManyGpus, datasheet_step, device_factor, load_fit, load_intervals
from ptsim.costs.scaling import Scaling, load_scaling
from ptsim.costs.software import is_young
from ptsim.hardware.catalog import load_device


def leave_out(training: list[Case], layers: list[Case]) -> pd.DataFrame:
    """One row per published row of many GPUs and way of leaving it out: measured, predicted, inside the interval."""
    problem = Problem(training, layers)
    table = many_table()
    chips = {name: chip_name(name) for name in {*table.device, *(case.device for case in (*training, *layers))}}
    tells = np.array([case.tells for case in training])
    start = problem.solve(problem.weights(np.ones(len(training), np.bool_), np.ones(len(layers), np.bool_)))
    jacobian = problem.jacobian(start)
    shipped, besides = cases(), controls()
    found = []
    for way, keys in {"GPU": table.device.map(chips), "source": table.source}.items():
        for group in sorted(keys.unique()):
            if way == "GPU":
                kept = np.array([chips[case.device] != group for case in training])
                single = np.array([chips[case.device] != group for case in layers])
            else:
                kept, single = np.array([case.row.source != group for case in training]), np.ones(len(layers), np.bool_)
            weights = problem.weights(kept, single)
            fitted = problem.fitted(problem.solve(weights, start, jacobian), weights)
            known = sorted({case.device for case, keep in zip(training, kept & tells, strict=True) if keep})
            own = (keys == group).to_numpy()
            scaling = fit_scaling([*(case for case, out in zip(shipped, own, strict=True) if not out), *besides])
            fit = fitted.shipped(known)
            found += [_line(way, group, case, scaling, fit) for case in cases(fit, table[own])]
    rows = pd.DataFrame(found)
    return rows.assign(inside=covered(rows))


def _line(way: str, group: str, case: ManyCase, scaling: Scaling, fit: Fit) -> dict[str, object]:
    expected_s = case.predict(scaling, as_alone=False)
    known = case.alone_s is not None
    return {
        "way": way,
        "group": group,
        "device": case.device,
        "source": case.source,
        "device_known": device_factor(load_device(case.device), fit) is not None,
        "num_gpus": case.num_gpus,
        "stepwise": case.stepwise,
        "log_ratio": float(np.log(case.seconds / expected_s)),
        "below": float(np.log(case.step.compute_s / case.step.low_s)),
        "above": float(np.log(case.step.high_s / case.step.compute_s)),
        "alone_log_ratio": np.log(case.alone_s / case.alone_expected_s) if known else np.nan,
        "added_log_ratio": np.log(case.seconds / case.predict(scaling, as_alone=True)) if known else np.nan,
        "measured_efficiency": case.alone_s / case.seconds if known else np.nan,
        "predicted_efficiency": case.alone_expected_s / expected_s if known else np.nan,
    }


def telling(rows: pd.DataFrame, *, known: bool) -> pd.DataFrame:
    """The rows whose residuals tell of a GPU that is in the fit (their source was left out), or is not."""
    return rows[(rows.way == "source") & rows.device_known] if known else rows[rows.way == "GPU"]


def interval(rows: pd.DataFrame) -> ManyGpus:
    """The 90 % prediction interval of one more source's, or GPU's, steps on many, in units of the step's on one."""
    low, high = ends(_scaled(rows), _groups(rows), alike=alike(rows))
    return ManyGpus(low=low, high=high)


def alike(rows: pd.DataFrame) -> float:
    """The intraclass correlation of the residuals of a group, in units of the step's interval on one GPU."""
    return correlation(_scaled(rows), _groups(rows))


def covered(rows: pd.DataFrame) -> pd.Series:
    """Whether the interval of the others' residuals holds each row: of other chips, or of other sources."""
    scaled, chips = _scaled(rows), rows.device.map(chip_name)
    inside = pd.Series(index=rows.index, dtype=bool)
    for (way, group, known), own in rows.groupby(["way", "group", "device_known"]):
        others = telling(rows[(chips if way == "GPU" else rows.source) != group], known=bool(known))
        inside[own.index] = _holds(interval(others), scaled[own.index])
    return inside


def _groups(rows: pd.DataFrame) -> pd.Series:
    """Rows of a GPU from one source, left out one way."""
    return rows.way + rows.source + rows.device.map(chip_name)


def _scaled(rows: pd.DataFrame) -> pd.Series:
    return rows.log_ratio / rows.below.where(rows.log_ratio < 0, rows.above)


def _holds(made: ManyGpus, scaled: pd.Series) -> pd.Series:
    return scaled.between(made.low, made.high)


def later() -> pd.DataFrame:
    """Rows that no fit has seen, as what ptsim ships predicts them."""
    table = many_table("training_unseen")
    found = pd.DataFrame([_line("later", case.source, case, load_scaling(), load_fit()) for case in cases(table=table)])
    assert found.device_known.all(), "the interval is that of GPUs of the fit"
    inside = _holds(load_intervals().of_many_gpus(known=True), _scaled(found))
    return found.assign(model=table.model, precision=table.precision, inside=inside)


def networks_added() -> pd.DataFrame:
    """What networks add to a step of one GPU, measured and as ptsim has it, in % of that step as it was measured."""
    table, scaling = network_table(), load_scaling()
    lines = []
    for row, case in zip(table.itertuples(), network_cases(table), strict=True):
        assert case.alone_s is not None, "every row of that table has one"
        predicted_s = case.predict(scaling, as_alone=True)
        lines.append(
            {
                "source": row.source.rpartition("/")[2],
                "network": row.network,
                "reduction": row.reduction,
                "model": row.model,
                "GPUs": row.num_gpus,
                "added %": round(100 * (case.seconds / case.alone_s - 1), 1),
                "predicted %": round(100 * (predicted_s / case.alone_s - 1), 1),
                "step longer than predicted %": round(100 * (case.seconds / predicted_s - 1), 1),
            }
        )
    return pd.DataFrame(lines)


def young() -> pd.DataFrame:
    """Rows of young software as what ptsim ships predicts them, which version it was said or not; they are in the fit.

    On one GPU without steps that are timed one by one.
    """
    alone = pd.concat([training_table(), alone_table()], ignore_index=True)
    alone = alone[(alone.framework == "PyTorch") & ~alone.host_copy]
    found = []
    for where, table in {"one GPU": alone.assign(num_gpus=1), "2 to 64 GPUs": many_table()}.items():
        for _, row in table.iterrows():
            version = version_of(row)
            if is_young(load_device(row.device), version):
                said, unsaid = _as_users_see(row, str(version)), _as_users_see(row, None)
                found.append((where, row.precision, *said, *unsaid))
    rows = pd.DataFrame(found, columns=["on", "precision", "said", "said_inside", "unsaid", "unsaid_inside"])
    lines = []
    for (where, precision), part in rows.groupby(["on", "precision"]):
        line: dict[str, object] = {"steps on": where, "precision": precision, "rows": len(part)}
        for name, column in {"version said": "said", "not said": "unsaid"}.items():
            line[f"{name}: longer %"] = round(100 * float(np.expm1(part[column].median())), 1)
            line[f"{name}: inside %"] = round(100 * part[f"{column}_inside"].mean(), 1)
        lines.append(line)
    return pd.DataFrame(lines)


def _as_users_see(row: pd.Series, version: str | None) -> tuple[float, bool]:
    """ln(measured / predicted) of a row, and whether its interval holds it, as `ptsim.predict` gives them.

    Where its program did not update in every step, the updates that are missing are added to what was measured. Users
    cannot say a momentum, so RMSprop is predicted without one.
    """
    setting, many = setting_of(row), row.num_gpus > 1
    network, device = networks()[network_name(row)], load_device(row.device)
    predicted = predict(
        network,
        gpu=device,
        cluster=cluster_of(row) if many else None,
        gpus=int(row.num_gpus) if many else None,
        batch=setting.batch,
        precision=setting.precision,
        memory_format=setting.memory_format,
        optimizer=setting.optimizer,
        torch_version=version,
    )
    step = datasheet_step(network, device, setting)
    missing_s = step.compute_s - mean_step(step, steps_per_update(row, row.num_gpus)).compute_s
    seconds = row.num_gpus * row.batch / row.images_per_s + missing_s
    return float(np.log(seconds / predicted.step_seconds)), predicted.low <= seconds <= predicted.high


def by_network(later: pd.DataFrame) -> pd.DataFrame:
    """Median of how much longer than predicted each network took, in the rows that came later."""
    longer = 100 * np.expm1(later.log_ratio)
    keys = [later.source.str.rpartition("/")[2].rename("rows of"), later.model, later.precision]
    return longer.groupby(keys).agg(**{"rows": "size", "longer %": "median"}).round(1).reset_index()


def overall(later: pd.DataFrame) -> str:
    """Error, bias and coverage of rows that came later, as the page's sentence has them."""
    error, bias = np.expm1(-later.log_ratio).abs().median(), float(np.expm1(later.log_ratio.median()))
    return f"{100 * error:.1f} %, with a bias of {100 * bias:.1f} % and {100 * later.inside.mean():.1f} % inside"


def by_source(rows: pd.DataFrame) -> pd.DataFrame:
    """Which part is off, per source: the step on one GPU, or what the others add to what one was measured to take."""
    lines = []
    for (way, source), part in rows.groupby(["way", "source"]):
        line = {"left out": way, "rows of": source.rpartition("/")[2], "rows": len(part)}
        for name, column in {"": "log_ratio", "one GPU: ": "alone_log_ratio", "added: ": "added_log_ratio"}.items():
            known = part[column].dropna()
            line[f"{name}median error %"] = round(100 * np.expm1(-known).abs().median(), 1)
            line[f"{name}bias %"] = round(100 * float(np.expm1(known.median())), 1)
        lines.append({**line, "coverage %": round(100 * part.inside.mean(), 1)})
    return pd.DataFrame(lines)


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """Errors, coverage and scaling efficiency by way of leaving out, then by number of GPUs."""
    lines = []
    for way, part in rows.groupby("way"):
        lines.append(_summary(f"{way} left out", part))
        for name, some in {
            "… 2 to 4 GPUs": part[part.num_gpus <= 4],
            "… 8 GPUs": part[part.num_gpus == 8],
            "… 16 to 64 GPUs": part[part.num_gpus > 8],
            "… not timed step by step": part[~part.stepwise],
            "… of the first two sources": part[part.source.str.contains("DeepLearningExamples|lambdal")],
        }.items():
            if len(some):
                lines.append(_summary(name, some))
    return pd.DataFrame(lines)


def _summary(name: str, part: pd.DataFrame) -> dict[str, object]:
    error = 100 * np.expm1(-part.log_ratio).abs()
    points = 100 * (part.predicted_efficiency - part.measured_efficiency)
    return {
        "left out": name,
        "rows": len(part),
        "GPUs": part.device.nunique(),
        "median error %": round(error.median(), 1),
        "90th percentile %": round(error.quantile(0.9), 1),
        "bias %": round(100 * float(np.expm1(part.log_ratio.median())), 1),
        "coverage %": round(100 * part.inside.mean(), 1),
        "mean coverage of GPUs %": round(100 * part.inside.groupby(part.device.map(chip_name)).mean().mean(), 1),
        "scaling efficiency off by, points": round(points.abs().median(), 1),
        "its bias, points": round(points.median(), 1),
    }


def main() -> None:
    """Print the tables."""
    training, layers = evidence(), layer_cases()
    found, since = leave_out(training, layers), later()
    for table in (summary(found), by_source(found), by_source(since), since, young(), networks_added()):
        print(table.to_string(index=False))


if __name__ == "__main__":
    main()
