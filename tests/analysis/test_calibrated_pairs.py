from __future__ import annotations

import math
import sys
from pathlib import Path

import pandas as pd
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "analysis"))
import calibrated_pairs


def rows(**columns: list[float]) -> pd.DataFrame:
    constant = {"device": "v100", "k": 3, "stride": 1, "fold": 0, "batch": 8, "out_hw": 14, "log_error": 0.1}
    return pd.DataFrame({"in_c": [64, 48], "out_c": [64, 48], **columns}).assign(
        **{name: value for name, value in constant.items() if name not in columns}
    )


def test_a_pair_is_a_layer_and_one_with_fewer_channels() -> None:
    (pair,) = calibrated_pairs.layer_pairs(rows(predicted=[4.0, 2.0], seconds=[8.0, 3.0])).to_dict("records")
    assert pair["ratio"] == pytest.approx(0.5)
    assert (pair["dense_seconds"], pair["pruned_seconds"]) == (8.0, 3.0)


@pytest.mark.parametrize(
    "other", [{"in_c": [48, 64]}, {"k": [1, 3]}, {"stride": [1, 2]}, {"fold": [0, 1]}, {"out_hw": [14, 28]}]
)
def test_other_layers_are_none(other: dict[str, list[float]]) -> None:
    assert calibrated_pairs.layer_pairs(rows(predicted=[4.0, 2.0], seconds=[8.0, 3.0], **other)).empty


def test_an_error_that_both_layers_share_is_none_of_the_ratio() -> None:
    alike = pd.DataFrame({"device": "v100", "ratio": [0.5, 0.6], "dense_predicted": [2.0, 5.0]}).assign(
        pruned_predicted=lambda pairs: pairs.dense_predicted * pairs.ratio,
        dense_seconds=lambda pairs: pairs.dense_predicted * [1.5, 1.2],
        pruned_seconds=lambda pairs: pairs.pruned_predicted * [1.5, 1.2],
    )
    assert calibrated_pairs.shared(alike) == pytest.approx(1.0)
    only = calibrated_pairs.networks(alike[:1])  # sums of one pair again and again: its own error
    assert only.error.max() == pytest.approx(0.0, abs=1e-12)
    slower = calibrated_pairs.networks(alike[:1].assign(pruned_seconds=3.0))  # 3/3 where 1/2 was predicted
    assert slower.error.min() == pytest.approx(math.log(2))


def test_coverage_is_asked_with_the_other_gpus() -> None:
    table = pd.DataFrame({"device": ["a"] * 10 + ["b"] * 10, "error": [0.1] * 10 + [0.3] * 10})
    assert calibrated_pairs.coverage(table) == {"a": 1.0, "b": 0.0}


def test_independent_errors_by_hand() -> None:
    # Each side off by a tenth in 23 equal layers: 1.645 · √2 · 0.1 / √23 is 0.0485 of the logarithm.
    pair = {"device": "v100", "ratio": 0.5, "dense_predicted": 2.0, "pruned_predicted": 1.0, "dense_seconds": 2.0}
    for off, coverage in ((0.048, 1.0), (0.049, 0.0)):
        pairs = pd.DataFrame(
            [{**pair, "pruned_seconds": math.exp(off), "dense_log_error": 0.1, "pruned_log_error": 0.1}]
        )
        (row,) = calibrated_pairs.if_independent(pairs, 23).to_dict("records")
        assert (row["coverage"], row["mean_error"]) == (coverage, pytest.approx(off))
