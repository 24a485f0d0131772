"""Tables of a result of `laconic eval long`, for the terminal and for reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

Rows = list[dict[str, str]]


def long_tables(result: Mapping[str, Any]) -> list[Table]:
    """Return the terminal tables of a result.

    Args:
        result: Result of `laconic eval long`.
    """
    tables = []
    for rows in long_rows(result):
        table = Table(box=box.SIMPLE, pad_edge=False)
        for j, column in enumerate(rows[0]):
            # Names of caches are long and may wrap, also in the header of the LongBench table.
            one_line = j > 0 and column not in result["caches"]
            table.add_column(column, justify="right" if j else "left", no_wrap=one_line, min_width=0 if j else 18)
        for row in rows:
            table.add_row(*row.values())
        tables.append(table)
    return tables


def long_rows(result: Mapping[str, Any]) -> list[Rows]:
    """Return the formatted cells of each table: a summary, then perplexity, needles, memory and speed by length.

    Args:
        result: Result of `laconic eval long`.
    """
    tables: list[Rows] = [[{"cache": name} | _summary(result, name) for name in result["caches"]]]
    if "perplexity" in result:
        tables.append([_by_position(name, result["perplexity"][name]) for name in result["caches"]])
    if "needle" in result:
        tables.append([_needles(name, result["needle"][name]) for name in result["caches"]])
    if "memory" in result or "speed" in result:
        tables.append([_memory_and_speed(name, result) for name in result["caches"]])
    if "rows" in result.get("longbench", {}):
        tables.append(_scores(result))
    return tables


def _summary(result: Mapping[str, Any], name: str) -> dict[str, str]:
    """Return the summary of one cache; bytes and speed are those of the longest context."""
    cells = {}
    if "memory" in result:
        row, plain = result["memory"][name][-1], result["memory"][result["caches"][0]][-1]
        cells["bits/number"] = f"{row['bits']:.2f}"
        ratio = f", {plain['request_bytes'] / row['request_bytes']:.2f}x smaller" if row != plain else ""
        cells[f"bytes at {_count(row['length'])}"] = _bytes(row["request_bytes"]) + ratio
    if "perplexity" in result:
        whole = result["perplexity"][name][-1]
        cells["perplexity"] = f"{whole['perplexity']:.3f}"
        cells["KL"] = f"{whole['kl_mean']:.4f}"
        cells["same top-1"] = f"{whole['top1_agreement']:.1%}"
    if "needle" in result:
        cells["needles"] = _share(result["needle"][name])
    if "rows" in result.get("longbench", {}):
        scores = [row["value"] for row in result["longbench"]["rows"][name] if row["main"] and row["tasks"] == 1]
        cells["LongBench"] = f"{sum(scores) / len(scores):.3f}"
    if "speed" in result:
        cells[f"tokens/s at {_count(result['speed'][name][-1]['length'])}"] = (
            f"{result['speed'][name][-1]['tokens_per_second']:.1f}"
        )
    return cells


def _scores(result: Mapping[str, Any]) -> Rows:
    """Return the LongBench table: per task or group the score of each cache and its difference to 16 bit."""
    rows = []
    for i, plain in enumerate(result["longbench"]["rows"][result["caches"][0]]):
        if not plain["main"]:
            continue
        cells = {"LongBench": plain["task"] + (f" ({plain['tasks']} tasks)" if plain["tasks"] > 1 else "")}
        cells["n"] = str(plain["documents"])
        for name in result["caches"]:
            row = result["longbench"]["rows"][name][i]
            cells[name] = f"{row['value']:.3f}"
            if name != result["caches"][0]:
                error = row["difference_stderr"]
                cells[name] += f" ({row['difference']:+.3f}" + ("" if error is None else f" ± {error:.3f}") + ")"
        rows.append(cells)
    return rows


def _by_position(name: str, buckets: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    cells = {"perplexity (KL) at": name}
    # The last bucket is the whole window, which the summary shows.
    for bucket in buckets[:-1] if len(buckets) > 1 else buckets:
        span = f"{_count(bucket['start'])}-{_count(bucket['stop'])}"
        cells[span] = f"{bucket['perplexity']:.3f} ({bucket['kl_mean']:.4f})"
    return cells


def _needles(name: str, cells: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    return {"needles at": name} | {
        _count(length): _share([c for c in cells if c["length"] == length]) for length in _lengths(cells)
    }


def _memory_and_speed(name: str, result: Mapping[str, Any]) -> dict[str, str]:
    cells = {"bytes per request, tokens/s at": name}
    memory, speed = (result[part][name] if part in result else [] for part in ("memory", "speed"))
    for i, length in enumerate(_lengths(memory or speed)):
        values = [_bytes(memory[i]["request_bytes"])] if memory else []
        values += [f"{speed[i]['tokens_per_second']:.1f}/s"] if speed else []
        cells[_count(length)] = ", ".join(values)
    return cells


def _lengths(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    return list(dict.fromkeys(row["length"] for row in rows))


def _share(cells: Sequence[Mapping[str, Any]]) -> str:
    return f"{sum(c['found'] for c in cells)}/{sum(c['trials'] for c in cells)}"


def _count(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens >= 1024 and tokens % 1024 == 0 else str(tokens)


def _bytes(n: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        # From 999.5 on, rounding to three digits would give four.
        if n < 999.5:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.3g} TB"


def long_caption(result: Mapping[str, Any]) -> str:
    """Describe the setting of a result.

    Args:
        result: Result of `laconic eval long`.

    Returns:
        The description, without a period at its end.
    """
    text = f"{result['text']}, {result['dtype']} on {result['device']}, "
    text += f"{result['chunk']} tokens per forward pass"
    if "perplexity" in result:
        text += f"; perplexity in {result['windows']} windows of {result['lengths'][-1]} tokens, KL to the 16-bit cache"
    if "needle" in result:
        text += f"; needles ('{result['prompt']}') at {result['depths']} depths, {result['trials']} each"
    if "memory" in result:
        text += "; bytes of everything that a cache stores, relative to 16-bit keys and values"
    longbench = result.get("longbench", {})
    if "rows" in longbench:
        text += f"; LongBench's documents from {longbench['data']}"
        text += f", the first {longbench['limit']} of each task" if longbench["limit"] else ""
        text += f", prompts and answers of at most {longbench['context_length']} tokens"
        text += (
            f" ({sum(longbench['cut'].values())} truncated in the middle), ±: one standard error, paired by document"
        )
    if "not_run" in longbench:
        text += f"; LongBench was not run: {longbench['not_run']}"
    return text
