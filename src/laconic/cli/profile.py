"""`laconic profile`: where time and memory go."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from laconic.cli.console import Walking, err, out, print_json, warn
from laconic.cli.options import Json, Sets

profile = typer.Typer(no_args_is_help=True, help="Where time and memory go, as a Chrome trace and a table.")
Trace = Annotated[Path, typer.Option("--trace", help="The Chrome trace to write (open it in ui.perfetto.dev).")]
Nvtx = Annotated[bool, typer.Option("--nvtx", help="Name ranges for Nsight, under which this runs, and trace nothing.")]
Each = Annotated[bool, typer.Option("--each", help="A line for each block, rather than for all blocks together.")]


@profile.command("compress")
def profile_compress(
    source: Annotated[str, typer.Argument(metavar="RECIPE.yaml | MODEL")],
    recipe: Annotated[str | None, typer.Option(help="A gallery name or a recipe file, for MODEL.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder of the artifact.")] = None,
    set_: Sets = None,
    blocks: Annotated[int, typer.Option(min=1, help="So many blocks are traced; the rest runs without.")] = 2,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing output, once the new one is whole.")] = False,
    trace: Trace = Path("laconic-trace.json"),
    nvtx: Nvtx = False,
    each: Each = False,
    json_: Json = False,
) -> None:
    """Compress a model, and trace the first blocks."""
    from laconic.bench.profiling import profile_compress as run
    from laconic.checkpoint.atomic import check_writable
    from laconic.pipeline.compression import prepare

    check_writable(trace)
    if recipe is None and not source.endswith((".yaml", ".yml")):
        raise ValueError(f"'{source}' is no recipe file; to compress a model by a ready recipe add --recipe NAME")
    model, what = (source, recipe) if recipe else (None, source)
    prepared = prepare(model, what, output, overrides=set_, overwrite=overwrite)
    warn(prepared)
    with Walking(quiet=json_ or not err.is_terminal) as progress:
        run(prepared, trace, blocks=blocks, nvtx=nvtx, overwrite=overwrite, report=progress)
    _tell(trace, nvtx, each, json_)


@profile.command("generate")
def profile_generate(
    model: Annotated[str, typer.Argument(metavar="DIR", help="An artifact, or a model.")],
    prompt: Annotated[int, typer.Option(min=1, help="Tokens to read.")] = 128,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to write.")] = 16,
    batch: Annotated[int, typer.Option(min=1, help="Sequences at once.")] = 1,
    trace: Trace = Path("laconic-trace.json"),
    nvtx: Nvtx = False,
    each: Each = False,
    json_: Json = False,
) -> None:
    """Read a prompt and write some tokens, and trace all of it."""
    from laconic.bench.profiling import profile_generation
    from laconic.checkpoint.atomic import check_writable

    check_writable(trace)
    profile_generation(model, trace, prompt=prompt, tokens=tokens, batch=batch, nvtx=nvtx)
    _tell(trace, nvtx, each, json_)


def _tell(trace: Path, nvtx: bool, each: bool, as_json: bool) -> None:
    from laconic.bench.trace import by_kind, read_trace
    from laconic.report.trace_table import trace_table

    if nvtx:
        return
    rows = read_trace(trace)
    rows = rows if each else by_kind(rows)
    if as_json:
        print_json({"trace": str(trace.resolve()), "spans": [asdict(row) for row in rows]})
        return
    out.print(trace_table(rows))
    out.print(f"trace: {trace.resolve()}", soft_wrap=True)
