"""What a study file asks for, and the projections that it expands to.

A study file:

    traces = ["runs/pruned", "runs/dense"]          # files, run folders or patterns, relative to the study file
    clusters = ["dgx-a100", "my-cluster.toml"]
    gpus = [1, 8, 64]
    profile = "a100.toml"                           # optional: of ptsim calibrate gpu
    what_ifs = ["as-recorded", "gpu=h100-sxm5-80gb", "channels-rounded-to=8 + bf16-gradients", "wider"]

    [options]                                       # of every configuration: ptsim.sim.options.Options
    scaling = "strong"

    [grid]                                          # options with several values: all combinations
    contention = [0.1, 0.2, 0.3]

    [what_if.wider]                                 # a what-if of one's own: options that it changes,
    bucket_bytes = 52428800
    trace = "runs/ratio-0.3"                        # and a trace that takes the place of every trace of the study
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from ptsim.answers.revision import foreign_rows, model_revision
from ptsim.errors import FileFormatError, UnknownNameError
from ptsim.hardware.catalog import check_names, is_called, load_cluster, load_device
from ptsim.hardware.profile_file import read_device_profile
from ptsim.hardware.spec import Cluster, Device
from ptsim.sim.options import Options
from ptsim.sim.run import change
from ptsim.textfile import convert_toml, read_bytes, read_toml
from ptsim.trace.io import MOST_BYTES, trace_path
from ptsim.units import Bytes


def _bytes(text: str) -> int:
    return round(Bytes.parse(text))


def _whole(text: str) -> int:
    number = int(text)
    if number < 0:
        raise ValueError(f"{text} is negative")
    return number


# name → the options that it sets; `=value` is parsed by the function where there is one
_WHAT_IFS: dict[str, tuple[Callable[[str], Any] | None, Callable[[Any], dict[str, Any]]]] = {
    "as-recorded": (None, lambda _: {}),
    "gpu": (str, lambda name: {"device": name}),
    "memory": (_bytes, lambda size: {"memory_bytes": size, "minibatch": "planned"}),
    "no-dynamic-minibatch": (None, lambda _: {"minibatch": "fixed"}),
    "planned-minibatch": (None, lambda _: {"minibatch": "planned"}),
    "max-minibatch": (_whole, lambda most: {"max_batch": most, "minibatch": "planned"}),
    "bucket": (_bytes, lambda size: {"bucket_bytes": size}),
    "channels-rounded-to": (_whole, lambda multiple: {"channel_multiple": multiple}),
    "one-time-reconfiguration": (_whole, lambda epoch: {"one_time_epoch": epoch}),
    "fp16-gradients": (None, lambda _: {"gradient_format": "fp16"}),
    "bf16-gradients": (None, lambda _: {"gradient_format": "bf16"}),
    "compressed-gradients": (float, lambda ratio: {"compression": ratio}),
    "precision": (str, lambda precision: {"precision": precision}),
    "micro-batches": (_whole, lambda number: {"micro_batches": number}),
    "strong-scaling": (None, lambda _: {"scaling": "strong"}),
    "weak-scaling": (None, lambda _: {"scaling": "weak"}),
    "recorded-jitter": (None, lambda _: {"jitter": "recorded"}),
    "shared-links": (_whole, lambda jobs: {"jobs": jobs}),
    "link-by-link": (None, lambda _: {"network": "links"}),
    "input": (str, lambda name: {"input": name}),
    "slow-input": (float, lambda rate: {"input_images_per_s": rate}),
    "failures": (float, lambda hours: {"faults": {"mtbf_gpu_hours": hours}}),
    # another interval or penalty ratio is another run: its trace takes the place of the study's
    "interval": (str, lambda trace: {"trace": trace}),
    "penalty-ratio": (str, lambda trace: {"trace": trace}),
    "trace": (str, lambda trace: {"trace": trace}),
}


class WhatIf(msgspec.Struct, frozen=True, kw_only=True):
    """A named change: options, and perhaps another trace."""

    name: str
    options: dict[str, Any]
    trace: Path | None = None


class Configuration(msgspec.Struct, frozen=True, kw_only=True):
    """One projection to compute.

    Attributes:
        index: its place in the study.
        key: digest of everything that the result depends on.
        labels: what tells it from its neighbours: the what-if and the grid's values, as far as the what-if leaves them.
    """

    index: int
    key: str
    trace: Path
    trace_digest: str
    cluster: Cluster
    gpus: int
    options: Options
    labels: dict[str, Any]
    profile: tuple[Path, str] | None = None  # file and digest


class Study(msgspec.Struct, frozen=True, kw_only=True):
    """A study, checked, with every name resolved."""

    path: Path
    traces: tuple[Path, ...]
    clusters: tuple[Cluster, ...]
    gpus: tuple[int, ...]
    what_ifs: tuple[WhatIf, ...]
    grid: dict[str, tuple[Any, ...]]
    options: Options
    profile: Path | None = None

    @property
    def num_configurations(self) -> int:
        """How many projections the study is."""
        return math.prod(
            [
                len(self.clusters),
                len(self.gpus),
                *(len(values) for values in self.grid.values()),
                sum(len(self.traces) if what_if.trace is None else 1 for what_if in self.what_ifs),
            ]
        )


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The study file as it is written."""

    traces: list[str]
    clusters: list[str]
    gpus: list[int]
    profile: str | None = None
    what_ifs: list[str] | None = None
    options: dict[str, Any] = {}
    grid: dict[str, list[Any]] = {}
    what_if: dict[str, dict[str, Any]] = {}


