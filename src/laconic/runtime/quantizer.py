"""The quantizer with which transformers opens `quant_method: laconic`: it creates QLinears before loading weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Equal to `quant_config.NATIVE`; that module imports parts of transformers that are not loaded yet.
_QUANT_METHOD = "laconic"


class LaconicQuantizationConfig(QuantizationConfigMixin):
    """The `quantization_config` of a native artifact, unchanged."""

    def __init__(self, **kwargs: Any) -> None:
        self.quant_method = _QUANT_METHOD  # type: ignore[assignment]
        self.__dict__.update(kwargs)

    def to_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)


class LaconicQuantizer(HfQuantizer):
    """Quantizer of transformers that puts a QLinear wherever the artifact holds a quantized weight."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        import torch
        from torch import nn
        from transformers.pytorch_utils import Conv1D

        from laconic.runtime.embedding import replace_embedding
        from laconic.runtime.linear import replace_linear
        from laconic.runtime.quant_config import schemes_from_config
        from laconic.structure.anatomy import find_embeddings
        from laconic.structure.experts import enclosing_experts, unstack_experts

        config = self.quantization_config.to_dict()
        unstack_experts(model, lambda linear: bool(schemes_from_config(config, [linear])))
        linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)]
        table = find_embeddings(model)
        dtype = model.dtype if model.dtype.is_floating_point else torch.bfloat16
        for name, scheme in schemes_from_config(config, [*linears, table], [table]).items():
            if name == table:
                replace_embedding(model, table, scheme, dtype)
                continue
            conv1d = isinstance(model.get_submodule(name), Conv1D)
            if conv1d or (
                "weight" in replace_linear(model, name, scheme, dtype).names and enclosing_experts(model, name)
            ):
                raise ValueError(f"transformers cannot read {name} as it is stored; open the model with laconic.load")

    @property
    def is_trainable(self) -> bool:
        return False

    def is_serializable(self) -> bool:
        return True


def register() -> None:
    """Make the quantization method known to transformers."""
    if _QUANT_METHOD in AUTO_QUANTIZER_MAPPING:
        return
    register_quantization_config(_QUANT_METHOD)(LaconicQuantizationConfig)
    register_quantizer(_QUANT_METHOD)(LaconicQuantizer)
