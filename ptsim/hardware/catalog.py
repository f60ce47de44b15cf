"""Which GPUs and clusters are known by name, and how one is read from a TOML file, every number with unit and source.

A device file:

    name = "a100-sxm4-40gb"
    aliases = ["a100"]                           # other names that users type
    driver_names = ["NVIDIA A100-SXM4-40GB"]     # what NVML and the CUDA driver call it: tells whose measurements count
    architecture = "ampere"
    memory = "40 GiB"
    memory_bandwidth = "1555 GB/s"
    num_sms = 108
    boost_clock = "1410 MHz"
    boosts_beyond = false                        # GeForce and TITAN boards clock higher while power allows
    l2_cache = "40 MiB"
    power = "400 W"
    idle_power = "50 W"

    [peak]                                       # dense, without sparsity; what is missing is not supported
    fp32 = "19.5 TFLOP/s"
    tf32 = "156 TFLOP/s"

    [sources]                                    # one for every number; `default` stands for those not named
    default = "NVIDIA A100 Tensor Core GPU data sheet"

A cluster file (see `ptsim.hardware.spec.Cluster` for the meaning of each field):

    name = "dgx-a100"
    aliases = []
    device = "a100-sxm4-40gb"                    # a catalog name, a device file relative to this one, or "unspecified"
    gpus_per_node = 8
    nics_per_node = 8
    max_nodes = 140                              # left out: as many as asked for
    oversubscription = 1.0
    nodes_per_leaf = 16                          # under one switch; counts where links are simulated one by one
    nvswitch = true
    price_per_gpu = "4.10 USD/h"                 # optional

    library = "nccl"                             # or "gloo"
    reduces_in_switch = false                    # NVLink SHARP (H100 and newer behind NVSwitch)

    [intra]                                      # one GPU, one direction
    name = "NVLink 3"
    kind = "nvlink"                              # or pcie, infiniband, efa, tcp; left out: numbers as measured
    bandwidth = "300 GB/s"
    latency = "2 us"                             # one hop; left out: the collective library's own for this kind
    efficiency = 0.8                             # left out: fitted for this kind

    [inter]                                      # one node, all its NICs, one direction; left out: a single machine
    name = "8 x HDR InfiniBand"
    kind = "infiniband"
    bandwidth = "200 GB/s"

    [[table]]                                    # measured all-reduces, any number of tables
    num_gpus = 8
    num_nodes = 1
    size_bytes = [1024, 2048]
    seconds = [2.1e-5, 2.2e-5]
    relative_jitter = 0.03
    source = "nccl-tests 2.13, log file …"
    segments = []                                # α–β lines {from_bytes, latency, seconds_per_byte}; for readers

    [sources]
    default = "…"
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from pathlib import Path
from typing import Any, NoReturn

import tomli_w

from ptsim.errors import FileFormatError, UnknownNameError, UsageError
from ptsim.hardware.profile import DeviceProfile
from ptsim.hardware.spec import AllReduceTable, AlphaBeta, Cluster, Device, Link, LinkKind
from ptsim.network import Precision
from ptsim.textfile import read_toml, write_whole
from ptsim.units import Dimension, parse_quantity

# The device of a cluster of which only the network was measured.
UNSPECIFIED = "unspecified"

_CATALOG = Path(__file__).parent / "catalog"

_DEVICE_QUANTITIES: dict[str, tuple[str, Dimension]] = {
    "memory": ("memory_bytes", "bytes"),
    "memory_bandwidth": ("memory_bandwidth_bytes_per_s", "bytes_per_s"),
    "boost_clock": ("boost_clock_hz", "hertz"),
    "l2_cache": ("l2_bytes", "bytes"),
    "power": ("power_w", "watts"),
    "idle_power": ("idle_power_w", "watts"),
}
_DEVICE_KEYS = {
    *_DEVICE_QUANTITIES,
    "name",
    "aliases",
    "driver_names",
    "architecture",
    "num_sms",
    "boosts_beyond",
    "peak",
    "sources",
}
_CLUSTER_KEYS = {
    "name", "aliases", "device", "gpus_per_node", "nics_per_node", "max_nodes", "oversubscription", "nodes_per_leaf",
    "nvswitch", "library", "reduces_in_switch", "price_per_gpu", "intra", "inter", "table", "sources",
}  # fmt: skip
_ARCHITECTURES = ("pascal", "volta", "turing", "ampere", "ada", "hopper", "blackwell", "cpu")


def device_names() -> tuple[str, ...]:
    """Names of the catalog's devices, without aliases, oldest generation first."""
    return tuple(
        sorted(_files("devices"), key=lambda name: (_ARCHITECTURES.index(load_device(name).architecture), name))
    )


