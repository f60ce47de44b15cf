"""Which kinds of files there are to damage: a whole example of each, and the commands that read it."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import msgspec

from ptsim.hardware.catalog import load_cluster
from ptsim.hardware.profile_file import read_device_profile
from ptsim.trace.io import read_trace
from tests.fuzz.mutate import damaged

HERE = Path(__file__).parent
CORPUS, WHOLE = HERE / "corpus", HERE / "whole"
CATALOG = HERE.parents[1] / "ptsim" / "hardware" / "catalog"


class Kind(msgspec.Struct, frozen=True):
    """A kind of input: its file name, whole examples, and the commands that read it as FILE beside the trace RUN.

    Attributes:
        commands: one of them reads each mutant.
        rare: what takes seconds; one in 150 mutants of a long campaign.
        few: how many mutants the ordinary tests try.
        share: of the time of a long campaign.
        written: a file that the commands write, and what reads it.
    """

    file: str
    whole: Callable[[], list[bytes]]
    commands: tuple[str, ...]
    rare: tuple[str, ...] = ()
    few: int = 40
    share: int = 1
    written: tuple[str, Callable[[str], object]] | None = None

    def mutant(self, draw: random.Random) -> bytes:
        """One damaged file."""
        return damaged(self.file, draw.choice(self.whole()), draw)

    def command(self, draw: random.Random, *, long: bool) -> str:
        """What reads it."""
        chosen = self.rare if long and self.rare and draw.random() < 1 / 150 else self.commands
        return draw.choice(chosen).replace("FILE", self.file)


def files(*paths: Path) -> Callable[[], list[bytes]]:
    """The contents of these files."""
    return lambda: [path.read_bytes() for path in paths]


def catalog(*names: str) -> Callable[[], list[bytes]]:
    """Files of the catalog."""
    return files(*(CATALOG / name for name in names))


SIMULATE = "simulate run --cluster dgx-a100 --gpus 1,16"
PLAN = "plan tiny.py:build --images 1000 --epochs 8 --batch 10 --interval 2 -o made.jsonl"
KINDS = {
    "trace": Kind(
        "trace.jsonl",
        files(Path("run") / "trace.jsonl"),
        (
            "cost FILE --json", "cost FILE --layers", "simulate FILE --cluster dgx-a100 --gpus 1,16 --json",
            "simulate FILE --cluster dgx-a100", "simulate FILE --cluster dgx-a100 --gpus 16 --network links --json",
            "simulate FILE --cluster dgx-a100 --scaling strong --minibatch planned --epochs 9 --json",
            "predict FILE --gpu v100 --json", "predict FILE --cluster dgx-a100 --gpus 8", "validate FILE --json",
            "validate FILE run", "export FILE -f chrome -o made.json", "export FILE -f chakra -o made",
            "export FILE -f parquet -o made", "simulate FILE --cluster dgx-a100 --timeline made.json --json",
        ),
        (f"{PLAN} --pruning like:FILE --json", "report FILE -o made --json", "report FILE run -o made"),
        share=3,
    ),
    "cluster": Kind(
        "cluster.toml",
        catalog("clusters/dgx-a100.toml", "clusters/aws-p4d-24xlarge.toml"),
        (
            "allreduce --cluster FILE --gpus 16 --bytes 25MiB --json", "allreduce --cluster FILE --gpus 2 --bytes 1M",
            "simulate run --cluster FILE --gpus 1,16 --json", "simulate run --cluster FILE --gpus 16 --network links",
            "predict run --cluster FILE --json", "calibrate network --nccl-log log.txt --base FILE --out made.toml",
        ),
        ("report run --cluster FILE -o made --json",),
    ),
    "device": Kind(
        "device.toml",
        catalog("devices/l4.toml", "devices/h100-sxm5-80gb.toml"),
        (f"{SIMULATE} --device FILE --json", "predict run --gpu FILE --json", "cost run --gpu FILE --json",
         "predict run --gpu FILE --precision amp"),
    ),
    "nccl": Kind(
        "log.txt",
        files(*sorted((HERE.parent / "hardware" / "nccl").glob("*.txt"))),
        ("calibrate network --nccl-log FILE --out made.toml",
         "calibrate network --nccl-log FILE --nodes 2 --out made.toml"),
        written=("made.toml", load_cluster),
    ),
    "profile": Kind(
        "profile.toml",
        files(WHOLE / "profile.toml"),
        ("predict run --batch 32 --profile FILE --json", "predict run --batch 7 --profile FILE",
         f"{SIMULATE} --profile FILE --json", "validate run --profile FILE --json"),
    ),
    "study": Kind(
        "study.toml", files(WHOLE / "study.toml"), ("sweep FILE --workers 1 --json",),
        few=8,  # one that is right starts a process
    ),
    "kineto": Kind(
        "recorded.json", files(WHOLE / "kineto.json"),
        ("import kineto FILE -o made.toml --json", "import kineto FILE -o made.toml"),
        written=("made.toml", read_device_profile),
    ),
    "mllog": Kind(
        "log.txt", files(WHOLE / "mllog.txt"),
        ("validate --mllog FILE --cluster dgx-a100 --model run --json",
         "validate --mllog FILE --cluster dgx-a100 --model run"),
    ),
    "densities": Kind(
        "densities.toml", files(WHOLE / "densities.toml"), (f"{PLAN} --pruning FILE --json",), few=10,
        written=("made.jsonl", read_trace),
    ),
}  # fmt: skip
