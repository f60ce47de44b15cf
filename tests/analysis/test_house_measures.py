"""The measures of the source, on a package whose sizes are counted by hand."""

from __future__ import annotations

from textwrap import indent

import pytest

from tests.analysis.test_allreduce_scripts import ANALYSIS, load

SHARED = "\n".join(f"    {name} = work({name})" for name in "abcdefg")
CODE = {
    "ptsim/one.py": (
        f"class Box:\n    def __init__(self, a, b, *, c):\n{indent(SHARED, '    ')}\n\n"
        "    def _hidden(self, a, b, c, d): ...\n\n\n"
        'TABLE = Registry("shape", own={"round": "ptsim.two:Round", "step": "ptsim.two:Step"})\n'
    ),
    "ptsim/two.py": f'"""Two."""\n\n\ndef long(x):\n{SHARED}\n    # nothing\n\n    return "step"\n',
    "ptsim/cli/three.py": "def command(a, b, c, d, e, f, g, h, i, j, k): ...\n",
    "README.md": "five words and two more\n",
}


def test_sizes_are_those_that_one_counts_by_hand() -> None:
    found = load("house_measures").measures(CODE)
    assert found["lines of ptsim"] == str(14 + 14 + 1)
    assert found["longest module"] == "14 one.py"
    assert found["longest function"] == "11 two.py:long"
    assert found["widest call"] == "3 one.py:Box.__init__"
    assert found["widest command"] == "11 cli/three.py:command"
    assert found["commands of more than 10 parameters"] == "1"
    assert found["repeated blocks of 6 lines and more"] == "1"
    assert found["words of README"] == "5"
    assert found["modules that name a row: shape"] == "1 round"


@pytest.mark.skipif(not (ANALYSIS.parent / ".git").exists(), reason="the source is not a git checkout")
def test_a_revision_is_read_from_git() -> None:
    measures = load("house_measures")
    assert "ptsim/registry.py" in measures.revision("HEAD")
