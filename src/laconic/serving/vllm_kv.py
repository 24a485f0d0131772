"""vLLM with a packed key-value cache: pages of an artifact's own format (`laconic_kv_cache` in its config.json).

vLLM's list of cache dtypes is closed, so the format comes from the artifact, and the attention backend owns the bytes
of its pages: one slot for each token and head (`serving.slot`). Nothing is kept outside of pages, so prefix caching,
preemption and swapping stay vLLM's own affair.

On a CPU our backend stands in for vLLM's, and hands every other model on to it. Elsewhere vLLM chooses among several,
and the choice is ours where a model has a packed cache and no other backend was asked for.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from dataclasses import replace
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils.hub import cached_file
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    MultipleOf,
)
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout

from laconic.checkpoint.files import KV_CACHE, KV_CONFIG
from laconic.kv.files import by_layer
from laconic.kv.open import KvShape, kv_shape
from laconic.kv.positions import places_of
from laconic.kv.scheme import KvScheme, tokens_at_once
from laconic.serving.paged import Angles, PackedLayer, Part, Scoring, attend, write
from laconic.serving.paged_units import write_units
from laconic.solvers.rotate import turns

log = init_logger(__name__)

_PATH = f"{__name__}.PackedBackend"

# Tokens of history, padding included, that requests of one batch may have to be attended to together.
_TOGETHER = 1 << 14


def register_kv() -> None:
    """Make the backend known to vLLM. May be called again."""
    register_backend(AttentionBackendEnum.CUSTOM, _PATH)
    if current_platform.is_cpu():
        register_backend(AttentionBackendEnum.CPU_ATTN, f"{__name__}.CpuBackend")
    else:
        choose_ours(current_platform)


def choose_ours(platform: Any) -> None:
    """Have a platform choose our backend for models with a packed cache. May be called again."""
    theirs = platform.get_attn_backend_cls
    if getattr(theirs, "laconic", False):
        return

    def choose(selected: Any, attn_selector_config: Any, num_heads: int | None = None) -> str:
        if scheme_of(get_current_vllm_config()) is not None and selected in (None, AttentionBackendEnum.CUSTOM):
            return _PATH
        if scheme_of(get_current_vllm_config()) is not None:
            log.warning("laconic: %s keeps keys and values in 16 bit; leave out --attention-backend", selected.name)
        path: str = theirs(selected, attn_selector_config, num_heads)
        return path

    vars(choose)["laconic"] = True
    platform.get_attn_backend_cls = choose


def scheme_of(config: VllmConfig) -> KvScheme | None:
    """The scheme in a model's config, if there is one that vLLM has no cache of its own for."""
    found = None
    if config.model_config is not None:
        hf = config.model_config.hf_config
        found = getattr(hf, KV_CONFIG, None) or getattr(hf.get_text_config(), KV_CONFIG, None)
        if (getattr(hf, "quantization_config", None) or {}).get("kv_cache_scheme"):
            return None
    return None if found is None else KvScheme.from_dict(found)


class PackedBackend(AttentionBackend):
    """Pages of slots of `nbytes`. Layers begin with this class and each get one of their own size when loaded."""

    forward_includes_kv_cache_update = True
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float32, torch.float16, torch.bfloat16]
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto"]
    nbytes: ClassVar[int] = 0
    # Tokens a page, where something lies behind its slots.
    per_page: ClassVar[int | None] = None

    @classmethod
    def get_supported_kernel_block_sizes(cls, kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(1) if cls.per_page is None else cls.per_page]

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[AttentionImpl]:
        return PackedImpl

    @staticmethod
    def get_builder_cls() -> type[AttentionMetadataBuilder]:
        return BatchBuilder

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        assert cls.nbytes, "asked before the layers were loaded"
        return replace(spec, dtype=torch.uint8, state_content_bytes=cls.nbytes)


@functools.cache
def _of_size(nbytes: int, per_page: int | None) -> type[PackedBackend]:
    size = {"nbytes": nbytes, "per_page": per_page, "__module__": __name__}
    return type(PackedBackend.__name__, (PackedBackend,), size)


