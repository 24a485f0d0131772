"""One evaluation of a study on one artifact: a text at once, or through the artifact's own key-value cache."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from laconic.artifact.size import measure_size
from laconic.evaluate.long_context import evaluate_long
from laconic.evaluate.run import evaluate
from laconic.evaluate.through_cache import PLAIN
from laconic.sweep.study import Evaluation


def measure(artifact: Path, asked: Evaluation, baseline: str | None) -> dict[str, Any]:
    """What `laconic eval` says of it. Raises: ValueError for what the caller can mend."""
    if asked.chunk is None:
        read = asked.model_dump(exclude={"chunk", "generate"})
        return evaluate(artifact, baseline=baseline, generate=asked.generate or 0, **read)
    return _through_cache(artifact, asked)


def _through_cache(artifact: Path, asked: Evaluation) -> dict[str, Any]:
    """`laconic eval --suite long`, of the whole windows. The baseline is the artifact's own weights with a cache in 16
    bit, so that what is compared is the cache alone.

    Raises: ValueError for an artifact without a cache of its own.
    """
    assert asked.chunk is not None
    said = evaluate_long(
        artifact,
        text=asked.text,
        lengths=None if asked.context_length is None else [asked.context_length],
        windows=asked.windows or 2**31,
        parts=("perplexity", "memory"),
        chunk=asked.chunk,
        batch_size=1,
        dtype=asked.dtype,
    )
    own = [name for name in said["caches"] if name != PLAIN]
    if not own:
        raise ValueError(
            "the artifact has no cache of its own to read through; leave 'chunk' out of the evaluation, or add a stage "
            "for the cache (kivi, kvquant, ...)"
        )
    plain, whole = (said["perplexity"][name][-1] for name in (PLAIN, own[0]))
    return {
        **{key: said[key] for key in ("model", "text", "windows", "chunk", "dtype", "seconds", "command", "versions")},
        "context_length": said["lengths"][-1],
        **{key: whole[key] for key in ("tokens", "perplexity", "nll_stderr", "kl_mean", "kl_p99", "top1_agreement")},
        "baseline_perplexity": plain["perplexity"],
        "kv_bits": said["memory"][own[0]][-1]["bits"],
        **asdict(measure_size(artifact)),
        "details": {key: said[key] for key in ("perplexity", "memory")},
    }
