"""The scripts behind the data-sheet tier: published rows as cases, the fit, and its cross-validation."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ptsim.costs.datasheet import load_fit

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "analysis"))

    def load(name):
        sys.modules.pop(name, None)
        return importlib.import_module(name)

    return load


def test_the_shipped_fit_is_near_the_published_throughputs(script):
    rows = script("public_rows")
    cases = [case for case in rows.training_cases() if case.row.framework == "PyTorch"]
    fit = load_fit()
    predicted = rows.Predictor(cases)(fit.efficiency)
    factor = np.array([fit.devices.get(case.device, 1.0) for case in cases])
    error = np.abs(np.array([case.seconds for case in cases]) / (predicted * factor) - 1)
    assert np.median(error) < 0.10


def test_every_published_row_says_where_it_is_from():
    for name in ("training", "training_depthwise", "training_later", "layers", "odd_channels"):
        path = ROOT / "traces" / "public" / f"{name}.csv"
        rows = pd.read_csv(path)
        assert rows[["source", "source_path", "source_rev"]].notna().all().all(), path


def test_single_convolutions_are_predicted_within_a_factor_of_two(script):
    rows = script("public_rows")
    cases = [c for c in rows.layer_cases() if c.row.get("phase") == "forward" and c.row.precision == "fp32"]
    log_ratio = np.log(rows.Predictor(cases)(load_fit().efficiency) / np.array([c.seconds for c in cases]))
    assert np.quantile(np.abs(log_ratio), 0.8) < np.log(2)


def test_a_fit_follows_slower_rows_as_far_as_its_priors_let_it(script):
    rows, fitting = script("public_rows"), script("fit_efficiency")
    cases = [case for case in rows.training_cases() if case.device == "rtx-3090" and case.age_years > 1][::4]
    layers = rows.layer_cases()[::200]
    first = fitting.fit(cases, layers)
    slower = [type(case)(**(vars(case) | {"seconds": 1.2 * case.seconds})) for case in cases]
    second = fitting.fit(slower, layers)
    ratio = second.predict(cases) / first.predict(cases)
    assert 1.1 < np.median(ratio) < 1.21


def rows_of(way, group, log_ratios, *, device_known=False, unsureness=0.0):
    return pd.DataFrame(
        [
            {
                "way": way,
                "device": f"gpu {group}",
                "network": f"network {group}",
                "model": "resnet50",
                "measured_images_per_s": 110.0,
                "predicted_images_per_s": 100.0,
                "log_ratio": ratio,
                "unsureness": unsureness,
                "device_known": device_known,
                "operators_known": True,
            }
            for ratio in log_ratios
        ]
    )


def test_intervals_of_normal_residuals_hold_ninety_percent_of_one_more_gpu(script):
    validate = script("cross_validate")
    random = np.random.default_rng(0)
    held = []
    for _ in range(200):
        per_gpu = random.normal(0.05, 0.15, 9)
        rows = pd.concat([rows_of("gpu", g, per_gpu[g] + random.normal(0, 0.02, 5)) for g in range(8)])
        made = validate.interval(rows, "new_device")
        low, high = made.around(1.0, 0.0)
        held.append(low <= np.exp(per_gpu[8]) <= high)
    assert 0.83 < np.mean(held) < 0.97


def test_a_gpu_with_many_rows_counts_no_more_than_one_with_few(script):
    validate = script("cross_validate")
    few = pd.concat([rows_of("gpu", g, [g / 10]) for g in range(5)])
    many = pd.concat([rows_of("gpu", g, [g / 10] * (1000 if g == 0 else 1)) for g in range(5)])
    assert validate.interval(many, "new_device").high == pytest.approx(
        validate.interval(few, "new_device").high, abs=0.15
    )


def test_a_row_is_not_asked_of_an_interval_that_its_own_gpu_made(script):
    validate = script("cross_validate")
    calm = pd.concat([rows_of("gpu", g, [0.0, 0.01, -0.01]) for g in range(6)])
    wild = rows_of("gpu", "wild", [3.0])
    held = validate.covered(pd.concat([calm, wild]), wild)
    assert not held.inside.any()


def test_the_accuracy_page_states_errors_and_coverage(script):
    validate = script("cross_validate")
    rows = pd.concat(
        [
            rows_of(way, g, [float(g)], device_known=way == "network")
            for way in ("network", "gpu", "both")
            for g in range(3)
        ]
    )
    text = validate.page(rows)
    assert "| GPU left out | 3 | 10.0 |" in text
