"""How a device or cluster file is written: which keys it has, in which units and within which bounds.

A device file:

    name = "a100-sxm4-40gb"
    aliases = ["a100"]                           # other names that users type
    driver_names = ["NVIDIA A100-SXM4-40GB"]     # what NVML and the CUDA driver call it: tells whose measurements count
    architecture = "ampere"
    memory = "40 GiB"
    stacked_memory = true                        # HBM; left out: GDDR, or not known
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
    price_date = "2026-09-24"                    # of a list price; left out: what you pay
    cores_per_node = 128                         # physical CPU cores, which input pipelines share; optional
    storage_bandwidth = "2 GB/s"                 # at which a node reads images; left out: they lie in its memory

    library = "nccl"                             # or "gloo"
    reduces_in_switch = false                    # NVLink SHARP (H100 and newer behind NVSwitch)

    [intra]                                      # one GPU, one direction; left out: every node has one GPU
    name = "NVLink 3"
    kind = "nvlink"                              # or pcie, infiniband, efa, tcpx, tcp; left out: as measured
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

import datetime
import itertools
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, get_args

import msgspec
import tomli_w

from ptsim.errors import FileFormatError, UsageError
from ptsim.hardware.spec import AllReduceTable, AlphaBeta, Cluster, Device, Generation, Link, LinkKind
from ptsim.network import Precision
from ptsim.textfile import convert_toml, write_whole
from ptsim.units import (
    Bytes,
    BytesPerSecond,
    FlopsPerSecond,
    Hertz,
    Quantity,
    Seconds,
    UsdPerHour,
    Watts,
    read_quantity,
    write_quantity,
)

Architecture: TypeAlias = Literal[Generation, "cpu"]
ARCHITECTURES: tuple[str, ...] = get_args(Architecture)

Name: TypeAlias = Annotated[str, msgspec.Meta(min_length=1, max_length=300, pattern=r"\S")]
Count: TypeAlias = Annotated[int, msgspec.Meta(ge=1, le=10**6)]
SizeBytes: TypeAlias = Annotated[int, msgspec.Meta(ge=1, le=2**60)]
MeasuredSeconds: TypeAlias = Annotated[float, msgspec.Meta(ge=1e-15, le=3.2e9)]


class _Form(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A table of the file. Attributes are called as the record's fields, keys as people write them."""


class _Peaks(_Form, frozen=True, kw_only=True):
    """By precision; what is left out is not supported."""

    fp32: FlopsPerSecond
    tf32: FlopsPerSecond | None = None
    bf16: FlopsPerSecond | None = None
    fp16: FlopsPerSecond | None = None


class _DeviceForm(_Form, frozen=True, kw_only=True):
    name: Name
    architecture: Architecture
    memory_bytes: Bytes = msgspec.field(name="memory")
    memory_bandwidth_bytes_per_s: BytesPerSecond = msgspec.field(name="memory_bandwidth")
    num_sms: Count
    boost_clock_hz: Hertz = msgspec.field(name="boost_clock")
    l2_bytes: Bytes = msgspec.field(name="l2_cache")
    power_w: Watts = msgspec.field(name="power")
    idle_power_w: Watts = msgspec.field(name="idle_power")
    peak_flops_per_s: _Peaks = msgspec.field(name="peak")
    sources: dict[str, Name]
    boosts_beyond: bool = False
    stacked_memory: bool = False
    driver_names: tuple[Name, ...] = ()
    aliases: tuple[Name, ...] = ()


class _LinkForm(_Form, frozen=True, kw_only=True):
    name: Name
    bandwidth_bytes_per_s: BytesPerSecond = msgspec.field(name="bandwidth")
    latency_s: Seconds | None = msgspec.field(name="latency", default=None)
    kind: LinkKind = LinkKind.MEASURED
    efficiency: Annotated[float, msgspec.Meta(ge=1e-3, le=10)] | None = None


class _SegmentForm(_Form, frozen=True, kw_only=True):
    from_bytes: Annotated[int, msgspec.Meta(ge=0, le=2**60)] = 0
    latency_s: Seconds = msgspec.field(name="latency")
    seconds_per_byte: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0


