"""Every wrong input is one sentence on stderr and exit status 2, and leaves the disk as it was."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from ptsim.cli.main import run
from tests.traces import shrinking_trace

SIMULATE = "simulate pruned --cluster dgx-a100"
REPORT = "report pruned -o new"
TRAIN = "train --model resnet20 --dataset digits"

# A command line → a part of its sentence.
WRONG = {
    "cost": "error: TRACE_OR_MODEL is missing",
    "cost nosuch": "unknown model 'nosuch'; known: ",
    "cost ''": "unknown model ''",
    "cost folder": "folder: no trace here",
    "cost empty": "found an empty file",
    "cost text": "text:1: not a ptsim trace",
    "cost missing/trace.jsonl": "no trace here",
    "cost nosuch.py:make": "no model file nosuch.py",
    "cost torchvision:nosuch": "unknown torchvision model",
    "cost resnet20 --input 3,0,32": "CHANNELS,HEIGHT,WIDTH",
    "cost resnet20 --input ³,8,8": "CHANNELS,HEIGHT,WIDTH",
    "cost resnet20 --classes -3": "classes is -3",
    "cost resnet20 --batch 0": "batch is 0",
    "cost resnet20 --gpu nosuch": "unknown device 'nosuch'; known: ",
    "cost resnet20 --convention rough": '"exact", "paper"',
    "cost pruned --input 3,8,8": "a trace holds the input shape",
    "plan resnet20": "--out",
    "plan nosuch --images 9 --epochs 1 --batch 1 -o new": "unknown model 'nosuch'",
    "plan resnet20 -o new": "images, epochs and batch are needed to plan a run",
    "plan resnet20 --epochs 1 -o new": "images and batch are needed to plan a run",
    "plan resnet20 --images 9 --epochs 1 -o new": "batch is needed to plan a run",
    "plan resnet20 --images 9 --epochs 2 --batch 1 --interval 3 -o new": "more than the 2 epochs",
    "plan resnet20 --images 9 --epochs 2 --interval 1 --batch 10 -o new": "the data set has 9",
    "plan resnet20 --images 9 --epochs 2 --batch 1 --interval 1 --draws 0 -o new": "draws is 0",
    "plan resnet20 --images 9 --epochs 2 --batch 1 --interval 1 --optimizer nosuch -o new": "unknown optimizer",
    "cost resnet20 --optimizer nosuch": "unknown optimizer 'nosuch'; known: adam, adamw, rmsprop, sgd",
    "predict resnet20 --gpu a100 --batch 8 --optimizer nosuch": "unknown optimizer 'nosuch'; known: adam",
    "plan resnet20 --images 9 --epochs 2 --batch 1 --precision fp8 -o new": "for --precision",
    "plan resnet20 --pruning lym2019/nosuch -o new": "unknown pruning 'lym2019/nosuch'; known: ",
    "simulate pruned --cluster dgx-a100 --epochs 0": "epochs is 0",
    "simulate --cluster dgx-a100": "error: TRACE is missing",
    "simulate pruned": "--cluster",
    "simulate folder --cluster dgx-a100": "folder: no trace here",
    "simulate missing --cluster dgx-a100": "missing: no trace here",
    "simulate text --cluster dgx-a100": "text:1: not a ptsim trace",
    "simulate pruned --cluster nosuch": "unknown cluster 'nosuch'; known: ",
    "simulate pruned --cluster missing.toml": "no cluster file missing.toml",
    f"{SIMULATE} --gpus 1,x": "gpus '1,x' is not a list of positive whole numbers",
    f"{SIMULATE} --gpus ''": "gpus '' is not",
    f"{SIMULATE} --gpus 0": "gpus '0' is not",
    f"{SIMULATE} --gpus -1": "gpus '-1' is not",
    f"{SIMULATE} --gpus 8²": "gpus '8²' is not",
    f"{SIMULATE} --price abc": '"abc"',
    f"{SIMULATE} --price -2": "expected between 0 and",
    f"{SIMULATE} --price nan": "is nan",
    f"{SIMULATE} --price 1e30": "expected between 0 and 1e+09",
    f"{REPORT} --price 1e30": "expected between 0 and 1e+09",
    f"{SIMULATE} --input-images-per-s 1e-30": "expected a positive rate",
    f"{TRAIN} --lr 1e25 --set lr_gamma=1e20 --out new": "the learning rate of epoch 91 is 1e+45, expected 0 to 1e+30",
    f"{SIMULATE} --bucket-mib nan": "bucket-mib is nan",
    f"{SIMULATE} --bucket-mib -1": "bucket-mib is -1",
    f"{SIMULATE} --micro-batches 0": "micro_batches is 0",
    f"{SIMULATE} --contention -1": "contention is -1",
    f"{SIMULATE} --jitter some": "neither a number nor 'recorded'",
    f"{SIMULATE} --input-images-per-s 0": "expected a positive rate",
    f"{SIMULATE} --mtbf-gpu-hours 0": "mtbf_gpu_hours is 0",
    f"{SIMULATE} --set nosuch": "is not name=value",
    f"{SIMULATE} --mtbf-gpu-hours inf": "mtbf_gpu_hours is inf",
    f"{SIMULATE} --input-images-per-s inf": "input_images_per_s is inf",
    f"{SIMULATE} --input magic": "unknown input pipeline 'magic'",
    f"{SIMULATE} --gpus 1000000000000": "at most 1,000,000",
    f"{SIMULATE} --device ''": "unknown device ''",
    f"{SIMULATE} --set surgery_sec=1": "unknown option 'surgery_sec'; known: ",
    f"{SIMULATE} --price inf": "expected a finite number",
    f"{SIMULATE} --set faults.policy=elastic": "option faults: Object missing required field `mtbf_gpu_hours`",
    f"{SIMULATE} --set faults.mtbf=3": "unknown option of faults 'mtbf'",
    f"{SIMULATE} --set jobs=2.5": "option jobs: Expected `int`, got `float`",
    f"{SIMULATE} --set nosuch=1": "unknown option 'nosuch'",
    f"{SIMULATE} --set scaling.x=1": "scaling",
    f"{SIMULATE} --network nosuch": '"formula", "links"',
    f"{SIMULATE} --set link_latency_s.gpu=1": 'needs network = "links"',
    "simulate pruned --gpus 3 --cluster zero.toml": "zero.toml: inter.bandwidth: '0 GB/s' is not positive",
    "simulate pruned --gpus 3 --cluster negative.toml": "negative.toml: inter.bandwidth: '-1 GB/s' is not positive",
    "simulate pruned --gpus 3 --cluster nan.toml": "nan.toml: inter.bandwidth: 'nan GB/s' is not a number",
    "simulate pruned --gpus 3 --cluster key.toml": "key.toml: inter.speed is not a known key",
    "simulate pruned --gpus 9 --cluster two.toml": "has 8 GPUs, 9 were asked for",
    "simulate stopped --cluster dgx-a100": "no finished epoch",
    f"{SIMULATE} --scaling huge": '"weak", "strong"',
    f"{SIMULATE} --device nosuch": "unknown device",
    f"{SIMULATE} --profile missing.toml": "missing.toml: cannot be read: No such file",
    f"{SIMULATE} --timeline text/t.json": "cannot be written",
    f"{SIMULATE} --timeline pruned/trace.jsonl": "pruned/trace.jsonl",
    f"{SIMULATE} --timeline .": "--timeline is the current folder",
    f"{SIMULATE} --timeline ''": "--timeline is empty, expected a path",
    f"{SIMULATE} --timeline text/new": "the folder text/new cannot be written",
    f"{SIMULATE} --timeline=": "--timeline is empty, expected a path",
    "validate ''": "is empty, expected a path",
    "train --model resnet20 --dataset digits --out ''": "--out is empty, expected a path",
    "train --resume ''": "--resume is empty, expected a path",
    "export pruned --format parquet -o ''": "-o is empty, expected a path",
    "report pruned -o ''": "-o is empty, expected a path",
    "calibrate network --out new.toml --nccl-log ''": "--nccl-log is empty, expected a path",
    "cost resnet20 --batch 0x10": "--batch is 0x10, expected a whole number in decimal digits",
    f"{SIMULATE} --seed -0xFFFFFFFFFFFFFFFFF": "--seed is -0xFFFFFFFFFFFFFFFFF, expected a whole number in",
    "plan resnet20 --images 9 --epochs 2 --batch 1 --interval 1 -o pruned/trace.jsonl": "is the trace of a run",
    "export pruned --format chrome -o stopped/trace.jsonl": "is the trace of a run",
    "import kineto text --model resnet20 --classes 0 -o new.toml": "classes is 0, expected a positive number",
    "import kineto text --model resnet20 --classes -3 -o new.toml": "classes is -3, expected a positive number",
    "validate": "no trace was named",
    "validate pruned --model resnet20": "no effect without --mllog",
    "validate --mllog text --cluster dgx-a100 --holdout": "no effect on --mllog",
    "validate missing": "missing: no trace here",
    "validate pruned --profile empty": "not a device profile",
    "validate pruned --holdout": "second run",
    "allreduce": "--cluster, --gpus and --bytes are missing",
    "allreduce --gpus 8": "--cluster and --bytes are missing",
    "allreduce --cluster dgx-a100 --gpus 8": "error: --bytes is missing",
    "allreduce --gpus 8 --bytes 1 --cluster": "error: --cluster has no value",
    "export": "--trace, --format and --out are missing",
    "allreduce --cluster dgx-a100 --gpus 0 --bytes 1": "0 GPUs",
    "allreduce --cluster dgx-a100 --gpus many --bytes 1": '"many"',
    "allreduce --cluster dgx-a100 --gpus 8 --bytes -1": "non-negative",
    "allreduce --cluster dgx-a100 --gpus 8 --bytes ''": "is not a number with a unit",
    "allreduce --cluster dgx-a100 --gpus 8 --bytes 1,000": "--bytes is '1,000', expected bytes such as 1000000",
    "allreduce --cluster dgx-a100 --gpus 8 --bytes 1e400MiB": "whole, non-negative number",
    "predict resnet20 --batch 8": "neither a device nor a cluster",
    "predict resnet20": "neither a device nor a cluster was named, and no mini-batch was given",
    "predict resnet20 --gpu a100": "no mini-batch was given",
    "predict folder --gpu a100": "folder: no trace here",
    "predict resnet20 --batch 0 --gpu v100": "mini-batch 0",
    "predict resnet20 --batch 8 --gpu v100 --precision tf32": "does not support tf32",
    "predict resnet20 --batch 8 --gpu v100 --gpus 8": "without a cluster",
    "predict resnet20 --batch 8 --cluster dgx-a100 --gpus 0": "0 GPUs",
    "inspect nosuch": "unknown model",
    "inspect resnet20 --input 1,2": "CHANNELS,HEIGHT,WIDTH",
    "inspect resnet20 --classes 0": "0 classes",
    "sweep missing.toml": "missing.toml: cannot be read",
    "sweep folder": "folder: cannot be read",
    "sweep text": "text: is not TOML",
    "sweep study.toml --out study.toml --fresh": "not a line of sweep results",
    "sweep study.toml --out pruned/trace.jsonl": "not a line of sweep results",
    "sweep study.toml --workers 0": "workers is 0",
    "sweep study.toml --workers 2 --dask tcp://nowhere:1": "--workers has no effect on a Dask cluster",
    "sweep study.toml --out folder": "folder: is not a regular file",
    "sweep infinite.toml": "'1e400 MiB' is not between 1 and 1e+18 B",
    "sweep huge.toml": "expands to 2,000,000 configurations",
    "sweep near.toml": "unknown what-if 'bf16-gradient'; known: ",
    "sweep none.toml": "what_ifs is empty",
    "sweep key.study.toml": "gpu is not a known key, expected one of traces, clusters, gpus",
    "sweep option.toml": "unknown option 'contentoin'",
    "sweep nan.study.toml": "contention[1] is not finite",
    "report -o new": "at least one trace",
    "report missing -o new": "missing: no trace here",
    "report pruned -o text": "text is a file",
    "report pruned -o text/new": "cannot be written",
    f"{REPORT} --gpus 1,x": "gpus '1,x' is not",
    f"{REPORT} --price abc": '"abc"',
    f"{REPORT} --price -1": "price_usd_per_gpu_hour is -1",
    f"{REPORT} --cluster nosuch": "unknown cluster",
    "export missing --format chrome -o new": "missing: no trace here",
    "export pruned --format word -o new": '"word"',
    "export pruned --format chrome": "--out",
    "export pruned --format chrome -o folder": "folder is a folder",
    "export pruned --format chrome -o text/new": "cannot be written",
    "export pruned --format chrome -o pruned/trace.jsonl": "pruned/trace.jsonl is also an input",
    "export pruned --format parquet -o text": "text is a file",
    "export pruned --format parquet -o new --trust": "--trust has no effect on --format parquet",
    "export pruned --format chakra -o new --gpus 0": "gpus is 0",
    "export pruned --format chakra -o new --gpus 100000000": "expected 1 to 16,384",
    "calibrate network --nccl-log missing --out new.toml": "missing: ",
    "calibrate network --nccl-log empty --out new.toml": "empty: is empty",
    "calibrate network --nccl-log text --out new.toml": "text: no measurement found",
    "calibrate network --out new.toml": "needs --nccl-log",
    "calibrate network --out two.toml": "two.toml exists",
    "calibrate network --out new.toml --nodes 2": "--nodes has no effect on a live measurement",
    "calibrate network --nccl-log text --out new.toml --iterations 5": "--iterations has no effect on --nccl-log",
    "calibrate network --nccl-log text --out new.toml --resume": "--resume has no effect on --nccl-log",
    "calibrate gpu --out new.toml --minutes -1": "minutes is -1",
    "calibrate gpu --out text/new.toml": "text/new.toml",
    "import kineto text -o new.toml --memory 1e400GiB": "memory: '1e400GiB' is not between 1 and",
    "import kineto text text -o new.toml": "a file is named twice",
    "import kineto text --input 3,8,8 -o new.toml": "no effect without --model",
    "import kineto text --device zero.toml -o zero.toml": "zero.toml is also an input",
    "calibrate network --nccl-log two.toml --out two.toml": "two.toml is also an input",
    "calibrate network --nccl-log text --base two.toml --out two.toml": "two.toml is also an input",
    "plan net.py:make --images 9 --epochs 2 --batch 1 --interval 1 -o net.py": "net.py is also an input",
    "plan resnet20 --images 9 --epochs 2 --batch 1 --pruning like:pruned -o pruned/trace.jsonl": "is also an input",
    "plan resnet20 --images 9 --epochs 2 --batch 1 --pruning huge.toml -o huge.toml": "huge.toml is also an input",
    "plan resnet20 --images 9 --epochs 2 --batch 1 -o pruned/trace.jsonl": "is the trace of a run that was recorded",
    "plan resnet20 --images 9 --epochs 2 --batch 1 --pruning like:two.toml -o new": "two.toml:1: not a ptsim trace",
    "plan resnet20 --images 9223372036854775808 --epochs 2 --batch 1 -o new": "is 9223372036854775808, expected",
    f"{TRAIN} --set epochs=3 --epochs 2 --out new": "setting 'epochs' is given twice",
    f"{TRAIN} --set seed=3 --set seed=2 --out new": "setting 'seed' is given twice",
    f"{TRAIN} --log csv, --out new": "unknown logger ''",
    f"{SIMULATE} --set jobs=1 --set jobs=2": "setting 'jobs' is given twice",
    f"{SIMULATE} --price 2 --set price-usd-per-gpu-hour=3": "setting 'price_usd_per_gpu_hour' is given twice, by --set",
    f"{SIMULATE} --scaling weak --set scaling=strong": "setting 'scaling' is given twice",
    f"{SIMULATE} --seed 0 --set seed=1": "setting 'seed' is given twice",
    f"{SIMULATE} --mtbf-gpu-hours 9 --set faults.mtbf_gpu_hours=8": "setting 'faults.mtbf_gpu_hours' is given twice",
    f"{SIMULATE} --set jobs={'[' * 5000}": "option jobs",
    "allreduce --cluster dgx-a100 --gpus 8 --bytes 9223372036854775807": "below 9,223,372,036,854,775,808",
    "devices extra": "unexpected argument 'extra'",
    "clusters --nosuch": "--nosuch",
    "train --model nosuch --dataset digits --out new": "unknown model 'nosuch'",
    "train --model resnet20 --dataset nosuch --out new": "unknown data set 'nosuch'",
    f"{TRAIN} --batch 5000 --out new": "larger than the data set",
    f"{TRAIN} --epochs 0 --out new": "'epochs' is 0",
    f"{TRAIN} --lr nan --out new": "'lr' is nan",
    f"{TRAIN} --penalty-ratio 1 --out new": "'penalty_ratio' is 1",
    f"{TRAIN} --interval 0 --out new": "'interval' is 0",
    f"{TRAIN} --set nosuch=1 --out new": "unknown setting 'nosuch'",
    f"{TRAIN} --set device=tpu --out new": "unknown device 'tpu'",
    f"{TRAIN} --out pruned": "holds another run",
    f"{TRAIN} --out text": "text is a file",
    "train --model resnet20 --dataset imagefolder --out new": "data_dir",
    "train --model resnet20 --dataset imagefolder --data-dir missing --out new": "no data folder missing",
    "train --model resnet20 --dataset imagefolder --data-dir folder --out new": "no folder train",
    "train missing.toml --out new": "missing.toml: ",
    "train text --out new": "text: is not TOML",
    "train --resume missing": "missing holds no run",
    "train --resume pruned": "pruned holds no run of ptsim train (no config.toml), only a trace",
    "export pruned --format onnx --out new": "a trace has no weights",
    "train --resume text": "found a file",
    "demo --epochs 0 --out new": "epochs is 0",
    "demo --out text": "text is a file",
    "demo --out pruned": "holds another run",
}

STUDY = 'traces = ["pruned"]\nclusters = ["dgx-a100"]\ngpus = [1]\n'
STUDIES = {
    "huge.toml": f"[grid]\ncontention = {[i / 2000 for i in range(2000)]}\nseed = {list(range(1000))}\n",
    "near.toml": 'what_ifs = ["bf16-gradient"]\n',
    "none.toml": "what_ifs = []\n",
    "infinite.toml": 'what_ifs = ["bucket=1e400 MiB"]\n',
    "key.study.toml": "gpu = [1]\n",
    "option.toml": "[grid]\ncontentoin = [0.1]\n",
    "nan.study.toml": "[grid]\ncontention = [0.1, nan]\n",
}
CLUSTER = """
name = "mine"
device = "a100-sxm4-40gb"
gpus_per_node = 4
max_nodes = 2
intra = {name = "NVLink", bandwidth = "100 GB/s", latency = "2 us"}
inter = {name = "network", bandwidth = "10 GB/s", latency = "5 us"}
sources = {default = "made up"}
"""
CLUSTERS = {
    "two.toml": ("", ""),
    "zero.toml": ("10 GB/s", "0 GB/s"),
    "negative.toml": ("10 GB/s", "-1 GB/s"),
    "nan.toml": ("10 GB/s", "nan GB/s"),
    "key.toml": ('latency = "5 us"', 'latency = "5 us", speed = "1 GB/s"'),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    (folder / "pruned").mkdir()
    shrinking_trace(folder / "pruned/trace.jsonl")
    (folder / "folder").mkdir()
    (folder / "empty").touch()
    (folder / "text").write_text("hello\n")
    (folder / "stopped").mkdir()
    shrinking_trace(folder / "stopped/trace.jsonl", recorded_epochs=0)
    (folder / "net.py").write_text("")
    (folder / "study.toml").write_text(STUDY)
    for name, added in STUDIES.items():
        (folder / name).write_text(STUDY + added)
    for name, (found, changed) in CLUSTERS.items():
        (folder / name).write_text(CLUSTER.replace(found, changed))
    return folder


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.slow
@pytest.mark.parametrize("line", WRONG)
def test_wrong_input_is_one_sentence_and_changes_nothing(
    line: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    before = contents(place)
    assert run(shlex.split(line)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    errors = [text for text in captured.err.splitlines() if text.startswith("error: ")]
    assert len(errors) == 1
    assert WRONG[line] in errors[0]
    assert "Traceback" not in captured.err
    assert contents(place) == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("plan resnet20 --epochs 1 -o new", "images and batch are needed"),
        ("plan resnet20 --pruning lym2019/nosuch -o new", "unknown pruning"),
        ("predict resnet20 --gpu a100", "no mini-batch was given"),
    ],
)
def test_what_is_missing_is_told_before_torch_is_imported(line: str, says: str, tmp_path: Path) -> None:
    code = (
        "import sys; from ptsim.cli.main import run; "
        f"status = run({shlex.split(line)}); sys.exit((status != 2) + 2 * ('torch' in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert says in done.stderr
