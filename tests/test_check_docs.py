"""The lint of the documentation finds what it is for, and finds nothing in what is right."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import check_docs

LAYERS = (
    '[tool.importlinter]\n[[tool.importlinter.contracts]]\nlayers = ["laconic.walk", "laconic.kv | laconic.data"]\n'
)
RIGHT = """# Title of it

`walk/flow.py` and `src/laconic/walk` hold `embed_tokens`; see [below](#a-second-one), [there](other.md#its-words).
[a line that is one link](https://example.org/{long})

## A *second* one

| a table may be wide | {long} |
|---|---|

```
python scripts/tool.py {long}
```
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for file, content in {
        "src/laconic/walk/flow.py": "def embed_tokens(): ...",
        "tests/test_flow.py": "",
        "scripts/tool.py": "",
        "docs/other.md": "## Its words",
        "pyproject.toml": LAYERS,
        "Makefile": "",
    }.items():
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return tmp_path


def problems_of(text: str, root: Path) -> list[str]:
    page = root / "docs" / "architecture.md"
    page.write_text(text)
    check_docs.anchors.cache_clear()
    check_docs.code_words.cache_clear()
    return [problem.partition(": ")[2] for problem in check_docs.check_page(page, root)]


def test_a_page_that_is_right_has_no_problems(root: Path) -> None:
    assert problems_of(RIGHT.format(long="x" * 200), root) == []


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("word " * 30, "150 columns; wrap prose at 120"),
        ("[there](missing.md)", "link to missing.md: no such file"),
        ("[there](other.md#missing)", "link to other.md#missing: no such heading"),
        ("[below](#missing)", "link to #missing: no such heading"),
        ("`walk/missing.py`", "walk/missing.py: no such file"),
        ("`docs/missing.md`", "docs/missing.md: no such file"),
        ("```\npython scripts/missing.py\n```", "scripts/missing.py: no such file"),
        ("`embed_missing`", "`embed_missing`: the code has no embed_missing"),
    ],
)
def test_what_is_wrong_is_named(line: str, problem: str, root: Path) -> None:
    assert problems_of(f"# Title\n\n{line}\n", root) == [problem]


@pytest.mark.parametrize(
    ("shown", "detail"),
    [
        ("walk          one\nkv | data     two", None),
        ("walk          one", "it lacks kv | data"),
        ("kv | data     two\nwalk          one", "it has others, or another order"),
    ],
)
def test_layers_are_those_of_import_linter(shown: str, detail: str | None, root: Path) -> None:
    (root / "docs" / "architecture.md").write_text(f"# Title\n\n## Layers\n\n```\n{shown}\n```\n")
    problems = list(check_docs.check_layers(root))
    assert [p.partition("(")[2].rstrip(")") for p in problems] == ([detail] if detail else [])