class _TableForm(_Form, frozen=True, kw_only=True):
    num_gpus: Count
    num_nodes: Count
    size_bytes: Annotated[tuple[SizeBytes, ...], msgspec.Meta(min_length=1)]
    seconds: tuple[MeasuredSeconds, ...]
    relative_jitter: Annotated[float, msgspec.Meta(ge=0, le=10)] = 0.0
    source: Name
    segments: tuple[_SegmentForm, ...] = ()


class _ClusterForm(_Form, frozen=True, kw_only=True):
    name: Name
    device: Name
    gpus_per_node: Count
    intra: _LinkForm | None = None
    inter: _LinkForm | None = None
    nics_per_node: Count = 1
    max_nodes: Count | None = None
    oversubscription: Annotated[float, msgspec.Meta(ge=1, le=10**4)] = 1.0
    nodes_per_leaf: Count = 16
    nvswitch: bool = False
    reduces_in_switch: bool = False
    library: Literal["nccl", "gloo"] = "nccl"
    tables: tuple[_TableForm, ...] = msgspec.field(name="table", default=())
    price_usd_per_gpu_hour: UsdPerHour | None = msgspec.field(name="price_per_gpu", default=None)
    price_date: datetime.date | None = None
    cores_per_node: Count | None = None
    storage_bandwidth_bytes_per_s: BytesPerSecond | None = msgspec.field(name="storage_bandwidth", default=None)
    sources: dict[str, Name]
    aliases: tuple[Name, ...] = ()


_FORMS: dict[type, type[_Form]] = {
    Device: _DeviceForm,
    Cluster: _ClusterForm,
    Link: _LinkForm,
    AllReduceTable: _TableForm,
    AlphaBeta: _SegmentForm,
}
_OPTIONAL_NUMBERS = ("intra", "inter", "price_per_gpu", "cores_per_node", "storage_bandwidth")  # of a cluster
_RECORDS = {form: record for record, form in _FORMS.items()}


def device_of(path: Path, raw: dict[str, Any]) -> Device:
    """The device that a TOML document is; `path` is where it was read.

    Raises:
        FileFormatError: a key, value or unit that does not belong there; says which, and what is expected.
    """
    form = convert_toml(path, raw, _DeviceForm, dec_hook=read_quantity)
    if form.idle_power_w > form.power_w:
        raise FileFormatError(path, "idle_power is above power")
    numbers = ["memory", "memory_bandwidth", "boost_clock", "l2_cache", "power", "idle_power", "num_sms", "peak"]
    device: Device = _record(form)
    return msgspec.structs.replace(device, sources=_sources(path, form.sources, numbers))


def cluster_of(path: Path, raw: dict[str, Any]) -> tuple[Cluster, str]:
    """The cluster that a TOML document is, without its device, and what the device is called.

    A device file that it names is relative to `path`; the name is then the file's path.

    Raises:
        FileFormatError: as `device_of`, or tables whose sizes and times do not belong together.
    """
    form = convert_toml(path, raw, _ClusterForm, dec_hook=read_quantity)
    for name, link in (("intra", form.intra), ("inter", form.inter)):
        if link is not None and link.kind is LinkKind.MEASURED and link.latency_s is None:
            raise FileFormatError(path, f"{name}.latency is missing; a link without a kind needs it")
    for index, table in enumerate(form.tables):
        _check_table(path, f"table[{index}]", table)
    if form.price_date is not None and form.price_usd_per_gpu_hour is None:
        raise FileFormatError(path, "price_date is there without price_per_gpu, expected both or neither")
    layouts = [(table.num_gpus, table.num_nodes) for table in form.tables]
    if twice := next((layout for layout in layouts if layouts.count(layout) > 1), None):
        raise FileFormatError(path, f"has two tables of {twice[0]} GPUs on {twice[1]} nodes, expected one")
    numbers = [key for key in _OPTIONAL_NUMBERS if key in raw]
    if form.intra is None:
        if form.inter is None or form.gpus_per_node > 1:
            raise FileFormatError(
                path, "[intra] is missing; leave it out only where gpus_per_node is 1 and there is an [inter]"
            )
        form = msgspec.structs.replace(form, intra=msgspec.structs.replace(form.inter, name="none: one GPU a node"))
    cluster: Cluster = _record(form)
    named = str((path.parent / form.device).resolve()) if form.device.endswith(".toml") else form.device
    whole = msgspec.structs.replace(
        cluster,
        max_nodes=1 if form.max_nodes is None and form.inter is None else form.max_nodes,
        sources=_sources(path, form.sources, numbers),
    )
    return whole, named


