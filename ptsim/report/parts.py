"""What does a run's time consist of? The names of its parts, which tables, figures and sentences share."""

from __future__ import annotations

PRODUCTS = "convolutions and linear layers"
MEMORY_BOUND = "memory-bound layers"
HOOKS = "gradient hooks"
UPDATE = "optimizer and regulariser"
COMMUNICATION = "exposed communication"
INPUT = "input wait"
CHANGES = "start and reconfiguration"
HOST = "loss and host gaps"
OTHER = "other"
