"""QLinear: a linear whose weight is stored codes, and whose input is rounded as its scheme says.

Int8 by int8 is an integer product (`runtime.products`); all other arithmetic is simulated: codes are decoded and
multiplied in floating point. It computes artifacts in evaluation, and in transformers the schemes that no engine has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from laconic.formats import Quantized
from laconic.formats.schemes import Scheme
from laconic.formats.storage import stored_shapes
from laconic.runtime.products import integer_linear, simulated_linear


class QLinear(nn.Module):
    """A linear whose parameters are the stored tensors of one quantized weight, under their stored names.

    Attributes:
        names: Names of the weight's stored tensors.
        calibrated: Names of the input's parameters from calibration, each stored as `input_NAME`.
        dense: The decoded weight (out, in) after `unpack`, otherwise None.

    Args:
        in_features: Number of inputs.
        out_features: Number of outputs.
        bias: Whether it has a bias, (out,).
        scheme: Scheme of the weight and of its input.
        dtype: Dtype of the bias and of parameters that the format leaves open.
    """

    dense: Tensor | None

    def __init__(self, in_features: int, out_features: int, *, bias: bool, scheme: Scheme, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.scheme, self.dtype = scheme, dtype
        stored = stored_shapes(scheme, (out_features, in_features), dtype)
        self.names = tuple(stored)
        for name, meta in stored.items():
            self.register_parameter(name, _frozen(torch.empty_like(meta, device=_default_device())))
        acts = scheme.input_activations
        end = torch.empty((), device="meta")
        calibrated = acts.calibrate(end, end, dtype) if acts else {}
        self.calibrated = tuple(calibrated)
        for name, meta in calibrated.items():
            self.register_parameter(f"input_{name}", _frozen(torch.empty_like(meta, device=_default_device())))
        self.bias = _frozen(torch.empty(out_features, dtype=dtype)) if bias else None
        # A buffer, so that it moves with the module; not persistent, since the codes are stored.
        self.register_buffer("dense", None, persistent=False)

    def quantized(self) -> Quantized:
        """Return the weight as codes, parameters and side tensors."""
        stored = {name: getattr(self, name) for name in self.names}
        shape, rotated = (self.out_features, self.in_features), bool(self.scheme.input_rotation)
        return Quantized.from_tensors(self.scheme.weights, stored, shape, input_rotation=rotated)

    def decode(self, dtype: torch.dtype) -> Tensor:
        """Return the decoded weight, (out, in).

        Args:
            dtype: Dtype of the result.
        """
        return self.quantized().decode(dtype)

    def unpack(self) -> None:
        """Keep the decoded weight beside the codes, so that many forward passes decode it once.

        Integer products need none: they use the codes.
        """
        if not self.scheme.integer:
            self.dense = self.decode(torch.float32 if self.scheme.input_activations else self.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QLinear:
        """Move the module, or change its dtype. Codes and their parameters keep the dtype in which they are stored."""
        stored = {n: self.get_parameter(n) for n in (*self.names, *(f"input_{n}" for n in self.calibrated))}
        dtypes = {n: p.dtype for n, p in stored.items()}
        originals = {n: p.data for n, p in stored.items()}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, dtype in dtypes.items():
            parameter = self.get_parameter(name)
            if parameter.dtype != dtype:
                parameter.data = originals[name].to(parameter.device)
        converted = fn(torch.empty(0, dtype=self.dtype, device=_device(originals)))
        if self.dense is not None and converted.dtype != self.dtype:
            self.dtype = converted.dtype
            self.unpack()
        self.dtype = converted.dtype
        return self

    def forward(self, x: Tensor) -> Tensor:
        acts = self.scheme.input_activations
        if acts and self.scheme.integer:
            q = self.quantized()
            return integer_linear(
                x, q.codes, q.params["scale"], acts, self._calibrated(), outliers=q.outliers, bias=self.bias
            )
        weight = self.decode(torch.float32 if acts else x.dtype) if self.dense is None else self.dense
        exempt = self.get_parameter("outlier_indices") if self.scheme.outlier_columns else None
        rotated = bool(self.scheme.input_rotation)
        return simulated_linear(x, weight, acts, self._calibrated(), exempt=exempt, bias=self.bias, rotated=rotated)

    def _calibrated(self) -> dict[str, Tensor]:
        return {n: self.get_parameter(f"input_{n}") for n in self.calibrated}

    def extra_repr(self) -> str:
        side_tensors = "".join(
            f", {name}={n}"
            for name, n in (("outlier_columns", self.scheme.outlier_columns), ("rank", self.scheme.rank))
            if n
        )
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, scheme={self.scheme.name}{side_tensors}"
        )


def _frozen(t: Tensor) -> nn.Parameter:
    return nn.Parameter(t, requires_grad=False)


def _device(tensors: Mapping[str, Tensor]) -> torch.device:
    return next(iter(tensors.values())).device


def _default_device() -> torch.device:
    return torch.empty(0).device


def replace_linear(model: nn.Module, name: str, scheme: Scheme, dtype: torch.dtype) -> QLinear:
    """Replace a linear of a model by a QLinear of the same shape, its tensors not set yet.

    Args:
        model: The model, changed in place.
        name: Name of the linear.
        scheme: Scheme of its weight and input.
        dtype: Dtype of the bias and of parameters that the format leaves open.

    Returns:
        The QLinear, on the default device.
    """
    old = model.get_submodule(name)
    assert isinstance(old, nn.Linear)
    new = QLinear(old.in_features, old.out_features, bias=old.bias is not None, scheme=scheme, dtype=dtype)
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new)
    return new
