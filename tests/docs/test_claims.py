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
