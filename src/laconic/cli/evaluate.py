"""`laconic eval`: measure a model on a text, on domains, on tasks, or over long contexts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from laconic.checkpoint.trust import Trust
from laconic.cli.console import err, out, print_json, with_status
from laconic.cli.eval_spelling import EvalGroup
from laconic.cli.options import Json, Pickle, RemoteCode, check_dtype, numbers, words
from laconic.cli.pictures import check_picture, draw_heat_map, draw_reliability
from laconic.cli.publishing import refreshing
from laconic.evaluation.options import (
    LONGBENCH,
    DomainOptions,
    LongBenchOptions,
    LongOptions,
    TaskOptions,
    TextOptions,
)

evaluate = typer.Typer(
    cls=EvalGroup,
    no_args_is_help=True,
    help="Measure a model, beside its original. `laconic eval MODEL` is `laconic eval text MODEL`.",
)

Model = Annotated[str, typer.Argument(metavar="MODEL", help="An artifact, or any model.")]
Baseline = Annotated[str | None, typer.Option("--baseline", help="The original model, to compare with.")]
ContextLength = Annotated[
    int | None, typer.Option("--context-length", help="Tokens per window; windows do not overlap.")
]
Windows = Annotated[int | None, typer.Option("--windows", min=1, help="Largest number of windows.")]
Dtype = Annotated[
    str | None, typer.Option("--dtype", help="float32, bfloat16 or float16; by default the checkpoint's.")
]
Data = Annotated[
    Path | None, typer.Option("--data", metavar="DIR", help="Local JSONL files of the tasks, in place of the Hub.")
]
Limit = Annotated[int | None, typer.Option("--limit", help="Measure only so many documents of each task.")]
BatchSize = Annotated[int, typer.Option("--batch-size", help="Prompts per forward pass.")]
Caches = Annotated[
    list[str] | None,
    typer.Option("--kv", metavar="YAML", help="A cache, such as '{method: kivi, k_bits: 2}'. Repeatable."),
]
Chunk = Annotated[int, typer.Option("--chunk", help="Tokens per forward pass through the cache.")]
Reliability = Annotated[
    Path | None,
    typer.Option("--reliability", metavar="SVG", help="Draw the accuracy over the model's confidence into this file."),
]


@evaluate.command("text")
@refreshing
def eval_text(
    model: Model,
    baseline: Baseline = None,
    text: Annotated[
        str, typer.Option(help="wikitext2, c4, a .txt/.jsonl/.parquet file, or a Hub dataset.")
    ] = "wikitext2",
    context_length: ContextLength = None,
    windows: Windows = None,
    generate: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Let both models continue N openings of the text.")
    ] = None,
    reliability: Reliability = None,
    dtype: Dtype = None,
    trust_remote_code: RemoteCode = False,
    allow_pickle: Pickle = False,
    json_: Json = False,
) -> None:
    """Measure perplexity, fidelity to the original, calibration, bits per weight and bytes."""
    check_dtype(dtype)
    check_picture(reliability)
    from laconic.evaluation.text import evaluate_text

    options = TextOptions(
        text=text,
        baseline=baseline,
        context_length=context_length,
        windows=windows,
        dtype=dtype,
        trust=Trust(trust_remote_code, allow_pickle),
        generate=generate or 0,
    )
    result = evaluate_text(model, options)
    draw_reliability(result, reliability)
    if json_:
        print_json(result)
        return
    from laconic.report.samples_table import samples_table
    from laconic.report.table import results_table

    out.print(results_table([result]))
    if generate:
        out.print(samples_table(result["samples"]))
    _print_intervals(result)


@evaluate.command("domains")
@refreshing
def eval_domains(
    model: Model,
    domains: Annotated[list[str], typer.Argument(metavar="NAME=FILE...", help="Kinds of text, each with its text.")],
    baseline: Baseline = None,
    context_length: ContextLength = None,
    windows: Windows = None,
    reliability: Reliability = None,
    dtype: Dtype = None,
    trust_remote_code: RemoteCode = False,
    allow_pickle: Pickle = False,
    json_: Json = False,
) -> None:
    """Measure the same as `text` on several kinds of text, and name the kind that loses most."""
    check_dtype(dtype)
    check_picture(reliability)
    from laconic.evaluation.domains import evaluate_domains, parse_domains

    options = DomainOptions(
        domains=parse_domains(domains),
        baseline=baseline,
        context_length=context_length,
        windows=windows,
        dtype=dtype,
        trust=Trust(trust_remote_code, allow_pickle),
    )
    result = evaluate_domains(model, options)
    draw_reliability(result, reliability)
    if json_:
        print_json(result)
    else:
        _print_intervals(result)


@evaluate.command("tasks")
@refreshing
def eval_tasks(
    model: Model,
    tasks: Annotated[
        str, typer.Argument(metavar="NAME,... | standard", help="Tasks by lm-eval's names, or the standard suite.")
    ],
    baseline: Baseline = None,
    data: Data = None,
    limit: Limit = None,
    fewshot: Annotated[int | None, typer.Option(help="Examples in a prompt; by default the task's number.")] = None,
    batch_size: BatchSize = 8,
    context_length: Annotated[int | None, typer.Option(help="Largest number of tokens of prompt and answer.")] = None,
    kv: Annotated[
        list[str] | None, typer.Option(metavar="YAML", help="The cache to generate with, such as '{method: kivi}'.")
    ] = None,
    reliability: Reliability = None,
    dtype: Dtype = None,
    trust_remote_code: RemoteCode = False,
    allow_pickle: Pickle = False,
    json_: Json = False,
) -> None:
    """Measure tasks of lm-eval, with standard errors; beside the original on the same documents."""
    check_dtype(dtype)
    check_picture(reliability)
    from laconic.evaluation.tasks import evaluate_tasks

    standard = tasks == "standard"
    options = TaskOptions(
        tasks=() if standard else words(tasks),
        suite="standard" if standard else None,
        baseline=baseline,
        data=data,
        limit=limit,
        fewshot=fewshot,
        batch_size=batch_size,
        context_length=context_length,
        dtype=dtype,
        trust=Trust(trust_remote_code, allow_pickle),
        kv=kv or (),
        quiet=json_ or not err.is_terminal,
    )
    result = evaluate_tasks(model, options)
    draw_reliability(result, reliability)
    if json_:
        print_json(result)
    else:
        from laconic.report.task_table import tasks_table

        out.print(tasks_table(result))
        _print_intervals(result)
    if refused := list(result["refused"].values()):
        count = len(refused) + len(result["shots"])
        raise ValueError(f"{len(refused)} of {count} tasks not measured (the others are), the first: {refused[0]}")


@evaluate.command("long")
@refreshing
def eval_long(
    model: Model,
    kv: Caches = None,
    text: Annotated[str, typer.Option(help="Text for perplexity and around needles, as in `text`.")] = "wikitext2",
    lengths: Annotated[
        str | None, typer.Option(metavar="N,...", help="Context lengths; 512,2048,8192 by default.")
    ] = None,
    measure: Annotated[
        str | None, typer.Option(metavar="NAME,...", help="Of perplexity, needle, memory, speed; all by default.")
    ] = None,
    windows: Annotated[int, typer.Option(help="Largest number of windows of the text.")] = 4,
    depths: Annotated[int, typer.Option(help="Number of depths of a needle.")] = 5,
    trials: Annotated[int, typer.Option(help="Needles for each length and depth.")] = 4,
    prompt: Annotated[str, typer.Option(help="Wording of needles: needle, comment, passkey.")] = "needle",
    chunk: Chunk = 32,
    batch_size: BatchSize = 8,
    heat_map: Annotated[
        Path | None, typer.Option(metavar="SVG", help="Draw the share of needles found into this file.")
    ] = None,
    dtype: Dtype = None,
    trust_remote_code: RemoteCode = False,
    allow_pickle: Pickle = False,
    json_: Json = False,
) -> None:
    """Measure what quantized caches cost and save over long contexts, beside the 16-bit cache."""
    check_dtype(dtype)
    check_picture(heat_map)
    parts = None if measure is None else words(measure)
    if parts is not None and LONGBENCH in parts:
        raise ValueError(f"LongBench has a command of its own: laconic eval longbench {model}")
    options = LongOptions(
        kv=kv or (),
        text=text,
        lengths=None if lengths is None else numbers("--lengths", lengths),
        depths=depths,
        trials=trials,
        windows=windows,
        prompt=prompt,
        parts=parts,
        chunk=chunk,
        batch_size=batch_size,
        dtype=dtype,
        trust=Trust(trust_remote_code, allow_pickle),
    )
    if heat_map and "needle" not in options.measured:
        raise ValueError("--heat-map draws needles; leave out --measure, or name needle in it")
    draw_heat_map(_evaluate_long(model, options, json_), heat_map)


@evaluate.command("longbench")
@refreshing
def eval_longbench(
    model: Model,
    tasks: Annotated[
        str, typer.Argument(metavar="[NAME,...]", help="Tasks by lm-eval's names; all by default.")
    ] = LONGBENCH,
    kv: Caches = None,
    data: Data = None,
    limit: Limit = None,
    context_length: Annotated[int | None, typer.Option(help="Largest number of tokens of prompt and answer.")] = None,
    chunk: Chunk = 32,
    batch_size: BatchSize = 8,
    dtype: Dtype = None,
    trust_remote_code: RemoteCode = False,
    allow_pickle: Pickle = False,
    json_: Json = False,
) -> None:
    """Measure LongBench through quantized caches, beside the 16-bit cache."""
    check_dtype(dtype)
    options = LongOptions(
        kv=kv or (),
        lengths=None if context_length is None else [context_length],
        parts=[LONGBENCH],
        longbench=LongBenchOptions(tasks=words(tasks), data=data, limit=limit),
        chunk=chunk,
        batch_size=batch_size,
        dtype=dtype,
        trust=Trust(trust_remote_code, allow_pickle),
    )
    _evaluate_long(model, options, json_)


def _evaluate_long(model: str, options: LongOptions, as_json: bool) -> dict[str, Any]:
    """Measure and print; return the result."""
    from laconic.evaluation.long_context import evaluate_long

    result: dict[str, Any] = with_status(evaluate_long, model, options, quiet=as_json)
    if as_json:
        print_json(result)
        return result
    from laconic.report.long_table import long_caption, long_tables

    for table in long_tables(result):
        out.print(table)
    out.print(long_caption(result))
    return result


def _print_intervals(result: dict[str, Any]) -> None:
    from laconic.report.interval_table import interval_tables

    for table in interval_tables(result):
        out.print(table)
