"""Matrices as GPTQ and AWQ checkpoints store them: integers packed in int32 words, with zero points and scales a group.

`qweight` has the inputs along its rows, unlike the weight of a linear. These layouts are only read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from laconic.formats.packing import unpack

# Columns of the eight 4-bit codes of a word of AWQ, from its lowest bits.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def decode_gptq(
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    groups: Tensor,
    *,
    num_bits: int,
    zero_offset: int,
) -> Tensor:
    """Decode a matrix of GPTQ: w = scale * (code - zero point).

    Args:
        qweight: (in * bits / 32, out) int32, codes packed along the inputs.
        qzeros: (groups, out * bits / 32) int32, zero points packed along the outputs.
        scales: (groups, out), any float dtype.
        groups: (in,) group of each input (`g_idx`).
        num_bits: Bits of a code: 2, 3, 4 or 8.
        zero_offset: Number that is added to stored zero points: 1 in the first version of the layout, 0 in the second.

    Returns:
        (out, in) float32.

    Raises:
        ValueError: An input is in a group that there is not.
    """
    outputs, groups = scales.shape[1], groups.long()
    if int(groups.min()) < 0 or int(groups.max()) >= len(scales):
        raise ValueError(f"g_idx names group {int(groups.max())} of {len(scales)}; download the model again")
    # Codes and zero points are unpacked with the same offset.
    codes = unpack(qweight.T.contiguous(), num_bits, len(groups)).float()
    zeros = unpack(qzeros, num_bits, outputs).float() + zero_offset
    return (codes - zeros.T[:, groups]) * scales.float().T[:, groups]


def decode_awq(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> Tensor:
    """Decode a matrix of AWQ's `gemm` layout in 4 bits: w = scale * (code - zero point).

    Args:
        qweight: (in, out / 8) int32, codes packed along the outputs.
        qzeros: (groups, out / 8) int32, zero points packed likewise.
        scales: (groups, out), any float dtype.

    Returns:
        (out, in) float32.
    """
    size = qweight.shape[0] // scales.shape[0]
    codes, zeros = (_unpack_awq(packed, scales.shape[1]) for packed in (qweight, qzeros))
    zeros, scales = (t.float().repeat_interleave(size, 0) for t in (zeros, scales))
    return ((codes.float() - zeros) * scales).T.contiguous()


def _unpack_awq(packed: Tensor, outputs: int) -> Tensor:
    codes = unpack(packed, 4, outputs).view(len(packed), -1, len(_AWQ_ORDER))
    positions = torch.tensor(_AWQ_ORDER, device=packed.device).argsort()
    return codes[..., positions].flatten(1)
