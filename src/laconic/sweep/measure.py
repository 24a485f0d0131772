"""One evaluation of a study on one artifact: in one forward pass per window, or through its key-value cache."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from laconic.artifact.size import measure_size
from laconic.checkpoint.trust import UNTRUSTED, Trust
from laconic.evaluation.long_context import evaluate_long
from laconic.evaluation.options import LongOptions, TextOptions
from laconic.evaluation.text import evaluate_text
from laconic.evaluation.through_cache import PLAIN
from laconic.sweep.study import Evaluation

_COPIED_KEYS = ("model", "text", "windows", "chunk", "dtype", "seconds", "command", "versions")


def measure(
    artifact: Path, evaluation: Evaluation, baseline: str | None, *, trust: Trust = UNTRUSTED
) -> dict[str, Any]:
    """Measure an artifact as `laconic eval` does.

    Args:
        artifact: Folder of the artifact.
        evaluation: What to measure.
        baseline: The original model to compare with; None for no comparison. With `evaluation.chunk` the baseline is
            always the artifact's own weights with a 16-bit cache.
        trust: Permissions of the models' files.

    Returns:
        The result, with the keys of a result of `laconic eval`.

    Raises:
        ValueError: The text or the artifact does not allow this evaluation.
    """
    if evaluation.chunk is None:
        arguments = evaluation.model_dump(exclude={"chunk", "generate"})
        arguments |= {"baseline": baseline, "generate": evaluation.generate or 0, "trust": trust}
        return evaluate_text(artifact, TextOptions(**arguments))
    return _through_cache(artifact, evaluation, trust)


def _through_cache(artifact: Path, evaluation: Evaluation, trust: Trust) -> dict[str, Any]:
    """Measure through the quantized cache, against the same weights with a 16-bit cache, which isolates the cache."""
    assert evaluation.chunk is not None
    options = LongOptions(
        text=evaluation.text,
        lengths=None if evaluation.context_length is None else [evaluation.context_length],
        windows=evaluation.windows or 2**31,
        parts=("perplexity", "memory"),
        chunk=evaluation.chunk,
        batch_size=1,
        dtype=evaluation.dtype,
        trust=trust,
    )
    result = evaluate_long(artifact, options)
    quantized = [name for name in result["caches"] if name != PLAIN]
    if not quantized:
        raise ValueError(
            "the artifact has no quantized cache to read through; remove 'chunk' from the evaluation, or add a cache "
            "stage (kivi, kvquant, ...)"
        )
    plain, whole = (result["perplexity"][name][-1] for name in (PLAIN, quantized[0]))
    return {
        **{key: result[key] for key in _COPIED_KEYS},
        "context_length": result["lengths"][-1],
        **{key: whole[key] for key in ("tokens", "perplexity", "nll_stderr", "kl_mean", "kl_p99", "top1_agreement")},
        "baseline_perplexity": plain["perplexity"],
        "kv_bits": result["memory"][quantized[0]][-1]["bits"],
        **asdict(measure_size(artifact, trust=trust)),
        "details": {key: result[key] for key in ("perplexity", "memory")},
    }
