"""`laconic bench sparsity`: what zeros and removed weights save in time, bytes and energy."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from laconic.artifact.artifact import Artifact
from laconic.bench.checks import check_folders, check_models, check_random_model
from laconic.bench.linears import bench_linears
from laconic.bench.machine import processor
from laconic.bench.models import PHASES, Candidate, bench_models, removed_share, short_names
from laconic.bench.options import PARTS, SparsityOptions
from laconic.bench.shapes import PRESETS, Shape, config_of, linear_shapes, narrowed, parse_shapes, scaled
from laconic.bench.sparse_models import Prune, count_weights, random_model, with_sparse_kernels, with_zeros
from laconic.bench.verdict import busy_verdict, linear_verdicts, model_verdicts
from laconic.bench.zeros import to_2_of_4, to_unstructured, to_zero_blocks
from laconic.checkpoint.source import model_folder
from laconic.pipeline.provenance import command_line, versions
from laconic.runtime.reading import load

DEFAULT = "llama-3-8b"
SPARSE = "sparse kernels"
Report = Callable[[str], None]


@dataclass(frozen=True)
class _SparsityInputs:
    """Inputs of the measurements, checked.

    Attributes:
        models: Folders, the baseline first; or one preset or model to scale.
        parts: Of `PARTS`.
        config: Config of the random model, or of the first model where its shapes are needed.
        random: Whether models have random weights.
        device: Device to measure.
        dtype: Dtype of linears and of random models.
    """

    models: list[str]
    parts: Sequence[str]
    config: PretrainedConfig | None
    random: bool
    device: torch.device
    dtype: torch.dtype


def bench_sparsity(
    models: Sequence[str] = (), options: SparsityOptions | None = None, *, report: Report = lambda _: None
) -> dict[str, Any]:
    """Time linears and whole models: dense, sparse and smaller.

    Args:
        models: Folders, artifacts among them. Or one preset (`shapes.PRESETS`), or with `options.scaled_to` one model
            to scale: these have random weights, and are compared with copies that are pruned.
        options: Options of the benchmark.
        report: Called with the name of each measurement before it starts.

    Returns:
        The result. In `results/` of each artifact it is saved with the rows of that artifact and the baseline only.

    Raises:
        ValueError: Models and options do not fit together, or a model cannot be read.
    """
    options = options or SparsityOptions()
    start = time.monotonic()
    inputs = _prepare(models, options)
    result: dict[str, Any] = {"model": models[0] if models else options.shapes or DEFAULT, "baseline": options.baseline}
    dtype = inputs.dtype
    if "linears" in inputs.parts:
        shapes = _shapes(options, inputs.config)
        result["linears"] = bench_linears(shapes, options, inputs.dtype, inputs.device, report)
    if "models" in inputs.parts:
        candidates = _random_candidates(inputs, options) if inputs.random else _folder_candidates(inputs, options)
        rows = bench_models(candidates, options, report=report)
        result["models"] = [row | {"gone": removed_share(row, rows[0])} for row in rows]
        dtype = next(iter(candidates.values())).model.dtype
    result |= {
        "summary": _summary(result),
        "scaled_to": options.scaled_to,
        "random_weights": inputs.random,
        "sparsities": list(options.sparsities),
        "block": options.block,
        "kinds": list(options.kinds),
        "batches": sorted(set(options.batches)),
        "prompt": options.prompt,
        "sequences": options.sequences,
        "dtype": str(dtype).removeprefix("torch."),
        "device": inputs.device.type,
        "device_name": torch.cuda.get_device_name(inputs.device) if inputs.device.type == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "rounds": options.rounds,
        "seed": 0,
        "seconds": round(time.monotonic() - start, 2),
        "command": command_line(),
        "versions": versions(),
    }
    if "models" in inputs.parts and not inputs.random:
        _save(result, inputs.models)
    return result


def _prepare(models: Sequence[str], options: SparsityOptions) -> _SparsityInputs:
    """Check all inputs, so that errors come before anything is measured."""
    parts = options.parts if options.parts is not None else (PARTS if models else ("linears",))
    check_models(models, parts, options)
    name = ("cuda" if torch.cuda.is_available() else "cpu") if options.device == "auto" else options.device
    device = torch.device(name)
    default = torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype = getattr(torch, options.dtype) if options.dtype else default
    random = options.scaled_to is not None or (bool(models) and models[0] in PRESETS)
    folders = [*([options.baseline] if options.baseline else []), *models]
    needs_shapes = "linears" in parts and options.shapes is None
    config = config_of(folders[0], trust=options.trust) if folders and (random or needs_shapes) else None
    if config is not None and options.scaled_to is not None:
        config = scaled(config, options.scaled_to)
    if "models" in parts and random:
        assert config is not None
        check_random_model(models[0], config, options)
    elif "models" in parts:
        check_folders(folders, options)
    return _SparsityInputs(folders, parts, config, random, device, dtype)


def _folder_candidates(inputs: _SparsityInputs, options: SparsityOptions) -> dict[str, Candidate]:
    """Open folders, and again with sparse kernels where their zeros allow it."""
    candidates: dict[str, Candidate] = {}
    dtype = inputs.dtype if options.dtype else None
    for folder, name in short_names(inputs.models).items():
        model = load(folder, device=inputs.device, dtype=dtype, trust=options.trust)
        candidates[name] = Candidate(model, count_weights(model))
        sparse, kernels = with_sparse_kernels(model)
        if kernels:
            candidates[f"{name}, {SPARSE}"] = Candidate(sparse, count_weights(sparse, kernels))
    return candidates


def _random_candidates(inputs: _SparsityInputs, options: SparsityOptions) -> dict[str, Candidate]:
    """Make a random model, and pruned copies of it."""
    assert inputs.config is not None
    original = random_model(inputs.config, inputs.device, inputs.dtype, options.trust)
    name = "original" if options.scaled_to is None else f"original, hidden {options.scaled_to}"
    candidates = {name: Candidate(original, count_weights(original))}
    for s in options.sparsities:
        if "structured" in options.kinds:
            narrow = random_model(narrowed(inputs.config, s), inputs.device, inputs.dtype, options.trust)
            candidates[f"structured {s:.0%}"] = Candidate(narrow, count_weights(narrow))
        if "unstructured" in options.kinds:
            zeros = with_zeros(original, partial(to_unstructured, sparsity=s))
            candidates[f"unstructured {s:.0%}"] = Candidate(zeros, count_weights(zeros))
        if "block" in options.kinds:
            prune = partial(to_zero_blocks, size=options.block, sparsity=s)
            candidates |= _pruned_candidate(f"block {options.block} {s:.0%}", original, prune)
    if "2:4" in options.kinds:
        candidates |= _pruned_candidate("2:4", original, to_2_of_4)
    return candidates


def _pruned_candidate(name: str, original: PreTrainedModel, prune: Prune) -> dict[str, Candidate]:
    """Prune a copy, with sparse kernels where the device has them."""
    model, kernels = with_sparse_kernels(original, prune)
    if not kernels:
        model = with_zeros(original, prune)
    return {f"{name}, {SPARSE}" if kernels else name: Candidate(model, count_weights(model, kernels))}


def _summary(result: dict[str, Any]) -> list[str]:
    linears, models = result.get("linears", []), result.get("models", [])
    phases = [row[phase] for row in models for phase in PHASES]
    return [*linear_verdicts(linears), *model_verdicts(models), *busy_verdict([*linears, *phases])]


def _save(result: dict[str, Any], folders: Sequence[str]) -> None:
    """Save in each artifact the rows of the baseline and its own; not in the baseline itself."""
    names = short_names(folders)
    baseline, *compared = dict.fromkeys(folders)
    for folder in compared:
        artifact = Artifact(model_folder(folder))
        if artifact.recipe is None:
            continue
        wanted = (names[baseline], names[folder], f"{names[folder]}, {SPARSE}")
        rows = [row for row in result["models"] if row["name"] in wanted]
        part = {k: v for k, v in result.items() if k not in ("linears", "summary")}
        part |= {"model": folder, "baseline": baseline, "models": rows, "summary": list(model_verdicts(rows))}
        artifact.save_result(f"bench-sparsity-{result['device']}", part)
    if not compared and Artifact(model_folder(baseline)).recipe is not None:
        result["summary"].append(
            f"{baseline} was compared with itself, so no result is saved in it; name the original by --baseline"
        )


def _shapes(options: SparsityOptions, config: PretrainedConfig | None) -> dict[Shape, str]:
    text = options.shapes
    if text in PRESETS:
        return linear_shapes(PRESETS[str(text)])
    if text is not None:
        return parse_shapes(text)
    return linear_shapes(config if config is not None else PRESETS[DEFAULT], trust=options.trust)
