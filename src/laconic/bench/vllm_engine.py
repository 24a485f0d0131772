"""One model in vLLM: a server, the loads on it, and what they measured."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from time import monotonic
from typing import Any

from laconic.bench.engine_log import read_engine_log
from laconic.bench.serving_options import ServingOptions
from laconic.bench.vllm_python import VllmPython
from laconic.bench.vllm_server import Load, run_loads, start_server

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "tekken.json")
# Special tokens that a tokenizer may add to a prompt.
_ROOM = 8


def measure_vllm(
    folder: Path,
    config: Mapping[str, Any],
    flags: Mapping[str, str],
    engine: VllmPython,
    options: ServingOptions,
    report: Callable[[str], None],
) -> dict[str, Any]:
    """Serve a model in vLLM, and measure every load of the options.

    Args:
        folder: Folder of the model.
        config: Contents of its config.json.
        flags: Flags of `vllm serve` by name.
        engine: vLLM and its card.
        options: Options of the benchmark.
        report: Called with the name of each measurement before it starts.

    Returns:
        `kernels`, `weight_bytes`, `cache_tokens`, `peak_bytes`, `start_seconds`, `dtype`, and a row per load.

    Raises:
        ValueError: vLLM cannot serve the model.
    """
    with tempfile.TemporaryDirectory(prefix="laconic-bench-") as name:
        scratch = Path(name)
        tokenizer = folder
        if options.dummy and not any((folder / f).exists() for f in _TOKENIZER_FILES):
            tokenizer = write_word_tokenizer(scratch / "tokenizer", vocabulary_size(config))
        report(f"{folder.name}: vLLM starts")
        start = monotonic()
        all_flags = {**default_flags(config, options), **flags}
        with start_server(
            engine.python, folder, all_flags, tokenizer=tokenizer, scratch=scratch, seconds=options.start_seconds
        ) as server:
            seconds = monotonic() - start
            cases = list(options.cases)
            loads = [Load(batch, prompt, options.new_tokens, options.rounds) for prompt, batch in cases]

            def show(finished: int) -> None:
                prompt, batch = cases[min(finished, len(cases) - 1)]
                report(f"{folder.name}: batch {batch}, prompts of {prompt}")

            results = run_loads(server, loads, scratch=scratch, report=show)
            facts = read_engine_log(server.log)
            resident = server.peak_bytes
    used = [r["device_bytes"] for r in results if r["device_bytes"] is not None]
    return {
        **facts,
        "peak_bytes": max(used) if used else resident,
        "start_seconds": round(seconds, 1),
        "dtype": all_flags.get("dtype") or str(config.get("dtype") or config.get("torch_dtype") or "auto"),
        "flags": all_flags,
        "rows": [row(load, result) for load, result in zip(loads, results, strict=True)],
    }


def default_flags(config: Mapping[str, Any], options: ServingOptions) -> dict[str, str]:
    """Return the flags with which every model is served; the user's come after them.

    Args:
        config: Contents of the model's config.json.
        options: Options of the benchmark.
    """
    limit = (config.get("text_config") or config).get("max_position_embeddings")
    context = options.context + _ROOM
    flags = {
        "max-model-len": str(context if limit is None else min(limit, context)),
        "max-num-seqs": str(max(options.batches)),
        # Random prompts share nothing; rounds with equal seeds would.
        "enable-prefix-caching": "false",
    }
    if options.dummy:
        flags["load-format"] = "dummy"
    if options.dtype:
        flags["dtype"] = options.dtype
    if options.trust.remote_code:
        flags["trust-remote-code"] = "true"
    return flags


def row(load: Load, result: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of a result.

    Args:
        load: What was sent.
        result: vLLM's result of it.

    Returns:
        Times in milliseconds: `ttft` to the first token, `tpot` per token of a request (its mean), `itl` between two
        tokens. `tokens_per_second` are of the whole run, prompts included in its time; `decode_tokens_per_second` are
        the batch by the median `tpot`.
    """
    joules, tokens = result["joules"], result["total_output_tokens"]
    times = {f"{name}_ms_p{p}": result[f"p{p}_{name}_ms"] for name in ("ttft", "tpot", "itl") for p in (50, 99)}
    return {
        "batch": load.batch,
        "prompt": load.prompt,
        "requests": result["completed"],
        "tokens_per_second": result["output_throughput"],
        "decode_tokens_per_second": 1e3 * load.batch / times["tpot_ms_p50"],
        **times,
        "joules_per_token": joules / tokens if joules else None,
        "energy_from": "NVML" if joules else None,
    }


def vocabulary_size(config: Mapping[str, Any]) -> int:
    """Return the number of tokens of a model.

    Args:
        config: Contents of its config.json.
    """
    return int((config.get("text_config") or config)["vocab_size"])


def write_word_tokenizer(folder: Path, size: int) -> Path:
    """Write a tokenizer for a model that has none: a word per token, with spaces between.

    Args:
        folder: Folder to write.
        size: Number of tokens.

    Returns:
        The folder.
    """
    tokens = {f"t{i}": i for i in range(size)}
    data = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": tokens, "unk_token": "t0"},
    }
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(json.dumps(data))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder
