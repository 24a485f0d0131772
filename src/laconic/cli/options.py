"""Options that several commands have, and what is read from their words."""

from __future__ import annotations

from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, and nothing else there.")]
Sets = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Vary a recipe's key.")]


def check_dtype(dtype: str | None) -> None:
    """Raises: ValueError for a dtype that is none to compute in."""
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise ValueError(f"--dtype {dtype} is not one of float32, bfloat16, float16")


def numbers(option: str, text: str, kind: type = int) -> list[Any]:
    """A list of numbers with commas between them. Raises: ValueError when it is none."""
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError as e:
        example = "512,2048" if kind is int else "0.5,0.8"
        raise ValueError(f"{option} {text} is no list of numbers; write it as in {option} {example}") from e
