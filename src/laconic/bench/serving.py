"""`laconic bench serving`: models in a real engine, as their users feel them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from laconic.artifact.artifact import Artifact
from laconic.bench.engine_checks import check_context, check_engine
from laconic.bench.hf_engine import check_flags, measure_hf
from laconic.bench.machine import processor
from laconic.bench.models import short_names
from laconic.bench.serving_options import ServingOptions
from laconic.bench.verdict import serving_verdicts
from laconic.bench.vllm_engine import measure_vllm
from laconic.bench.vllm_python import VllmPython, find_vllm
from laconic.checkpoint.files import read_json
from laconic.checkpoint.source import model_folder
from laconic.pipeline.provenance import command_line, versions

Report = Callable[[str], None]
_RATES = ("tokens_per_second", "decode_tokens_per_second")


@dataclass(frozen=True)
class _Model:
    """A model to measure: its name in tables, its folder, and the contents of its config.json."""

    name: str
    folder: Path
    config: dict[str, Any]


def bench_serving(
    models: Sequence[str], options: ServingOptions | None = None, *, report: Report = lambda _: None
) -> dict[str, Any]:
    """Serve models one after another, and measure speed, latency, memory and energy.

    Args:
        models: Folders or names on the Hub, artifacts among them.
        options: Options of the benchmark.
        report: Called with the name of each measurement before it starts.

    Returns:
        The result. In `results/` of each artifact it is saved, as soon as it is measured, with the rows of that
        artifact and of the baseline.

    Raises:
        ValueError: Models and options do not fit together, or the engine cannot serve a model.
    """
    options = options or ServingOptions()
    start = time.monotonic()
    candidates = _models(models, options)
    engine = _check(candidates, options)
    result = _settings(candidates, engine, options)
    for model in candidates:
        for variant in options.variants:
            row = {"name": _row_name(model, variant), "model": str(model.folder), "variant": variant}
            result["models"].append(row | _measure(model, variant, engine, options, report))
        result["seconds"] = round(time.monotonic() - start, 2)
        _compare(result["models"], len(options.variants))
        _save(result, model, len(options.variants))
    return result | {"summary": list(serving_verdicts(result["models"]))}


def _models(models: Sequence[str], options: ServingOptions) -> list[_Model]:
    """Return the models, the baseline first."""
    names = short_names([*([options.baseline] if options.baseline else []), *models])
    if not names:
        raise ValueError("no model to serve; name an artifact or a model")
    folders = {name: model_folder(folder, trust=options.trust) for folder, name in names.items()}
    entries = []
    for name, folder in folders.items():
        config = read_json(folder / "config.json")
        if not isinstance(config, dict):
            raise ValueError(f"{folder}/config.json holds no keys and values; download it again")
        if "auto_map" in config and not options.trust.remote_code:
            raise ValueError(f"{folder} wants to run its own code (auto_map); pass --trust-remote-code if you trust it")
        if not options.dummy and not any(folder.glob("*.safetensors")) and not options.trust.pickle:
            raise ValueError(f"{folder} has no weights (*.safetensors); time its shapes with --dummy")
        entries.append(_Model(name, folder, config))
    return entries


def _check(models: Sequence[_Model], options: ServingOptions) -> VllmPython | None:
    """Check all models before the first is served; return vLLM, or None for transformers."""
    for model in models:
        check_context(model.folder, model.config, options)
        if Artifact(model.folder).recipe is not None:
            Artifact(model.folder).check_results()
    if options.engine == "hf":
        check_flags([*options.engine_args, *options.vary])
        if options.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("torch finds no CUDA device; install a CUDA build of torch, or leave out --device")
        return None
    engine = find_vllm(options.python, options.device)
    for model in models:
        check_engine(model.folder, model.config, engine)
    return engine


def _settings(models: Sequence[_Model], engine: VllmPython | None, options: ServingOptions) -> dict[str, Any]:
    device = engine.device if engine else "cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu"
    card = engine.device_name if engine else torch.cuda.get_device_name() if device == "cuda" else None
    capability = engine.capability if engine else torch.cuda.get_device_capability() if device == "cuda" else None
    flags = [f"{key}={value}" for key, value in options.engine_args.items()]
    flags += [f"{key}={','.join(values)}" for key, values in options.vary.items()]
    load = f"batches {_listed(options.batches)}; prompts of {_listed(options.prompts)}; {options.new_tokens} new tokens"
    packages = versions() | (engine.versions if engine else {})
    return {
        "model": str(models[-1].folder),
        "baseline": str(models[0].folder) if len(models) > 1 else None,
        "engine": options.engine,
        "engine_version": engine.version if engine else packages["transformers"],
        "device": device,
        "device_name": card or processor(),
        "capability": capability and ".".join(map(str, capability)),
        "engine_args": flags,
        "load": "; ".join([load, *flags, *(["random weights"] if options.dummy else [])]),
        "batches": sorted(set(options.batches)),
        "prompts": sorted(set(options.prompts)),
        "new_tokens": options.new_tokens,
        "rounds": options.rounds,
        "random_weights": options.dummy,
        "models": [],
        "command": command_line(),
        "versions": packages,
    }


def _measure(
    model: _Model, variant: Mapping[str, str], engine: VllmPython | None, options: ServingOptions, report: Report
) -> dict[str, Any]:
    flags = {**options.engine_args, **variant}
    if engine is None:
        return measure_hf(model.folder, flags, options, report)
    return measure_vllm(model.folder, model.config, flags, engine, options, report)


def _compare(rows: Sequence[dict[str, Any]], variants: int) -> None:
    """Add to every load its speed-up over the baseline, that is the first model with the same flags."""
    if len(rows) == 1:
        return
    for i, row in enumerate(rows):
        # With one model alone the variants are compared with the first of them.
        base = rows[i % variants] if len(rows) > variants else rows[0]
        loads = {(r["batch"], r["prompt"]): r for r in base["rows"]}
        for r in row["rows"]:
            against = loads[r["batch"], r["prompt"]]
            if all(key in r and key in against for key in _RATES):
                r["speedup"], r["decode_speedup"] = (r[key] / against[key] for key in _RATES)


def _save(result: Mapping[str, Any], model: _Model, variants: int) -> None:
    """Save the rows of a model and of the baseline in the model, if it is an artifact."""
    artifact = Artifact(model.folder)
    if artifact.recipe is None:
        return
    rows = result["models"]
    own = rows[:variants] if len(rows) == variants else [*rows[:variants], *rows[-variants:]]
    baseline = None if len(rows) == variants else result["baseline"]
    part = {**result, "model": str(model.folder), "baseline": baseline, "models": own}
    artifact.save_result(
        f"bench-serving-{result['engine']}-{result['device']}", part | {"summary": list(serving_verdicts(own))}
    )


def _row_name(model: _Model, variant: Mapping[str, str]) -> str:
    return ", ".join([model.name, *(f"{key}={value}" for key, value in variant.items())])


def _listed(values: Sequence[int]) -> str:
    return ", ".join(map(str, sorted(set(values))))
