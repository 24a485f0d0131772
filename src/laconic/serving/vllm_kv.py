"""vLLM with a packed key-value cache: pages in the format of the artifact (`laconic_kv_cache` in its config.json).

vLLM's list of cache dtypes is closed, so the format comes from the artifact, and the attention backend owns the bytes
of its pages (`serving.page`). Nothing is kept outside of pages, so prefix caching, preemption and swapping work as vLLM
does them. `serving.vllm_choice` makes vLLM use this backend.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file
from torch import Tensor
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
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout

from laconic.checkpoint.files import KV_CACHE, KV_CONFIG
from laconic.kv.files import by_layer
from laconic.kv.packed import kernel_runs_on
from laconic.kv.scheme import ROTATIONS, KvScheme
from laconic.kv.shape import kv_shape
from laconic.serving.page import PagedLayer, Scoring, SequenceBatch
from laconic.serving.page_write import ExactTokens, write_tokens
from laconic.serving.paged_attention import paged_attention, why_not_by_kernel
from laconic.serving.vllm_batches import BatchBuilder
from laconic.serving.vllm_pages import PAGE_TOKENS_OF_SLOTS, check_servable, keeps_recent, rotary_tables, with_pages
from laconic.solvers.rotate import layer_rotations

# vLLM prints what loggers below its own name say.
log = init_logger(f"vllm.{__name__}")


def scheme_of(config: VllmConfig) -> KvScheme | None:
    """Return the cache scheme in a model's config; None where it has none, or vLLM has such a cache itself.

    Args:
        config: Config of the model that vLLM serves.
    """
    data = None
    if config.model_config is not None:
        hf = config.model_config.hf_config
        data = getattr(hf, KV_CONFIG, None) or getattr(hf.get_text_config(), KV_CONFIG, None)
        if (getattr(hf, "quantization_config", None) or {}).get("kv_cache_scheme"):
            return None
    return None if data is None else KvScheme.from_dict(data)


class PackedBackend(AttentionBackend):
    """Backend of packed pages. Layers begin with this class, and get one of their own size when they are loaded.

    Attributes:
        row_bytes: Bytes of a row of a page.
        page_tokens: Tokens of a page, where it has more than slots.
    """

    forward_includes_kv_cache_update = True
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float32, torch.float16, torch.bfloat16]
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto"]
    row_bytes: ClassVar[int] = 0
    page_tokens: ClassVar[int | None] = None

    @classmethod
    def get_supported_kernel_block_sizes(cls, kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(1) if cls.page_tokens is None else cls.page_tokens]

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        # The kernel reads one page at a time, and looks each of them up.
        return cls.page_tokens or max(default_block_size, PAGE_TOKENS_OF_SLOTS)

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
        assert cls.row_bytes, "the layers are not loaded yet"
        return replace(spec, dtype=torch.uint8, state_content_bytes=cls.row_bytes)


@functools.cache
def _backend_of_size(row_bytes: int, page_tokens: int | None) -> type[PackedBackend]:
    size = {"row_bytes": row_bytes, "page_tokens": page_tokens, "__module__": __name__}
    return type(PackedBackend.__name__, (PackedBackend,), size)


# --- a model that is loaded ---


def prepare(config: VllmConfig) -> None:
    """Give every attention layer of a loaded model its page layout, and a backend of that size.

    Args:
        config: Config of the model that vLLM serves.

    Raises:
        ValueError: The artifact's cache cannot be served with these options.
    """
    scheme = scheme_of(config)
    if scheme is None:
        raise ValueError(f"this model has no {KV_CONFIG} in its config.json; serve it with another --attention-backend")
    model = config.model_config
    shape = kv_shape(model.hf_config)
    check_servable(scheme, config, shape)
    device = torch.device(config.device_config.device)
    # On the device once: all layers of a type share a table.
    tables = rotary_tables(model.hf_config, model.max_model_len) if scheme.pre_rope else {}
    rotary = {layer_type: (cos.to(device), sin.to(device)) for layer_type, (cos, sin) in tables.items()}
    file = cached_file(model.model, KV_CACHE, revision=model.revision) if scheme.calibrated else None
    static = by_layer(load_file(file) if file else {}, len(scheme.layers))
    layer_types = getattr(model.hf_text_config, "layer_types", None)
    row_bytes: list[int] = []
    why_not: dict[str | None, list[int]] = {}
    for name, layer in config.compilation_config.static_forward_context.items():
        impl = getattr(layer, "impl", None)
        if not isinstance(impl, PackedImpl) or impl.config is not config:
            continue
        number = extract_layer_index(name)
        layer_without_pages = PagedLayer(
            scheme.layers[number],
            static[number],
            heads=shape.heads,
            channels=shape.channels,
            dtype=model.dtype,
            rotations=layer_rotations(
                scheme.rotation, static[number].get(ROTATIONS, {}), (shape.channels, shape.channels)
            ),
            rotary=(rotary.get(layer_types[number]) if layer_types else None) or rotary.get(None),
            sinks=0 if impl.scoring.window else scheme.sinks,
            residual_length=scheme.residual_length if keeps_recent(config) else 0,
        )
        impl.layer = with_pages(layer_without_pages, config).to(device)
        layer.attn_backend = _backend_of_size(impl.layer.row_bytes, impl.layer.page_tokens)
        row_bytes.append(impl.layer.row_bytes)
        reason = impl.why_not_by_kernel()
        why_not.setdefault(reason, []).append(number)
        impl.kernels_alone = current_platform.is_cuda() and reason is None and _written_by_kernel(impl.layer)
    log.info(
        "laconic: keys and values are stored by '%s', in pages of %.2f times fewer bytes than 16 bit",
        scheme.method,
        4 * shape.channels * len(row_bytes) / max(1, sum(row_bytes)),
    )
    for reason, numbers in why_not.items():
        if reason is not None:
            log.warning("laconic: the attention of layers %s is plain torch, which is slow: %s", numbers, reason)


def _written_by_kernel(layer: PagedLayer) -> bool:
    from laconic.serving.paged_triton import why_not_written

    return why_not_written(layer) is None


# --- a step of the engine ---


class PackedImpl(AttentionImpl):
    """Attention of one layer.

    Attributes:
        layer: Layout of its pages; None before the model is loaded.
        kernels_alone: Whether kernels of static shapes write and read single new tokens.
    """

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
            options = ", ".join(name for name, value in extra.items() if value)
            raise ValueError(
                "a packed cache is for plain decoder attention, and this model has "
                + (options or f"'{kv_sharing_target_layer_name or attn_type}' attention")
                + f"; serve an artifact without {KV_CONFIG}"
            )
        self.config = get_current_vllm_config()
        self.num_heads, self.head_size, self.scale = num_heads, head_size, scale
        self.num_kv_heads, self.kv_cache_dtype = num_kv_heads or num_heads, kv_cache_dtype
        slopes = None if alibi_slopes is None else torch.tensor(alibi_slopes, dtype=torch.float32)
        self.scoring = Scoring(scale, sliding_window, logits_soft_cap or 0.0, slopes)
        self.layer: PagedLayer | None = None
        self.kernels_alone = False

    def why_not_by_kernel(self) -> str | None:
        """Return why a GPU's kernel does not attend over the layer's pages; None where it does, and on a CPU."""
        assert self.layer is not None
        device = torch.device(self.config.device_config.device)
        if device.type == "cpu":
            return None
        if not kernel_runs_on(device):
            return "Triton is not installed"
        return why_not_by_kernel(
            self.layer, self.scoring, self.layer.page_tokens or self.config.cache_config.block_size
        )

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
        attn_metadata: list[SequenceBatch] | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Write the new tokens of a step into pages, and compute their attention.

        Args:
            layer: vLLM's layer; unused.
            query: (tokens, query heads, channels).
            key: (tokens, key-value heads, channels).
            value: (tokens, key-value heads, channels).
            kv_cache: (pages, key-value heads, tokens of a page, bytes) uint8; written to.
            attn_metadata: Result of `BatchBuilder`; None while vLLM measures the memory of a step.
            output: (tokens, query heads, channels); written to.
            output_scale: Not supported.
            output_block_scale: Not supported.

        Returns:
            `output`.

        Raises:
            NotImplementedError: vLLM asks for a quantized output.
        """
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError(
                "attention over a packed cache does not quantize its output; turn that fusion off"
            )
        if attn_metadata is None:
            return output.zero_()
        paged = self.layer
        assert paged is not None
        # All are written before any is read: a request may share a page that another one fills in the same step.
        exact = [self._write(kv_cache, batch, key, value) for batch in attn_metadata]
        for batch, of_batch in zip(attn_metadata, exact, strict=True):
            self._attend(kv_cache, batch, of_batch, (query, key, value), output)
        return output

    def _write(self, cache: Tensor, batch: SequenceBatch, key: Tensor, value: Tensor) -> ExactTokens | None:
        """Write the new tokens of a batch; return its exact tokens, unless the kernel reads these by itself."""
        assert self.layer is not None
        if self.kernels_alone and batch.tokens_BN.shape[1] == 1:
            from laconic.serving.paged_triton import paged_write

            paged_write(self.layer, cache, batch, _of_batch(batch, key), _of_batch(batch, value))
            return None
        return write_tokens(self.layer, cache, batch, key[batch.tokens_BN], value[batch.tokens_BN])

    def _attend(
        self,
        cache: Tensor,
        batch: SequenceBatch,
        exact: ExactTokens | None,
        tokens: tuple[Tensor, Tensor, Tensor],
        output: Tensor,
    ) -> None:
        """Write the attention of the new tokens of a batch into the output."""
        assert self.layer is not None
        if exact is not None:
            attention = paged_attention(self.layer, cache, batch, tokens[0][batch.tokens_BN], exact, self.scoring)
            output[batch.tokens_BN] = attention.to(output.dtype)
            return
        from laconic.serving.paged_triton import paged_decode

        q, keys, values = (_of_batch(batch, x) for x in tokens)
        out = output[: len(q)] if batch.first_tokens else None
        attention = paged_decode(self.layer, cache, batch, (q, keys, values), self.scoring, out=out)
        if out is None:
            output[batch.tokens_BN[:, 0]] = attention


def _of_batch(batch: SequenceBatch, tokens: Tensor) -> Tensor:
    """Return the single new tokens of a batch: (B, heads, channels) of those of the step."""
    numbers = batch.tokens_BN[:, 0]
    return tokens[: len(numbers)] if batch.first_tokens else tokens[numbers]
