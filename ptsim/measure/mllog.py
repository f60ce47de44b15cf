"""What did an MLPerf training run measure? Its `:::MLLOG` lines, as seconds of an epoch and images per second.

Version 0.6 had lines `:::MLL SECONDS KEY: {"value": …, "metadata": …}` instead. Since version 4.0 a mark may say
`samples_count` in place of an epoch or a number of them: what it begins is no whole epoch.

Source of the format: github.com/mlcommons/logging, mlperf_logging/mllog and compliance_checker, and result files of
github.com/mlcommons/training_results_v1.0 and _v2.1 (resnet/result_*.txt).
"""

from __future__ import annotations

import json
import math
import re
import statistics
import warnings
from pathlib import Path
from typing import Any

import msgspec

from ptsim.errors import FileFormatError
from ptsim.hardware.catalog import device_names
from ptsim.loglines import unwrapped
from ptsim.textfile import decode_json, decode_text, read_bytes, unpacked

_MARK = ":::MLLOG"
_OLDEST = ":::MLPv0.5"
_OLD = re.compile(r":::MLL (\d{1,12}(?:\.\d{1,9})?) (\w{1,80}) ?:\s*\{")
_KEPT = re.compile(r':::ML[^{"]{0,100}\{\\"')  # a line in the JSON of Docker or of a collector of logs
_WHOLE = 0.7  # of the others' time that an epoch takes at least, if reaching the target did not break it off
_TOLD = 0.01  # of an epoch's time that is training, unless its evaluation is marked from the beginning
_MARKED = 0.9  # of the time up to an evaluation must lie inside the epochs' own marks
_NODES = re.compile(r"\s*(\d{1,6})\s*x\s*(?:NVIDIA\s+)?([^\W_]*)", re.IGNORECASE)  # "4xNVIDIA DGX A100"
_ONE_RUN = (  # what a run says once
    "submission_benchmark", "submission_platform", "global_batch_size", "d_batch_size", "local_batch_size",
    "train_samples", "opt_name",
)  # fmt: skip
_IMAGES = {  # of a benchmark's data set: ImageNet; COCO, before 2.0 and with all images; OpenImages since; KiTS19
    "resnet": (1_281_167,),
    "ssd": (117_266, 118_287, 1_170_301),
    "retinanet": (1_170_301,),  # as "ssd" is called since 5.0
    "maskrcnn": (117_266, 118_287),
    "unet3d": (168,),
}
_NO_IMAGES = re.compile(  # what the other benchmarks of MLPerf Training and HPC are called, and later ones of the kind
    r"bert|gnmt|transformer|translation|rnn|ncf|dlrm|recommendation|minigo|reinforcement|gnn|rgat|oc20|open_?catalyst|"
    r"open_?fold|stable_diffusion|flux|\w*(?:gpt|llama|deepseek|mixtral|moe|lora|llm)"
)
_NEAR = 0.01  # by which a log's number of images may be off, for whole mini-batches


class MlperfRun(msgspec.Struct, frozen=True, kw_only=True):
    """One run as its log tells it.

    Attributes:
        benchmark: MLPerf's name of it, such as "resnet"; None where the log does not say.
        platform: as the submitter names it.
        num_nodes: where the platform's name begins with it; of a name that begins with GPUs ("8xA100") it is None.
        batch_per_gpu: where the submitter's code logs it ("d_batch_size", "local_batch_size").
        global_batch: images of one step on all accelerators together.
        passes: forward and backward passes whose gradients add up in a step.
        train_samples: images of an epoch; those of ImageNet where the log of a "resnet" does not say. Where the log
            counts mini-batches, the images in them; for "maskrcnn", whose logs have the steps of the run there, those
            of COCO.
        optimizer: in lower case; None where the log does not say.
        epoch_seconds: median of an epoch's training, without evaluation; the first epoch is left out where there are
            others. From marks that wait for the accelerators, where an epoch's own do not.
        num_epochs: that were timed.
        note: what was assumed of the number of images; None where the log says what its benchmark's data set has.
    """

    benchmark: str | None
    platform: str | None
    num_nodes: int | None
    batch_per_gpu: int | None
    global_batch: int
    passes: int = 1
    train_samples: int
    optimizer: str | None
    epoch_seconds: float
    num_epochs: int
    note: str | None = None

    @property
    def images_per_second(self) -> float:
        """Of all accelerators together."""
        return self.train_samples / self.epoch_seconds

    @property
    def step_seconds(self) -> float:
        """Of one global mini-batch."""
        return self.global_batch / self.images_per_second


