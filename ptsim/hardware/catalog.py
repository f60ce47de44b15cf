"""Which GPUs and clusters are known by name, and what a name or a file means. `forms.py` shows the files' form."""

from __future__ import annotations

import difflib
import functools
import os
import re
import warnings
from collections.abc import Iterable
from pathlib import Path

import msgspec

from ptsim.errors import FileFormatError, UnknownNameError, UsageError
from ptsim.hardware.doubts import cluster_doubts, device_doubts
from ptsim.hardware.forms import ARCHITECTURES, cluster_of, device_of
from ptsim.hardware.profile import DeviceProfile
from ptsim.hardware.spec import UNSPECIFIED, Cluster, Device
from ptsim.network import Precision
from ptsim.textfile import MOST_TOML_BYTES, parse_toml, read_bytes

_CATALOG = Path(__file__).parent / "catalog"


def device_names() -> tuple[str, ...]:
    """Names of the catalog's devices, without aliases, oldest generation first."""
    return tuple(
        sorted(_files("devices"), key=lambda name: (ARCHITECTURES.index(load_device(name).architecture), name))
    )


def cluster_names() -> tuple[str, ...]:
    """Names of the catalog's clusters, without aliases."""
    return tuple(sorted(_files("clusters")))


def load_device(name: str | Path | Device) -> Device:
    """The device called `name` in the catalog or by its driver, or described by the TOML file at that path, or itself.

    Warns of peaks in a file that hardly can be (`doubts.py`).

    Raises:
        UnknownNameError: neither a catalog name or alias nor a file.
        FileFormatError: a broken file; says file and field.
    """
    if isinstance(name, Device):
        return name
    path = _locate("device", name)
    device = _device_from(path, _content(path))
    if not _is_ours(path):
        for doubt in device_doubts(device):
            _say(path, doubt)
    return device


def load_cluster(name: str | Path | Cluster) -> Cluster:
    """The cluster called `name` in the catalog, or described by the TOML file at that path, or itself.

    Warns of numbers in a file that hardly can be (`doubts.py`).

    Raises:
        UnknownNameError: neither a catalog name or alias nor a file.
        FileFormatError: a broken file, or one that names a device that does not exist; says file and field.
    """
    if isinstance(name, Cluster):
        return name
    path = _locate("cluster", name)
    cluster, named = _cluster_from(path, _content(path))
    try:
        device = None if named == UNSPECIFIED else load_device(named)
    except UnknownNameError as error:
        raise FileFormatError(path, f"device: {error.message}", hint=error.hint) from error
    device_file = named if named.endswith(".toml") else ""
    cluster = msgspec.structs.replace(cluster, device=device, device_file=device_file)
    if not _is_ours(path):
        for doubt in cluster_doubts(cluster):
            _say(path, doubt)
    return cluster


@functools.lru_cache(maxsize=256)
def _say(path: Path, doubt: str) -> None:
    """A warning about a user's file, once in a process: it is read again and again."""
    warnings.warn(f"{path}: {doubt}", stacklevel=3)


def match_device(driver_name: str) -> Device | None:
    """The catalog's device that the driver calls `driver_name` ("NVIDIA A100-SXM4-40GB"); None where there is none."""
    devices = (_device_from(path, _content(path)) for path in _files("devices").values())
    return next((device for device in devices if is_called(device, driver_name)), None)


def is_called(device: Device, driver_name: str) -> bool:
    """Whether that is what the driver calls the device."""
    return _plain(driver_name) in map(_plain, device.driver_names)


def profiled_device(profile: DeviceProfile) -> Device:
    """What a device profile was measured on: the catalog's device of that name, or the processor itself.

    A processor has no data sheet here: its rates are 0, its times come from the profile alone.

    Raises:
        UsageError: a GPU that the catalog does not know.
    """
    known = match_device(profile.device)
    if known is not None:
        return known
    if profile.kind != "cpu":
        raise UsageError(
            f"the device profile is of {profile.device!r}, which the catalog does not have",
            hint="a TOML file with that name in its driver_names describes it: --gpu FILE.toml",
        )
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


def check_names(clusters: Iterable[Cluster]) -> None:
    """Refuse different clusters of one name, which is all that tells them apart in tables and results.

    Raises:
        UsageError: two of them differ and are called alike.
    """
    known: dict[str, Cluster] = {}
    for cluster in clusters:
        if known.setdefault(cluster.name, cluster) != cluster:
            raise UsageError(
                f"two different clusters are called {cluster.name!r}, and nothing would tell their results apart",
                hint="give one of them another name in its file",
            )


