"""Tables of what compression cost, each figure with its 95 % interval, on a terminal and on the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table


def interval_tables(result: Mapping[str, Any]) -> list[Table]:
    """The tables of a result of `laconic eval` on a text, on domains or on tasks; none where it has no intervals."""
    found = []
    for rows in interval_rows(result):
        table = Table(box=box.SIMPLE, caption=interval_caption(result), caption_justify="left", pad_edge=False)
        for i, column in enumerate(rows[0]):
            table.add_column(column, justify="right" if i else "left", overflow="fold")
        for row in rows:
            table.add_row(*row.values())
        found.append(table)
    return found


def interval_rows(result: Mapping[str, Any]) -> list[list[dict[str, str]]]:
    """The formatted cells of each table, by column."""
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
    """How the intervals were drawn."""
    how = result["intervals"]
    said = f"[{how['level']:.0%} interval], {how['resamples']} resamples of {how['over']}, seed {how['seed']}"
    if result["baseline"] is not None:
        said += f"; differences on the same {how['over']}, and none was measured where the interval holds 0"
    if "domains" in result:
        said += f"; {result['context_length']} tokens a window, {result['dtype']}"
    return said + ". ↓: low is good"


def _text(result: Mapping[str, Any]) -> list[dict[str, str]]:
    calibration = result["calibration"]
    if result["baseline"] is None:
        first = {"measure": "perplexity ↓", "value": _spelled(result, "perplexity")}
        return [first, *_calibration(calibration, "next token: ")]
    perplexity = {
        "measure": "perplexity ↓",
        "original": _spelled(result, "baseline_perplexity"),
        "compressed": _spelled(result, "perplexity"),
        "difference": _with(
            result["perplexity"] - result["baseline_perplexity"], result["perplexity_difference_interval"], "+"
        ),
    }
    kl = {"measure": "KL to the original ↓", "original": "0", "compressed": _spelled(result, "kl_mean")}
    same = {"measure": "same top-1", "original": "1", "compressed": _spelled(result, "top1_agreement")}
    return [perplexity, *({**row, "difference": ""} for row in (kl, same)), *_calibration(calibration, "next token: ")]


def _calibration(row: Mapping[str, Any], of: str) -> list[dict[str, str]]:
    found = []
    for name, said in (("ece", "ECE ↓"), ("brier", "Brier ↓")):
        cells = {"measure": of + said}
        if f"baseline_{name}" not in row:
            found.append(cells | {"value": _spelled(row, name)})
            continue
        found.append(
            cells
            | {
                "original": _spelled(row, f"baseline_{name}"),
                "compressed": _spelled(row, name),
                "difference": _with(row[f"{name}_difference"], row[f"{name}_difference_interval"], "+"),
            }
        )
    return found


def _task(row: Mapping[str, Any]) -> dict[str, str]:
    cells = {"measure": f"{row['task']}: {row['metric']}" + ("" if row["higher_is_better"] else " ↓")}
    ours = _with(row["value"], row["interval"])
    if "baseline" not in row:
        return cells | {"value": ours}
    return cells | {
        "original": _with(row["baseline"], row["baseline_interval"]),
        "compressed": ours,
        "difference": _with(row["difference"], row["difference_interval"], "+"),
    }


def _domain(row: Mapping[str, Any]) -> dict[str, str]:
    cells = {"domain": row["domain"], "windows": str(row["windows"]), "perplexity ↓": _spelled(row, "perplexity")}
    if row["baseline_perplexity"] is not None:
        cells["of the original's"] = _with(row["perplexity_ratio"], row["perplexity_ratio_interval"])
        cells["KL ↓"] = _spelled(row, "kl_mean")
        cells["same top-1"] = _spelled(row, "top1_agreement")
        calibration = row["calibration"]
        cells["ECE change"] = _with(calibration["ece_difference"], calibration["ece_difference_interval"], "+")
    return cells


def _spelled(row: Mapping[str, Any], name: str) -> str:
    return _with(row[name], row[f"{name}_interval"])


def _with(value: float, between: Sequence[float] | None, sign: str = "") -> str:
    """A value with its interval, in as many digits as tell the two ends apart."""
    largest = max(abs(v) for v in (value, *(between or ())))
    digits = 4 if largest < 10 else 2
    said = f"{value:{sign}.{digits}f}"
    return said if between is None else f"{said} [{between[0]:{sign}.{digits}f}, {between[1]:{sign}.{digits}f}]"
