import importlib
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "analysis"))
    return importlib.import_module("check_claims")


def claim(script: ModuleType, **fields: str) -> object:
    common = {"id": "one", "area": "a", "claim": "two networks", "command": "make test", "machine": "any", "date": "–"}
    return script.Claim(**common | fields)


def test_every_figure_of_the_readme_and_of_the_docs_stands_in_its_source(
    script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    status = script.main([])
    assert status == 0, capsys.readouterr().out


def test_a_changed_figure_is_found(script: ModuleType) -> None:
    claims = script.read_claims()
    right = next(c for c in claims if c.id == "fits")
    changed = claim(script, id="fits", value=right.value.replace("80 are", "81 are"), source=right.source)
    assert [sentence.split(":")[0] for sentence in script.wrong_claims((changed,))] == ["fits"]


def test_a_number_that_its_page_does_not_have_is_found(script: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("the error is 2.5 %", encoding="utf-8")
    good, bad = (claim(script, value=value, source="page.md") for value in ("2.5 %", "2.4 %"))
    assert list(script.wrong_claims((good,), tmp_path)) == []
    assert list(script.wrong_claims((bad,), tmp_path)) == ["one: 2.4 does not stand in page.md"]


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("| [how far?](docs/accuracy.md#one) | 3 % of two networks |", False),
        ("| [how far?](docs/accuracy.md#one) | 4 % |", True),
        ("| [how far?](docs/accuracy.md#two) | 3 % |", True),
        ("It is 3 % faster.", True),
        ("Python 3.11 is needed.", False),
        ("```\n50 %\n```", False),
    ],
)
def test_a_percentage_in_the_readme_needs_a_claim_that_holds_it(script: ModuleType, line: str, wrong: bool) -> None:
    assert bool(list(script.wrong_quotes(line, (claim(script, value="3 %"),)))) == wrong


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("It takes 12 s.", True),
        ("A run of 1.5 h and 0.9 kWh.", True),
        ("It is 1.2 times as fast.", True),
        ('Twice as fast on 8 A100s, with `--memory 40 GiB` or "8 GiB".', False),
        ("Every answer has a 90 %\ninterval.", False),
        ("It takes [3 %](accuracy.md#one), on 7 networks.", False),
        ("It takes [4 %](accuracy.md#one).", True),
    ],
)
def test_a_measured_figure_on_a_page_needs_a_claim_that_holds_it(script: ModuleType, line: str, wrong: bool) -> None:
    found = list(script.wrong_quotes(line, (claim(script, value="3 %"),), only_quantities=True))
    assert bool(found) == wrong


def test_a_new_page_needs_claims_or_a_line_that_says_where_its_figures_come_from(
    script: ModuleType, tmp_path: Path
) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("nothing", encoding="utf-8")
    (tmp_path / "docs" / "new.md").write_text("It takes 12 s.", encoding="utf-8")
    common = {"figures": "times", "machine": "any", "date": "–"}
    page = script.Page(page="docs/new.md", command="ptsim cost", **common)
    gone = script.Page(page="docs/old.md", command="python analysis/none.py", **common)
    assert [text.split(":")[0] for text in script.wrong_pages((), (), tmp_path)] == ["docs/new.md"]
    assert list(script.wrong_pages((), (page,), tmp_path)) == []
    assert len(list(script.wrong_pages((), (page, gone), tmp_path))) == 2


def test_a_command_of_a_script_that_is_gone_is_found(script: ModuleType) -> None:
    old = claim(script, value="3 %", command="python analysis/gone.py --all")
    assert list(script.wrong_claims((old,))) == ["one: its command names analysis/gone.py, which is not there"]
