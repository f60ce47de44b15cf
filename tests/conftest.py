"""What holds for all tests: which are slow, what `-m "not slow"` need not import, and that `gpu` needs a GPU.

A test of more than `LIMIT_S` is slow. It carries the marker itself, or stands in a folder that is slow as a whole. One
that has grown beyond the limit and carries no marker is named at the end of the run.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
LIMIT_S = 0.5  # of CPU time, that of child processes included; on a quiet core
SLOW_FOLDERS = {"analysis", "measure", "models", "training"}  # they train networks, time operators, start processes
FAST_FILES = {
    "analysis/test_allreduce_scripts.py",
    "measure/test_timers.py",
    "training/test_config.py",
    "training/test_schedule.py",
}
_STARTED = pytest.StashKey[float]()
_TAKEN = "cpu_s"


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """A file in which every test is slow is not imported where none of them would run."""
    if config.option.markexpr == "not slow" and collection_path.match("test_*.py"):
        return _in_slow_folder(collection_path) or _marks_all_slow(collection_path) or None
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    on_gpu = []
    for item in items:
        if _in_slow_folder(item.path):
            item.add_marker(pytest.mark.slow)
        if item.get_closest_marker("gpu"):
            on_gpu.append(item)
    if not on_gpu:
        return
    import torch  # takes seconds; only if there is such a test

    if not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    item.stash[_STARTED] = _cpu_s()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> None:
    if call.when == "call" and not any(item.get_closest_marker(name) for name in ("slow", "gpu")):
        item.user_properties.append((_TAKEN, _cpu_s() - item.stash[_STARTED]))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The tests that should carry the marker."""
    reports = terminalreporter.getreports("passed") + terminalreporter.getreports("failed")
    taken = {
        report.nodeid: value
        for report in reports
        for name, value in getattr(report, "user_properties", ())
        if name == _TAKEN and value > LIMIT_S
    }
    if taken:
        terminalreporter.section(f"more than {LIMIT_S} s of CPU time and not marked slow")
        for name, value in sorted(taken.items(), key=lambda row: -row[1]):
            terminalreporter.write_line(f"{value:6.2f} s  {name}")
        terminalreporter.write_line("A machine at work inflates the figures; who imports a library first pays for it.")


def _in_slow_folder(path: Path) -> bool:
    inside = path.relative_to(HERE)
    return inside.parts[0] in SLOW_FOLDERS and inside.as_posix() not in FAST_FILES


def _marks_all_slow(path: Path) -> bool:
    """True if the file says of itself, or of each of its tests, that it is slow."""
    text = path.read_text(encoding="utf-8")
    if "mark.slow" not in text:
        return False
    body = ast.parse(text).body
    if any(isinstance(node, ast.Assign) and "pytestmark" in ast.unparse(node) and _is_slow(node) for node in body):
        return True
    return all(_is_slow(test) for test in _tests(body))


def _tests(body: list[ast.stmt]) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    for node in body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            yield node
        elif isinstance(node, ast.ClassDef) and node.name.startswith("Test"):
            yield from [node] if _is_slow(node) else _tests(node.body)


def _is_slow(node: ast.Assign | ast.FunctionDef | ast.ClassDef) -> bool:
    if isinstance(node, ast.Assign):
        return "pytest.mark.slow" in ast.unparse(node.value)
    return any(ast.unparse(mark) == "pytest.mark.slow" for mark in node.decorator_list)  # not a parameter's alone


def _cpu_s() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
