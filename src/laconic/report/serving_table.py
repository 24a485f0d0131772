"""Tables of a result of `laconic bench serving`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Rows = list[dict[str, str]]


def serving_tables(result: Mapping[str, Any]) -> list[tuple[str, Rows]]:
    """Return pairs of a title and formatted cells: one table of the models, then one per length of prompts.

    Args:
        result: Result of `laconic bench serving`.
    """
    models: Sequence[Mapping[str, Any]] = result["models"]
    tables = [("Models as they are loaded", [_model_cells(m, result["device"]) for m in models])]
    for prompt in result["prompts"]:
        title = f"Prompts of {prompt} tokens, {result['new_tokens']} new ones: p50 / p99 in milliseconds"
        rows = [_load_cells(m["name"], r) for m in models for r in m["rows"] if r["prompt"] == prompt]
        tables.append((title, rows))
    return tables


def serving_caption(result: Mapping[str, Any]) -> str:
    """Describe engine, card and load of a result.

    Args:
        result: Result of `laconic bench serving`.

    Returns:
        The description, without a period at its end.
    """
    engine = {"vllm": "vLLM", "hf": "transformers"}[result["engine"]]
    capability = f" (compute capability {result['capability']})" if result["capability"] else ""
    flags = f", {' '.join(result['engine_args'])}" if result["engine_args"] else ""
    text = (
        f"{engine} {result['engine_version']}, torch {result['versions']['torch']}, {result['device_name']}{capability}"
    )
    text += f"{flags}; random prompts, greedy; tokens/s: of the whole run, and while decoding (batch / median TPOT); "
    text += (
        "TTFT: to the first token, with the wait for other prompts; TPOT: mean per token of a request; ITL: between "
    )
    text += "two tokens"
    return text + ("; random weights" if result["random_weights"] else "")


def _model_cells(model: Mapping[str, Any], device: str) -> dict[str, str]:
    peak = "peak memory of the card" if device == "cuda" else "peak memory of the engine"
    return {
        "model": model["name"],
        "weights": _gigabytes(model["weight_bytes"]),
        "tokens that fit": f"{model['cache_tokens']:,}" if model["cache_tokens"] else "-",
        peak: _gigabytes(model["peak_bytes"]),
        "start": f"{model['start_seconds']:.0f} s",
        "kernels": ", ".join(model["kernels"]) or "-",
    }


def _load_cells(name: str, row: Mapping[str, Any]) -> dict[str, str]:
    cells = {"model": name, "batch": str(row["batch"])}
    columns = ("tokens/s", "decode tokens/s", "TTFT", "TPOT", "ITL", "J/token")
    if "error" in row:
        return cells | dict.fromkeys(columns, row["error"])
    joules = row["joules_per_token"]
    return cells | {
        "tokens/s": _rate(row["tokens_per_second"], row.get("speedup")),
        "decode tokens/s": _rate(row["decode_tokens_per_second"], row.get("decode_speedup")),
        **{t.upper(): f"{_short(row[f'{t}_ms_p50'])} / {_short(row[f'{t}_ms_p99'])}" for t in ("ttft", "tpot", "itl")},
        "J/token": "-" if joules is None else f"{joules:.3g}",
    }


def _rate(rate: float, speedup: float | None) -> str:
    return _short(rate) + (f" ({speedup:.2f}x)" if speedup is not None else "")


def _gigabytes(nbytes: int | None) -> str:
    return "-" if nbytes is None else f"{nbytes / 1e9:.3g} GB"


def _short(number: float) -> str:
    """Format a number with three digits and without an exponent."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"
