"""A model that reads a packed cache by the kernel, against the same model that has it decoded first."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from test_kv_cache import close, named, through
from test_kv_cache import ids as ids_on_cpu
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from artifacts import original
from laconic.kv import attention_interface
from laconic.kv.attach import make_cache
from laconic.kv.attention import kv_attention_torch
from laconic.kv.attention_interface import NAME
from laconic.kv.cache import KvCache
from laconic.kv.format import KvFormat
from laconic.kv.lazy import LazyHistory, LazyTensor
from laconic.kv.packed import kernel_runs_on
from laconic.kv.scheme import HeadGroup, KvScheme, uniform
from laconic.kv.shape import kv_shape
from rotations import static_rotations
from tiny import make_model

FOUR = (KvFormat(4, "channel", 16), KvFormat(4, "token", 16))
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Way = dict[str, Any]


def ids(rows: int, length: int) -> Tensor:
    return ids_on_cpu(rows, length).to(DEVICE)


def scheme_of(layers: int, way: Way) -> KvScheme:
    way = dict(way)
    keys, values = way.pop("formats", FOUR)
    if way.pop("by_head", False):
        groups = (HeadGroup(keys, values, (1,)), HeadGroup(KvFormat(8, "channel", 16), KvFormat(8), (0,)))
        return KvScheme("test", (groups,) * layers, **way)
    return uniform("test", keys, values, layers, **way)


def both_ways(folder: Path, way: Way, run: Callable[[PreTrainedModel, KvCache], Tensor]) -> tuple[Tensor, Tensor]:
    """What `run` gives when attention reads the packed cache, and what it gives when the cache is decoded."""
    made = []
    for name in (NAME, "sdpa"):
        model: Any = original(folder, torch.float32).to(DEVICE)
        shape = kv_shape(model.config)
        fixed = (
            static_rotations(shape.layers, shape.heads, shape.channels) if way.get("rotation") == "attention" else None
        )
        cache = make_cache(model, scheme_of(shape.layers, way), fixed)
        assert model.config._attn_implementation == NAME
        model.config._attn_implementation = name
        for layer in cache.quantized_layers:
            layer.lazy = name == NAME
        with torch.no_grad():
            made.append(run(model, cache).cpu())
    return made[0], made[1]


def by_kernel(folder: Path, way: Way, run: Callable[[PreTrainedModel, KvCache], Tensor]) -> tuple[Tensor, Tensor, int]:
    """The same, and how often the kernel was called."""
    from laconic.kv import attention_triton

    kernel, calls = attention_triton.kv_attention_triton, 0

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return kernel(*args, **kwargs)

    attention_triton.kv_attention_triton = counted
    try:
        return *both_ways(folder, way, run), calls
    finally:
        attention_triton.kv_attention_triton = kernel


def a_text(model: PreTrainedModel, cache: KvCache) -> Tensor:
    """Logits of two rows, the first of them padded, by many tokens, by few, and one by one."""
    # The last tokens are those at which one residual length after another fills a group.
    tokens, pads = ids(2, 51), 21
    mask = torch.ones_like(tokens)
    mask[0, :pads] = 0
    made = [through(model, cache, part, chunk, mask[:, :stop]) for part, chunk, stop in parts(tokens)]
    return torch.cat(made, 1)[:, pads:]


def a_longer_text(model: PreTrainedModel, cache: KvCache) -> Tensor:
    """Logits of a row of which single tokens follow one another until a sliding window holds encoded tokens."""
    tokens = ids(1, 51)
    return torch.cat([through(model, cache, tokens[:, :40], 40), through(model, cache, tokens[:, 40:], 1)], 1)


def parts(tokens: Tensor) -> list[tuple[Tensor, int, int]]:
    return [(tokens[:, :45], 45, 45), (tokens[:, 45:48], 3, 48), (tokens[:, 48:], 1, 51)]


def beams(model: PreTrainedModel, cache: KvCache) -> Tensor:
    tokens = ids(2, 24)
    mask = torch.ones_like(tokens)
    mask[1, :5] = 0
    made: Any = model.generate(
        tokens,
        attention_mask=mask,
        max_new_tokens=5,
        num_beams=2,
        do_sample=False,
        pad_token_id=1,
        **named(model, cache),
    )
    return made  # type: ignore[no-any-return]


def looked_up(model: PreTrainedModel, cache: KvCache) -> Tensor:
    """Several tokens at once, some of them cropped again."""
    tokens = ids(1, 8).repeat(1, 4)
    made: Any = model.generate(
        tokens, max_new_tokens=8, prompt_lookup_num_tokens=3, do_sample=False, pad_token_id=1, **named(model, cache)
    )
    return made  # type: ignore[no-any-return]


def a_hole(model: PreTrainedModel, cache: KvCache) -> Tensor:
    """A mask that hides more than padding."""
    tokens = ids(1, 30)
    mask = torch.ones_like(tokens)
    mask[:, 7:12] = 0
    return through(model, cache, tokens, 29, mask)[:, -1:]


def own_mask(model: PreTrainedModel, cache: KvCache) -> Tensor:
    """A mask of four dimensions, which nobody can look through."""
    through(model, cache, ids(1, 29), 29)
    mask = torch.ones(1, 1, 1, 30, dtype=torch.bool, device=DEVICE)
    mask[..., 4:9] = False
    given = named(model, cache) | {"attention_mask": mask, "position_ids": torch.tensor([[29]], device=DEVICE)}
    logits: Tensor = model(ids(1, 1), use_cache=True, **given).logits
    return logits


@pytest.fixture(scope="module")
def both(on_triton: Callable[..., Any]) -> Callable[..., tuple[Tensor, Tensor, int]]:
    return partial(on_triton, by_kernel)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "llama", dtype=torch.float32, head_dim=32)


@pytest.fixture(scope="module")
def shallow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of one layer: in a second, the kernel's float16 would let some codes round the other way."""
    sizes = {"head_dim": 32, "num_hidden_layers": 1}
    return make_model(tmp_path_factory.mktemp("models") / "shallow", dtype=torch.float32, **sizes)