def device_aliases(name: str) -> tuple[str, ...]:
    """Other names of the catalog's device `name`."""
    return _names_in(_locate("device", name), "aliases")


def check_file_name(kind: str, path: Path) -> None:
    """Refuse to write a device or cluster file under a name that would mean the catalog's.

    Raises:
        UsageError: the catalog has that name, so that the file would never be found under it.
    """
    if os.sep not in str(path) and _named(kind, str(path)) is not None:
        raise UsageError(f"{path} is a {kind} of the catalog", hint=f"call the file {path}.toml")


def _files(folder: str) -> dict[str, Path]:
    return {path.stem: path for path in (_CATALOG / folder).glob("*.toml")}


@functools.lru_cache(maxsize=256)
def _device_from(path: Path, content: bytes) -> Device:
    return device_of(path, parse_toml(path, content))


@functools.lru_cache(maxsize=256)
def _cluster_from(path: Path, content: bytes) -> tuple[Cluster, str]:
    return cluster_of(path, parse_toml(path, content))


def _content(path: Path) -> bytes:
    """A user's file is read each time, since an edited file is another device or cluster."""
    return _catalog_content(path) if _is_ours(path) else read_bytes(path, most=MOST_TOML_BYTES)


def _is_ours(path: Path) -> bool:
    """Whether it is a file of the catalog."""
    return path.parent.parent == _CATALOG


@functools.lru_cache(maxsize=512)
def _catalog_content(path: Path) -> bytes:
    return path.read_bytes()


@functools.lru_cache(maxsize=512)
def _names_in(path: Path, key: str) -> tuple[str, ...]:
    """The names that a file of the catalog lists under `key`."""
    return tuple(parse_toml(path, _content(path)).get(key, ()))


def _locate(kind: str, name: str | Path) -> Path:
    """The file that `name` means: a path that ends in .toml or has a folder, a name of the catalog, any file."""
    if str(name).endswith(".toml") or isinstance(name, Path):
        if not os.path.exists(name):
            raise UsageError(f"no {kind} file {name}", hint=f"ptsim {kind}s lists the catalog")
        return Path(name).resolve()
    named = None if os.sep in name and os.path.isfile(name) else _named(kind, name)  # ./a100 is no A100
    if named is not None:
        return named
    if os.path.isfile(name):
        return Path(name).resolve()
    files = _files(f"{kind}s")
    otherwise = f"a TOML file can describe it; ptsim {kind}s lists those that are known"
    raise UnknownNameError(kind, name, files, close=_nearest(_plain(name), files.values()), otherwise=otherwise)


def _named(kind: str, name: str) -> Path | None:
    """The file of the catalog with this name, alias or driver name, however it is spelt; None where there is none."""
    files = _files(f"{kind}s")
    wanted = _plain(name)
    same = (path for path in files.values() if wanted in map(_plain, _names_of(path)))
    return files.get(name.lower()) or next(same, None)


def _names_of(path: Path) -> tuple[str, ...]:
    """All names of a file of the catalog."""
    return (path.stem, *_names_in(path, "aliases"), *_names_in(path, "driver_names"))


def _nearest(wanted: str, paths: Iterable[Path]) -> list[str]:
    """The catalog's names that are most like a plain one: the same model number first ("3080" in a laptop's name)."""
    numbers = set(_NUMBER.findall(wanted))
    scored = []
    for path in paths:
        plain = [_plain(name) for name in _names_of(path)]
        shared = max(sum(len(number) for number in numbers & set(_NUMBER.findall(name))) for name in plain)
        alike = max(difflib.SequenceMatcher(None, wanted, name).ratio() for name in plain)
        if shared or alike > 0.6:
            scored.append((-shared, -alike, path.stem))
    return [stem for *_, stem in sorted(scored)[:3]]


_NUMBER = re.compile(r"[a-z]*\d{2,}")  # of a model: "a100", "rtx3080", "3080"
_WORDS = ("nvidia", "corporation", "tesla", "geforce", "graphics", "device", "r", "tm")  # say nothing about which


def _plain(name: str) -> str:
    """A name without vendor and brand, case, blanks and punctuation: "NVIDIA Tesla T4" is "t4".

    Kubernetes writes hyphens for the driver's blanks, people write none.
    """
    return "".join(word for word in re.split(r"[\W_]+", name.lower()) if word and word not in _WORDS)