class CpuBackend(CPUAttentionBackend):
    """vLLM's own backend, unless the model that is being built has a packed cache."""

    @staticmethod
    def get_impl_cls() -> type[AttentionImpl]:
        packed = scheme_of(get_current_vllm_config()) is not None
        return PackedImpl if packed else CPUAttentionBackend.get_impl_cls()


# --- what a model needs, once it is loaded ---


def prepare(config: VllmConfig) -> None:
    """Give every layer of a model its packed form, and its backend the size of it.

    Raises: ValueError when pages cannot hold what the artifact asks for.
    """
    scheme = scheme_of(config)
    if scheme is None:
        raise ValueError(f"this model has no {KV_CONFIG} in its config.json; serve it with another --attention-backend")
    model = config.model_config
    shape = kv_shape(model.hf_config)
    _refuse(scheme, config, shape)
    angles = _angles(model.hf_config, model.max_model_len) if scheme.pre_rope else {}
    file = cached_file(model.model, KV_CACHE, revision=model.revision) if scheme.calibrated else None
    fixed = by_layer(load_file(file) if file else {}, len(scheme.layers))
    kinds = getattr(model.hf_text_config, "layer_types", None)
    for name, layer in config.compilation_config.static_forward_context.items():
        impl = getattr(layer, "impl", None)
        if not isinstance(impl, PackedImpl) or impl.config is not config:
            continue
        number = extract_layer_index(name)
        groups, sinks = scheme.layers[number], 0 if impl.scoring.window else scheme.sinks
        impl.layer = PackedLayer(
            groups,
            fixed[number],
            heads=shape.heads,
            channels=shape.channels,
            dtype=model.dtype,
            turns=turns(scheme.rotation, fixed[number].get("turn.0", {}), (shape.channels, shape.channels)),
            angles=(angles.get(kinds[number]) if kinds else None) or angles.get(None),
            sinks=sinks,
            per_page=_tokens_a_page(config) if sinks or tokens_at_once(groups) > 1 else None,
        ).to(torch.device(config.device_config.device))
        layer.attn_backend = _of_size(impl.layer.nbytes, impl.layer.per_page)
    log.info("laconic: keys and values are kept as '%s' says, in pages of packed slots", scheme.method)


def _refuse(scheme: KvScheme, config: VllmConfig, shape: KvShape) -> None:
    scheme.check(shape.layers, shape.heads, shape.channels)
    if config.cache_config.cache_dtype != "auto":
        raise ValueError(
            f"this artifact has a cache format of its own; leave out --kv-cache-dtype, or drop {KV_CONFIG}"
        )
    if config.parallel_config.tensor_parallel_size > 1:
        raise ValueError("a packed cache is served on one device yet; serve with --tensor-parallel-size 1")
    if config.speculative_config is not None and any(tokens_at_once(layer) > 1 for layer in scheme.layers):
        raise ValueError("keys in ranges that tokens share cannot be taken back; serve without speculative decoding")
    if not scheme.residual_length:
        return
    kept = f"the last {scheme.residual_length} tokens of a text in 16 bit"
    options = config.additional_config if isinstance(config.additional_config, dict) else {}
    if options.get("laconic_kv", {}).get("window", True):
        raise ValueError(
            f"this artifact keeps {kept}, which vLLM's pages have no place for; set residual_length: 0 in the recipe, "
            """or give them up with --additional-config '{"laconic_kv": {"window": false}}'"""
        )
    log.warning("laconic: served without %s; what was measured with them does not hold for this", kept)


def _tokens_a_page(config: VllmConfig) -> int:
    """Of pages with a tail, which is the smaller a share of a page the larger it is."""
    cache = config.cache_config
    # vLLM settles on a size for CPUs before models are loaded, and for GPUs after.
    return cache.block_size if cache.user_specified_block_size or current_platform.is_cpu() else 512


