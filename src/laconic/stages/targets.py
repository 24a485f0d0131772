"""Targets of a stage: `targets` and `ignore`, matched with the names of a model's linears."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator

# Targets that mean a part of any model, whatever its name there.
EMBEDDING, HEAD = "Embedding", "lm_head"


def find_targets(
    targets: Sequence[str],
    ignore: Sequence[str],
    *,
    shapes: Mapping[str, tuple[int, int]],
    inside: Sequence[str],
    head: str,
    embeddings: str = "",
    stage: str = "",
) -> list[str]:
    """Return the full names of the targeted linears.

    Args:
        targets: patterns of linears to treat.
        ignore: patterns of linears to leave out.
        shapes: (out, in) of every linear of the model, by full name.
        inside: linears in decoder blocks that `Linear` stands for.
        head: full name of the head.
        embeddings: full name of the input embeddings; empty where there are none.
        stage: path of the stage in the recipe, for messages.

    Raises:
        ValueError: if a target matches nothing, or everything that is targeted is ignored.
    """
    targeted: dict[str, None] = {}
    for target in targets:
        if embeddings and target in (EMBEDDING, embeddings):
            matched: Sequence[str] = [embeddings]
        elif target == "Linear":
            matched = inside
        elif target == HEAD:
            matched = [head]
        else:
            matched = [n for n in (*inside, head) if n in shapes and matches(n, [target])]
        if not matched:
            leaves = sorted({n.rpartition(".")[2] for n in shapes})
            near = get_close_matches(target.removeprefix("re:").strip(".*$^\\"), leaves, 1, 0.4)
            hint = f"did you mean 're:.*{near[0]}'?" if near else f"its linears end in {', '.join(leaves)}"
            where = f"{stage}.targets" if stage else "targets"
            raise ValueError(f"{where} '{target}' matches no linear of this model; {hint}")
        targeted.update(dict.fromkeys(matched))
    names = [n for n in targeted if not matches(n, ignore)]
    if not names:
        raise ValueError(f"{stage or 'the stage'} ignores every linear that it targets; nothing would be compressed")
    return names


def _one_or_many(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


def check_patterns(patterns: Sequence[str]) -> None:
    """Check that patterns that begin with `re:` are regular expressions.

    Args:
        patterns: full names, or `re:` and a regular expression.

    Raises:
        ValueError: if one is not.
    """
    for pattern in patterns:
        if pattern.startswith("re:"):
            try:
                re.compile(pattern[3:])
            except re.error as e:
                raise ValueError(f"'{pattern}' is not a regular expression: {e}") from e


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Return whether a full name matches one of the patterns.

    Args:
        name: full name of a linear.
        patterns: full names, or `re:` and a regular expression for the beginning of a full name.
    """
    return any(re.match(p[3:], name) if p.startswith("re:") else p == name for p in patterns)


def _valid_patterns(value: tuple[str, ...]) -> tuple[str, ...]:
    check_patterns(value)
    return value


Patterns = Annotated[tuple[str, ...], BeforeValidator(_one_or_many), AfterValidator(_valid_patterns)]
"""Names of linears: `Linear`, `lm_head`, `Embedding`, a full name, or `re:` and a pattern for full names."""
