"""Schemas of the results that reports read; results are files that a user may have edited."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, FiniteFloat, ValidationError

_Positive = Annotated[FiniteFloat, Field(gt=0)]


class EvaluationResult(BaseModel):
    """Keys of a result of `laconic eval text --baseline` that reports need.

    Attributes:
        baseline: Folder or name of the original.
        text: The text.
        windows: Number of windows.
        context_length: Tokens per window.
        dtype: Dtype of the computation.
        command: The command line.
        kl_mean: Mean KL divergence from the original, in nats per token.
        perplexity: Perplexity of the artifact.
        baseline_perplexity: Perplexity of the original.
        file_bytes: Bytes of the weight files.
        baseline_file_bytes: Bytes of the original's weight files.
    """

    baseline: str
    text: str
    windows: int
    context_length: int
    dtype: str
    command: str
    kl_mean: FiniteFloat
    perplexity: FiniteFloat
    baseline_perplexity: FiniteFloat
    file_bytes: _Positive
    baseline_file_bytes: _Positive


class StudyEvaluation(BaseModel):
    """Keys of one evaluation of a study; perplexity and KL of a broken artifact may be infinite or NaN.

    Attributes:
        text: The text.
        windows: Number of windows.
        context_length: Tokens per window.
        perplexity: Perplexity of the artifact.
        file_bytes: Bytes of the weight files.
        bits_per_weight: Bits per weight of the whole model.
        baseline_perplexity: Perplexity of the original; None without a comparison, as all that follow.
        baseline_file_bytes: Bytes of the original's weight files.
        kl_mean: Mean KL divergence from the original, in nats per token.
        kl_p99: 99th percentile of the same.
        top1_agreement: Share of tokens where both models rank the same token first.
    """

    text: str
    windows: int
    context_length: int
    perplexity: float
    file_bytes: _Positive
    bits_per_weight: FiniteFloat
    baseline_perplexity: float | None = None
    baseline_file_bytes: _Positive | None = None
    kl_mean: float | None = None
    kl_p99: float | None = None
    top1_agreement: float | None = None


class _Phase(BaseModel):
    tokens_per_second: _Positive
    speedup: _Positive


class _Row(BaseModel):
    gone: FiniteFloat
    prefill: _Phase
    decode: _Phase


class SpeedResult(BaseModel):
    """Keys of a result of `laconic bench sparsity --measure models` that reports need.

    Attributes:
        models: Rows of at least two models, the original first.
        device_name: Name of the device.
        threads: Number of threads of torch.
        prompt: Tokens of a prompt.
        sequences: Number of sequences in a batch.
        dtype: Dtype of the computation.
        command: The command line.
    """

    models: list[_Row] = Field(min_length=2)
    device_name: str
    threads: int
    prompt: int
    sequences: int
    dtype: str
    command: str


class _Load(BaseModel):
    batch: int
    prompt: int
    error: str = ""
    tokens_per_second: _Positive | None = None
    decode_tokens_per_second: _Positive | None = None
    decode_speedup: _Positive | None = None


class _ServedModel(BaseModel):
    name: str
    kernels: list[str]
    start_seconds: FiniteFloat
    rows: list[_Load] = Field(min_length=1)


class ServingResult(BaseModel):
    """Keys of a result of `laconic bench serving` that reports need."""

    models: list[_ServedModel] = Field(min_length=1)
    engine: Literal["vllm", "hf"]
    engine_version: str
    device: str
    device_name: str
    prompts: list[int]
    new_tokens: int
    command: str


def check_result(file: Path, result: Mapping[str, Any], schema: type[BaseModel], command: str) -> None:
    """Check a result against its schema.

    Args:
        file: File of the result, for the message.
        result: The result.
        schema: Keys that the result must have.
        command: Command that writes such results, for the message.

    Raises:
        ValueError: A key is missing or has a wrong value.
    """
    try:
        schema.model_validate(result, strict=True)
    except ValidationError as e:
        problem = e.errors(include_url=False)[0]
        where = ".".join(str(part) for part in problem["loc"])
        rule = "is missing" if problem["type"] == "missing" else problem["msg"].replace("Input should", "should")
        raise ValueError(
            f"{file}: {where} {rule}; omit that artifact, or delete the file and run '{command}' again"
        ) from e
