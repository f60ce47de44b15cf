"""`ptsim doctor`: what this machine has, what can run on it, and what to do about the rest.

`look` asks the machine and reports it as a record; everything that follows from that record is computed without
touching the machine again, so that tests can describe machines that nobody has at hand.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import warnings
from typing import Literal

import msgspec
from rich.table import Table

from ptsim.cli.common import print_json, stdout_console
from ptsim.cli.main import COMMANDS
from ptsim.cli.options import Json
from ptsim.costs.tiers import Tier, ordered_tiers
from ptsim.errors import on_one_line
from ptsim.hardware.catalog import match_device
from ptsim.units import format_bytes

EXTRAS = {  # extra → its packages, as in pyproject.toml
    "onnx": ("onnx", "onnxscript"),
    "dask": ("distributed",),
    "lightning": ("lightning",),
    "huggingface": ("transformers", "accelerate", "datasets"),
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb",),
    "mlflow": ("mlflow-skinny",),
}


class Gpu(msgspec.Struct, frozen=True, kw_only=True):
    """One GPU that torch can use."""

    name: str
    memory_bytes: int
    catalog_name: str | None  # what `--gpu` calls it; None if the catalog does not have it


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """What `look` found. None means that it is missing, or that it cannot be asked."""

    python: str
    system: str
    cores: int  # that this process may use
    memory_bytes: int | None
    free_disk_bytes: int | None  # of the present folder
    ptsim: str
    torch: str | None
    torchvision: str | None
    cuda: str | None  # the version that torch was built for
    gpus: tuple[Gpu, ...]
    nvml: str | None  # the driver's version
    nccl: str | None
    gloo: bool
    compiler: str | None  # torch.compile needs one
    extras: dict[str, bool]


State = Literal["yes", "partly", "no"]


class Ability(msgspec.Struct, frozen=True, kw_only=True):
    """Whether something can be done on this machine; if only in part or not at all, why, and what helps."""

    name: str
    state: State
    reason: str = ""
    remedy: str = ""


class Examination(msgspec.Struct, frozen=True, kw_only=True):
    """The machine, and what can be done on it."""

    machine: Machine
    tiers: tuple[Ability, ...]
    commands: tuple[Ability, ...]


def doctor(*, json: Json = False) -> int:
    """Show what this machine has, which commands and tiers can run here, and what to do about the rest.

    The exit status is 1 if something that ptsim always needs is missing. A missing GPU is not an error.
    """
    found = examine(look())
    if json:
        print_json(found)
    else:
        _print(found)
    return 0 if found.machine.torch and found.machine.torchvision else 1


def look() -> Machine:
    """Ask this machine. Nothing is changed, and nothing is computed on a GPU."""
    torch, cuda, gpus, nccl, gloo = _torch()
    return Machine(
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_bytes=_memory_bytes(),
        free_disk_bytes=_free_disk_bytes(),
        ptsim=importlib.metadata.version("ptsim"),
        torch=torch,
        torchvision=_version("torchvision"),
        cuda=cuda,
        gpus=gpus,
        nvml=_nvml(),
        nccl=nccl,
        gloo=gloo,
        compiler=next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None),
        extras={extra: all(_installed(name) for name in names) for extra, names in EXTRAS.items()},
    )


def examine(machine: Machine) -> Examination:
    """What can be done on such a machine."""
    return Examination(machine=machine, tiers=_tiers(machine), commands=_commands(machine))


def _tiers(machine: Machine) -> tuple[Ability, ...]:
    """Where a step's time can come from, best first: what this machine itself can measure for the upper two."""
    state: State = "yes"
    reason = remedy = ""
    if machine.torch is None:
        state, reason = "no", "nothing can be measured here without torch"
    elif not machine.gpus:
        state, reason = "partly", "only this machine's CPU can be measured: torch sees no GPU"
    if reason:
        remedy = "measure on the machine with the GPU ({}) and use the file here"
    special = {
        str(tier): Ability(name=str(tier), state=state, reason=reason, remedy=remedy.format(command))
        for tier, command in ((Tier.MEASURED, "ptsim train"), (Tier.PROFILED, "ptsim calibrate gpu"))
    }
    return tuple(special.get(row.name) or _anywhere(str(row.name)) for row in ordered_tiers())


def _commands(machine: Machine) -> tuple[Ability, ...]:
    """Every command, with what this machine lacks for it."""
    torch = "pip install torch torchvision"
    no_torch = not (machine.torch and machine.torchvision)
    no_gpu = not machine.gpus

    def live(name: str, partly: str = "", remedy: str = "") -> Ability:
        if no_torch:
            return Ability(name=name, state="no", reason="needs torch and torchvision", remedy=torch)
        return Ability(name=name, state="partly" if partly else "yes", reason=partly, remedy=remedy)

    def of_models(name: str, without: str = "traces only") -> Ability:
        if no_torch:
            return Ability(name=name, state="partly", reason=f"{without}: networks are built by torch", remedy=torch)
        return _anywhere(name)

    slow = f"trains on the CPU ({machine.cores} cores): torch sees no GPU" if no_gpu else ""
    no_energy = "" if machine.nvml or no_gpu else "records no power and energy: NVML does not answer"
    cpu = "measures this machine's CPU: torch sees no GPU" if no_gpu else ""
    gpu_remedy = _gpu_remedy(machine)
    driver = "make libnvidia-ml.so.1 of the NVIDIA driver visible to this process"
    lacking = {name for name, there in machine.extras.items() if not there}
    no_onnx = "without --format onnx"
    export = of_models("export", no_onnx) if no_torch else _with_extra("export", "onnx", no_onnx, lacking)
    special = {
        "demo": (live("demo"),),
        "train": (live("train", slow or no_energy, gpu_remedy if slow else driver if no_energy else ""),),
        "inspect": (live("inspect"),),
        "cost": (of_models("cost"),),
        "predict": (of_models("predict"),),
        "plan": (live("plan"),),
        "validate": (of_models("validate"),),
        "calibrate": (live("calibrate gpu", cpu, gpu_remedy if cpu else ""), _calibrate_network(machine)),
        "import": (of_models("import", "without --model"),),
        "sweep": (_with_extra("sweep", "dask", "without --dask", lacking),),
        "export": (export,),
    }
    others = (name for name in COMMANDS if name not in ("doctor", *special))
    return (*(ability for found in special.values() for ability in found), *(_anywhere(name) for name in others))


