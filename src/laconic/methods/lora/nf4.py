"""NF4 with doubly quantized scales: QLoRA's 4-bit format of frozen weights (Dettmers et al., arXiv 2305.14314).

No engine serves it and no artifact holds it: weights are in NF4 only while adapters beside them are trained. A weight
takes 4 + 8/64 + 32/(64 * 256) = 4.127 bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK, SCALES = 64, 256
_FP8 = torch.float8_e4m3fn
_FP8_MAX = torch.finfo(_FP8).max


def _quantiles() -> list[float]:
    """Return the 16 values, ascending, scaled to [-1, 1].

    They are quantiles of a normal distribution, evenly spaced in probability on either side of an exact zero, 8 of them
    above it (section 3). The outermost probability is the mean of 1/30 and 1/32, which the paper leaves to its code
    (arXiv 2306.06965, section 2).
    """
    outermost, normal = (1 / 30 + 1 / 32) / 2, NormalDist()
    below = [normal.inv_cdf(outermost + (0.5 - outermost) * i / 7) for i in range(7)]
    above = [normal.inv_cdf(0.5 + (0.5 - outermost) * i / 8) for i in range(1, 9)]
    return [v / above[-1] for v in (*below, 0.0, *above)]


VALUES = torch.tensor(_quantiles())
"""(16,) float32, ascending from -1 to 1; the eighth is zero."""
_BOUNDARIES = (VALUES[1:] + VALUES[:-1]) / 2
# Values of the two codes of each byte, (256, 2).
_PAIRS = torch.stack([VALUES.repeat_interleave(16), VALUES.repeat(16)], 1)


@dataclass(frozen=True)
class Nf4:
    """A matrix in NF4.

    Attributes:
        codes: uint8, two codes per byte, the first in the upper half; of the flattened rows, padded with zeros to whole
            blocks of 64.
        scales: (runs, 256) FP8, the largest magnitude of each block minus `mean`, divided by the factor of its run.
        coarse: (runs,) float32, the factor of each run of 256 scales.
        mean: () float32, mean of the largest magnitudes.
        shape: (out, in).
    """

    codes: Tensor
    scales: Tensor
    coarse: Tensor
    mean: Tensor
    shape: tuple[int, int]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in (self.codes, self.scales, self.coarse, self.mean))

    def decode(self, dtype: torch.dtype) -> Tensor:
        """Return the decoded weight, (out, in).

        Args:
            dtype: of the result.
        """
        scale = (self.scales.float() * self.coarse[:, None]).flatten()[: 2 * len(self.codes) // BLOCK] + self.mean
        values = F.embedding(self.codes.int(), _PAIRS.to(self.codes.device)).view(-1, BLOCK) * scale[:, None]
        out, inputs = self.shape
        return values.flatten()[: out * inputs].view(out, inputs).to(dtype)


def quantize_nf4(W: Tensor) -> Nf4:
    """Round every weight to the nearest of its block's 16 values; exact zeros stay zero.

    Args:
        W: (out, in), any floating dtype.

    Returns:
        The matrix in NF4, on the device of W.
    """
    out, inputs = W.shape
    blocks = F.pad(W.float().flatten(), (0, -W.numel() % BLOCK)).view(-1, BLOCK)
    peak = blocks.abs().amax(1)
    mean = peak.mean()
    runs = F.pad(peak - mean, (0, -len(peak) % SCALES)).view(-1, SCALES)
    coarse = (runs.abs().amax(1) / _FP8_MAX).clamp(min=torch.finfo(torch.float32).tiny)
    scales = (runs / coarse[:, None]).to(_FP8)
    # Codes are chosen under the stored scale, so that they compensate for its rounding error.
    stored = ((scales.float() * coarse[:, None]).flatten()[: len(peak)] + mean)[:, None]
    unit = torch.where(stored > 0, blocks / stored, 0)
    codes = torch.bucketize(unit, _BOUNDARIES.to(W.device)).to(torch.uint8).flatten()
    return Nf4(codes[::2] << 4 | codes[1::2], scales, coarse, mean, (out, inputs))
