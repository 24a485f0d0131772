"""`laconic eval text`: a model beside its original on one text."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from laconic.artifact.artifact import Artifact
from laconic.artifact.size import measure_size
from laconic.checkpoint.source import model_folder
from laconic.data.text import HUB_TEXTS, evaluation_windows, read_documents
from laconic.evaluation.bootstrap import describe_intervals
from laconic.evaluation.calibration import compare_calibration
from laconic.evaluation.fidelity import Observation, observe
from laconic.evaluation.models import ModelPair, describe_run, name_of_dtype, open_pair
from laconic.evaluation.options import TextOptions
from laconic.evaluation.samples import write_samples

# Keys that a result of samples has in common with the result of the same run.
_SHARED_KEYS = ("model", "baseline", "text", "context_length", "dtype", "device", "command", "versions")


def evaluate_text(model: str | Path, options: TextOptions | None = None) -> dict[str, Any]:
    """Measure perplexity, fidelity to the original, calibration, bits and bytes, with 95 % intervals over windows.

    Continuations (`options.generate`) are saved as a result of their own, and returned under `samples`.

    Args:
        model: Folder of an artifact or of any model, or a name on the Hub.
        options: The text, the original and how to measure.

    Returns:
        The result, as it is saved in `results/` of an artifact.

    Raises:
        ValueError: An option does not fit the model, or the text cannot be read or is too short.
    """
    options = options or TextOptions()
    start = time.monotonic()
    pair = open_pair(model, options)
    windows = read_windows(options.text, pair, options.windows)
    # Before the long measurement, because this fails if more openings are asked for than there are windows.
    samples = write_samples(pair, windows, options.generate) if options.generate else []
    observation = observe(pair.model, windows, pair.baseline)
    result: dict[str, Any] = {
        "model": str(model),
        "baseline": options.baseline,
        "text": options.text,
        "context_length": pair.length,
        "stride": pair.length,
        "windows": len(windows),
        "tokens": observation.quality().tokens,
        "dtype": name_of_dtype(pair.model.dtype),
        **summarize(observation),
        "intervals": describe_intervals("windows"),
        **asdict(measure_size(pair.folder, trust=options.trust)),
        **describe_run(pair, start),
    }
    if options.baseline:
        size = measure_size(model_folder(options.baseline, trust=options.trust), trust=options.trust)
        result |= {"baseline_file_bytes": size.file_bytes, "baseline_bits_per_weight": size.bits_per_weight}
    _save(pair, options, result, samples)
    return result | {"samples": samples} if samples else result


def read_windows(text: str, pair: ModelPair, limit: int | None) -> Tensor:
    """Read a text as windows of token ids.

    Args:
        text: A file, a dataset of the Hub, or a short name such as `wikitext2`.
        pair: The models; it has the tokenizer and the tokens per window.
        limit: Largest number of windows. None: all.

    Returns:
        (windows, length) int64.

    Raises:
        ValueError: The text cannot be read, or does not fill one window.
    """
    documents = read_documents(**HUB_TEXTS.get(text, {"dataset": text}))
    return evaluation_windows(documents, pair.tokenizer, length=pair.length, limit=limit)


def summarize(observation: Observation) -> dict[str, Any]:
    """Return the keys of a result that describe one text: quality, its intervals, calibration of next tokens.

    Args:
        observation: The predictions of the model and its original on the text.
    """
    quality = observation.quality()
    keys = ("perplexity", "nll_stderr", "baseline_perplexity", "kl_mean", "kl_p99", "top1_agreement")
    baseline = None if observation.baseline is None else observation.baseline.predictions()
    return {
        **{key: getattr(quality, key) for key in keys},
        **observation.intervals(),
        "calibration": compare_calibration(observation.model.predictions(), baseline),
    }


def _save(pair: ModelPair, options: TextOptions, result: dict[str, Any], samples: list[dict[str, str]]) -> None:
    artifact = Artifact(pair.folder)
    if artifact.recipe is None:
        return
    name = f"{Path(options.text).stem}-{pair.length}" + (f"-{options.windows}" if options.windows else "")
    artifact.save_result(f"eval-{name}", result)
    if samples:
        artifact.save_result(f"samples-{name}", {key: result[key] for key in _SHARED_KEYS} | {"samples": samples})
