"""`laconic eval`: measure an artifact beside its original, and keep the result with it."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from laconic.artifact.artifact import Artifact
from laconic.artifact.size import measure_size
from laconic.checkpoint.source import load_tokenizer, model_folder
from laconic.data.text import HUB_TEXTS, evaluation_windows, read_documents
from laconic.evaluate.bootstrap import SEED, method_of
from laconic.evaluate.calibration import calibration_of
from laconic.evaluate.fidelity import Observed, observe
from laconic.evaluate.samples import write_samples
from laconic.pipeline.provenance import command_line, versions
from laconic.runtime.reading import load


@dataclass(frozen=True)
class Opened:
    """A model and its original, open on the device `place`, and the tokens of a window that both read."""

    folder: Path
    tokenizer: PreTrainedTokenizerBase
    ours: PreTrainedModel
    theirs: PreTrainedModel | None
    length: int
    place: str


def open_pair(
    model: str | Path, baseline: str | None, *, context_length: int | None, dtype: str | None, device: str
) -> Opened:
    """Open both. Raises: ValueError for a context that the model has not, or a baseline that is not its original."""
    folder = model_folder(str(model))
    tokenizer = load_tokenizer(folder)
    place = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    precision = getattr(torch, dtype) if dtype else None
    ours = load(folder, device=place, dtype=precision)
    limit = getattr(ours.config.get_text_config(), "max_position_embeddings", None) or 2048
    length = min(2048, limit) if context_length is None else context_length
    if not 2 <= length <= limit:
        raise ValueError(f"--context-length {length} is not between 2 and the model's context of {limit}")
    theirs = load(baseline, device=place, dtype=precision) if baseline else None
    if theirs is not None and theirs.config.vocab_size != ours.config.vocab_size:
        raise ValueError(
            f"baseline {baseline} has another vocabulary than {model}; is it the original of this artifact?"
        )
    return Opened(folder, tokenizer, ours, theirs, length, place)


def windows_of(text: str, opened: Opened, most: int | None) -> Tensor:
    """Windows (n, length) of a text by the name that `evaluate` takes. Raises: ValueError when it fills none."""
    where = HUB_TEXTS.get(text, {"dataset": text})
    return evaluation_windows(read_documents(**where), opened.tokenizer, length=opened.length, limit=most)


def figures(seen: Observed) -> dict[str, Any]:
    """What a result says of a text: quality, its intervals, calibration of next tokens."""
    quality = seen.quality()
    names = ("perplexity", "nll_stderr", "baseline_perplexity", "kl_mean", "kl_p99", "top1_agreement")
    theirs = None if seen.theirs is None else seen.theirs.predictions()
    return {
        **{name: getattr(quality, name) for name in names},
        **seen.intervals(),
        "calibration": calibration_of(seen.ours.predictions(), theirs),
    }


def evaluate(
    model: str | Path,
    *,
    baseline: str | None = None,
    text: str = "wikitext2",
    context_length: int | None = None,
    windows: int | None = None,
    dtype: str | None = None,
    device: str = "auto",
    generate: int = 0,
) -> dict[str, Any]:
    """Perplexity, fidelity to `baseline`, calibration, bits and bytes; with 95 % intervals over resampled windows.

    text: `wikitext2`, `c4`, a file, or a Hub dataset. context_length: tokens a window (the model's own context, 2048 at
    most, when not given); windows do not overlap, so the stride is the same. windows: how many at most. dtype: to
    compute in (float32, bfloat16, float16; the checkpoint's own when not given). generate: how many openings of the
    text both models continue; these go into a result of their own, and are under `samples` of what is returned.

    Returns what is written to `results/` of the artifact. Raises: ValueError for what the caller can mend.
    """
    begun = time.monotonic()
    opened = open_pair(model, baseline, context_length=context_length, dtype=dtype, device=device)
    folder, length = opened.folder, opened.length
    ids = windows_of(text, opened, windows)
    # First, because it is here that too many may have been asked for.
    samples = write_samples(opened.ours, opened.theirs, opened.tokenizer, ids, generate) if generate else []
    seen = observe(opened.ours, ids, opened.theirs)
    size = measure_size(folder)
    result: dict[str, Any] = {
        "model": str(model),
        "baseline": baseline,
        "text": text,
        "context_length": length,
        "stride": length,
        "windows": len(ids),
        "tokens": seen.quality().tokens,
        "dtype": str(opened.ours.dtype).removeprefix("torch."),
        **figures(seen),
        "intervals": method_of("windows"),
        **asdict(size),
        "seconds": round(time.monotonic() - begun, 2),
        "device": opened.place,
        "seed": SEED,
        "command": command_line(),
        "versions": versions(),
    }
    if baseline:
        their_size = measure_size(model_folder(baseline))
        result["baseline_file_bytes"] = their_size.file_bytes
        result["baseline_bits_per_weight"] = their_size.bits_per_weight
    artifact = Artifact(folder)
    if artifact.recipe is not None:
        name = f"{Path(text).stem}-{length}" + (f"-{windows}" if windows else "")
        artifact.save_result(f"eval-{name}", result)
        if samples:
            same = ("model", "baseline", "text", "context_length", "dtype", "device", "command", "versions")
            artifact.save_result(f"samples-{name}", {key: result[key] for key in same} | {"samples": samples})
    return result | {"samples": samples} if samples else result
