"""Put compressed weights into their linears, and read a finished block back from its shard."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from laconic.checkpoint.files import Checkpoint
from laconic.formats import Quantized
from laconic.formats.schemes import Scheme
from laconic.formats.storage import scheme_of_shapes
from laconic.runtime.linear import QLinear, replace_linear
from laconic.solvers.moments import Moments
from laconic.structure.anatomy import linear_at
from laconic.walk.outcomes import check_tensors


@dataclass(frozen=True)
class Target:
    """Dtype and device of installed tensors.

    Attributes:
        dtype: of the parameters of codes, as stored.
        device: of all tensors.
    """

    dtype: torch.dtype
    device: torch.device


def install(
    module: nn.Module,
    name: str,
    weight: Quantized | Tensor,
    scheme: Scheme | None,
    moments: Moments | None,
    target: Target,
) -> None:
    """Put a weight into a linear: a dense weight in place, codes as a QLinear.

    Args:
        module: that holds the linear.
        name: of the linear within the module.
        weight: codes, or a dense weight (out, in).
        scheme: of the codes; None for a dense weight.
        moments: of the linear's input, where the scheme has activation parameters from calibration.
        target: dtype and device.

    Raises:
        TypeError: if the tensors of the codes are not those of the scheme.
    """
    old = linear_at(module, name)
    if isinstance(weight, Tensor):
        old.weight.data.copy_(weight)
        return
    assert scheme is not None
    tensors = weight.to_tensors()
    check_tensors(name, tensors, scheme, weight.shape, target.dtype)
    scheme = scheme_of_shapes(scheme, {n: tuple(t.shape) for n, t in tensors.items()})
    new = replace_linear(module, name, scheme, target.dtype)
    acts = scheme.input_activations
    if acts and acts.calibrated:
        assert moments is not None
        rounded = torch.ones_like(moments.lo)
        if weight.outliers is not None:
            rounded[weight.outliers.indices.long()] = 0
        lo, hi = (moments.lo * rounded).amin(), (moments.hi * rounded).amax()
        calibrated = acts.calibrate(lo, hi, target.dtype)
        tensors |= {f"input_{n}": p for n, p in calibrated.items()}
    if old.bias is not None:
        tensors["bias"] = old.bias.data
    _fill(new, tensors, target.device)


def read_block(block: nn.Module, name: str, shard: Checkpoint, schemes: Mapping[str, Scheme], target: Target) -> None:
    """Read a finished block from its shard.

    Args:
        block: on the meta device.
        name: of the block in the model.
        shard: its tensors, in the layout of the model.
        schemes: of quantized linears, by full name.
        target: dtype and device.
    """
    tensors = shard.load(shard.tensors, target.device)
    local = {n.removeprefix(f"{name}."): t for n, t in tensors.items()}
    for linear in [n for n, m in block.named_modules() if isinstance(m, nn.Linear)]:
        if scheme := schemes.get(f"{name}.{linear}"):
            of_linear = {n.removeprefix(f"{linear}."): t for n, t in local.items() if n.startswith(f"{linear}.")}
            scheme = scheme_of_shapes(scheme, {n: tuple(t.shape) for n, t in of_linear.items()})
            _fill(replace_linear(block, linear, scheme, target.dtype), of_linear, target.device)
    for n, p in list(block.named_parameters()):
        if p.is_meta:
            owner, _, leaf = n.rpartition(".")
            setattr(block.get_submodule(owner), leaf, nn.Parameter(local[n].to(p.dtype), requires_grad=False))
    block.to(target.device)


def stored_tensors(module: nn.Module, name: str) -> dict[str, Tensor]:
    """Return the tensors of a module that a file holds, by full name.

    Args:
        module: the module.
        name: of the module in the model.
    """
    return {f"{name}.{n}": p.data for n, p in module.named_parameters()} | {
        f"{name}.{n}": b for n, b in module.named_buffers() if n in module.state_dict()
    }


def _fill(linear: QLinear, tensors: Mapping[str, Tensor], device: torch.device) -> None:
    """Set the tensors of a QLinear, and decode its weight once for all later passes."""
    for name, tensor in tensors.items():
        setattr(linear, name, nn.Parameter(tensor.to(device), requires_grad=False))
    linear.to(device)
    linear.unpack()
