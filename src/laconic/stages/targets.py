"""Which linears a stage means: `targets` and `ignore`, matched with the names of a model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator


def find_targets(
    targets: Sequence[str],
    ignore: Sequence[str],
    shapes: Mapping[str, tuple[int, int]],
    inside: Sequence[str],
    head: str,
    stage: str = "",
) -> list[str]:
    """Full names of the linears that are meant. shapes: of every linear. inside: those in decoder blocks. stage: the
    path in the recipe, for complaints.

    Raises: ValueError when a target matches nothing, or all that it matches is ignored.
    """
    found: dict[str, None] = {}
    for target in targets:
        hit = inside if target == "Linear" else [n for n in (*inside, head) if n in shapes and matches(n, [target])]
        if not hit:
            leaves = sorted({n.rpartition(".")[2] for n in shapes})
            near = get_close_matches(target.removeprefix("re:").strip(".*$^\\"), leaves, 1, 0.4)
            hint = f"did you mean 're:.*{near[0]}'?" if near else f"its linears end in {', '.join(leaves)}"
            where = f"{stage}.targets" if stage else "targets"
            raise ValueError(f"{where} '{target}' matches no linear of this model; {hint}")
        found.update(dict.fromkeys(hit))
    kept = [n for n in found if not matches(n, ignore)]
    if not kept:
        raise ValueError(f"{stage or 'it'} ignores every linear that it targets; nothing would be compressed")
    return kept


def _one_or_many(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


def check_patterns(patterns: Sequence[str]) -> None:
    """Raises: ValueError for one that begins with `re:` and is no regular expression."""
    for pattern in patterns:
        if pattern.startswith("re:"):
            try:
                re.compile(pattern[3:])
            except re.error as e:
                raise ValueError(f"'{pattern}' is not a regular expression: {e}") from e


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a full name is meant by one of these patterns (exact, or `re:`)."""
    return any(re.match(p[3:], name) if p.startswith("re:") else p == name for p in patterns)


def _valid_patterns(value: tuple[str, ...]) -> tuple[str, ...]:
    check_patterns(value)
    return value


Patterns = Annotated[tuple[str, ...], BeforeValidator(_one_or_many), AfterValidator(_valid_patterns)]
"""Names of linears: `Linear`, a full name, or `re:` and a pattern for full names."""
