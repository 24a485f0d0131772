"""Check that docstrings of public functions describe their arguments and what they return, in Google's sections.

    python scripts/check_docstrings.py [ROOM ...]

A room is a folder or a module of src/laconic; without one, all are checked. A public function, or method of a public
class, that takes an argument needs an `Args:` section with every argument and, if it returns something, `Returns:` or
`Yields:`, unless the docstring's first word is "Return" or "Yield".

Exempt are private names, arguments that begin with an underscore, nested functions, properties, dunder methods,
overloads, Typer commands (their options have help texts), Triton functions (comments in the signature, or the module's
docstring, describe their arguments in groups), pydantic validators, and methods that override: a documented method of a
base class or protocol of the package, or, without a docstring of their own, a method of a library's class.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "laconic"

Function = ast.FunctionDef | ast.AsyncFunctionDef
EXEMPT = {
    *("property", "cached_property", "setter", "overload", "override", "command", "callback", "jit"),
    *("field_validator", "model_validator", "field_serializer", "model_serializer", "validator"),
}
NOTHING = re.compile(r"(None|NoReturn|Never|(Async)?(Iterator|Iterable|Generator)\[None\b.*)?")
SECTION = re.compile(r"^( *)(Args|Returns|Yields):[ \t]*\n((?:\1[ \t]+.*\n|[ \t]*\n)*)", re.MULTILINE)


@dataclass(frozen=True)
class Class:
    """A class of the package: the names of its bases, and its methods."""

    bases: tuple[str, ...]
    methods: dict[str, Function]


def last_name(node: ast.expr) -> str:
    """Return the last name of a decorator or base: `command` of `@app.command("x")`, `Base` of `room.Base[int]`."""
    while isinstance(node, ast.Call | ast.Subscript):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def base_name(node: ast.expr) -> str:
    """Return the name of a base class: `nn.Linear` of torch's, which a class `Linear` of the package is not."""
    name = last_name(node)
    return f"nn.{name}" if isinstance(node, ast.Attribute) and last_name(node.value) == "nn" else name


def definitions(body: list[ast.stmt]) -> Iterator[Function | ast.ClassDef]:
    """Yield functions and classes of a module or class, those under `if` and `try` included."""
    for node in body:
        if isinstance(node, Function | ast.ClassDef):
            yield node
        elif isinstance(node, ast.If | ast.Try):
            yield from definitions([*node.body, *node.orelse])


def commands_of(module: ast.Module) -> set[str]:
    """Return the names of functions that a module registers as Typer commands, as in `app.command()(compress)`."""
    calls = [node for node in ast.walk(module) if isinstance(node, ast.Call) and isinstance(node.func, ast.Call)]
    registered = [call.args[0] for call in calls if call.args and last_name(call.func) in ("command", "callback")]
    return {argument.id for argument in registered if isinstance(argument, ast.Name)}


def classes_of(modules: list[ast.Module]) -> dict[str, Class]:
    """Return the classes of modules by name; bases and methods of classes with one name are merged."""
    classes: dict[str, Class] = {}
    for module in modules:
        for node in definitions(module.body):
            if isinstance(node, ast.ClassDef):
                same = classes.get(node.name, Class((), {}))
                methods = {m.name: m for m in definitions(node.body) if isinstance(m, Function)}
                bases = (*same.bases, *(base_name(base) for base in node.bases))
                classes[node.name] = Class(bases, {**same.methods, **methods})
    return classes


def overrides(function: Function, owner: str, classes: dict[str, Class]) -> bool:
    """Return whether a method of class `owner` takes its documentation from a base or from a protocol."""
    names, visited = list(classes[owner].bases), {owner}
    while names:
        base = names.pop()
        if base in visited:
            continue
        visited.add(base)
        if base in classes:
            names += classes[base].bases
            method = classes[base].methods.get(function.name)
            if method and ast.get_docstring(method):
                return True
        elif base not in ("Protocol", "ABC", "Generic", "NamedTuple") and not ast.get_docstring(function):
            return True
    # Protocols are met by shape alone: by a method with the same name and arguments.
    met = (c.methods.get(function.name) for c in classes.values() if "Protocol" in c.bases)
    return any(m and argument_names(m, True) == argument_names(function, True) for m in met)


def problem_of(function: Function, is_method: bool) -> str:
    """Return what the docstring of a function lacks, or an empty string."""
    names = argument_names(function, is_method)
    docstring = ast.get_docstring(function) or ""
    if not names:
        return ""
    if not docstring:
        return "no docstring"
    sections = {title: body for _, title, body in SECTION.findall(docstring + "\n")}
    entries = re.findall(r"^\s*\*{0,2}(\w+)\s*(?:\(.*?\))?:", sections.get("Args", ""), re.MULTILINE)
    problems = [f"`Args:` lacks {', '.join(missing)}"] if (missing := [n for n in names if n not in entries]) else []
    returns = ast.unparse(function.returns) if function.returns else ""
    stated = {"Returns", "Yields"} & sections.keys() or docstring.startswith(("Return", "Yield"))
    if not NOTHING.fullmatch(returns) and not stated:
        problems.append("no `Returns:`")
    return "; ".join(problems)


def argument_names(function: Function, is_method: bool) -> list[str]:
    """Return the public names of a function's arguments, without `self` or `cls`."""
    a = function.args
    positional = [*a.posonlyargs, *a.args]
    if is_method and "staticmethod" not in map(last_name, function.decorator_list):
        positional = positional[1:]
    arguments = [*positional, a.vararg, *a.kwonlyargs, a.kwarg]
    return [argument.arg for argument in arguments if argument and not argument.arg.startswith("_")]


def check(rooms: tuple[str, ...], package: Path = PACKAGE) -> Iterator[str]:
    """Yield the problems of rooms, each with its file and line."""
    modules = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(package.rglob("*.py"))}
    classes = classes_of(list(modules.values()))
    commands = set().union(*map(commands_of, modules.values()))
    for path, module in modules.items():
        if path.relative_to(package).parts[0].removesuffix(".py") not in rooms:
            continue
        for node in definitions(module.body):
            methods = definitions(node.body) if isinstance(node, ast.ClassDef) else [node]
            for function in methods:
                owner = node.name if isinstance(node, ast.ClassDef) else ""
                if not owner and function.name in commands:
                    continue
                if is_checked(function, owner, classes) and (problem := problem_of(function, bool(owner))):
                    name = f"{owner}.{function.name}" if owner else function.name
                    yield f"{path.relative_to(package.parents[1])}:{function.lineno}: {name}: {problem}"


def is_checked(function: Function | ast.ClassDef, owner: str, classes: dict[str, Class]) -> bool:
    """Return whether a definition is a public function that needs sections of its own."""
    if isinstance(function, ast.ClassDef) or function.name.startswith("_") or owner.startswith("_"):
        return False
    if EXEMPT & {last_name(decorator) for decorator in function.decorator_list}:
        return False
    return not owner or not overrides(function, owner, classes)


def main(rooms: tuple[str, ...]) -> int:
    """Print every problem, and return 1 if there is one."""
    present = {path.name.removesuffix(".py") for path in PACKAGE.iterdir()}
    if unknown := set(rooms) - present:
        print(f"no room {', '.join(sorted(unknown))} in {PACKAGE}: give the name of a folder or module")
        return 1
    problems = list(check(rooms or tuple(present)))
    print(
        "\n".join([*problems, f"{len(problems)} docstrings are incomplete"]) if problems else "docstrings are in order"
    )
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(tuple(sys.argv[1:])))
