"""One self-contained HTML page: no network, one file, readable on a phone, in the dark, and in print; its table as
Markdown and CSV beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, select_autoescape

from laconic.checkpoint.atomic import write_text
from laconic.report.bench_table import markdown
from laconic.report.criteria import checklist
from laconic.report.gathered import Evaluated
from laconic.report.headline_table import as_csv, beaten, headline_rows, task_matrix
from laconic.report.interval_table import interval_caption, interval_rows
from laconic.report.long_plots import long_plots
from laconic.report.long_table import long_caption, long_rows
from laconic.report.loss_curve import loss_curve
from laconic.report.plots import ablations, bit_map, comparable, error_map, size_front, speed_front
from laconic.report.reliability import reliability_diagrams
from laconic.report.table import caption
from laconic.report.task_table import task_rows, tasks_caption

# Maps and checklists are drawn of so many artifacts, those first that no other beats.
_SHOWN = 8


def write_page(entries: Sequence[Evaluated], file: Path) -> list[Path]:
    """Write the page and its tables, each whole or not at all.

    Returns: all three. Raises: ValueError for a file that is no page.
    """
    check_page(file)
    rows, out = headline_rows(entries), beaten(entries)
    chosen = _chosen(entries, out)
    html = (
        environment()
        .get_template("page.html")
        .render(
            headline=_headline(entries, chosen),
            rows=list(zip(rows, entries, out, strict=True)),
            columns=list(rows[0]),
            several=len(entries) > 1,
            caption=caption([r for e in entries for r in e.evaluations]),
            plots=[p for p in (size_front(entries), speed_front(entries), *ablations(entries)) if p],
            task_table=task_matrix(entries),
            left_out=_left_out(entries),
            chosen=chosen,
            checklist=checklist([e for e in entries if e.measured]),
            maps=[m for e in chosen for m in (bit_map(e), error_map(e)) if m],
            samples=_samples(chosen),
            details=[e for e in entries if e.measured] if len(entries) <= _SHOWN else chosen,
            commands=_commands(entries),
            environment=_environment(entries),
            task_rows=task_rows,
            tasks_caption=tasks_caption,
            interval_rows=interval_rows,
            interval_caption=interval_caption,
            reliability_diagrams=reliability_diagrams,
            long_rows=long_rows,
            long_caption=long_caption,
            long_plots=long_plots,
            loss_curve=loss_curve,
            trained=_trained,
            recipe_text=lambda e: yaml.safe_dump(e.recipe, sort_keys=False) if e.recipe else "",
        )
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    table, numbers = file.with_suffix(".md"), file.with_suffix(".csv")
    write_text(file, html)
    commands = "```\n" + "\n".join(_commands(entries)) + "\n```"
    measured_on = caption([r for e in entries for r in e.evaluations]) + "."
    bars = checklist([e for e in entries if e.measured])
    reached = "\n".join(f"- {title}: {'; '.join(f'**{s}**, {said}' for s, said in lines)}" for title, lines in bars)
    tasks = [markdown(rows) for rows in [task_matrix(entries)] if rows]
    write_text(table, "\n\n".join([markdown(rows), measured_on, *tasks, reached, commands]) + "\n")
    write_text(numbers, as_csv(entries))
    return [file, table, numbers]


def check_page(file: Path) -> None:
    """Raises: ValueError for a file that is no page."""
    if file.suffix not in (".html", ".htm"):
        raise ValueError(f"the report is a page of HTML; give {file} a name that ends in .html")


def environment() -> Environment:
    """Of the templates."""
    return Environment(
        loader=PackageLoader("laconic.report"), autoescape=select_autoescape(), trim_blocks=True, lstrip_blocks=True
    )


def _chosen(entries: Sequence[Evaluated], out: Sequence[bool]) -> list[Evaluated]:
    """Those to look at closely."""
    measured = [(e, b) for e, b in zip(entries, out, strict=True) if e.measured]
    if len(measured) <= _SHOWN:
        return [e for e, _ in measured]
    kept = [e for e, b in measured if not b]
    return sorted(kept, key=lambda e: (e.quality or {}).get("kl_mean") or 0.0)[:_SHOWN]


def _left_out(entries: Sequence[Evaluated]) -> list[str]:
    """Artifacts that were compared, but not on what most were."""
    shown = {e.name for e in comparable(entries)}
    return [e.name for e in entries if shown and e.quality and e.name not in shown]


def _commands(entries: Sequence[Evaluated]) -> list[str]:
    """What was typed to get all of it, each once."""
    made = [e.compression["command"] for e in entries if e.compression and e.compression.get("command")]
    return list(dict.fromkeys([*made, *(r["command"] for e in entries for r in e.everything if r.get("command"))]))


def _environment(entries: Sequence[Evaluated]) -> str:
    """Versions and machines, each once."""
    found: dict[str, None] = {}
    for made in (e.compression for e in entries if e.compression):
        versions = ", ".join(f"{name} {v}" for name, v in (made.get("versions") or {}).items())
        found[f"{versions}; {made.get('device', '')}, {made.get('threads', '?')} threads"] = None
    return " / ".join(found)


def _samples(entries: Sequence[Evaluated]) -> list[dict[str, Any]]:
    """Continuations side by side: of each prompt what the original wrote, and each artifact."""
    by_prompt: dict[str, dict[str, Any]] = {}
    for e in entries:
        for result in e.samples:
            for sample in result["samples"]:
                row = by_prompt.setdefault(sample["prompt"], {"prompt": sample["prompt"], "written": []})
                if result["baseline"] and not row["written"]:
                    row["written"].append(("original", sample["original"]))
                row["written"].append((e.name, sample["written"]))
    return list(by_prompt.values())


def _trained(method: str, result: dict[str, Any]) -> str:
    """A training in a sentence without its stop."""
    held = {m["step"]: m["loss"] for m in result["held_out"]}
    said = f"{method}: {result['steps']} steps in {result['seconds']:.0f} s"
    return said + (f", held-out loss {held[0]:.4f} -> {held[result['best_step']]:.4f}" if held else "")


def _headline(entries: Sequence[Evaluated], chosen: Sequence[Evaluated]) -> str:
    """The first thing to know, in a sentence."""
    compared = [e for e in entries if e.quality and e.quality["kl_mean"] is not None]
    if len(compared) > 1:
        best = min((e for e in compared if e.quality), key=lambda e: (e.quality or {})["kl_mean"])
        failed = sum(e.error is not None for e in entries)
        said = f"{len(entries)} artifacts" + (f", {failed} of which failed" if failed else "")
        kept = sum(not b for b in beaten(compared))
        return f"{said}; {kept} are beaten by no other. The least KL has {best.name}: {_said_of(best)}"
    one = next((e for e in chosen if e.quality), None)
    if one:
        return _said_of(one)
    first = chosen[0]
    if first.tasks:
        retention = first.tasks[0]["mean_retention"]
        return f"{len(first.tasks[0]['rows'])} measures of tasks" + (
            f"; mean retention {retention:.1%}." if retention else "."
        )
    if first.domains:
        said = f"Measured on {len(first.domains[0]['domains'])} kinds of text"
        return said + (f"; most is lost on {first.domains[0]['worst']}." if first.domains[0]["worst"] else ".")
    if first.long:
        return f"The cache of keys and values, measured over {len(first.long[0]['lengths'])} lengths of context."
    return _trained(*first.training[0]) + "." if first.training else "Measured."


def _said_of(entry: Evaluated) -> str:
    r = entry.quality
    assert r is not None
    said = f"{r['bits_per_weight']:.2f} bits per weight"
    if r.get("baseline_file_bytes"):
        said = f"{r['baseline_file_bytes'] / r['file_bytes']:.2f} times smaller, {said}"
    if r["baseline_perplexity"]:
        change = r["perplexity"] / r["baseline_perplexity"] - 1
        said += (
            f"; perplexity {change:+.1%}, the same next token as the original in {r['top1_agreement']:.1%} of places"
        )
    return said + "."
