"""The running interpreter's standard library as text: something to train, calibrate and evaluate on everywhere.

    python scripts/stdlib_text.py {train,heldout} OUT.txt [--max-bytes N]

The held-out modules are chosen by name, and their tests are left out of training with them.
"""

from __future__ import annotations

import argparse
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

HELDOUT = (
    "argparse",
    "calendar",
    "configparser",
    "difflib",
    "fractions",
    "heapq",
    "mailbox",
    "sched",
    "shelve",
    "statistics",
    "tarfile",
    "textwrap",
)
SKIPPED = {"site-packages", "__pycache__", "lib2to3", "idlelib", "pydoc_data", "encodings", "unicodedata_db"}


def stdlib() -> Path:
    """Where the running interpreter keeps its standard library."""
    return Path(sysconfig.get_path("stdlib"))


def is_heldout(file: Path) -> bool:
    """Whether a file is a held-out module, part of a held-out package, or a test of one."""
    parts = (*file.parent.parts, file.stem)
    return any(p == name or p.startswith(f"test_{name}") for p in parts for name in HELDOUT)


def files(split: str) -> Iterator[Path]:
    """Source files of a split, relative to the library: training in a seeded shuffle, held out in order."""
    root = stdlib()
    found = sorted(f.relative_to(root) for f in root.rglob("*.py") if not SKIPPED & set(f.relative_to(root).parts))
    if split == "heldout":
        # The modules themselves, not their tests, which are long lists of data.
        yield from (f for f in found if is_heldout(f) and not any(p.startswith("test") for p in f.parts))
        return
    train = [f for f in found if not is_heldout(f)]
    random.Random(0).shuffle(train)
    yield from train


def documents(split: str) -> Iterator[str]:
    """The text of each file that is UTF-8, not empty, and not one enormous table."""
    for file in files(split):
        try:
            text = (stdlib() / file).read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if text.strip() and len(text) < 400_000:
            yield text


def main() -> None:
    """Write a split to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("split", choices=("train", "heldout"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--max-bytes", type=int, default=None)
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    written = 0
    with args.out.open("w", encoding="utf-8") as out:
        for text in documents(args.split):
            out.write(text.rstrip() + "\n\n\n")
            written += len(text.encode())
            if args.max_bytes and written >= args.max_bytes:
                break
    print(f"{args.out}: {written / 1e6:.2f} MB of {args.split} text")


if __name__ == "__main__":
    main()
