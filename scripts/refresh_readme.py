"""Write the tables of schemes and engines into the README and docs/formats.md, from the code.

python scripts/refresh_readme.py
"""

from __future__ import annotations

import re
from pathlib import Path

from laconic.formats.support import engine_table
from laconic.report.catalogue import support_matrix

ROOT = Path(__file__).parents[1]


def main() -> None:
    """Replace what stands between the markers."""
    for page, marker, table in (
        ("README.md", "matrix", support_matrix()),
        ("docs/formats.md", "engines", engine_table()),
    ):
        text = (ROOT / page).read_text()
        between = re.compile(rf"(<!-- {marker} -->\n).*?(<!-- /{marker} -->)", re.DOTALL)
        (ROOT / page).write_text(between.sub(lambda m, table=table: f"{m[1]}{table}\n{m[2]}", text))


if __name__ == "__main__":
    main()
