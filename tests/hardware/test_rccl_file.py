"""The JSON and CSV of rccl-tests: records as its Reporter writes them, numbers by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ptsim.errors import FileFormatError
from ptsim.hardware.nccl_log import NcclLog, read_nccl_log, read_nccl_logs, with_nodes
from ptsim.hardware.nccl_log.rccl_file import is_record_file
from tests.hardware.test_nccl_log import OLD_HEAD, OLD_ROWS, TAIL


def record(size: int, time_us: float, inplace: int = 0, **changed: Any) -> dict[str, Any]:
    """Of 16 GPUs, whose bus bandwidth is 2 · 15 / 16 = 1.875 times size / time."""
    algbw = size / time_us / 1e3
    fields = {
        "numCycle": 0, "name": "AllReduce", "nodes": 1, "ranks": 16, "ranksPerNode": 16, "gpusPerRank": 1, "size": size,
        "type": "float", "redop": "sum", "inPlace": inplace, "time": time_us, "algBw": round(algbw, 6),
        "busBw": round(1.875 * algbw, 6), "wrong": "0",
    }  # fmt: skip
    return fields | changed


def pairs(**changed: Any) -> list[dict[str, Any]]:
    """1 MiB in 40 and 90 µs, 64 MiB in 500 and 500 µs."""
    halves = ((2**20, 40.0, 0), (2**20, 90.0, 1), (2**26, 500.0, 0), (2**26, 500.0, 1))
    return [record(*half, **changed) for half in halves]


def as_json(records: list[dict[str, Any]]) -> str:
    return "[\n" + ",\n".join(map(json.dumps, records)) + "\n]\n"


def as_csv(records: list[dict[str, Any]]) -> str:
    """The header says "collective", "inplace" and "#wrong" where the JSON says "name", "inPlace" and "wrong"."""
    names = {"name": "collective", "inPlace": "inplace", "algBw": "algbw", "busBw": "busbw", "wrong": "#wrong"}
    lines = [",".join(names.get(key, key) for key in records[0])]
    lines += [",".join(f"{v:.6f}" if isinstance(v, float) else json.dumps(v) for v in one.values()) for one in records]
    return "\n".join(lines) + "\n"


def read(folder: Path, text: str) -> tuple[NcclLog, ...]:
    path = folder / "all_reduce.out"
    path.write_text(text, encoding="utf-8")
    return read_nccl_logs(path)


@pytest.mark.parametrize("form", [as_json, as_csv])
def test_records_are_the_halves_of_a_row(tmp_path: Path, form: Any) -> None:
    (log,) = read(tmp_path, form(pairs()))
    assert (log.num_gpus, log.gpus, log.version) == (16, (), None)
    assert [(m.size_bytes, m.out_of_place_s, m.in_place_s) for m in log.measurements] == [
        (2**20, pytest.approx(40e-6), pytest.approx(90e-6)),
        (2**26, pytest.approx(500e-6), pytest.approx(500e-6)),
    ]
    assert log.measurements[0].seconds == pytest.approx(60e-6)  # √(40 · 90)


@pytest.mark.parametrize("form", [as_json, as_csv])
def test_the_nodes_are_asked_for_where_several_processes_ran(tmp_path: Path, form: Any) -> None:
    """The file says 1 of every run without groups; the bandwidth confirms other numbers, and one process is on one."""
    (log,) = read(tmp_path, form(pairs()))
    with pytest.raises(FileFormatError, match="on how many nodes its 16 GPUs were is unknown"):
        with_nodes(log)
    assert with_nodes(log, 2).num_nodes == 2
    (log,) = read(tmp_path, form(pairs(nodes=2, ranksPerNode=8)))
    assert (log.num_gpus, log.num_nodes) == (16, 2)
    (log,) = read(tmp_path, form(pairs(ranks=1, ranksPerNode=1, gpusPerRank=16)))
    assert (log.num_gpus, log.num_nodes) == (16, 1)
    alone = [{key: value for key, value in one.items() if key not in ("nodes", "ranks", "ranksPerNode", "gpusPerRank")}
             for one in pairs(gpus=16)]  # fmt: skip
    (log,) = read(tmp_path, form(alone))
    assert (log.num_gpus, log.num_nodes) == (16, 1)


@pytest.mark.parametrize("form", [as_json, as_csv])
def test_cycles_are_runs_and_of_several_types_the_float_sum_counts(tmp_path: Path, form: Any) -> None:
    slower = [record(2**20, 50.0, numCycle=1), record(2**26, 600.0, numCycle=1)]
    firsts = [record(2**20, 40.0), record(2**26, 500.0)]
    others = [record(2**20, 9.0, type="half"), record(2**20, 8.0, redop="max")]
    with pytest.warns(UserWarning, match="reduced half sum and float max are left out"):
        logs = read(tmp_path, form(others + firsts + slower))
    assert [[round(1e6 * m.seconds) for m in log.measurements] for log in logs] == [[40, 500], [50, 600]]


def test_one_object_a_line_is_read_in_any_order_of_its_fields(tmp_path: Path) -> None:
    """As the first versions wrote it, without MPI in the order of the alphabet (figures of ROCm/rccl-tests, #93)."""
    times = (19.18415, 19.89765)
    kept = ["numCycle", "name", "size", "type", "redop", "inPlace", "time", "algBw", "busBw"]
    lines = [
        record(1024, time, place, gpus=4, algBw=1.024 / time, busBw=1.536 / time) for place, time in enumerate(times)
    ]
    lines = [{key: one[key] for key in [*kept, "gpus"]} | {"#wrong": "0"} for one in lines]
    for order in (False, True):
        text = "".join(json.dumps(one, sort_keys=order) + "\n" for one in lines)
        (log,) = read(tmp_path, text)
        assert (log.num_gpus, log.num_nodes) == (4, 1)
        (row,) = log.measurements
        assert (row.size_bytes, row.out_of_place_s, row.in_place_s) == (
            1024,
            pytest.approx(19.18415e-6),
            pytest.approx(19.89765e-6),
        )
    with pytest.raises(FileFormatError, match="not the JSON output of rccl-tests"):
        read(tmp_path, text[:-30])


def test_the_same_run_as_text_says_the_same(tmp_path: Path) -> None:
    """Of four GPUs: the rows of a text, as records."""
    records = []
    for line in OLD_ROWS.splitlines():
        words = line.split()
        for place, times in enumerate((words[4:7], words[8:11])):
            time, algbw, busbw = map(float, times)
            changed = {"ranks": 4, "algBw": algbw, "busBw": busbw}
            records.append(record(int(words[0]), time, place, **changed))
    text = tmp_path / "log.txt"
    text.write_text(OLD_HEAD + OLD_ROWS + TAIL)
    assert read(tmp_path, as_json(records))[0].measurements == read_nccl_log(text).measurements


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (as_json(pairs(name="AllGather")), "holds AllGather, expected all_reduce_perf"),
        (as_csv(pairs(name="AllGather")), "holds AllGather, expected all_reduce_perf"),
        (as_json(pairs(wrong="3")), "6 wrong results at 1048576 bytes"),  # 3 out of place and 3 in place
        (as_csv(pairs(wrong="some")), "record 1 has 'some' wrong results"),
        (as_json(pairs()[:3]), "row of 67108864 bytes is incomplete: it has no in-place time"),
        (as_csv(pairs() + pairs()), "record 5: 1048576 bytes are there twice"),
        (as_csv(pairs())[:-30], "record 4: "),
        (as_json(pairs())[:-30], "not the JSON output of rccl-tests"),
        (as_json(pairs(ranks=32, nodes=2)), "names 32 GPUs, whose bus bandwidth is 1.938 times"),  # two groups
        (as_json(pairs() + pairs(ranks=8, numCycle=1)), "is of several runs: num_gpus is 16 and 8"),
        (as_csv(pairs(time="soon")), "record 1: "),
        (as_csv(pairs(time=float("nan"))), "record 1 has a time"),
        (as_json(pairs(ranks=0)), "record 1 has a time, a rate or a number of GPUs that none can be"),
        (as_json(pairs(time=4000.0)), "but the row says"),  # of the processor, or in another unit
        (as_json(pairs(redop="none")), "a collective without reduction"),
        ("numCycle,collective,size,inplace,algbw,busbw\n", "holds no record"),
        ('[\n{"inPlace": 1, "algBw": 2}\n]', "record 1: Object missing required field `collective`"),
        (as_json(pairs(ranks=1, gpusPerRank=1, busBw=0.0)), "is the run of a single GPU"),
    ],
)  # fmt: skip
def test_what_cannot_be_trusted_is_refused(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(FileFormatError, match=r"all_reduce\.out") as caught:
        read(tmp_path, text)
    assert says in caught.value.message


def test_a_single_size_of_which_nothing_was_checked_is_read(tmp_path: Path) -> None:
    (log,) = read(tmp_path, as_json([record(2**26, 500.0, wrong="N/A")]))
    (row,) = log.measurements
    assert (row.size_bytes, row.out_of_place_s, row.in_place_s) == (2**26, pytest.approx(500e-6), None)


def test_processes_without_a_number_of_nodes_may_be_on_any(tmp_path: Path) -> None:
    records = [{key: value for key, value in one.items() if key != "nodes"} for one in pairs()]
    assert [log.num_nodes for log in read(tmp_path, as_json(records))] == [None]


def test_empty_lines_and_spaces_behind_commas_change_nothing(tmp_path: Path) -> None:
    plain = as_csv(pairs())
    names, *rows = plain.splitlines()
    spaced = "\n  \n".join([names.replace(",", " , "), *(row.replace(",", ", ") for row in rows)])
    assert read(tmp_path, spaced) == read(tmp_path, plain)
    objects = [json.dumps(one) for one in pairs()]
    assert read(tmp_path, "\n \n".join(objects)) == read(tmp_path, as_json(pairs()))


def test_a_csv_that_cannot_be_taken_apart_is_refused(tmp_path: Path) -> None:
    """Python's reader takes no field of more than 131,072 characters."""
    with pytest.raises(FileFormatError, match="not the CSV output of rccl-tests: field larger"):
        read(tmp_path, as_csv(pairs()) + "9" * 131_073)


@pytest.mark.parametrize(
    ("algbw", "busbw", "read_it"),
    [
        # 0.3 % of the algorithm bandwidth of 0.5 GB/s, from 0.9375
        (0.5, 0.9389, True),
        (0.5, 0.9361, True),
        (0.5, 0.9391, False),
        (0.5, 0.9359, False),
        # Of 10 kB/s, whose 18.75 are written with six digits behind the point: the one may be off by 1e-6 and the
        # other by it times a factor of up to 2
        (1e-5, 2.17e-5, True),
        (1e-5, 2.19e-5, False),
    ],
)
def test_bandwidths_that_differ_as_they_are_rounded_are_of_one_group(
    tmp_path: Path, algbw: float, busbw: float, read_it: bool
) -> None:
    size = 2**26
    one = record(size, size / algbw / 1e3, algBw=algbw, busBw=busbw)
    if read_it:
        assert len(read(tmp_path, as_json([one]))) == 1
    else:
        with pytest.raises(FileFormatError, match="groups of them reduced at the same time"):
            read(tmp_path, as_json([one]))


@pytest.mark.parametrize(
    ("text", "is_one"),
    [
        ('{"inPlace": 0, "algBw" : 1}', True),
        ("algbw,inplace,time\n", True),
        ("inplace: 1\n# size count algbw busbw\n", False),  # as text has it, without a comma
        ("algbw, out of place\n", False),
        ("#" * 1000 + '{"inPlace": 0, "algBw": 1}', False),  # far behind the beginning
    ],
)
def test_record_files_are_told_by_two_fields_at_their_beginning(text: str, is_one: bool) -> None:
    assert is_record_file(text) is is_one
