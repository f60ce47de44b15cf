"""What a whole run is when it is read back, and what it says of itself: final network, optimizer, pruned or not."""

from __future__ import annotations

import bisect
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from ptsim.criteria import GROUP_LASSO
from ptsim.errors import UsageError
from ptsim.network import LayerKind, Network
from ptsim.operators import BILINEAR, num_taps
from ptsim.setting import OF_RUNS, StepSetting, ToldPenalty, ToldUpdate
from ptsim.trace.schema import Draw, End, Epoch, PenaltyCosts, Profile, Reconfiguration, Run, gone_share

if TYPE_CHECKING:
    import pandas as pd

_SEVERAL = 1.5  # reductions per update; a GradScaler leaves out a few updates whose gradients were reduced


def planned_mark(origin: str) -> str:
    """What stands before the name of a run of this origin, so that planned numbers look planned: "planned ", or ""."""
    return "planned " if origin == "planned" else ""


class Trace(msgspec.Struct, frozen=True, kw_only=True):
    """A whole run, read back.

    Attributes:
        path: where it was read from.
        networks: architecture id → network, in order of first appearance.
        draws: other trajectories of a planned run, which agree with what was given as well as its own does.
        truncated: the last line was incomplete and has been dropped.
        penalties: by architecture id, of a criterion that is not ptsim's own.
    """

    path: Path
    run: Run
    networks: dict[str, Network]
    epochs: tuple[Epoch, ...]
    reconfigurations: tuple[Reconfiguration, ...]
    profiles: tuple[Profile, ...]
    end: End | None
    draws: tuple[Draw, ...] = ()
    truncated: bool = False
    penalties: dict[str, PenaltyCosts] = {}

    @property
    def fingerprint(self) -> str:
        """What a copy of the run has, also one that was taken before its end, and no other run: its beginning.

        The facts that decide it, when it began, and what its first epoch took.
        """
        run, first = self.run, next(iter(self.epochs), None)
        facts = run.created, run.model, run.dataset.name, run.seed, run.device.name, run.hyperparameters
        wall_s = first.time.wall_s if first is not None and first.measured_time is not None else None
        took = None if first is None else (first.num_images, first.train_loss, wall_s)
        return hashlib.sha256(msgspec.json.encode((facts, took), order="deterministic")).hexdigest()

    @property
    def complete(self) -> bool:
        """The run reached its last planned epoch."""
        return self.end is not None and self.end.status == "clean"

    @property
    def planned_epochs(self) -> int | None:
        """How many epochs the run's configuration asked for; None where it does not say.

        A resumed run may have been given more epochs than its first line says.
        """
        epochs = self.run.hyperparameters.get("epochs")
        return max(epochs, len(self.epochs)) if isinstance(epochs, int) else None

    @property
    def final_network(self) -> Network:
        """What the run ended with: the last epoch's network, or what a reconfiguration after that epoch left.

        Of a run that stopped before its first epoch the network that it would have trained.

        Raises:
            UsageError: the trace has no architecture yet.
        """
        if self.epochs:
            last = self.epochs[-1]
            after = [event.after for event in self.reconfigurations if event.epoch >= last.epoch]
            return self.networks[after[-1]] if after else self.network_of(last)
        if not self.networks:
            raise UsageError(f"{self.path} has no architecture yet: the run stopped before its first epoch")
        return list(self.networks.values())[-1]

    @property
    def final_accuracy(self) -> float | None:
        """Validation accuracy of what the run handed over: the end record's, or the last epoch's of an unfinished run.

        Training validates again after a pruning that follows the last epoch, and the end record holds that accuracy.
        """
        if self.end is not None and self.end.final_accuracy is not None:
            return self.end.final_accuracy
        return self.epochs[-1].validation_accuracy if self.epochs else None

    @property
    def optimizer(self) -> str:
        """The run's optimizer; SGD where the record does not say."""
        return str(self.run.hyperparameters.get("optimizer") or "sgd")

    @property
    def momentum(self) -> float | None:
        """The optimizer's momentum; None where the record does not say."""
        momentum = self.run.hyperparameters.get("momentum")
        return float(momentum) if isinstance(momentum, int | float) else None

    @property
    def proximal(self) -> bool:
        """The penalty acts as a proximal step after the update."""
        return self.run.hyperparameters.get("regularizer") == "proximal"

    @property
    def criterion(self) -> str | None:
        """The criterion whose penalty the epochs have, the group lasso unless one is named; None without a penalty."""
        if not any(epoch.regularized for epoch in self.epochs):
            return None
        return str(self.run.hyperparameters.get("criterion") or GROUP_LASSO)

    @property
    def told_update(self) -> ToldUpdate | None:
        """What the record says of its optimizer, where no row of ptsim's own says it."""
        update = self.run.update
        return None if update is None else update.told(self.optimizer)

    @property
    def told_penalties(self) -> tuple[ToldPenalty, ...]:
        """What the record says of its criterion in every network, where that is not ptsim's own."""
        return tuple(
            ToldPenalty(
                criterion=str(self.run.hyperparameters.get("criterion")),
                architecture=architecture,
                num_parameters=self.networks[architecture].num_parameters,
                **msgspec.structs.asdict(penalty),
            )
            for architecture, penalty in self.penalties.items()
            if architecture in self.networks
        )

    @property
    def world_sizes(self) -> tuple[int, ...]:
        """How many ranks trained its epochs; several where the run went on with another number than it began with."""
        return tuple(dict.fromkeys(epoch.world_size for epoch in self.epochs)) or (self.run.world_size,)

    @property
    def own_profiles(self) -> tuple[Profile, ...]:
        """Those taken on the device that the first line names: a resumed run may have gone on with another."""
        return tuple(profile for profile in self.profiles if profile.device == self.run.device.name)

    @property
    def bucket_views(self) -> bool:
        """Whether DDP's buckets held the gradients (`gradient_as_bucket_view`); unless it says so, as `ptsim train`."""
        return self.run.hyperparameters.get("gradient_as_bucket_view") is not False

    @property
    def broadcasts_buffers(self) -> bool:
        """Whether DDP broadcast buffers before every forward pass; unless it says so, as `ptsim train`: not."""
        return self.run.hyperparameters.get("broadcast_buffers") is True

    @property
    def compiled(self) -> bool:
        """The step ran through torch.compile, so that all gradients became ready together at its end."""
        return self.run.hyperparameters.get("compile") is True

    @property
    def compiled_note(self) -> str | None:
        """What has to stand beside a prediction of the run's steps; None where nothing compiled them."""
        if not self.compiled:
            return None
        return "the run's steps were compiled, those predicted are eager PyTorch's, as are those of its profiles"

    @property
    def reductions_note(self) -> str | None:
        """What has to stand beside predicted all-reduces; None where the run reduced its gradients once per update."""
        often = [epoch for epoch in self.epochs if epoch.passes > 1 and self._reductions_per_update(epoch) > _SEVERAL]
        if not often:
            return None
        most = max(often, key=self._reductions_per_update)
        return (
            f"the run reduced its gradients {self._reductions_per_update(most):.0f} times per update of {most.passes} "
            "passes (without no_sync); a predicted update reduces them once"
        )

    def _reductions_per_update(self, epoch: Epoch) -> float:
        return epoch.allreduce_bytes / max(1, self.network_of(epoch).gradient_bytes * epoch.num_iterations)

    @property
    def penalty_ratio(self) -> float | None:
        """The penalty's share in the first loss; 0 for a dense run, None where the configuration does not say.

        A recorder that saw no pruner when the run began has noted 0.
        """
        ratio = self.run.hyperparameters.get("penalty_ratio")
        if isinstance(ratio, int | float) and (ratio or not any(epoch.regularized for epoch in self.epochs)):
            return float(ratio)
        return None if self.is_pruned else 0.0

    @property
    def is_pruned(self) -> bool:
        """The run was regularised to shrink or has shrunk; every other run is dense, one that frees layers as well."""
        shrunk = any(event.channels_removed or event.layers_removed for event in self.reconfigurations)
        return shrunk or any(epoch.regularized for epoch in self.epochs)

    @property
    def is_planned(self) -> bool:
        """Nobody has trained the run: it has architectures and iterations, and no measured quantity."""
        return self.run.origin == "planned"

    @property
    def mark(self) -> str:
        """What stands before the name of the run: see `planned_mark`."""
        return planned_mark(self.run.origin)

    @property
    def is_stretched(self) -> bool:
        """A recorded run at another length than it was trained (`trace.stretch`): planned, but with a device."""
        return self.is_planned and self.run.device.kind != "none" and bool(self.run.assumed)

    def drawn(self) -> tuple[Trace, ...]:
        """The planned run, and one for each of its draws: the same steps of other networks."""
        return (msgspec.structs.replace(self, draws=()), *(self._other(draw) for draw in self.draws))

    def _other(self, draw: Draw) -> Trace:
        starts = [start for start, _ in draw.architectures]
        sizes = {name: product_sizes(self.networks[name]) for _, name in draw.architectures}
        first_channels, first_weights = sizes[draw.architectures[0][1]]

        def at(epoch: int) -> str:
            return draw.architectures[bisect.bisect_right(starts, epoch) - 1][1]

        def trained(epoch: Epoch) -> Epoch:
            network = self.networks[at(epoch.epoch)]
            channels, weights = sizes[at(epoch.epoch)]
            return msgspec.structs.replace(
                epoch,
                architecture=at(epoch.epoch),
                channel_sparsity=gone_share(channels, first_channels),
                weight_sparsity=gone_share(weights, first_weights),
                allreduce_bytes=epoch.num_iterations * network.gradient_bytes if epoch.world_size > 1 else 0,
            )

        def changed(event: Reconfiguration) -> Reconfiguration:
            before, after = at(event.epoch), at(event.epoch + 1)
            removed = sizes[before][0] - sizes[after][0]
            return msgspec.structs.replace(
                event, before=before, after=after, channels_removed=removed, layers_removed=(), notes=()
            )

        return msgspec.structs.replace(
            self,
            run=msgspec.structs.replace(self.run, seed=draw.seed),
            epochs=tuple(trained(epoch) for epoch in self.epochs),
            reconfigurations=tuple(changed(event) for event in self.reconfigurations),
            draws=(),
        )

    def require_measured(self, purpose: str) -> None:
        """Refuse a planned run where a measured one is needed; `purpose` completes "there is nothing to …".

        Raises:
            UsageError: the run is planned.
        """
        if self.is_planned:
            raise UsageError(
                f"{self.path} is a planned run: nobody has trained it and nothing in it is measured, "
                f"so there is nothing to {purpose}"
            )

    def network_of(self, epoch: Epoch) -> Network:
        """The network that `epoch` trained."""
        return self.networks[epoch.architecture]

    def setting_of(self, epoch: Epoch) -> StepSetting:
        """How the training steps of `epoch` were run."""
        return msgspec.structs.replace(
            self.usual_setting,
            batch=epoch.batch_per_gpu,
            regularizer=self.criterion if epoch.regularized else None,
            num_gpus=epoch.world_size,
            passes=epoch.passes,
        )

    @property
    def usual_setting(self) -> StepSetting:
        """How its training steps are run, as far as the first record says: without mini-batch (0) and penalty."""
        return StepSetting(
            batch=0,
            precision=self.run.precision,
            memory_format=self.run.memory_format,
            optimizer=self.optimizer,
            momentum=self.momentum,
            proximal=self.proximal,
            num_gpus=self.run.world_size,
            bucket_views=self.bucket_views,
            told_update=self.told_update,
            told_penalties=self.told_penalties,
            torch_version=OF_RUNS,
        )

    def epochs_frame(self) -> pd.DataFrame:
        """A table with one row per recorded epoch: what it trained, its times, memory, bytes, energy and accuracy.

        Seconds are of the whole epoch, but for `step_*_seconds`, the quantiles of its iterations;
        `reconfiguration_seconds` is what the run paid right after it. Memory, bytes, energy and power are of one GPU.
        `RunProjection.epochs_frame` has columns of the same names for a projected run.
        """
        import pandas as pd

        from ptsim.trace.frames import epoch_rows, numeric

        return numeric(pd.DataFrame(epoch_rows(self)))

    def architectures_frame(self) -> pd.DataFrame:
        """A table with one row per layer of every architecture: shapes, parameters, multiply–accumulates of an image.

        Counts of a layer that runs `once` are of a mini-batch.
        """
        import pandas as pd

        from ptsim.trace.frames import layer_rows, numeric

        return numeric(pd.DataFrame(layer_rows(self)))


def product_sizes(network: Network) -> tuple[int, int]:
    """(output channels, weights) of all convolutions and linear layers, as a recorded run counts its modules.

    Biases are no weights. What forward calls again (NAME:1) has the weights of the first call.
    """
    layers = [
        layer
        for layer in network.layers
        if layer.kind in (LayerKind.CONV, LayerKind.LINEAR) and layer.op != BILINEAR and ":" not in layer.name
    ]
    weights = (num_taps(layer) * layer.out_channels * layer.in_channels // layer.groups for layer in layers)
    return sum(layer.out_channels for layer in layers), sum(weights)
