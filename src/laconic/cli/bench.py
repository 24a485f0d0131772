"""`laconic bench`: time, bytes and energy of artifacts and of linear shapes, and of artifacts in an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from laconic.bench.options import SparsityOptions
from laconic.bench.serving_options import ServingOptions, parse_flags
from laconic.checkpoint.trust import Trust
from laconic.cli.console import out, print_json, with_status
from laconic.cli.options import Json, Pickle, RemoteCode, ResultFile, check_dtype, numbers, words

bench = typer.Typer(no_args_is_help=True, help="Measure the time, bytes and energy of an artifact or of linear shapes.")


@bench.command("sparsity")
def bench_sparsity(
    models: Annotated[
        list[str] | None, typer.Argument(metavar="[DIR...]", help="Artifacts, the original first; or one preset.")
    ] = None,
    baseline: Annotated[str | None, typer.Option(help="The original; the first DIR by default.")] = None,
    shapes: Annotated[
        str | None,
        typer.Option(metavar="PRESET | OUTxIN,...", help="Shapes of linears; by default the model's, or llama-3-8b's."),
    ] = None,
    scaled: Annotated[
        int | None, typer.Option(metavar="HIDDEN", help="Use a random model of this width and of DIR's architecture.")
    ] = None,
    sparsity: Annotated[str, typer.Option(metavar="S,...", help="Shares of weights to prune here.")] = "0.5",
    block: Annotated[int, typer.Option(help="Side of zero blocks.")] = 64,
    kinds: Annotated[
        str, typer.Option(metavar="KIND,...", help="Kinds of sparsity; all by default.")
    ] = "structured,unstructured,block,2:4",
    batch: Annotated[str, typer.Option(metavar="N,...", help="Numbers of tokens that a linear multiplies at once.")] = (
        "1,16,64,256,1024,4096"
    ),
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt of whole models, after which they decode.")] = 512,
    sequences: Annotated[int, typer.Option(help="Sequences of a batch of whole models.")] = 1,
    parts: Annotated[
        str | None,
        typer.Option("--measure", metavar="NAME,...", help="What to measure: linears, models; both by default."),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    rounds: Annotated[int, typer.Option(min=3, help="Largest number of rounds of each measurement.")] = 30,
    seconds: Annotated[float, typer.Option(help="Start no further round after this time.")] = 2.0,
    output: ResultFile = None,
    trust_remote_code: RemoteCode = False,
    allow_pickle: Pickle = False,
    json_: Json = False,
) -> None:
    """Time dense, 2:4, block-sparse and smaller linears, and whole models beside their original."""
    check_dtype(dtype)
    if output is not None:
        _check_output(output)
    from laconic.bench.sparsity import bench_sparsity as measure

    options = SparsityOptions(
        baseline=baseline,
        shapes=shapes,
        scaled_to=scaled,
        sparsities=numbers("--sparsity", sparsity, float),
        block=block,
        kinds=words(kinds),
        batches=numbers("--batch", batch),
        prompt=prompt,
        sequences=sequences,
        parts=None if parts is None else words(parts),
        dtype=dtype,
        trust=Trust(trust_remote_code, allow_pickle),
        rounds=rounds,
        seconds=seconds,
    )
    _show(with_status(measure, models or [], options, quiet=json_), output, json_)


@bench.command("serving")
def bench_serving(
    models: Annotated[list[str], typer.Argument(metavar="DIR...", help="Artifacts, or any models.")],
    baseline: Annotated[str | None, typer.Option(help="The original; the first DIR by default.")] = None,
    engine: Annotated[str, typer.Option(help="vllm, or hf for transformers' own generate.")] = "vllm",
    batches: Annotated[str, typer.Option(metavar="N,...", help="Numbers of requests in progress.")] = "1,16,64,256",
    prompts: Annotated[str, typer.Option(metavar="N,...", help="Tokens of a prompt, such as 512,8192,65536.")] = "512",
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate for each request.")] = 128,
    rounds: Annotated[int, typer.Option(help="Requests of a measurement, as a multiple of the batch.")] = 2,
    dummy: Annotated[
        bool, typer.Option("--dummy", help="Use random weights: a folder with only config.json is enough.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    engine_args: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Flag of the engine, such as kv-cache-dtype=fp8; may be repeated."),
    ] = None,
    vary: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=A,B", help="Measure with each value of a flag of the engine; may be repeated."),
    ] = None,
    vllm_python: Annotated[
        str | None, typer.Option(help="Python that has vLLM; by default $LACONIC_VLLM_PYTHON, or this one.")
    ] = None,
    start_seconds: Annotated[float, typer.Option(help="Time in which the engine has to be ready.")] = 900.0,
    output: ResultFile = None,
    trust_remote_code: RemoteCode = False,
    allow_pickle: Pickle = False,
    json_: Json = False,
) -> None:
    """Serve artifacts and their original, and measure tokens/s, latency, memory, cache capacity and energy."""
    check_dtype(dtype)
    if output is not None:
        _check_output(output)
    options = ServingOptions(
        baseline=baseline,
        engine=engine,
        batches=numbers("--batches", batches),
        prompts=numbers("--prompts", prompts),
        new_tokens=new_tokens,
        rounds=rounds,
        dummy=dummy,
        device=device,
        dtype=dtype,
        engine_args=parse_flags("--engine-args", engine_args or []),
        vary={key: words(values) for key, values in parse_flags("--vary", vary or []).items()},
        vllm_python=vllm_python,
        start_seconds=start_seconds,
        trust=Trust(trust_remote_code, allow_pickle),
    )
    from laconic.bench.serving import bench_serving as measure

    _show(with_status(measure, models, options, quiet=json_), output, json_)


def _check_output(file: Path) -> None:
    from laconic.checkpoint.atomic import check_writable

    if file.suffix not in (".md", ".json"):
        raise ValueError(f"--output {file} is neither Markdown nor JSON; give it a name that ends in .md or .json")
    check_writable(file)


def _show(result: dict[str, Any], output: Path | None, as_json: bool) -> None:
    from laconic.report.bench_table import bench_tables, write_bench

    if output is not None:
        write_bench(result, output)
    if as_json:
        print_json(result)
        return
    for table in bench_tables(result):
        out.print(table)
    for line in result["summary"]:
        out.print(line, highlight=False, soft_wrap=True)
