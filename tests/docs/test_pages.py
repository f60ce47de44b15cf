import doctest
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from ptsim.answers import study
from ptsim.answers.study import configurations, read_study
from ptsim.cli.main import COMMANDS
from tests.traces import dense_trace, shrinking_trace

DOCS = Path(__file__).parents[2] / "docs"
PAGES = sorted(set(COMMANDS) - {"clusters"})  # clusters shares the page of devices


def make_help() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_help", DOCS / "make_help.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MAKE_HELP = make_help()


def words(text: str, *, refusal: bool) -> list[str]:
    """Words without frames and line breaks; of a refusal its sentence without the names that the catalog holds."""
    if refusal:
        text = text.split("\nhint:")[0].split("known:")[0]
    return re.sub(r"[│╭╮╰╯─`]", " ", text).split()


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_quotes_is_what_the_command_prints(page: str) -> None:
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    quotes = list(MAKE_HELP.QUOTE.finditer(text))
    assert quotes
    for match in quotes:
        command = match.group(2)
        refusal = not command.endswith("--help")
        body = match.group(0).split("```text\n", 1)[1].split("\n```", 1)[0].removeprefix(f"$ {command}\n")
        now = words(MAKE_HELP.quote(command), refusal=refusal)
        assert words(body, refusal=refusal) == now, "regenerate with: python docs/make_help.py"


def test_every_command_has_a_page() -> None:
    assert [page for page in PAGES if not (DOCS / f"{page}.md").is_file()] == []


@pytest.mark.slow
def test_the_examples_of_the_library_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = {"epochs": 4, "blocks": (1, 1, 1), "widths": (4, 8, 8)}
    dense_trace(tmp_path / "runs" / "dense" / "trace.jsonl", **tiny)
    shrinking_trace(tmp_path / "runs" / "pruned" / "trace.jsonl", **tiny)
    monkeypatch.chdir(tmp_path)
    results = doctest.testfile(str(DOCS / "library.md"), module_relative=False, optionflags=doctest.FAIL_FAST)
    assert results.attempted > 20
    assert results.failed == 0


def test_the_study_of_the_sweep_page_is_as_large_as_it_says_and_names_every_what_if(tmp_path: Path) -> None:
    page = (DOCS / "sweep.md").read_text(encoding="utf-8")
    for name in ("dense", "pruned", "weaker"):
        dense_trace(tmp_path / "runs" / name / "trace.jsonl", epochs=2, blocks=(1, 1, 1), widths=(4, 8, 8))
    (tmp_path / "study.toml").write_text(page.split("```toml\n")[1].split("```")[0], encoding="utf-8")
    stated = int(re.search(r"This one is (\d+) projections", page).group(1))
    assert len(list(configurations(read_study(tmp_path / "study.toml")))) == stated == 2 * 3 * 2 * (3 * 2 + 1)
    table = page.split("| what-if | changes |")[1].split("\n\n")[0]
    assert set(re.findall(r"`([a-z0-9-]+)(?:=[^`]*)?`", table)) == set(study._WHAT_IFS)
