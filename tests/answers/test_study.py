"""What a study file expands to, in which order, and what wins where two parts of it say something."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from ptsim.answers.study import configurations, read_study
from tests.traces import dense_trace

STUDY = """
traces = ["one.jsonl", "two.jsonl"]
clusters = ["dgx-a100", "mine.toml"]
gpus = [8, 1, 8]
what_ifs = ["as-recorded", "much contention", "interval=two.jsonl"]

[grid]
contention = [0.0, 0.2]

[what_if."much contention"]
contention = 0.5
"""
CLUSTER = """
name = "mine"
device = "t4"
gpus_per_node = 8
intra = { name = "PCIe", kind = "pcie", bandwidth = "16 GB/s" }
sources = { default = "made up" }
"""


@pytest.fixture
def study(tmp_path: Path) -> Path:
    for name in ("one", "two"):
        dense_trace(tmp_path / f"{name}.jsonl", epochs=1)
    (tmp_path / "mine.toml").write_text(CLUSTER)
    (tmp_path / "study.toml").write_text(STUDY)
    return tmp_path / "study.toml"


def test_what_ifs_vary_slowest_then_the_grid_traces_and_clusters_and_gpus_fastest(study: Path) -> None:
    read = read_study(study)
    found = [
        (c.labels["what_if"], c.labels["contention"], c.trace.stem, c.cluster.name, c.gpus)
        for c in configurations(read)
    ]
    places = [("dgx-a100", 8), ("dgx-a100", 1), ("mine", 8), ("mine", 1)]  # a size that is given twice counts once
    asked = [("as-recorded", ["one", "two"]), ("much contention", ["one", "two"]), ("interval=two.jsonl", ["two"])]
    expected = [
        (what_if, contention, trace, *place)
        for what_if, traces in asked
        for contention, trace, place in itertools.product((0.0, 0.2), traces, places)
    ]
    assert found == expected
    assert read.num_configurations == len(expected) == (2 + 2 + 1) * 2 * 4


def test_a_what_if_wins_over_the_grid(study: Path) -> None:
    expanded = configurations(read_study(study))
    contention = {(c.labels["what_if"], c.labels["contention"]): c.options.contention for c in expanded}
    assert contention["as-recorded", 0.0] == 0.0
    assert contention["as-recorded", 0.2] == 0.2
    assert contention["much contention", 0.0] == contention["much contention", 0.2] == 0.5


def test_without_what_ifs_it_is_the_recorded_run_and_the_studys_own(study: Path) -> None:
    study.write_text("\n".join(line for line in STUDY.splitlines() if not line.startswith("what_ifs")))
    assert [what_if.name for what_if in read_study(study).what_ifs] == ["as-recorded", "much contention"]
