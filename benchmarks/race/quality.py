"""Quality of a checkpoint, by the same measure for all formats: quality.py ORIGINAL CHECKPOINT TOKENS.

The weights are decoded into the original model, and perplexity and KL are measured in float32 on the held-out windows.
A compressed-tensors checkpoint is opened by Laconic, which also quantizes activations.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import laconic
from laconic.evaluation.fidelity import measure


def main() -> None:
    """Print perplexity and KL as JSON."""
    original, folder, tokens = map(Path, sys.argv[1:])
    windows = load_file(tokens)["heldout"]
    reference = laconic.load(original, dtype=torch.float32)
    config = json.loads((folder / "config.json").read_text()).get("quantization_config", {})
    if config.get("quant_method") in ("compressed-tensors", "laconic"):
        model = laconic.load(folder, dtype=torch.float32)
    else:
        model = laconic.load(original, dtype=torch.float32)
        fill(model, folder, config)
    result = measure(model, windows, reference)
    print(json.dumps({"perplexity": result.perplexity, "kl": result.kl_mean}))


def fill(model: nn.Module, folder: Path, config: dict) -> None:
    """Decode the weights of a GPTQ or AWQ checkpoint into a plain model."""
    stored: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        stored |= load_file(file)
    awq = config.get("quant_method") == "awq"
    for name, module in model.named_modules():
        if f"{name}.qweight" in stored:
            parts = {k: stored[f"{name}.{k}"] for k in ("qweight", "qzeros", "scales")}
            g_idx = stored.get(f"{name}.g_idx")
            weight = (
                decode_awq(**parts)
                if awq
                else decode_gptq(**parts, g_idx=g_idx, plus=config.get("checkpoint_format") != "gptq_v2")
            )
            assert weight.shape == module.weight.shape
            module.weight.data = weight.to(module.weight.dtype)
        else:
            for leaf, parameter in module.named_parameters(recurse=False):
                full = f"{name}.{leaf}" if name else leaf
                if full in stored:
                    parameter.data = stored[full].to(parameter.dtype)


def nibbles(packed: Tensor, dim: int) -> Tensor:
    """Unpack the eight 4-bit fields of every int32, lowest first, along `dim`."""
    fields = torch.stack([(packed >> shift) & 15 for shift in range(0, 32, 4)], dim + 1)
    return fields.flatten(dim, dim + 1)


def decode_gptq(qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor | None, plus: bool) -> Tensor:
    """Decode qweight (in / 8, out), qzeros (groups, out / 8) and scales (groups, out) to a weight (out, in).

    The first version of the format stores zero points minus one (`plus`).
    """
    codes, zeros = nibbles(qweight, 0), nibbles(qzeros, 1) + int(plus)
    groups = g_idx.long() if g_idx is not None else torch.arange(len(codes)) // (len(codes) // len(scales))
    return ((codes - zeros[groups]) * scales[groups].float()).T


def decode_awq(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> Tensor:
    """Decode qweight (in, out / 8), whose fields have the order 0 2 4 6 1 3 5 7, to a weight (out, in)."""
    order = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])

    def unpack(packed: Tensor) -> Tensor:
        return nibbles(packed, 1).view(len(packed), -1, 8)[:, :, order].flatten(1)

    codes, zeros = unpack(qweight), unpack(qzeros)
    groups = torch.arange(len(codes)) // (len(codes) // len(scales))
    return ((codes - zeros[groups]) * scales[groups].float()).T


if __name__ == "__main__":
    main()
