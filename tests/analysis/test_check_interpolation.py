import itertools

import pandas as pd
import pytest

from analysis.check_interpolation import interpolation_errors, main


@pytest.fixture
def rows():
    """A GPU of 10 GMAC/s that fills channels up to 32, as a table like the published one."""
    table = []
    for batch, size, inputs, outputs in itertools.product((8, 16, 24), (28, 40), (16, 30, 64, 90), (20, 32, 70, 128)):
        tiled = -(-inputs // 32) * 32 * -(-outputs // 32) * 32
        milliseconds = batch * size**2 * 9 * tiled / 1e7
        table.append(
            {
                "gpu_model": "Formula",
                "optimizer": "none (forward only)",
                "batch": batch,
                "in_hw": size,
                "out_hw": size,
                "in_c": inputs,
                "out_c": outputs,
                "k": 3,
                "stride": 1,
                "time_ms_median": milliseconds,
            }
        )
    return pd.DataFrame(table)


def test_convolutions_that_follow_a_formula_are_interpolated_within_three_percent(rows):
    result = interpolation_errors(rows, num_measured=50, num_predicted=20)
    assert result["median_error"].item() < 0.03
    assert result["predicted"].item() == 20


def test_the_script_prints_a_row_per_gpu(rows, tmp_path, capsys):
    file = tmp_path / "rows.csv"
    rows.to_csv(file)
    main([str(file), "--measured", "40", "--predicted", "10"])
    assert "Formula" in capsys.readouterr().out
