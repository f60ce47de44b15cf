"""`ptsim calibrate`: measure this machine."""

from __future__ import annotations

import cyclopts

from ptsim.cli.calibrate_gpu import gpu
from ptsim.cli.calibrate_network import network

app = cyclopts.App(name="calibrate", help="Measure this machine: operator times (gpu) or all-reduces (network).")
app.command(gpu)
app.command(network)