def _angles(hf_config: Any, length: int) -> dict[str | None, Angles]:
    """Cosines and sines of the model's own rotary embedding, by type of layer where it differs by that."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config)
    places = places_of(model, rotary=True)
    kind_of: Any = type(places.rotary)
    embedding = kind_of(hf_config.get_text_config())
    found: dict[str | None, Angles] = {}
    kinds: set[str | None] = set(places.layer_types or (None,))
    for kind in kinds:
        more = {} if kind is None else {"layer_type": kind}
        cos, sin = embedding(torch.empty(0, dtype=torch.float32), torch.arange(length)[None], **more)
        found[kind] = (cos[0].float(), sin[0].float())
    return found


# --- a step of the engine ---


class BatchBuilder(AttentionMetadataBuilder):
    """Sorts the requests of a step by how many new tokens they have."""

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> list[Part]:
        given = common_attn_metadata
        if given.causal is not True:
            raise ValueError("a packed cache is for causal attention; this model attends both ways")
        lengths, device = given.seq_lens, given.seq_lens.device
        starts = given.query_start_loc_cpu.tolist()
        longest = given.seq_lens_cpu_upper_bound
        known = (lengths if longest is None else longest).tolist()
        by_count: dict[int, list[int]] = defaultdict(list)
        for i in range(given.num_reqs):
            if new := starts[i + 1] - starts[i]:
                by_count[new].append(i)
        parts = []
        for new, requests in by_count.items():
            for some in _together(requests, known):
                rows = torch.tensor(some, device=device)
                ahead = torch.arange(new, device=device)
                tokens = torch.tensor([starts[i] for i in some], device=device)[:, None] + ahead
                parts.append(Part(given.block_table_tensor[rows], lengths[rows], max(known[i] for i in some), tokens))
        return parts


def _together(requests: list[int], lengths: list[int]) -> list[list[int]]:
    """Runs of requests, the longest first, that padded to the longest of them stay within bounds."""
    runs: list[list[int]] = []
    for i in sorted(requests, key=lambda i: -lengths[i]):
        if runs and (len(runs[-1]) + 1) * lengths[runs[-1][0]] <= _TOGETHER:
            runs[-1].append(i)
        else:
            runs.append([i])
    return runs


class PackedImpl(AttentionImpl):
    """One layer's attention."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        **extra: Any,
    ) -> None:
        if attn_type != AttentionType.DECODER or kv_sharing_target_layer_name or any(extra.values()):
            more = ", ".join(name for name, value in extra.items() if value)
            raise ValueError(
                "a packed cache is for plain decoder attention; this model has "
                + (more or f"'{kv_sharing_target_layer_name or attn_type}' attention")
            )
        self.config = get_current_vllm_config()
        self.num_heads, self.head_size, self.scale = num_heads, head_size, scale
        self.num_kv_heads, self.kv_cache_dtype = num_kv_heads or num_heads, kv_cache_dtype
        slopes = None if alibi_slopes is None else torch.tensor(alibi_slopes, dtype=torch.float32)
        self.scoring = Scoring(scale, sliding_window, logits_soft_cap or 0.0, slopes)
        self.layer: PackedLayer | None = None

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        if self.layer is None:
            prepare(self.config)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: list[Part] | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """query: (tokens, heads, channels); key, value: (tokens, key-value heads, channels); kv_cache: (pages,
        key-value heads, tokens a page, bytes) uint8."""
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("a packed cache does not round its output; turn that fusion off")
        if attn_metadata is None:  # vLLM measures how much memory a step takes
            return output.zero_()
        packed = self.layer
        assert packed is not None
        # All write before any reads: a request may share a page that another one fills in this very step.
        store = write_units if packed.unit > 1 else write
        units = [store(packed, kv_cache, part, key[part.tokens], value[part.tokens]) for part in attn_metadata]
        for part, near in zip(attn_metadata, units, strict=True):
            tokens = (query[part.tokens], key[part.tokens], value[part.tokens])
            output[part.tokens] = attend(packed, kv_cache, part, tokens, self.scoring, near).to(output.dtype)
        return output
