"""One walk of a recipe: check everything that can be checked, then stream the blocks through its stages."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from transformers import PreTrainedModel

from laconic.artifact.artifact import Artifact
from laconic.artifact.workspace import Workspace, check_identity
from laconic.checkpoint.files import KV_CONFIG, read_json
from laconic.checkpoint.layout import engine_names
from laconic.checkpoint.source import (
    Source,
    arrange_source,
    build_skeleton,
    check_complete,
    check_tokens,
    load_tokenizer,
)
from laconic.checkpoint.trust import UNTRUSTED, Trust
from laconic.data.text import calibration_windows, read_documents
from laconic.formats.schemes import Scheme
from laconic.formats.storage import scheme_of_shapes
from laconic.kv.attach import fingerprint
from laconic.pipeline.engines import quantization_config
from laconic.pipeline.provenance import account, identify, sha256
from laconic.recipe import Calibration, Recipe
from laconic.runtime.quant_config import NATIVE
from laconic.stages.pruning import Protect, PruningStage
from laconic.structure.anatomy import dissect
from laconic.walk.forecast import Forecast, forecast
from laconic.walk.plan import Plan, check_experts, make_plan
from laconic.walk.settings import Settings
from laconic.walk.walk import walk

Report = Callable[[Mapping[str, Any]], None]

# Tokens run through a block at once when the recipe does not say: enough to keep the arithmetic busy, and on a CPU
# few enough that what a block computes from them stays small: more would be slower there as well as larger.
_TOKENS_AT_ONCE = {"cpu": 2048, "cuda": 16384}


@dataclass(frozen=True)
class Prepared:
    """A walk that passed every check, and what it will take."""

    recipe: Recipe
    source: Source
    model: PreTrainedModel
    plan: Plan
    windows: Tensor | None
    forecast: Forecast
    output: Path
    identity: dict[str, Any]
    domains: dict[int, Tensor]
    trust: Trust = UNTRUSTED


def prepare_walk(
    recipe: Recipe,
    source: Source,
    output: Path,
    *,
    identity: Mapping[str, Any] | None = None,
    windows: Tensor | None = None,
    first: int = 0,
    overwrite: bool = False,
    trust: Trust = UNTRUSTED,
) -> Prepared:
    """Everything up to the first byte of work.

    recipe: its stages are those of this walk, the first of which is number `first` of the whole recipe. identity,
    windows: of the whole recipe, where they are known already. Raises: ValueError, one line that names the fix.
    """
    whole = build_skeleton(source.config, source.dtype, trust=trust)
    source = arrange_source(source, whole)
    check_complete(whole, source.checkpoint)
    plan = make_plan(whole, dissect(whole), recipe.stages, first)
    check_experts(plan, bool(recipe.calibration and recipe.calibration.moe_calibrate_all_experts))
    if not plan.calibrates:
        windows = None
    elif windows is None:
        windows = calibration_ids(recipe, source, plan.calibration_reason, trust=trust)
    if windows is not None and plan.cache and plan.calibrates_cache:
        plan.cache[0].check_length(plan.cache[1], windows.shape[1])
    domains = _domains(recipe, source, plan, trust)
    read = {"protect": {i: sha256(ids) for i, ids in domains.items()}} if domains else {}
    identity = {**(identity or identify(recipe, source, windows)), **read}
    check_identity(output, identity, overwrite=overwrite)
    samples, length = windows.shape if windows is not None else (0, 0)
    foretold = forecast(plan, source, samples, length)
    return Prepared(recipe, source, whole, plan, windows, foretold, output, identity, domains, trust)


def run_walk(
    prepared: Prepared,
    *,
    before: Path | None = None,
    overwrite: bool = False,
    report: Report = lambda _: None,
    describe: Callable[[Path], None] = lambda _: None,
) -> Artifact:
    """Walk what was prepared, or go on with what was interrupted. before: what earlier steps made, if there are any.
    describe: writes the cards into the folder."""
    begun = time.monotonic()
    torch.manual_seed(prepared.recipe.seed)
    plan, source = prepared.plan, prepared.source
    shards = len(plan.anatomy.taps) + 1
    settings = _settings(prepared.recipe, prepared.windows)
    tell = quantization_config(plan, prepared.model, source.checkpoint)
    with Workspace(prepared.output, prepared.identity, shards, overwrite=overwrite) as workspace:
        resumed = sum(workspace.is_finished(i) for i in range(shards))
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
            account(
                begun,
                settings.device,
                prepared.recipe.seed,
                resumed_shards=resumed,
                simulated=any(s.simulated for s in schemes.values()),
                earlier=before,
            ),
        )
        return Artifact(workspace.finish(config, source.folder, carried=before, describe=describe))


def _write_cache(prepared: Prepared, workspace: Workspace) -> dict[str, Any]:
    """Settle how the cache is stored, write what is fixed of it, and return its scheme for config.json."""
    assert prepared.plan.cache is not None
    stage, shape = prepared.plan.cache
    if not prepared.plan.calibrates_cache:
        return stage.scheme(shape).to_dict()
    scheme, fixed = stage.finish_calibration(shape, workspace.read_calibration(shape.layers))
    if fixed:
        workspace.write_cache(fixed)
    embeddings = prepared.model.get_input_embeddings()
    name = next(n for n, m in prepared.model.named_modules() if m is embeddings)
    weight = prepared.source.checkpoint.load([f"{name}.weight"])[f"{name}.weight"]
    return replace(scheme, fingerprint=fingerprint(weight)).to_dict()


def _as_written(schemes: Mapping[str, Scheme], workspace: Workspace, prepared: Prepared) -> dict[str, Scheme]:
    """The schemes with what their linears have beside the codes, as the finished shards tell."""
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in workspace.read_shapes().items():
        linear, _, leaf = name.rpartition(".")
        found.setdefault(linear, {})[leaf] = shape
    stored = engine_names(prepared.source.checkpoint, prepared.model, [*schemes])
    return {n: scheme_of_shapes(s, found.get(n) or found.get(stored[n], {})) for n, s in schemes.items()}


def calibration_ids(recipe: Recipe, source: Source, needing: str, *, trust: Trust = UNTRUSTED) -> Tensor:
    """The calibration set's token ids, (samples, tokens). needing: what wants it.

    Raises: ValueError when the recipe names none, or none that goes with the model.
    """
    calibration = recipe.calibration
    if calibration is None:
        raise ValueError(
            f"{needing} needs calibration text: add 'calibration: {{dataset: FILE_OR_HUB_NAME}}' to the recipe"
        )
    return _read(source, calibration, "calibration", recipe.seed, trust)


def _domains(recipe: Recipe, source: Source, plan: Plan, trust: Trust) -> dict[int, Tensor]:
    """Token ids of the texts on which stages find the heads that they protect, by the stage's number in the walk."""
    asked = {i: s.protect for i, s in enumerate(plan.stages) if isinstance(s, PruningStage) and s.protect}
    keys = {i: f"stages.{plan.first + i}.protect" for i in asked}
    return {i: _read(source, text, keys[i], recipe.seed, trust) for i, text in asked.items()}


