"""What holds for all tests: which folders are slow as a whole, and that tests marked `gpu` need a GPU.

A slow test of another folder carries the marker itself.
"""

from pathlib import Path

import pytest

HERE = Path(__file__).parent
SLOW_FOLDERS = {"analysis", "measure", "models", "training"}  # they train networks, time operators, start processes
FAST_FILES = {
    "analysis/test_allreduce_scripts.py",
    "measure/test_timers.py",
    "training/test_config.py",
    "training/test_schedule.py",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    on_gpu = []
    for item in items:
        path = item.path.relative_to(HERE)
        if path.parts[0] in SLOW_FOLDERS and path.as_posix() not in FAST_FILES:
            item.add_marker(pytest.mark.slow)
        if item.get_closest_marker("gpu"):
            on_gpu.append(item)
    if not on_gpu:
        return
    import torch  # takes seconds; only if there is such a test

    if not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