class _Line(msgspec.Struct):
    key: str
    time_ms: float
    value: Any = None
    metadata: dict[str, Any] | str | None = None  # what adds lines to a finished file leaves it empty


_DECODER = msgspec.json.Decoder(_Line)


def read_mllog(path: str | Path) -> MlperfRun:
    """Read the `:::MLLOG` lines of a result file; other lines are skipped.

    Raises:
        FileFormatError: the file cannot be read, holds no such line or a broken one, or lacks the global mini-batch,
            the number of training samples or a whole epoch, has fewer samples than a mini-batch, is of several runs
            with different settings, or of a benchmark that trains no CNN on images.
    """
    path = Path(path)
    text = decode_text(unpacked(path, read_bytes(path)))
    if _KEPT.search(text):
        text = unwrapped(text)
    lines = _lines(path, text)
    values = _values(path, lines)
    if _NO_IMAGES.match(benchmark := _text(values.get("submission_benchmark")) or ""):
        problem = f"is of the benchmark {benchmark}, whose samples are not the images of a CNN"
        raise FileFormatError(path, f"{problem}; expected a benchmark of images, such as {', '.join(_IMAGES)}")
    global_batch = _count(path, values, "global_batch_size")
    samples, note = _samples(path, values, global_batch, old=_OLD.search(text) is not None)
    epochs = _epochs(lines, samples)
    if not epochs:
        raise FileFormatError(
            path,
            "holds no whole epoch whose training its marks tell from evaluation: expected epoch_start and epoch_stop, "
            "or block_start and block_stop",
        )
    timed = epochs[1:] or epochs
    if samples < global_batch:
        problem = f"an epoch of {samples} samples is less than one mini-batch of {global_batch}"
        raise FileFormatError(path, f"{problem}; expected train_samples to count samples, not mini-batches")
    platform = values.get("submission_platform")
    return MlperfRun(
        benchmark=_text(values.get("submission_benchmark")),
        platform=_text(platform),
        num_nodes=_num_nodes(str(platform)) if platform else None,
        batch_per_gpu=_batch_of_one(path, values),
        global_batch=global_batch,
        passes=_count(path, values, "gradient_accumulation_steps") if "gradient_accumulation_steps" in values else 1,
        train_samples=samples,
        optimizer=_text(values.get("opt_name")),
        epoch_seconds=statistics.median(timed),
        num_epochs=len(timed),
        note=note,
    )


def _batch_of_one(path: Path, values: dict[str, Any]) -> int | None:
    """Images of one GPU; None where the log does not say, or where their number is that of a mean over more GPUs."""
    named = next((key for key in ("d_batch_size", "local_batch_size") if key in values), None)
    if named is None or (isinstance(values[named], float) and values[named] % 1):
        return None
    return _count(path, values, named)


def of_all_gpus(run: MlperfRun, num_gpus: int) -> MlperfRun:
    """The run with the images of all GPUs, where its log counts those that one of them sees in an epoch."""
    for images in _IMAGES.get(run.benchmark or "", ()):
        if run.note and num_gpus > 1 and abs(run.train_samples * num_gpus / images - 1) <= _NEAR:
            note = f"its train_samples, {run.train_samples}, are taken for those of one of {num_gpus} GPUs"
            return msgspec.structs.replace(run, train_samples=run.train_samples * num_gpus, note=note)
    return run


def _values(path: Path, lines: list[_Line]) -> dict[str, Any]:
    """The last value of every key.

    Raises:
        FileFormatError: what a run says once is there with different values.
    """
    found: dict[str, Any] = {}
    for line in lines:
        if line.value is None:
            continue
        if line.key in _ONE_RUN and found.setdefault(line.key, line.value) != line.value:
            problem = f"is of several runs: {line.key} is {found[line.key]!r} and {line.value!r}"
            raise FileFormatError(path, problem, hint="keep the lines of one run")
        found[line.key] = line.value
    return found


