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
    for name in ("training", "training_depthwise", "layers", "odd_channels"):
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


def test_quantiles_count_every_group_the_same(script):
    validate = script("cross_validate")
    many = pd.DataFrame({"way": "gpu", "group": "many", "log_ratio": np.zeros(1000)})
    few = pd.DataFrame({"way": "gpu", "group": "few", "log_ratio": [1.0]})
    assert validate.quantiles(pd.concat([many, few]))["high"] == pytest.approx(1.0, abs=0.01)


def test_the_accuracy_page_states_errors_and_coverage(script):
    validate = script("cross_validate")
    rows = pd.DataFrame(
        [
            {
                "way": way,
                "group": f"{way}{i}",
                "device": f"gpu{i}",
                "model": "resnet50",
                "measured_images_per_s": 110.0,
                "predicted_images_per_s": 100.0,
                "log_ratio": float(i),
                "device_known": way == "network",
                "operators_known": True,
            }
            for way in ("network", "gpu", "both")
            for i in range(3)
        ]
    )
    text = validate.page(rows)
    assert "| GPU left out | 3 | 10.0 |" in text
    assert "| 33.3 |" in text  # of three equal groups only the middle one lies between the others
