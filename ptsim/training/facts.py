"""What can a trace say of a run that nobody has described? What is seen on network, optimizer and images."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

import ptsim
from ptsim.capture.graph import evaluation_mode, example_input, naming_the_image, output_tensors
from ptsim.errors import TrainingError, UsageError
from ptsim.network import LayerKind, MemoryFormat, Network, Precision
from ptsim.optimizers import OPTIMIZERS
from ptsim.prune.labels import CONVS
from ptsim.setting import as_plain, parse_precision, real_number
from ptsim.textfile import LARGEST
from ptsim.trace.checks import DDP_SETTINGS, hyperparameters_problem, seed_problem
from ptsim.trace.schema import SCHEMA_VERSION, Dataset, DeviceInfo, Epoch, Reconfiguration, Run, UpdateCosts
from ptsim.training.distributed import Team
from ptsim.training.tracefile import git_revision, library_versions
from ptsim.training.watch import learning_rate
from ptsim.training.wrapping import is_compiled
from ptsim.units import format_shape, time_stamp

# Which optimizer moves as much memory as an unknown one with n states an element; of two with one state the dearer.
_BY_STATES = {0: "sgd", 1: "rmsprop", 2: "adam"}


class RunFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What a trace says of a run beside what can be seen; everything that is None is seen or left open.

    Attributes:
        model: the network's name; None is its class.
        dataset: None is a data set without a name, as large as the first epoch.
        hyperparameters: settings of the run, for the reader, beside what is seen.
        seed: of the run's random numbers.
        precision, memory_format: None is what the training passes of the first epoch use.
    """

    model: str | None = None
    dataset: Dataset | None = None
    hyperparameters: dict[str, Any] = {}
    seed: int = 0
    precision: Precision | None = None
    memory_format: MemoryFormat | None = None

    def settings(self, seen: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
        """All hyper-parameters: what is seen, what is told, and the pruner's own; of two with one name the later.

        The class of the optimizer is left out where an optimizer is told.
        """
        told = self.hyperparameters
        named = {*told, "optimizer_class"} if "optimizer" in told else {*told}
        return {**{name: value for name, value in seen.items() if name not in named}, **told, **own}


def seen_settings(
    optimizer: torch.optim.Optimizer, module: nn.Module, *, batch: int, rate: float | None
) -> dict[str, Any]:
    """Hyper-parameters that can be seen on optimizer and module, under the names of ptsim's settings.

    The learning rate is that of the first group, as in epochs, without a schedule's warm-up. The others are those of
    the group that holds the most weights: timm's groups begin with the one that has no weight decay.
    """
    group = max(optimizer.param_groups, key=lambda group: sum(p.numel() for p in group["params"]))
    settings: dict[str, Any] = {
        "batch": batch,
        "optimizer": costed_optimizer(optimizer),
        "optimizer_class": type(optimizer).__name__,
        "compile": is_compiled(module),
        "penalty_ratio": 0.0,
    }
    rates = optimizer.param_groups[0].get("initial_lr"), rate, learning_rate(optimizer)
    found = next((given for given in rates if given is not None), None)
    if found is not None:
        settings["lr"] = float(found)
    own = {name: group.get(name) for name in ("momentum", "weight_decay", "nesterov")}
    if own["momentum"] is None:
        own["momentum"] = costed_momentum(optimizer)
    return settings | {name: value for name, value in own.items() if isinstance(value, int | float)}


def reducer_settings(reducer: nn.Module | None) -> dict[str, bool]:
    """What costs depend on of the DistributedDataParallel that calls the network, under the names of its arguments."""
    if not isinstance(reducer, nn.parallel.DistributedDataParallel):
        return {}
    return {name: bool(getattr(reducer, name)) for name in DDP_SETTINGS}


def widths(network: Network) -> dict[str, int]:
    """Output channels of the convolutions and linear layers, by name."""
    kinds = (LayerKind.CONV, LayerKind.LINEAR)
    return {layer.name: layer.out_channels or 0 for layer in network.layers if layer.kind in kinds}


def costed_optimizer(optimizer: torch.optim.Optimizer) -> str:
    """The optimizer of the cost model that moves as much memory: its own name, or by its states per weight."""
    name = type(optimizer).__name__.lower()
    if name in OPTIMIZERS:
        return name
    states = max((number for number, _ in _states(optimizer)), default=0)
    return "sgd" if states == 1 and momentum_of(optimizer) else _BY_STATES.get(states, "adam")


def _states(optimizer: torch.optim.Optimizer) -> list[tuple[int, int]]:
    """Of every weight that it has updated: how many values it keeps for each element, and how many elements it has."""
    return [
        (sum(isinstance(v, Tensor) and v.shape == weight.shape and v.ndim > 0 for v in kept.values()), weight.numel())
        for weight, kept in optimizer.state.items()
        if isinstance(weight, Tensor)
    ]


def momentum_of(optimizer: torch.optim.Optimizer) -> float | None:
    """The momentum of its first group; None where it has none."""
    momentum = optimizer.param_groups[0].get("momentum")
    return float(momentum) if isinstance(momentum, int | float) else None


def costed_momentum(optimizer: torch.optim.Optimizer) -> float | None:
    """The momentum at which `costed_optimizer` keeps as much: its own; 0 for one that keeps nothing."""
    momentum = momentum_of(optimizer)
    return 0.0 if momentum is None and costed_optimizer(optimizer) == "sgd" else momentum


def checked_facts(facts: RunFacts | None) -> RunFacts:
    """The facts that were told, or none; what no file holds among the hyper-parameters becomes text.

    Raises:
        UsageError: they are something else, or a trace that holds them could not be read.
    """
    if facts is not None and not isinstance(facts, RunFacts):
        raise UsageError(f"facts is a {type(facts).__name__}, expected ptsim.RunFacts(model=…, seed=…, …)")
    told = facts or RunFacts()
    settings = checked_settings(told.hyperparameters, "facts: hyperparameters")
    fields = as_plain(msgspec.structs.replace(told, hyperparameters={}))
    if isinstance(told.precision, str):
        fields["precision"] = parse_precision(told.precision).value
    try:
        made = msgspec.convert(fields, RunFacts)
    except msgspec.ValidationError as error:
        problem, _, place = str(error).replace("`", "").partition(" - at $.")
        raise UsageError(f"facts: {place}: {problem}") from error
    if (wrong := seed_problem(made.seed)) is not None:
        raise UsageError(f"facts: {wrong}")
    return msgspec.structs.replace(made, hyperparameters=settings)


def checked_settings(settings: Any, what: str = "settings") -> dict[str, Any]:
    """Hyper-parameters that were told, as a trace holds them; what no file holds becomes text.

    Raises:
        UsageError: they are no dict, or a trace that holds them could not be read; `what` is how to call them.
    """
    if settings is not None and not isinstance(settings, Mapping):
        raise UsageError(f"{what} is a {type(settings).__name__}, expected a dict", hint="vars(args) makes one")
    found: dict[str, Any] = _in_json(as_plain(dict(settings or {})))
    if (wrong := hyperparameters_problem(found)) is not None:
        raise UsageError(what + wrong.removeprefix("hyperparameters"))
    return found


def _in_json(value: Any) -> Any:
    """The value with names, and the numbers that JSON does not hold, NaN and infinite ones, as text."""
    if isinstance(value, dict):
        return {str(name): _in_json(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_in_json(part) for part in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def checked_loss(loss: Any) -> Tensor:
    """The loss as a scalar tensor; a tensor is not waited for.

    Raises:
        UsageError: it is no single number.
    """
    if not isinstance(loss, Tensor):
        return torch.tensor(real_number("the loss", loss))
    if loss.numel() != 1:
        problem = f"the loss is a tensor of {loss.numel()} numbers, expected one number"
        raise UsageError(problem, hint="step(loss.mean())")
    return loss.detach().reshape(())


def checked_fraction(name: str, value: Any) -> float | None:
    """An accuracy as a number; None for None.

    Raises:
        UsageError: it is no fraction; a percentage, perhaps.
    """
    if value is None:
        return None
    with contextlib.suppress(UsageError):
        number = real_number(name, value)
        if 0 <= number <= 1:
            return number
    raise UsageError(f"{name} is {value!r}, expected a fraction from 0 to 1")


def check_finite(epoch: Epoch) -> None:
    """Make sure that an epoch's losses are numbers that a trace holds.

    Raises:
        TrainingError: one is infinite, NaN, or as large as only a run is that diverges.
    """
    for name in ("train_loss", "validation_loss", "penalty"):
        value = getattr(epoch, name)
        if value is not None and not abs(value) <= LARGEST:
            expected = "not a finite number" if not math.isfinite(value) else f"expected at most {LARGEST:g}"
            problem = f"the {name.replace('_', ' ')} of epoch {epoch.epoch} is {value}, {expected}"
            raise TrainingError(problem, hint="a smaller learning rate or penalty_ratio")


def check_numbers(network: nn.Module) -> None:
    """Make sure that the network's weights are of the number format that a trace assumes, on a device that is timed.

    Raises:
        UsageError: one is not float32, and bytes and memory of everything that follows from the trace would be wrong;
            or it is on a device whose clock nobody here reads.
    """
    for name, parameter in network.named_parameters():
        if parameter.device.type not in ("cpu", "cuda"):
            raise UsageError(
                f"{name} of this {type(network).__name__} is on {parameter.device}, a trace is of a CPU or a CUDA GPU",
                hint="without record= nothing is written",
            )
        if parameter.dtype != torch.float32:
            kind = str(parameter.dtype).removeprefix("torch.")
            raise UsageError(
                f"{name} of this {type(network).__name__} is of {kind}, a trace describes float32 weights",
                hint="model.float(), with torch.autocast for half precision; without record= nothing is written",
            )


def check_device(network: nn.Module, device: torch.device) -> None:
    """Make sure that the network is where it was when its recorder was made.

    Raises:
        UsageError: it is not: clocks and meters of another device run.
    """
    now = next((parameter.device for parameter in network.parameters()), device)
    if now != device:
        raise UsageError(
            f"the network was moved from {device} to {now} after its Recorder or PruneTrain was made",
            hint="model.to(device) first",
        )


def product_layer(network: nn.Module) -> nn.Module | None:
    """Its first convolution or linear layer."""
    return next((module for module in network.modules() if isinstance(module, (*CONVS, nn.Linear))), None)


def note_image_shape(seen: tuple[int, ...] | None, described: tuple[int, int, int]) -> None:
    """A warning where the images of the last mini-batch are not those that the trace describes."""
    if seen is not None and seen != described:
        trained, told = (format_shape(shape) for shape in (seen, described))
        warnings.warn(
            f"the last mini-batch had images of {trained}, input_shape and the trace say {told}: "
            "the trace's operations and memory are not those of its measured times",
            stacklevel=4,
        )


def num_outputs(network: nn.Module, input_shape: tuple[int, int, int]) -> int:
    """The size of the first output's channel axis: the classes of a classifier.

    Raises:
        UnsupportedModelError: the network fails on an image of that shape.
    """
    with (
        evaluation_mode(network),
        torch.no_grad(),
        torch.random.fork_rng(devices=[]),
        naming_the_image(network, input_shape),
    ):
        output = network(example_input(network, input_shape))
    first = next(output_tensors(output), None)
    return int(first.shape[1]) if first is not None and first.ndim > 1 else 1


def shapes_of(network: nn.Module) -> tuple[Any, ...]:
    """What tells whether the network has changed its architecture: names and shapes of all its tensors."""
    named = (*network.named_parameters(), *network.named_buffers())
    return tuple((name, tuple(tensor.shape), tensor.requires_grad) for name, tensor in named)


def told_update(name: object, optimizer: torch.optim.Optimizer) -> UpdateCosts | None:
    """What a trace has to say of the optimizer called `name`, so that it can be read without its package.

    None of ptsim's own, if it keeps what its row says (Adam with amsgrad keeps more). One that no table knows moves as
    much as the one that stands for it (`costed_optimizer`). What most weights have counts: Adafactor keeps of matrices
    rows and columns alone. A state more is read and written, by a kernel of its own with another operand.
    """
    if not isinstance(name, str):
        return None
    known = name in OPTIMIZERS
    kind = OPTIMIZERS.find(name if known else costed_optimizer(optimizer))
    momentum = momentum_of(optimizer) if known else costed_momentum(optimizer)
    usual = kept = kind.states(momentum)
    elements = Counter[int]()
    for number, size in _states(optimizer) if name in OPTIMIZERS.own or not known else ():
        elements[number] += size
    if elements:
        kept = elements.most_common(1)[0][0]
    if name in OPTIMIZERS.own and kept == usual:
        return None
    more = max(0, kept - usual)
    return UpdateCosts(
        num_states=kept,
        accesses=kind.moved(momentum) + 3 * more,
        fused_accesses=kind.moved(momentum, fused=True) + 2 * more,
    )


def run_record(
    facts: RunFacts,
    *,
    network: Network,
    optimizer: torch.optim.Optimizer,
    num_train: int,
    team: Team,
    device: DeviceInfo,
) -> Run:
    """The first line of a trace that begins now on this machine.

    Args:
        facts: with everything but a data set decided.
        network: the first architecture.
        optimizer: the run's.
        num_train: images of the first epoch, for a data set that nobody has described.
        team: the ranks.
        device: of this rank.
    """
    assert facts.model is not None, "decided by the recorder"
    assert facts.precision is not None, "the same"
    assert facts.memory_format is not None, "the same"
    return Run(
        schema_version=SCHEMA_VERSION,
        created=time_stamp(),
        model=facts.model,
        dataset=facts.dataset
        or Dataset(
            name="unnamed",
            num_classes=network.num_classes,
            num_train=num_train,
            num_validation=0,
            input_shape=network.input_shape,
        ),
        hyperparameters=facts.hyperparameters,
        seed=facts.seed,
        precision=facts.precision,
        memory_format=facts.memory_format,
        world_size=team.world_size,
        backend=team.backend,
        device=device,
        versions=library_versions(("torch", "torchvision", "fvcore", "safetensors")),
        git_revision=git_revision(Path(ptsim.__file__).parent),
        update=told_update(facts.hyperparameters.get("optimizer"), optimizer),
    )


def change_record(before: Network, after: Network, *, epoch: int, batch: int) -> Reconfiguration:
    """A change of the network between two epochs that somebody else made, after `epoch` at that mini-batch."""
    widths_before, widths_after = widths(before), widths(after)
    return Reconfiguration(
        epoch=epoch,
        before=before.id,
        after=after.id,
        channels_removed=max(0, sum(widths_before.values()) - sum(widths_after.values())),
        layers_removed=tuple(name for name in widths_before if name not in widths_after),
        measured_duration_s=None,
        batch_before=batch,
        batch_after=batch,
        notes=("changed between two epochs by the training program; its time was not measured",),
    )
