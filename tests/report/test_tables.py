import pandas as pd
import pytest

from ptsim.report.tables import Table, TableSpec, make_table, quantity_of


def shown(frame: pd.DataFrame, headings: dict[str, str], *together: tuple[str, ...]) -> Table:
    return make_table(TableSpec(name="t", title="T", headings=headings, together=together), frame)


def test_a_column_has_one_unit_and_cells_sort_by_their_si_value() -> None:
    frame = pd.DataFrame({"run": ["a", "b"], "total_seconds": [5400.0, 7200.0]})
    table = shown(frame, {"run": "run", "total_seconds": "time"})
    assert (table.columns[1].heading, table.columns[1].unit, table.columns[1].kind) == ("time", "h", "number")
    assert [row[1].text for row in table.rows] == ["1.50", "2.00"]
    assert [row[1].sort for row in table.rows] == ["5400.0", "7200.0"]


def test_columns_that_belong_together_share_their_unit() -> None:
    frame = pd.DataFrame({"low_seconds": [1800.0], "high_seconds": [10800.0], "step_seconds": [0.002]})
    headings = {"low_seconds": "low", "high_seconds": "high", "step_seconds": "step"}
    table = shown(frame, headings, ("low_seconds", "high_seconds"))
    assert [column.unit for column in table.columns] == ["h", "h", "ms"]


def test_a_tier_is_called_as_in_the_sentences() -> None:
    table = shown(pd.DataFrame({"tier": ["datasheet", None]}), {"tier": "times from"})
    assert [row[0].text for row in table.rows] == ["data sheet", ""]


def test_what_is_missing_shows_as_missing_and_an_empty_column_not_at_all() -> None:
    frame = pd.DataFrame({"run": ["a", "b"], "energy_joules": [None, 7.2e6], "cost_usd": [None, None]})
    table = shown(frame, {"run": "run", "energy_joules": "energy", "cost_usd": "cost"})
    assert [column.heading for column in table.columns] == ["run", "energy"]
    assert [row[1].missing for row in table.rows] == [True, False]
    assert table.rows[1][1].text == "2.00"
    assert table.columns[1].unit == "kWh"


def test_fractions_are_shown_in_percent_and_negative_numbers_with_a_minus_sign() -> None:
    frame = pd.DataFrame({"saved_fraction": [-0.125], "num_gpus": [12_000]})
    table = shown(frame, {"saved_fraction": "saved", "num_gpus": "GPUs"})
    assert table.rows[0][0].text == "\u221212.5"
    assert table.columns[0].unit == "%"
    assert table.rows[0][1].text == "12,000"


def test_counts_per_image_say_so() -> None:
    frame = pd.DataFrame({"training_macs_per_image": [122e6], "bn_bytes_per_image": [2 * 2**20]})
    table = shown(frame, {name: name for name in frame})
    assert [column.unit for column in table.columns] == ["MMAC/image", "MiB/image"]


@pytest.mark.parametrize(
    ("column", "quantity"),
    [
        ("saved_seconds_low", "seconds"),
        ("low_co2_grams", "grams"),
        ("low_cost_usd", "usd"),
        ("training_macs_per_image", "macs"),
        ("validation_accuracy", "fraction"),
        ("epoch_error", "fraction"),
        ("measured_saving", "fraction"),
        ("error_points", "points"),
        ("saved_fraction_low", "fraction"),
        ("first_batch_per_gpu", None),
        ("epochs", None),
    ],
)
def test_the_name_of_a_column_tells_its_quantity(column: str, quantity: str | None) -> None:
    assert quantity_of(column) == quantity


def test_the_unit_is_that_of_the_middle_amount_whatever_its_sign_and_without_zeros() -> None:
    frame = pd.DataFrame({"saved_seconds": [0.0, 0.0, 0.0, -7200.0, 30.0]})  # of 7,200 and 30 s the middle is an hour
    table = shown(frame, {"saved_seconds": "saved"})
    assert (table.columns[0].unit, [row[0].text for row in table.rows][2:]) == ("h", ["0", "−2.00", "0.0083"])
    nothing = shown(pd.DataFrame({"saved_seconds": [0.0]}), {"saved_seconds": "saved"})
    assert (nothing.columns[0].unit, nothing.rows[0][0].text) == ("s", "0")


def test_words_and_truths_are_text_and_long_ones_are_marked() -> None:
    frame = pd.DataFrame({"run": ["a" * 21, "b"], "shrank": [True, False], "notes": ["", "c" * 61]})
    table = shown(frame, {name: name for name in frame})
    assert [cell.text for cell in table.rows[0]] == ["a" * 21, "yes", ""]
    assert [cell.text for cell in table.rows[1]] == ["b", "no", "c" * 61]
    assert [cell.css for cell in table.rows[0]] == ["text name", "text", "text long"]
    assert [cell.missing for cell in table.rows[0]] == [False, False, True]
    short = shown(pd.DataFrame({"run": ["a" * 20], "notes": ["c" * 60]}), {"run": "run", "notes": "notes"})
    assert [cell.css for cell in short.rows[0]] == ["text", "text name"]
