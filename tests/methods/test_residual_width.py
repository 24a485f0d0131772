"""Channels of the residual stream: a model whose stream is there twice computes what the half of it does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, VaultGemmaConfig

from laconic.checkpoint.rebuild import rebuild_model
from laconic.methods.llm_pruner.residual_width import choose_channels, hidden_size_keys, remove_channels, residual_axes
from tiny import make_model

NARROWED = ["llama", "mistral", "qwen2", "qwen3", "phi3"]
REFUSED = ["gemma2", "gemma3", "opt", "gpt2", "gpt_neox", "falcon"]


@pytest.mark.parametrize("arch", NARROWED)
def test_a_stream_that_is_there_twice_can_be_halved(arch: str, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", arch)
    raw = json.loads((folder / "config.json").read_text())
    narrow = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    hidden = raw["hidden_size"]
    wide_keys = raw | hidden_size_keys(raw, 2 * hidden)
    torch.manual_seed(0)
    wide = AutoModelForCausalLM.from_config(type(narrow.config)(**wide_keys), dtype=torch.float64).eval()
    axes = residual_axes(wide, wide_keys)
    embeddings = {f"{n}.weight" for n, m in wide.named_modules() if isinstance(m, nn.Embedding)}
    small = dict(narrow.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, parameter in wide.named_parameters(remove_duplicate=False):
            own = small[name]
            if name in axes:
                reads = own.dim() > 1 and axes[name] == own.dim() - 1 and name not in embeddings
                again = torch.zeros_like(own) if reads else own
                own = torch.cat([own, again], axes[name])
            parameter.copy_(own)
    ids = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = narrow(input_ids=ids).logits
        torch.testing.assert_close(
            wide(input_ids=ids).logits, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max())
        )
        kept = torch.arange(2 * hidden) < hidden
        tensors = {**dict(wide.named_parameters(remove_duplicate=False)), **dict(wide.named_buffers())}
        halved = rebuild_model(
            {**wide_keys, **hidden_size_keys(wide_keys, hidden)}, remove_channels(tensors, axes, kept), torch.float64
        )
        torch.testing.assert_close(halved(input_ids=ids).logits, expected)


@pytest.mark.parametrize("arch", REFUSED)
def test_what_follows_from_the_hidden_size_is_refused(arch: str, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", arch)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(ValueError, match="more follows from its hidden size"):
        residual_axes(model, json.loads((folder / "config.json").read_text()))


def test_embeddings_scaled_by_the_hidden_size_are_noticed(tmp_path: Path) -> None:
    """In the model's own forward, under a name that no list has."""
    config = VaultGemmaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, head_dim=16,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match="hidden channels of 'vaultgemma' cannot be pruned"):
        residual_axes(model, config.to_dict())


def test_a_multiple_of_the_step_stays() -> None:
    importance = torch.arange(100.0)
    for sparsity, step, left in ((0.2, 16, 80), (0.29, 16, 64), (0, 32, 100), (0.99, 8, 8)):
        mask = choose_channels(importance, sparsity, step)
        assert int(mask.sum()) == left
        assert bool(mask[-left:].all())
