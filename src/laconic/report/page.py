"""The report: one HTML file without network access, for phones, dark mode and print, plus Markdown and CSV tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, select_autoescape

from laconic.checkpoint.atomic import created_folder, write_text
from laconic.report.bench_table import markdown
from laconic.report.criteria import checklist
from laconic.report.entries import ReportEntry
from laconic.report.headline_table import as_csv, dominated_entries, headline_rows, task_matrix
from laconic.report.interval_table import interval_caption, interval_rows
from laconic.report.long_plots import long_plots
from laconic.report.long_table import long_caption, long_rows
from laconic.report.loss_curve import loss_curve
from laconic.report.plots import ablations, bit_map, comparable, error_map, size_front, speed_front
from laconic.report.reliability import reliability_diagrams
from laconic.report.serving_table import serving_caption, serving_tables
from laconic.report.table import caption
from laconic.report.task_table import task_rows, tasks_caption

# Largest number of artifacts with heat maps and details.
_MAX_DETAILS = 8


def write_page(entries: Sequence[ReportEntry], file: Path) -> list[Path]:
    """Write the page and its tables, each file atomically.

    Args:
        entries: Entries of `read_entries`.
        file: The HTML file; the tables get its name with the suffixes .md and .csv.

    Returns:
        The three files.

    Raises:
        ValueError: The name of the file does not end in .html or .htm.
    """
    check_page(file)
    contents = {
        file: _html(entries),
        file.with_suffix(".md"): _markdown(entries),
        file.with_suffix(".csv"): as_csv(entries),
    }
    with created_folder(file):
        for path, text in contents.items():
            write_text(path, text)
    return list(contents)


def _html(entries: Sequence[ReportEntry]) -> str:
    rows, dominated = headline_rows(entries), dominated_entries(entries)
    detailed = _detailed(entries, dominated)
    template = environment().get_template("page.html")
    return template.render(
        headline=_headline(entries, detailed),
        rows=list(zip(rows, entries, dominated, strict=True)),
        columns=list(rows[0]),
        several=len(entries) > 1,
        caption=caption([r for e in entries for r in e.evaluations]),
        plots=[p for p in (size_front(entries), speed_front(entries), *ablations(entries)) if p],
        task_table=task_matrix(entries),
        left_out=_left_out(entries),
        checklist=checklist([e for e in entries if e.measured]),
        maps=[m for e in detailed for m in (bit_map(e), error_map(e)) if m],
        samples=_samples(detailed),
        details=[e for e in entries if e.measured] if len(entries) <= _MAX_DETAILS else detailed,
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
        serving_tables=serving_tables,
        serving_caption=serving_caption,
        loss_curve=loss_curve,
        describe_training=_describe_training,
        recipe_text=lambda e: yaml.safe_dump(e.recipe, sort_keys=False) if e.recipe else "",
    )


def _markdown(entries: Sequence[ReportEntry]) -> str:
    criteria = checklist([e for e in entries if e.measured])
    verdicts = "\n".join(
        f"- {title}: {'; '.join(f'**{s}**, {text}' for s, text in lines)}" for title, lines in criteria
    )
    commands = "```\n" + "\n".join(_commands(entries)) + "\n```"
    setting = caption([r for e in entries for r in e.evaluations]) + "."
    tables = [markdown(rows) for rows in (headline_rows(entries), task_matrix(entries)) if rows]
    return "\n\n".join([tables[0], setting, *tables[1:], verdicts, commands]) + "\n"


def check_page(file: Path) -> None:
    """Check the name of an HTML file.

    Args:
        file: The file.

    Raises:
        ValueError: The name does not end in .html or .htm.
    """
    if file.suffix not in (".html", ".htm"):
        raise ValueError(f"the report is an HTML page; give {file} a name that ends in .html")


def environment() -> Environment:
    """Return the Jinja environment of the templates."""
    return Environment(
        loader=PackageLoader("laconic.report"), autoescape=select_autoescape(), trim_blocks=True, lstrip_blocks=True
    )


def _detailed(entries: Sequence[ReportEntry], dominated: Sequence[bool]) -> list[ReportEntry]:
    """Return the entries to show in detail: all of them, or those with the lowest KL that no other dominates."""
    measured = [(e, d) for e, d in zip(entries, dominated, strict=True) if e.measured]
    if len(measured) <= _MAX_DETAILS:
        return [e for e, _ in measured]
    front = [e for e, d in measured if not d]
    return sorted(front, key=lambda e: (e.quality or {}).get("kl_mean") or 0.0)[:_MAX_DETAILS]


def _left_out(entries: Sequence[ReportEntry]) -> list[str]:
    """Return the names of entries that were measured in another setting than most."""
    shown = {e.name for e in comparable(entries)}
    return [e.name for e in entries if shown and e.quality and e.name not in shown]


def _commands(entries: Sequence[ReportEntry]) -> list[str]:
    """Return the commands that made and measured the entries, each once."""
    compressions = [e.compression["command"] for e in entries if e.compression and e.compression.get("command")]
    return list(
        dict.fromkeys([*compressions, *(r["command"] for e in entries for r in e.measurements if r.get("command"))])
    )


def _environment(entries: Sequence[ReportEntry]) -> str:
    """Return versions and devices of the compressions, each once."""
    lines: dict[str, None] = {}
    for compression in (e.compression for e in entries if e.compression):
        versions = ", ".join(f"{name} {v}" for name, v in (compression.get("versions") or {}).items())
        lines[f"{versions}; {compression.get('device', '')}, {compression.get('threads', '?')} threads"] = None
    return " / ".join(lines)


def _samples(entries: Sequence[ReportEntry]) -> list[dict[str, Any]]:
    """Group generated text by prompt: the continuation of the original, then that of each artifact."""
    by_prompt: dict[str, dict[str, Any]] = {}
    for e in entries:
        for result in e.samples:
            for sample in result["samples"]:
                row = by_prompt.setdefault(sample["prompt"], {"prompt": sample["prompt"], "continuations": []})
                if result["baseline"] and not row["continuations"]:
                    row["continuations"].append(("original", sample["original"]))
                row["continuations"].append((e.name, sample["written"]))
    return list(by_prompt.values())


def _describe_training(method: str, result: dict[str, Any]) -> str:
    """Describe a training in a sentence without its full stop."""
    held_out = {m["step"]: m["loss"] for m in result["held_out"]}
    text = f"{method}: {result['steps']} steps in {result['seconds']:.0f} s"
    return text + (f", held-out loss {held_out[0]:.4f} -> {held_out[result['best_step']]:.4f}" if held_out else "")


def _headline(entries: Sequence[ReportEntry], detailed: Sequence[ReportEntry]) -> str:
    """Summarize the report in one or two sentences."""
    with_kl = [e for e in entries if e.quality and e.quality["kl_mean"] is not None]
    if len(with_kl) > 1:
        best = min((e for e in with_kl if e.quality), key=lambda e: (e.quality or {})["kl_mean"])
        failed = sum(e.error is not None for e in entries)
        count = f"{len(entries)} artifacts" + (f", {failed} of which failed" if failed else "")
        front = sum(not dominated for dominated in dominated_entries(with_kl))
        return f"{count}; {front} Pareto-optimal. Lowest KL ({best.name}): {_describe(best)}"
    one = next((e for e in detailed if e.quality), None)
    if one:
        return _describe(one)
    return _headline_without_evaluation(detailed[0])


def _headline_without_evaluation(first: ReportEntry) -> str:
    if first.tasks:
        retention = first.tasks[0]["mean_retention"]
        return f"{len(first.tasks[0]['rows'])} task metrics" + (
            f"; mean retention {retention:.1%}." if retention else "."
        )
    if first.domains:
        text = f"Measured on {len(first.domains[0]['domains'])} domains"
        return text + (f"; largest loss on {first.domains[0]['worst']}." if first.domains[0]["worst"] else ".")
    if first.servings:
        speed = first.speed
        return "Served in an engine" + (
            f", where it decodes {speed:.2f} times as fast as the original." if speed else "."
        )
    if first.long:
        return f"Key-value cache, measured at {len(first.long[0]['lengths'])} context lengths."
    return _describe_training(*first.training[0]) + "." if first.training else "Measured."


def _describe(entry: ReportEntry) -> str:
    r = entry.quality
    assert r is not None
    text = f"{r['bits_per_weight']:.2f} bits per weight"
    if r.get("baseline_file_bytes"):
        text = f"{r['baseline_file_bytes'] / r['file_bytes']:.2f} times smaller, {text}"
    if r["baseline_perplexity"]:
        change = r["perplexity"] / r["baseline_perplexity"] - 1
        text += f"; perplexity {change:+.1%}, top-1 agreement with the original {r['top1_agreement']:.1%}"
    return text + "."
