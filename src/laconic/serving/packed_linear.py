"""A layer computed by our own products from the tensors of the file, which are all that stays in memory.

Weights of schemes that no engine runs stay packed as they are stored, and are decoded in chunks of rows in every call.
Int8 by int8 needs no decoding. `packed_linear` is an operator of torch of its own: compilers and CUDA graphs see one
call whose shapes depend on the number of tokens alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from laconic.formats import Outliers, Params, Quantized
from laconic.formats.schemes import Scheme
from laconic.kernels.half_linear import half_linear
from laconic.runtime.products import integer_linear, round_activations
from laconic.serving.side_tensors import common_columns

# Weights decoded at once. Decoding takes up to 30 bytes of temporaries for each.
_CHUNK = 1 << 23


@dataclass(frozen=True)
class Layout:
    """Kinds of the tensors of a layer.

    Attributes:
        scheme: Scheme of the layer.
        columns: Number of inputs.
        chunks: Rows of each chunk, and the place of each of its tensors among those of the layer, by name.
        calibrated: Places of the input's parameters from calibration, by name.
    """

    scheme: Scheme
    columns: int
    chunks: tuple[tuple[int, tuple[tuple[str, int], ...]], ...]
    calibrated: tuple[tuple[str, int], ...]

    @property
    def key(self) -> str:
        """Name of the layout for `packed_linear`, equal in every process."""
        return repr(self)

    @property
    def rows(self) -> int:
        """Number of outputs."""
        return sum(rows for rows, _ in self.chunks)


# Layouts by their key. An operator of torch takes no objects, and keys are constants of compiled graphs.
_LAYOUTS: dict[str, Layout] = {}


def pack(scheme: Scheme, parts: Sequence[Quantized], calibrated: Params) -> tuple[Layout, list[Tensor]]:
    """Return the tensors that stay in memory of linears that are fused row by row.

    Args:
        scheme: Scheme of the linears.
        parts: The linears.
        calibrated: Parameters of the input from calibration.

    Returns:
        The layout, known to `packed_linear` from now on, and the tensors.

    Raises:
        ValueError: The linears have different outlier columns.
    """
    common_columns([q.outliers for q in parts])
    if scheme.integer:
        chunks = [_merge_integers(parts)]
        sizes = [sum(q.shape[0] for q in parts)]
    else:
        pieces = [piece for q in parts for piece in _split(q)]
        chunks, sizes = [q.to_tensors() for q in pieces], [q.shape[0] for q in pieces]
    tensors: dict[int, Tensor] = {}

    def place(named: Params) -> tuple[tuple[str, int], ...]:
        """Return the places of tensors; one that chunks share has one place."""
        for t in named.values():
            tensors.setdefault(id(t), t)
        order = list(tensors)
        return tuple((name, order.index(id(t))) for name, t in named.items())

    placed = tuple((size, place(chunk)) for size, chunk in zip(sizes, chunks, strict=True))
    layout = Layout(scheme, parts[0].shape[1], placed, place(calibrated))
    _LAYOUTS[layout.key] = layout
    device = parts[0].codes.device
    return layout, [t.to(device).contiguous() for t in tensors.values()]


def _split(q: Quantized) -> list[Quantized]:
    """Return a weight in chunks of rows; whole if its rows cannot be cut."""
    unit = q.format.row_unit
    if unit is None or (q.transforms and q.transforms.output is not None and q.transforms.output.dim() == 2):
        return [q]
    step = max(unit, _CHUNK // q.shape[1] // unit * unit)
    pieces = [q.rows(start, min(start + step, q.shape[0])) for start in range(0, q.shape[0], step)]
    if q.low_rank is not None:
        # One tensor for all chunks.
        pieces = [replace(p, low_rank=p.low_rank and replace(p.low_rank, right=q.low_rank.right)) for p in pieces]
    return pieces


def _merge_integers(parts: Sequence[Quantized]) -> dict[str, Tensor]:
    """Return the tensors of weights of int8 codes as those of one with a scale for each row."""
    scales = [q.params["scale"].reshape(-1, 1).expand(q.shape[0], 1) for q in parts]
    merged = {"weight": torch.cat([q.codes for q in parts]), "weight_scale": torch.cat(scales)}
    outliers = [q.outliers for q in parts if q.outliers is not None]
    if outliers:
        merged["outlier_indices"] = outliers[0].indices
        merged["outlier_weight"] = torch.cat([o.weight for o in outliers])
    return merged


@torch.library.custom_op("laconic::packed_linear", mutates_args=())
def packed_linear(x: Tensor, tensors: list[Tensor], bias: Tensor | None, layout: str, rows: int) -> Tensor:
    """Compute a layer from the tensors that `pack` returned.

    Args:
        x: (..., in), any float dtype.
        tensors: Tensors of the layer.
        bias: (out,), or None.
        layout: Key of their layout.
        rows: Number of outputs, which shapes are inferred from.

    Returns:
        (..., out) in x's dtype.
    """
    known = _LAYOUTS[layout]
    chunks = [(size, {name: tensors[i] for name, i in names}) for size, names in known.chunks]
    calibrated = {name: tensors[i] for name, i in known.calibrated}
    if known.scheme.integer:
        ((_, stored),) = chunks
        return _integer(x, stored, bias, known, calibrated)
    return _decoded(x, chunks, bias, known, calibrated)


@packed_linear.register_fake
def _(x: Tensor, tensors: list[Tensor], bias: Tensor | None, layout: str, rows: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], rows)


def _integer(
    x: Tensor, stored: Mapping[str, Tensor], bias: Tensor | None, layout: Layout, calibrated: Params
) -> Tensor:
    acts = layout.scheme.input_activations
    assert acts is not None
    columns = stored.get("outlier_indices")
    outliers = None if columns is None or not len(columns) else Outliers(columns, stored["outlier_weight"])
    return integer_linear(
        x, stored["weight"], stored["weight_scale"], acts, calibrated, outliers=outliers, bias=bias
    ).contiguous()


def _decoded(
    x: Tensor,
    chunks: Sequence[tuple[int, Mapping[str, Tensor]]],
    bias: Tensor | None,
    layout: Layout,
    calibrated: Params,
) -> Tensor:
    acts, rotated = layout.scheme.input_activations, bool(layout.scheme.input_rotation)
    if acts is not None:
        rounded = round_activations(x, acts, calibrated, chunks[0][1].get("outlier_indices"), rotated=rotated)
    y = x.new_empty(*x.shape[:-1], layout.rows)
    start = 0
    for size, stored in chunks:
        shape = (size, layout.columns)
        q = Quantized.from_tensors(layout.scheme.weights, stored, shape, input_rotation=rotated)
        part = None if bias is None else bias[start : start + size]
        if acts is None:
            chunk = half_linear(x, q.decode(x.dtype), None if part is None else part.to(x.dtype))
        else:
            chunk = F.linear(rounded, q.decode(torch.float32), None if part is None else part.float())
        y[..., start : start + size] = chunk
        start += size
    return y
