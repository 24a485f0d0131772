"""Whole models beside their original: tokens a second of prefill and of decoding, FLOPs, bytes, energy."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, PretrainedConfig, PreTrainedModel

from laconic.bench.energy import energy_of
from laconic.bench.forms import Held, blocked, cusparselt_held
from laconic.bench.timing import Call, Times, captured, take_turns
from laconic.bench.zeros import Zeros, zeros_of
from laconic.runtime.linear import QLinear
from laconic.structure.anatomy import linears_of

PHASES = ("prefill", "decode")


@dataclass(frozen=True)
class Counted:
    """Of the linears of a model, head included. weights: numbers. nonzero: those that are not zero. nbytes: of what a
    pass reads of them, as they are multiplied here. sparse: how many go through a sparse kernel, by pattern."""

    weights: int
    nonzero: int
    nbytes: int
    sparse: Mapping[str, int] = field(default_factory=dict)


def random_model(config: PretrainedConfig, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Of this shape, with random weights."""
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.eval().requires_grad_(False)
    return model


@torch.no_grad()
def with_zeros(model: PreTrainedModel, put: Callable[[Tensor], Tensor]) -> PreTrainedModel:
    """A copy in which `put` set zeros in the linears of the blocks (the head is as it was)."""
    model = copy.deepcopy(model)
    head = model.get_output_embeddings()
    for linear in linears_of(model).values():
        if linear is not head:
            linear.weight.copy_(put(linear.weight))
    return model


@torch.no_grad()
def with_sparse_kernels(
    model: PreTrainedModel, put: Callable[[Tensor], Tensor] | None = None
) -> tuple[PreTrainedModel, dict[str, int]]:
    """A copy whose linears are multiplied by a sparse kernel wherever their zeros and the device have one, and how many
    are, by pattern: 2:4 on an NVIDIA GPU by cuSPARSELt, blocks by ours. put: sets zeros first, in the blocks' linears.
    """
    found: dict[str, int] = {}
    used: dict[str, Held] = {}
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    multiplied = _multiplied(model)
    for name, (linear, weight) in multiplied.items():
        if weight is embeddings.weight:
            continue
        W = weight.detach() if put is None or linear is head else put(weight.detach())
        zeros = zeros_of(W)
        if (held := _sparse(W, zeros)) is not None:
            used[name] = held
            found[zeros.pattern] = found.get(zeros.pattern, 0) + 1
    if not used:
        return model, {}
    # Weights that go through a sparse kernel are not copied.
    shared = {id(multiplied[n][1]): nn.Parameter(torch.empty(0), False) for n in used}
    model = copy.deepcopy(model, shared)
    for name, held in used.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, SparseLinear(held, model.get_submodule(name).bias))
    return model, found


