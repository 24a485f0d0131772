"""Second moments of a linear's input over the calibration set: the Hessian of GPTQ and SparseGPT, and ranges."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

# Tokens summed in one matrix product. Matrix units truncate where float32 arithmetic rounds, with a relative error that
# grows with the length of the sum: 1e-5 here, 6e-5 at four times as many tokens (measured on an H200). On a CPU tokens
# are converted to float32 first; fewer at a time take less memory and the same time.
_RUN_CUDA, _RUN = 4096, 1024

# Rows of a panel of H: small enough to skip almost half of the symmetric matrix, large enough for an efficient product.
# On a CPU, at a width of 2,048, panels of 256 rows take two thirds of the time of panels of 1,024.
_PANEL, _PANEL_CUDA = 256, 1024


@dataclass
class Moments:
    """Statistics of the input x of a linear in the compressed model, and of x_full, the same in the original model.

    Attributes hold sums until `finish` turns them into means over tokens.

    Attributes:
        in_features: Number of inputs.
        device: Device of all statistics.
        gram: Whether H is collected.
        cross: Whether D is collected, from x and x_full.
        tokens: Number of tokens added.
        H: (in, in) float32, the mean of x x^T; None without `gram`.
        D: (in, in) float32, the mean of (x_full - x) x^T; None without `cross`.
        lo: (in,) float32, the smallest value of each input, at most zero.
        hi: (in,) float32, the largest value of each input, at least zero.
        squares: (in,) float32, the mean square of each input; zeros where H is collected.
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
        """Largest magnitude of each input, (in,)."""
        return torch.maximum(-self.lo, self.hi)

    @property
    def energy(self) -> Tensor:
        """Mean square of each input, the activation energy, (in,)."""
        return self.squares if self.H is None else self.H.diagonal()

    def finish(self) -> Moments:
        """Turn sums into means, and fill the lower half of H, after all activations are added.

        Returns:
            Itself.

        Raises:
            ValueError: The activations hold NaN or infinity.
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
        """Add activations to the sums; of H only the upper half until `finish`.

        Args:
            x: (..., in), inputs in the compressed model.
            x_full: (..., in), the same tokens in the original model; needed with `cross`.
        """
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


class NonFiniteError(ValueError):
    """Activations hold NaN or infinity."""


def non_finite_error() -> NonFiniteError:
    """Make the error for activations that hold NaN or infinity."""
    return NonFiniteError("the activations hold NaN or infinity; check the model and the calibration text")


def _add_gram(H: Tensor, x: Tensor) -> None:
    """Add x^T x to the upper half of H (in, in) float32, in panels of rows. x: (tokens, in)."""
    # The product of two half-precision numbers is exact in float32, and a GPU's matrix units sum in float32.
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
    """Fill the part below the diagonal panels of a symmetric H, in place."""
    for i in range(0, H.shape[0], panel := _panel(H)):
        j = i + panel
        H[j:, i:j] = H[i:j, j:].T


def output_error(W: Tensor, Q: Tensor, H: Tensor, max_rows: int = 256) -> float:
    """Compute ||(W - Q) X||^2 / ||W X||^2 over the calibration set, estimated on evenly spaced rows of W.

    Args:
        W: (out, in), the original weight.
        Q: (out, in), the compressed weight.
        H: (in, in), the mean of x x^T.
        max_rows: Number of rows to compute it on.

    Returns:
        The relative squared error of the output.
    """
    rows = torch.linspace(0, W.shape[0] - 1, min(max_rows, W.shape[0]), device=W.device).long()
    w, e = W[rows].float(), (W[rows].float() - Q[rows].float())
    error, norm = ((e @ H) * e).sum(), ((w @ H) * w).sum()
    return float(error / norm.clamp(min=torch.finfo(torch.float32).tiny))
