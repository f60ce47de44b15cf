"""Does every figure that the README and the docs state stand in its source?

    python analysis/check_claims.py            # checks all claims of docs/claims.toml and the pages that quote them
    python analysis/check_claims.py --write    # also fills the tables of the pages that have some

A claim with a trace or a table (of a file or of a page) as its source is computed again from it, every number of its
value; of other pages the figures, with their units, and of tests the numbers must stand there; a claim without a source
cannot be checked here. Whether a goal for the saved time was met is decided by the numbers before they are rounded.
A paragraph or row of the README, of a page of docs or of traces/README.md that quotes a measured figure (a percentage,
seconds, …) must link its claim, and its numbers must stand in that claim. Pages that `[[page]]` lists say how their
figures were made. A script that a command names must exist. Tables between `<!-- table: NAME -->` and `<!-- end -->`
are made here.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import claims_layers
import claims_public
import claims_recorded
import claims_tables
import msgspec
from claims_words import Figures, left_over, misquoted, missing, numbers, quantities

from ptsim.textfile import read_toml, write_whole

ROOT = Path(__file__).resolve().parents[1]
CLAIMS = ROOT / "docs" / "claims.toml"
SCRIPT = re.compile(r"\banalysis/\w+\.py\b")
TABLE = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
FILLED = ("docs/accuracy.md", "docs/evidence.md", "traces/README.md")  # pages with such tables
STRICT = ("README.md", "docs/evidence.md")  # beside a link to a claim every number must stand in it
CHECKS: Mapping[str, Callable[[Path], Figures]] = claims_recorded.CHECKS | claims_layers.CHECKS | claims_public.CHECKS
REACHED = claims_recorded.REACHED | claims_layers.REACHED
_VERDICT = re.compile(r"saved time over saved (?:FLOPs|MACs) ([\d.]+) \((met|missed)\b")


class Claim(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One figure that README or docs state, with where it comes from; `docs/claims.toml` says what the fields are."""

    id: str
    area: str
    claim: str
    value: str
    goal: str = ""
    command: str
    machine: str
    date: str
    source: str = ""
    seen: str = ""


