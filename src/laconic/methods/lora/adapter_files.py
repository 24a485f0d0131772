"""Adapters on disk in peft's format, which peft loads and vLLM serves (`--enable-lora`)."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from laconic.checkpoint.atomic import write_file
from laconic.checkpoint.files import read_json, wrap_read_errors

ADAPTER = "adapter"
_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."


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
    tensors = {f"{_PREFIX}{name}.weight": t.contiguous() for name, t in sorted(state.items())}
    write_file(folder / _WEIGHTS, lambda file: save_file(tensors, file, metadata={"format": "pt"}))
    config.save_pretrained(str(folder))


def read_adapter(folder: Path) -> tuple[dict[str, Tensor], float]:
    """Read adapters in peft's format.

    Args:
        folder: holds `adapter_model.safetensors` and `adapter_config.json`.

    Returns:
        The state, as `write_adapter` gets it, and the factor alpha / rank.

    Raises:
        ValueError: if the folder holds none, or its files cannot be read.
    """
    file = folder / _WEIGHTS
    if not file.is_file() or not (folder / _CONFIG).is_file():
        raise ValueError(f"{folder} holds no LoRA adapter ({_WEIGHTS}, {_CONFIG}); name a folder that does")
    config = read_json(folder / _CONFIG)
    numbers = [config.get(key) for key in ("r", "lora_alpha")] if isinstance(config, dict) else [None]
    if not all(isinstance(n, int | float) and n > 0 for n in numbers):
        raise ValueError(
            f"{folder / _CONFIG} does not say 'r' and 'lora_alpha' of an adapter, two numbers above 0; save the "
            "adapter again with peft, or name another folder"
        )
    with wrap_read_errors(file):
        tensors = load_file(file)
    state = {n.removeprefix(_PREFIX).removesuffix(".weight"): t for n, t in tensors.items()}
    return state, float(config["lora_alpha"]) / float(config["r"])


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
