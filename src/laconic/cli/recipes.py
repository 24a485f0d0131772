"""The commands that go by a recipe, and what there is to write one of: `laconic compress`, `validate`, `ls`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from laconic.cli.console import Walking, err, in_bytes, out, print_json, print_plan, remarks, warn
from laconic.cli.options import Json, Sets


def compress(
    source: Annotated[
        str, typer.Argument(metavar="RECIPE.yaml | MODEL", help="A recipe file, or with --recipe a model.")
    ],
    recipe: Annotated[str | None, typer.Option(help="A gallery name or a recipe file, for MODEL.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder of the artifact.")] = None,
    set_: Sets = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing output, once the new one is whole.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Check everything, print the plan, write nothing.")] = False,
    allow_pickle: Annotated[bool, typer.Option(help="Read pickle weights (only from a source you trust).")] = False,
    trust_remote_code: Annotated[bool, typer.Option(help="Run the model's own code (only if you trust it).")] = False,
    json_: Json = False,
) -> None:
    """Compress a model by a recipe; run again after an interruption to go on where it stopped."""
    from laconic.pipeline.compression import prepare, run
    from laconic.train.ranks import is_main

    if recipe is None and not source.endswith((".yaml", ".yml")):
        raise ValueError(f"'{source}' is no recipe file; to compress a model by a ready recipe add --recipe NAME")
    model, what = (source, recipe) if recipe else (None, source)
    prepared = prepare(
        model,
        what,
        output,
        overrides=set_,
        overwrite=overwrite,
        allow_pickle=allow_pickle,
        trust_remote_code=trust_remote_code,
    )
    if dry_run:
        print_plan(prepared, json_)
        return
    warn(prepared)
    with Walking(quiet=json_ or not err.is_terminal or not is_main()) as progress:
        artifact = run(prepared, overwrite=overwrite, report=progress)
    if not is_main():
        return
    _draw_training(artifact.path / "results")
    done = artifact.results["compress"]
    for remark in [*remarks(artifact.log), *progress.notes]:
        err.print(f"note: {remark}", highlight=False, soft_wrap=True)
    if json_:
        print_json({"output": str(artifact.path), "forecast": prepared.forecast and asdict(prepared.forecast), **done})
        return
    before, after = prepared.source.checkpoint.nbytes, _weights(artifact.path)
    out.print(
        f"{artifact.path}: {in_bytes(before)} -> {in_bytes(after)} ({before / after:.2f}x smaller), "
        f"{done['seconds']:.1f} s, peak memory {in_bytes(done['peak_memory_bytes'])}",
        soft_wrap=True,
    )


def validate(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file or a gallery name.")],
    set_: Sets = None,
    json_: Json = False,
) -> None:
    """Check a recipe without a model."""
    from laconic.recipe import load_recipe

    loaded = load_recipe(recipe, set_).model_dump(mode="json")
    if json_:
        print_json(loaded)
    else:
        out.print(
            f"{recipe}: valid, {len(loaded['stages'])} stage(s): {', '.join(s['method'] for s in loaded['stages'])}",
            soft_wrap=True,
        )


def list_(json_: Json = False) -> None:
    """Methods, schemes and ready recipes."""
    from laconic.report.catalogue import catalogue

    known = catalogue()
    if json_:
        print_json(known)
        return
    for title, rows in known.items():
        table = Table(title=title, title_justify="left", show_header=False, box=None)
        for row in rows:
            table.add_row(*(str(v) for v in row.values()))
        out.print(table)
        out.print()


def _draw_training(folder: Path) -> None:
    """Draw the loss of each training beside its figures."""
    from laconic.checkpoint.atomic import write_text
    from laconic.report.chart import standalone
    from laconic.report.loss_curve import loss_curve

    for file in folder.glob("training-*.json"):
        write_text(file.with_suffix(".svg"), standalone(loss_curve(file.stem, json.loads(file.read_text()))))


def _weights(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.glob("*.safetensors"))
