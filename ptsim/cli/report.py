"""`ptsim report`: the cost-breakdown page of recorded runs."""

from __future__ import annotations

from pathlib import Path

from ptsim.cli.common import print_json, print_line
from ptsim.cli.options import Json, LengthOptions, Out, Profile
from ptsim.cli.reading import parse_gpus
from ptsim.errors import UsageError
from ptsim.report.build import make_report, summary, write
from ptsim.textfile import check_folder_writable


def report(
    *traces: Path,
    out: Out,
    cluster: str | None = None,
    gpus: str | None = None,
    price: float | None = None,
    grid_intensity: float | None = None,
    input: str = "none",
    profile: Profile = None,
    length: LengthOptions = LengthOptions(),
    json: Json = False,
) -> None:
    """Write the cost-breakdown page of recorded runs: one self-contained HTML file, its figures and its tables.

    Dense and pruned runs of the same network and data are recognised and compared.

    Args:
        traces: Trace files or run folders.
        out: Folder for index.html, figures/ and tables/.
        cluster: Cluster: catalog name or TOML file; or several, separated by commas. The page is about the first one
            and compares the others with it. Default: a catalog cluster of the recording device, or else dgx-a100.
        gpus: GPU counts, for example 1,8,64. Default: powers of two up to eight nodes.
        price: Price in USD per GPU and hour. Default: the cluster's; without one, no money is shown.
        grid_intensity: Grams of CO₂ that a kWh causes. Without it, no CO₂ is shown.
        input: What reads and decodes the images with the node's cores: torchvision, dali or ffcv. none: the
            GPU never waits.
    """
    clusters = None if cluster is None else [name.strip() for name in cluster.split(",")]
    if clusters is not None and not all(clusters):
        raise UsageError(f"cluster {cluster!r} has an empty name; expected names or TOML files with commas in between")
    runs = [length.read(path) for path in traces]
    check_folder_writable(out)
    made = make_report(
        runs,
        cluster=clusters,
        gpus=None if gpus is None else parse_gpus(gpus),
        price_usd_per_gpu_hour=price,
        grid_grams_per_kwh=grid_intensity,
        input_pipeline=input,
        profile=profile,
    )
    page = write(made, out)
    if json:
        print_json({"report": str(page), **summary(made)})
        return
    print_line(made.answer.headline)
    for tile in made.answer.tiles:
        print_line(f"{tile.name}: {tile.value} ({tile.detail}; {tile.origin})")
    if made.answer.certainty:
        print_line(f"How sure: {made.answer.certainty}")
    for reason in made.answer.why:
        print_line(f"Why: {reason}")
    for notice in made.answer.notices:
        print_line(f"note: {notice}")
    print_line(page)
