"""Linear methods of native artifacts in vLLM.

`EngineLinearMethod` gives the codes to vLLM's own method for compressed-tensors, and so to its kernels (CUTLASS for
int8 by int8, Machete or Marlin for weights of 4 and 8 bits), and adds the products of the 16-bit side tensors.
`PackedLinearMethod` computes all other schemes by `serving.packed_linear`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearMethodBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
    CompressedTensorsLinearMethod,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.platforms import current_platform

from laconic.formats import Quantized
from laconic.formats.rotation import rotate_by_factors, rotation_factors
from laconic.formats.schemes import Scheme
from laconic.formats.storage import stored_shapes
from laconic.runtime.quant_config import COMPRESSED_TENSORS, to_config
from laconic.serving.packed_linear import pack, packed_linear
from laconic.serving.shards import Shard, Span
from laconic.serving.side_tensors import SideTensors, StoredSides, compile_kernels

log = init_logger(__name__)

# Names, beside plain numbers, by which vLLM's loaders call the linears of a fused one.
_PARTS = {"q": 0, "k": 1, "v": 2}

# Layers whose shares of ranks are known; their subclasses may cut otherwise.
_CUT_LAYERS = (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
    ReplicatedLinear,
    ParallelLMHead,
)

# Fields of `SideTensors`, each a buffer of the layer.
_SIDE_FIELDS = ("weight", "indices", "mask", "right")

# Names of side tensors in a file that vLLM's own method does not know.
_SIDE_NAMES = ("outlier_indices", "outlier_weight", "low_rank_left", "low_rank_right")


def engine_method(scheme: Scheme, layer: Any, name: str) -> LinearMethodBase | None:
    """Return vLLM's method for the codes of a scheme; None if there is none for the codes, or for this platform.

    Args:
        scheme: Scheme of the linears.
        layer: Layer that vLLM builds; gets the attribute `scheme` that vLLM's method reads.
        name: Its name in the model.
    """
    if scheme.engine != "vllm" or not scheme.weights.standard or scheme.input_transform or scheme.output_transform:
        return None
    dtype = get_current_vllm_config().model_config.dtype
    if dtype not in (torch.bfloat16, torch.float16):
        return None
    if current_platform.is_cpu() and not _runs_on_cpu(scheme):
        return None
    if current_platform.is_cuda() and scheme.integer and current_platform.has_device_capability(100):
        # Its kernels for int8 by int8 end before Blackwell.
        return None
    entry = to_config({"re:.*": scheme.plain}, [])
    for group in entry["config_groups"].values():
        # The head is no Linear.
        group["targets"] = ["re:.*"]
    config = CompressedTensorsConfig.from_config(entry | {"quant_method": COMPRESSED_TENSORS})
    try:
        layer.scheme = config.get_scheme(layer, name)
    except (NotImplementedError, RuntimeError, ValueError) as e:
        log.warning_once("laconic: vLLM has no method for %s on this device: %s", scheme.name, e)
        return None
    return CompressedTensorsLinearMethod(config)


def _runs_on_cpu(scheme: Scheme) -> bool:
    """Return whether vLLM's CPU build has a kernel for the codes of a scheme on this processor."""
    if scheme.integer or scheme.input_activations is not None:
        return scheme.weights.integer_range == (-128, 127) and torch.cpu._is_vnni_supported()
    return scheme.weights.num_bits == 4 and torch.cpu._is_avx512_supported()


@dataclass
class _Loading:
    """State of a layer while its tensors are loaded.

    Attributes:
        shard: Share of the rank.
        names: Names of the tensors that are loaded here.
        parts: Loaded tensors of each fused linear, by name.
        dtype: Dtype that the model computes in.
        rows: Number of outputs of the layer, padding included.
        dummy: Whether nothing is loaded, and any values will do.
    """

    shard: Shard
    names: tuple[str, ...]
    parts: list[dict[str, Tensor]]
    dtype: torch.dtype
    rows: int
    dummy: bool


@dataclass(frozen=True)
class _Packed:
    """How a layer calls `packed_linear`.

    Attributes:
        layout: Key of the layout of its tensors.
        rows: Number of outputs of the linears.
        padding: Number of outputs after them.
        count: Number of tensors.
    """

    layout: str
    rows: int
    padding: int
    count: int


