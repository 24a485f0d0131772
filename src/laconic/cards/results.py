"""Results of an artifact for its card: entries of the Hub's `model-index`, and Markdown tables."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from laconic.data.text import HUB_TEXTS

Results = Mapping[str, Mapping[str, Any]]
_TEXT_METRICS = {
    "perplexity": ("perplexity", "Perplexity"),
    "kl_mean": ("kl_divergence", "Mean KL to the original, per token"),
    "top1_agreement": ("top1_agreement", "Same most likely token as the original"),
}


def model_index(results: Results) -> list[EvalResult]:
    """Return every perplexity, distance to the original and task score as an entry of the `model-index`.

    Args:
        results: Results by name, such as `Artifact.results`.
    """
    return [*_text_scores(results), *_tasks(results)]


def measured_on(results: Results) -> list[str]:
    """Return the names of all measured texts and tasks, as `--against` and the data card spell them.

    Args:
        results: Results by name.
    """
    texts = [Path(str(r["text"])).name for r in _texts(results)]
    tasks = [row["task"] for name, r in results.items() if name.startswith("tasks-") for row in r["rows"]]
    return list(dict.fromkeys([*texts, *tasks]))


def tables(results: Results) -> list[str]:
    """Return the lines of two Markdown tables, one of texts and one of tasks.

    Args:
        results: Results by name.
    """
    texts = _texts(results)
    tasks = [(r, row) for name, r in results.items() if name.startswith("tasks-") for row in r["rows"]]
    lines: list[str] = []
    if texts:
        lines += [
            "| text | windows x tokens | dtype | perplexity | original | KL mean / p99 | same top-1 |",
            "|---|---:|---|---:|---:|---:|---:|",
            *map(_text_row, texts),
            "",
        ]
    if tasks:
        lines += [
            "| task | metric | documents | compressed | original | difference |",
            "|---|---|---:|---:|---:|---:|",
            *(_task_row(row) for _, row in tasks),
            "",
            "±: one standard error; differences are paired by document.",
            "",
        ]
    return lines


def commands(results: Results) -> list[str]:
    """Return the commands that made and measured the artifact, the compression first.

    Args:
        results: Results by name.
    """
    ordered = sorted(results.items(), key=lambda item: item[0] != "compress")
    return list(dict.fromkeys(str(r["command"]) for _, r in ordered if r.get("command")))


def _texts(results: Results) -> list[Mapping[str, Any]]:
    """Return one result per text, also for each domain of an evaluation of several domains."""
    texts: list[Mapping[str, Any]] = [r for name, r in results.items() if name.startswith("eval-")]
    for name, result in results.items():
        if name.startswith("domains-"):
            texts += [{**result, **row} for row in result["domains"]]
    return texts


def _text_scores(results: Results) -> Iterator[EvalResult]:
    for result in _texts(results):
        text = str(result["text"])
        spec = HUB_TEXTS.get(text, {"dataset": Path(text).name})
        how = {key: result[key] for key in ("context_length", "windows", "dtype")}
        for key, (metric, title) in _TEXT_METRICS.items():
            value = result.get(key)
            if value is not None and math.isfinite(value):
                yield EvalResult(
                    task_type="text-generation",
                    dataset_type=spec["dataset"],
                    dataset_name=Path(text).name,
                    dataset_config=spec.get("config"),
                    dataset_split=spec.get("split"),
                    metric_type=metric,
                    metric_name=f"{title} ({result['context_length']} tokens)",
                    metric_value=value,
                    metric_args=dict(how),  # a copy, since YAML would write a reference to a shared mapping
                )


def _tasks(results: Results) -> Iterator[EvalResult]:
    for name, result in results.items():
        if not name.startswith("tasks-"):
            continue
        for row in result["rows"]:
            how = {
                "documents": row["documents"],
                "stderr": row["stderr"],
                "num_fewshot": result["shots"].get(row["task"]),
            }
            if math.isfinite(row["value"]):
                yield EvalResult(
                    task_type="text-generation",
                    dataset_type=row["task"],
                    dataset_name=row["task"],
                    metric_type=row["metric"],
                    metric_value=row["value"],
                    metric_name=row["metric"],
                    metric_args={k: v for k, v in how.items() if v is not None},
                )


def _text_row(result: Mapping[str, Any]) -> str:
    compared = result["kl_mean"] is not None
    cells = [
        Path(str(result["text"])).name + (f" ({result['domain']})" if "domain" in result else ""),
        f"{result['windows']} x {result['context_length']}",
        result["dtype"],
        f"{result['perplexity']:.3f}",
        f"{result['baseline_perplexity']:.3f}" if compared else "not measured",
        f"{result['kl_mean']:.4f} / {result['kl_p99']:.3f}" if compared else "not measured",
        f"{result['top1_agreement']:.1%}" if compared else "not measured",
    ]
    return f"| {' | '.join(cells)} |"


def _task_row(row: Mapping[str, Any]) -> str:
    compared = row.get("baseline") is not None
    cells = [
        row["task"],
        row["metric"] + ("" if row["higher_is_better"] else " (lower is better)"),
        f"{row['documents']:,}",
        _with_error(row["value"], row["stderr"]),
        _with_error(row["baseline"], row["baseline_stderr"]) if compared else "not measured",
        _with_error(row["difference"], row["difference_stderr"], "+") if compared else "not measured",
    ]
    return f"| {' | '.join(cells)} |"


def _with_error(value: float, stderr: float | None, sign: str = "") -> str:
    return f"{value:{sign}.4f}" + ("" if stderr is None else f" ± {stderr:.4f}")