def read_study(path: str | Path) -> Study:
    """Read and check a study file; every trace, cluster, option and what-if must exist.

    Raises:
        FileFormatError: not TOML, an unknown key, a value of a wrong type, or nothing to compute.
        UnknownNameError: a what-if, cluster or device that does not exist.
        UsageError: an option out of its bounds, or different clusters of one name.
    """
    path = Path(path)
    file = _read_file(path)
    names = file.what_ifs if file.what_ifs is not None else ["as-recorded", *file.what_if]
    options = change(Options(), _near_devices(file.options, path))
    grid = {key: tuple(_near_devices({key: value}, path)[key] for value in file.grid[key]) for key in file.grid}
    what_ifs = tuple(_what_if(name, file.what_if, path) for name in names)
    devices = {} if options.device is None else {(device := load_device(options.device)).name: device}
    for changed in (
        *(_changed(options, what_if) for what_if in what_ifs),
        *(change(options, {key: value}) for key, choices in grid.items() for value in choices),
    ):
        for name in changed.mixed_devices:
            load_device(name)
        if changed.device is not None:
            device = load_device(changed.device)
            devices[device.name] = device
    clusters = tuple(load_cluster(_near(name, path)) for name in file.clusters)
    check_names(clusters)
    devices |= {cluster.device.name: cluster.device for cluster in clusters if cluster.device is not None}
    return Study(
        path=path,
        traces=tuple(itertools.chain.from_iterable(_trace_paths(pattern, path) for pattern in file.traces)),
        clusters=clusters,
        gpus=tuple(dict.fromkeys(file.gpus)),
        what_ifs=what_ifs,
        grid=grid,
        options=options,
        profile=_checked_profile(file.profile, path, devices),
    )


def _read_file(path: Path) -> _File:
    """The study file as it is written, every list of which holds something.

    Raises:
        FileFormatError: as `read_study`.
    """
    file = convert_toml(path, read_toml(path), _File)
    for key in ("traces", "clusters", "gpus", "what_ifs"):
        if getattr(file, key) is not None and not getattr(file, key):
            raise FileFormatError(path, f"{key} is empty, expected at least one")
    for count in file.gpus:
        if count < 1:
            raise FileFormatError(path, f"gpus holds {count}, expected positive numbers")
    for key, values in file.grid.items():
        if not values:
            raise FileFormatError(path, f"grid.{key} is empty, expected at least one value")
    if "trace" in file.options or "trace" in file.grid:
        raise FileFormatError(path, "trace is no option of [options] or [grid]; a what-if may name another trace")
    return file


def _checked_profile(name: str | None, study: Path, devices: Mapping[str, Device]) -> Path | None:
    """The profile's path; it must be of a device that the study has, or it would be left out everywhere."""
    if name is None:
        return None
    path = (study.parent / name).resolve()
    measured = read_device_profile(path).device
    if not any(is_called(device, measured) for device in devices.values()):
        known = ", ".join(sorted(devices))
        raise FileFormatError(study, f"profile {name} is of {measured!r}, the study has {known or 'no device'}")
    return path


