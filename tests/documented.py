"""Code that the documentation shows, run by tests as it stands there."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def code_block(page: str, heading: str) -> str:
    """The first Python block of a page below a heading."""
    section = (ROOT / page).read_text(encoding="utf-8").split(f"\n{heading}\n", 1)[1]
    block = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert block is not None, f"{page} shows no Python below {heading}"
    return textwrap.dedent(block[1])


def run_block(page: str, heading: str) -> dict[str, Any]:
    """What that block defines, by name."""
    namespace: dict[str, Any] = {}
    exec(compile(code_block(page, heading), page, "exec"), namespace)
    return namespace
