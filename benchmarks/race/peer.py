"""Run one peer in its environment and time it: peer.py PEER JOB.json.

A job has model, tokens (a safetensors file of `input_ids`), case, group_size, iters and output. Prints a line of JSON:
seconds of the compression call only, of loading and of saving.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


def main() -> None:
    """Load, compress and save, and time each."""
    peer, job = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
    windows = load_file(job["tokens"])["input_ids"]
    result = {"llmcompressor": llmcompressor, "gptqmodel": gptqmodel, "autoround": autoround}[peer](job, windows)
    print("RESULT " + json.dumps(result))


def clock(last: list[float]) -> float:
    """Return the seconds since the last call."""
    now = time.monotonic()
    seconds, last[0] = now - last[0], now
    return seconds


def llmcompressor(job: dict[str, Any], windows: torch.Tensor) -> dict[str, float]:
    """Run llm-compressor's oneshot with its defaults."""
    import llmcompressor as package
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not torch.cuda.is_available():
        # Its AWQ pins memory even without a GPU, which fails.
        torch.Tensor.pin_memory = lambda self, *_: self
    last = [time.monotonic()]
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    load = clock(last)
    case, common = job["case"], {"targets": ["Linear"], "ignore": ["lm_head"]}

    def four_bits(symmetric: bool) -> dict[str, QuantizationScheme]:
        args = QuantizationArgs(num_bits=4, symmetric=symmetric, strategy="group", group_size=job["group_size"])
        return {"group_0": QuantizationScheme(targets=["Linear"], weights=args)}

    grouped = {"ignore": ["lm_head"]}
    recipes: dict[str, list[Any]] = {
        "gptq": [GPTQModifier(config_groups=four_bits(True), **grouped)] if case == "gptq" else [],
        "awq": [AWQModifier(), QuantizationModifier(config_groups=four_bits(False), **grouped)]
        if case == "awq"
        else [],
        "smoothquant-rtn": [SmoothQuantModifier(smoothing_strength=0.5), QuantizationModifier(scheme="W8A8", **common)],
        "smoothquant-gptq": [SmoothQuantModifier(smoothing_strength=0.5), GPTQModifier(scheme="W8A8", **common)],
    }
    if case == "autoround":
        from llmcompressor.modifiers.autoround import AutoRoundModifier

        recipes[case] = [AutoRoundModifier(config_groups=four_bits(True), iters=job["iters"], **grouped)]
    rows = [{"input_ids": w.tolist(), "attention_mask": [1] * len(w)} for w in windows]
    oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=Dataset.from_list(rows),
        recipe=recipes[case],
        num_calibration_samples=len(windows),
        max_seq_length=windows.shape[1],
        batch_size=job.get("batch_size", 1),
    )
    compress = clock(last)
    model.save_pretrained(job["output"], save_compressed=True)
    tokenizer.save_pretrained(job["output"])
    return {"version": package.__version__, "load": load, "compress": compress, "save": clock(last)}


def gptqmodel(job: dict[str, Any], windows: torch.Tensor) -> dict[str, float]:
    """Run GPTQModel with its defaults."""
    from importlib.metadata import version

    from gptqmodel import GPTQModel, QuantizeConfig

    last = [time.monotonic()]
    method = {"method": "awq", "format": "gemm"} if job["case"] == "awq" else {}
    config = QuantizeConfig(bits=4, group_size=job["group_size"], **method)
    model = GPTQModel.load(job["model"], config)
    load = clock(last)
    rows = [{"input_ids": w.tolist(), "attention_mask": [1] * len(w)} for w in windows]
    model.quantize(rows, batch_size=job.get("batch_size", 1))
    compress = clock(last)
    model.save(job["output"])
    return {"version": version("gptqmodel"), "load": load, "compress": compress, "save": clock(last)}


def autoround(job: dict[str, Any], windows: torch.Tensor) -> dict[str, float]:
    """Run AutoRound with its defaults except for the number of steps."""
    from importlib.metadata import version

    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    last = [time.monotonic()]
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    load = clock(last)
    rounder = AutoRound(
        model,
        tokenizer,
        scheme="W4A16",
        group_size=job["group_size"],
        iters=job["iters"],
        nsamples=len(windows),
        seqlen=windows.shape[1],
        dataset=[{"input_ids": w[None], "attention_mask": torch.ones_like(w)[None]} for w in windows],
    )
    rounder.quantize()
    compress = clock(last)
    rounder.save_quantized(job["output"], format="auto_gptq")
    return {"version": version("auto-round"), "load": load, "compress": compress, "save": clock(last)}


if __name__ == "__main__":
    main()
