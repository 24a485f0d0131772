"""Running a model whose weights are not loaded: blank inputs, zeros in place of weights, blocks without memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from laconic.structure.hooks import StopForward

_Result = TypeVar("_Result")


def run_without_embeddings(model: PreTrainedModel, blocks_name: str, hidden: Tensor) -> None:
    """Run a model on blank inputs, with zeros in place of weights outside the blocks that are not loaded.

    Args:
        model: The model; whoever calls replaces its blocks' forwards.
        blocks_name: Name of its ModuleList of blocks.
        hidden: (samples, tokens, hidden), for number, device and dtype of the inputs.
    """

    def run(inputs: dict[str, Tensor]) -> None:
        with torch.no_grad(), suppress(StopForward):
            functional_call(model, zero_weights(model, blocks_name), kwargs={**inputs, "use_cache": False})

    with_blank_inputs(zero_embeddings(model, *hidden.shape[:2]).to(hidden.device, hidden.dtype), run)


def with_blank_inputs(zeros: Tensor, run: Callable[[dict[str, Tensor]], _Result]) -> _Result:
    """Run a model on zeros in place of embeddings, or on token ids where it looks at these.

    Args:
        zeros: (samples, tokens, hidden).
        run: Runs the model on keyword arguments; again on others where it fails.

    Returns:
        What `run` returns.
    """
    try:
        return run({"inputs_embeds": zeros})
    except (AttributeError, ValueError, TypeError, RuntimeError):
        return run({"input_ids": torch.zeros(zeros.shape[:2], dtype=torch.long, device=zeros.device)})


def copy_to_meta(block: nn.Module) -> nn.Module:
    """Copy a block to the meta device, where a tensor has an identity but no memory.

    Args:
        block: The block, on any device.

    Returns:
        The copy; the block is unchanged.
    """
    copied = copy.deepcopy(block)
    # A patched forward stays with the original.
    vars(copied).pop("forward", None)
    return copied.to("meta")


def zero_embeddings(model: PreTrainedModel, samples: int, tokens: int) -> Tensor:
    """Make embeddings of zeros.

    Args:
        model: The model, for their width and dtype.
        samples: Number of samples.
        tokens: Number of tokens of each.

    Returns:
        (samples, tokens, hidden), in the dtype of the model, on the CPU.
    """
    embeddings = model.get_input_embeddings().weight
    assert isinstance(embeddings, Tensor)
    return torch.zeros(samples, tokens, embeddings.shape[1], dtype=model.dtype)


def zero_weights(model: PreTrainedModel, blocks: str) -> dict[str, Tensor]:
    """Make zeros for unloaded parameters outside the blocks.

    Args:
        model: The model.
        blocks: Name of its ModuleList of blocks.

    Returns:
        Tensors by the names of the parameters.
    """
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    return {
        # One zero for all elements: the weights of embeddings and towers would take gigabytes.
        n: torch.zeros((), dtype=p.dtype, device=device).expand(p.shape)
        for n, p in model.named_parameters()
        if p.is_meta and not n.startswith(f"{blocks}.")
    }
