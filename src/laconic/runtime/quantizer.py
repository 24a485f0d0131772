"""Teaches transformers to open `quant_method: laconic`, so that `from_pretrained` works after `import laconic`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from laconic.runtime.linear import QLinear, replace_linear
from laconic.runtime.quant_config import NATIVE, schemes_from_config
from laconic.structure.experts import experts_above, unstack


@register_quantization_config(NATIVE)
class LaconicConfig(QuantizationConfigMixin):
    """The `quantization_config` of a native artifact, kept as it was written."""

    def __init__(self, **kwargs: Any) -> None:
        self.quant_method = NATIVE  # type: ignore[assignment]
        self.__dict__.update(kwargs)

    def to_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)


@register_quantizer(NATIVE)
class LaconicQuantizer(HfQuantizer):
    """Puts a QLinear wherever the artifact holds a quantized weight."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        config = self.quantization_config.to_dict()
        unstack(model, lambda linear: bool(schemes_from_config(config, [linear])))
        linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)]
        dtype = model.dtype if model.dtype.is_floating_point else torch.bfloat16
        for name, scheme in schemes_from_config(config, linears).items():
            conv1d = isinstance(model.get_submodule(name), Conv1D)
            if conv1d or ("weight" in replace_linear(model, name, scheme, dtype).names and experts_above(model, name)):
                raise ValueError(f"transformers cannot read {name} as it is stored; open the model with laconic.load")

    @property
    def is_trainable(self) -> bool:
        return False

    def is_serializable(self) -> bool:
        return True


__all__ = ["LaconicConfig", "LaconicQuantizer", "QLinear"]
