"""Measure the structure of a source tree: rooms, longest files and functions, imports, circles, branches on formats.

    python scripts/house.py [SRC ...]

SRC are source trees to compare; src/laconic of this checkout by default.
"""

from __future__ import annotations

import ast
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_FORMATS = {"Fp4", "Fp8", "MxFp4", "NvFp4", "IntAffine"}
# A class that belongs to every module, and packages that only name what is in them.
_STRUCTURAL = ("__init__", "__main__")

Imports = dict[str, set[str]]


def main() -> None:
    for folder in [Path(a) for a in sys.argv[1:]] or [ROOT / "src" / "laconic"]:
        report(folder)


def report(folder: Path) -> None:
    """Print the facts of one tree."""
    trees = {name_of(f, folder): (f, ast.parse(f.read_text())) for f in sorted(folder.rglob("*.py"))}
    graph = {name: imports_of(tree, trees.keys()) for name, (_, tree) in trees.items()}
    rooms = Counter(room_of(name) for name in trees)
    lines = {name: len(f.read_text().splitlines()) for name, (f, _) in trees.items()}
    print(f"{folder}: {len(trees)} files, {sum(lines.values())} lines")
    print("  files in rooms:", ", ".join(f"{room} {n}" for room, n in rooms.most_common(8)))
    print("  longest files:", _largest(lines))
    print("  longest functions:", _largest(function_lengths({n: t for n, (_, t) in trees.items()})))
    print("  most positional parameters:", _largest(parameters({n: t for n, (_, t) in trees.items()})))
    circles = strongly_connected(graph)
    print(f"  import circles: {len(circles)}", *("<->".join(sorted(c)) for c in circles))
    print("  isinstance and match on formats:", sum(format_branches(t) for _, t in trees.values()))
    single = single_callers(graph)
    print(f"  files whose only importer is in another room: {len(single)}", *(f"{a} <- {b}" for a, b in single))


def name_of(file: Path, folder: Path) -> str:
    """Return a module's name within the package."""
    return ".".join(file.relative_to(folder).with_suffix("").parts)


def room_of(name: str) -> str:
    """Return the room of a module: its first folder, or a method's own package."""
    parts = name.split(".")
    return ".".join(parts[: 2 if parts[0] == "methods" and len(parts) > 2 else 1]) if len(parts) > 1 else "(top)"


def imports_of(tree: ast.AST, known: set[str] | object) -> set[str]:
    """Return the modules of the package that a module imports, also within functions."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("laconic"):
            base = (node.module or "").removeprefix("laconic").strip(".")
            names |= {base, *(f"{base}.{a.name}".strip(".") for a in node.names)}
        elif isinstance(node, ast.Import):
            names |= {a.name.removeprefix("laconic.") for a in node.names if a.name.startswith("laconic.")}
    return {n for n in names if n in known}  # type: ignore[operator]


def strongly_connected(graph: Imports) -> list[set[str]]:
    """Return the groups of modules that import one another."""
    reach = {name: _reachable(name, graph) for name in graph}
    groups = {frozenset({n, *(m for m in reach[n] if n in reach[m])}) for n in graph}
    return [set(g) for g in groups if len(g) > 1]


def _reachable(start: str, graph: Imports) -> set[str]:
    seen: set[str] = set()
    stack = [start]
    while stack:
        for other in graph[stack.pop()]:
            if other not in seen:
                seen.add(other)
                stack.append(other)
    return seen - {start}


def single_callers(graph: Imports) -> list[tuple[str, str]]:
    """Return the modules with one importer, which is in another room, and that importer."""
    users: dict[str, set[str]] = {name: set() for name in graph}
    for name, imported in graph.items():
        for other in imported:
            users[other].add(name)
    pairs = [(n, next(iter(u))) for n, u in users.items() if len(u) == 1 and not n.endswith(_STRUCTURAL)]
    return sorted((n, user) for n, user in pairs if room_of(n) != room_of(user) and room_of(n) != "(top)")


def function_lengths(trees: dict[str, ast.AST]) -> dict[str, int]:
    """Return the number of lines of every function."""
    return {
        f"{name}.{node.name}": (node.end_lineno or 0) - node.lineno + 1
        for name, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
    }


def parameters(trees: dict[str, ast.AST]) -> dict[str, int]:
    """Return the number of positional parameters of every function that is no GPU kernel."""
    return {
        f"{name}.{node.name}": len(node.args.args) + len(node.args.posonlyargs)
        for name, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and not any("jit" in ast.unparse(d) for d in node.decorator_list)
    }


def format_branches(tree: ast.AST) -> int:
    """Count `isinstance` checks and `match` cases on a class of formats."""
    count = 0
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
            count += bool(_FORMATS & {n.id for n in ast.walk(node) if isinstance(n, ast.Name)})
        elif isinstance(node, ast.MatchClass) and isinstance(node.cls, ast.Name):
            count += node.cls.id in _FORMATS
    return count


def _largest(values: dict[str, int], n: int = 5) -> str:
    return ", ".join(f"{k} {v}" for k, v in sorted(values.items(), key=lambda item: -item[1])[:n])


if __name__ == "__main__":
    main()
