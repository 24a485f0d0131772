"""`laconic bench sparsity`: what zeros, and weights that are gone, buy in time, bytes and energy."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from laconic.artifact.artifact import Artifact
from laconic.bench.checks import PARTS, check_asked, check_folders, check_made_up
from laconic.bench.forms import KINDS
from laconic.bench.linears import bench_linears
from laconic.bench.models import (
    PHASES,
    Counted,
    bench_models,
    count,
    gone,
    names,
    random_model,
    with_sparse_kernels,
    with_zeros,
)
from laconic.bench.shapes import PRESETS, Shape, config_of, linear_shapes, narrower, read_shapes, scaled
from laconic.bench.verdict import busy_verdict, linear_verdicts, model_verdicts
from laconic.bench.zeros import to_2_of_4, to_unstructured, to_zero_blocks
from laconic.checkpoint.source import model_folder
from laconic.pipeline.provenance import command_line, versions
from laconic.runtime.reading import load

BATCHES = (1, 16, 64, 256, 1024, 4096)
DEFAULT = "llama-3-8b"
SPARSE = "sparse kernels"

Built = dict[str, tuple[PreTrainedModel, Counted]]


def bench_sparsity(
    models: Sequence[str] = (),
    *,
    baseline: str | None = None,
    shapes: str | None = None,
    scaled_to: int | None = None,
    sparsities: Sequence[float] = (0.5,),
    block: int = 64,
    kinds: Sequence[str] = KINDS,
    batches: Sequence[int] = BATCHES,
    prompt: int = 512,
    sequences: int = 1,
    parts: Sequence[str] | None = None,
    dtype: str | None = None,
    rounds: int = 30,
    seconds: float = 2.0,
    device: str = "auto",
    report: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Time linears of some shapes, and whole models, dense, sparse and smaller.

    models: folders, artifacts among them; or one preset (`shapes.PRESETS`), or with `scaled_to` one model whose
    architecture is scaled to that hidden size: those have random weights, and are set beside copies of themselves with
    zeros, and with fewer channels and heads. baseline: what folders are compared with, the first of them if not given.
    shapes: of linears, a preset or `4096x14336,...`; those of the first model if not given. sparsities, block, kinds
    (of `forms.KINDS`): of what is pruned here. batches: tokens that a linear multiplies at once. prompt, sequences: of
    whole models. parts: of PARTS; whole models are left out where none was named. rounds, seconds: of each measurement,
    whichever is reached first.

    Returns what is written to `results/` of each artifact, with its own rows alone. Raises: ValueError for what the
    caller can mend.
    """
    chosen = tuple(parts) if parts is not None else (PARTS if models else ("linears",))
    check_asked(chosen, models, sparsities, kinds, batches, block, prompt, sequences, scaled_to, baseline, seconds)
    begun = time.monotonic()
    place = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    precision = getattr(torch, dtype) if dtype else (torch.bfloat16 if place.type == "cuda" else torch.float32)
    made_up = scaled_to is not None or (bool(models) and models[0] in PRESETS)
    asked = [*([baseline] if baseline else []), *models]
    needs_shapes = "linears" in chosen and shapes is None
    config = config_of(asked[0]) if asked and (made_up or needs_shapes) else None
    if config is not None and scaled_to is not None:
        config = scaled(config, scaled_to)
    if "models" in chosen and made_up:
        assert config is not None
        check_made_up(models[0], config, prompt, sparsities, block, kinds)
    elif "models" in chosen:
        check_folders(asked, prompt)
    result: dict[str, Any] = {"model": models[0] if models else shapes or DEFAULT, "baseline": baseline}
    if "linears" in chosen:
        result["linears"] = bench_linears(
            _shapes(shapes, config),
            sorted(set(batches)),
            place,
            dtype=precision,
            sparsities=sparsities,
            block=block,
            kinds=kinds,
            rounds=rounds,
            seconds=seconds,
            report=report,
        )
    if "models" in chosen:
        if made_up:
            assert config is not None
            built = _variants(config, place, precision, sparsities, block, kinds, scaled_to)
        else:
            built = _opened(asked, place, getattr(torch, dtype) if dtype else None)
        rows = bench_models(
            {n: m for n, (m, _) in built.items()},
            {n: c for n, (_, c) in built.items()},
            prompt=prompt,
            sequences=sequences,
            rounds=rounds,
            seconds=seconds,
            report=report,
        )
        result["models"] = [row | {"gone": gone(row, rows[0])} for row in rows]
        precision = next(iter(built.values()))[0].dtype
    rows, wholes = result.get("linears", []), result.get("models", [])
    phases = [row[phase] for row in wholes for phase in PHASES]
    result["said"] = [*linear_verdicts(rows), *model_verdicts(wholes), *busy_verdict([*rows, *phases])]
    result |= {
        "scaled_to": scaled_to,
        "random_weights": made_up,
        "sparsities": list(sparsities),
        "block": block,
        "kinds": list(kinds),
        "batches": sorted(set(batches)),
        "prompt": prompt,
        "sequences": sequences,
        "dtype": str(precision).removeprefix("torch."),
        "device": place.type,
        "device_name": torch.cuda.get_device_name(place) if place.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "seed": 0,
        "seconds": round(time.monotonic() - begun, 2),
        "command": command_line(),
        "versions": versions(),
    }
    if "models" in chosen and not made_up:
        _keep(result, asked)
        if len({*asked}) == 1 and Artifact(model_folder(asked[0])).recipe is not None:
            result["said"].append(
                f"{asked[0]} is its own original here, so nothing is kept in it; name the original by --baseline"
            )
    return result


