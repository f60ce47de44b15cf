from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "analysis"))
import cross_validate
import fit_saving


def rows(names: list[str], predicted: list[float], measured: list[float], **columns: object) -> pd.DataFrame:
    constant = {"device": "v100", "precision": "fp32", "memory_format": "contiguous", "table": "t", "waits": False}
    return pd.DataFrame(
        {"model": names, "predicted_images_per_s": predicted, "measured_images_per_s": measured, "batch": 64}
        | constant
        | columns
    )


def test_an_error_that_both_share_cancels() -> None:
    (pair,) = fit_saving.pairs(rows(["resnet50", "resnet18"], [100, 400], [80, 320])).to_dict("records")
    assert pair["predicted"] == pytest.approx(0.25)
    assert pair["share"] == pytest.approx(0)


def test_the_share_by_hand() -> None:
    # predicted ratio 1/4, measured 1/8: half of the logarithm too little
    (pair,) = fit_saving.pairs(rows(["resnet50", "resnet18"], [100, 400], [50, 400])).to_dict("records")
    assert pair["share"] == pytest.approx(0.5)


def test_only_networks_of_one_family_in_one_table_are_a_pair() -> None:
    assert fit_saving.pairs(rows(["resnet50", "vgg11"], [100, 400], [80, 320])).empty
    assert fit_saving.pairs(rows(["resnet50", "resnet18"], [100, 400], [80, 320], table=["a", "b"])).empty
    assert fit_saving.pairs(rows(["resnet50", "resnet18"], [100, 400], [80, 320], waits=[True, False])).empty


def test_families() -> None:
    assert fit_saving.family("resnet152") == fit_saving.family("resnet18")
    assert fit_saving.family("mnasnet0_5") == fit_saving.family("mnasnet1_3")
    assert fit_saving.family("vgg16_bn") != fit_saving.family("vgg16")


def test_coverage_is_asked_with_the_other_families_share() -> None:
    table = pd.DataFrame({"family": ["a"] * 10 + ["b"] * 10, "device": "v100", "share": [0.1] * 10 + [0.3] * 10})
    assert fit_saving.coverage(table) == pytest.approx(0.5)  # b is outside what a gives, a is inside what b gives


def test_every_row_that_was_left_out_keeps_its_own_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chip after chip, the boards of one chip together, as they are left out; TensorFlow's rows never are."""

    def case(device: str, source: str, framework: str = "PyTorch") -> SimpleNamespace:
        row = SimpleNamespace(
            framework=framework, source=source, source_path="a/b.csv", software="torch 2", image_size=224,
            with_optimizer=True,
        )  # fmt: skip
        return SimpleNamespace(device=device, row=row, tells=framework == "PyTorch")

    cases = [
        case("v100-sxm2-16gb", "one"), case("a100-sxm4-40gb", "two"), case("v100-sxm2-16gb", "three", "TensorFlow"),
        case("v100-pcie-16gb", "four"), case("a100-sxm4-80gb", "five"),
    ]  # fmt: skip
    monkeypatch.setattr(fit_saving, "layer_cases", list)
    monkeypatch.setattr(cross_validate, "WAYS", cross_validate.WAYS)
    monkeypatch.setattr(
        cross_validate, "leave_out", lambda *_: pd.DataFrame({"device": ["a40", "a80", "v sxm", "v pcie"]})
    )
    found = fit_saving.left_out(cases)
    assert [table.partition("/")[0] for table in found.table] == ["two", "five", "one", "four"]
    assert found.table[0] == "two/a torch 2 224 True"
    assert cross_validate.WAYS == ("gpu",)