def cluster_names() -> tuple[str, ...]:
    """Names of the catalog's clusters, without aliases."""
    return tuple(sorted(_files("clusters")))


def load_device(name: str | Path) -> Device:
    """The device called `name` in the catalog, or described by the TOML file at that path.

    Raises:
        UnknownNameError: neither a catalog name or alias nor a file.
        FileFormatError: a broken file; says file and field.
        UsageError: the device of a cluster of which only the network is known.
    """
    if name == UNSPECIFIED:
        raise UsageError(
            "the cluster does not say which device its nodes have",
            hint='write device = "NAME" into its file; ptsim devices lists the catalog',
        )
    return read_device(_locate("device", name))


def load_cluster(name: str | Path) -> Cluster:
    """The cluster called `name` in the catalog, or described by the TOML file at that path.

    Raises:
        UnknownNameError: neither a catalog name or alias nor a file.
        FileFormatError: a broken file, or one that names a device that does not exist; says file and field.
    """
    return read_cluster(_locate("cluster", name))


def match_device(driver_name: str) -> Device | None:
    """The catalog's device that the driver calls `driver_name` ("NVIDIA A100-SXM4-40GB"); None where there is none."""
    devices = (read_device(path) for path in _files("devices").values())
    return next((device for device in devices if is_called(device, driver_name)), None)


def is_called(device: Device, driver_name: str) -> bool:
    """Whether that is what the driver calls the device."""
    return _plain(driver_name) in map(_plain, device.driver_names)


def profiled_device(profile: DeviceProfile) -> Device:
    """What a device profile was measured on: the catalog's device of that name, or the processor itself.

    A processor has no data sheet here: its rates are 0, its times come from the profile alone.

    Raises:
        UnknownNameError: a GPU that the catalog does not know.
    """
    known = match_device(profile.device)
    if known is not None:
        return known
    if profile.kind != "cpu":
        raise UnknownNameError("device", profile.device, device_names())
    return Device(
        name=profile.device,
        architecture="cpu",
        memory_bytes=profile.memory_bytes,
        memory_bandwidth_bytes_per_s=profile.copy_bandwidth_bytes_per_s or 0.0,
        peak_flops_per_s=dict.fromkeys(Precision, 0.0),
        num_sms=profile.num_threads or 1,
        boost_clock_hz=0.0,
        l2_bytes=0,
        power_w=0.0,
        idle_power_w=0.0,
        sources={},
        driver_names=(profile.device,),
    )


def measured_device(driver_name: str, projected: Device) -> Device | None:
    """What a trace was recorded on: the projected device, which a user's file may describe, else the catalog's."""
    return projected if is_called(projected, driver_name) else match_device(driver_name)


def device_aliases(name: str) -> tuple[str, ...]:
    """Other names of the catalog's device `name`."""
    return tuple(_read(_locate("device", name)).get("aliases", ()))


