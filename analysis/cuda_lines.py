"""Which lines of ptsim run on a GPU only, or ask its driver, and which of them did no test reach?

    coverage json -o coverage.json && python analysis/cuda_lines.py coverage.json

The report is of a run of the tests marked gpu on a GPU; `gpu_campaign.py` makes one, and `tests.txt` has its answer.
A line counts that says `cuda` in its code or calls NVML, the library of NVIDIA's driver, and so do the branches that a
comparison with "cuda" guards.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ptsim

PACKAGE = Path(ptsim.__file__).resolve().parent
_ATTRIBUTES = {"cuda", "cudnn", "is_cuda", "CUDAGraph"}
_NAMES = {"cuda_event"}
_NVML = re.compile("nvml[A-Z]")  # functions of pynvml, such as nvmlInit; not its errors and constants


def asks_for_cuda(node: ast.AST, documentation: str | None = None) -> bool:
    """Whether the code says `cuda`, as torch or the kind of a device, or calls NVML; not in `documentation`."""
    for part in ast.walk(node):
        if isinstance(part, ast.Attribute) and (part.attr in _ATTRIBUTES or _NVML.match(part.attr)):
            return True
        if isinstance(part, ast.Name) and part.id in _NAMES:
            return True
        is_text = isinstance(part, ast.Constant) and isinstance(part.value, str) and part.value != documentation
        if is_text and part.value.split(":")[0] == "cuda":
            return True
    return False


def cuda_lines(source: str) -> set[int]:
    """First lines of the statements that say `cuda`, and of those in the branches that only a GPU takes."""
    found: set[int] = set()
    tree = ast.parse(source)
    flags = set(_flags(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.If | ast.While) and (asks_for_cuda(node.test) or flags & _names(node.test)):
            found.add(node.test.lineno)
            branch = node.orelse if _is_for_others(node.test) else node.body
            found |= {part.lineno for top in branch for part in ast.walk(top) if isinstance(part, ast.stmt)}
        elif isinstance(node, ast.stmt) and not hasattr(node, "body") and not _is_text(node) and asks_for_cuda(node):
            found.add(node.lineno)
    return found


def _flags(tree: ast.AST) -> Iterator[str]:
    """Names of what a comparison with "cuda" gave."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Compare) and asks_for_cuda(node.value):
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))


def _names(node: ast.AST) -> set[str]:
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}


def _is_for_others(test: ast.expr) -> bool:
    """The branch is taken where the device is no GPU."""
    if isinstance(test, ast.UnaryOp):
        return isinstance(test.op, ast.Not)
    return isinstance(test, ast.Compare) and any(isinstance(op, ast.NotEq) for op in test.ops)


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def unreached(report: Mapping[str, Any], package: Path = PACKAGE) -> Iterator[str]:
    """`place:line  code` for every such line that a coverage report (JSON) calls missing; no file of it is left out.

    A file that the report does not name was never imported: all its lines are missing.
    """
    missing = {Path(name).resolve(): set(file["missing_lines"]) for name, file in report["files"].items()}
    for path in sorted(package.rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        lines = cuda_lines(source)
        for line in sorted(lines & missing[path] if path in missing else lines):
            yield f"{path.relative_to(package).as_posix()}:{line}  {source.splitlines()[line - 1].strip()}"


def main(arguments: list[str] | None = None) -> int:
    """Print them; returns the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    if len(given) != 1 or not Path(given[0]).is_file():
        print("usage: python analysis/cuda_lines.py coverage.json", file=sys.stderr)
        return 2
    print("\n".join(unreached(json.loads(Path(given[0]).read_bytes()))) or "every line was reached")
    return 0


if __name__ == "__main__":
    sys.exit(main())