def _samples(path: Path, values: dict[str, Any], global_batch: int, *, old: bool) -> tuple[int, str | None]:
    """Images of an epoch, and what was assumed of them.

    "samples_per_epoch" counts those of whole mini-batches, "input_size" is the key of version 0.6 (`old`), many of
    whose logs say nothing. NVIDIA's code logs mini-batches for "ssd" since version 2.0 and the steps of the run for
    "maskrcnn".
    """
    benchmark = _text(values.get("submission_benchmark")) or ""
    known = _IMAGES.get(benchmark, ())
    keys = ("samples_per_epoch", "train_samples", "input_size")
    named = next((key for key in keys if key in values), "train_samples")
    if named not in values and (len(known) == 1 or (known and old)):
        said = f"its log does not say of how many images: {known[0]} are taken"
        return known[0], None if len(known) == 1 else said
    count = _count(path, values, named)
    if not benchmark:
        return count, f"its log does not name the benchmark: its {named}, {count}, is taken for a number of images"
    if named == keys[0] or any(abs(count / images - 1) <= _NEAR for images in known):
        return count, None
    if not known:
        return count, f"how many images MLPerf's {benchmark} has is not known here: its {named}, {count}, is taken"
    said = f"its {named}, {count}, is not the number of images of MLPerf's {benchmark}"
    if any(abs(count * global_batch / images - 1) <= _NEAR for images in known):
        return count * global_batch, f"{said}: mini-batches of {global_batch} are taken to be counted"
    if benchmark == "maskrcnn":
        return known[0], f"{said}: {known[0]} images are taken"
    return count, f"{said} ({' or '.join(map(str, known))}): the log's number is taken"


def _num_nodes(platform: str) -> int | None:
    """The number that the platform's name begins with, unless it is one of GPUs."""
    match = _NODES.match(platform)
    if match is None or match[2].lower() in {name.partition("-")[0] for name in device_names()}:
        return None
    return int(match[1])


def _lines(path: Path, text: str) -> list[_Line]:
    """What follows the marks, in order.

    Processes that write into one file at once tear each other's lines: a torn one is left out with a warning.
    """
    found: list[_Line] = []
    torn: list[FileFormatError] = []
    for number, line in enumerate(text.splitlines(), 1):
        for content in _OLD.sub(_as_new, line).split(_MARK)[1:]:  # a process may begin in the line of another
            try:
                found.append(decode_json(path, _object(content), _DECODER, line=number, what=f"a {_MARK} line"))
            except FileFormatError as error:
                torn.append(error)
    if not found:
        if torn:
            raise torn[0]
        if _OLDEST in text:
            raise FileFormatError(path, "is of MLPerf 0.5, whose lines mark no end of an epoch; expected 0.6 or newer")
        raise FileFormatError(path, f"holds no {_MARK} line; expected the result file of an MLPerf training run")
    if torn:
        warnings.warn(f"{path}: {len(torn)} of its {_MARK} lines are damaged and left out", stacklevel=3)
    return found


def _as_new(old: re.Match[str]) -> str:
    """The begin of a line of version 0.6 in the form of later ones."""
    return f'{_MARK} {{"time_ms": {1e3 * float(old[1])!r}, "key": "{old[2]}", '


def _object(content: str) -> str:
    """The JSON object that the text begins with, without what another process wrote behind it."""
    content = content.strip()
    try:
        _, end = json.JSONDecoder().raw_decode(content)
    except (ValueError, RecursionError):  # whoever decodes it says what is wrong
        return content
    return content[:end]


