"""`ptsim inspect`: the channel groups of a network, and a numerical proof that pruning them is exact."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from rich.table import Table

from ptsim import zoo
from ptsim.cli.common import print_json, stdout_console, users_code
from ptsim.cli.options import Json, NetworkOptions
from ptsim.errors import UsageError
from ptsim.units import format_count, format_shape

if TYPE_CHECKING:
    from ptsim.prune.proof import GroupReport, Inspection


def inspect(
    model: str,
    *,
    network: NetworkOptions = NetworkOptions(),
    json: Json = False,
) -> int:
    """Show the channel groups of a network and prove that pruning them is exact.

    Zeroes random channels, prunes them, and compares the two networks in evaluation and in training mode (outputs,
    gradients, running statistics) in float64. Exit status 1 if they differ by more than 1e-9.

    Args:
        model: Zoo name, torchvision:NAME or path/to/file.py:function.
    """
    if network.classes is not None and network.classes < 1:
        raise UsageError(f"{network.classes} classes; at least 1 is needed")
    shape = network.input_shape
    zoo.check_file(model)  # before torch is imported
    from ptsim.prune.proof import inspect as inspect_model

    with users_code():
        found = inspect_model(model, input_shape=shape, num_classes=network.classes)
    if json:
        print_json(dataclasses.asdict(found))
    else:
        _show(found)
    return 0 if found.exact or not found.channels_removed else 1


def _answer(group: GroupReport) -> str:
    """Whether its channels can be pruned; how, where not one by one, or why not."""
    if not group.prunable:
        return f"no: {group.reason}"
    more = "…" if len(group.evenly) > 2 else ""
    how = [f"in {group.sets} sets"] if group.sets < group.width else []
    how += [f"as many from every group of {', '.join(group.evenly[:2])}{more}"] if group.evenly else []
    return ", ".join(["yes", *how])


def _show(found: Inspection) -> None:
    console = stdout_console()
    table = Table(title=f"{found.model}: channel groups at {format_shape(found.input_shape)}")
    for column in ("group", "channels", "written and read by", "prunable"):
        table.add_column(column, justify="right" if column == "channels" else "left", overflow="fold")
    for group in found.groups:
        members = ", ".join(group.members[:4]) + (
            f" and {len(group.members) - 4} more" if len(group.members) > 4 else ""
        )
        table.add_row(group.name, str(group.width), members, _answer(group))
    console.print(table)
    counts = f"{found.prunable_channels} channels can be pruned, {found.refused_channels} cannot."
    if not found.channels_removed:
        why = " Of those that were tried none can go without others." if found.prunable_channels else ""
        console.print(f"{counts}{why} Nothing was pruned, so nothing is proved.")
        return
    image = format_shape(found.proof_input)
    console.print(
        f"{counts} Proof: "
        f"{found.channels_removed} zeroed and pruned in {format_count(found.proof_parameters)} parameters, images of "
        f"{image}, float64, dropout and stochastic depth switched off; largest relative error "
        f"{found.max_rel_error_eval:.1e} in evaluation, {found.max_rel_error_train:.1e} in training: "
        f"{'exact' if found.exact else 'NOT exact'} ({found.seconds:.0f} s)."
    )
