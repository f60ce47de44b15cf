"""What a study file expands to, in which order, and what wins where two parts of it say something."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import msgspec
import pytest

import ptsim
from ptsim.answers.study import configurations, read_study
from ptsim.errors import UsageError
from ptsim.sim.options import Faults
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
    for epochs, name in enumerate(("one", "two"), start=1):
        dense_trace(tmp_path / f"{name}.jsonl", epochs=epochs)
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
        (what_if, 0.5 if what_if == "much contention" else contention, trace, *place)
        for what_if, traces in asked
        for contention, trace, place in itertools.product((0.0, 0.2), traces, places)
    ]
    assert found == expected
    assert read.num_configurations == len(expected) == (2 + 2 + 1) * 2 * 4


def test_configurations_of_one_key_are_the_same_projection(study: Path) -> None:
    """Two traces, three contentions, two clusters and two sizes; another trace of these is none of its own."""
    found = {(c.key, c.trace, c.options.contention, c.cluster.name, c.gpus) for c in configurations(read_study(study))}
    assert len(found) == len({key for key, *_ in found}) == 2 * 3 * 2 * 2


def test_a_what_if_wins_over_the_grid_and_is_called_by_what_it_has(study: Path) -> None:
    expanded = configurations(read_study(study))
    found = {(c.labels["what_if"], c.labels["contention"], c.options.contention) for c in expanded}
    assert found == {
        ("as-recorded", 0.0, 0.0),
        ("as-recorded", 0.2, 0.2),
        ("much contention", 0.5, 0.5),
        ("interval=two.jsonl", 0.0, 0.0),
        ("interval=two.jsonl", 0.2, 0.2),
    }


def test_a_what_if_changes_of_the_failures_what_it_names(study: Path) -> None:
    study.write_text(
        'traces = ["one.jsonl"]\nclusters = ["dgx-a100"]\ngpus = [8]\n'
        'what_ifs = ["as-recorded", "failures=5000", "slow disks"]\n'
        '[options.faults]\nmtbf_gpu_hours = 1e6\npolicy = "elastic"\ncheckpoint_interval_s = 600.0\n'
        '[what_if."slow disks".faults]\ncheckpoint_s = 9.0\n'
    )
    asked = Faults(mtbf_gpu_hours=1e6, policy="elastic", checkpoint_interval_s=600.0)
    assert [c.options.faults for c in configurations(read_study(study))] == [
        asked,
        msgspec.structs.replace(asked, mtbf_gpu_hours=5000.0),
        msgspec.structs.replace(asked, checkpoint_s=9.0),
    ]


def test_without_what_ifs_it_is_the_recorded_run_and_the_studys_own(study: Path) -> None:
    study.write_text("\n".join(line for line in STUDY.splitlines() if not line.startswith("what_ifs")))
    assert [what_if.name for what_if in read_study(study).what_ifs] == ["as-recorded", "much contention"]


def test_device_files_are_relative_to_the_study_as_all_paths_are(study: Path) -> None:
    """Wherever they are named: by a what-if, in the options and in the grid."""
    catalog = Path(ptsim.__file__).parent / "hardware" / "catalog" / "devices"
    (study.parent / "own.toml").write_text((catalog / "t4.toml").read_text())
    own, head = str(study.parent / "own.toml"), 'traces = ["one.jsonl"]\nclusters = ["dgx-a100"]\ngpus = [8]\n'
    mixed = '[what_if.mixed.mixed_devices]\n"own.toml" = 2\n'
    for text, devices in (
        (
            f'{head}what_ifs = ["as-recorded", "gpu=own.toml", "mixed"]\n{mixed}',
            [(None, {}), (own, {}), (None, {own: 2})],
        ),
        (f'{head}[options]\ndevice = "own.toml"\n', [(own, {})]),
        (f'{head}[grid]\ndevice = ["h100", "own.toml"]\n', [("h100", {}), (own, {})]),
    ):
        study.write_text(text)
        found = [(c.options.device, c.options.mixed_devices) for c in configurations(read_study(study))]
        assert found == devices


def test_a_study_that_was_moved_has_the_keys_that_it_had_until_a_file_changes(study: Path) -> None:
    """Device files are named by a cluster file, a what-if and the options; where they lie is in no key."""
    catalog = Path(ptsim.__file__).parent / "hardware" / "catalog" / "devices"
    (study.parent / "own.toml").write_text((catalog / "t4.toml").read_text())
    (study.parent / "mine.toml").write_text(CLUSTER.replace('"t4"', '"own.toml"'))
    study.write_text(
        'traces = ["one.jsonl"]\nclusters = ["mine.toml"]\ngpus = [8]\nwhat_ifs = ["as-recorded", "gpu=own.toml"]\n'
        '[grid]\nmixed_devices = [{ "own.toml" = 2 }, { "own.toml" = 3 }]\n'
    )
    moved = study.parent / "moved"
    moved.mkdir()
    for name in ("study.toml", "one.jsonl", "mine.toml", "own.toml"):
        shutil.copy(study.parent / name, moved)
    keys = [c.key for c in configurations(read_study(study))]
    assert [c.key for c in configurations(read_study(moved / "study.toml"))] == keys
    assert len(set(keys)) == 4
    (moved / "own.toml").write_text((study.parent / "own.toml").read_text().replace('"70 W"', '"75 W"'))
    assert not set(keys) & {c.key for c in configurations(read_study(moved / "study.toml"))}


def test_different_clusters_of_one_name_are_refused(study: Path) -> None:
    """A copy of a catalog's file whose name was left as it is; the same cluster may be there twice."""
    catalog = Path(ptsim.__file__).parent / "hardware" / "catalog" / "clusters" / "dgx-a100.toml"
    (study.parent / "mine.toml").write_text(catalog.read_text())
    assert len(read_study(study).clusters) == 2
    (study.parent / "mine.toml").write_text(catalog.read_text().replace("nics_per_node = 8", "nics_per_node = 4"))
    with pytest.raises(UsageError, match="two different clusters are called 'dgx-a100'"):
        read_study(study)
