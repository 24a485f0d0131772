"""The commands that read a recipe or list what it may name: `laconic compress`, `validate`, `ls`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from laconic.checkpoint.trust import Trust
from laconic.cli.console import (
    CompressionProgress,
    calibration_notes,
    err,
    out,
    plan_notes,
    print_json,
    print_plan,
    print_warnings,
)
from laconic.cli.options import (
    Json,
    Output,
    Overwrite,
    Pickle,
    RecipeName,
    RecipeOrModel,
    RemoteCode,
    Sets,
    model_and_recipe,
)
from laconic.cli.stand_ins import declarations
from laconic.pipeline.preview import format_bytes


def compress(
    source: RecipeOrModel,
    recipe: RecipeName = None,
    output: Output = None,
    set_: Sets = None,
    overwrite: Overwrite = False,
    dry_run: Annotated[bool, typer.Option(help="Check everything, print the plan, write nothing.")] = False,
    trust_remote_code: RemoteCode = False,
    allow_pickle: Pickle = False,
    json_: Json = False,
) -> None:
    """Compress a model by a recipe. Run the same command again after an interruption to resume."""
    from laconic.pipeline.compression import prepare, run
    from laconic.pipeline.preview import describe_plan
    from laconic.train.ranks import is_main

    model, recipe = model_and_recipe(source, recipe)
    prepared = prepare(
        model,
        recipe,
        output,
        overrides=set_,
        overwrite=overwrite,
        trust=Trust(trust_remote_code, allow_pickle),
    )
    plan = describe_plan(prepared)
    if dry_run:
        print_plan(plan, json_)
        return
    print_warnings(plan)
    with CompressionProgress(quiet=json_ or not err.is_terminal or not is_main()) as progress:
        artifact = run(prepared, overwrite=overwrite, report=progress)
    if not is_main():
        return
    _draw_training(artifact.path / "results")
    result = artifact.results["compress"]
    for note in [*plan_notes(artifact.log), *calibration_notes(artifact.log), *progress.notes]:
        err.print(f"note: {note}", highlight=False, soft_wrap=True)
    if json_:
        print_json({"output": str(artifact.path), "forecast": plan.forecast and asdict(plan.forecast), **result})
        return
    before, after = prepared.source.checkpoint.nbytes, _bytes_of_weights(artifact.path)
    out.print(
        f"{artifact.path}: {format_bytes(before)} -> {format_bytes(after)} ({before / after:.2f}x smaller), "
        f"{result['seconds']:.1f} s, peak memory {format_bytes(result['peak_memory_bytes'])}",
        soft_wrap=True,
    )


def validate(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file or a gallery name.")],
    set_: Sets = None,
    json_: Json = False,
) -> None:
    """Check a recipe without a model."""

    def read() -> dict[str, Any]:
        from laconic.recipe import load_recipe

        return load_recipe(recipe, set_).model_dump(mode="json")

    keys = declarations(["laconic.recipe"], read)
    if json_:
        print_json(keys)
        return
    methods = [stage["method"] for stage in keys["stages"]]
    out.print(f"{recipe}: valid, {len(methods)} stage(s): {', '.join(methods)}", soft_wrap=True)


def list_(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="A method, a scheme or a recipe, to show alone.")
    ] = None,
    json_: Json = False,
) -> None:
    """List methods, schemes and ready recipes; or the options of one method, or the content of one recipe or scheme."""

    def read() -> dict[str, Any]:
        from laconic.report.catalogue import catalogue, describe

        return catalogue() if name is None else describe(name)

    tables = declarations(["laconic.report.catalogue"], read)
    if json_:
        print_json(tables)
        return
    if name is not None:
        _print_entry(tables)
        return
    for title, rows in tables.items():
        table = Table(title=title, title_justify="left", show_header=False, box=None)
        for row in rows:
            table.add_row(*(str(v) for v in row.values()))
        out.print(table)
        out.print()


def _print_entry(entry: dict[str, Any]) -> None:
    """Print one method with its options, one scheme, or the text of one recipe."""
    if entry["kind"] == "recipe":
        out.print(entry["text"], end="", markup=False, highlight=False, soft_wrap=True)
        return
    if entry["kind"] == "scheme":
        for key in ("name", "weights", "activations", "tried in"):
            out.print(f"{key}: {entry[key]}", markup=False, highlight=False, soft_wrap=True)
        return
    out.print(f"{entry['name']} ({entry['scope']}): {entry['about']}", markup=False, highlight=False, soft_wrap=True)
    table = Table(box=None)
    table.add_column("option", no_wrap=True)
    for title in ("type", "default", "meaning"):
        table.add_column(title)
    for option in entry["options"]:
        default = "required" if option["required"] else _as_yaml(option["default"])
        table.add_row(*(Text(option[key]) for key in ("name", "type")), Text(default), Text(option["about"]))
    out.print(table)


def _as_yaml(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _draw_training(folder: Path) -> None:
    """Draw the loss curve of each training beside its JSON file."""
    from laconic.checkpoint.atomic import write_text
    from laconic.report.chart import standalone
    from laconic.report.loss_curve import loss_curve

    for file in folder.glob("training-*.json"):
        write_text(file.with_suffix(".svg"), standalone(loss_curve(file.stem, json.loads(file.read_text()))))


def _bytes_of_weights(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.glob("*.safetensors"))
