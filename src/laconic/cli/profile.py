"""`laconic profile`: the time and memory of a compression or of a generation, by block."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from laconic.checkpoint.trust import Trust
from laconic.cli.console import CompressionProgress, err, out, print_json, print_warnings
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

profile = typer.Typer(no_args_is_help=True, help="Measure where time and memory go, as a Chrome trace and a table.")
Trace = Annotated[Path, typer.Option("--trace", help="The Chrome trace to write (open it in ui.perfetto.dev).")]
Nvtx = Annotated[bool, typer.Option("--nvtx", help="Only name ranges for Nsight, which this runs under.")]
Each = Annotated[bool, typer.Option("--each", help="One line per block instead of one line for all blocks.")]


@profile.command("compress")
def profile_compress(
    source: RecipeOrModel,
    recipe: RecipeName = None,
    output: Output = None,
    set_: Sets = None,
    blocks: Annotated[int, typer.Option(min=1, help="Number of blocks to trace; the rest runs untraced.")] = 2,
    overwrite: Overwrite = False,
    trace: Trace = Path("laconic-trace.json"),
    nvtx: Nvtx = False,
    each: Each = False,
    trust_remote_code: RemoteCode = False,
    allow_pickle: Pickle = False,
    json_: Json = False,
) -> None:
    """Compress a model and trace its first blocks."""
    from laconic.bench.profiling import profile_compress as run
    from laconic.checkpoint.atomic import check_writable
    from laconic.pipeline.compression import prepare
    from laconic.pipeline.preview import describe_plan

    check_writable(trace)
    model, recipe = model_and_recipe(source, recipe)
    prepared = prepare(
        model,
        recipe,
        output,
        overrides=set_,
        overwrite=overwrite,
        trust=Trust(trust_remote_code, allow_pickle),
    )
    print_warnings(describe_plan(prepared))
    with CompressionProgress(quiet=json_ or not err.is_terminal) as progress:
        run(prepared, trace, blocks=blocks, nvtx=nvtx, overwrite=overwrite, report=progress)
    _print_trace(trace, nvtx, each, json_)


@profile.command("generate")
def profile_generate(
    model: Annotated[str, typer.Argument(metavar="DIR", help="An artifact, or a model.")],
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 128,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 16,
    batch: Annotated[int, typer.Option(min=1, help="Sequences of the batch.")] = 1,
    trace: Trace = Path("laconic-trace.json"),
    nvtx: Nvtx = False,
    each: Each = False,
    trust_remote_code: RemoteCode = False,
    allow_pickle: Pickle = False,
    json_: Json = False,
) -> None:
    """Generate tokens after a prompt and trace it."""
    from laconic.bench.profiling import profile_generation
    from laconic.checkpoint.atomic import check_writable

    check_writable(trace)
    trust = Trust(trust_remote_code, allow_pickle)
    profile_generation(model, trace, prompt=prompt, tokens=tokens, batch=batch, nvtx=nvtx, trust=trust)
    _print_trace(trace, nvtx, each, json_)


def _print_trace(trace: Path, nvtx: bool, each: bool, as_json: bool) -> None:
    from laconic.bench.trace import merge_blocks, read_trace
    from laconic.report.trace_table import trace_table

    if nvtx:
        return
    rows = read_trace(trace)
    rows = rows if each else merge_blocks(rows)
    if as_json:
        print_json({"trace": str(trace.resolve()), "spans": [asdict(row) for row in rows]})
        return
    out.print(trace_table(rows))
    out.print(f"trace: {trace.resolve()}", soft_wrap=True)
