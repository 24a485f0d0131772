"""Options that several commands share, and how their values are read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, and nothing else there.")]
Sets = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the recipe.")]
ArtifactFolder = Annotated[Path, typer.Argument(metavar="ARTIFACT", help="Folder of a finished artifact.")]
RecipeOrModel = Annotated[
    str, typer.Argument(metavar="RECIPE.yaml | MODEL", help="A recipe file, or with --recipe a model.")
]
RecipeName = Annotated[str | None, typer.Option("--recipe", help="A gallery name or a recipe file, for MODEL.")]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Folder of the artifact.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace an existing output, once the new one is complete.")
]
ResultFile = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="FILE.md|.json", help="Write the tables, or the result, to this file."),
]
RemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with the model (only if you trust its source).")
]
Pickle = Annotated[
    bool, typer.Option("--allow-pickle", help="Read weights from pickle files (only if you trust their source).")
]


def model_and_recipe(source: str, recipe: str | None) -> tuple[str | None, str]:
    """Return the model and the recipe that `RECIPE.yaml` or `MODEL --recipe NAME` name; the first has None as model.

    Args:
        source: A recipe file; or a model, if a recipe is given.
        recipe: Name or file of a recipe.

    Raises:
        ValueError: `source` is no recipe file, and no recipe is given.
    """
    if recipe:
        return source, recipe
    if not source.endswith((".yaml", ".yml")):
        raise ValueError(f"'{source}' is no recipe file; to compress a model by a ready recipe add --recipe NAME")
    return None, source


def check_dtype(dtype: str | None) -> None:
    """Check a dtype to compute in.

    Args:
        dtype: Name of the dtype; None for that of the checkpoint.

    Raises:
        ValueError: It is not float32, bfloat16 or float16.
    """
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise ValueError(f"--dtype {dtype} is not one of float32, bfloat16, float16")


def numbers(option: str, text: str, kind: type = int) -> list[Any]:
    """Read numbers separated by commas.

    Args:
        option: Name of the option, for the error message.
        text: The numbers, such as `512,2048`.
        kind: `int` or `float`.

    Returns:
        The numbers.

    Raises:
        ValueError: A part is not a number of this kind.
    """
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError as e:
        example = "512,2048" if kind is int else "0.5,0.8"
        raise ValueError(f"{option} {text} is no list of numbers; write it as in {option} {example}") from e


def words(text: str) -> list[str]:
    """Read names separated by commas.

    Args:
        text: The names, such as `piqa,boolq`.

    Returns:
        The names without spaces around them; empty ones are left out.
    """
    return [word.strip() for word in text.split(",") if word.strip()]
