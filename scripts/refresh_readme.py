"""Write the support matrix into the README, from the code.

python scripts/refresh_readme.py
"""

from __future__ import annotations

import re
from pathlib import Path

from laconic.report.catalogue import support_matrix

README = Path(__file__).parents[1] / "README.md"


def main() -> None:
    """Replace what stands between the matrix markers."""
    text = README.read_text()
    made = re.sub(
        r"(<!-- matrix -->\n).*?(<!-- /matrix -->)", lambda m: f"{m[1]}{support_matrix()}\n{m[2]}", text, flags=re.S
    )
    README.write_text(made)


if __name__ == "__main__":
    main()
