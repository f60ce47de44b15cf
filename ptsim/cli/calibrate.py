"""`ptsim calibrate`: measure this machine."""

from __future__ import annotations

import cyclopts

app = cyclopts.App(name="calibrate", help="Measure this machine: operator times (gpu) or all-reduces (network).")
app.command("ptsim.cli.calibrate_gpu:gpu", name="gpu")
app.command("ptsim.cli.calibrate_network:network", name="network")
