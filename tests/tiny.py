"""Tiny models with everything a real one has: a config, seeded random weights, a tokenizer that puts a BOS."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    Glm4MoeConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

VOCABULARY = 128
BOS, EOS, UNKNOWN = "<s>", "</s>", "<unk>"

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
_OWN_HEADS = {"head_dim": None, "num_key_value_heads": None}
_CONFIGS: dict[str, tuple[type, dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "mistral": (MistralConfig, {"sliding_window": 16}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {}),
    "gemma2": (Gemma2Config, {"sliding_window": 16, "query_pre_attn_scalar": 16}),
    "gemma3": (Gemma3TextConfig, {"sliding_window": 16, "query_pre_attn_scalar": 16, "num_hidden_layers": 3}),
    "phi3": (Phi3Config, {}),
    "opt": (OPTConfig, {"ffn_dim": 128, "word_embed_proj_dim": 64} | _OWN_HEADS),
    "gpt2": (GPT2Config, {"n_inner": 128} | _OWN_HEADS),
    "gpt_neox": (GPTNeoXConfig, _OWN_HEADS),
    "falcon": (FalconConfig, {"ffn_hidden_size": 128} | _OWN_HEADS),
    "falcon_40b": (
        FalconConfig,
        {"ffn_hidden_size": 128, "new_decoder_architecture": True, "num_kv_heads": 2} | _OWN_HEADS,
    ),
    "mixtral": (MixtralConfig, {"num_local_experts": 4}),
    "qwen3_moe": (Qwen3MoeConfig, {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}),
}
ARCHITECTURES = tuple(_CONFIGS)
MIXTURES = ("mixtral", "qwen3_moe")
# Mixtures with an expert that every token goes to: of a width of its own, and of twice that of the others.
_SHARED: dict[str, tuple[type, dict[str, Any]]] = {
    "qwen2_moe": (
        Qwen2MoeConfig,
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "shared_expert_intermediate_size": 96,
        },
    ),
    "glm4_moe": (
        Glm4MoeConfig,
        {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "n_shared_experts": 2,
            "first_k_dense_replace": 1,
            "num_hidden_layers": 3,
        },
    ),
}
SHARED = tuple(_SHARED)


def make_model(
    folder: Path,
    arch: str = "llama",
    tied: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    *,
    seed: int = 0,
    max_shard_size: str = "5GB",
    **config: Any,
) -> Path:
    """A model of `arch` with its tokenizer in `folder`. config: any key of its config.json, in place of ours."""
    kind, own = (_CONFIGS | _SHARED)[arch]
    keys = _SIZES | own | {"tie_word_embeddings": tied} | config
    model = AutoModelForCausalLM.from_config(kind(**{k: v for k, v in keys.items() if v is not None}), dtype=dtype)
    randomise(model, seed)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return make_tokenizer(folder)


def randomise(model: PreTrainedModel, seed: int = 0) -> None:
    """Weights of the size a trained model has: outputs differ from token to token, and no norm is trivial."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                # Every fourth input is louder, so that a Hessian is no multiple of the identity.
                noise[:, ::4] *= 2
                parameter.copy_(noise / parameter.shape[1] ** 0.5)
            else:
                parameter.add_((0.1 * noise).to(parameter.dtype))


def make_tokenizer(folder: Path) -> Path:
    """A tokenizer of one token a character, each text led by a BOS."""
    letters = [BOS, EOS, UNKNOWN, *string.printable]
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(letters)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, unk_token=UNKNOWN, pad_token=EOS
    ).save_pretrained(folder)
    return folder


def make_text(characters: int, seed: int = 0) -> str:
    """Words of random letters: no language, but not noise either, since letters follow one another by habit."""
    generator = torch.Generator().manual_seed(seed)
    habits = torch.rand(27, 27, generator=generator) ** 8
    letter, written = 0, []
    for _ in range(characters):
        letter = int(torch.multinomial(habits[letter], 1, generator=generator))
        written.append((string.ascii_lowercase + " ")[letter])
    return "".join(written)


def make_recipe(file: Path, *stages: dict[str, Any], **keys: Any) -> Path:
    """A recipe in `file`. keys: whatever of model, calibration, output, ... it shall have."""
    file.write_text(yaml.safe_dump({"stages": list(stages)} | {k: v for k, v in keys.items() if v is not None}))
    return file
