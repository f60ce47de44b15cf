"""Which lines of ptsim run on a GPU only, or ask its driver, and which of them did no test reach?

    coverage json -o coverage.json && python analysis/cuda_lines.py coverage.json

The report is of a run of the tests marked gpu on a GPU; `gpu_campaign.py` makes one, and `tests.txt` has its answer.
A line counts that says `cuda` in its code or calls NVML, the library of NVIDIA's driver, and so does what only a GPU
gets to: the branches that a condition guards, and what comes after a branch that others leave by. A condition is a
comparison with "cuda" or "cpu", and every variable, attribute, function and property that one was given to.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ptsim

PACKAGE = Path(ptsim.__file__).resolve().parent
_ATTRIBUTES = {"cuda", "cudnn", "is_cuda", "CUDAGraph"}
_NAMES = {"cuda_event"}
_NVML = re.compile("nvml[A-Z]")  # functions of pynvml, such as nvmlInit; not its errors and constants
_QUESTIONS = {"is_cuda", "is_available"}
_LEAVE = (ast.Return, ast.Raise, ast.Continue, ast.Break)
_ROUNDS = 3  # one flag may be made of another that stands further below

# What a condition says where it is true, and where it is false: the device is a GPU, or is none; None says nothing.
Said = tuple[bool | None, bool | None]
_NOTHING: Said = (None, None)


def asks_for_cuda(node: ast.AST) -> bool:
    """Whether the code says `cuda`, as torch or the kind of a device, or calls NVML."""
    for part in ast.walk(node):
        if isinstance(part, ast.Attribute) and (part.attr in _ATTRIBUTES or _NVML.match(part.attr)):
            return True
        if isinstance(part, ast.Name) and part.id in _NAMES:
            return True
        if isinstance(part, ast.Constant) and isinstance(part.value, str) and part.value.split(":")[0] == "cuda":
            return True
    return False


def cuda_lines(source: str) -> set[int]:
    """First lines of the statements that say `cuda`, and of those that only a GPU gets to."""
    return set[int]().union(*lines_by_function(source).values())


def lines_by_function(source: str) -> dict[str, set[int]]:
    """The same by the function that they stand in: "function", "Class.method", "outer.inner"; "" for none."""
    tree = ast.parse(source)
    found: dict[str, set[int]] = {}
    _walk(tree.body, _flags(tree), "", (), False, found)
    return {name: lines for name, lines in found.items() if lines}


def _walk(
    body: Sequence[ast.stmt],
    flags: Mapping[str, Said],
    function: str,
    names: tuple[str, ...],
    on_gpu: bool,
    found: dict[str, set[int]],
) -> None:
    """Note the lines of these statements, of which all are a GPU's where `on_gpu`; `names` are those around them."""
    for statement in body:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            inner = (*names, statement.name)
            own = function if isinstance(statement, ast.ClassDef) else ".".join(inner)
            if on_gpu:
                found.setdefault(function, set()).add(statement.lineno)
            _walk(statement.body, flags, own, inner, on_gpu, found)
            continue
        if (on_gpu or _asks(statement, flags)) and not _is_text(statement):
            found.setdefault(function, set()).add(statement.lineno)
        told = _told(statement, flags)
        for name, block in _blocks(statement):
            _walk(block, flags, function, names, on_gpu or told.get(name, False), found)
        follows = isinstance(statement, ast.If) and (
            (_leaves(statement.body) and told["orelse"]) or (_leaves(statement.orelse) and told["body"])
        )
        if follows or any(told.get(name, False) for name, _ in _blocks(statement)):
            found.setdefault(function, set()).add(statement.lineno)
        on_gpu = on_gpu or follows  # what comes after a branch that is left came by the other one


def _told(statement: ast.stmt, flags: Mapping[str, Said]) -> dict[str, bool]:
    """Whether a GPU alone gets to the branches of an `if` or a `while`, by their field."""
    if not isinstance(statement, ast.If | ast.While):
        return {}
    when_true, when_false = _said_by_test(statement.test, flags)
    return {"body": when_true is True, "orelse": when_false is True}


def _blocks(statement: ast.stmt) -> Iterator[tuple[str, list[ast.stmt]]]:
    """The blocks of statements within a statement, by the name of their field."""
    for name, value in ast.iter_fields(statement):
        parts = value if isinstance(value, list) else []
        statements = [part for part in parts if isinstance(part, ast.stmt)]
        if statements:
            yield name, statements
        yield from ((name, part.body) for part in parts if isinstance(part, ast.ExceptHandler | ast.match_case))


