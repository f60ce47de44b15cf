"""What stands between the bare network and the training loop: one compilation per architecture, DDP per team."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from ptsim.capture.copies import copied
from ptsim.errors import TrainingError, UnsupportedModelError, UsageError, lacks_memory, on_one_line
from ptsim.prune.cut import optimizer_inside, unwrap
from ptsim.training.config import Config
from ptsim.training.distributed import CountedBuckets, Team
from ptsim.training.watch import ON_SEVERAL_GPUS, WHOLE_ON_EVERY_RANK

# Running statistics are averaged at the epoch's end, not copied in every iteration. torch renamed the setting.
_DDP_SETTINGS = inspect.signature(nn.parallel.DistributedDataParallel).parameters
_WITHOUT_BUFFERS: dict[str, Any] = {
    "forward_sync_buffers" if "forward_sync_buffers" in _DDP_SETTINGS else "broadcast_buffers": False
}


def wrap(model: nn.Module, config: Config, team: Team, idle: Collection[str] = ()) -> nn.Module:
    """The network as the loop calls it; made anew after every reconfiguration.

    Compilation is inside DDP, so that a compiled step still reduces its gradients; they all become ready at its end
    and the all-reduce hides behind nothing. `idle` names parameters that get no gradient: DDP, which would wait for
    them, leaves them out.
    """
    module = synchronised(model) if config.sync_batch_norm and team.world_size > 1 else model
    if config.compile:
        module = CompiledOnce(module, backend=config.compile_backend)
    if team.world_size > 1:
        ignored = {id(parameter) for name, parameter in model.named_parameters() if name in idle}
        nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(  # type: ignore[no-untyped-call] # torch's gap
            module, [name for name, parameter in module.named_parameters() if id(parameter) in ignored]
        )
        module = nn.parallel.DistributedDataParallel(
            module,
            device_ids=[team.device] if team.device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            **_WITHOUT_BUFFERS,
        )
        # One rank may run out of memory. With synchronised statistics it would owe the others those exchanges, too.
        if config.dynamic_batch and not config.sync_batch_norm:
            CountedBuckets(module)
    return module


def bare(module: nn.Module) -> nn.Module:
    """The network inside what torch.compile, data parallelism or a weight average have put around it."""
    while True:
        inner = unwrap(module)
        inner = getattr(inner, "_orig_mod", inner)
        if isinstance(inner, CompiledOnce):
            inner = inner.compiled
        if inner is module:
            return module
        module = inner


def is_wrapped(module: nn.Module) -> bool:
    """Whether a changed network has to be wrapped again: it is compiled, in place perhaps, or in a DDP."""
    while isinstance(module, nn.DataParallel):  # it looks its parameters up at every call
        module = module.module
    return bare(module) is not module or module._compiled_call_impl is not None


def checked_rewrap(rewrap: Any) -> Any:
    """What wraps a changed network; None where the loop does it.

    Raises:
        UsageError: it cannot be called.
    """
    if rewrap is not None and not callable(rewrap):
        raise UsageError(
            f"rewrap is {rewrap!r}, expected a function from the changed network to the module that the loop calls",
            hint="rewrap=DistributedDataParallel, for instance",
        )
    return rewrap


def wrapped_again(rewrap: Callable[[nn.Module], nn.Module], network: nn.Module) -> nn.Module:
    """What `rewrap` makes of the changed network.

    Raises:
        UsageError: it gives no module.
    """
    module = rewrap(network)
    if not isinstance(module, nn.Module):
        raise UsageError(f"rewrap gave a {type(module).__name__}, expected the module that the loop calls")
    return module


def is_compiled(module: nn.Module) -> bool:
    """Whether the network, or something around it, is compiled."""
    while True:
        if hasattr(module, "_orig_mod") or isinstance(module, CompiledOnce) or module._compiled_call_impl is not None:
            return True
        inner = unwrap(module)
        if inner is module:
            return False
        module = inner


def refuse_spread(module: Any) -> None:
    """Make sure that this is a network, and that this process has all of it, on one device.

    Raises:
        UsageError: it is something else, FSDP or tensor parallelism has spread its weights over the ranks, or
            DataParallel runs it on several GPUs.
    """
    if not isinstance(module, nn.Module):
        is_class = isinstance(module, type)
        found = f"the class {module.__name__}" if is_class else f"a {type(module).__name__}"
        hint = f"{module.__name__}(…) makes a network of it" if is_class else None
        raise UsageError(f"the model is {found}, expected a network (torch.nn.Module)", hint=hint)
    sharded = _loaded("torch.distributed.fsdp", "FullyShardedDataParallel", "FSDPModule")
    spread = _loaded("torch.distributed.tensor", "DTensor")
    parts = list(module.modules())
    if any(isinstance(part, sharded) for part in parts) or any(isinstance(p, spread) for p in module.parameters()):
        raise UsageError(
            "every rank holds only a part of the network (FSDP or tensor parallelism), and ptsim has to see all of it",
            hint=WHOLE_ON_EVERY_RANK,
        )
    if any(isinstance(part, nn.DataParallel) and len(part.device_ids) > 1 for part in parts):
        raise UsageError(ON_SEVERAL_GPUS, hint=WHOLE_ON_EVERY_RANK)


def averaged(ema: nn.Module, network: nn.Module, *, alike: bool = False) -> nn.Module:
    """The copy of `network` inside an average of its weights, whatever class keeps it.

    Args:
        ema: torch's `AveragedModel`, timm's `ModelEma`, another module that keeps the copy as `module`, or the copy.
        network: the network.
        alike: the shapes are the same, too.

    Raises:
        UsageError: it holds no such copy.
    """

    def described(module: nn.Module) -> dict[str, object]:
        return {name: parameter.shape if alike else None for name, parameter in module.named_parameters()}

    inner = bare(ema) if isinstance(ema, nn.Module) else None
    for copy in (inner, getattr(inner, "module", None)):
        if isinstance(copy, nn.Module) and described(copy) == described(network):
            return copy
    raise UsageError(
        f"ema is a {type(ema).__name__} that holds no average of this {type(network).__name__}",
        hint="torch.optim.swa_utils.AveragedModel(network), timm.utils.ModelEmaV3(network), or a copy of the network",
    )


def is_sharded(optimizer: torch.optim.Optimizer) -> bool:
    """Whether every rank holds the state of some of the weights only, as torch's ZeroRedundancyOptimizer does."""
    return isinstance(optimizer, _loaded("torch.distributed.optim", "ZeroRedundancyOptimizer"))


