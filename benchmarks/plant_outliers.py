"""Add the activation outliers of large models to a small one, without changing its output.

    python benchmarks/plant_outliers.py MODEL OUTPUT [--channels 6] [--factor 32] [--seed 0]

Large language models have a few hidden channels whose activations are 20 to 100 times as large as the others, the same
channels in every layer; round-to-nearest W8A8 fails on them (LLM.int8, arXiv 2208.07339, section 4). This script
multiplies such channels of every norm's output by a power of two, and divides the input columns of the linears that
read them by the same: no bit of the logits changes, but naive quantization of activations becomes worse.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel


@torch.no_grad()
def plant(model: PreTrainedModel, channels: Tensor, factor: float) -> int:
    """Scale `channels` (k,) of every norm whose output only linears read; return the number of norms."""
    readers = norm_readers(model)
    for norm, linears in readers.items():
        norm.weight[channels] *= factor
        for linear in linears:
            linear.weight[:, channels] /= factor
    return len(readers)


@torch.no_grad()
def norm_readers(model: PreTrainedModel) -> dict[nn.Module, list[nn.Linear]]:
    """Return by norm the linears in the decoder blocks whose input is the norm's output tensor itself."""
    outputs: list[tuple[Tensor, nn.Module]] = []
    readers: dict[nn.Module, list[nn.Linear]] = {}

    def record_output(norm: nn.Module, _: Any, output: Any) -> None:
        outputs.append((output, norm))

    def record_reader(linear: nn.Module, args: tuple[Any, ...]) -> None:
        for tensor, norm in outputs:
            if tensor is args[0] and linear is not model.get_output_embeddings():
                readers.setdefault(norm, []).append(linear)  # type: ignore[arg-type]

    handles = []
    for module in model.modules():
        if isinstance(module, nn.Linear):
            handles.append(module.register_forward_pre_hook(record_reader))
        elif getattr(module, "weight", None) is not None and module.weight.dim() == 1:
            handles.append(module.register_forward_hook(record_output))
    model(input_ids=torch.zeros(1, 4, dtype=torch.long), use_cache=False)
    for handle in handles:
        handle.remove()
    return readers


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    """Return the logits of fixed random tokens."""
    ids = torch.randint(model.config.get_text_config().vocab_size, (2, 64), generator=torch.Generator().manual_seed(0))
    out: Tensor = model(input_ids=ids, use_cache=False).logits
    return out


def main() -> None:
    """Scale the channels, check that the logits are unchanged, and write the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--channels", type=int, default=6, help="number of outlier channels")
    parser.add_argument("--factor", type=int, default=32, help="factor of their activations, a power of two")
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice of channels")
    args = parser.parse_args()
    if args.factor < 1 or args.factor & (args.factor - 1):
        parser.error(f"--factor {args.factor} is not a power of two: use 16, 32 or 64")
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto").eval()
    before = logits(model)
    width = model.config.get_text_config().hidden_size
    channels = torch.randperm(width, generator=torch.Generator().manual_seed(args.seed))[: args.channels]
    norms = plant(model, channels, args.factor)
    if norms == 0 or not torch.equal(logits(model), before):
        raise SystemExit(f"{args.model}: its norms cannot be scaled without changing its output")
    model.save_pretrained(args.output)
    for file in (*args.model.glob("*token*"), *args.model.glob("*.model")):
        shutil.copyfile(file, args.output / file.name)
    print(f"{args.output}: {norms} norms, channels {sorted(channels.tolist())} scaled by {args.factor}, same logits")


if __name__ == "__main__":
    main()
