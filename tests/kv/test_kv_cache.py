"""Every operation of a quantized cache, against transformers' own 16-bit cache."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, DynamicCache, PreTrainedModel

import laconic
from artifacts import original
from laconic.kv.attach import make_cache
from laconic.kv.cache import KvCache
from laconic.kv.format import KvFormat
from laconic.kv.scheme import HeadGroup, KvScheme, uniform
from laconic.kv.shape import kv_shape
from rotations import static_rotations
from tiny import make_model

# Sixteen bits change nothing; eight change little.
SIXTEEN = (KvFormat(16), KvFormat(16))
EIGHT = (KvFormat(8, "channel", 4), KvFormat(8, "token", 16))
FAMILIES = ["llama", "mistral", "qwen3", "gemma2", "gemma3", "phi3", "gpt_neox", "gpt2", "opt", "falcon"]

Make = Callable[..., KvCache]


@pytest.fixture(scope="module")
def model(llama: Path) -> PreTrainedModel:
    return original(llama, torch.float32)


def cache_of(model: PreTrainedModel, formats: tuple[KvFormat, KvFormat] = EIGHT, **rest: Any) -> KvCache:
    shape = kv_shape(model.config)
    fixed = static_rotations(shape.layers, shape.heads, shape.channels) if rest.get("rotation") == "attention" else None
    return make_cache(model, uniform("test", *formats, shape.layers, **rest), fixed)


def ids(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 100, (rows, length), generator=torch.Generator().manual_seed(seed))


def named(model: PreTrainedModel, cache: Any) -> dict[str, Any]:
    """The cache under the name by which this transformers passes it."""
    return {"cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values": cache}


@torch.no_grad()
def through(model: PreTrainedModel, cache: Any, tokens: Tensor, chunk: int, mask: Tensor | None = None) -> Tensor:
    """Logits of tokens that pass in chunks."""
    made, seen = [], cache.get_seq_length()
    for part in tokens.split(chunk, 1):
        seen += part.shape[1]
        masked = {} if mask is None else {"attention_mask": mask[:, :seen]}
        if mask is not None:
            masked["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, seen - part.shape[1] : seen]
        made.append(model(part, use_cache=True, **masked, **named(model, cache)).logits)
    return torch.cat(made, 1)


def close(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    return float((found - expected).norm() / expected.norm()) < tolerance


WAYS: list[dict[str, Any]] = [
    {},
    {"residual_length": 5},
    {"residual_length": 3, "sinks": 2},
    {"pre_rope": True, "residual_length": 2},
    {"rotation": "hadamard", "sinks": 1},
    {"rotation": "hadamard", "pre_rope": True, "sinks": 3, "residual_length": 4},
    {"rotation": "attention", "sinks": 1, "residual_length": 2},
    {"rotation": "attention", "pre_rope": True},
]
every_way = pytest.mark.parametrize("way", WAYS, ids=str)


@every_way
@pytest.mark.parametrize("chunk", [1, 3, 8, 30])
def test_chunks_of_any_length_go_through(way: dict[str, Any], chunk: int, model: PreTrainedModel) -> None:
    tokens = ids(2, 30)
    expected = through(model, DynamicCache(), tokens, chunk)
    assert close(through(model, cache_of(model, SIXTEEN, **way), tokens, chunk), expected, 1e-5)
    assert close(through(model, cache_of(model, EIGHT, **way), tokens, chunk), expected, 0.02)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_one(family: str, tmp_path: Path) -> None:
    own = original(make_model(tmp_path / family, family), torch.float32)
    tokens = ids(2, 40)
    expected = through(own, DynamicCache(config=own.config), tokens, 5)
    assert close(through(own, cache_of(own, SIXTEEN), tokens, 5), expected, 1e-5)
    assert close(through(own, cache_of(own, EIGHT, residual_length=3), tokens, 5), expected, 0.03)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "gpt_neox"])
def test_keys_lose_their_rotary_embedding_and_get_it_back(family: str, tmp_path: Path) -> None:
    own = original(make_model(tmp_path / family, family), torch.float32)
    tokens = ids(2, 40)
    expected = through(own, DynamicCache(config=own.config), tokens, 4)
    assert close(through(own, cache_of(own, SIXTEEN, pre_rope=True), tokens, 4), expected, 1e-4)


@every_way
@pytest.mark.parametrize("chunk", [4, 30])
def test_padding_on_the_left_changes_nothing(way: dict[str, Any], chunk: int, model: PreTrainedModel) -> None:
    # Padding is known from the first pass on, be it all padding (4) or all of the prompt (30), with more to follow.
    short, pads = ids(1, 33), 7
    padded = torch.cat([torch.full((1, pads), 1), short], 1)
    both = torch.cat([padded, ids(1, 40, 1)])
    mask = torch.ones_like(both)
    mask[0, :pads] = 0
    alone = through(model, cache_of(model, SIXTEEN, **way), short, 4)
    found = through(model, cache_of(model, SIXTEEN, **way), both, chunk, mask)[:1, pads:]
    assert close(found, alone, 1e-4)


def test_sinks_are_each_rows_own_first_tokens(model: PreTrainedModel) -> None:
    # One-bit codes break everything but what stays in 16 bit.
    pads, formats = 6, (KvFormat(1, "token", 16), KvFormat(1, "token", 16))
    tokens = ids(2, 24)
    mask = torch.ones_like(tokens)
    mask[0, :pads] = 0
    cache = cache_of(model, formats, sinks=4)
    through(model, cache, tokens, 4, mask)
    layer = cache.quantized_layers[0]
    keys, _ = layer._all_tokens()
    true = DynamicCache()
    through(model, true, tokens, 4, mask)
    for row, start in ((0, pads), (1, 0)):
        kept = torch.isclose(keys[row], true.layers[0].keys[row], atol=1e-5).all(-1).all(0)
        assert kept[start : start + 4].all()
        assert not kept[start + 4 :].all()


@every_way
@pytest.mark.parametrize("count", [1, 4, 9])
def test_cropped_tokens_are_forgotten(way: dict[str, Any], count: int, model: PreTrainedModel) -> None:
    first, second = ids(2, 21), ids(2, 9, 1)
    cache = cache_of(model, EIGHT, **way)
    through(model, cache, first, 6)
    cache.crop(-count)
    assert cache.get_seq_length() == 21 - count
    found = through(model, cache, second, 3)
    whole = torch.cat([first[:, : 21 - count], second], 1)
    expected = through(model, DynamicCache(), whole, 30)[:, 21 - count :]
    assert close(found, expected, 0.02)


def test_what_was_encoded_is_never_encoded_again(model: PreTrainedModel) -> None:
    cache = cache_of(model, (KvFormat(2, "channel", 4), KvFormat(2, "token", 16)), residual_length=4)
    through(model, cache, ids(1, 16), 4)
    before = [
        {n: t.clone() for n, t in stored.items()} for layer in cache.quantized_layers for stored in layer.stored[0]
    ]
    through(model, cache, ids(1, 12, 1), 1)
    after = [stored for layer in cache.quantized_layers for stored in layer.stored[0]]
    for old, new in zip(before, after, strict=True):
        for name, tensor in old.items():
            assert torch.equal(new[name][:, :, : tensor.shape[2]], tensor)
            assert new[name].shape[2] > tensor.shape[2]


def test_rows_are_reordered_repeated_and_selected(model: PreTrainedModel) -> None:
    tokens, order = ids(3, 18), torch.tensor([2, 0, 0])
    way = {"pre_rope": True, "sinks": 2, "residual_length": 3}
    cache = cache_of(model, EIGHT, **way)
    through(model, cache, tokens, 6)
    cache.reorder_cache(order)
    more = ids(3, 4, 1)
    expected = through(model, DynamicCache(), torch.cat([tokens[order], more], 1), 30)[:, 18:]
    assert close(through(model, cache, more, 2), expected, 0.02)
    cache.batch_repeat_interleave(2)
    assert cache.quantized_layers[0].keys.shape[0] == 6
    cache.batch_select_indices(torch.tensor([0, 5]))
    last = ids(2, 1, 2)
    rows = torch.cat([tokens[order], more], 1)[[0, 2]]
    expected = through(model, DynamicCache(), torch.cat([rows, last], 1), 30)[:, -1:]
    assert close(through(model, cache, last, 1), expected, 0.02)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"prompt_lookup_num_tokens": 3},
        {"prefill_chunk_size": 5},
    ],
    ids=str,
)
def test_generate_writes_what_it_writes_with_sixteen_bits(how: dict[str, Any], model: PreTrainedModel) -> None:
    tokens = ids(1 if "prompt_lookup_num_tokens" in how else 2, 17)
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 1, **how}
    expected = model.generate(tokens, **settings)
    way = {"pre_rope": True, "sinks": 2, "residual_length": 3}
    found = model.generate(tokens, **settings, **named(model, cache_of(model, SIXTEEN, **way)))
    assert torch.equal(found, expected)
    eight = model.generate(tokens, **settings, **named(model, cache_of(model, EIGHT, **way)))
    assert (eight == expected).float().mean() > 0.9


def test_assisted_decoding(model: PreTrainedModel, tmp_path: Path) -> None:
    assistant = original(make_model(tmp_path / "assistant", "llama"), torch.float32)
    settings = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 1, "assistant_model": assistant}
    expected = model.generate(ids(1, 11), **settings)
    found = model.generate(ids(1, 11), **settings, **named(model, cache_of(model, SIXTEEN, residual_length=2)))
    assert torch.equal(found, expected)


def test_bytes_are_counted_by_hand(model: PreTrainedModel) -> None:
    # 2 layers, 2 heads of 16 channels, 1 row, float32; 24 tokens: 16 encoded, 8 in the window, 1 sink.
    cache = cache_of(model, (KvFormat(2, "channel", 4), KvFormat(4, "token", 16)), residual_length=8, sinks=1)
    through(model, cache, ids(1, 24), 24)
    keys = 16 * 16 * 2 // 8 + 16 // 4 * 16 * 2 * 2
    values = 16 * 16 * 4 // 8 + 16 * 2 * 2
    window, sinks = 2 * 8 * 16 * 4, 2 * 16 * 4
    assert cache.stored_bytes() == 2 * 2 * (keys + values + window + sinks)
    assert cache.effective_bits() == 8 * cache.stored_bytes() / (2 * 2 * 2 * 24 * 16)


def test_a_sliding_window_forgets_what_no_token_sees(tmp_path: Path) -> None:
    own = original(make_model(tmp_path / "mistral", "mistral"), torch.float32)
    cache = cache_of(own, EIGHT)
    sizes = []
    for i in range(6):
        through(own, cache, ids(1, 16, i), 4)
        sizes.append(cache.stored_bytes())
    assert len(set(sizes[2:])) == 1


def test_heads_of_a_layer_may_differ(model: PreTrainedModel) -> None:
    groups = (
        HeadGroup(KvFormat(8, "channel", 4), KvFormat(4, "token", 16), (1,)),
        HeadGroup(KvFormat(4, "channel", 2), KvFormat(8, "token", 16), (0,)),
    )
    cache = make_cache(model, KvScheme("test", (groups, groups), residual_length=2))
    tokens = ids(2, 24)
    expected = through(model, DynamicCache(), tokens, 6)
    assert close(through(model, cache, tokens, 6), expected, 0.1)


def test_reset_and_use_again(model: PreTrainedModel) -> None:
    cache = cache_of(model, EIGHT, pre_rope=True, sinks=1)
    first = through(model, cache, ids(2, 20), 5)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(through(model, cache, ids(2, 20), 5), first)


@every_way
def test_after_a_reset_another_batch_is_as_in_a_new_cache(way: dict[str, Any], model: PreTrainedModel) -> None:
    """Of another size, length and padding."""
    prompts, mask = ids(3, 24, seed=5), torch.ones(3, 24, dtype=torch.long)
    mask[1, :7] = 0
    given = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    cache = cache_of(model, EIGHT, **way)
    model.generate(ids(2, 30), attention_mask=torch.ones(2, 30), max_new_tokens=4, **named(model, cache))
    cache.reset()
    expected = model.generate(prompts, **given, **named(model, cache_of(model, EIGHT, **way)))
    assert torch.equal(model.generate(prompts, **given, **named(model, cache)), expected)


def test_a_used_cache_and_a_shorter_prompt_are_refused(model: PreTrainedModel) -> None:
    cache = cache_of(model)
    through(model, cache, ids(2, 20), 5)
    with pytest.raises(ValueError, match=r"holds 20 tokens of an earlier batch and .* call cache.reset\(\)"):
        model.generate(ids(2, 12, seed=5), max_new_tokens=2, **named(model, cache))


# The plain model's two lines, and what they refuse --------------------------------------------------------------------


def test_a_plain_model_in_two_lines(model: PreTrainedModel) -> None:
    cache = laconic.kv_cache(model, "kivi", k_bits=8, v_bits=8, group_size=16, residual_length=4)
    found = model.generate(ids(1, 20), max_new_tokens=6, do_sample=False, pad_token_id=1, **named(model, cache))
    assert found.shape == (1, 26)
    assert cache.effective_bits() < 32


@pytest.mark.parametrize(
    ("method", "options", "told"),
    [
        ("kivy", {}, "no cache method 'kivy'"),
        ("kivi", {"k_bits": 9}, "^k_bits should be less than or equal to 8, not 9$"),
        ("kivi", {"bits": 2}, "^unknown key 'bits'; did you mean 'v_bits'.$"),
        ("kivi", {"group_size": 12}, "does not divide"),
        ("kvquant", {}, "is calibrated"),
        ("kivi", {"residual_length": -1}, "residual_length"),
        ("kivi", {"group_size": 512}, "would store nothing in the model's context of 256 tokens: 512 are stored tog"),
        ("kivi", {"group_size": 16, "residual_length": 256}, "16 are stored together, and 256 recent ones and 0 first"),
        ("kv_per_token", {"sinks": 10**9}, "1000000000 first ones stay in 16 bit; lower group_size, residual_length"),
        (["kivi"], {}, r"no cache method '\['kivi'\]'; choose one of kivi, "),
    ],
)
def test_nonsense_is_refused(method: str, options: dict[str, Any], told: str, model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match=told):
        laconic.kv_cache(model, method, **options)


def test_what_is_no_model_is_told(llama: Path) -> None:
    with pytest.raises(ValueError, match="kv_cache needs a model in memory, such as "):
        laconic.kv_cache(llama, "kivi")  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [-21, -300, 5])
def test_a_crop_that_cannot_be_leaves_the_cache_as_it_is(count: int, model: PreTrainedModel) -> None:
    cache, tokens = cache_of(model, EIGHT, residual_length=3), ids(1, 20)
    through(model, cache, tokens, 5)
    before = [t.clone() for layer in cache.quantized_layers for t in layer.tensors()]
    with pytest.raises(ValueError, match=r"crop\("):
        cache.crop(count)
    assert cache.get_seq_length() == 20
    assert all(map(torch.equal, before, (t for layer in cache.quantized_layers for t in layer.tensors())))


def test_a_cache_of_another_batch_or_model_is_refused(model: PreTrainedModel, tmp_path: Path) -> None:
    cache = cache_of(model)
    through(model, cache, ids(1, 8), 8)
    with pytest.raises(ValueError, match="holds 1 texts and is given 3; make a new one for each batch"):
        through(model, cache, ids(3, 8), 8)
    assert cache.get_seq_length() == 8
    deeper = original(make_model(tmp_path / "deeper", num_hidden_layers=3), torch.float32)
    with pytest.raises(ValueError, match="has 2 layers and the model more"):
        through(deeper, cache_of(model), ids(1, 8), 8)
    same = original(make_model(tmp_path / "same"), torch.float32)
    with pytest.raises(
        ValueError, match="does not give this cache the positions of its tokens, so it was made for another model"
    ):
        through(same, cache_of(model, pre_rope=True), ids(1, 16), 8)


def test_keys_without_a_rotary_embedding_are_refused(tmp_path: Path) -> None:
    own = original(make_model(tmp_path / "opt", "opt"), torch.float32)
    with pytest.raises(ValueError, match="set before_rope: false"):
        cache_of(own, EIGHT, pre_rope=True)


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"kv_lora_rank": 8}, "latent vectors"),
        ({"layer_types": ["linear_attention"] * 2}, "state-space"),
        ({"mamba_d_state": 16}, "state-space"),
        ({"layer_types": ["folded_attention"] * 2}, "'llama' has a cache of its own"),
        ({"is_encoder_decoder": True}, "an encoder and a decoder"),
    ],
)
def test_models_that_cache_something_else_are_refused(keys: dict[str, Any], told: str, llama: Path) -> None:
    config = original(llama).config
    for name, value in keys.items():
        vars(config)[name] = value
    with pytest.raises(ValueError, match=told):
        kv_shape(config)


@pytest.mark.parametrize("kind", ["rwkv", "t5", "falcon_h1", "deepseek_v3", "mamba2", "jamba"])
def test_kinds_that_cache_something_else_are_refused(kind: str) -> None:
    with pytest.raises(ValueError, match=f"'{kind}' "):
        kv_shape(AutoConfig.for_model(kind))


def test_one_key_value_head_for_all_is_seen() -> None:
    assert kv_shape(AutoConfig.for_model("gpt_bigcode")).heads == 1
    assert kv_shape(AutoConfig.for_model("dbrx", attn_config={"kv_n_heads": 4})).heads == 4


def test_another_models_calibration_is_refused(model: PreTrainedModel) -> None:
    scheme = uniform("test", *EIGHT, 2)
    with pytest.raises(ValueError, match="calibrated on another model"):
        make_cache(model, KvScheme("test", scheme.layers, fingerprint="else"))