@functools.lru_cache(maxsize=256)
def read_device(path: Path) -> Device:
    """The device that the TOML file describes.

    Raises:
        FileFormatError: see `load_device`.
    """
    table = _Table(path, _read(path), "")
    table.refuse_unknown(_DEVICE_KEYS)
    peaks = table.table("peak")
    peaks.refuse_unknown(set(Precision))
    if Precision.FP32 not in peaks.raw:
        peaks.fail("fp32", "is missing")
    quantities = {field: table.quantity(key, unit) for key, (field, unit) in _DEVICE_QUANTITIES.items()}
    if quantities["idle_power_w"] > quantities["power_w"]:
        table.fail("idle_power", "is above power")
    sources = table.sources([*_DEVICE_QUANTITIES, "num_sms", "peak"])
    return Device(
        name=table.text("name"),
        architecture=table.choice("architecture", _ARCHITECTURES),
        memory_bytes=round(quantities["memory_bytes"]),
        memory_bandwidth_bytes_per_s=quantities["memory_bandwidth_bytes_per_s"],
        peak_flops_per_s={Precision(key): peaks.quantity(key, "flops_per_s") for key in peaks.raw},
        num_sms=table.count("num_sms"),
        boosts_beyond=table.flag("boosts_beyond", default=False),
        boost_clock_hz=quantities["boost_clock_hz"],
        l2_bytes=round(quantities["l2_bytes"]),
        power_w=quantities["power_w"],
        idle_power_w=quantities["idle_power_w"],
        driver_names=table.texts("driver_names"),
        sources=sources,
    )


@functools.lru_cache(maxsize=256)
def read_cluster(path: Path) -> Cluster:
    """The cluster that the TOML file describes.

    Raises:
        FileFormatError: see `load_cluster`.
    """
    table = _Table(path, _read(path), "")
    table.refuse_unknown(_CLUSTER_KEYS)
    device = table.text("device")
    if device.endswith(".toml"):
        device = str((path.parent / device).resolve())
    try:
        if device != UNSPECIFIED:
            load_device(device)
    except UnknownNameError as error:
        raise FileFormatError(path, f"device: {error.message}", hint=error.hint) from error
    numbers = ["intra", *(key for key in ("inter", "price_per_gpu") if key in table.raw)]
    return Cluster(
        name=table.text("name"),
        device=device,
        gpus_per_node=table.count("gpus_per_node"),
        intra=_link(table.table("intra")),
        inter=_link(table.table("inter")) if "inter" in table.raw else None,
        nics_per_node=table.count("nics_per_node", default=1),
        max_nodes=table.count("max_nodes") if "max_nodes" in table.raw else (None if "inter" in table.raw else 1),
        oversubscription=table.number("oversubscription", default=1.0, at_least=1.0),
        nodes_per_leaf=table.count("nodes_per_leaf", default=16),
        nvswitch=table.flag("nvswitch", default=False),
        library="gloo" if table.choice("library", ("nccl", "gloo"), default="nccl") == "gloo" else "nccl",
        reduces_in_switch=table.flag("reduces_in_switch", default=False),
        tables=tuple(_all_reduce_table(part) for part in table.tables("table")),
        price_usd_per_gpu_hour=table.quantity("price_per_gpu", "usd_per_hour")
        if "price_per_gpu" in table.raw
        else None,
        sources=table.sources(numbers),
    )


def write_cluster(cluster: Cluster, path: Path) -> None:
    """Write the cluster as a TOML file that `load_cluster` reads back, whole or not at all.

    Raises:
        UsageError: it cannot be written: a full disk, no right to.
    """
    document: dict[str, Any] = {
        "name": cluster.name,
        "device": cluster.device,
        "gpus_per_node": cluster.gpus_per_node,
        "nics_per_node": cluster.nics_per_node,
        "oversubscription": cluster.oversubscription,
        "nodes_per_leaf": cluster.nodes_per_leaf,
        "nvswitch": cluster.nvswitch,
        "library": cluster.library,
        "reduces_in_switch": cluster.reduces_in_switch,
    }
    if cluster.max_nodes is not None:
        document["max_nodes"] = cluster.max_nodes
    if cluster.price_usd_per_gpu_hour is not None:
        document["price_per_gpu"] = f"{cluster.price_usd_per_gpu_hour!r} USD/h"
    for key, link in (("intra", cluster.intra), ("inter", cluster.inter)):
        if link is not None:
            document[key] = {"name": link.name, "bandwidth": f"{link.bandwidth_bytes_per_s!r} B/s"}
            if link.kind is not LinkKind.MEASURED:
                document[key]["kind"] = str(link.kind)
            if link.latency_s is not None:
                document[key]["latency"] = f"{link.latency_s!r} s"
            if link.efficiency is not None:
                document[key]["efficiency"] = link.efficiency
    document["table"] = [
        {
            "num_gpus": measured.num_gpus,
            "num_nodes": measured.num_nodes,
            "size_bytes": list(measured.size_bytes),
            "seconds": list(measured.seconds),
            "relative_jitter": measured.relative_jitter,
            "source": measured.source,
            "segments": [
                {
                    "from_bytes": line.from_bytes,
                    "latency": f"{line.latency_s!r} s",
                    "seconds_per_byte": line.seconds_per_byte,
                }
                for line in measured.segments
            ],
        }
        for measured in cluster.tables
    ]
    document["sources"] = cluster.sources
    try:
        write_whole(path, tomli_w.dumps(document))
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}") from error