def _read(source: Source, text: Calibration | Protect, key: str, seed: int, trust: Trust) -> Tensor:
    """Token ids (samples, tokens) of a text. key: of the recipe, that says which."""
    limit = getattr(source.config.get_text_config(), "max_position_embeddings", None)
    if limit and text.max_seq_length > limit:
        raise ValueError(
            f"{key}.max_seq_length {text.max_seq_length} is longer than the model's context of {limit}; lower it"
        )
    tokenizer = load_tokenizer(source.folder, trust=trust)
    documents = read_documents(text.dataset, split=text.split, config=text.config)
    windows = calibration_windows(
        documents, tokenizer, samples=text.num_calibration_samples, length=text.max_seq_length, seed=seed
    )
    check_tokens(int(windows.max()), source.config.get_text_config().vocab_size, source.folder)
    return windows


def device_of(recipe: Recipe) -> torch.device:
    """Where a recipe is to be worked. Raises: ValueError when that is a GPU, and there is none."""
    wanted = recipe.device
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda' was asked for, but torch finds no GPU; use device: auto or cpu")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def _settings(recipe: Recipe, windows: Tensor | None) -> Settings:
    device = device_of(recipe)
    calibration = recipe.calibration or Calibration(dataset="")
    length = windows.shape[1] if windows is not None else calibration.max_seq_length
    batch = calibration.batch_size or max(1, _TOKENS_AT_ONCE[device.type] // length)
    gigabytes = calibration.max_memory_gb
    budget = gigabytes * 1e9 if gigabytes else psutil.virtual_memory().available / 4
    return Settings(device, batch, budget, calibration.moe_calibrate_all_experts)