WAYS: list[Way] = [
    {},
    {"residual_length": 5, "sinks": 3},
    {"rotation": "hadamard", "sinks": 2, "residual_length": 3},
    {"rotation": "attention", "sinks": 2, "residual_length": 3},
    {"by_head": True, "residual_length": 2},
    {"formats": (KvFormat(8), KvFormat(8, symmetric=True))},
    {"pre_rope": True, "residual_length": 2},
    {"pre_rope": True, "formats": (KvFormat(4, outlier_ratio=0.05), KvFormat(4)), "sinks": 2},
    {"formats": (KvFormat(4, "channel", 16, outlier_ratio=0.05), KvFormat(4, outlier_ratio=0.05)), "sinks": 1},
]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_the_reference_gives_what_the_decoded_cache_gives(
    way: Way, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_interface, "kernel_runs_on", lambda _: True)
    calls = []

    def reference(*given: Any) -> Tensor:
        calls.append(1)
        return kv_attention_torch(*given)

    monkeypatch.setattr(attention_interface, "kv_attention", reference)
    found, expected = both_ways(folder, way, a_text)
    assert calls
    # Angles are read in float16.
    assert close(found, expected, 3e-3 if "pre_rope" in way else 1e-5)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_the_kernel_gives_what_the_decoded_cache_gives(way: Way, both: Any, shallow: Path) -> None:
    found, expected, calls = both(shallow, way, a_text)
    # Four passes of few tokens, and a call for each group of heads.
    assert calls == 4 * (2 if "by_head" in way else 1)
    assert close(found, expected, 3e-3)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mistral", "gemma3", "gpt_neox", "gpt2"])
def test_so_it_does_in_every_family(family: str, both: Any, tmp_path: Path) -> None:
    heads = {"mistral": {"head_dim": 32}, "gemma3": {"head_dim": 32}}.get(family, {"num_attention_heads": 2})
    folder = make_model(tmp_path / family, family, dtype=torch.float32, **heads)
    found, expected, calls = both(folder, {"residual_length": 3}, a_longer_text)
    assert calls
    assert close(found, expected, 1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("run", [beams, looked_up])
def test_generation_makes_the_same_tokens(run: Any, both: Any, folder: Path) -> None:
    eight = (KvFormat(8, "channel", 16), KvFormat(8, "token", 16))
    found, expected, calls = both(folder, {"formats": eight, "sinks": 1}, run)
    assert calls
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("run", [a_hole, own_mask])
def test_what_masks_hide_beside_padding_is_hidden(run: Any, both: Any, folder: Path) -> None:
    found, expected, calls = both(folder, {}, run)
    assert not calls
    assert close(found, expected, 1e-5)


@pytest.mark.parametrize(
    "way",
    [{"pre_rope": True, "rotation": "hadamard"}, {"formats": (KvFormat(4, outlier_ratio=0.3), KvFormat(4))}],
    ids=["rotated", "apart"],
)
def test_what_the_kernel_cannot_read_is_decoded(way: Way, both: Any, folder: Path) -> None:
    found, expected, calls = both(folder, way, a_text)
    assert not calls
    assert close(found, expected, 1e-5)


def test_without_a_gpu_the_model_is_left_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    kernel_runs_on.cache_clear()
    model = original(folder, torch.float32)
    before = model.config._attn_implementation
    cache = make_cache(model, scheme_of(2, {}))
    assert model.device.type == "cpu"
    assert model.config._attn_implementation == before
    through(model, cache, ids_on_cpu(1, 40), 20)
    assert not isinstance(cache.update(*torch.zeros(2, 1, 2, 1, 32), 0)[0], LazyTensor)


def test_lazy_tensors_are_decoded_by_whatever_looks_at_them() -> None:
    true, times = torch.randn(2, 1, 2, 7, 16), []

    def decode() -> tuple[Tensor, Tensor]:
        times.append(1)
        return true[0], true[1]

    history = LazyHistory(None, decode)  # type: ignore[arg-type]
    keys, values = (LazyTensor(history, which, 7, true[0][:, :, :1]) for which in (0, 1))
    assert keys.shape == true[0].shape
    assert not times
    q = torch.randn(1, 4, 1, 16)
    made = torch.nn.functional.scaled_dot_product_attention(q, keys, values, enable_gqa=True)
    torch.testing.assert_close(
        made, torch.nn.functional.scaled_dot_product_attention(q, true[0], true[1], enable_gqa=True)
    )
    torch.testing.assert_close(keys[:, :, 2:] + 1, true[0][:, :, 2:] + 1)
    assert torch.equal(torch.cat([values, values], 2)[:, :, :7], true[1])
    assert len(times) == 1


def test_transformers_own_cache_goes_through_sdpa(both: Any, folder: Path) -> None:
    found, expected, calls = both(folder, {}, beside)
    assert not calls
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def beside(model: PreTrainedModel, cache: KvCache) -> Tensor:
    return through(model, DynamicCache(), ids(2, 12), 3)