# vLLM's own parameters, which hold the codes, have loaders for all kinds of layers only in this version.
@register_weight_loader_v2_supported_method
class LaconicLinearMethod(LinearMethodBase):
    """Method of one linear, or of several fused ones.

    Args:
        scheme: Scheme of the linears.
        engine: vLLM's method for the codes; None to compute from the stored tensors.
    """

    def __init__(self, scheme: Scheme, engine: LinearMethodBase | None) -> None:
        self.scheme, self.engine = scheme, engine

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        shard = shard_of(layer, input_size_per_partition, output_partition_sizes, input_size)
        shard.check(self.scheme, layer.prefix)
        sizes = (input_size_per_partition, output_partition_sizes, input_size, output_size, params_dtype)
        if self.engine is not None and not self._create_codes(layer, shard, sizes, extra):
            self.engine = None
        stored = dict(stored_shapes(self.scheme, shard.shapes[0], params_dtype))
        dtypes = {name: t.dtype for name, t in stored.items() if self.engine is None or name in _SIDE_NAMES}
        if self.engine is None:
            dtypes |= {f"input_{name}": p.dtype for name, p in _calibrated(self.scheme, params_dtype).items()}
        load_format = get_current_vllm_config().load_config.load_format
        loading = _Loading(
            shard,
            tuple(dtypes),
            [{} for _ in shard.rows],
            params_dtype,
            sum(output_partition_sizes),
            load_format == "dummy",
        )
        layer.laconic_loading = loading
        for name, dtype in dtypes.items():
            # An empty parameter with only a name, a device and a loader: parts of a fused linear differ in shape.
            handle: Any = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
            handle.weight_loader = _loader(loading.parts, name)
            layer.register_parameter(name, handle)

    def _create_codes(self, layer: Any, shard: Shard, sizes: tuple[Any, ...], extra: dict[str, Any]) -> bool:
        """Create vLLM's parameters of the codes; return whether it has a kernel for them."""
        assert self.engine is not None
        if not _words_are_whole(self.scheme, shard):
            return False
        before = set(layer._parameters)
        try:
            self.engine.create_weights(layer, *sizes, **extra)
        except ValueError as e:
            for name in set(layer._parameters) - before:
                delattr(layer, name)
            log.warning_once("laconic: vLLM has no kernel for %s on this device: %s", self.scheme.name, e)
            return False
        return True

    def process_weights_after_loading(self, layer: Any) -> None:
        loading: _Loading = layer.laconic_loading
        device = next(t.device for t in layer.parameters())
        parts = _loaded_parts(layer, loading, self.scheme, device)
        shapes = loading.shard.shapes
        if len(parts) < len(shapes):
            shapes = ((sum(rows for rows, _ in shapes), shapes[0][1]),)
        for name in loading.names:
            delattr(layer, name)
        buffers: dict[str, Tensor | None]
        if self.engine is not None:
            sides = [StoredSides.from_tensors(part, shape) for part, shape in zip(parts, shapes, strict=True)]
            combined = SideTensors.combine(loading.shard.cut(sides), loading.rows, loading.dtype)
            buffers = {f"side_{name}": getattr(combined, name, None) for name in _SIDE_FIELDS}
            if self.scheme.input_rotation:
                left, right = rotation_factors(self.scheme.input_rotation)
                buffers |= {"rotation_left": left.to(device), "rotation_right": right.to(device)}
            if combined is not None:
                compile_kernels(combined)
            self.engine.process_weights_after_loading(layer)
        else:
            fmt = self.scheme.weights
            stored = [
                Quantized.from_tensors(fmt, part, shape, input_rotation=bool(self.scheme.input_rotation))
                for part, shape in zip(parts, shapes, strict=True)
            ]
            calibrated = {name: parts[0][f"input_{name}"] for name in _calibrated(self.scheme, loading.dtype)}
            layout, tensors = pack(self.scheme, loading.shard.cut(stored), calibrated)
            buffers = {f"packed_{i}": t for i, t in enumerate(tensors)}
            layer.laconic_packed = _Packed(layout.key, layout.rows, loading.rows - layout.rows, len(tensors))
        for name, tensor in buffers.items():
            layer.register_buffer(name, tensor, persistent=False)
        del layer.laconic_loading

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if self.engine is not None:
            if self.scheme.input_rotation:
                x = rotate_by_factors(x, layer.rotation_left, layer.rotation_right)
            if layer.side_weight is None:
                y: Tensor = self.engine.apply(layer, x, bias)
                return y
            sides = SideTensors(layer.side_weight, layer.side_indices, layer.side_mask, layer.side_right)
            coded: Tensor = self.engine.apply(layer, sides.coded_input(x), bias)
            return sides.add_to(coded, x)
        packed: _Packed = layer.laconic_packed
        tensors = [getattr(layer, f"packed_{i}") for i in range(packed.count)]
        y = packed_linear(x, tensors, None if bias is None else bias[: packed.rows], packed.layout, packed.rows)
        return nn.functional.pad(y, (0, packed.padding)) if packed.padding else y


