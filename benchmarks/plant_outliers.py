"""Give a small model the outliers that large ones have, without changing what it computes.

    python benchmarks/plant_outliers.py MODEL OUTPUT [--channels 6] [--factor 32] [--seed 0]

Large language models carry a few hidden channels of activations 20 to 100 times as loud as the rest, the same ones in
every layer, which round-to-nearest W8A8 does not survive (LLM.int8, arXiv 2208.07339, section 4). Here those channels
of every norm's output are made louder by a power of two, and the input columns that read them quieter by the same: no
bit of the logits changes, and naive rounding of activations suffers.
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
    """Scale `channels` (k,) of every norm whose output only linears read. Returns: how many norms."""
    readers = norm_readers(model)
    for norm, linears in readers.items():
        norm.weight[channels] *= factor
        for linear in linears:
            linear.weight[:, channels] /= factor
    return len(readers)


@torch.no_grad()
def norm_readers(model: PreTrainedModel) -> dict[nn.Module, list[nn.Linear]]:
    """The linears in the decoder blocks that read the very tensor a norm puts out, by norm."""
    outputs: list[tuple[Tensor, nn.Module]] = []
    readers: dict[nn.Module, list[nn.Linear]] = {}

    def remember(norm: nn.Module, _: Any, output: Any) -> None:
        outputs.append((output, norm))

    def look(linear: nn.Module, args: tuple[Any, ...]) -> None:
        for tensor, norm in outputs:
            if tensor is args[0] and linear is not model.get_output_embeddings():
                readers.setdefault(norm, []).append(linear)  # type: ignore[arg-type]

    handles = []
    for module in model.modules():
        if isinstance(module, nn.Linear):
            handles.append(module.register_forward_pre_hook(look))
        elif getattr(module, "weight", None) is not None and module.weight.dim() == 1:
            handles.append(module.register_forward_hook(remember))
    model(input_ids=torch.zeros(1, 4, dtype=torch.long), use_cache=False)
    for handle in handles:
        handle.remove()
    return readers


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    """For some fixed tokens."""
    ids = torch.randint(model.config.get_text_config().vocab_size, (2, 64), generator=torch.Generator().manual_seed(0))
    out: Tensor = model(input_ids=ids, use_cache=False).logits
    return out


def main() -> None:
    """Plant, check that nothing else changed, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--channels", type=int, default=6, help="how many")
    parser.add_argument("--factor", type=int, default=32, help="how much louder: a power of two")
    parser.add_argument("--seed", type=int, default=0, help="of which")
    args = parser.parse_args()
    if args.factor < 1 or args.factor & (args.factor - 1):
        parser.error(f"--factor {args.factor} is no power of two: use 16, 32 or 64")
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto").eval()
    before = logits(model)
    width = model.config.get_text_config().hidden_size
    channels = torch.randperm(width, generator=torch.Generator().manual_seed(args.seed))[: args.channels]
    norms = plant(model, channels, args.factor)
    if norms == 0 or not torch.equal(logits(model), before):
        raise SystemExit(f"{args.model}: its norms cannot be scaled without changing what it computes")
    model.save_pretrained(args.output)
    for file in (*args.model.glob("*token*"), *args.model.glob("*.model")):
        shutil.copyfile(file, args.output / file.name)
    print(
        f"{args.output}: {norms} norms, channels {sorted(channels.tolist())} {args.factor} times as loud, same logits"
    )


if __name__ == "__main__":
    main()
