"""What a stage made of a linear, put into its place; and a finished block, as its shard holds it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from laconic.checkpoint.files import Checkpoint
from laconic.formats import Quantized
from laconic.formats.schemes import Scheme
from laconic.formats.storage import scheme_of_shapes
from laconic.runtime.linear import QLinear, replace_linear
from laconic.solvers.moments import Moments
from laconic.structure.anatomy import linear_at


def install(
    module: nn.Module,
    name: str,
    made: Quantized | Tensor,
    scheme: Scheme | None,
    moments: Moments | None,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Put a weight into the linear `name` of a module: dense as it is, codes as a QLinear of this scheme. moments: of
    its input, where the scheme fixes the range of that. dtype: of parameters."""
    old = linear_at(module, name)
    if isinstance(made, Tensor):
        old.weight.data.copy_(made)
        return
    assert scheme is not None
    stored = made.to_tensors()
    scheme = scheme_of_shapes(scheme, {n: tuple(t.shape) for n, t in stored.items()})
    new = replace_linear(module, name, scheme, dtype)
    acts = scheme.input_activations
    if acts and acts.calibrated:
        assert moments is not None
        rounded = torch.ones_like(moments.lo)
        if made.outliers is not None:
            rounded[made.outliers.indices.long()] = 0
        lo, hi = (moments.lo * rounded).amin(), (moments.hi * rounded).amax()
        calibrated = acts.calibrate(lo, hi, dtype)
        stored |= {f"input_{name}": p for name, p in calibrated.items()}
    if old.bias is not None:
        stored["bias"] = old.bias.data
    _fill(new, stored, device)


def read_back(
    block: nn.Module,
    prefix: str,
    shard: Checkpoint,
    schemes: Mapping[str, Scheme],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Give a block, on the meta device and named `prefix` in the model, what its (arranged) shard holds. schemes: of
    quantized linears, by full name."""
    tensors = shard.load(shard.tensors, device)
    local = {n.removeprefix(f"{prefix}."): t for n, t in tensors.items()}
    for linear in [n for n, m in block.named_modules() if isinstance(m, nn.Linear)]:
        if scheme := schemes.get(f"{prefix}.{linear}"):
            inside = {n.removeprefix(f"{linear}."): t for n, t in local.items() if n.startswith(f"{linear}.")}
            scheme = scheme_of_shapes(scheme, {n: tuple(t.shape) for n, t in inside.items()})
            new = replace_linear(block, linear, scheme, dtype)
            _fill(new, inside, device)
    for n, p in list(block.named_parameters()):
        if p.is_meta:
            owner, _, leaf = n.rpartition(".")
            setattr(block.get_submodule(owner), leaf, nn.Parameter(local[n].to(p.dtype), requires_grad=False))
    block.to(device)


def stored(module: nn.Module, name: str) -> dict[str, Tensor]:
    """All that a file is to have of a module of this name."""
    return {f"{name}.{n}": p.data for n, p in module.named_parameters()} | {
        f"{name}.{n}": b for n, b in module.named_buffers() if n in module.state_dict()
    }


def _fill(linear: QLinear, stored: Mapping[str, Tensor], device: torch.device) -> None:
    """Give a QLinear its tensors, and decode it once for the passes to come."""
    for name, tensor in stored.items():
        setattr(linear, name, nn.Parameter(tensor.to(device), requires_grad=False))
    linear.to(device)
    linear.unpack()
