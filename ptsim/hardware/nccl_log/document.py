"""The JSON that `all_reduce_perf -J FILE` writes (nccl-tests 2.17 and newer), as a section."""

from __future__ import annotations

from pathlib import Path

import msgspec

from ptsim.errors import FileFormatError
from ptsim.hardware.nccl_log.record import NcclLog
from ptsim.hardware.nccl_log.runs import check_all_reduce, logs_of
from ptsim.hardware.nccl_log.section import FORCED, Row, Section, Times
from ptsim.textfile import decode_json


class _JsonTimes(msgspec.Struct):
    time: float | None = None
    cpu_time: float | str | None = None
    alg_bw: float = 0.0
    bus_bw: float = 0.0
    nwrong: float | str | None = None  # null or "N/A" where nothing was checked


class _JsonResult(msgspec.Struct):
    size: int
    count: int | None = None
    type: str = "float"
    redop: str = "sum"
    root: int | str = -1
    out_of_place: _JsonTimes | None = None
    in_place: _JsonTimes | None = None


class _JsonDevice(msgspec.Struct):
    rank: int | None = None
    group: int = 0
    hostname: str = "?"
    device: int | None = None
    device_hex: str = ""
    device_info: str = "?"


class _JsonConfig(msgspec.Struct):
    nthreads: int = 1
    ngpus: int = 1
    aggregated_iterations: int = 1
    warmup_iters: int = 1
    graph: int = 0
    blocking_collectives: bool | str = False  # nccl-tests quotes it
    devices: list[_JsonDevice] = []


class _JsonBounds(msgspec.Struct):
    count: int | None = None
    okay: bool | str = True  # "unchecked"


class _JsonRun(msgspec.Struct):
    """The document, as far as it is read here."""

    args: list[str] = []
    env: list[str] = []
    nccl_version: int | str | None = None
    config: _JsonConfig | None = None
    devices: list[_JsonDevice] = []
    results: list[_JsonResult] = []
    out_of_bounds: _JsonBounds | None = None


_JSON_DECODER = msgspec.json.Decoder(_JsonRun)


def read_document(path: Path, text: str) -> tuple[NcclLog, ...]:
    """The all-reduce runs in the document, one for each cycle of `-N`.

    Raises:
        FileFormatError: broken JSON, another collective, a run that did not end, or results that were out of bounds.
    """
    run = decode_json(path, text, _JSON_DECODER, what="the JSON output of nccl-tests")
    if not run.results:
        raise FileFormatError(path, "has no 'results', expected the JSON output of nccl-tests' all_reduce_perf")
    program = Path(run.args[0]).name if run.args else ""
    if run.out_of_bounds is None:
        raise FileFormatError(path, "has no 'out_of_bounds': the run did not end")
    if run.out_of_bounds.count or str(run.out_of_bounds.okay).lower() == "false":  # nccl-tests quotes it
        raise FileFormatError(path, f"{run.out_of_bounds.count} results were out of bounds")
    config = run.config or _JsonConfig()
    section = Section(1, program if "_perf" in program else None)
    section.ended, section.aggregated = True, config.aggregated_iterations
    section.graph, section.cold = config.graph, config.warmup_iters == 0
    section.forced = {found[1]: found[2] for text in run.env if (found := FORCED.match(text))}
    section.launch = "\n".join(text for text in run.env if text.startswith("NCCL_HOSTID"))
    section.blocking = str(config.blocking_collectives).lower() == "true"
    section.version = None if run.nccl_version is None else str(run.nccl_version)
    for i, device in enumerate(config.devices or run.devices):
        rank = i if device.rank is None else device.rank
        section.ranks[rank] = (device.hostname, device.device_info)
        section.groups.add(str(device.group))
        if device.device is not None:
            section.places[rank] = (device.hostname, str(device.device), device.device_hex)
    threads = config.nthreads * config.ngpus
    if threads > 1 and sorted(section.ranks) == [threads * i for i in range(len(section.ranks))]:
        # the JSON names only the first device of each process
        section.ranks = {first + i: device for first, device in section.ranks.items() for i in range(threads)}
    section.rows = [_json_row(path, i, result) for i, result in enumerate(run.results)]
    check_all_reduce(path, section)
    return tuple(logs_of(path, section))


def _json_row(path: Path, index: int, result: _JsonResult) -> Row:
    where = f"results[{index}]"
    times: dict[str, Times] = {}
    checked: list[bool] = []
    wrong = 0
    for key, body in (("out_of_place", result.out_of_place), ("in_place", result.in_place)):
        if body is None:
            continue
        if body.time is None:
            found = "no 'time'" if body.cpu_time is None else "CPU time"
            raise FileFormatError(path, f"{where}.{key} has {found}, expected the time of the collective")
        times[key] = Times(body.time, body.alg_bw, body.bus_bw)
        checked.append(isinstance(body.nwrong, float))
        wrong += int(body.nwrong) if isinstance(body.nwrong, float) else 0
    if not times:
        raise FileFormatError(path, f"{where} has neither an out-of-place nor an in-place time")
    try:
        root = int(result.root)
    except ValueError as error:
        raise FileFormatError(path, f"{where}.root is {result.root!r}, expected a rank") from error
    out_of_place, in_place = times.get("out_of_place"), times.get("in_place")
    numbers = (result.size, result.count, result.type, result.redop, root)
    return Row(index + 1, *numbers, out_of_place, in_place, wrong, len(times), checked == [True, False])
