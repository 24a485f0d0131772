"""The vLLM plugin: native artifacts, packed key-value caches, and models whose blocks differ in width.

vLLM finds `register` through the entry point `vllm.general_plugins`, wherever laconic is installed beside it. Native
artifacts are those of `quant_method: laconic`: int8 by int8 runs as integer products, with outlier columns in a product
of their own; every other native scheme is decoded once, and its arithmetic simulated in floating point. Caches are in
`serving.vllm_kv`, widths in `serving.vllm_widths`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from laconic.formats import Outliers, Quantized
from laconic.formats.schemes import Scheme
from laconic.formats.storage import stored_shapes
from laconic.runtime.products import integer_linear, simulated_linear
from laconic.runtime.quant_config import NATIVE, schemes_from_config
from laconic.serving.vllm_kv import register_kv
from laconic.serving.vllm_widths import register_widths

log = init_logger(__name__)

# Names, beside plain numbers, by which vLLM's loaders call the linears of a fused one.
_SHARDS = {"q": 0, "k": 1, "v": 2}


def register() -> None:
    """Register `quant_method: laconic`, packed caches and widths by block with vLLM; may be called again."""
    register_quantization_config(NATIVE)(VllmLaconicConfig)
    register_kv()
    register_widths()


class VllmLaconicConfig(QuantizationConfig):
    """The quantization_config of a native artifact, as vLLM reads it."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.config = dict(config)
        self._warned = False

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> VllmLaconicConfig:
        return cls(config)

    def get_name(self) -> str:
        return NATIVE

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 75

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Return the method of a linear, fused or not, or of the head; None for other layers.

        Args:
            layer: Layer that vLLM builds.
            prefix: Its name in the model.

        Raises:
            ValueError: vLLM fuses linears that have different schemes.
        """
        if not isinstance(layer, LinearBase | ParallelLMHead):
            return None
        parent, _, leaf = prefix.rpartition(".")
        leaves = self.packed_modules_mapping.get(leaf, [leaf])
        names = [f"{parent}.{n}" if parent else n for n in leaves]
        schemes = schemes_from_config(self.config, names)
        if not schemes:
            return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None
        if len(schemes) < len(names) or len(set(schemes.values())) > 1:
            raise ValueError(
                f"vLLM fuses {', '.join(names)}, which have different schemes in this artifact; give them one scheme "
                "in the recipe"
            )
        scheme = schemes[names[0]]
        if not scheme.integer and not self._warned:
            log.warning("laconic: %s is decoded and its arithmetic simulated; do not measure its speed", scheme.title)
            self._warned = True
        return LaconicLinearMethod(scheme)


class LaconicLinearMethod(LinearMethodBase):
    """Method of one linear, or of several fused ones: each keeps its tensors as stored until all are loaded."""

    def __init__(self, scheme: Scheme) -> None:
        self.scheme = scheme

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
        if input_size_per_partition != input_size or sum(output_partition_sizes) != output_size:
            raise ValueError("native artifacts run on one device only; serve with --tensor-parallel-size 1")
        if isinstance(layer, ParallelLMHead):
            # vLLM pads the vocabulary, and the file has no padding.
            output_partition_sizes = [layer.org_vocab_size]
        layer.laconic_parts = [{} for _ in output_partition_sizes]
        layer.laconic_shapes = [(rows, input_size) for rows in output_partition_sizes]
        layer.laconic_dtype = params_dtype
        stored = stored_shapes(self.scheme, layer.laconic_shapes[0], params_dtype)
        dtypes = {name: t.dtype for name, t in stored.items()}
        acts = self.scheme.input_activations
        end = torch.empty((), device="meta")
        layer.laconic_calibrated = tuple(calibrated := acts.calibrate(end, end, params_dtype) if acts else {})
        dtypes |= {f"input_{name}": p.dtype for name, p in calibrated.items()}
        layer.laconic_names = tuple(dtypes)
        for name, dtype in dtypes.items():
            # An empty parameter with only a name, a device and a loader: parts of a fused linear differ in shape.
            handle: Any = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
            handle.weight_loader = _loader(layer.laconic_parts, name)
            layer.register_parameter(name, handle)

    def process_weights_after_loading(self, layer: Any) -> None:
        scheme, parts, shapes, dtype = self.scheme, layer.laconic_parts, layer.laconic_shapes, layer.laconic_dtype
        device = getattr(layer, layer.laconic_names[0]).device
        for name in layer.laconic_names:
            delattr(layer, name)
        if len(shapes) > 1 and not parts[1]:
            # Linears that the checkpoint fuses too are loaded as one.
            parts, shapes = parts[:1], [(sum(rows for rows, _ in shapes), shapes[0][1])]
        parts = [{n: t.to(device) for n, t in part.items()} for part in parts]
        quantized = [
            Quantized.from_tensors(scheme.weights, part, shape, input_rotation=bool(scheme.input_rotation))
            for part, shape in zip(parts, shapes, strict=True)
        ]
        columns = [q.outliers for q in quantized if q.outliers is not None]
        if any(not torch.equal(c.indices, columns[0].indices) for c in columns):
            raise ValueError(
                "linears that vLLM fuses have different outlier columns in this artifact; compress it again with one "
                "scheme for them"
            )
        buffers = {f"input_{name}": parts[0][f"input_{name}"] for name in layer.laconic_calibrated}
        buffers["outlier_indices"] = columns[0].indices if columns else None
        if scheme.integer:
            scales = [q.params["scale"].reshape(-1, 1).expand(len(q.codes), 1) for q in quantized]
            buffers |= {"laconic_weight": torch.cat([q.codes for q in quantized]), "weight_scale": torch.cat(scales)}
            buffers["outlier_weight"] = torch.cat([c.weight for c in columns]) if columns else None
        else:
            decoded = torch.float32 if scheme.input_activations else dtype
            buffers["laconic_weight"] = torch.cat([q.decode(decoded) for q in quantized])
        for name, tensor in buffers.items():
            layer.register_buffer(name, tensor, persistent=False)
        del layer.laconic_parts, layer.laconic_shapes, layer.laconic_names, layer.laconic_dtype

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        acts, weight, columns = self.scheme.input_activations, layer.laconic_weight, layer.outlier_indices
        calibrated = {name: getattr(layer, f"input_{name}") for name in layer.laconic_calibrated}
        if acts and self.scheme.integer:
            outliers = None if columns is None else Outliers(columns, layer.outlier_weight)
            return integer_linear(x, weight, layer.weight_scale, acts, calibrated, outliers=outliers, bias=bias)
        rotated = bool(self.scheme.input_rotation)
        return simulated_linear(x, weight, acts, calibrated, exempt=columns, bias=bias, rotated=rotated)


def _loader(parts: Sequence[dict[str, Tensor]], name: str) -> Callable[..., None]:
    """Return a loader that keeps a tensor of the file with its part of a fused linear.

    vLLM numbers the parts, or calls them q, k and v.
    """

    def load(_: nn.Parameter, tensor: Tensor, shard: str | int | None = None) -> None:
        parts[_SHARDS[shard] if isinstance(shard, str) else shard or 0][name] = tensor

    return load
