"""Check the project's Markdown pages: width of lines, links, paths of files, names of code, and the list of layers.

    python scripts/check_docs.py

Prose is at most 120 columns wide; tables, code blocks and lines that are one link are exempt. Pages under docs/results/
are generated, and not checked.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WIDTH = 120
TOP = "(?:src|docs|tests|scripts|benchmarks|studies|models)"
# A path from the root of the repository, or of a module from the root of the package.
PATH = re.compile(rf"(?<![\w./-]){TOP}/[\w./*-]*[\w*/]|(?<![\w./-])[a-z]\w*(?:/\w+)+\.py\b")
LINK = re.compile(r"\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^)\s]+)\)")
# Pages that describe code: every name in backticks is a name of the code.
NAMING = ("docs/architecture.md", "docs/architecture/", "docs/concepts.md")
NAME = re.compile(r"[A-Za-z_][\w.]*(?:\(\))?")


def pages(root: Path = ROOT) -> list[Path]:
    """Every page but the generated ones and those of environments and build folders."""
    folders = ("docs", "models", "benchmarks", "studies", "scripts")
    nested = [page for folder in folders for page in (root / folder).rglob("*.md")]
    return sorted([*root.glob("*.md"), *(p for p in nested if (root / "docs" / "results") not in p.parents)])


def check_page(page: Path, root: Path = ROOT) -> Iterator[str]:
    """Yield the problems of a page, each with its line."""
    where = page.relative_to(root)
    names_code = str(where).startswith(NAMING)
    for number, line, kind in classified_lines(page.read_text(encoding="utf-8")):
        problems = list(_path_problems(line, page, root))
        if kind == "prose":
            problems += _width_problems(line)
        if kind != "code":
            problems += _link_problems(line, page, root)
            problems += _name_problems(line, root) if names_code else []
        yield from (f"{where}:{number}: {problem}" for problem in problems)


def classified_lines(text: str) -> Iterator[tuple[int, str, str]]:
    """Yield number, text and kind (`prose`, `table`, `code`) of each line."""
    fence, front_matter = "", text.startswith("---\n")
    for number, line in enumerate(text.splitlines(), 1):
        mark = re.match(r"\s*(```+)", line)
        kind = "code" if fence or mark or front_matter else "table" if line.lstrip().startswith("|") else "prose"
        yield number, line, kind
        if front_matter:
            front_matter = number == 1 or line != "---"
        elif mark:
            fence = "" if fence and mark[1] == fence else fence or mark[1]


def _width_problems(line: str) -> Iterator[str]:
    if len(line) > WIDTH and not re.fullmatch(rf"[\s*>-]*(?:{LINK.pattern}|<?https?://\S+>?)[.,:]?", line):
        yield f"{len(line)} columns; wrap prose at {WIDTH}"


def _link_problems(line: str, page: Path, root: Path) -> Iterator[str]:
    for target in LINK.findall(re.sub(r"`[^`]*`", "``", line)):
        if re.match(r"\w+:", target):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        if not path.exists():
            yield f"link to {target}: no such file"
        elif anchor and path.suffix == ".md" and anchor not in anchors(path):
            yield f"link to {target}: no such heading"


@cache
def anchors(page: Path) -> frozenset[str]:
    """The anchors of a page's headings, as GitHub names them."""
    found: list[str] = []
    for _, line, kind in classified_lines(page.read_text(encoding="utf-8")):
        if kind == "prose" and (heading := re.match(r"#+\s+(.*)", line)):
            title = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading[1]).strip().lower()
            slug = re.sub(r"[^\w\- ]", "", title).replace(" ", "-")
            same = sum(1 for other in found if re.fullmatch(rf"{re.escape(slug)}(-\d+)?", other))
            found.append(f"{slug}-{same}" if same else slug)
    return frozenset(found)


def _path_problems(line: str, page: Path, root: Path) -> Iterator[str]:
    for path in PATH.findall(re.sub(r"\]\([^)]*\)|https?://\S+", "", line)):
        bases = (root, root / "src" / "laconic") if path.endswith(".py") else (root,)
        pattern = re.sub(r"\b[A-Z]{2,}\b", "*", path.strip("/"))  # STUDY.yaml stands for any study
        if not any(any(base.glob(pattern)) for base in bases):
            yield f"{path}: no such file"


@cache
def code_words(root: Path) -> frozenset[str]:
    """Every word of the code, its tests and its settings."""
    files = [*(root / "src").rglob("*.py"), *(root / "tests").rglob("*.py"), *(root / "scripts").glob("*.py")]
    files += [root / "pyproject.toml", root / "Makefile"]
    words = re.compile(r"[A-Za-z_]\w*")
    return frozenset(word for file in files for word in words.findall(file.read_text(encoding="utf-8")))


def _name_problems(line: str, root: Path) -> Iterator[str]:
    for token in re.findall(r"`([^`]+)`", line):
        if NAME.fullmatch(token):
            unknown = [part for part in token.removesuffix("()").split(".") if part not in code_words(root)]
            if unknown and not token.endswith((".md", ".yaml", ".json", ".jsonl", ".safetensors")):
                yield f"`{token}`: the code has no {unknown[0]}"


def check_layers(root: Path = ROOT) -> Iterator[str]:
    """Yield a problem if docs/architecture.md lists other layers than import-linter's first contract."""
    contracts = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    held = [layer.replace("laconic.", "") for layer in contracts[0]["layers"]]
    section = (root / "docs" / "architecture.md").read_text().partition("\n## Layers\n")[2]
    block = re.search(r"```\n(.*?)```", section, re.DOTALL)
    shown = [re.split(r"\s{2,}", line)[0] for line in block[1].splitlines()] if block else []
    if shown != held:
        missing = [layer for layer in held if layer not in shown]
        detail = f"it lacks {', '.join(missing)}" if missing else "it has others, or another order"
        yield f"docs/architecture.md: the layers are not those of pyproject.toml ({detail})"


def main() -> int:
    """Print every problem, and return 1 if there is one."""
    problems = [problem for page in pages() for problem in check_page(page)] + list(check_layers())
    print("\n".join(problems) if problems else f"{len(pages())} pages are in order")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
