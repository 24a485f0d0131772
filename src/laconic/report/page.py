"""One self-contained HTML page: no network, one file, readable on a phone, in the dark, and in print."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, select_autoescape
from plotly.offline import get_plotlyjs

from laconic.engine.artifact import Artifact
from laconic.engine.writer import write_text
from laconic.report.interval_table import interval_caption, interval_rows
from laconic.report.long_plots import long_plots
from laconic.report.long_table import long_caption, long_rows
from laconic.report.loss_curve import loss_curve
from laconic.report.plots import error_plot, fragments, size_plot
from laconic.report.reliability import reliability_diagrams
from laconic.report.table import COLUMNS, caption, cells
from laconic.report.task_table import task_rows, tasks_caption


@dataclass(frozen=True)
class Evaluated:
    """An artifact and what was measured of it."""

    path: Path
    recipe: dict[str, Any] | None
    log: list[dict[str, Any]]
    compression: dict[str, Any] | None
    evaluations: list[dict[str, Any]]
    tasks: list[dict[str, Any]]
    long: list[dict[str, Any]]
    training: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    domains: list[dict[str, Any]] = field(default_factory=list)

    @property
    def with_intervals(self) -> list[dict[str, Any]]:
        """Results whose figures have intervals."""
        return [r for r in (*self.evaluations, *self.domains, *self.tasks) if "intervals" in r]


def gather(folders: list[Path]) -> list[Evaluated]:
    """Read artifacts. Raises: ValueError for a folder that is none, or a result that cannot be read."""
    found = []
    for folder in folders:
        artifact, results = Artifact.measured(folder)
        evaluations = [r for name, r in results.items() if name.startswith("eval-")]
        tasks = [r for name, r in results.items() if name.startswith("tasks-")]
        long = [r for name, r in results.items() if name.startswith("long-")]
        training = [(n.removeprefix("training-"), r) for n, r in results.items() if n.startswith("training-")]
        domains = [r for name, r in results.items() if name.startswith("domains-")]
        compression = results.get("compress")
        measured = (evaluations, tasks, long, training, domains)
        found.append(Evaluated(folder, artifact.recipe, artifact.log, compression, *measured))
    if not any(a.evaluations or a.domains or a.tasks or a.long or a.training for a in found):
        raise ValueError("none of these artifacts was evaluated; run 'laconic eval DIR --baseline MODEL' first")
    return found


def write_page(artifacts: list[Evaluated], file: Path) -> None:
    """Write the page, whole or not at all. Raises: ValueError for a file that is no page."""
    if file.suffix not in (".html", ".htm"):
        raise ValueError(f"the report is a page of HTML; give {file} a name that ends in .html")
    environment = Environment(
        loader=PackageLoader("laconic.report"),
        autoescape=select_autoescape(),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    results = [r for a in artifacts for r in a.evaluations]
    plots = fragments(size_plot(results), error_plot(artifacts))
    html = environment.get_template("page.html").render(
        columns=COLUMNS,
        rows=[cells(r) for r in results],
        caption=caption(results),
        headline=_headline(artifacts),
        artifacts=artifacts,
        task_rows=task_rows,
        tasks_caption=tasks_caption,
        interval_rows=interval_rows,
        interval_caption=interval_caption,
        reliability_diagrams=reliability_diagrams,
        recipe_text=lambda a: yaml.safe_dump(a.recipe, sort_keys=False) if a.recipe else "",
        long_rows=long_rows,
        loss_curve=loss_curve,
        trained=_trained,
        long_caption=long_caption,
        plots=plots,
        long_plots=lambda result: fragments(*long_plots(result)),
        script=get_plotlyjs() if plots or any(a.long for a in artifacts) else "",
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, html)


def _trained(method: str, result: dict[str, Any]) -> str:
    """A training in a sentence without its stop."""
    held = {m["step"]: m["loss"] for m in result["held_out"]}
    said = f"{method}: {result['steps']} steps in {result['seconds']:.0f} s"
    return said + (f", held-out loss {held[0]:.4f} -> {held[result['best_step']]:.4f}" if held else "")


def _headline(artifacts: list[Evaluated]) -> str:
    """The first result in a sentence."""
    results = [r for a in artifacts for r in a.evaluations]
    domains = [r for a in artifacts for r in a.domains]
    if domains and not results and not any(a.tasks or a.long for a in artifacts):
        said = f"Measured on {len(domains[0]['domains'])} kinds of text"
        return said + (f"; most is lost on {domains[0]['worst']}." if domains[0]["worst"] else ".")
    if not any(a.evaluations or a.tasks or a.long for a in artifacts):
        return _trained(*next(t for a in artifacts for t in a.training)) + "."
    if not results and not any(a.tasks for a in artifacts):
        return f"The cache of keys and values, measured over {len(artifacts[0].long[0]['lengths'])} lengths of context."
    if not results:
        tasks = next(t for a in artifacts for t in a.tasks)
        recovery = tasks["mean_recovery"]
        return f"{len(tasks['rows'])} measures of tasks" + (f"; mean recovery {recovery:.1%}." if recovery else ".")
    r = results[0]
    said = f"{r['bits_per_weight']:.2f} bits per weight"
    if r.get("baseline_file_bytes"):
        said = f"{r['baseline_file_bytes'] / r['file_bytes']:.2f} times smaller, {said}"
    if r["baseline_perplexity"]:
        change = r["perplexity"] / r["baseline_perplexity"] - 1
        said += (
            f"; perplexity {change:+.1%}, the same next token as the original in {r['top1_agreement']:.1%} of places"
        )
    return said + "."
