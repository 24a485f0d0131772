"""Runs one peer in its own environment, and tells how long it took: peer.py PEER JOB.json.

A job: model, tokens (a safetensors file of `input_ids`), case, group_size, iters, output. Prints one line of JSON:
seconds of the compression call alone, of loading and of saving.
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
    """Load, compress, save; time each."""
    peer, job = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
    windows = load_file(job["tokens"])["input_ids"]
    told = {"llmcompressor": llmcompressor, "gptqmodel": gptqmodel, "autoround": autoround}[peer](job, windows)
    print("RESULT " + json.dumps(told))


def clock(begun: list[float]) -> float:
    """Seconds since the last call."""
    now = time.monotonic()
    passed, begun[0] = now - begun[0], now
    return passed


def llmcompressor(job: dict[str, Any], windows: torch.Tensor) -> dict[str, float]:
    """llm-compressor's oneshot, its defaults."""
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
        # Its AWQ pins memory even where there is nothing to pin it for, and would stop there.
        torch.Tensor.pin_memory = lambda self, *_: self
    begun = [time.monotonic()]
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    load = clock(begun)
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
    compress = clock(begun)
    model.save_pretrained(job["output"], save_compressed=True)
    tokenizer.save_pretrained(job["output"])
    return {"version": package.__version__, "load": load, "compress": compress, "save": clock(begun)}


def gptqmodel(job: dict[str, Any], windows: torch.Tensor) -> dict[str, float]:
    """GPTQModel, its defaults."""
    from importlib.metadata import version

    from gptqmodel import GPTQModel, QuantizeConfig

    begun = [time.monotonic()]
    method = {"method": "awq", "format": "gemm"} if job["case"] == "awq" else {}
    config = QuantizeConfig(bits=4, group_size=job["group_size"], **method)
    model = GPTQModel.load(job["model"], config)
    load = clock(begun)
    rows = [{"input_ids": w.tolist(), "attention_mask": [1] * len(w)} for w in windows]
    model.quantize(rows, batch_size=job.get("batch_size", 1))
    compress = clock(begun)
    model.save(job["output"])
    return {"version": version("gptqmodel"), "load": load, "compress": compress, "save": clock(begun)}


def autoround(job: dict[str, Any], windows: torch.Tensor) -> dict[str, float]:
    """AutoRound, its defaults but for the number of steps."""
    from importlib.metadata import version

    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    begun = [time.monotonic()]
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    load = clock(begun)
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
    compress = clock(begun)
    rounder.save_quantized(job["output"], format="auto_gptq")
    return {"version": version("auto-round"), "load": load, "compress": compress, "save": clock(begun)}


if __name__ == "__main__":
    main()
