"""Tiny models of every model type that transformers ships: configs shrunk by the names of their fields.

A field is shrunk by the first pattern that its name matches, and kept if none does. Lists with an entry for each layer
are cut to a few layers in which every kind of layer occurs. A few model types need values of their own (`_EXCEPTIONS`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from tiny import VOCABULARY, make_tokenizer, randomise

# The first pattern that a name matches decides. None: the value stays.
_SIZES: tuple[tuple[str, int | None], ...] = (
    (r".*(image|video|audio|pad|bos|eos|boi|eoi|boa|eoa|sep|start|end|cls|mask)_token_(id|index)$", 1),
    (r".*(token|im_start|im_end|im_newline|image_patch)_id$", 1),
    (r".*(image|audio)_token_offset$", 8),
    (r".*vocab.*(size|base).*|.*vocab_offset|n_words|.*ngram.*base$", VOCABULARY),
    (r"encoder_hash_byte_group_vocab", 64),
    (r".*(experts_per_tok(en)?|moe_k|moe_topk|top_?k_experts|experts_per_token|num_selected_experts)$", 2),
    (r".*shared_experts?$|n_shared_experts|num_shared_experts", None),
    (r".*(n_routed_experts|num_(local_)?experts|moe_num_experts|num_expert_(group)?|zero_expert_num)$", 4),
    (r"(n|num)_expert_group|n_group|topk_group|num_limited_groups", 1),
    (r"first_k_dense_replace", 1),
    (r".*(layer_period|layer_offset|layer_group_size|attention_interval|interleave_moe_layer_step)$", 2),
    (r"(mamba_)?(n_groups|num_key_heads)|linear_num_key_heads", 2),
    (r".*index_head_dim", 32),
    (r"index_n_heads", 2),
    (r"index_topk.*", 64),
    (r"qk_head_dim|head_dim_qk", 32),
    (r"(swa_)?(qk_rope|qk_nope)_head_dim", 16),
    (r".*(kv_lora_rank)$", 32),
    (r".*(lora_rank|lowrank|gate_rank|norm_rank|laurel_rank|adapter_rank|dt_rank|time_step_rank)$", 32),
    (r".*(head_dim|d_head|head_size|dim_head|headdim|attention_head_dim|d_kv|kv_channels)$", 16),
    (r"mamba_n_heads|mamba_num_heads|n_mamba_heads", 8),
    (r".*(key_value_heads|kv_heads|n_kv_heads|query_groups)$", 2),
    (r".*(heads|n_head|num_head)$", 4),
    (r".*rotary_dim$", 8),
    (r".*(num_hidden_layers|num_layers|n_layers?|num_blocks|(en|de)coder_layers|depth|layers)$", 2),
    (r"num_kv_shared_layers", 0),
    (r".*per_layer_input|hidden_size_per_layer_input|ple_embed_dim", 32),
    (r"moe_intermediate_size|expert_ffn_hidden_size|expert_dim", 64),
    (r".*(intermediate_size|ffn_dim|ffn_hidden_size|d_ff|dim_ff|dff|n_inner|mlp_dim|feed_forward_size|d_inner)(_mlp)?$",
     128),
    (r".*(hidden_size|d_model|n_embd|embed_dim|embedding_dim|emb_dim|hidden_dim|projection_dim|proj_dim|embedding_size"
     r"|model_dim|dim_model|lru_width|d_ssm|out_dim|output_dim|input_dim|in_dim|d_rel)$", 64),
    (r".*(state_size|d_state|ssm_state_size)$", 16),
    (r".*(position_embeddings|n_positions|max_seq_len|n_ctx|model_max_length|context_length|position_buckets|rel_extent)$",
     256),
    (r".*(sliding_window|window_size|attention_chunk_size|window_len|sliding_window_size|local_attention)$", 16),
    (r".*chunk_size$", 16),
    (r"query_pre_attn_scalar", 16),
    (r".*(position_embedding_size|num_embeddings|codebook_size|num_position_embeddings)$", 256),
)  # fmt: skip
# Of towers, sizes of pictures and their pieces stay; whatever else is large is not.
_PER_LAYER_LIMIT = 6

# Sections of rotary embeddings of three positions (time, height, width), of heads of 16 channels.
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
_SECTIONS = {"text_config": {"rope_parameters": {"mrope_section": [4, 2, 2]}}}

# Values that no pattern gives, by model type; nested dicts are those of parts.
_EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"n_group": 1, "num_expert_group": 1, "topk_group": 1},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "cohere_compass": {"text_config": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}}},
    "cosmos3_edge": _SECTIONS,
    "dbrx": {"attn_config": {"rope_theta": 10000.0}},
    "dory": {"num_hidden_layers": 3, "n_input_layers": 1, "n_recurrent_layers": 1, "n_output_layers": 1,
             "layer_types": None},
    "ernie4_5_vl_moe": {"text_config": {"moe_intermediate_size": [64, 32]}},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}},
    "glm46v": _SECTIONS,
    "glm4v": _SECTIONS,
    "glm4v_moe": {"text_config": {"rope_parameters": {"mrope_section": [2, 1, 1]}, "head_dim": 16}},
    "glm5_next": {"text_config": {"num_key_value_heads": 4}},
    "glm_ocr": _SECTIONS,
    "glmga": _SECTIONS,
    "granite4_vision": {"deepstack_layer_map": [], "spatial_target_layers": []},
    "hy_v4_vl": _SECTIONS,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_hidden_layers": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"], "num_hidden_layers": 4},
    "mamba2": {"num_heads": 8},
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "paddleocr_vl": _SECTIONS,
    "qwen2_5_omni_thinker": _SECTIONS,
    "qwen2_5_vl": _SECTIONS,
    "qwen2_vl": _SECTIONS,
    "reformer": {"is_decoder": True},
    "xmod": {"default_language": "en_XX"},
    "zamba2": {"mamba_headdim": 16, "n_mamba_heads": 8, "attention_hidden_size": 128, "attention_head_dim": 32,
               "num_hidden_layers": 4, "hybrid_layer_ids": [1, 3],
               "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"]},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
              "attention_hidden_size": 128, "attention_head_dim": 32},
    "dots1": {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "nemotron": {"num_key_value_heads": 2},
    "paligemma": {"text_config": {"num_key_value_heads": 4}},
    "step3p7": {"text_config": {"sliding_window": 16}},
}  # fmt: skip


def model_types() -> list[str]:
    """Every model type with a causal language model, and those that read images and write text."""
    return list(dict.fromkeys([*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES]))


def shrunk_config(model_type: str, **keys: Any) -> PretrainedConfig:
    """The config of a tiny model of this type. keys: in place of the shrunk ones."""
    kind = CONFIG_MAPPING[model_type]
    return kind(**_merged(_merged(_shrunk(kind()), _EXCEPTIONS.get(model_type, {})), keys))


def _merged(sizes: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
    nested = {
        k: _merged(sizes[k], v) for k, v in others.items() if isinstance(v, dict) and isinstance(sizes.get(k), dict)
    }
    return sizes | others | nested


def _shrunk(config: PretrainedConfig) -> dict[str, Any]:
    """The keys of a config that change, in a smaller one."""
    sizes: dict[str, Any] = {}
    values = dict(_values(config))
    for key, value in values.items():
        if isinstance(value, PretrainedConfig):
            sizes[key] = {"model_type": value.model_type} | _shrunk(value)
        elif isinstance(value, int) and not isinstance(value, bool):
            size = _size(key, value)
            if size != value:
                sizes[key] = size
    heads = values.get("num_attention_heads")
    if heads and values.get("num_key_value_heads") == heads:
        sizes["num_key_value_heads"] = sizes.get("num_attention_heads", heads)
    if heads and "head_dim" in values and values["head_dim"] is None:
        sizes["head_dim"] = 16
    for key in ("rope_parameters",):
        if isinstance(values.get(key), dict) and key not in sizes:
            sizes[key] = values[key]
    layers = next((values[k] for k in ("num_hidden_layers", "num_layers", "n_layer") if k in values), None)
    lists = {k: v for k, v in values.items() if isinstance(v, list | tuple) and layers and len(v) == layers}
    lists = {k: v for k, v in lists.items() if not all(isinstance(x, int) and x > 1 for x in v) or len(set(v)) == 1}
    if lists:
        picked = _one_of_each(list(zip(*map(_hashable, lists.values()), strict=True)))
        for k, v in lists.items():
            sizes[k] = [_small(k, v[i]) for i in picked]
        sizes |= {k: len(picked) for k in ("num_hidden_layers", "num_layers", "n_layer") if k in sizes}
    return sizes


def _values(config: PretrainedConfig) -> Iterator[tuple[str, Any]]:
    for key in vars(config):
        if key.startswith("_") and key != "_sliding_window_pattern":
            continue
        try:
            yield key, getattr(config, key)
        except Exception:  # a value that differs between layers
            continue


def _size(key: str, value: int) -> int:
    for pattern, size in _SIZES:
        if re.fullmatch(pattern, key):
            return value if size is None or value < 0 else min(value, size)
    return value


def _small(key: str, value: Any) -> Any:
    return _size(key, value) if isinstance(value, int) and not isinstance(value, bool) else value


def _hashable(values: Any) -> list[Any]:
    return [str(v) for v in values]


def _one_of_each(kinds: list[Any]) -> list[int]:
    """Layers in which every kind occurs: the first of each, at least two."""
    first = {kind: i for i, kind in reversed(list(enumerate(kinds)))}
    picked = sorted(first.values())[:_PER_LAYER_LIMIT]
    return picked if len(picked) > 1 else [picked[0], *(i for i in range(len(kinds)) if i != picked[0])][:2]


def auto_class(model_type: str) -> Any:
    """The class by which transformers opens a folder of this type: with its towers, if it has any."""
    kind = CONFIG_MAPPING[model_type]
    multimodal = kind in AutoModelForImageTextToText._model_mapping
    return AutoModelForImageTextToText if multimodal else AutoModelForCausalLM


def build(config: PretrainedConfig, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """A model of a config with random weights."""
    model = auto_class(config.model_type).from_config(config, dtype=dtype)
    # Some classes give parameters a dtype of their own, which checkpoints do not have.
    return model if model._get_dtype_plan(dtype) else model.to(dtype)


def make_shrunk(folder: Path, model_type: str, **keys: Any) -> Path:
    """A tiny model of this type with its tokenizer in `folder`. keys: of its config, in place of the shrunk ones."""
    torch.manual_seed(0)
    model = build(shrunk_config(model_type, **keys))
    randomise(model)
    model.save_pretrained(folder)
    return make_tokenizer(folder)


def open_in_transformers(folder: Path, *, info: bool = False, dtype: Any = torch.float32) -> Any:
    """A folder as transformers opens it, on request with what it reports of loading."""
    kind = auto_class(json.loads((folder / "config.json").read_text())["model_type"])
    opened = kind.from_pretrained(folder, dtype=dtype, output_loading_info=info)
    return (opened[0].eval(), opened[1]) if info else opened.eval()
