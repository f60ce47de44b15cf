"""Result files of MLPerf in the published form, with numbers made up for hand arithmetic."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

# The form of a published result file (MLPerf Training v2.1, ResNet-50 with MXNet on 8 A100): a shell trace, lines of
# several processes that tear each other, epochs inside blocks, evaluation between blocks; numbers made up.
PUBLISHED = """+ docker exec -it image_classification python -c '
mlperf_log_utils.mlperf_submission_log(constants.RESNET)'
:::MLLOG {"namespace": "", "time_ms": 1665498514139, "event_type": "POINT_IN_TIME", "key": "submission_benchmark", "value": "resnet", "metadata": {"file": "mlperf_log_utils.py", "lineno": 84}}
:::MLLOG {"namespace": "", "time_ms": 1665498514146, "event_type": "POINT_IN_TIME", "key": "submission_platform", "value": "1xESC8000A-E11", "metadata": {"file": "mlperf_log_utils.py", "lineno": 101}}
num_gpus=8 num_sockets = 2 num_nodes=8 cores_per_socket=64
0: :::MLLOG {"namespace": "", "time_ms": 1665498536497, "event_type": "INTERVAL_START", "key": "init_start", "value": null, "metadata": {"file": "train_imagenet.py", "lineno": 117}}
1: :::MLLOG {"namespace": "", "time_ms": 1665498536497, "event_type": "INTERVAL_START", "key": "init_start", "value": null, "metadata": {"file": "train_im[14:29:03] ../src/storage/storage.cc:199: Using Pooled
:::MLLOG {"namespace": "", "time_ms": 1665498553508, "event_type": "POINT_IN_TIME", "key": "weights_initialization", "value": null, "metadata": {"file": "train_imagenet.py", "lineno": 88, "tensor": "bn0_beta"}}--dali-roi-decode 0
:::MLLOG {"namespace": "", "time_ms": 1665498554750, "event_type": "POINT_IN_TIME", "key": "d_batch_size", "value": 200, "metadata": {"file": "fit.py", "lineno": 1176}}
:::MLLOG {"namespace": "", "time_ms": 1665498554751, "event_type": "POINT_IN_TIME", "key": "global_batch_size", "value": 1600, "metadata": {"file": "fit.py", "lineno": 1180}}
:::MLLOG {"namespace": "", "time_ms": 1665498554751, "event_type": "POINT_IN_TIME", "key": "train_samples", "value": 1280000, "metadata": {"file": "fit.py", "lineno": 1184}}
:::MLLOG {"namespace": "", "time_ms": 1665498554752, "event_type": "POINT_IN_TIME", "key": "opt_name", "value": "lars", "metadata": {"file": "fit.py", "lineno": 700}}
:::MLLOG {"namespace": "", "time_ms": 1665499000000, "event_type": "INTERVAL_START", "key": "block_start", "value": null, "metadata": {"file": "fit.py", "lineno": 1075, "first_epoch_num": 1, "epoch_count": 2}}
:::MLLOG {"namespace": "", "time_ms": 1665499000000, "event_type": "INTERVAL_START", "key": "epoch_start", "value": null, "metadata": {"file": "fit.py", "lineno": 915, "epoch_num": 1}}
2022-10-11 14:53:17,881 Node[0] Epoch[0] Batch [0-20]	Speed: 24614.64 samples/sec	accuracy=nan
:::MLLOG {"namespace": "", "time_ms": 1665499080000, "event_type": "INTERVAL_END", "key": "epoch_stop", "value": null, "metadata": {"file": "fit.py", "lineno": 988, "epoch_num": 1}}
:::MLLOG {"namespace": "", "time_ms": 1665499080000, "event_type": "POINT_IN_TIME", "key": "tracked_stats", "value": {"imgs_sec": 16000.0}, "metadata": {"file": "fit.py", "lineno": 1004, "step": 1}}
:::MLLOG {"namespace": "", "time_ms": 1665499080000, "event_type": "INTERVAL_START", "key": "epoch_start", "value": null, "metadata": {"file": "fit.py", "lineno": 915, "epoch_num": 2}}
:::MLLOG {"namespace": "", "time_ms": 1665499131200, "event_type": "INTERVAL_END", "key": "epoch_stop", "value": null, "metadata": {"file": "fit.py", "lineno": 988, "epoch_num": 2}}:::MLLOG {"namespace": "", "time_ms": 1665499131200, "event_type": "POINT_IN_TIME", "key": "throughput", "value": 25000.0, "metadata": {"file": "fit.py", "lineno": 1007}}
:::MLLOG {"namespace": "", "time_ms": 1665499131300, "event_type": "INTERVAL_START", "key": "eval_start", "value": null, "metadata": {"file": "fit.py", "lineno": 1027, "epoch_num": 2}}
:::MLLOG {"namespace": "", "time_ms": 1665499139000, "event_type": "POINT_IN_TIME", "key": "eval_accuracy", "value": 0.72732, "metadata": {"file": "fit.py", "lineno": 1056, "epoch_num": 2}}
:::MLLOG {"namespace": "", "time_ms": 1665499139000, "event_type": "INTERVAL_END", "key": "block_stop", "value": null, "metadata": {"file": "fit.py", "lineno": 1059, "first_epoch_num": 1}}
:::MLLOG {"namespace": "", "time_ms": 1665499140000, "event_type": "INTERVAL_END", "key": "run_stop", "value": null, "metadata": {"file": "fit.py", "lineno": 1100, "status": "success"}}
"""  # noqa: E501


def mllog(path: Path, *, blocks: bool = False, **changed: Any) -> Path:
    """Three epochs of 30, 20 and 20 s after 5 s of evaluation each; 2 × 8 GPUs, 1,600 images a step, 16,000 images."""
    values = {
        "submission_benchmark": "resnet",
        "submission_platform": "2xNVIDIA DGX A100",
        "global_batch_size": 1600,
        "train_samples": 16_000,
        "opt_name": "sgd",
    } | changed
    lines = [{"key": key, "value": value, "time_ms": 0} for key, value in values.items() if value is not None]
    now = 1_000_000
    for epoch, seconds in enumerate((30, 20, 20), 1):
        name, count = ("block", 2) if blocks else ("epoch", 1)
        metadata = {"epoch_num": epoch, "epoch_count": count}
        lines.append({"key": f"{name}_start", "value": None, "time_ms": now, "metadata": metadata})
        now += seconds * 1000
        lines.append({"key": f"{name}_stop", "value": None, "time_ms": now, "metadata": metadata})
        now += 5000
    text = "\n".join(f":::MLLOG {json.dumps({'namespace': '', 'event_type': 'X', **line})}" for line in lines)
    path.write_text(f"0: some other output\n{text}\n", encoding="utf-8")
    return path


def marked(path: Path, *marks: tuple[str, float] | tuple[str, float, dict[str, Any]]) -> Path:
    """A log of these marks, at seconds."""
    head = [line for line in mllog(path).read_text().splitlines() if not re.search("epoch|block", line)]
    lines = [
        {"key": key, "value": None, "time_ms": 1000 * seconds, "metadata": more[0] if more else {}}
        for key, seconds, *more in marks
    ]
    path.write_text("\n".join([*head, *(f":::MLLOG {json.dumps(line)}" for line in lines)]))
    return path
