"""The all-reduces of one nccl-tests run, as data."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import TypeVar

import msgspec

from ptsim.errors import FileFormatError

_T = TypeVar("_T")


class NcclMeasurement(msgspec.Struct, frozen=True, kw_only=True):
    """One message size; a time that the log does not give is None."""

    size_bytes: int
    out_of_place_s: float | None
    in_place_s: float | None

    @property
    def seconds(self) -> float:
        """The geometric mean of what was measured: the two differ by noise alone."""
        times = [time for time in (self.out_of_place_s, self.in_place_s) if time is not None]
        return math.exp(sum(map(math.log, times)) / len(times))


class NcclLog(msgspec.Struct, frozen=True, kw_only=True):
    """The all-reduces of one nccl-tests run, by rising size."""

    path: str
    num_gpus: int
    num_nodes: int | None  # None where the log does not say it
    gpus: tuple[str, ...]  # driver names
    version: str | None
    measurements: tuple[NcclMeasurement, ...]
    kind: tuple[str, str] = ("float", "sum")  # data type and reduction
    may_share: bool = False  # some of its hosts name no bus number in common, as containers of one machine do

    @property
    def relative_jitter(self) -> float:
        """Standard deviation of one time over its mean, from the pairs of out-of-place and in-place times.

        The median absolute log ratio of a pair of normal deviates is 0.954 σ; a run without pairs says nothing (0).
        """
        ratios = sorted(
            abs(math.log(m.out_of_place_s / m.in_place_s))
            for m in self.measurements
            if m.out_of_place_s is not None and m.in_place_s is not None
        )
        return ratios[len(ratios) // 2] / 0.954 if ratios else 0.0


def of_one_kind(items: Sequence[_T], kind_of: Callable[[_T], tuple[str, str]], where: str) -> list[_T]:
    """Of several data types and reductions those that count: the float sum, else the first.

    Args:
        items: runs or rows.
        kind_of: data type and reduction of one.
        where: what a `UserWarning` calls them, which tells of those that are left out.
    """
    kinds = dict.fromkeys(map(kind_of, items))
    chosen = min(kinds, key=lambda kind: (kind[0] not in ("float", "float32"), kind[1] != "sum"))
    if others := [" ".join(kind) for kind in kinds if kind != chosen]:
        said = f"that reduced {' and '.join(others)} are left out beside those of {' '.join(chosen)}"
        warnings.warn(f"{where} {said}", stacklevel=4)
    return [item for item in items if kind_of(item) == chosen]


def with_nodes(log: NcclLog, num_nodes: int | None = None, gpus_per_node: int | None = None) -> NcclLog:
    """The log with its number of nodes, which is the caller's where the log does not say it.

    A number that the log contradicts is left out with a `UserWarning`. Hosts that may be containers of one machine are
    nodes, as NCCL takes them, with a `UserWarning`, unless the caller says how many machines there were.

    Args:
        log: a run.
        num_nodes: on which it was.
        gpus_per_node: of the machine, where that is what the caller knows.

    Raises:
        FileFormatError: nothing tells the number, or there cannot be so many nodes.
    """
    if log.num_nodes is not None:
        if log.may_share and num_nodes is not None and 1 <= num_nodes <= log.num_nodes:
            return msgspec.structs.replace(log, num_nodes=num_nodes, may_share=False)
        if num_nodes not in (None, log.num_nodes):
            warnings.warn(
                f"{log.path}: the given number of nodes, {num_nodes}, is ignored: the log itself says that its "
                f"{log.num_gpus} GPUs were on {log.num_nodes}",
                stacklevel=2,
            )
        elif log.may_share:
            warnings.warn(
                f"{log.path}: its {log.num_nodes} hosts may be containers, some of them on one machine, since the GPUs "
                "of two have no bus number in common; each is taken for a node, as NCCL takes it (--nodes N says how "
                "many machines there were)",
                stacklevel=2,
            )
        return msgspec.structs.replace(log, may_share=False)
    if num_nodes is None and gpus_per_node is not None:
        num_nodes = -(-log.num_gpus // gpus_per_node)
    if num_nodes is None:
        raise FileFormatError(
            log.path,
            f"does not list its devices node by node, nor does a line that launched it tell, so on how many nodes its "
            f"{log.num_gpus} GPUs were is unknown",
            hint="--nodes N says it, or --base CLUSTER, whose nodes have a size",
        )
    if not 1 <= num_nodes <= log.num_gpus:
        raise FileFormatError(log.path, f"is a run of {log.num_gpus} GPUs, which cannot be on {num_nodes} nodes")
    return msgspec.structs.replace(log, num_nodes=num_nodes)
