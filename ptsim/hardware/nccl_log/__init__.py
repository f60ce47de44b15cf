"""What an nccl-tests log says: message sizes, times, how many GPUs on how many nodes; text old and new, JSON and CSV.

A log may hold several runs, other collectives, launcher noise, colours and prefixes ("[1,0]<stdout>:", "0: ", time
stamps), rows that NCCL's messages cut in two, the marks that a web page adds or takes away, and the JSON or CRI form in
which containers keep their output; the all-reduces are taken. Of several data types or reductions the float sum counts;
run cycles (`-N`) are runs. What cannot be trusted is refused: output that stops in the middle, output of several ranks
mixed, wrong results.
Own code: no library reads these logs, and the JSON output of nccl-tests is newer than most logs that people have.
"""

from __future__ import annotations

from ptsim.hardware.nccl_log.reading import read_nccl_log, read_nccl_logs
from ptsim.hardware.nccl_log.record import NcclLog, NcclMeasurement, of_one_kind, with_nodes

__all__ = ["NcclLog", "NcclMeasurement", "of_one_kind", "read_nccl_log", "read_nccl_logs", "with_nodes"]