def _epochs(lines: list[_Line], samples: int) -> list[float]:
    """Seconds of every epoch without evaluation; a block's are shared out over its epochs where none is marked."""
    found: dict[str, list[float]] = {"epoch": [], "block": []}
    judged: dict[str, list[float]] = {"epoch": [], "block": []}  # seconds of the evaluation in each
    began: dict[str, _Line] = {}
    judged_ms: dict[str, float] = {}  # what evaluations took of what has begun
    judging: float | None = None  # when the evaluation under way began
    unjudged: set[str] = set()  # what has ended since the last evaluation began
    since_ms, first = 0.0, 0  # when training went on after the last evaluation, and its first epoch

    def end_judging(at_ms: float) -> None:
        nonlocal judging
        if judging is not None:
            for kind in began:
                judged_ms[kind] += at_ms - judging
        judging = None

    for line in lines:
        kind, _, end = line.key.rpartition("_")
        if kind in found and end == "start":
            end_judging(line.time_ms)  # at the latest: some log no end of an evaluation
            began[kind], judged_ms[kind] = line, 0.0
            if kind == "epoch" and first == len(found[kind]):
                since_ms = line.time_ms
        elif kind in found and end == "stop" and kind in began:
            end_judging(line.time_ms)
            start = began.pop(kind)
            seconds = (line.time_ms - start.time_ms - judged_ms[kind]) / 1e3
            count = _num_epochs(kind, start, samples)
            if seconds > _TOLD * (line.time_ms - start.time_ms) / 1e3 and count > 0:
                found[kind].append(seconds / count)
                judged[kind].append(judged_ms[kind] / 1e3 / count)
                unjudged.add(kind)
        elif line.key == "eval_stop":
            end_judging(line.time_ms)
        elif line.key == "run_stop":
            began.clear()  # what is under way breaks off: an evaluation beside it has reached the target
            for kind in unjudged:
                if _broke_off(found[kind]):  # and is marked as if it had ended
                    found[kind].pop()
                    judged[kind].pop()
            unjudged.clear()
        elif line.key == "eval_start" and judging is None:
            judging = line.time_ms
            unjudged.clear()
            if "epoch" in began:  # whose marks then hold the evaluation
                first = len(found["epoch"]) + 1
            elif first < len(found["epoch"]):
                found["epoch"][first:] = _computed((line.time_ms - since_ms) / 1e3, found["epoch"][first:])
                first = len(found["epoch"])
    kind = "epoch" if found["epoch"] else "block"
    return _with_what_was_beside(found[kind], judged[kind])


def _broke_off(epochs: list[float]) -> bool:
    """Whether the last of the epochs, behind which no evaluation is, took much less than the others.

    So does RetinaNet's where the result of an evaluation comes while the next epoch trains (MLPerf Training v2.0, DGX
    A100: 1207, 1209, 1207 and 22 s).
    """
    *others, last = epochs
    return bool(others) and last < _WHOLE * statistics.median(others[1:] or others)


def _with_what_was_beside(epochs: list[float], judged: list[float]) -> list[float]:
    """The epochs with their evaluations, where these ran beside training on GPUs of their own; else as they are.

    Then an epoch with an evaluation lasts as long as one without; the first one does not count (MLPerf Training v1.0,
    UNet3D on 13 and 100 DGX A100: 1.74 s for 14 epochs, of which evaluation took 1.48 s or nothing).
    """
    with_one = [i for i, seconds in enumerate(judged) if seconds]
    without = [epochs[i] for i, seconds in enumerate(judged) if i and not seconds]
    if not with_one or not without:
        return epochs
    usual = statistics.median(without)
    alone = statistics.median(epochs[i] for i in with_one)
    whole = statistics.median(epochs[i] + judged[i] for i in with_one)
    beside = abs(math.log(whole / usual)) < abs(math.log(alone / usual))
    return [own + other for own, other in zip(epochs, judged, strict=True)] if beside else epochs


def _num_epochs(kind: str, start: _Line, samples: int) -> float:
    """How many epochs of so many samples begin with the mark; 0 where it does not count them.

    A number that is a multiple of the samples counts those: so do logs of "unet3d" in version 3.1.
    """
    told = start.metadata if isinstance(start.metadata, dict) else {}
    if "samples_count" in told and not told.keys() & {"epoch_num", "epoch_count"}:
        return 0
    count = told.get("epoch_count", 1) if kind == "block" else 1
    if not isinstance(count, int | float):
        return 0
    return count / samples if count >= samples and count % samples == 0 else count


def _computed(seconds: float, epochs: list[float]) -> list[float]:
    """The epochs' own times, or equal shares of `seconds`, from the first one's start to an evaluation.

    An epoch's end may be logged when the host has launched its last step, long before the accelerators have computed
    it (MLPerf Training v2.1, 527 DGX A100: 0.03 s for 0.20 s). An evaluation waits for them.
    """
    return epochs if sum(epochs) > _MARKED * seconds else [seconds / len(epochs)] * len(epochs)


def _count(path: Path, values: dict[str, Any], key: str) -> int:
    value = values.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool) or value < 1:
        found = f"says nothing of {key}" if value is None else f"{key} is {value!r}"
        raise FileFormatError(path, f"{found}, expected a positive number")
    return int(value)


def _text(value: object) -> str | None:
    return value.lower() if isinstance(value, str) else None