class SparseLinear(nn.Module):
    """A linear that a sparse kernel multiplies."""

    def __init__(self, held: Held, bias: Any) -> None:
        super().__init__()
        self.call, self.nbytes, self.bias = held.call, held.nbytes, bias
        self.weights, self.nonzero = held.weight.numel(), int(held.weight.count_nonzero())
        self.out_features = held.weight.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        y = self.call(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias


def _multiplied(model: PreTrainedModel) -> dict[str, tuple[nn.Module, Tensor]]:
    """Linears that multiply by a matrix in floating point, with it: those of a quantized one too, once it is decoded,
    unless it rounds what it reads."""
    found: dict[str, tuple[nn.Module, Tensor]] = {n: (m, m.weight) for n, m in linears_of(model).items()}
    for name, module in model.named_modules():
        if isinstance(module, QLinear) and module.dense is not None and module.scheme.input_activations is None:
            found[name] = module, module.dense
    return found


def _sparse(W: Tensor, zeros: Zeros) -> Held | None:
    try:
        if zeros.pattern == "2:4" and W.is_cuda and W.element_size() == 2:
            return cusparselt_held(W)
        if zeros.block is not None:
            return blocked(W, zeros.block)
    except (RuntimeError, ValueError):
        pass
    return None


@torch.no_grad()
def count(model: PreTrainedModel, sparse: Mapping[str, int] | None = None) -> Counted:
    """What the linears of a model hold."""
    weights = nonzero = nbytes = 0
    for module in model.modules():
        if isinstance(module, SparseLinear):
            weights, nonzero, nbytes = weights + module.weights, nonzero + module.nonzero, nbytes + module.nbytes
        elif isinstance(module, nn.Linear | QLinear):
            W = module.weight if isinstance(module, nn.Linear) else module.decode(module.dtype)
            weights, nonzero, nbytes = weights + W.numel(), nonzero + int(W.count_nonzero()), nbytes + W.nbytes
    return Counted(weights, nonzero, nbytes, sparse or {})


@torch.no_grad()
def bench_models(
    models: Mapping[str, PreTrainedModel],
    counted: Mapping[str, Counted],
    *,
    prompt: int,
    sequences: int,
    rounds: int,
    seconds: float,
    energy: bool = True,
    report: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Time models in turns; the first is what the others are compared with.

    prompt: tokens that prefill reads, and after which one is decoded. sequences: side by side. rounds, seconds: of each
    phase, whichever is reached first.
    Returns: a row a model. Raises: ValueError for a prompt longer than a model's context.
    """
    device = next(iter(models.values())).device
    for name, model in models.items():
        check_prompt(name, model.config, prompt)
    times: dict[str, dict[str, Times]] = {}
    tokens = {"prefill": sequences * prompt, "decode": sequences}
    calls = {phase: {n: _call(phase, m, sequences, prompt) for n, m in models.items()} for phase in PHASES}
    for phase in PHASES:
        report(phase)
        turns = {name: [call] for name, call in calls[phase].items()}
        times[phase] = take_turns(turns, device, rounds=rounds, seconds=seconds)
    first = next(iter(models))
    rows = []
    for name in models:
        c = counted[name]
        row: dict[str, Any] = {
            "name": name,
            "linear_weights": c.weights,
            "linear_nonzero": c.nonzero,
            "linear_bytes": c.nbytes,
            "flops_per_token": 2 * (c.nonzero if c.sparse else c.weights),
            "sparse_kernels": dict(c.sparse),
        }
        for phase in PHASES:
            t = times[phase][name]
            row[phase] = t.told() | {
                "tokens_per_second": tokens[phase] / t.median,
                "tokens_per_second_p99": tokens[phase] / t.percentile(0.99),
                "speedup": times[phase][first].median / t.median,
                "cpu_speedup": times[phase][first].worked / t.worked,
                "joules_per_token": None,
                "energy_from": None,
            }
            if energy:
                report(f"energy of {name}")
                spent = energy_of(_graphed(calls[phase][name], device, t.graph), device)
                if spent is not None and math.isfinite(spent.joules):
                    row[phase]["joules_per_token"] = spent.joules / spent.runs / tokens[phase]
                    row[phase]["energy_from"] = spent.source
        rows.append(row)
    return rows


def check_prompt(name: str, config: PretrainedConfig, prompt: int) -> None:
    """Raises: ValueError for a prompt longer than a model's context."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and prompt >= limit:
        raise ValueError(f"--prompt {prompt} leaves no room in the context of {limit} of {name}; lower it")


def _graphed(call: Call, device: torch.device, graph: bool) -> Call:
    return captured(call) if graph and device.type == "cuda" else call


def _call(phase: str, model: PreTrainedModel, sequences: int, prompt: int) -> Call:
    """One pass: over prompts into an empty cache, or over one token a sequence after them."""
    highest = model.config.get_text_config().vocab_size
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0, highest, (sequences, prompt), generator=g).to(model.device)
    if phase == "prefill":
        return lambda: _forward(model, ids, DynamicCache(config=model.config))
    cache = DynamicCache(config=model.config)
    _forward(model, ids, cache)
    return partial(_decode, model, ids[:, :1].contiguous(), cache)


def _decode(model: PreTrainedModel, ids: Tensor, cache: DynamicCache) -> Tensor:
    # Growing, a cache takes new tensors and leaves the old ones, so every call starts from the same.
    again = copy.copy(cache)
    again.layers = [copy.copy(layer) for layer in cache.layers]
    return _forward(model, ids, again)


def _forward(model: PreTrainedModel, ids: Tensor, cache: DynamicCache) -> Tensor:
    known = inspect.signature(type(model).forward).parameters
    # transformers renamed it.
    given: dict[str, Any] = {"cache" if "cache" in known else "past_key_values": cache}
    if "logits_to_keep" in known:
        given["logits_to_keep"] = 1
    logits: Tensor = model(input_ids=ids, use_cache=True, **given).logits
    return logits


def gone(row: Mapping[str, Any], original: Mapping[str, Any]) -> float:
    """The share of the original's linear weights that a model has no more, or as zeros."""
    return 1.0 - float(row["linear_nonzero"]) / float(original["linear_nonzero"])


def names(models: Iterable[str]) -> dict[str, str]:
    """Short names of folders, as long as they tell them apart."""
    given = list(dict.fromkeys(models))
    short = {m: m.rstrip("/").rpartition("/")[2] for m in given}
    return short if len(set(short.values())) == len(given) else {m: m for m in given}
