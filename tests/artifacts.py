"""Short ways to make an artifact of a tiny model, and to look inside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

import laconic
from laconic import Artifact
from laconic.checkpoint.source import load_tokenizer
from laconic.data.text import calibration_windows, read_documents
from laconic.runtime.linear import QLinear

Stage = dict[str, Any]


def rtn(scheme: str, **keys: Any) -> Stage:
    return {"method": "rtn", "scheme": scheme, **keys}


def gptq(scheme: str, **keys: Any) -> Stage:
    return {"method": "gptq", "scheme": scheme, **keys}


def recipe(*stages: Stage, text: Path | None = None, **keys: Any) -> dict[str, Any]:
    """A recipe, calibrated on 8 samples of 32 tokens of `text`.

    keys: its others; `samples`, `length` and the names of its own keys are the calibration's.
    """
    calibration = {
        "dataset": str(text),
        "num_calibration_samples": keys.pop("samples", 8),
        "max_seq_length": keys.pop("length", 32),
    } | {key: keys.pop(key) for key in ("batch_size", "max_memory_gb", "moe_calibrate_all_experts") if key in keys}
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


def linear_events(artifact: Artifact) -> list[dict[str, Any]]:
    """What the log says of each linear."""
    return [e for e in artifact.log if e["event"] == "linear"]


def quantized_linears(model: PreTrainedModel) -> dict[str, QLinear]:
    """The linears of an artifact's model that hold codes, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, QLinear)}


def with_decoded_weights(source: Path, artifact: Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The source as transformers opens it, the weights that were quantized replaced by what their codes stand for."""
    model = original(source, dtype)
    for name, linear in quantized_linears(laconic.load(artifact, dtype=dtype)).items():
        matrix_of(model, name).copy_(linear.decode(model.dtype))
    return model


def matrix_of(model: PreTrainedModel, name: str) -> Tensor:
    """The weight of a linear (out, in), wherever transformers keeps it: a view, in place of a part of a stack too."""
    path, experts, linear = name.partition(".experts.")
    if not experts:
        module = model.get_submodule(name)
        return module.weight.data.T if isinstance(module, Conv1D) else module.weight.data
    stacked, (number, projection) = model.get_submodule(f"{path}.experts"), linear.split(".")
    gate, up = stacked.gate_up_proj.data[int(number)].chunk(2)
    down = stacked.down_proj.data[int(number)]
    return {"w1": gate, "w3": up, "w2": down, "gate_proj": gate, "up_proj": up, "down_proj": down}[projection]


def matrices(model: PreTrainedModel) -> set[str]:
    """The names of the linears in the blocks of a model that transformers opened."""
    found = set()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | Conv1D):
            found.add(name)
        if hasattr(module, "gate_up_proj") and not isinstance(module.gate_up_proj, torch.nn.Linear):
            names = ("w1", "w2", "w3") if "Mixtral" in type(module).__name__ else ("gate_proj", "up_proj", "down_proj")
            found |= {f"{name}.{i}.{n}" for i in range(len(module.gate_up_proj)) for n in names}
    return found - {"lm_head"}


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
def inputs(
    model: PreTrainedModel, ids: Tensor, linears: Sequence[str], *, all_experts: bool = False
) -> dict[str, Tensor]:
    """What some linears of a model read when it runs on token ids: (all tokens, in) float64.

    Linears of experts read the tokens that the router's logits send them, or (all_experts) every token.
    """
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda _, args: seen.__setitem__(name, args[0].flatten(0, -2).double())

    def keep_routed(name: str) -> Any:
        layer, _, rest = name.partition(".experts.")
        expert, projection = rest.split(".")

        def hook(_: Any, args: Any, output: Any) -> None:
            x, logits = args[0].flatten(0, -2), output[0]
            chosen = logits.topk(model.config.num_experts_per_tok).indices
            x = x if all_experts else x[(chosen == int(expert)).any(-1)]
            if projection in ("w2", "down_proj"):
                experts = model.get_submodule(f"{layer}.experts")
                gate, up = (x @ experts.gate_up_proj[int(expert)].T).chunk(2, -1)
                x = experts.act_fn(gate) * up
            seen[name] = x.double()

        return hook

    handles = [
        model.get_submodule(f"{n.partition('.experts.')[0]}.gate").register_forward_hook(keep_routed(n))
        if ".experts." in n
        else model.get_submodule(n).register_forward_pre_hook(keep(n))
        for n in linears
    ]
    model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen
