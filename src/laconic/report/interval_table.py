"""Tables of metrics with confidence intervals, for the terminal and for reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table


def interval_tables(result: Mapping[str, Any]) -> list[Table]:
    """Return the terminal tables of a result of `laconic eval`; empty for a result without intervals.

    Args:
        result: Result of `laconic eval text`, `domains` or `tasks`.
    """
    tables = []
    for rows in interval_rows(result):
        table = Table(box=box.SIMPLE, caption=interval_caption(result), caption_justify="left", pad_edge=False)
        for i, column in enumerate(rows[0]):
            table.add_column(column, justify="right" if i else "left", overflow="fold")
        for row in rows:
            table.add_row(*row.values())
        tables.append(table)
    return tables


def interval_rows(result: Mapping[str, Any]) -> list[list[dict[str, str]]]:
    """Return the formatted cells of each table, by column.

    Args:
        result: Result of `laconic eval text`, `domains` or `tasks`.
    """
    if "intervals" not in result:
        return []
    if "domains" in result:
        return [[_domain(row) for row in result["domains"]]]
    if "tasks" in result:
        shown = [_task(row) for row in result["rows"] if row.get("interval")]
        for row in result["calibration"]:
            shown += _calibration(row, f"{row['task']}: ")
        return [shown] if shown else []
    return [_text(result)]


def interval_caption(result: Mapping[str, Any]) -> str:
    """Describe how the intervals were computed.

    Args:
        result: A result with intervals.

    Returns:
        The description, in one line.
    """
    settings = result["intervals"]
    unit = settings["over"]
    text = f"[{settings['level']:.0%} interval], {settings['resamples']} resamples of {unit}, seed {settings['seed']}"
    if result["baseline"] is not None:
        text += f"; differences paired by {unit}, not significant where the interval contains 0"
    if "domains" in result:
        text += f"; {result['context_length']} tokens per window, {result['dtype']}"
    return text + ". ↓: lower is better"


def _text(result: Mapping[str, Any]) -> list[dict[str, str]]:
    calibration = result["calibration"]
    if result["baseline"] is None:
        first = {"metric": "perplexity ↓", "value": _format(result, "perplexity")}
        return [first, *_calibration(calibration, "next token: ")]
    perplexity = {
        "metric": "perplexity ↓",
        "original": _format(result, "baseline_perplexity"),
        "compressed": _format(result, "perplexity"),
        "difference": _with_interval(
            result["perplexity"] - result["baseline_perplexity"], result["perplexity_difference_interval"], "+"
        ),
    }
    kl = {"metric": "KL to the original ↓", "original": "0", "compressed": _format(result, "kl_mean")}
    same = {"metric": "same top-1", "original": "1", "compressed": _format(result, "top1_agreement")}
    return [perplexity, *({**row, "difference": ""} for row in (kl, same)), *_calibration(calibration, "next token: ")]


def _calibration(row: Mapping[str, Any], prefix: str) -> list[dict[str, str]]:
    rows = []
    for name, title in (("ece", "ECE ↓"), ("brier", "Brier ↓")):
        cells = {"metric": prefix + title}
        if f"baseline_{name}" not in row:
            rows.append(cells | {"value": _format(row, name)})
            continue
        rows.append(
            cells
            | {
                "original": _format(row, f"baseline_{name}"),
                "compressed": _format(row, name),
                "difference": _with_interval(row[f"{name}_difference"], row[f"{name}_difference_interval"], "+"),
            }
        )
    return rows


def _task(row: Mapping[str, Any]) -> dict[str, str]:
    cells = {"metric": f"{row['task']}: {row['metric']}" + ("" if row["higher_is_better"] else " ↓")}
    value = _with_interval(row["value"], row["interval"])
    if "baseline" not in row:
        return cells | {"value": value}
    return cells | {
        "original": _with_interval(row["baseline"], row["baseline_interval"]),
        "compressed": value,
        "difference": _with_interval(row["difference"], row["difference_interval"], "+"),
    }


def _domain(row: Mapping[str, Any]) -> dict[str, str]:
    cells = {"domain": row["domain"], "windows": str(row["windows"]), "perplexity ↓": _format(row, "perplexity")}
    if row["baseline_perplexity"] is not None:
        cells["perplexity ratio"] = _with_interval(row["perplexity_ratio"], row["perplexity_ratio_interval"])
        cells["KL ↓"] = _format(row, "kl_mean")
        cells["same top-1"] = _format(row, "top1_agreement")
        calibration = row["calibration"]
        cells["ECE change"] = _with_interval(calibration["ece_difference"], calibration["ece_difference_interval"], "+")
    return cells


def _format(row: Mapping[str, Any], name: str) -> str:
    return _with_interval(row[name], row[f"{name}_interval"])


def _with_interval(value: float, interval: Sequence[float] | None, sign: str = "") -> str:
    largest = max(abs(v) for v in (value, *(interval or ())))
    digits = 4 if largest < 10 else 2
    text = f"{value:{sign}.{digits}f}"
    return text if interval is None else f"{text} [{interval[0]:{sign}.{digits}f}, {interval[1]:{sign}.{digits}f}]"
