"""Recipe in, artifact out: check everything that can be checked, then walk."""

from __future__ import annotations

import hashlib
import json
import platform
import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from transformers import PreTrainedModel

from laconic.engine.artifact import Artifact
from laconic.engine.engines import quantization_config
from laconic.engine.masking import Protect, PruningStage
from laconic.engine.plan import Forecast, Plan, check_experts, forecast, make_plan
from laconic.engine.walk import Settings, walk
from laconic.engine.writer import Workspace, check_begun, check_output
from laconic.formats.schemes import Scheme
from laconic.formats.storage import as_stored
from laconic.model.anatomy import dissect
from laconic.model.checkpoint import read_json
from laconic.model.data import calibration_windows, read_documents
from laconic.model.kv_open import fingerprint
from laconic.model.kv_reading import KV_CONFIG
from laconic.model.layout import names_for_engines
from laconic.model.load import Source, arranged, check_complete, load_tokenizer, open_source, skeleton
from laconic.model.quant_config import NATIVE
from laconic.recipe import Calibration, Recipe, load_recipe

Report = Callable[[Mapping[str, Any]], None]

# Tokens run through a block at once when the recipe does not say: enough to keep the arithmetic busy, and on a CPU
# few enough that what a block computes from them stays small: more would be slower there as well as larger.
_TOKENS_AT_ONCE = {"cpu": 2048, "cuda": 16384}

# Keys of a recipe that may change between an interruption and going on: the codes do not depend on them.
_FREE: Any = {"output": True, "device": True, "calibration": {"max_memory_gb"}}


@dataclass(frozen=True)
class Prepared:
    """A recipe that passed every check, and what it will take."""

    recipe: Recipe
    source: Source
    model: PreTrainedModel
    plan: Plan
    windows: Tensor | None
    forecast: Forecast
    output: Path
    identity: dict[str, Any]
    domains: dict[int, Tensor]


def compress(
    model: str | None = None,
    recipe: str | Path | dict[str, Any] | Recipe = "gptq-w4a16",
    output: str | Path | None = None,
    *,
    overrides: list[str] | None = None,
    overwrite: bool = False,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    report: Report = lambda _: None,
) -> Artifact:
    """Compress a model and return the artifact.

    model: a folder or Hub name, in place of the recipe's. recipe: a gallery name, a YAML file, or a mapping. output: a
    folder, in place of the recipe's. overrides: `key.path=value`. report: called with an event a block and a linear.

    Raises: ValueError for anything the caller can mend; nothing is written then.
    """
    prepared = prepare(
        model,
        recipe,
        output,
        overrides=overrides,
        overwrite=overwrite,
        allow_pickle=allow_pickle,
        trust_remote_code=trust_remote_code,
    )
    return run(prepared, overwrite=overwrite, report=report)


