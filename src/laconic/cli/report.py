"""The commands that show artifacts and their results: `laconic report`, `laconic inspect`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from laconic.checkpoint.trust import Trust
from laconic.cli.console import out, print_json
from laconic.cli.options import Json, Pickle, RemoteCode
from laconic.pipeline.preview import format_bytes


def report(
    artifacts: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="Artifacts that were evaluated, or studies.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The HTML page to write.")] = Path(
        "laconic-report.html"
    ),
    pareto: Annotated[
        bool,
        typer.Option("--pareto", help="Plot quality and speed over sparsity and size, for artifacts of one model."),
    ] = False,
    json_: Json = False,
) -> None:
    """Write one self-contained HTML page, and print a table, of artifacts and their results."""
    if pareto:
        from laconic.report.pareto import gather_points
        from laconic.report.pareto_page import pareto_table, write_pareto

        points, settings = gather_points(artifacts)
        files = write_pareto(points, settings, output)
        if json_:
            print_json({"files": [str(f.resolve()) for f in files], "points": [asdict(p) for p in points], **settings})
            return
        out.print(pareto_table(points, settings))
        out.print(f"page: {output.resolve()}", soft_wrap=True)
        return
    from laconic.report.bench_table import bench_tables
    from laconic.report.entries import read_entries
    from laconic.report.interval_table import interval_tables
    from laconic.report.long_table import long_tables
    from laconic.report.page import write_page
    from laconic.report.table import results_table
    from laconic.report.task_table import tasks_table

    measured = read_entries(artifacts)
    files = write_page(measured, output)
    if json_:
        paths = {"page": str(output.resolve()), "files": [str(f.resolve()) for f in files]}
        print_json(paths | {"artifacts": [str(a.path) for a in measured]})
        return
    long = [r for a in measured for r in a.long]
    evaluations = [r for a in measured for r in a.evaluations]
    tasks = [r for a in measured for r in a.tasks]
    domains = [r for a in measured for r in a.domains]
    servings = [r for a in measured for r in a.servings]
    if evaluations or not (long or tasks or domains or servings):
        out.print(results_table(evaluations))
    for result in tasks:
        out.print(tasks_table(result))
    for result in [] if any(a.values for a in measured) else evaluations + domains + tasks:
        for table in interval_tables(result):
            table.title = str(result["model"]).rstrip("/").rpartition("/")[2]
            out.print(table)
    for result in long:
        out.print(long_tables(result)[0])
    for result in servings:
        for table in bench_tables(result):
            out.print(table)
    out.print(f"page: {output.resolve()}", soft_wrap=True)


def inspect(
    model: Annotated[str, typer.Argument(metavar="DIR", help="An artifact, or any model.")],
    trust_remote_code: RemoteCode = False,
    allow_pickle: Pickle = False,
    json_: Json = False,
) -> None:
    """Show a checkpoint: schemes, bits per weight, bytes, its recipe, its linears with the largest errors."""
    from laconic.artifact.artifact import Artifact
    from laconic.artifact.size import measure_size
    from laconic.checkpoint.source import model_folder

    trust = Trust(trust_remote_code, allow_pickle)
    folder = model_folder(model, trust=trust)
    size, artifact = measure_size(folder, trust=trust), Artifact(folder)
    linears = [e for e in artifact.log if e.get("event") == "linear"]
    worst = sorted(linears, key=lambda e: -e.get("output_error", e["weight_error"]))[:5]
    if json_:
        print_json({**asdict(size), "recipe": artifact.recipe, "linears": linears})
        return
    table = Table(show_header=False, box=None)
    table.add_row("weights", format_bytes(size.file_bytes))
    table.add_row("parameters", f"{size.parameters:,}")
    table.add_row("bits per weight", f"{size.bits_per_weight:.2f} (embeddings, head, scales included)")
    table.add_row("quantized", f"{size.covered:.1%} of parameters")
    table.add_row("schemes", ", ".join(f"{n} x {s}" for s, n in size.schemes.items()) or "none")
    if size.adapter_bytes:
        table.add_row("adapter", f"{format_bytes(size.adapter_bytes)} beside the weights")
    table.add_row("arithmetic", "simulated (no engine has it)" if size.simulated else "that of the engine")
    for event in worst:
        kind = "output" if "output_error" in event else "weight"
        table.add_row(
            "largest error",
            f"{event['linear']}: {event.get('output_error', event['weight_error']):.2e} of {kind}",
        )
    out.print(table)
