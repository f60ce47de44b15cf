"""Planned trajectories: how a network that nobody has trained could be pruned, reconfiguration by reconfiguration.

A *kind* of trajectory is one file here: a function that takes the text of `--pruning` and a `Problem`, and gives the
width of every edge after every reconfiguration. `@register` puts it among the others.
"""

from ptsim.prune.trajectories.problem import Edge, Problem, Trajectory, find_kind, register

__all__ = ["Edge", "Problem", "Trajectory", "find_kind", "register"]
