"""QLinear: a linear that keeps its weight as stored codes, and rounds its input as its scheme says.

Its arithmetic is simulated: codes are decoded and multiplied in floating point. It is the reader of every artifact
in evaluation, and the only runtime of the schemes that no engine has.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from laconic.formats import Params, decode, encode, fit
from laconic.formats.schemes import Activations, Scheme
from laconic.formats.storage import from_stored, stored_shapes


def round_activations(x: Tensor, acts: Activations, calibrated: Params) -> Tensor:
    """x (..., in) rounded to the activation format and back, in float32 (simulated). calibrated: the parameters that
    do not come from x (`Activations.calibrate`)."""
    flat = x.reshape(-1, x.shape[-1]).float()
    params = (
        fit(acts.format, flat, shared=calibrated) if acts.dynamic else {n: p.float() for n, p in calibrated.items()}
    )
    return decode(acts.format, encode(acts.format, flat, params), params).view(x.shape)


class QLinear(nn.Module):
    """The stored tensors of one quantized linear, as parameters of their stored names."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool, scheme: Scheme, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features, self.scheme, self.dtype = (
            in_features,
            out_features,
            scheme,
            dtype,
        )
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
        self.dense: Tensor | None = None

    def decode(self, dtype: torch.dtype) -> Tensor:
        """The weight that the codes stand for, (out, in)."""
        stored = {name: getattr(self, name) for name in self.names}
        return from_stored(stored, self.scheme, (self.out_features, self.in_features)).decode(dtype)

    def unpack(self) -> None:
        """Keep the decoded weight, so that many forward passes decode it once; the codes stay."""
        self.dense = self.decode(torch.float32 if self.scheme.input_activations else self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        acts = self.scheme.input_activations
        compute = torch.float32 if acts else x.dtype
        weight = self.decode(compute) if self.dense is None else self.dense.to(compute)
        bias = None if self.bias is None else self.bias.to(compute)
        rounded = round_activations(x, acts, {n: getattr(self, f"input_{n}") for n in self.calibrated}) if acts else x
        return F.linear(rounded, weight, bias).to(x.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, scheme={self.scheme.name}"


def _frozen(t: Tensor) -> nn.Parameter:
    return nn.Parameter(t, requires_grad=False)


def _default_device() -> torch.device:
    return torch.empty(0).device


def replace_linear(model: nn.Module, name: str, scheme: Scheme, dtype: torch.dtype) -> QLinear:
    """Put a QLinear of the same shape where the linear `name` is."""
    old = model.get_submodule(name)
    assert isinstance(old, nn.Linear)
    new = QLinear(old.in_features, old.out_features, bias=old.bias is not None, scheme=scheme, dtype=dtype)
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new)
    return new