def _leaves(body: Sequence[ast.stmt]) -> bool:
    """Nothing that follows comes after these statements."""
    return bool(body) and isinstance(body[-1], _LEAVE)


def _asks(statement: ast.stmt, flags: Mapping[str, Said]) -> bool:
    """Whether what the statement itself computes says `cuda`, or chooses by a flag."""
    for part in ast.iter_child_nodes(statement):
        if isinstance(part, ast.stmt | ast.ExceptHandler | ast.match_case):
            continue
        if asks_for_cuda(part):
            return True
        choices = [inner.test for inner in ast.walk(part) if isinstance(inner, ast.IfExp)]
        if any(_says(test, flags) != _NOTHING for test in choices):
            return True
    return False


def _said_by_test(test: ast.expr, flags: Mapping[str, Said]) -> Said:
    """As `_says`; a test that asks for CUDA in another way is a GPU's where it is true."""
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        when_true, when_false = _said_by_test(test.operand, flags)
        return when_false, when_true
    said = _says(test, flags)
    asked_otherwise = asks_for_cuda(test) and not any(isinstance(part, ast.Compare) for part in ast.walk(test))
    return (True, None) if said == _NOTHING and asked_otherwise else said


def _says(test: ast.expr, flags: Mapping[str, Said]) -> Said:
    """What a condition says of the device; nothing of what is no condition."""
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        when_true, when_false = _says(test.operand, flags)
        return when_false, when_true
    if isinstance(test, ast.BoolOp):
        trues, falses = zip(*(_says(value, flags) for value in test.values), strict=True)
        return (_one(trues), _all(falses)) if isinstance(test.op, ast.And) else (_all(trues), _one(falses))
    if isinstance(test, ast.NamedExpr):
        return _says(test.value, flags)
    if isinstance(test, ast.Compare):
        return _said_by_comparison(test)
    if isinstance(test, ast.Call):
        name = _name(test.func)
        if name in {"all", "any", "bool"} and len(test.args) == 1:
            inner = test.args[0]
            return _says(inner.elt if isinstance(inner, ast.GeneratorExp) else inner, flags)[0], None
        test = test.func
    name = _name(test)
    return (True, False) if name in _QUESTIONS and asks_for_cuda(test) else flags.get(name, _NOTHING)


def _said_by_comparison(test: ast.Compare) -> Said:
    """Of `device.type == "cuda"` and `!= "cpu"` both ways; of a membership, or a look for None, nothing."""
    sides = [test.left, *test.comparators]
    words = {side.value for side in sides if isinstance(side, ast.Constant) and isinstance(side.value, str)}
    same, other = isinstance(test.ops[0], ast.Eq), isinstance(test.ops[0], ast.NotEq)
    if len(sides) == 2 and (same or other) and words in ({"cuda"}, {"cpu"}):
        is_gpu = same == (words == {"cuda"})
        return is_gpu, not is_gpu
    vague = (ast.In, ast.NotIn, ast.Is, ast.IsNot)
    return (True, None) if asks_for_cuda(test) and not isinstance(test.ops[0], vague) else _NOTHING


def _one(said: Sequence[bool | None]) -> bool | None:
    """What is known where all of these hold."""
    return next((word for word in said if word is not None), None)


def _all(said: Sequence[bool | None]) -> bool | None:
    """What is known where one of these holds, nobody knows which."""
    return said[0] if len(set(said)) == 1 else None


def _name(node: ast.expr) -> str:
    """Of a variable, or the last one of an attribute; "" of anything else."""
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _flags(tree: ast.AST) -> dict[str, Said]:
    """What the names say that a condition was given to: variables, attributes, and functions that return one.

    A name counts in the whole file, as an argument keeps that of the variable, mostly.
    """
    flags: dict[str, Said] = {}
    for _ in range(_ROUNDS):
        for name, value in _given(tree):
            said = _says(value, flags)
            if name and said != _NOTHING:
                flags[name] = said
    return flags


def _given(tree: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    """Every name with what it is given."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    yield from ((_name(one), value) for one, value in zip(target.elts, node.value.elts, strict=False))
                else:
                    yield _name(target), node.value
        elif isinstance(node, ast.AnnAssign | ast.NamedExpr) and node.value is not None:
            yield _name(node.target), node.value
        elif isinstance(node, ast.FunctionDef):
            returns = [part for part in node.body if isinstance(part, ast.Return)]
            if len(returns) == 1 and returns[0].value is not None and not _branches(node):
                yield node.name, returns[0].value


def _branches(node: ast.FunctionDef) -> bool:
    return any(isinstance(part, ast.If | ast.For | ast.While | ast.Try) for part in node.body)


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