def _link(table: _Table) -> Link:
    table.refuse_unknown({"name", "kind", "bandwidth", "latency", "efficiency"})
    kind = LinkKind(table.choice("kind", tuple(LinkKind), default=LinkKind.MEASURED))
    needs_latency = kind is LinkKind.MEASURED or "latency" in table.raw
    return Link(
        name=table.text("name"),
        bandwidth_bytes_per_s=table.quantity("bandwidth", "bytes_per_s"),
        latency_s=table.quantity("latency", "seconds", zero=True) if needs_latency else None,
        kind=kind,
        efficiency=table.number("efficiency", default=1.0, at_least=1e-3) if "efficiency" in table.raw else None,
    )


def _all_reduce_table(table: _Table) -> AllReduceTable:
    table.refuse_unknown({"num_gpus", "num_nodes", "size_bytes", "seconds", "relative_jitter", "source", "segments"})
    sizes, seconds = table.numbers("size_bytes"), table.numbers("seconds")
    if len(sizes) != len(seconds) or not sizes:
        table.fail("seconds", f"has {len(seconds)} values for {len(sizes)} sizes, expected one each")
    if any(b <= a for a, b in itertools.pairwise(sizes)):
        table.fail("size_bytes", "is not in ascending order")
    return AllReduceTable(
        num_gpus=table.count("num_gpus"),
        num_nodes=table.count("num_nodes"),
        size_bytes=tuple(int(size) for size in sizes),
        seconds=seconds,
        relative_jitter=table.number("relative_jitter", default=0.0, at_least=0.0),
        source=table.text("source"),
        segments=tuple(
            AlphaBeta(
                from_bytes=int(part.number("from_bytes", default=0.0, at_least=0.0)),
                latency_s=part.quantity("latency", "seconds", zero=True),
                seconds_per_byte=part.number("seconds_per_byte", default=0.0, at_least=0.0),
            )
            for part in table.tables("segments")
        ),
    )


