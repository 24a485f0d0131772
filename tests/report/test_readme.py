"""What the README says is what the code says."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from laconic.formats.schemes import PRESETS
from laconic.formats.support import SUPPORT, engine_table
from laconic.methods import METHODS
from laconic.report.catalogue import support_matrix

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize(
    ("page", "marker", "table"),
    [("README.md", "matrix", support_matrix), ("docs/formats.md", "engines", engine_table)],
    ids=["README.md", "docs/formats.md"],
)
def test_tables_of_schemes_are_the_codes_own(page: str, marker: str, table: Callable[[], str]) -> None:
    shown = re.search(rf"<!-- {marker} -->\n(.*?)\n<!-- /{marker} -->", (ROOT / page).read_text(), re.S)
    assert shown
    assert shown[1].strip() == table(), "run: python scripts/refresh_readme.py"


def test_every_preset_has_a_row_of_evidence() -> None:
    assert list(SUPPORT) == list(PRESETS)


def test_every_method_has_a_page_that_names_its_options() -> None:
    for method in METHODS:
        name = method.model_fields["method"].default
        page = (ROOT / "docs" / "methods" / f"{name}.md").read_text()
        if method.scope == "cache":
            page += (ROOT / "docs" / "kv_cache.md").read_text().replace("rotation: hadamard", "rotation")
        own = set(method.model_fields) - {"method"}
        assert all(f"`{option}`" in page or option in _shared() for option in own), f"docs/methods/{name}.md"


def test_links_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *ROOT.glob("docs/**/*.md"), ROOT / "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_tree_is_the_codes_own() -> None:
    shown = re.search(r"src/laconic/\n(.*?)\nbenchmarks/", README, re.S)
    assert shown
    named = {name.strip(" /") for name in re.findall(r"^  \w+/|\w+\.py", shown[1], re.M)}
    assert named == {
        f.name for f in (ROOT / "src" / "laconic").iterdir() if f.name[:2] != "__" and f.suffix != ".typed"
    }


def _shared() -> set[str]:
    """Options of every quantizing stage, described once in rtn's page and formats."""
    return {
        "scheme",
        "group_size",
        "symmetric",
        "strategy",
        "dynamic",
        "outlier_ratio",
        "low_rank",
        "rotate_inputs",
        "targets",
        "ignore",
    }
