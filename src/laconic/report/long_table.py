"""The tables of a result of `laconic eval --suite long`, on a terminal and on the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

Rows = list[dict[str, str]]


def long_tables(result: Mapping[str, Any]) -> list[Table]:
    """For the terminal: one row a cache, then perplexity, needles, and what it takes, by length."""
    made = []
    for rows in long_rows(result):
        table = Table(box=box.SIMPLE, pad_edge=False)
        for j, column in enumerate(rows[0]):
            # Names of caches are long, and break between their words.
            # So do those that head the columns of LongBench.
            one_line = j > 0 and column not in result["caches"]
            table.add_column(column, justify="right" if j else "left", no_wrap=one_line, min_width=0 if j else 18)
        for row in rows:
            table.add_row(*row.values())
        made.append(table)
    return made


def long_rows(result: Mapping[str, Any]) -> list[Rows]:
    """The tables' formatted cells, by column: the summary, and of what was measured, each by length or position."""
    tables: list[Rows] = [[{"cache": name} | _summary(result, name) for name in result["caches"]]]
    if "perplexity" in result:
        tables.append([_by_position(name, result["perplexity"][name]) for name in result["caches"]])
    if "needle" in result:
        tables.append([_found(name, result["needle"][name]) for name in result["caches"]])
    if "memory" in result or "speed" in result:
        tables.append([_taken(name, result) for name in result["caches"]])
    if "rows" in result.get("longbench", {}):
        tables.append(_scores(result))
    return tables


def _summary(result: Mapping[str, Any], name: str) -> dict[str, str]:
    """What a cache costs and saves, in one row; bytes and speed are those of the longest context."""
    cells = {}
    if "memory" in result:
        ours, plain = result["memory"][name][-1], result["memory"][result["caches"][0]][-1]
        cells["bits/number"] = f"{ours['bits']:.2f}"
        less = f", {plain['request_bytes'] / ours['request_bytes']:.2f}x less" if ours != plain else ""
        cells[f"bytes at {_count(ours['length'])}"] = _bytes(ours["request_bytes"]) + less
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
    """LongBench, a row a task or group: the score of each cache, and its difference to 16 bit."""
    rows = []
    for at, plain in enumerate(result["longbench"]["rows"][result["caches"][0]]):
        if not plain["main"]:
            continue
        cells = {"LongBench": plain["task"] + (f" ({plain['tasks']} tasks)" if plain["tasks"] > 1 else "")}
        cells["n"] = str(plain["documents"])
        for name in result["caches"]:
            row = result["longbench"]["rows"][name][at]
            cells[name] = f"{row['value']:.3f}"
            if name != result["caches"][0]:
                error = row["difference_stderr"]
                cells[name] += f" ({row['difference']:+.3f}" + ("" if error is None else f" ± {error:.3f}") + ")"
        rows.append(cells)
    return rows


def _by_position(name: str, buckets: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    cells = {"perplexity (KL) at": name}
    # The last is the whole window, which the summary has.
    for b in buckets[:-1] if len(buckets) > 1 else buckets:
        cells[f"{_count(b['start'])}-{_count(b['stop'])}"] = f"{b['perplexity']:.3f} ({b['kl_mean']:.4f})"
    return cells


def _found(name: str, cells: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    return {"needles at": name} | {
        _count(length): _share([c for c in cells if c["length"] == length]) for length in _lengths(cells)
    }


def _taken(name: str, result: Mapping[str, Any]) -> dict[str, str]:
    cells = {"a request of, and tokens/s after": name}
    memory, speed = (result[part][name] if part in result else [] for part in ("memory", "speed"))
    for i, length in enumerate(_lengths(memory or speed)):
        said = [_bytes(memory[i]["request_bytes"])] if memory else []
        said += [f"{speed[i]['tokens_per_second']:.1f}/s"] if speed else []
        cells[_count(length)] = ", ".join(said)
    return cells


def _lengths(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    return list(dict.fromkeys(row["length"] for row in rows))


def _share(cells: Sequence[Mapping[str, Any]]) -> str:
    return f"{sum(c['found'] for c in cells)}/{sum(c['trials'] for c in cells)}"


def _count(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens >= 1024 and tokens % 1024 == 0 else str(tokens)


def _bytes(n: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        # A thousandth less than a thousand would be rounded up to four digits.
        if n < 999.5:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.3g} TB"


def long_caption(result: Mapping[str, Any]) -> str:
    """How the result was measured."""
    said = f"{result['text']}, {result['dtype']} on {result['device']}, "
    said += f"{result['chunk']} tokens through the cache at once"
    if "perplexity" in result:
        said += f"; perplexity in {result['windows']} windows of {result['lengths'][-1]} tokens, KL from 16 bit"
    if "needle" in result:
        said += f"; needles ('{result['prompt']}') at {result['depths']} depths, {result['trials']} each"
    if "memory" in result:
        said += "; bytes of all that a cache keeps, beside keys and values of 16 bit"
    longbench = result.get("longbench", {})
    if "rows" in longbench:
        said += f"; LongBench's documents from {longbench['data']}"
        said += f", the first {longbench['limit']} of each task" if longbench["limit"] else ""
        said += f", prompts and answers of at most {longbench['context_length']} tokens"
        said += f" ({sum(longbench['cut'].values())} lost their middle), ±: one standard error, paired by document"
    if "not_run" in longbench:
        said += f"; LongBench was not run: {longbench['not_run']}"
    return said