def _check_table(path: Path, place: str, table: _TableForm) -> None:
    sizes, seconds = table.size_bytes, table.seconds
    if len(sizes) != len(seconds):
        problem = f"{place}.seconds has {len(seconds)} values for {len(sizes)} sizes, expected one each"
        raise FileFormatError(path, problem)
    if any(b <= a for a, b in itertools.pairwise(sizes)):
        raise FileFormatError(path, f"{place}.size_bytes is not in ascending order")
    if not table.num_gpus >= 2 or table.num_nodes > table.num_gpus:
        problem = f"{place} is of {table.num_gpus} GPUs on {table.num_nodes} nodes, expected at least 2 and one a node"
        raise FileFormatError(path, problem)


def _sources(path: Path, sources: dict[str, str], numbers: list[str]) -> dict[str, str]:
    """A source for every number; `default` stands for those not named."""
    for key in sources:
        if key not in (*numbers, "default"):
            raise FileFormatError(
                path, f"sources.{key} is not a known key, expected one of {', '.join([*numbers, 'default'])}"
            )
    missing = [key for key in numbers if key not in sources and "default" not in sources]
    if missing:
        raise FileFormatError(path, f"sources.{missing[0]} is missing")
    return {key: sources.get(key) or sources["default"] for key in numbers}


def write_cluster(cluster: Cluster, path: Path) -> None:
    """Write the cluster as a TOML file that `load_cluster` reads back, whole or not at all.

    Raises:
        UsageError: it cannot be written: a full disk, no right to.
        FileFormatError: what would be written could not be read back, such as a blank name.
    """
    document = msgspec.to_builtins(_form(cluster), enc_hook=write_quantity)
    cluster_of(path, document)
    try:
        write_whole(path, tomli_w.dumps(document))
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}") from error


def _record(form: Any) -> Any:
    """The record in SI units that a form is: quantities become plain numbers, bytes whole ones."""
    if isinstance(form, tuple):
        return tuple(_record(part) for part in form)
    if isinstance(form, Bytes):
        return round(form)
    if isinstance(form, Quantity):
        return float(form)
    if isinstance(form, _Peaks):
        known = msgspec.structs.asdict(form).items()
        return {Precision(name): float(peak) for name, peak in known if peak is not None}
    if not isinstance(form, _Form):
        return form
    kind: Any = _RECORDS[type(form)]
    fields = {field: _record(getattr(form, field)) for field in kind.__struct_fields__ if hasattr(form, field)}
    return kind(**fields | {"device": None} if kind is Cluster else fields)  # the catalog looks the device up


def _form(record: Any) -> Any:
    """The form of a record: `_record` backwards."""
    if isinstance(record, tuple):
        return tuple(_form(part) for part in record)
    if type(record) not in _FORMS:
        return record
    form = _FORMS[type(record)]
    hints = {field.name: field.type for field in msgspec.structs.fields(form)}
    values = {}
    for field in form.__struct_fields__:
        if field == "aliases":  # of catalog files, which nobody writes
            continue
        value = getattr(record, field)
        if isinstance(record, Cluster) and field == "device":
            value = record.device_file or record.device_name
        if isinstance(record, Cluster) and field == "intra" and not record.links_inside:
            value = None
        quantity = _quantity_type(hints[field])
        values[field] = _form(value) if value is None or quantity is None else quantity(value)
    return form(**values)


def _quantity_type(hint: Any) -> type[Quantity] | None:
    """Which quantity a field is, also where it may be left out."""
    choices = (hint, *getattr(hint, "__args__", ()))
    return next((kind for kind in choices if isinstance(kind, type) and issubclass(kind, Quantity)), None)
