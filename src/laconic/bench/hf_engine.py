"""transformers' own `generate` as an engine: one batch at a time, a cache that is one tensor a layer."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, StoppingCriteria

from laconic.bench.energy import measure_energy
from laconic.bench.serving_options import ServingOptions
from laconic.checkpoint.source import read_config
from laconic.runtime.reading import load

FLAGS = ("attn-implementation", "cache-implementation")
_MIN_ROUNDS = 3


class _Clock(StoppingCriteria):
    """Stamps the time of every token; stops nothing."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stamps = device, list[float]()

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        self.stamps.append(_now(self.device))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def check_flags(flags: Iterable[str]) -> None:
    """Check the flags of this engine.

    Args:
        flags: Their names.

    Raises:
        ValueError: A name is unknown.
    """
    for name in flags:
        if name not in FLAGS:
            raise ValueError(f"--engine hf has no flag '{name}'; it has {', '.join(FLAGS)}")


def measure_hf(
    folder: Path, flags: Mapping[str, str], options: ServingOptions, report: Callable[[str], None]
) -> dict[str, Any]:
    """Measure a model in transformers.

    Args:
        folder: Folder of the model.
        flags: `attn-implementation` (`sdpa`, `eager`, `flash_attention_2`, `flash_attention_3`) and
            `cache-implementation` (`dynamic`, `static`, ...), as transformers takes them.
        options: Options of the benchmark.
        report: Called with the name of each measurement before it starts.

    Returns:
        The model's part of a result, as `bench.vllm_engine.measure_vllm` returns it.

    Raises:
        ValueError: The model cannot be opened, or a flag has a value that transformers or its packages lack.
    """
    check_flags(flags)
    device = torch.device("cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu")
    start = time.monotonic()
    model = _open(folder, device, options)
    if attention := flags.get("attn-implementation"):
        try:
            model.set_attn_implementation(attention)
        except (ImportError, ValueError) as e:
            raise ValueError(f"attn-implementation {attention}: {str(e).splitlines()[0]}") from e
    seconds = time.monotonic() - start
    weights = sum(t.numel() * t.element_size() for t in {*model.parameters(), *model.buffers()})
    rows = []
    for prompt, batch in options.cases:
        report(f"{folder.name}: batch {batch}, prompts of {prompt}")
        try:
            rows.append({"batch": batch, "prompt": prompt} | _measure(model, flags, batch, prompt, options))
        except torch.OutOfMemoryError:
            rows.append({"batch": batch, "prompt": prompt, "error": "out of memory"})
            torch.cuda.empty_cache()
    return {
        "kernels": [str(model.config._attn_implementation), flags.get("cache-implementation", "dynamic") + " cache"],
        "weight_bytes": weights,
        "cache_tokens": None,
        "peak_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
        "start_seconds": round(seconds, 1),
        "dtype": str(model.dtype).removeprefix("torch."),
        "rows": rows,
    }


@torch.no_grad()
def _measure(
    model: PreTrainedModel, flags: Mapping[str, str], batch: int, prompt: int, options: ServingOptions
) -> dict[str, Any]:
    """Return the speed of one batch; the first round is not measured."""
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (batch, prompt), generator=generator).to(model.device)
    _generate(model, flags, ids, min(options.new_tokens, 8))
    rounds = [_generate(model, flags, ids, options.new_tokens) for _ in range(max(_MIN_ROUNDS, options.rounds))]
    first = [stamps[1] - stamps[0] for stamps in rounds]
    steps = [later - earlier for stamps in rounds for earlier, later in pairwise(stamps[1:])]
    per_token = [(stamps[-1] - stamps[1]) / (len(stamps) - 2) for stamps in rounds]
    seconds = sum(stamps[-1] - stamps[0] for stamps in rounds)
    energy = measure_energy(lambda: _generate(model, flags, ids, options.new_tokens), model.device)
    tokens = batch * options.new_tokens
    result: dict[str, Any] = {
        "requests": batch * len(rounds),
        "tokens_per_second": tokens * len(rounds) / seconds,
        "joules_per_token": energy.joules / energy.runs / tokens if energy and math.isfinite(energy.joules) else None,
        "energy_from": energy.source if energy else None,
    }
    for name, times in (("ttft", first), ("tpot", per_token), ("itl", steps)):
        result |= {f"{name}_ms_p{p}": 1e3 * _percentile(times, p / 100) for p in (50, 99)}
    return result | {"decode_tokens_per_second": 1e3 * batch / result["tpot_ms_p50"]}


def _generate(model: PreTrainedModel, flags: Mapping[str, str], ids: Tensor, new_tokens: int) -> list[float]:
    """Return the time at the start, and that of every token."""
    clock, options = _Clock(model.device), dict[str, Any]()
    if "cache-implementation" in flags:
        options["cache_implementation"] = flags["cache-implementation"]
    start = _now(model.device)
    model.generate(  # type: ignore[operator]
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        pad_token_id=0,
        stopping_criteria=[clock],
        **options,
    )
    return [start, *clock.stamps]


def _open(folder: Path, device: torch.device, options: ServingOptions) -> PreTrainedModel:
    dtype = getattr(torch, options.dtype) if options.dtype else None
    if not options.dummy:
        return load(folder, device=device, dtype=dtype, trust=options.trust)
    raw, config = read_config(folder, trust=options.trust)
    if raw.get("quantization_config"):
        raise ValueError(
            f"--dummy with --engine hf is for models in 16 bit, and {folder} is quantized; use vLLM for it"
        )
    with device:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype or config.dtype, trust_remote_code=options.trust.remote_code
        )
    model.eval()
    return model


def _percentile(values: list[float], share: float) -> float:
    """Return a percentile by linear interpolation, as numpy and vLLM compute it."""
    return float(torch.tensor(values, dtype=torch.float64).quantile(share))


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