def configurations(study: Study) -> Iterator[Configuration]:
    """The study's configurations, one after the other: what-ifs vary slowest, GPU counts fastest.

    Raises:
        UsageError: an option of the grid out of its bounds.
    """
    digest = functools.lru_cache(maxsize=None)(_digest)
    profile = None if study.profile is None else (study.profile, digest(study.profile))
    revision, index = (model_revision(), foreign_rows()), 0
    for what_if in study.what_ifs:
        for values in itertools.product(*study.grid.values()):
            grid = dict(zip(study.grid, values, strict=True))
            options = _changed(change(study.options, grid), what_if)
            in_force = {name: what_if.options.get(name, value) for name, value in grid.items()}
            labels = {"what_if": what_if.name, **in_force}
            device = None if options.device is None else load_device(options.device)
            mixed = [(load_device(name), count) for name, count in options.mixed_devices.items()]
            others = msgspec.structs.replace(options, device=None, mixed_devices={})
            for trace in (what_if.trace,) if what_if.trace is not None else study.traces:
                for cluster in study.clusters:
                    # what files hold, and not where they lie: they may be moved, and change under their names
                    where = msgspec.structs.replace(cluster, device_file="")
                    for gpus in study.gpus:
                        files = digest(trace), profile and profile[1]
                        content = (revision, *files, where, gpus, others, device, mixed)
                        yield Configuration(
                            index=index,
                            key=hashlib.sha256(msgspec.json.encode(content)).hexdigest()[:24],
                            trace=trace,
                            trace_digest=digest(trace),
                            cluster=cluster,
                            gpus=gpus,
                            options=options,
                            labels=labels,
                            profile=profile,
                        )
                        index += 1


def _changed(options: Options, what_if: WhatIf) -> Options:
    """The options with a what-if's; of how GPUs fail it changes what it names.

    Raises:
        UnknownNameError: an option that does not exist.
        UsageError: a value of a wrong type or out of its bounds.
    """
    changes = dict(what_if.options)
    if options.faults is not None and isinstance(faults := changes.get("faults"), dict):
        changes["faults"] = {**msgspec.structs.asdict(options.faults), **faults}
    return change(options, changes)


def _what_if(text: str, own: Mapping[str, Mapping[str, Any]], study: Path) -> WhatIf:
    """The what-if called `text`: one of the study's own, a built-in, or several joined by " + "."""
    options: dict[str, Any] = {}
    for part in text.split(" + "):
        name, equals, value = part.strip().partition("=")
        name, value = name.strip(), value.strip()
        if name in own and not equals:
            options |= own[name]
            continue
        if name not in _WHAT_IFS:
            raise UnknownNameError("what-if", name, [*_WHAT_IFS, *own])
        parse, made = _WHAT_IFS[name]
        if (parse is not None) != bool(value):
            needed = "needs a value, as in name=value" if parse is not None else "takes no value"
            raise FileFormatError(study, f"the what-if {name!r} {needed}")
        try:
            options |= made(parse(value) if parse is not None else None)
        except ValueError as error:
            raise FileFormatError(study, f"the what-if {part.strip()!r}: {error}") from error
    given = options.pop("trace", None)
    traces = [] if given is None else _trace_paths(str(given), study)
    if len(traces) > 1:
        raise FileFormatError(study, f"the what-if {text!r} names {len(traces)} traces, expected one")
    return WhatIf(name=text, options=_near_devices(options, study), trace=traces[0] if traces else None)


def _trace_paths(pattern: str, study: Path) -> list[Path]:
    """Trace files that a path or pattern means, relative to the study file."""
    if any(sign in pattern for sign in "*?["):
        base = Path(pattern) if Path(pattern).is_absolute() else study.parent / pattern
        anchor = Path(base.anchor)
        try:
            found = sorted(anchor.glob(str(base.relative_to(anchor))))
        except ValueError as error:  # such as "a**b"
            raise FileFormatError(study, f"traces: {pattern!r} is no pattern: {error}") from error
        if not found:
            raise FileFormatError(study, f"traces: nothing matches {pattern!r}")
        return [trace_path(path).resolve() for path in found]
    return [trace_path(study.parent / pattern).resolve()]


def _near(name: str, study: Path) -> str:
    return os.path.abspath(study.parent / name) if name.endswith(".toml") else name


def _near_devices(options: Mapping[str, Any], study: Path) -> dict[str, Any]:
    """The options with the files of devices that they name relative to the study."""
    found = dict(options)
    if isinstance(device := found.get("device"), str):
        found["device"] = _near(device, study)
    if isinstance(mixed := found.get("mixed_devices"), dict):
        found["mixed_devices"] = {_near(name, study): count for name, count in mixed.items()}
    return found


def _digest(path: Path) -> str:
    return hashlib.sha256(read_bytes(path, most=MOST_BYTES)).hexdigest()[:16]
