"""Second moments of a linear's input, the one statistic that GPTQ and its kin need of the calibration set."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

# Tokens that matrix units sum in one go. They truncate where float32 arithmetic rounds, and what is lost grows with the
# length of the sum: 1e-5 of it here, 6e-5 at four times as many (measured on an H200). On a CPU they are widened first,
# and fewer take less memory and no more time.
_RUN_CUDA, _RUN = 4096, 1024

# Rows of a Gram matrix made at once: few enough that half of it need not be computed, enough to be worth a product. On
# a CPU, 2,048 wide, 256 rows take two thirds of the time that 1,024 do.
_PANEL, _PANEL_CUDA = 256, 1024


@dataclass
class Moments:
    """Means over calibration tokens x (the input the compressed model sees) and, where asymmetric calibration is
    asked for, of x_full (the input the original model sees): sums, until `finish`.

    H: (in, in) float32, the mean of x x^T. D: (in, in) or None, that of (x_full - x) x^T.
    lo, hi: (in,) float32, the smallest and largest value seen of each input, zero included. squares: (in,) float32, the
    mean square of each where H is not kept. tokens: how many.
    """

    in_features: int
    device: torch.device
    gram: bool = True
    cross: bool = False
    tokens: int = 0
    H: Tensor | None = field(init=False, default=None)
    D: Tensor | None = field(init=False, default=None)
    lo: Tensor = field(init=False)
    hi: Tensor = field(init=False)
    squares: Tensor = field(init=False)

    def __post_init__(self) -> None:
        if self.gram:
            self.H = torch.zeros(self.in_features, self.in_features, device=self.device)
        if self.cross:
            self.D = torch.zeros(self.in_features, self.in_features, device=self.device)
        self.lo = torch.zeros(self.in_features, device=self.device)
        self.hi = torch.zeros(self.in_features, device=self.device)
        self.squares = torch.zeros(self.in_features, device=self.device)

    @property
    def peak(self) -> Tensor:
        """(in,) the largest magnitude seen of each input."""
        return torch.maximum(-self.lo, self.hi)

    @property
    def energy(self) -> Tensor:
        """(in,) the mean square of each input."""
        return self.squares if self.H is None else self.H.diagonal()

    def finish(self) -> Moments:
        """Complete what only half was summed, and make means of the sums, once all activations are in.

        Raises: ValueError when NaN or infinity was among the activations.
        """
        if not torch.isfinite(self.hi - self.lo).all():
            raise non_finite_error()
        tokens = max(1, self.tokens)
        if self.H is not None:
            _mirror(self.H.div_(tokens))
        self.squares.div_(tokens)
        if self.D is not None:
            self.D.div_(tokens)
        return self

    def add(self, x: Tensor, x_full: Tensor | None = None) -> None:
        """Take in activations of shape (..., in). H is whole only after `finish`."""
        x = x.reshape(-1, self.in_features).to(self.device)
        self.tokens += x.shape[0]
        self.lo = torch.minimum(self.lo, x.amin(0).float())
        self.hi = torch.maximum(self.hi, x.amax(0).float())
        if self.H is not None:
            _add_gram(self.H, x)
        else:
            for run in x.split(_RUN):
                self.squares += run.float().square().sum(0)
        if self.D is not None:
            assert x_full is not None
            x, full = x.float(), x_full.reshape(-1, self.in_features).to(self.device, torch.float32)
            self.D.addmm_((full - x).T, x)


def non_finite_error() -> ValueError:
    """What to tell when NaN or infinity is among the activations."""
    return ValueError("the activations hold NaN or infinity; check the model and the calibration text")


def _add_gram(H: Tensor, x: Tensor) -> None:
    """H (in, in) float32 += x^T x, in panels of rows from the diagonal on. x: (tokens, in)."""
    # The product of two half-precision numbers is exact in float32, and a GPU's matrix units add them up in it.
    half = x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)
    for run in x.split(_RUN_CUDA if x.is_cuda else _RUN):
        run = run if half else run.float()
        for i in range(0, H.shape[0], panel := _panel(H)):
            left, right, rows = run[:, i : i + panel].T, run[:, i:], H[i : i + panel, i:]
            if half:
                rows += torch.mm(left, right, out_dtype=torch.float32)
            else:
                rows.addmm_(left, right)


def _panel(H: Tensor) -> int:
    return _PANEL_CUDA if H.is_cuda else _PANEL


def _mirror(H: Tensor) -> None:
    """Fill what lies below the diagonal panels of a symmetric H, in place."""
    for i in range(0, H.shape[0], panel := _panel(H)):
        j = i + panel
        H[j:, i:j] = H[i:j, j:].T


def output_error(W: Tensor, Q: Tensor, H: Tensor, max_rows: int = 256) -> float:
    """||(W - Q) X||^2 / ||W X||^2 over the calibration set, estimated on evenly spaced rows of W.

    W, Q: (out, in). H: (in, in), of x x^T.
    """
    rows = torch.linspace(0, W.shape[0] - 1, min(max_rows, W.shape[0]), device=W.device).long()
    w, e = W[rows].float(), (W[rows].float() - Q[rows].float())
    lost, kept = ((e @ H) * e).sum(), ((w @ H) * w).sum()
    return float(lost / kept.clamp(min=torch.finfo(torch.float32).tiny))
