"""`laconic sweep`: the runs of a study."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from laconic.checkpoint.trust import Trust
from laconic.cli.console import SweepProgress, out, print_json
from laconic.cli.options import Json, Pickle, RemoteCode


def sweep(
    study: Annotated[
        str, typer.Argument(metavar="STUDY.yaml", help="The file that says what varies and what is measured.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the runs, their results and their table.")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the study.")
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="List the runs with their size and memory, and write nothing.")] = False,
    address: Annotated[
        str | None, typer.Option(help="Address of a Ray cluster; by default a Ray on this machine.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Run all of them, even if they are more than 500.")] = False,
    trust_remote_code: RemoteCode = False,
    allow_pickle: Pickle = False,
    json_: Json = False,
) -> None:
    """Compress and measure every variant of a recipe; run again after an interruption to resume."""
    from laconic.report.sweep_table import plan_caption, plan_table, sweep_table
    from laconic.sweep.runner import dry_run as list_runs
    from laconic.sweep.runner import sweep as run_study
    from laconic.sweep.study import load_study

    trust = Trust(trust_remote_code, allow_pickle)
    config = load_study(study, set_ or ())
    if dry_run:
        runs = list_runs(config, output, yes=yes, trust=trust)
        if json_:
            print_json({"runs": runs})
            return
        out.print(plan_table(runs))
        out.print(plan_caption(runs), highlight=False, soft_wrap=True)
        return
    with SweepProgress(quiet=json_) as progress:
        rows = run_study(config, output, address=address, yes=yes, trust=trust, report=progress)
    table = output / "results.parquet"
    if json_:
        print_json({"table": str(table.resolve()), "rows": rows})
    else:
        out.print(sweep_table(rows))
        out.print(f"table: {table.resolve()}", soft_wrap=True)
    failed = {row["run"]: row["error"] for row in rows if row["status"] == "failed"}
    if failed:
        total = len({row["run"] for row in rows})
        raise ValueError(
            f"{len(failed)} of {total} runs failed, the first: {next(iter(failed.values()))} (the others are measured; "
            "run the same command again to try those that failed)"
        )
