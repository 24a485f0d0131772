"""The commands that read what artifacts hold: `laconic report`, `laconic inspect`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from laconic.cli.console import in_bytes, out, print_json
from laconic.cli.options import Json


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


def inspect(model: Annotated[str, typer.Argument(metavar="DIR")], json_: Json = False) -> None:
    """What a checkpoint holds: schemes, bits per weight, bytes, its recipe, its worst linears."""
    from laconic.artifact.artifact import Artifact
    from laconic.artifact.size import measure_size
    from laconic.checkpoint.source import model_folder

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