def _opened(asked: Sequence[str], place: torch.device, dtype: torch.dtype | None) -> Built:
    """Folders as they are, and again with sparse kernels where their zeros have one."""
    built: Built = {}
    for folder, name in names(asked).items():
        model = load(folder, device=place, dtype=dtype)
        built[name] = model, count(model)
        fast, used = with_sparse_kernels(model)
        if used:
            built[f"{name}, {SPARSE}"] = fast, count(fast, used)
    return built


def _variants(
    config: PretrainedConfig,
    place: torch.device,
    dtype: torch.dtype,
    sparsities: Sequence[float],
    block: int,
    kinds: Sequence[str],
    hidden: int | None,
) -> Built:
    """A random model, and what pruning would make of it."""
    original = random_model(config, place, dtype)
    built: Built = {"original" if hidden is None else f"original, hidden {hidden}": (original, count(original))}
    for s in sparsities:
        if "structured" in kinds:
            thin = random_model(narrower(config, s), place, dtype)
            built[f"structured {s:.0%}"] = thin, count(thin)
        if "unstructured" in kinds:
            zeros = with_zeros(original, partial(to_unstructured, sparsity=s))
            built[f"unstructured {s:.0%}"] = zeros, count(zeros)
        if "block" in kinds:
            _with_kernels(built, f"block {block} {s:.0%}", original, partial(to_zero_blocks, size=block, sparsity=s))
    if "2:4" in kinds:
        _with_kernels(built, "2:4", original, to_2_of_4)
    return built


def _with_kernels(
    built: Built, name: str, original: PreTrainedModel, put: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """A copy with zeros, by sparse kernels, or else by dense ones."""
    fast, used = with_sparse_kernels(original, put)
    if not used:
        fast = with_zeros(original, put)
    built[f"{name}, {SPARSE}" if used else name] = fast, count(fast, used)


def _keep(result: dict[str, Any], asked: Sequence[str]) -> None:
    """Each artifact keeps the original's rows and its own; one that is the original itself, none."""
    short = names(asked)
    original = result["models"][0]["name"]
    for folder in list(dict.fromkeys(asked))[1:]:
        artifact = Artifact(model_folder(folder))
        if artifact.recipe is None:
            continue
        mine = [r for r in result["models"] if r["name"] in (original, short[folder], f"{short[folder]}, {SPARSE}")]
        own = {k: v for k, v in result.items() if k not in ("linears", "said")}
        own |= {"model": folder, "baseline": asked[0], "models": mine, "said": list(model_verdicts(mine))}
        artifact.save_result(f"bench-sparsity-{result['device']}", own)


def _shapes(asked: str | None, config: PretrainedConfig | None) -> dict[Shape, str]:
    if asked in PRESETS:
        return linear_shapes(PRESETS[str(asked)])
    if asked is not None:
        return read_shapes(asked)
    return linear_shapes(config if config is not None else PRESETS[DEFAULT])


def _processor() -> str:
    """The CPU's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
