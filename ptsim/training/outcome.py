"""What PruneTrain tells its loop: what an epoch's end did, where the run stands, how the mini-batch has grown."""

from __future__ import annotations

import msgspec

from ptsim.network import Network
from ptsim.prune.reconfigure import Surgery
from ptsim.trace.schema import Epoch, Reconfiguration


class Growth(msgspec.Struct, frozen=True, kw_only=True):
    """The mini-batch after a reconfiguration: images per rank, the rate's factor, the bytes that an iteration needs."""

    batch_per_gpu: int
    learning_rate_scale: float = 1.0
    predicted_memory_bytes: int | None = None


class EpochOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """What `PruneTrain.end_epoch` did.

    Attributes:
        epoch: the record of the epoch, as it stands in the trace.
        reconfiguration: the record of the reconfiguration, None where it was not time for one.
        pruned: the network has changed: what wraps it has to be made again.
    """

    epoch: Epoch
    reconfiguration: Reconfiguration | None
    pruned: bool


class PruningSummary(msgspec.Struct, frozen=True, kw_only=True):
    """Where a run stands; as text by `str`.

    `channels` and `parameters` are (at the start, now): output channels of convolutions and linear layers, and
    trainable parameters.
    """

    network: str
    epochs: int
    penalty_coefficient: float | None
    reconfigurations: int
    channels: tuple[int, int]
    parameters: tuple[int, int]
    forward_macs: tuple[int, int]
    layers_removed: tuple[str, ...]

    def __str__(self) -> str:
        def change(what: str, pair: tuple[int, int]) -> str:
            return f"{what} {pair[0]:,} → {pair[1]:,} ({pair[1] / max(1, pair[0]):.0%})"

        strength = "not decided yet" if self.penalty_coefficient is None else f"{self.penalty_coefficient:.3g}"
        lines = [
            f"{self.network} after {self.epochs} epochs and {self.reconfigurations} reconfigurations, λ {strength}",
            change("output channels", self.channels),
            change("trainable parameters", self.parameters),
            change("multiply–accumulates per image", self.forward_macs),
        ]
        if self.layers_removed:
            lines.append(f"layers removed: {', '.join(self.layers_removed)}")
        return "\n".join(lines)


def reconfiguration_record(
    epoch: Epoch, surgery: Surgery, before: Network, after: Network, *, duration_s: float, growth: Growth
) -> Reconfiguration:
    """What PruneTrain has done to the network after `epoch`, and how the mini-batch has grown with it."""
    return Reconfiguration(
        epoch=epoch.epoch,
        before=before.id,
        after=after.id,
        channels_removed=surgery.channels_removed,
        layers_removed=surgery.layers_removed,
        measured_duration_s=duration_s,
        batch_before=epoch.batch_per_gpu,
        batch_after=growth.batch_per_gpu,
        learning_rate_scale=growth.learning_rate_scale,
        predicted_memory_bytes=growth.predicted_memory_bytes,
        notes=surgery.notes,
    )