def _loaded(module: str, *names: str) -> tuple[type, ...]:
    """Classes of a module that costs seconds to import; none where nobody has imported it."""
    found = (getattr(sys.modules.get(module), name, None) for name in names)
    return tuple(kind for kind in found if isinstance(kind, type))


def bare_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer inside what Accelerate, Lightning, SAM or Lookahead have put around it: the one that updates.

    Raises:
        UsageError: it is no optimizer.
    """
    inner = optimizer_inside(optimizer)
    if inner is not None:
        return bare_optimizer(inner)
    if not hasattr(optimizer, "param_groups"):
        raise UsageError(f"the optimizer is a {type(optimizer).__name__}, expected one of torch.optim's kind")
    return optimizer


def called(module: nn.Module) -> nn.Module:
    """What DDP calls, so that hooks on it see every training pass: DDP may be put around it later, or anew."""
    while isinstance(module, nn.parallel.DistributedDataParallel):
        module = module.module
    return module


def synchronised(model: nn.Module) -> nn.Module:
    """A twin with BatchNorm statistics over all ranks that shares every parameter and buffer with `model`.

    The model itself stays as it is: what captures, prunes or profiles it runs on one rank or without a GPU, where a
    synchronised BatchNorm would wait for the others or refuse.
    """
    twin = copied(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
    return nn.SyncBatchNorm.convert_sync_batchnorm(twin)  # type: ignore[no-untyped-call,no-any-return] # torch's gap


class CompiledOnce(nn.Module):
    """`torch.compile` that either is one graph, compiled once, or an error.

    torch itself splits what it cannot capture, and after eight recompilations goes on without the compiler, silently.
    """

    def __init__(self, model: nn.Module, *, backend: str) -> None:
        """Forgets what was compiled before: those networks are gone."""
        super().__init__()
        from torch._dynamo.utils import counters  # seconds to import, only for those who compile

        torch._dynamo.reset()
        self._counted = counters["stats"]
        self.num_compilations = 0
        self._name = type(model).__name__
        self.compiled: Any = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)

    def forward(self, images: Tensor) -> Tensor:
        """As the model's own forward.

        Raises:
            UnsupportedModelError: the compiler cannot take the model as one graph.
            TrainingError: it would have to compile this architecture a second time.
        """
        if self.num_compilations == 0:
            before = self._counted["unique_graphs"]
            try:
                logits: Tensor = self.compiled(images)
            except (torch._dynamo.exc.TorchDynamoException, RuntimeError) as error:
                if lacks_memory(error):
                    raise
                reason = on_one_line(error)
                raise UnsupportedModelError(f"torch.compile cannot take {self._name} as one graph: {reason}") from error
            self.num_compilations = self._counted["unique_graphs"] - before
            return logits
        with torch.compiler.set_stance("fail_on_recompile"):
            try:
                return self.compiled(images)  # type: ignore[no-any-return] # torch's gap
            except RuntimeError as error:
                if "recompile" not in str(error):
                    raise
                raise TrainingError(f"{self._name} would be compiled a second time: {str(error)[:300]}") from error
