"""How large and how tangled ptsim's own code is, for one or several revisions side by side.

`python analysis/house_measures.py [REVISION…] [--markdown]`; without a revision it measures the files of the working
tree. The figures come from the source text alone (nothing of ptsim is imported), so that any old revision can be
measured. `docs/house.md` has such a table.

* A *call* is a function, method or constructor whose name and class have no leading underscore. Its width is the number
  of its parameters without `self`. Commands (`ptsim/cli`) are counted apart: their parameters are options.
* A *repeated block* is a run of six or more lines that stands twice in ptsim to the letter. Blank lines, comments,
  imports and lines without a letter do not count.
* A *row* is an entry of a `ptsim.registry.Registry`. Counted are the modules that contain its name as a string, for the
  row of each registry that fewest name: the others' names are also words with other meanings, as "step" and "epochs".
"""

from __future__ import annotations

import argparse
import ast
import io
import subprocess
import sys
import tarfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LONG_FUNCTION, LONG_MODULE, WIDE_CALL, BLOCK = 60, 500, 10, 6  # lines, lines, parameters, lines

Function = ast.FunctionDef | ast.AsyncFunctionDef


def main(argv: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("revisions", nargs="*", metavar="REVISION", help="of git; default: the working tree")
    parser.add_argument("--markdown", action="store_true", help="print a table for a page")
    arguments = parser.parse_args(argv)
    names: list[str] = arguments.revisions or ["working tree"]
    columns = [measures(working_tree() if name == "working tree" else revision(name)) for name in names]
    rows = list(dict.fromkeys(label for column in columns for label in column))
    table = [["", *names], *([label, *(column.get(label, "–") for column in columns)] for label in rows)]
    if arguments.markdown:
        print("\n".join(f"| {' | '.join(row)} |" for row in (table[0], ["---"] * len(table[0]), *table[1:])))
        return 0
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


def working_tree() -> dict[str, str]:
    """Text of ptsim's modules and of the README by path, as git tracks them or would."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", "ptsim", "README.md"]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    return {
        name: (ROOT / name).read_text(encoding="utf-8")
        for name in names
        if name.endswith((".py", ".md")) and (ROOT / name).is_file()
    }


def revision(name: str) -> dict[str, str]:
    """The same of a revision."""
    packed = subprocess.run(
        ["git", "archive", name, "ptsim", "README.md"], cwd=ROOT, check=True, capture_output=True
    ).stdout
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        return {
            member.name: file.read().decode()
            for member in archive
            if member.name.endswith((".py", ".md")) and (file := archive.extractfile(member)) is not None
        }


def measures(files: Mapping[str, str]) -> dict[str, str]:
    """What is measured → its value, in the order of the table."""
    code = {name: text for name, text in files.items() if name.endswith(".py")}
    trees = {name: ast.parse(text) for name, text in code.items()}
    lines = {name: len(text.splitlines()) for name, text in code.items()}
    functions = {f"{name}:{title}": found for name, tree in trees.items() for title, found in _functions(tree)}
    long = {place: (node.end_lineno or 0) - node.lineno + 1 for place, node in functions.items()}
    wide = {place: _width(node) for place, node in functions.items() if _is_public(place)}
    commands = {place: width for place, width in wide.items() if place.startswith("ptsim/cli/")}
    calls = {place: width for place, width in wide.items() if place not in commands}
    found = {
        "lines of ptsim": f"{sum(lines.values()):,}",
        "modules": str(len(code)),
        "longest module": _largest(lines),
        f"modules above {LONG_MODULE} lines": _above(lines, LONG_MODULE),
        "longest function": _largest(long),
        f"functions above {LONG_FUNCTION} lines": _above(long, LONG_FUNCTION),
        "widest call": _largest(calls),
        f"calls of more than {WIDE_CALL} parameters": _above(calls, WIDE_CALL),
        "widest command": _largest(commands),
        f"commands of more than {WIDE_CALL} parameters": _above(commands, WIDE_CALL),
        f"repeated blocks of {BLOCK} lines and more": str(repeated_blocks(code)),
        "words of README": f"{len(files.get('README.md', '').split()):,}",
    }
    words = [{node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)} for tree in trees.values()]
    for registry, rows in _registries(trees).items():
        counts = {row: sum(row in known for known in words) for row in rows}
        if counts:
            row = min(counts, key=lambda row: counts[row])
            found[f"modules that name a row: {registry}"] = f"{counts[row]} {row}"
    return found


def repeated_blocks(code: Mapping[str, str]) -> int:
    """Pairs of places that share six or more lines; a longer shared run is one pair."""
    places: dict[tuple[str, ...], list[tuple[str, int]]] = defaultdict(list)
    for name, text in code.items():
        kept = [
            line
            for line in map(str.strip, text.splitlines())
            if any(c.isalpha() for c in line) and not line.startswith(("#", "import ", "from "))
        ]
        for start in range(len(kept) - BLOCK + 1):
            places[tuple(kept[start : start + BLOCK])].append((name, start))
    shared = {
        (first, second)
        for found in places.values()
        for index, first in enumerate(found)
        for second in found[index + 1 :]
    }
    # a run of seven lines is two windows of six: only the first of them has no pair just before it
    return sum(((a, i - 1), (b, j - 1)) not in shared for (a, i), (b, j) in shared)


def _functions(tree: ast.Module) -> Iterator[tuple[str, Function]]:
    """Every function with its title; a method's has its class before it, a function inside another one a `<`."""
    waiting: list[tuple[str, ast.AST]] = [("", tree)]
    while waiting:
        prefix, node = waiting.pop()
        for child in ast.iter_child_nodes(node):
            if isinstance(child, Function):
                yield f"{prefix}{child.name}", child
                waiting.append((f"{prefix}{child.name}.<", child))
            elif isinstance(child, ast.ClassDef):
                waiting.append((f"{prefix}{child.name}.", child))
            else:
                waiting.append((prefix, child))


def _is_public(place: str) -> bool:
    path, _, title = place.partition(":")
    parts = [*path.removesuffix(".py").replace("__", "").split("/"), *title.replace("__init__", "init").split(".")]
    return not any(part.startswith(("_", "<")) for part in parts)


def _width(node: Function) -> int:
    arguments = node.args
    names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return len(names) - (names[:1] in (["self"], ["cls"]))


def _registries(trees: Mapping[str, ast.Module]) -> dict[str, list[str]]:
    """What a registry holds → the names of its own rows, for every `Registry("…", own=…)` of the package."""
    found: dict[str, list[str]] = {}
    for tree in trees.values():
        tables = {
            target.id: node.value
            for node in tree.body
            if isinstance(node, ast.Assign | ast.AnnAssign)
            for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
            if isinstance(target, ast.Name)
        }
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Registry"):
                continue
            own: ast.expr | None = next((k.value for k in node.keywords if k.arg == "own"), None)
            named = [n.id for n in ast.walk(own) if isinstance(n, ast.Name) and n.id in tables] if own else []
            own = tables[named[0]] if named and not isinstance(own, ast.Dict) else own  # a table, or made of one
            if isinstance(own, ast.Dict) and isinstance(what := node.args[0], ast.Constant):
                found[str(what.value)] = [str(key.value) for key in own.keys if isinstance(key, ast.Constant)]
    return found


def _largest(sizes: Mapping[str, int]) -> str:
    place = max(sizes, key=lambda name: sizes[name], default="")
    return f"{sizes[place]} {place.removeprefix('ptsim/')}" if place else "–"


def _above(sizes: Mapping[str, int], bound: int) -> str:
    return str(sum(size > bound for size in sizes.values()))


if __name__ == "__main__":
    sys.exit(main())
