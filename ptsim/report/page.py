"""How tables and figures become one self-contained HTML page: nothing on it is fetched from anywhere."""

from __future__ import annotations

import functools
import importlib.resources
import io
import re
from collections.abc import Sequence
from pathlib import Path

import jinja2
import matplotlib as mpl
import msgspec
from markupsafe import Markup
from matplotlib.figure import Figure

import ptsim
from ptsim.errors import UsageError
from ptsim.report.answer import Answer
from ptsim.report.tables import Table
from ptsim.textfile import write_whole

PAGE = "index.html"


class ShownFigure(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """A figure with what it says, in words."""

    name: str
    title: str
    caption: str
    figure: Figure

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


def render(*, title: str, byline: str, answer: Answer, sections: Sequence[Section], num_traces: int) -> str:
    """The whole page as HTML."""
    templates = importlib.resources.files("ptsim.report") / "templates"
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: (templates / name).read_text(encoding="utf-8")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=False,
    )
    return environment.get_template("report.html.j2").render(
        title=title,
        byline=byline,
        answer=answer,
        sections=[section for section in sections if not section.empty],
        num_traces=num_traces,
        version=ptsim.__version__,
        css=Markup((templates / "report.css").read_text(encoding="utf-8")),
        script=Markup((templates / "table.js").read_text(encoding="utf-8")),
    )


def write(html: str, sections: Sequence[Section], out: Path) -> Path:
    """Write the page, its figures (`figures/*.svg`) and its tables (`tables/*.csv`) into the folder `out`.

    A report that is already there is replaced; anything else in the folder is left alone.

    Raises:
        UsageError: `out` is a file, or cannot be written.
    """
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file; expected a folder for the report")
    try:
        for folder, ending in (("figures", ".svg"), ("tables", ".csv")):
            for old in (out / folder).glob(f"*{ending}"):
                old.unlink()
            (out / folder).mkdir(parents=True, exist_ok=True)
        for section in sections:
            for shown in section.figures:
                (out / "figures" / f"{shown.name}.svg").write_text(shown.document, encoding="utf-8")
            for table in section.tables:
                table.frame.to_csv(out / "tables" / f"{table.name}.csv", index=False)
        page = out / PAGE
        write_whole(page, html)
    except OSError as error:
        raise UsageError(f"the report cannot be written to {out}: {error.strerror}") from error
    return page


def svg_text(figure: Figure, name: str) -> str:
    """The figure as an SVG document; equal figures give equal bytes."""
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name, "svg.fonttype": "path"}):
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