class _Table:
    """A TOML table that is read field by field; every complaint names file and field."""

    def __init__(self, path: Path, raw: dict[str, Any], prefix: str) -> None:
        self.path, self.raw, self.prefix = path, raw, prefix

    def fail(self, key: str, problem: str) -> NoReturn:
        raise FileFormatError(self.path, f"{(self.prefix + key).rstrip('.')} {problem}")

    def refuse_unknown(self, known: set[str] | set[Precision]) -> None:
        for key in self.raw:
            if key not in known:
                self.fail(key, f"is not a known key, expected one of {', '.join(sorted(known))}")

    def value(self, key: str) -> Any:
        if key not in self.raw:
            self.fail(key, "is missing")
        return self.raw[key]

    def text(self, key: str) -> str:
        value = self.value(key)
        if not isinstance(value, str) or not value.strip():
            self.fail(key, f"is {value!r}, expected a text")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        value = self.raw.get(key, [])
        if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
            self.fail(key, f"is {value!r}, expected a list of texts")
        return tuple(value)

    def choice(self, key: str, choices: tuple[str, ...], *, default: str | None = None) -> str:
        value = self.text(key) if default is None or key in self.raw else default
        if value not in choices:
            self.fail(key, f"is {value!r}, expected one of {', '.join(choices)}")
        return value

    def flag(self, key: str, *, default: bool) -> bool:
        value = self.raw.get(key, default)
        if not isinstance(value, bool):
            self.fail(key, f"is {value!r}, expected true or false")
        return value

    def count(self, key: str, *, default: int | None = None) -> int:
        value = self.value(key) if default is None else self.raw.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            self.fail(key, f"is {value!r}, expected a whole number of at least 1")
        return value

    def number(self, key: str, *, default: float, at_least: float) -> float:
        value = self.raw.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not at_least <= value < math.inf:
            self.fail(key, f"is {value!r}, expected a number of at least {at_least:g}")
        return float(value)

    def numbers(self, key: str) -> tuple[float, ...]:
        value = self.value(key)
        if not isinstance(value, list) or not all(type(n) in (int, float) and 0 < n < math.inf for n in value):
            self.fail(key, "is not a list of positive numbers")
        return tuple(float(n) for n in value)

    def quantity(self, key: str, dimension: Dimension, *, zero: bool = False) -> float:
        value = self.value(key)
        if isinstance(value, int | float) and not isinstance(value, bool):
            value = str(value)  # so that the complaint is about the unit that is missing
        try:
            quantity = parse_quantity(self.text(key) if not isinstance(value, str) else value, dimension)
        except ValueError as error:
            raise FileFormatError(self.path, f"{self.prefix}{key}: {error}") from error
        if quantity < 0 or (quantity == 0 and not zero) or not math.isfinite(quantity):
            self.fail(key, f"is {value}, expected a {'non-negative' if zero else 'positive'} quantity")
        return quantity

    def table(self, key: str) -> _Table:
        value = self.value(key)
        if not isinstance(value, dict):
            self.fail(key, f"is {value!r}, expected a table")
        return _Table(self.path, value, f"{self.prefix}{key}.")

    def tables(self, key: str) -> list[_Table]:
        value = self.raw.get(key, [])
        if not isinstance(value, list) or not all(isinstance(part, dict) for part in value):
            self.fail(key, f"is not a list of tables, written [[{key}]]")
        return [_Table(self.path, part, f"{self.prefix}{key}[{i}].") for i, part in enumerate(value)]

    def sources(self, numbers: list[str]) -> dict[str, str]:
        table = self.table("sources")
        sources = {key: table.text(key) for key in table.raw}
        table.refuse_unknown({*numbers, "default"})
        if "default" not in sources:
            for key in numbers:
                table.value(key)
        return {key: sources.get(key) or sources["default"] for key in numbers}


def check_file_name(kind: str, path: Path) -> None:
    """Refuse to write a device or cluster file under a name that would mean the catalog's.

    Raises:
        UsageError: the catalog has that name, so that the file would never be found under it.
    """
    names = {name for stem, file in _files(f"{kind}s").items() for name in (stem, *_read(file).get("aliases", ()))}
    if str(path).lower() in names:
        raise UsageError(f"{path} is a {kind} of the catalog", hint=f"call the file {path}.toml")


def _files(folder: str) -> dict[str, Path]:
    return {path.stem: path for path in (_CATALOG / folder).glob("*.toml")}


@functools.lru_cache(maxsize=256)
def _read(path: Path) -> dict[str, Any]:
    return read_toml(path)


def _locate(kind: str, name: str | Path) -> Path:
    """The file that `name` means: a path that ends in .toml, a catalog name or one of its aliases, any other file."""
    if str(name).endswith(".toml") or isinstance(name, Path):
        path = Path(name)
        if not path.is_file():
            raise UsageError(f"no {kind} file {path}", hint=f"ptsim {kind}s lists the catalog")
        return path.resolve()
    wanted = str(name).lower()
    files = _files(f"{kind}s")
    if wanted in files:
        return files[wanted]
    for path in files.values():
        if wanted in _read(path).get("aliases", ()):
            return path
    if Path(name).is_file():
        return Path(name).resolve()
    raise UnknownNameError(kind, str(name), files)


def _plain(driver_name: str) -> str:
    """Driver names with vendor and brand words, case and punctuation removed ("NVIDIA Tesla T4" is "t4")."""
    words = re.split(r"[\s_]+", driver_name.lower())
    return " ".join(word for word in words if word and word not in ("nvidia", "tesla", "geforce", "graphics", "device"))
