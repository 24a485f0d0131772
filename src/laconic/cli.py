"""The command line: thin, one function a command. Exit codes: 0 done, 2 the user's mistake, 1 ours, 130 interrupted."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from laconic.cli_profile import profile
from laconic.console import Sweeping, Walking, err, in_bytes, out, print_json, print_plan, remarks, warn
from laconic.publishing import Json, card, push, refreshing

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Compress Hugging Face language models, and say honestly what it cost.",
)
bench = typer.Typer(no_args_is_help=True, help="What an artifact, or a shape, takes: time, bytes, energy.")
app.add_typer(bench, name="bench")
app.add_typer(profile, name="profile")
app.command()(card)
app.command()(push)
Sets = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Vary a recipe's key.")]


@app.command()
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
    from laconic.compression import prepare, run
    from laconic.engine.ranks import is_main

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


def _draw_training(folder: Path) -> None:
    """Draw the loss of each training beside its figures."""
    from laconic.engine.writer import write_text
    from laconic.report.chart import standalone
    from laconic.report.loss_curve import loss_curve

    for file in folder.glob("training-*.json"):
        write_text(file.with_suffix(".svg"), standalone(loss_curve(file.stem, json.loads(file.read_text()))))


@app.command("eval")
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
        str | None, typer.Option("--measure", metavar="NAME,...", help="Of perplexity, needle, memory, speed; all.")
    ] = None,
    heat_map: Annotated[Path | None, typer.Option(metavar="SVG", help="Draw the needles found into this file.")] = None,
    json_: Json = False,
) -> None:
    """Perplexity, fidelity to the original, calibration, bits per weight and bytes; or, with --domain, the same on
    several kinds of text; or, with --tasks or --suite standard, standard tasks; or, with --suite long, what a quantized
    cache costs and saves."""
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise ValueError(f"--dtype {dtype} is not one of float32, bfloat16, float16")
    long = {
        "lengths": None if lengths is None else _numbers("--lengths", lengths),
        "depths": depths,
        "trials": trials,
        "prompt": prompt,
        "chunk": chunk,
        "parts": None if parts is None else parts.split(","),
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
        if (baseline, tasks, tasks_data, limit, fewshot, context_length) != (None,) * 6:
            raise ValueError(
                "--suite long compares caches of one model; leave out --baseline, --context-length and the tasks"
            )
        if windows is not None:
            asked["windows"] = windows
        _evaluate_long(model, json_, heat_map, kv=kv or (), text=text, dtype=dtype, batch_size=batch_size, **asked)
        return
    if asked or heat_map:
        raise ValueError("--lengths, --depths, --trials, --prompt, --chunk, --measure, --heat-map go with --suite long")
    if tasks is not None or suite == "standard":
        if windows is not None or text != "wikitext2":
            raise ValueError(
                "--tasks measures tasks alone; leave out --text and --windows, or measure those by themselves"
            )
        from laconic.evaluate.harness import evaluate_tasks

        result = evaluate_tasks(
            model,
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
        _draw_reliability(result, reliability)
        if json_:
            print_json(result)
            return
        from laconic.report.interval_table import interval_tables
        from laconic.report.task_table import tasks_table

        out.print(tasks_table(result))
        for table in interval_tables(result):
            out.print(table)
        return
    if kv:
        raise ValueError("--kv goes with --suite long, or with --tasks for one cache to generate with")
    if (tasks_data, limit, fewshot) != (None, None, None):
        raise ValueError("--tasks-data, --limit and --fewshot go with --tasks; name some, as in --tasks hellaswag")
    how: dict[str, Any] = {"baseline": baseline, "context_length": context_length, "windows": windows, "dtype": dtype}
    if domain:
        if text != "wikitext2":
            raise ValueError("--domain names the texts; leave out --text, or name it too, as in --domain web=FILE")
        from laconic.evaluate.domains import evaluate_domains, read_domains

        result = evaluate_domains(model, read_domains(domain), **how)
    else:
        from laconic.evaluate.run import evaluate as measure

        result = measure(model, text=text, generate=generate or 0, **how)
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


def _draw_reliability(result: dict[str, Any], file: Path | None) -> None:
    """Draw a diagram into a file; of several, each into one with its name in it."""
    if file is None:
        return
    from laconic.engine.writer import write_text
    from laconic.report.chart import standalone
    from laconic.report.reliability import reliability_diagrams

    drawn = reliability_diagrams(result)
    if not drawn:
        err.print(
            "note: no task of several choices was measured, so --reliability has nothing to draw", highlight=False
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    for name, picture in drawn:
        slug = re.sub(r"[^\w+-]+", "_", name)
        write_text(file if len(drawn) == 1 else file.with_stem(f"{file.stem}-{slug}"), standalone(picture))


def _evaluate_long(model: str, as_json: bool, picture: Path | None, **asked: Any) -> None:
    if picture and "needle" not in asked.get("parts", ["needle"]):
        raise ValueError("--heat-map draws needles; leave out --measure, or name needle in it")
    from laconic.evaluate.long_context import evaluate_long

    if as_json or not err.is_terminal:
        result = evaluate_long(model, **asked)
    else:
        with err.status("") as status:
            result = evaluate_long(model, **asked, report=status.update)
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


@app.command()
def report(
    artifacts: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="Artifacts that were evaluated, or studies.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The HTML page to write.")] = Path(
        "laconic-report.html"
    ),
    pareto: Annotated[
        bool, typer.Option("--pareto", help="Sparsity and size against quality and speed, of one model's artifacts.")
    ] = False,
    json_: Json = False,
) -> None:
    """One self-contained HTML page, and a table, from artifacts and their results."""
    if pareto:
        from laconic.report.pareto import gather_points
        from laconic.report.pareto_page import pareto_table, write_pareto

        points, how = gather_points(artifacts)
        files = write_pareto(points, how, output)
        if json_:
            print_json({"files": [str(f.resolve()) for f in files], "points": [asdict(p) for p in points], **how})
            return
        out.print(pareto_table(points, how))
        out.print(f"page: {output.resolve()}", soft_wrap=True)
        return
    from laconic.report.gathered import gather
    from laconic.report.interval_table import interval_tables
    from laconic.report.long_table import long_tables
    from laconic.report.page import write_page
    from laconic.report.table import results_table
    from laconic.report.task_table import tasks_table

    found = gather(artifacts)
    files = write_page(found, output)
    if json_:
        said = {"page": str(output.resolve()), "files": [str(f.resolve()) for f in files]}
        print_json(said | {"artifacts": [str(a.path) for a in found]})
        return
    long = [r for a in found for r in a.long]
    evaluations = [r for a in found for r in a.evaluations]
    tasks = [r for a in found for r in a.tasks]
    domains = [r for a in found for r in a.domains]
    if evaluations or not (long or tasks or domains):
        out.print(results_table(evaluations))
    for result in tasks:
        out.print(tasks_table(result))
    for result in [] if any(a.values for a in found) else evaluations + domains + tasks:
        for table in interval_tables(result):
            table.title = str(result["model"]).rstrip("/").rpartition("/")[2]
            out.print(table)
    for result in long:
        out.print(long_tables(result)[0])
    out.print(f"page: {output.resolve()}", soft_wrap=True)


@app.command()
def sweep(
    study: Annotated[str, typer.Argument(metavar="STUDY.yaml", help="What is varied, and what is measured.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the runs, their results, the table.")],
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Vary a study's key.")] = None,
    dry_run: Annotated[bool, typer.Option(help="List the runs with what they would take, write nothing.")] = False,
    address: Annotated[str | None, typer.Option(help="A Ray cluster's; a Ray of this machine by default.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Run them all, even if they are more than 500.")] = False,
    json_: Json = False,
) -> None:
    """Compress and measure every variant of a recipe; run again after an interruption to go on where it stopped."""
    from laconic.report.sweep_table import plan_caption, plan_table, sweep_table
    from laconic.sweep.study import load_study
    from laconic.sweep.sweeping import dry_run as list_runs
    from laconic.sweep.sweeping import sweep as work_through

    asked = load_study(study, set_ or ())
    if dry_run:
        listed = list_runs(asked, output, yes=yes)
        if json_:
            print_json({"runs": listed})
            return
        out.print(plan_table(listed))
        out.print(plan_caption(listed), highlight=False, soft_wrap=True)
        return
    with Sweeping(quiet=json_) as progress:
        rows = work_through(asked, output, address=address, yes=yes, watch=progress)
    table = output / "results.parquet"
    if json_:
        print_json({"table": str(table.resolve()), "rows": rows})
    else:
        out.print(sweep_table(rows))
        out.print(f"table: {table.resolve()}", soft_wrap=True)
    failed = {row["run"]: row["error"] for row in rows if row["status"] == "failed"}
    if failed:
        runs = len({row["run"] for row in rows})
        raise ValueError(
            f"{len(failed)} of {runs} runs failed, the first: {next(iter(failed.values()))} (the others are measured; "
            "run the same command again to try those that failed)"
        )


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
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise ValueError(f"--dtype {dtype} is not one of float32, bfloat16, float16")
    if output is not None and output.suffix not in (".md", ".json"):
        raise ValueError(f"--output {output} is neither Markdown nor JSON; give it a name that ends in .md or .json")
    from laconic.bench.sparsity import bench_sparsity as measure
    from laconic.report.bench_table import bench_tables, write_bench

    asked: dict[str, Any] = {
        "baseline": baseline,
        "shapes": shapes,
        "scaled_to": scaled,
        "sparsities": _numbers("--sparsity", sparsity, float),
        "block": block,
        "kinds": kinds.split(","),
        "batches": _numbers("--batch", batch),
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


@app.command()
def inspect(model: Annotated[str, typer.Argument(metavar="DIR")], json_: Json = False) -> None:
    """What a checkpoint holds: schemes, bits per weight, bytes, its recipe, its worst linears."""
    from laconic.engine.artifact import Artifact
    from laconic.model.load import model_folder
    from laconic.model.size import measure_size

    folder = model_folder(model)
    size, artifact = measure_size(folder), Artifact(folder)
    linears = [e for e in artifact.log if e.get("event") == "linear"]
    worst = sorted(linears, key=lambda e: -e.get("output_error", e["weight_error"]))[:5]
    if json_:
        print_json({**asdict(size), "recipe": artifact.recipe, "linears": linears})
        return
    table = Table(show_header=False, box=None)
    table.add_row("weights", in_bytes(size.file_bytes))
    table.add_row("parameters", f"{size.parameters:,}")
    table.add_row("bits per weight", f"{size.bits_per_weight:.2f} (embeddings, head, scales included)")
    table.add_row("quantized", f"{size.covered:.1%} of parameters")
    table.add_row("schemes", ", ".join(f"{n} x {s}" for s, n in size.schemes.items()) or "none")
    table.add_row("arithmetic", "simulated (no engine has it)" if size.simulated else "that of the engine")
    for event in worst:
        kind = "output" if "output_error" in event else "weight"
        table.add_row(
            "largest error",
            f"{event['linear']}: {event.get('output_error', event['weight_error']):.2e} of {kind}",
        )
    out.print(table)


@app.command("ls")
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


@app.command()
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


def main() -> None:
    """The entry point: every error of the user's is one line and exit code 2."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    for noisy in ("transformers", "huggingface_hub", "datasets", "httpx", "lm_eval"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        # Typer catches an interruption itself, and returns the exit code for it.
        if app(standalone_mode=False) == 130:
            raise KeyboardInterrupt
    except (KeyboardInterrupt, typer.Abort):
        err.print("interrupted; run the same command again to go on where it stopped", soft_wrap=True)
        sys.exit(130)
    except ValueError as e:
        _complain(str(e))
    except OSError as e:
        _complain(f"{e.strerror or e}: {e.filename}" if e.filename else str(e))
    except Exception as e:
        if hasattr(e, "format_message"):  # what click says of the command line itself
            _complain(e.format_message() or "name a command")
        err.print_exception()
        sys.exit(1)


def _complain(message: str) -> None:
    err.print(f"laconic: {' '.join(message.split())}", style="red", highlight=False, soft_wrap=True)
    sys.exit(2)


def _numbers(option: str, text: str, kind: type = int) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError as e:
        example = "512,2048" if kind is int else "0.5,0.8"
        raise ValueError(f"{option} {text} is no list of numbers; write it as in {option} {example}") from e


def _weights(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.glob("*.safetensors"))
