"""What simulated training steps look like on a time line: Chrome/Kineto traces of every architecture of a run.

A process is a GPU, its threads are the compute and the communication stream, the counter is the memory that the step
holds, an arrow goes from the layer that completes a bucket to the bucket's all-reduce. Architectures follow each other
with a gap. One file holds all GPUs (Perfetto); a folder gets one file per GPU, as HolisticTraceAnalysis wants them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ptsim.costs.memory import iteration_memory
from ptsim.errors import UsageError
from ptsim.export.chrome import COMMUNICATION_STREAM, COMPUTE_STREAM, Timeline
from ptsim.export.ranks import check_no_other_ranks
from ptsim.hardware.profile import DeviceProfile
from ptsim.hardware.spec import Cluster
from ptsim.network import Layer
from ptsim.sim.options import Options
from ptsim.sim.run import RecordedSteps, record_steps
from ptsim.sim.work import Span
from ptsim.trace.trace import Trace

NUM_STEPS = 2
GAP_S = 1e-3  # between architectures, so that the eye finds them


def write_timeline(
    path: Path,
    trace: Trace,
    cluster: Cluster,
    num_gpus: int,
    options: Options | None = None,
    *,
    device_profile: DeviceProfile | None = None,
    shown: int = 8,
) -> list[Path]:
    """Simulate steps of every architecture and write what the first `shown` GPUs do.

    Args:
        path: a .json file for all GPUs together; any other path is a folder with a file per GPU.
        trace: of the run.
        cluster: where it is projected.
        num_gpus: how many GPUs train; at most `shown` of them are drawn.
        options: of the simulation.
        device_profile: of the projected device, from `ptsim calibrate gpu`.
        shown: how many GPUs to draw.

    Returns:
        The files that were written.

    Raises:
        UsageError: a file cannot be written, the folder holds files of more ranks, and what `project` raises.
    """
    recorded = record_steps(
        trace, cluster, num_gpus, options, device_profile=device_profile, num_steps=NUM_STEPS, shown=shown
    )
    drawn = min(shown, num_gpus)
    if path.suffix == ".json":
        timeline = _timeline(trace, recorded, num_gpus, 0)
        for gpu in range(drawn):
            _add_gpu(timeline, trace, cluster, recorded, gpu)
        return [timeline.write(path)]
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path} is neither a .json file nor a folder")
    check_no_other_ranks(path, "rank_*.json", drawn)
    files = []
    for gpu in range(drawn):
        timeline = _timeline(trace, recorded, num_gpus, gpu)
        _add_gpu(timeline, trace, cluster, recorded, gpu)
        files.append(timeline.write(path / f"rank_{gpu}.json"))
    return files


def _timeline(trace: Trace, recorded: tuple[RecordedSteps, ...], world_size: int, rank: int) -> Timeline:
    device = recorded[0].device
    return Timeline(device_name=device.name, memory_bytes=device.memory_bytes, world_size=world_size, rank=rank)


def _add_gpu(timeline: Timeline, trace: Trace, cluster: Cluster, recorded: tuple[RecordedSteps, ...], gpu: int) -> None:
    name = f"GPU {gpu}: {trace.mark}{trace.run.model} on {cluster.name}, simulated"
    timeline.process(gpu, name, (COMPUTE_STREAM, COMMUNICATION_STREAM))
    offset, number = 0.0, 0
    for steps in recorded:
        mine = [span for span in steps.result.spans if span.gpu == gpu and span.job == 0]
        for step in range(1 + max(span.step for span in mine)):
            spans = [span for span in mine if span.step == step]
            start, end = min(span.start_s for span in spans), max(span.end_s for span in spans)
            timeline.annotation(
                f"ProfilerStep#{number}",
                pid=gpu,
                start_s=offset + start,
                duration_s=end - start,
                first_epoch=steps.epoch,
                architecture=steps.network.id,
                batch_per_gpu=steps.setting.batch,
            )
            _add_step(timeline, steps, spans, gpu, offset)
            number += 1
        offset += max(span.end_s for span in mine) + GAP_S


def _add_step(timeline: Timeline, steps: RecordedSteps, spans: list[Span], gpu: int, offset: float) -> None:
    network = steps.network
    layers = {layer.name: layer for layer in network.layers}
    need = iteration_memory(network, steps.setting, buckets=steps.buckets)
    held = need.parameter_bytes + need.gradient_bytes + need.optimizer_bytes
    computed = sorted((span for span in spans if span.stream == "compute"), key=lambda span: span.start_s)
    timeline.counter("memory", pid=gpu, time_s=offset + spans[0].start_s, bytes=held)
    for span in computed:
        layer = layers.get(span.name)
        if layer is None and span.phase == "forward":  # the host's: the GPU has nothing to do
            timeline.annotation(span.name, pid=gpu, start_s=offset + span.start_s, duration_s=span.end_s - span.start_s)
            continue
        forward = span.phase == "forward"
        suffix = f" {span.phase}" if layer else ""
        timeline.kernel(
            span.name + suffix,
            pid=gpu,
            start_s=offset + span.start_s,
            duration_s=span.end_s - span.start_s,
            **_described(layer),
        )
        timeline.launch(pid=gpu, time_s=offset + span.start_s)
        if layer:
            held += _saved_bytes(layer, steps) * (1 if forward else -1)
            timeline.counter("memory", pid=gpu, time_s=offset + span.end_s, bytes=held)
    for span in spans:
        if span.stream != "communication":
            continue
        timeline.kernel(
            f"ncclDevKernel_{span.name}",  # by this prefix tools tell communication from computation
            pid=gpu,
            start_s=offset + span.start_s,
            duration_s=span.end_s - span.start_s,
            stream=COMMUNICATION_STREAM,
            bytes=span.num_bytes,
        )
        timeline.launch(pid=gpu, time_s=offset + span.start_s)
        before = [other for other in computed if other.end_s <= span.start_s]
        if before:
            timeline.flow(
                "gradients ready",
                pid=gpu,
                start=(COMPUTE_STREAM, offset + before[-1].start_s),
                end=(COMMUNICATION_STREAM, offset + span.start_s),
            )


def _saved_bytes(layer: Layer, steps: RecordedSteps) -> int:
    return layer.saved_bytes(steps.setting.pass_batch, steps.setting.precision.activation_bytes)


def _described(layer: Layer | None) -> dict[str, Any]:
    return {} if layer is None else {"op": layer.op, "kind": str(layer.kind)}
