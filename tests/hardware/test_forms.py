"""What a cluster file may say of its measured tables and links; one sentence where it contradicts itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from ptsim.costs.collectives import all_reduce
from ptsim.errors import FileFormatError
from ptsim.hardware.catalog import load_cluster
from ptsim.hardware.forms import write_cluster
from ptsim.hardware.spec import AlphaBeta

INTRA = 'intra = { name = "NVLink", bandwidth = "300 GB/s", latency = "2 us" }'
HEAD = f"""
name = "mine"
device = "a100"
gpus_per_node = 8
inter = {{ name = "TCP", bandwidth = "1 GB/s", latency = "20 us" }}
{INTRA}
sources = {{ default = "a data sheet" }}
"""
TABLE = """
[[table]]
num_gpus = 8
num_nodes = 1
size_bytes = [1024, 2048]
seconds = [2e-5, 3e-5]
source = "a log"
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("[2e-5, 3e-5]", "[2e-5, 3e-5, 4e-5]", r"table\[0\]\.seconds has 3 values for 2 sizes"),
        ("[1024, 2048]", "[1024, 1024]", r"table\[0\]\.size_bytes is not in ascending order"),
        ("[1024, 2048]", "[2048, 1024]", r"table\[0\]\.size_bytes is not in ascending order"),
        ("num_gpus = 8", "num_gpus = 1", r"table\[0\] is of 1 GPUs on 1 nodes, expected at least 2"),
        ("num_nodes = 1", "num_nodes = 9", r"table\[0\] is of 8 GPUs on 9 nodes, expected at least 2 and one a node"),
        ("[1024, 2048]", "[0, 2048]", r"size_bytes\[0\] is 0"),
        ('source = "a log"', 'source = "a log"' + TABLE, "has two tables of 8 GPUs on 1 nodes, expected one"),
        (', latency = "2 us"', "", "intra.latency is missing; a link without a kind needs it"),
        (', latency = "20 us"', "", "inter.latency is missing; a link without a kind needs it"),
        (INTRA, "", r"\[intra\] is missing; leave it out only where gpus_per_node is 1"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(tmp_path: Path, old: str, new: str, said: str) -> None:
    assert (HEAD + TABLE).count(old) == 1
    with pytest.raises(FileFormatError, match=said):
        load_cluster(written(tmp_path, (HEAD + TABLE).replace(old, new)))


def test_tables_of_two_gpus_on_two_nodes_and_of_other_layouts_are_read(tmp_path: Path) -> None:
    smallest = TABLE.replace("num_gpus = 8", "num_gpus = 2").replace("num_nodes = 1", "num_nodes = 2")
    line = '\nsegments = [{ from_bytes = 1024, latency = "10 us", seconds_per_byte = 1e-9 }]\nrelative_jitter = 0.03\n'
    cluster = load_cluster(written(tmp_path, HEAD + TABLE + smallest + line))
    assert [(table.num_gpus, table.num_nodes, table.seconds) for table in cluster.tables] == [
        (8, 1, (2e-5, 3e-5)),
        (2, 2, (2e-5, 3e-5)),
    ]
    assert [table.relative_jitter for table in cluster.tables] == [0, 0.03]
    (segment,) = cluster.tables[1].segments
    assert segment == AlphaBeta(from_bytes=1024, latency_s=pytest.approx(1e-5), seconds_per_byte=1e-9)


def test_a_link_of_a_kind_needs_no_latency_and_a_network_allows_any_number_of_nodes(tmp_path: Path) -> None:
    cluster = load_cluster(written(tmp_path, HEAD.replace('latency = "20 us"', 'kind = "tcp"')))
    assert cluster.inter is not None
    assert (cluster.inter.latency_s, cluster.max_nodes) == (None, None)
    assert cluster.sources == {"intra": "a data sheet", "inter": "a data sheet"}


def test_nodes_of_one_gpu_need_no_link_inside(tmp_path: Path) -> None:
    one = HEAD.replace("gpus_per_node = 8", "gpus_per_node = 1")
    without = load_cluster(written(tmp_path, one.replace(INTRA, "")))
    assert without.sources == {"inter": "a data sheet"}
    given = load_cluster(written(tmp_path, one))
    for num_gpus in (2, 16):
        times = [all_reduce(2**26, cluster, num_gpus).seconds for cluster in (without, given)]
        assert times[0] == pytest.approx(times[1])
    again = tmp_path / "again.toml"
    write_cluster(without, again)
    assert "intra" not in again.read_text()
    assert load_cluster(again) == without
    with pytest.raises(FileFormatError, match=r"\[intra\] is missing"):
        load_cluster(written(tmp_path, "\n".join(line for line in one.splitlines() if " = { name" not in line)))
