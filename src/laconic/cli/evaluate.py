"""`laconic eval`: a model measured on texts, on tasks, or over long contexts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from laconic.cli.console import err, out, print_json
from laconic.cli.options import Json, check_dtype, numbers
from laconic.cli.publishing import refreshing
from laconic.evaluation.options import DomainOptions, LongBenchOptions, LongOptions, TaskOptions, TextOptions


@refreshing
def evaluate(
    model: Annotated[str, typer.Argument(metavar="DIR", help="An artifact, or any model.")],
    baseline: Annotated[str | None, typer.Option(help="The original model, for fidelity.")] = None,
    text: Annotated[
        str, typer.Option(help="wikitext2, c4, a .txt/.jsonl/.parquet file, or a Hub dataset.")
    ] = "wikitext2",
    context_length: Annotated[
        int | None, typer.Option(help="Tokens a window (they do not overlap), or a task's prompt at most.")
    ] = None,
    windows: Annotated[int | None, typer.Option(min=1, help="At most so many windows.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; the checkpoint's own by default.")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(metavar="NAME,...", help="Measure these tasks of lm-eval instead of a text.")
    ] = None,
    tasks_data: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Local JSONL files for the tasks, in place of the Hub.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="The first so many documents of each task.")] = None,
    fewshot: Annotated[int | None, typer.Option(help="Examples in a prompt; the task's own number by default.")] = None,
    batch_size: Annotated[int, typer.Option(help="Prompts of the tasks, or of needles, run at once.")] = 8,
    suite: Annotated[
        str | None,
        typer.Option(metavar="long|standard", help="The cache over long contexts, or the standard tasks, instead."),
    ] = None,
    domain: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FILE", help="Measure each of these kinds of text by itself instead of --text."),
    ] = None,
    generate: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Have both continue N openings of the text, too.")
    ] = None,
    reliability: Annotated[
        Path | None, typer.Option(metavar="SVG", help="Draw how right the model is by how sure it is into this file.")
    ] = None,
    kv: Annotated[
        list[str] | None, typer.Option(metavar="YAML", help="A cache to measure: '{method: kivi, k_bits: 2}'.")
    ] = None,
    lengths: Annotated[
        str | None, typer.Option(metavar="N,...", help="Contexts of the long suite; 512,2048,8192 by default.")
    ] = None,
    depths: Annotated[int | None, typer.Option(help="Depths of a needle; 5 by default.")] = None,
    trials: Annotated[int | None, typer.Option(help="Needles for each length and depth; 4 by default.")] = None,
    prompt: Annotated[str | None, typer.Option(help="How needles are said: needle, comment, passkey.")] = None,
    chunk: Annotated[int | None, typer.Option(help="Tokens that go through the cache at once; 32 by default.")] = None,
    parts: Annotated[
        str | None,
        typer.Option("--measure", metavar="NAME,...", help="Of perplexity, needle, memory, speed (all), longbench."),
    ] = None,
    heat_map: Annotated[Path | None, typer.Option(metavar="SVG", help="Draw the needles found into this file.")] = None,
    json_: Json = False,
) -> None:
    """Perplexity, fidelity to the original, calibration, bits per weight and bytes; or, with --domain, the same on
    several kinds of text; or, with --tasks or --suite standard, standard tasks; or, with --suite long, what a quantized
    cache costs and saves.
    """
    check_dtype(dtype)
    _check_pictures(reliability, heat_map)
    long: dict[str, Any] = {
        "lengths": None if lengths is None else numbers("--lengths", lengths),
        "depths": depths,
        "trials": trials,
        "prompt": prompt,
        "chunk": chunk,
        "parts": None if parts is None else _names(parts),
    }
    asked = {name: value for name, value in long.items() if value is not None}
    if domain and (suite, tasks) != (None, None):
        raise ValueError("--domain measures texts alone; leave out --tasks and --suite, or measure those by themselves")
    if generate and (domain or tasks or suite):
        raise ValueError("--generate continues a text; leave it out with --domain, --tasks and --suite")
    if suite is not None and suite not in ("long", "standard"):
        raise ValueError(f"--suite {suite} is not known; there are 'long' and 'standard'")
    if suite == "standard" and tasks is not None:
        raise ValueError("--suite standard names its tasks itself; leave out --tasks, or --suite")
    if suite == "long":
        if reliability:
            raise ValueError("--reliability draws texts and tasks; leave it out with --suite long")
        if (baseline, fewshot, context_length) != (None,) * 3:
            raise ValueError(
                "--suite long compares caches of one model; leave out --baseline, --context-length and --fewshot"
            )
        longbench: dict[str, Any] = {
            "tasks": None if tasks is None else _names(tasks),
            "data": tasks_data,
            "limit": limit,
        }
        longbench = {name: value for name, value in longbench.items() if value is not None}
        if longbench and "longbench" not in asked.get("parts", ()):
            raise ValueError("--tasks, --tasks-data and --limit of --suite long go with --measure longbench")
        asked["longbench"] = LongBenchOptions(**longbench)
        if windows is not None:
            asked["windows"] = windows
        long_options = LongOptions(kv=kv or (), text=text, dtype=dtype, batch_size=batch_size, **asked)
        _evaluate_long(model, json_, heat_map, long_options)
        return
    if asked or heat_map:
        raise ValueError("--lengths, --depths, --trials, --prompt, --chunk, --measure, --heat-map go with --suite long")
    if tasks is not None or suite == "standard":
        if windows is not None or text != "wikitext2":
            raise ValueError(
                "--tasks measures tasks alone; leave out --text and --windows, or measure those by themselves"
            )
        from laconic.evaluation.tasks import evaluate_tasks

        task_options = TaskOptions(
            tasks=tasks.split(",") if tasks is not None else (),
            suite=suite,
            baseline=baseline,
            data=tasks_data,
            limit=limit,
            fewshot=fewshot,
            batch_size=batch_size,
            context_length=context_length,
            dtype=dtype,
            kv=kv or (),
            quiet=json_ or not err.is_terminal,
        )
        result = evaluate_tasks(model, task_options)
        _draw_reliability(result, reliability)
        _show_tasks(result, json_)
        return
    if kv:
        raise ValueError("--kv goes with --suite long, or with --tasks for one cache to generate with")
    if (tasks_data, limit, fewshot) != (None, None, None):
        raise ValueError("--tasks-data, --limit and --fewshot go with --tasks; name some, as in --tasks hellaswag")
    how: dict[str, Any] = {"baseline": baseline, "context_length": context_length, "windows": windows, "dtype": dtype}
    if domain:
        if text != "wikitext2":
            raise ValueError("--domain names the texts; leave out --text, or name it too, as in --domain web=FILE")
        from laconic.evaluation.domains import evaluate_domains, parse_domains

        result = evaluate_domains(model, DomainOptions(domains=parse_domains(domain), **how))
    else:
        from laconic.evaluation.text import evaluate_text

        result = evaluate_text(model, TextOptions(text=text, generate=generate or 0, **how))
    _draw_reliability(result, reliability)
    if json_:
        print_json(result)
        return
    from laconic.report.interval_table import interval_tables
    from laconic.report.table import results_table

    if not domain:
        out.print(results_table([result]))
    if generate:
        from laconic.report.samples_table import samples_table

        out.print(samples_table(result["samples"]))
    for table in interval_tables(result):
        out.print(table)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _show_tasks(result: dict[str, Any], json_: bool) -> None:
    """Raises: ValueError, when all is shown, where there are tasks that could not be measured."""
    if json_:
        print_json(result)
    else:
        from laconic.report.interval_table import interval_tables
        from laconic.report.task_table import tasks_table

        out.print(tasks_table(result))
        for table in interval_tables(result):
            out.print(table)
    if refused := list(result["refused"].values()):
        tasks = len(refused) + len(result["shots"])
        raise ValueError(f"{len(refused)} of {tasks} tasks not measured (the others are), the first: {refused[0]}")


def _check_pictures(*files: Path | None) -> None:
    """Before hours of measuring. Raises: ValueError for a file that no picture can be written to."""
    from laconic.checkpoint.atomic import check_writable

    for file in files:
        if file is not None:
            if file.suffix != ".svg":
                raise ValueError(f"pictures are SVG; give {file} a name that ends in .svg")
            check_writable(file)


def _draw_reliability(result: dict[str, Any], file: Path | None) -> None:
    """Draw a diagram into a file; of several, each into one with its name in it."""
    if file is None:
        return
    from laconic.checkpoint.atomic import write_text
    from laconic.evaluation.file_names import slug
    from laconic.report.chart import standalone
    from laconic.report.reliability import reliability_diagrams

    drawn = reliability_diagrams(result)
    if not drawn:
        err.print(
            "note: no task of several choices was measured, so --reliability has nothing to draw", highlight=False
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    for name, picture in drawn:
        write_text(file if len(drawn) == 1 else file.with_stem(f"{file.stem}-{slug([name])}"), standalone(picture))


def _evaluate_long(model: str, as_json: bool, picture: Path | None, options: LongOptions) -> None:
    if picture and "needle" not in options.measured:
        raise ValueError("--heat-map draws needles; leave out --measure, or name needle in it")
    from laconic.evaluation.long_context import evaluate_long

    if as_json or not err.is_terminal:
        result = evaluate_long(model, options)
    else:
        with err.status("") as status:
            result = evaluate_long(model, options, report=status.update)
    if picture:
        from laconic.report.heat_map import heat_map

        picture.parent.mkdir(parents=True, exist_ok=True)
        picture.write_text(heat_map(result))
    if as_json:
        print_json(result)
        return
    from laconic.report.long_table import long_caption, long_tables

    for table in long_tables(result):
        out.print(table)
    out.print(long_caption(result))
