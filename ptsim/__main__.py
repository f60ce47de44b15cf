"""`python -m ptsim`, which torchrun needs."""

from ptsim.cli.main import main

main()