def shard_of(layer: Any, columns: int, rows: Sequence[int], input_size: int) -> Shard:
    """Return the share of this rank in the linears of a layer.

    Args:
        layer: Layer that vLLM builds.
        columns: Number of inputs of the share.
        rows: Number of outputs of the share, of each linear.
        input_size: Number of inputs of the layer.

    Raises:
        ValueError: The layer is of a kind that is not known to be cut in the usual way.
    """
    rank, size = layer.tp_rank, layer.tp_size
    if size > 1 and type(layer) not in _CUT_LAYERS:
        raise ValueError(
            f"the plugin cannot divide {layer.prefix}, a {type(layer).__name__}, for tensor parallelism; "
            "serve with --tensor-parallel-size 1"
        )
    share = (
        Span(0, columns, columns) if columns == input_size else Span(rank * columns, (rank + 1) * columns, input_size)
    )
    if isinstance(layer, ParallelLMHead):
        vocabulary = layer.shard_indices
        spans = [Span(vocabulary.org_vocab_start_index, vocabulary.org_vocab_end_index, layer.org_vocab_size)]
    elif size == 1 or not isinstance(layer, ColumnParallelLinear):
        spans = [Span(0, n, n) for n in rows]
    else:
        # Key and value heads that are fewer than the ranks are held by several of them.
        copies = [1, *[getattr(layer, "num_kv_head_replicas", 1)] * (len(rows) - 1)]
        spans = [Span(rank // c * n, (rank // c + 1) * n, n * size // c) for n, c in zip(rows, copies, strict=True)]
    return Shard(tuple(spans), share)


def _words_are_whole(scheme: Scheme, shard: Shard) -> bool:
    """Return whether no cut is inside of an int32 word of packed codes or zero points, which vLLM cuts by words."""
    if scheme.storage != "pack-quantized":
        return True
    spans = (shard.columns, *(() if scheme.weights.symmetric else shard.rows))
    return all(span.complete or span.size * scheme.weights.num_bits % 32 == 0 for span in spans)


def _loaded_parts(layer: Any, loading: _Loading, scheme: Scheme, device: torch.device) -> list[Mapping[str, Tensor]]:
    """Return the loaded tensors of each linear, or of the one as which they are stored, on a device."""
    parts: list[dict[str, Tensor]] = loading.parts
    if loading.dummy:
        parts = [_dummy_tensors(scheme, shape, loading) for shape in loading.shard.shapes]
    elif len(parts) > 1 and not parts[1]:
        # Linears that the checkpoint fuses too are loaded as one.
        parts = parts[:1]
    missing = sorted({name for part in parts for name in loading.names if name not in part})
    if missing:
        raise ValueError(f"the artifact lacks {', '.join(missing)} of {layer.prefix}; compress it again")
    return [{name: t.to(device) for name, t in part.items()} for part in parts]


def _dummy_tensors(scheme: Scheme, shape: tuple[int, int], loading: _Loading) -> dict[str, Tensor]:
    tensors = {
        name: torch.empty_like(t, device="cpu") for name, t in stored_shapes(scheme, shape, loading.dtype).items()
    }
    tensors |= {f"input_{n}": torch.ones(t.shape, dtype=t.dtype) for n, t in _calibrated(scheme, loading.dtype).items()}
    for name, t in tensors.items():
        if name == "outlier_indices":
            t.copy_(torch.arange(len(t)))
        elif not name.startswith("input_"):
            # Bytes that are finite numbers in every dtype.
            t.view(torch.uint8).random_(0, 64) if t.dtype.itemsize == 1 else t.fill_(
                1e-3 if t.is_floating_point() else 0
            )
    return tensors


def _calibrated(scheme: Scheme, dtype: torch.dtype) -> Mapping[str, Tensor]:
    """Return the parameters of the input from calibration, on the meta device."""
    acts, end = scheme.input_activations, torch.empty((), device="meta")
    return acts.calibrate(end, end, dtype) if acts else {}


def _loader(parts: Sequence[dict[str, Tensor]], name: str) -> Callable[..., None]:
    """Return a loader that keeps a tensor of the file with its part of a fused linear.

    vLLM numbers the parts, or calls them q, k and v.
    """

    def load(_: nn.Parameter, tensor: Tensor, shard: str | int | None = None) -> None:
        parts[_PARTS[shard] if isinstance(shard, str) else shard or 0][name] = tensor

    return load