def _anywhere(name: str) -> Ability:
    """A command that needs neither torch nor a GPU."""
    return Ability(name=name, state="yes")


def _calibrate_network(machine: Machine) -> Ability:
    """Live all-reduces with NCCL need GPUs; with gloo they need none; logs need nothing."""
    name = "calibrate network"
    if machine.nccl and machine.gpus:
        return Ability(name=name, state="yes")
    reason = "reads nccl-tests logs; live only gloo" if machine.gloo else "reads nccl-tests logs only"
    remedy = "run all_reduce_perf on the cluster and give its output to --nccl-log"
    return Ability(name=name, state="partly", reason=reason, remedy=remedy)


def _with_extra(name: str, extra: str, without: str, lacking: set[str]) -> Ability:
    if extra not in lacking:
        return _anywhere(name)
    packages = ", ".join(EXTRAS[extra])
    return Ability(
        name=name, state="partly", reason=f"{without}: {packages} not installed", remedy=f"pip install 'ptsim[{extra}]'"
    )


def _gpu_remedy(machine: Machine) -> str:
    """Why torch sees no GPU, as far as it can be told apart, and what to do about it."""
    if machine.torch is None or machine.gpus:
        return ""
    if machine.cuda is None:
        return "this torch is a CPU build; install one for CUDA" if machine.nvml else "train on a machine with a GPU"
    if machine.nvml is None:
        return f"torch is built for CUDA {machine.cuda}, but no NVIDIA driver answers: install the driver"
    return f"the driver {machine.nvml} answers but torch sees no GPU: look at CUDA_VISIBLE_DEVICES and the driver's age"


def _torch() -> tuple[str | None, str | None, tuple[Gpu, ...], str | None, bool]:
    """Version, CUDA version, GPUs, NCCL's version, and whether gloo is there; importing torch takes seconds."""
    if _version("torch") is None:
        return None, None, (), None, False
    try:
        import torch
        import torch.distributed as dist
    except (ImportError, OSError) as error:  # a library of CUDA that is not there, half an installation
        warnings.warn(f"torch is installed, but cannot be imported: {on_one_line(error)}", stacklevel=1)
        return None, None, (), None, False
    gpus = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        known = match_device(properties.name)
        gpus.append(
            Gpu(
                name=properties.name,
                memory_bytes=properties.total_memory,
                catalog_name=None if known is None else known.name,
            )
        )
    nccl = None
    if dist.is_available() and dist.is_nccl_available():
        nccl = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    return (
        str(torch.__version__),
        torch.version.cuda,
        tuple(gpus),
        nccl,
        dist.is_available() and dist.is_gloo_available(),
    )


def _version(package: str) -> str | None:
    """The installed version of an importable package."""
    try:
        if importlib.util.find_spec(package) is None:
            return None
        return importlib.metadata.version(package)
    except (importlib.metadata.PackageNotFoundError, ValueError):  # ValueError: its import is blocked
        return None


def _installed(distribution: str) -> bool:
    """Whether a distribution is installed; it may be called otherwise than what it imports as."""
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _nvml() -> str | None:
    """The NVIDIA driver's version, or None where none answers."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        return str(pynvml.nvmlSystemGetDriverVersion())
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def _free_disk_bytes() -> int | None:
    try:
        return shutil.disk_usage(".").free
    except OSError:
        return None


def _print(found: Examination) -> None:
    machine, console = found.machine, stdout_console(highlight=False)
    console.print(
        f"ptsim {machine.ptsim}, Python {machine.python}, {machine.system}, {machine.cores} cores, "
        f"{_bytes(machine.memory_bytes)} memory, {_bytes(machine.free_disk_bytes)} free here"
    )
    table = Table(box=None, show_header=False)
    for name, value in (
        ("torch", machine.torch),
        ("torchvision", machine.torchvision),
        ("CUDA", machine.cuda),
        *(("GPU", _describe(gpu)) for gpu in machine.gpus),
        ("NVIDIA driver (NVML)", machine.nvml),
        ("NCCL", machine.nccl),
        ("gloo", "yes" if machine.gloo else None),
        ("C++ compiler", machine.compiler),
        *((f"extra {extra}", "yes" if there else None) for extra, there in machine.extras.items()),
    ):
        table.add_row(name, value or "not found")
    console.print(table)
    for title, abilities in (("tier of step time", found.tiers), ("command", found.commands)):
        table = Table(title, "here", "why", "what helps", box=None, title_justify="left")
        for ability in abilities:
            table.add_row(ability.name, ability.state, ability.reason, ability.remedy)
        console.print()
        console.print(table)


def _describe(gpu: Gpu) -> str:
    known = f"--gpu {gpu.catalog_name}" if gpu.catalog_name else "not in the catalog; describe it in a TOML file"
    return f"{gpu.name}, {format_bytes(gpu.memory_bytes)} ({known})"


def _bytes(value: int | None) -> str:
    return "unknown" if value is None else format_bytes(value)
