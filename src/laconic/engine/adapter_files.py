"""Adapters on disk, as peft writes them: what peft loads and vLLM serves (`--enable-lora`)."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from laconic.engine.writer import write_file
from laconic.model.checkpoint import read_json, reading

ADAPTER = "adapter"
_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."


def check_peft() -> None:
    """Raises: ValueError where peft, whose format it is, is not installed."""
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
    """state: `NAME.lora_A` (rank, in), `NAME.lora_B` (out, rank). linears: all of the model that could have had one.
    transposed: whether the base's weights are (in, out) in memory (Conv1D). base: what to load the adapter on."""
    from peft import LoraConfig, TaskType

    names = sorted({n.rpartition(".")[0] for n in state})
    leaves = {n.rpartition(".")[2] for n in names}
    alike = [n for n in linears if n.rpartition(".")[2] in leaves]
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=base,
        inference_mode=True,
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        # Engines want the last part of names, which says enough where it means all of a kind.
        target_modules=sorted(leaves) if len(alike) == len(names) else names,
        fan_in_fan_out=transposed,
    )
    folder.mkdir(exist_ok=True)
    tensors = {f"{_PREFIX}{name}.weight": t.contiguous() for name, t in sorted(state.items())}
    write_file(folder / _WEIGHTS, lambda file: save_file(tensors, file, metadata={"format": "pt"}))
    config.save_pretrained(str(folder))


def read_adapter(folder: Path) -> tuple[dict[str, Tensor], float]:
    """The state that was written, and the factor of its products. Raises: ValueError where there is none."""
    config = read_json(folder / _CONFIG)
    file = folder / _WEIGHTS
    if not file.exists() or not isinstance(config, dict) or "r" not in config:
        raise ValueError(f"{folder} holds no LoRA adapter ({_WEIGHTS}, {_CONFIG})")
    with reading(file):
        tensors = load_file(file)
    state = {n.removeprefix(_PREFIX).removesuffix(".weight"): t for n, t in tensors.items()}
    return state, float(config["lora_alpha"]) / float(config["r"])