def prepare(
    model: str | None,
    recipe: str | Path | dict[str, Any] | Recipe,
    output: str | Path | None,
    *,
    overrides: list[str] | None = None,
    overwrite: bool = False,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> Prepared:
    """Everything up to the first byte of work. Raises: ValueError, one line that names the fix."""
    loaded = load_recipe(recipe, overrides)
    name, where = model or loaded.model, str(output) if output else loaded.output
    if not name:
        raise ValueError("no model: name one on the command line, or as 'model' in the recipe")
    if not where:
        raise ValueError("no output: give --output DIR, or 'output' in the recipe")
    loaded = loaded.model_copy(update={"model": name, "output": where})
    target = Path(where).expanduser().resolve()
    source = open_source(name, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
    if target in (folder := source.folder.resolve(), *folder.parents):
        raise ValueError(f"output {target} is the model's own folder, or holds it; choose another")
    check_output(target, overwrite=overwrite)
    whole = skeleton(source.config, source.dtype, trust_remote_code=trust_remote_code)
    source = arranged(source, whole)
    check_complete(whole, source.checkpoint)
    plan = make_plan(whole, dissect(whole), loaded.stages)
    check_experts(plan, bool(loaded.calibration and loaded.calibration.moe_calibrate_all_experts))
    windows = _windows(loaded, source, plan, trust_remote_code)
    if windows is not None and plan.cache and plan.calibrates_cache:
        plan.cache[0].check_length(plan.cache[1], windows.shape[1])
    domains = _domains(loaded, source, plan, trust_remote_code)
    identity = {
        "recipe": loaded.model_dump(mode="json", exclude=_FREE),
        "source": {"model": name, "sha256": _fingerprint(source)},
        "calibration": windows is not None
        and {"samples": len(windows), "tokens": windows.numel(), "sha256": _sha256(windows)},
        "laconic": version("laconic"),
    } | ({"protect": {i: _sha256(ids) for i, ids in domains.items()}} if domains else {})
    check_begun(target, identity, overwrite=overwrite)
    samples, length = windows.shape if windows is not None else (0, 0)
    return Prepared(
        loaded, source, whole, plan, windows, forecast(plan, source, samples, length), target, identity, domains
    )


def run(prepared: Prepared, *, overwrite: bool = False, report: Report = lambda _: None) -> Artifact:
    """Walk a prepared recipe, or go on with one that was interrupted."""
    begun = time.monotonic()
    torch.manual_seed(prepared.recipe.seed)
    plan, source = prepared.plan, prepared.source
    shards = len(plan.anatomy.taps) + 1
    settings = _settings(prepared.recipe, prepared.windows)
    tell = quantization_config(plan, prepared.model, source.checkpoint)
    with Workspace(prepared.output, prepared.identity, shards, overwrite=overwrite) as workspace:
        resumed = sum(workspace.done(i) for i in range(shards))
        walk(source, prepared.model, plan, prepared.windows, workspace, settings, report, prepared.domains)
        config = read_json(source.folder / "config.json")
        if plan.cache:
            config[KV_CONFIG] = _write_cache(prepared, workspace)
        schemes: dict[str, Scheme] = {}
        if plan.schemes:
            schemes = _as_written(plan.schemes, workspace, prepared)
            config["quantization_config"] = tell(schemes)
        if plan.cache and (engine_scheme := plan.cache[0].engine_scheme):
            told = config.get("quantization_config") or tell({})
            # Native artifacts are read by our plugin, which knows the cache by its own key.
            if told["quant_method"] != NATIVE:
                config["quantization_config"] = told | {"kv_cache_scheme": engine_scheme}
        # Saved before the folder gets its name: an artifact is whole from the moment it is there.
        Artifact(workspace.folder).save_result(
            "compress",
            {
                "seconds": round(time.monotonic() - begun, 2),
                "resumed_shards": resumed,
                "peak_memory_bytes": _peak_memory(settings.device),
                "device": _device_name(settings.device),
                "threads": torch.get_num_threads(),
                "simulated": any(s.simulated for s in schemes.values()),
                "command": " ".join(sys.argv),
                "seed": prepared.recipe.seed,
                "versions": versions(),
            },
        )
        return Artifact(workspace.finish(config, source.folder))


def _write_cache(prepared: Prepared, workspace: Workspace) -> dict[str, Any]:
    """Settle how the cache is stored, write what is fixed of it, and return its scheme for config.json."""
    assert prepared.plan.cache is not None
    stage, shape = prepared.plan.cache
    if not prepared.plan.calibrates_cache:
        return stage.scheme(shape).to_dict()
    scheme, fixed = stage.settle(shape, workspace.calibration(shape.layers))
    if fixed:
        workspace.write_cache(fixed)
    embeddings = prepared.model.get_input_embeddings()
    name = next(n for n, m in prepared.model.named_modules() if m is embeddings)
    weight = prepared.source.checkpoint.load([f"{name}.weight"])[f"{name}.weight"]
    return replace(scheme, fingerprint=fingerprint(weight)).to_dict()


def _as_written(schemes: Mapping[str, Scheme], workspace: Workspace, prepared: Prepared) -> dict[str, Scheme]:
    """The schemes with what their linears have beside the codes, as the finished shards tell."""
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in workspace.shapes().items():
        linear, _, leaf = name.rpartition(".")
        found.setdefault(linear, {})[leaf] = shape
    stored = names_for_engines(prepared.source.checkpoint, prepared.model, [*schemes])
    return {n: as_stored(s, found.get(n) or found.get(stored[n], {})) for n, s in schemes.items()}


def versions() -> dict[str, str]:
    """What a result depends on."""
    packages = ("laconic", "torch", "transformers", "compressed-tensors", "safetensors")
    return {"python": platform.python_version()} | {p: version(p) for p in packages}


def _windows(recipe: Recipe, source: Source, plan: Plan, trust_remote_code: bool) -> Tensor | None:
    if not plan.observing:
        return None
    calibration = recipe.calibration
    if calibration is None:
        cache = [plan.cache[0].method] if plan.cache and plan.calibrates_cache else []
        needing = next(iter([*(s.needing for s in plan.stages if s.observes or s.surveys), *cache]))
        raise ValueError(
            f"{needing} needs calibration text: add 'calibration: {{dataset: FILE_OR_HUB_NAME}}' to the recipe"
        )
    return _read(source, calibration, "calibration", recipe.seed, trust_remote_code)


def _domains(recipe: Recipe, source: Source, plan: Plan, trust_remote_code: bool) -> dict[int, Tensor]:
    """Token ids of the texts on which stages find the heads that they protect, by the stage's number."""
    asked = {i: s.protect for i, s in enumerate(plan.stages) if isinstance(s, PruningStage) and s.protect}
    return {i: _read(source, text, f"stages.{i}.protect", recipe.seed, trust_remote_code) for i, text in asked.items()}


def _read(source: Source, text: Calibration | Protect, key: str, seed: int, trust_remote_code: bool) -> Tensor:
    """Token ids (samples, tokens) of a text. key: of the recipe, that says which."""
    limit = getattr(source.config.get_text_config(), "max_position_embeddings", None)
    if limit and text.max_seq_length > limit:
        raise ValueError(
            f"{key}.max_seq_length {text.max_seq_length} is longer than the model's context of {limit}; lower it"
        )
    tokenizer = load_tokenizer(source.folder, trust_remote_code=trust_remote_code)
    documents = read_documents(text.dataset, split=text.split, config=text.config)
    windows = calibration_windows(
        documents, tokenizer, samples=text.num_calibration_samples, length=text.max_seq_length, seed=seed
    )
    if (highest := int(windows.max())) >= (known := source.config.get_text_config().vocab_size):
        raise ValueError(
            f"the tokenizer in {source.folder} gives token {highest}, the model knows {known}; "
            "copy the original model's tokenizer files there"
        )
    return windows


def _settings(recipe: Recipe, windows: Tensor | None) -> Settings:
    wanted = recipe.device
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda' was asked for, but torch finds no GPU; use device: auto or cpu")
    device = torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")
    calibration = recipe.calibration or Calibration(dataset="")
    length = windows.shape[1] if windows is not None else calibration.max_seq_length
    batch = calibration.batch_size or max(1, _TOKENS_AT_ONCE[device.type] // length)
    gigabytes = calibration.max_memory_gb
    budget = gigabytes * 1e9 if gigabytes else psutil.virtual_memory().available / 4
    return Settings(device, batch, budget, calibration.moe_calibrate_all_experts)


def _fingerprint(source: Source) -> str:
    """Names, shapes, dtypes, and a sample of the bytes of every weight file."""
    digest = hashlib.sha256((source.folder / "config.json").read_bytes())
    tensors = {n: (s.shape, s.dtype) for n, s in sorted(source.checkpoint.tensors.items())}
    digest.update(json.dumps(tensors).encode())
    for file in sorted({s.file for s in source.checkpoint.tensors.values()}):
        size = file.stat().st_size
        with file.open("rb") as f:
            for at in (0, size // 2, max(0, size - 65536)):
                f.seek(at)
                digest.update(f.read(65536))
    return digest.hexdigest()


def _sha256(ids: Tensor) -> str:
    return hashlib.sha256(ids.contiguous().numpy().tobytes()).hexdigest()


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # What getrusage says begins, on Linux, with what the parent process had taken; and on macOS is in bytes.
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    kilobytes = next((int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss if kilobytes is None else kilobytes * 1024


def _device_name(device: torch.device) -> str:
    return (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"cpu ({platform.processor() or platform.machine()})"
    )
