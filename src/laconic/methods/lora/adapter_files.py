"""Adapters on disk in peft's format, which peft loads and vLLM serves (`--enable-lora`)."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

from laconic.checkpoint.atomic import write_file
from laconic.runtime.adapters import ADAPTER_PREFIX, ADAPTER_WEIGHTS, read_adapter


def check_peft() -> None:
    """Check that peft is installed.

    Raises:
        ValueError: if it is not.
    """
    if importlib.util.find_spec("peft") is None:
        raise ValueError("adapters are kept in peft's format, and peft is not installed: pip install 'laconic[train]'")


def write_adapter(
    folder: Path,
    state: Mapping[str, Tensor],
    *,
    rank: int,
    alpha: int,
    dropout: float,
    linears: Sequence[str],
    transposed: bool,
    base: str,
) -> None:
    """Write adapters.

    Args:
        folder: receives the files.
        state: `NAME.lora_A` (rank, in) and `NAME.lora_B` (out, rank) for each linear.
        rank: of the adapters.
        alpha: their product is scaled by alpha / rank.
        dropout: with which they were trained.
        linears: full names of all linears of the model.
        transposed: whether the base's weights are (in, out) in memory (Conv1D).
        base: folder or name of the model to load the adapters on.
    """
    from peft import LoraConfig, TaskType

    names = sorted({n.rpartition(".")[0] for n in state})
    leaves = {n.rpartition(".")[2] for n in names}
    matched = [n for n in linears if n.rpartition(".")[2] in leaves]
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=base,
        inference_mode=True,
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        # Engines expect last parts of names; these suffice if every linear that they match has an adapter.
        target_modules=sorted(leaves) if len(matched) == len(names) else names,
        fan_in_fan_out=transposed,
    )
    folder.mkdir(exist_ok=True)
    tensors = {f"{ADAPTER_PREFIX}{name}.weight": t.contiguous() for name, t in sorted(state.items())}
    write_file(folder / ADAPTER_WEIGHTS, lambda file: save_file(tensors, file, metadata={"format": "pt"}))
    config.save_pretrained(str(folder))


def check_adapter(folder: Path, linears: Mapping[str, nn.Linear] | None, rank: int, alpha: int) -> None:
    """Check that training can start from the adapters in a folder.

    Args:
        folder: of the adapters.
        linears: that get an adapter, by full name; None if the model's shape is not known yet.
        rank: of the adapters to train.
        alpha: of the adapters to train.

    Raises:
        ValueError: if it cannot.
    """
    state, scale = read_adapter(folder)
    if linears is not None:
        lora_a = {f"{n}.lora_A": (rank, linear.in_features) for n, linear in linears.items()}
        lora_b = {f"{n}.lora_B": (linear.out_features, rank) for n, linear in linears.items()}
        if {n: tuple(t.shape) for n, t in state.items()} != lora_a | lora_b:
            raise ValueError(
                f"the adapters in {folder} are of other linears, or not of rank {rank}; set targets and rank as they "
                "were, or name others"
            )
    if not math.isclose(scale, alpha / rank):
        raise ValueError(f"the adapters in {folder} have alpha {scale * rank:g}; set alpha to that")
