"""Short ways to make an artifact of a tiny model, and to look inside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import laconic
from laconic import Artifact
from laconic.model.data import calibration_windows, read_documents
from laconic.model.linear import QLinear
from laconic.model.load import load_tokenizer

Stage = dict[str, Any]


def rtn(scheme: str, **keys: Any) -> Stage:
    return {"method": "rtn", "scheme": scheme, **keys}


def gptq(scheme: str, **keys: Any) -> Stage:
    return {"method": "gptq", "scheme": scheme, **keys}


def recipe(*stages: Stage, text: Path | None = None, **keys: Any) -> dict[str, Any]:
    """A recipe, calibrated on 8 samples of 32 tokens of `text`.

    keys: its others; `samples`, `length`, `batch_size` and `max_memory_gb` are the calibration's.
    """
    calibration = {
        "dataset": str(text),
        "num_calibration_samples": keys.pop("samples", 8),
        "max_seq_length": keys.pop("length", 32),
    } | {key: keys.pop(key) for key in ("batch_size", "max_memory_gb") if key in keys}
    return {"stages": list(stages), **({"calibration": calibration} if text else {}), **keys}


def press(model: Path, output: Path, *stages: Stage, text: Path | None = None, **keys: Any) -> Artifact:
    """`model` compressed into `output` by such a recipe."""
    return laconic.compress(str(model), recipe(*stages, text=text, **keys), output)


def tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of every weight file in a folder."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def same_bytes(a: Path, b: Path) -> bool:
    """Whether two folders hold the same weight files, byte for byte."""
    names = [sorted(f.name for f in folder.glob("*.safetensors")) for folder in (a, b)]
    return names[0] == names[1] and all((a / n).read_bytes() == (b / n).read_bytes() for n in names[0])


def original(folder: Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A plain model as transformers opens it."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto").eval()


def quantized_linears(model: PreTrainedModel) -> dict[str, QLinear]:
    """The linears of an artifact's model that hold codes, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, QLinear)}


def with_decoded_weights(source: Path, artifact: Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The source as transformers opens it, the weights that were quantized replaced by what their codes stand for."""
    model = original(source, dtype)
    for name, linear in quantized_linears(laconic.load(artifact, dtype=dtype)).items():
        model.get_submodule(name).weight = torch.nn.Parameter(linear.decode(model.dtype))
    return model


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor | None = None) -> Tensor:
    """The model's logits for some fixed tokens, in float32."""
    return model(input_ids=tokens() if ids is None else ids, use_cache=False).logits.float()


def tokens(samples: int = 2, length: int = 48, *, seed: int = 0) -> Tensor:
    """Token ids of no meaning: (samples, length)."""
    return torch.randint(3, 100, (samples, length), generator=torch.Generator().manual_seed(seed))


def windows(model: Path, text: Path) -> Tensor:
    """The token ids on which `press` calibrates."""
    return calibration_windows(read_documents(str(text)), load_tokenizer(model), samples=8, length=32, seed=0)


@torch.no_grad()
def inputs(model: PreTrainedModel, ids: Tensor, linears: Sequence[str]) -> dict[str, Tensor]:
    """What some linears of a model read when it runs on token ids: (all tokens, in) float64."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda _, args: seen.__setitem__(name, args[0].flatten(0, -2).double())

    handles = [model.get_submodule(n).register_forward_pre_hook(keep(n)) for n in linears]
    model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen
