"""`laconic bench`: what things take, timed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from laconic.cli.console import err, out, print_json
from laconic.cli.options import Json, check_dtype, numbers

bench = typer.Typer(no_args_is_help=True, help="What an artifact, or a shape, takes: time, bytes, energy.")


@bench.command("sparsity")
def bench_sparsity(
    models: Annotated[
        list[str] | None, typer.Argument(metavar="[DIR...]", help="Artifacts, the original first; or one preset.")
    ] = None,
    baseline: Annotated[str | None, typer.Option(help="The original; the first DIR by default.")] = None,
    shapes: Annotated[
        str | None, typer.Option(metavar="PRESET | OUTxIN,...", help="Linears; the model's, or llama-3-8b's.")
    ] = None,
    scaled: Annotated[
        int | None, typer.Option(metavar="HIDDEN", help="A random model of DIR's architecture, this wide, instead.")
    ] = None,
    sparsity: Annotated[str, typer.Option(metavar="S,...", help="Shares that are pruned away here.")] = "0.5",
    block: Annotated[int, typer.Option(help="Side of zero blocks.")] = 64,
    kinds: Annotated[
        str, typer.Option(metavar="KIND,...", help="Of sparsity; all by default.")
    ] = "structured,unstructured,block,2:4",
    batch: Annotated[str, typer.Option(metavar="N,...", help="Tokens a linear multiplies at once.")] = (
        "1,16,64,256,1024,4096"
    ),
    prompt: Annotated[int, typer.Option(help="Tokens that whole models read, and decode after.")] = 512,
    sequences: Annotated[int, typer.Option(help="Sequences side by side, of whole models.")] = 1,
    parts: Annotated[
        str | None, typer.Option("--measure", metavar="NAME,...", help="Of linears, models; both by default.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    rounds: Annotated[int, typer.Option(min=3, help="Times each is timed, at most.")] = 30,
    seconds: Annotated[float, typer.Option(help="After these no round is begun.")] = 2.0,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE.md|.json", help="Write tables, or the result.")
    ] = None,
    json_: Json = False,
) -> None:
    """What sparsity buys: dense, 2:4, block-sparse and smaller linears, and whole models beside their original."""
    check_dtype(dtype)
    if output is not None and output.suffix not in (".md", ".json"):
        raise ValueError(f"--output {output} is neither Markdown nor JSON; give it a name that ends in .md or .json")
    if output is not None:
        from laconic.checkpoint.atomic import check_writable

        check_writable(output)
    from laconic.bench.sparsity import bench_sparsity as measure
    from laconic.report.bench_table import bench_tables, write_bench

    asked: dict[str, Any] = {
        "baseline": baseline,
        "shapes": shapes,
        "scaled_to": scaled,
        "sparsities": numbers("--sparsity", sparsity, float),
        "block": block,
        "kinds": kinds.split(","),
        "batches": numbers("--batch", batch),
        "prompt": prompt,
        "sequences": sequences,
        "parts": None if parts is None else parts.split(","),
        "dtype": dtype,
        "rounds": rounds,
        "seconds": seconds,
    }
    if json_ or not err.is_terminal:
        result = measure(models or [], **asked)
    else:
        with err.status("") as status:
            result = measure(models or [], **asked, report=status.update)
    if output is not None:
        write_bench(result, output)
    if json_:
        print_json(result)
        return
    for table in bench_tables(result):
        out.print(table)
    for line in result["said"]:
        out.print(line, highlight=False, soft_wrap=True)
