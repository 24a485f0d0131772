"""Refinement of rounded weights: scales in closed form, and cyclic passes over the columns, which never raise the loss.

The loss is tr(E H E^T), E = W - Q, as in the column loop (`solvers.obs`), which rounds each column once, with the
later ones still real. Afterwards each weight can be rounded anew with all others fixed: the loss as a function of q_j
alone is a parabola around q_j + (E H)_j / H_jj, least on a grid at the grid's nearest point (QuantEase, arXiv
2309.01885; LNQ in GuidedQuant, arXiv 2505.07004). As a function of the scale of one row's group of columns it is a
parabola, too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from laconic.formats import Params, Quantized, ScalarFormat
from laconic.solvers.grid import params_by_column


def refine(
    weight: Quantized, W: Tensor, H: Tensor, passes: int, *, zeros: Tensor | None = None, block_size: int = 128
) -> Quantized:
    """Fit scales and round columns anew, in turns; scales first and last.

    Args:
        weight: Codes of a scalar format.
        W: (out, in) float32, the weight to approximate.
        H: (in, in) float32, symmetric, positive semidefinite.
        passes: Number of passes over all columns.
        zeros: (out, in) bool, weights that stay zero; None for none.
        block_size: Columns after which the change of E H in the other columns is computed, as one matrix product.

    Returns:
        Codes and parameters with a loss that is no higher in any row.
    """
    fmt, codes, params = weight.format, weight.codes, weight.params
    assert isinstance(fmt, ScalarFormat)
    for _ in range(passes):
        params = fit_scales(fmt, codes, params, W, H)
        codes = round_columns_again(fmt, codes, params, W, H, zeros=zeros, block_size=block_size)
    return Quantized.scalar(fmt, codes, fit_scales(fmt, codes, params, W, H))


def fit_scales(fmt: ScalarFormat, codes: Tensor, params: Params, W: Tensor, H: Tensor) -> Params:
    """Fit the scale of each group of columns of each row, with codes and the other groups fixed.

    A group's values q become t q, with t = 1 + (q, (E H)_g) / q H_gg q^T; the scale is rounded to its dtype, and stays
    where that would raise the loss.

    Args:
        fmt: Format of the codes. Only grids of integers with a scale for each row, or group of a row, are changed.
        codes: (out, in).
        params: Parameters of the grids.
        W: (out, in) float32, the weight to approximate.
        H: (in, in) float32, symmetric.

    Returns:
        Parameters with new scales, in their dtype.
    """
    if fmt.integer_range is None or fmt.tiling.strategy not in ("channel", "group"):
        return params
    scale = params["scale"].clone()
    Q = fmt.decode(codes, params)
    EH = (W - Q) @ H
    width = fmt.tiling.group_size or W.shape[1]
    for g in range(W.shape[1] // width):
        columns = slice(g * width, (g + 1) * width)
        q = Q[:, columns]
        qH = q @ H[columns]
        along, curvature = (q * EH[:, columns]).sum(1), (q * qH[:, columns]).sum(1)
        old = scale[:, g].float()
        new = (old * (1 + along / curvature)).to(scale.dtype)
        t = new.float() / old - 1
        lowers = (new.float().abs() >= torch.finfo(torch.float32).tiny) & (t * t * curvature < 2 * t * along)
        t = torch.where(lowers, t, 0)[:, None]
        scale[:, g] = torch.where(lowers, new, scale[:, g])
        Q[:, columns] += t * q
        EH -= t * qH
    return {**params, "scale": scale}


def round_columns_again(
    fmt: ScalarFormat,
    codes: Tensor,
    params: Params,
    W: Tensor,
    H: Tensor,
    *,
    zeros: Tensor | None = None,
    block_size: int = 128,
) -> Tensor:
    """Round each column to its best values with all other columns fixed, one column after another.

    Args:
        fmt: Format of the codes.
        codes: (out, in).
        params: Parameters of the grids.
        W: (out, in) float32, the weight to approximate.
        H: (in, in) float32, symmetric.
        zeros: (out, in) bool, weights that stay zero; None for none.
        block_size: As of `refine`.

    Returns:
        New codes (out, in).
    """
    n = W.shape[1]
    # Transposed, so that a column is contiguous in memory.
    Q = fmt.decode(codes, params).T.contiguous()
    HE = H @ (W.T - Q)
    by_column, row = params_by_column(fmt, params, W.shape, torch.arange(n, device=W.device))
    new_codes = codes.T.contiguous()
    curvature = H.diagonal().tolist()
    for start in range(0, n, block_size):
        stop = min(start + block_size, n)
        step = torch.zeros_like(Q[start:stop])
        H_block, HE_block = H[start:stop, start:stop].contiguous(), HE[start:stop]
        for i, j in enumerate(range(start, stop)):
            if curvature[j] <= 0:
                continue
            gradient = torch.addmv(HE_block[i], step[:i].T, H_block[i, :i], alpha=-1) if i else HE_block[i]
            column = {name: p[row[j]] for name, p in by_column.items()}
            code = fmt.encode_tiles((Q[j] + gradient / curvature[j])[:, None], column)
            change = fmt.decode_tiles(code, column)[:, 0] - Q[j]
            # A nearest point that is as far as the old one, or is taken for nearest by rounding, changes nothing.
            lowers = change * change * curvature[j] < 2 * change * gradient
            if zeros is not None:
                lowers &= ~zeros[:, j]
            step[i] = torch.where(lowers, change, 0)
            new_codes[j] = torch.where(lowers, code[:, 0], new_codes[j])
        Q[start:stop] += step
        HE -= H[:, start:stop] @ step
    return new_codes.T.contiguous()