class Page(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A page whose figures are no claims: what they are, and how they were made."""

    page: str
    figures: str
    command: str
    machine: str
    date: str
    seen: str = ""


def read_pages(path: Path = CLAIMS) -> tuple[Page, ...]:
    """The pages that say of themselves where their figures come from."""
    return msgspec.convert(read_toml(path).get("page", []), tuple[Page, ...])


def read_claims(path: Path = CLAIMS) -> tuple[Claim, ...]:
    """All claims, in the order of the file.

    Raises:
        ValueError: two claims have one id.
    """
    claims = msgspec.convert(read_toml(path)["claim"], tuple[Claim, ...])
    ids = [claim.id for claim in claims]
    if len(set(ids)) < len(ids):
        raise ValueError(f"claims of one id: {sorted({name for name in ids if ids.count(name) > 1})}")
    return claims


def how_checked(claim: Claim) -> str:
    """How a reader, or this script, can check the claim without running its command again."""
    if claim.id in CHECKS:
        return "read from the tables of the page" if claim.source.endswith(".md") else "computed again from the source"
    if claim.source.endswith(".md"):
        return "its figures stand on the page"
    if claim.source.endswith(".py"):
        return "by the test itself, which names the number"
    return "only by its command: nothing was kept"


def wrong_claims(
    claims: tuple[Claim, ...], root: Path = ROOT, checks: Mapping[str, Callable[[Path], Figures]] = CHECKS
) -> Iterator[str]:
    """One sentence for every figure that its source does not bear out."""
    for claim in claims:
        for script in SCRIPT.findall(claim.command):
            if not (root / script).is_file():
                yield f"{claim.id}: its command names {script}, which is not there"
        if gone := [source for source in claim.source.split(", ") if source and not (root / source).exists()]:
            yield f"{claim.id}: there is no {gone[0]}"
        elif claim.id in checks:
            yield from wrong_figures(claim, checks[claim.id](root))
            if claim.id in REACHED:
                yield from wrong_verdict(claim, REACHED[claim.id](root))
        elif claim.source.endswith((".md", ".py")):
            text = (root / claim.source).read_text(encoding="utf-8")
            quoted = misquoted(claim.value, text) if claim.source.endswith(".md") else []
            for figure in dict.fromkeys(quoted + missing(claim.value, text)):
                yield f"{claim.id}: {figure} does not stand in {claim.source}"
        elif claim.source:
            yield f"{claim.id}: nothing computes it from {claim.source}"


def wrong_figures(claim: Claim, figures: Figures) -> Iterator[str]:
    """What was computed must stand in the claim, and its value may have no other number.

    A figure may also stand in the words around the value: what was measured, where, and what had been seen.
    """
    value, absent = left_over(claim.value, figures)
    for figure in left_over(f"{claim.claim}; {claim.machine}; {claim.seen}", absent)[1]:
        yield f"{claim.id}: {claim.source} says {figure!r}, the claim {claim.value!r}"
    for number in sorted(numbers(value)):
        yield f"{claim.id}: nothing computes {number} of {claim.value!r}"


def wrong_verdict(claim: Claim, reached: Sequence[float]) -> Iterator[str]:
    """Whether a goal for the saving was met; 0.86 is not 0.9, though a value has it so."""
    if told := _VERDICT.match(claim.goal):
        verdict = "met" if min(reached) >= float(told[1]) else "missed"
        if verdict != told[2]:
            numbers_ = ", ".join(f"{number:.3f}" for number in reached)
            yield f"{claim.id}: {claim.source} says {numbers_}, so that the goal is {verdict}: {claim.goal!r}"


def wrong_pages(claims: tuple[Claim, ...], pages: tuple[Page, ...], root: Path = ROOT) -> Iterator[str]:
    """One sentence for every figure of the README and of docs/ that neither a claim nor its page accounts for."""
    own = {page.page for page in pages}
    for page in pages:
        if not (root / page.page).is_file():
            yield f"{page.page} is listed and not there"
        for script in SCRIPT.findall(page.command):
            if not (root / script).is_file():
                yield f"{page.page}: its command names {script}, which is not there"
    paths = [root / "README.md", *sorted((root / "docs").glob("*.md")), root / "traces" / "README.md"]
    for path in paths:
        name = path.relative_to(root).as_posix()
        if path.is_file() and name not in own:
            text = TABLE.sub("", path.read_text(encoding="utf-8"))
            for problem in wrong_quotes(text, claims, only_quantities=name not in STRICT):
                yield f"{name}: {problem}"


def wrong_quotes(page: str, claims: tuple[Claim, ...], *, only_quantities: bool = False) -> Iterator[str]:
    """One sentence for every paragraph or row that quotes a measured figure without a claim, or a number not in it.

    Code and quoted text are no claims of ours, and "90 % interval" says what an interval is. A row of numbers, "62, 65
    and 65 %", must stand in the claim in this order. With `only_quantities` a paragraph may have other numbers beside
    the measured ones.
    """
    known = {claim.id: claim for claim in claims}
    text = re.sub(r"^```.*?^```", "", page, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"`[^`\n]*`|\"[^\"\n]*\"|90 %\s+intervals?", "", text)
    for block in re.split(r"\n\s*\n|\n(?=[|*-])", text):
        ids = re.findall(r"accuracy\.md#([\w-]+)", block)
        shown = re.sub(r"\]\([^)]*\)", "]", block)
        if not ids and not quantities(shown):
            continue
        if not ids:
            yield f"no claim is linked by: {' '.join(block.split())[:100]!r}"
        elif unknown := [name for name in ids if name not in known]:
            yield f"no claim is called {unknown[0]!r}"
        else:
            said = " ".join(f"{known[name].claim} {known[name].value}" for name in ids)
            wrong = misquoted(shown, said) + ([] if only_quantities else missing(shown, said))
            for figure in dict.fromkeys(wrong):
                yield f"{figure} stands in no claim that this links: {' '.join(block.split())[:100]!r}"


def accuracy_table(claims: tuple[Claim, ...]) -> str:
    """Claims by area: what was measured, and by which command."""
    text = ""
    for area in dict.fromkeys(claim.area for claim in claims):
        text += f"\n## {area}\n\n| claim | value | goal | command | machine | date |\n|---|---|---|---|---|---|\n"
        for c in claims:
            if c.area == area:
                anchor = f'<a id="{c.id}"></a>{c.claim}'
                text += f"| {anchor} | {c.value} | {c.goal or '–'} | `{c.command}` | {c.machine} | {c.date} |\n"
    return text


def evidence_table(claims: tuple[Claim, ...]) -> str:
    """Claims with their sources, and the pages whose figures are none."""
    text = "\n| claim | value | source | command | machine | date | how it is checked | seen before it was fixed |\n"
    text += "|---|---|---|---|---|---|---|---|\n"
    for c in claims:
        source = f"`{c.source}`" if c.source else "–"
        made = f"`{c.command}` | {c.machine} | {c.date} | {how_checked(c)} | {c.seen or 'nothing'}"
        text += f"| [{c.id}](accuracy.md#{c.id}) | {c.value} | {source} | {made} |\n"
    text += (
        "\n| page | its figures | command | machine | date | seen before they were fixed |\n|---|---|---|---|---|---|\n"
    )
    for p in read_pages():
        text += f"| `{p.page}` | {p.figures} | `{p.command}` | {p.machine} | {p.date} | {p.seen or 'nothing'} |\n"
    return text


def tables(claims: tuple[Claim, ...]) -> dict[str, Callable[[], str]]:
    """What makes each table of the pages."""
    return {
        "accuracy": partial(accuracy_table, claims),
        "evidence": partial(evidence_table, claims),
        **{name: partial(make, ROOT) for name, make in claims_tables.TABLES.items()},
    }


def filled(page: str, makers: Mapping[str, Callable[[], str]]) -> str:
    """The page with its tables made anew."""
    return TABLE.sub(lambda m: f"{m.group(1)}\n{makers[m.group(2)]().strip()}\n\n{m.group(3)}", page)


def main(argv: list[str] | None = None) -> int:
    """Check, and with --write fill the pages; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"fill the tables of {', '.join(FILLED)}")
    arguments = parser.parse_args(argv)
    claims = read_claims()
    makers = tables(claims)
    wrong = [*wrong_claims(claims), *wrong_pages(claims, read_pages())]
    for name in FILLED:
        page = (ROOT / name).read_text(encoding="utf-8")
        new = filled(page, makers)
        if arguments.write:
            write_whole(ROOT / name, new)
        elif new != page:
            wrong.append(f"{name} is not what its sources say: python analysis/check_claims.py --write")
    print("\n".join(wrong) if wrong else f"{len(claims)} claims agree with their sources")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
