"""What a picture needs of results, which are files that anyone may have changed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, FiniteFloat, ValidationError

_Above0 = Annotated[FiniteFloat, Field(gt=0)]


class Quality(BaseModel):
    """Of what `laconic eval --baseline` leaves."""

    baseline: str
    text: str
    windows: int
    context_length: int
    dtype: str
    command: str
    kl_mean: FiniteFloat
    perplexity: FiniteFloat
    baseline_perplexity: FiniteFloat
    file_bytes: _Above0
    baseline_file_bytes: _Above0


class Measured(BaseModel):
    """Of an evaluation in a study. A broken artifact's figures may be infinite, or no numbers at all."""

    text: str
    windows: int
    context_length: int
    perplexity: float
    file_bytes: _Above0
    bits_per_weight: FiniteFloat
    baseline_perplexity: float | None = None
    baseline_file_bytes: _Above0 | None = None
    kl_mean: float | None = None
    kl_p99: float | None = None
    top1_agreement: float | None = None


class _Phase(BaseModel):
    tokens_per_second: _Above0
    speedup: _Above0


class _Row(BaseModel):
    gone: FiniteFloat
    prefill: _Phase
    decode: _Phase


class Speed(BaseModel):
    """Of what `laconic bench sparsity --measure models` leaves."""

    models: list[_Row] = Field(min_length=2)
    device_name: str
    threads: int
    prompt: int
    sequences: int
    dtype: str
    command: str


def check_figures(file: Path, result: Mapping[str, Any], kind: type[BaseModel], command: str) -> None:
    """Raises: ValueError when a result has not the figures of its kind. command: what leaves such results."""
    try:
        kind.model_validate(result, strict=True)
    except ValidationError as e:
        problem = e.errors(include_url=False)[0]
        where = ".".join(str(part) for part in problem["loc"])
        rule = "is missing" if problem["type"] == "missing" else problem["msg"].replace("Input should", "should")
        raise ValueError(
            f"{file}: {where} {rule}; leave that artifact out, or delete the file and run '{command}' again"
        ) from e
