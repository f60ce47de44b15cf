"""How tables and figures become one self-contained HTML page: nothing on it is fetched from anywhere."""

from __future__ import annotations

import functools
import importlib.resources
import io
import re
import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2
import matplotlib as mpl
import msgspec
import pandas as pd
from markupsafe import Markup
from matplotlib.figure import Figure

import ptsim
from ptsim.errors import UsageError
from ptsim.report.answer import Answer
from ptsim.report.tables import Table
from ptsim.textfile import ACTING, write_whole
from ptsim.units import together

PAGE = "index.html"
_MARK = '<meta name="generator" content="ptsim '


class ShownFigure(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """A figure with what it says, in words, and the table that it draws."""

    name: str
    title: str
    caption: str
    figure: Figure
    frame: pd.DataFrame

    @functools.cached_property
    def document(self) -> str:
        """The figure as an SVG document; drawn once, for the page and for its own file."""
        return svg_text(self.figure, self.name)

    @property
    def svg(self) -> Markup:
        """The figure as an inline SVG element with a text alternative."""
        return Markup(inline_svg(self.document, self.name, f"{self.title} {self.caption}"))


class Section(msgspec.Struct, frozen=True, kw_only=True):
    """A part of the page; its paragraphs, figures, tables and (term, text) facts come in that order."""

    name: str
    title: str
    paragraphs: tuple[str, ...] = ()
    figures: tuple[ShownFigure, ...] = ()
    tables: tuple[Table, ...] = ()
    facts: tuple[tuple[str, str], ...] = ()

    @property
    def empty(self) -> bool:
        """There is nothing to show."""
        return not (self.paragraphs or self.figures or self.tables or self.facts)


def render(
    *, title: str, byline: str, answer: Answer, sections: Sequence[Section], num_traces: int, planned: bool = False
) -> str:
    """The whole page as HTML; `planned` marks it as about runs that nobody has trained."""
    templates = importlib.resources.files("ptsim.report") / "templates"
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: (templates / name).read_text(encoding="utf-8")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_shown,
        trim_blocks=False,
    )
    return environment.get_template("report.html.j2").render(
        title=title,
        byline=byline,
        answer=answer,
        sections=[section for section in sections if not section.empty],
        num_traces=num_traces,
        planned=planned,
        version=ptsim.__version__,
        css=Markup((templates / "report.css").read_text(encoding="utf-8")),
        script=Markup((templates / "table.js").read_text(encoding="utf-8")),
    )


def write(
    html: str, sections: Sequence[Section], out: Path, *, tables: Mapping[str, pd.DataFrame] | None = None
) -> Path:
    """Write the page, its figures with what they draw (`figures/`), and its tables (`tables/`) into the folder `out`.

    A report that is already there is replaced, file by file, each whole or not at all, the page last; anything else in
    the folder is left alone, in figures/ and tables/ too. `tables` are written beside those of the sections.

    Raises:
        UsageError: `out` is a file, cannot be written, or has a page that is no report.
    """
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file; expected a folder for the report")
    earlier = _files_of_report(out / PAGE)
    files = {f"figures/{shown.name}.svg": shown.document for section in sections for shown in section.figures}
    files |= {f"figures/{shown.name}.csv": csv_text(shown.frame) for section in sections for shown in section.figures}
    shown_tables = {table.name: table.frame for section in sections for table in section.tables}
    for name, frame in {**shown_tables, **(tables or {})}.items():
        files[f"tables/{name}.csv"] = csv_text(frame)
    try:
        for folder in ("figures", "tables"):
            (out / folder).mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            write_whole(out / name, content)
        write_whole(out / PAGE, html)
        for name in earlier - files.keys():
            (out / name).unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(f"the report cannot be written to {out}: {error.strerror}") from error
    return out / PAGE


def _files_of_report(page: Path) -> set[str]:
    """The figures and tables that the report of this page wrote beside it; none where there is no page.

    Raises:
        UsageError: the page is not of a report.
    """
    if not page.is_file():
        return set()
    text = page.read_text(encoding="utf-8", errors="replace")
    if _MARK not in text.partition("<style>")[0]:
        raise UsageError(f"{page} is no report of ptsim, and is not written over", hint="choose another folder")
    files = set()
    for kind, name in re.findall(r'id="(figure|table)-([^"/]+)"', text):
        files |= {f"tables/{name}.csv"} if kind == "table" else {f"figures/{name}.svg", f"figures/{name}.csv"}
    return files


def harmless(value: object) -> object:
    """What goes into the page, without characters that act: escapes, and marks that turn the direction of writing."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return "".join(REPLACED if unicodedata.category(c) in ACTING and c != SOFT_HYPHEN else c for c in value)


def _shown(value: object) -> object:
    """As `harmless`, and no line ends between a number and its unit."""
    plain = harmless(value)
    return together(plain) if isinstance(plain, str) and not isinstance(plain, Markup) else plain


REPLACED, SOFT_HYPHEN = "\N{REPLACEMENT CHARACTER}", "\N{SOFT HYPHEN}"


def csv_text(frame: pd.DataFrame) -> str:
    """The table as CSV that a spreadsheet takes for what it is.

    A text that a spreadsheet would run as a formula (it begins with = + - @, or with white space) gets an apostrophe in
    front; numbers stay numbers.

    Source: OWASP, "CSV Injection".
    """

    def safe(cell: object) -> object:
        return f"'{cell}" if isinstance(cell, str) and cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n")) else cell

    texts = [name for name in frame if not pd.api.types.is_numeric_dtype(frame[name])]
    csv: str = frame.assign(**{str(name): frame[name].map(safe) for name in texts}).to_csv(index=False)
    return csv


def svg_text(figure: Figure, name: str) -> str:
    """The figure as an SVG document; equal figures give equal bytes."""
    buffer = io.StringIO()
    plain = mpl.rc_context({"svg.hashsalt": name, "svg.fonttype": "path", "text.parse_math": False})
    with plain, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a name in letters that DejaVu lacks: boxes
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return buffer.getvalue()


def inline_svg(document: str, name: str, description: str) -> str:
    """An SVG document as an HTML element: no prolog, no size of its own, and a label for those who cannot see it."""
    text = document[document.index("<svg") :].strip()
    head, body = text.split(">", 1)
    head = re.sub(r'\s(?:width|height|version|xmlns(?::\w+)?)="[^"]*"', "", head)
    # Ids of different figures must not meet on one page; everything that has an id is referred to as #id.
    body = re.sub(r'(?<=\bid=")(?=[^"])|(?<=href="#)|(?<=url\(#)', f"{name}-", body)
    label = Markup.escape(description)
    return f'{head} role="img" aria-label="{label}">{body}'
