"""Speed of whole models beside their original: tokens per second of prefill and decoding, FLOPs, bytes, energy."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel

from laconic.bench.energy import measure_energy
from laconic.bench.options import SparsityOptions
from laconic.bench.sparse_models import LinearCounts
from laconic.bench.timing import Call, Times, capture_graph, time_interleaved

PHASES = ("prefill", "decode")


@dataclass(frozen=True)
class Candidate:
    """A model to time, and the sizes of its linears.

    Attributes:
        model: The model.
        counts: Weights, nonzero weights and bytes of its linears.
    """

    model: PreTrainedModel
    counts: LinearCounts


@torch.no_grad()
def bench_models(
    candidates: Mapping[str, Candidate],
    options: SparsityOptions,
    *,
    energy: bool = True,
    report: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Time prefill and decoding of models in interleaved rounds.

    Args:
        candidates: Models by name; the first one is the baseline of the others.
        options: Prompt, sequences, rounds and seconds.
        energy: Whether to measure energy.
        report: Called with the name of each measurement before it starts.

    Returns:
        A row per model.

    Raises:
        ValueError: The prompt is longer than a model's context.
    """
    first = next(iter(candidates.values())).model
    for name, candidate in candidates.items():
        check_prompt(name, candidate.model.config, options.prompt)
    rows = {name: _sizes(name, candidate.counts) for name, candidate in candidates.items()}
    tokens = {"prefill": options.sequences * options.prompt, "decode": options.sequences}
    # All calls are made before any is timed: decoding has to fill a cache first.
    calls = {
        phase: {n: _call(phase, c.model, options.sequences, options.prompt) for n, c in candidates.items()}
        for phase in PHASES
    }
    for phase in PHASES:
        report(phase)
        entries = {name: [call] for name, call in calls[phase].items()}
        times = time_interleaved(entries, first.device, rounds=options.rounds, seconds=options.seconds)
        baseline = next(iter(times.values()))
        for name, row in rows.items():
            row[phase] = _speed(times[name], baseline, tokens[phase])
            if energy:
                report(f"energy of {name}")
                run = _as_timed(calls[phase][name], first.device, graph=times[name].graph)
                row[phase] |= _energy(run, first.device, tokens[phase])
    return list(rows.values())


def _sizes(name: str, counts: LinearCounts) -> dict[str, Any]:
    return {
        "name": name,
        "linear_weights": counts.weights,
        "linear_nonzero": counts.nonzero,
        "linear_bytes": counts.nbytes,
        "flops_per_token": 2 * (counts.nonzero if counts.sparse else counts.weights),
        "sparse_kernels": dict(counts.sparse),
    }


def _speed(times: Times, baseline: Times, tokens: int) -> dict[str, Any]:
    return times.as_result() | {
        "tokens_per_second": tokens / times.median,
        "tokens_per_second_p99": tokens / times.percentile(0.99),
        "speedup": baseline.median / times.median,
        "cpu_speedup": baseline.cpu_median / times.cpu_median,
        "joules_per_token": None,
        "energy_from": None,
    }


def _energy(run: Call, device: torch.device, tokens: int) -> dict[str, Any]:
    energy = measure_energy(run, device)
    if energy is None or not math.isfinite(energy.joules):
        return {}
    return {"joules_per_token": energy.joules / energy.runs / tokens, "energy_from": energy.source}


def check_prompt(name: str, config: PretrainedConfig, prompt: int) -> None:
    """Check that a prompt fits the context of a model.

    Args:
        name: Name of the model, for the error message.
        config: Its config.
        prompt: Tokens of the prompt.

    Raises:
        ValueError: The prompt fills the context or exceeds it.
    """
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and prompt >= limit:
        raise ValueError(f"--prompt {prompt} leaves no room in the context of {limit} of {name}; lower it")


def _as_timed(call: Call, device: torch.device, *, graph: bool) -> Call:
    return capture_graph(call) if graph and device.type == "cuda" else call


def _call(phase: str, model: PreTrainedModel, sequences: int, prompt: int) -> Call:
    """Return one forward pass: over prompts into an empty cache, or over one token per sequence after them."""
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (sequences, prompt), generator=generator).to(model.device)
    if phase == "prefill":
        return lambda: _forward(model, ids, DynamicCache(config=model.config))
    cache = DynamicCache(config=model.config)
    _forward(model, ids, cache)
    return partial(_decode, model, ids[:, :1].contiguous(), cache)


def _decode(model: PreTrainedModel, ids: Tensor, cache: DynamicCache) -> Tensor:
    # A growing cache replaces its tensors, so shallow copies let every call start from the same cache.
    fresh = copy.copy(cache)
    fresh.layers = [copy.copy(layer) for layer in cache.layers]
    return _forward(model, ids, fresh)


def _forward(model: PreTrainedModel, ids: Tensor, cache: DynamicCache) -> Tensor:
    parameters = inspect.signature(type(model).forward).parameters
    # The argument has different names in different versions of transformers.
    arguments: dict[str, Any] = {"cache" if "cache" in parameters else "past_key_values": cache}
    if "logits_to_keep" in parameters:
        arguments["logits_to_keep"] = 1
    logits: Tensor = model(input_ids=ids, use_cache=True, **arguments).logits
    return logits


def removed_share(row: Mapping[str, Any], original: Mapping[str, Any]) -> float:
    """Return the share of the original's linear weights that a model does not have, or has as zeros.

    Args:
        row: Row of the model in a result, of which `linear_nonzero` is read.
        original: Row of the original, likewise.
    """
    return 1.0 - float(row["linear_nonzero"]) / float(original["linear_nonzero"])


def short_names(folders: Iterable[str]) -> dict[str, str]:
    """Return short names by folder: the last parts of the folders, or the whole folders if last parts are equal.

    Args:
        folders: Folders or names on the Hub; a repeated one counts once.
    """
    distinct = list(dict.fromkeys(folders))
    last_parts = {f: f.rstrip("/").rpartition("/")[2] for f in distinct}
    return last_parts if len(set(last_parts.values())) == len(distinct) else {f: f for f in distinct}
