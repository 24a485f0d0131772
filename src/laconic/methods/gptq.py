"""GPTQ (Frantar et al., arXiv 2210.17323): round with error feedback under the calibration Hessian.

In the sweep's LDL form (`solvers.obs`), with static groups in activation order, damping with retry, grids of least
(Hessian-weighted) squared error, and optionally GPTAQ's objective (Li et al., arXiv 2504.02692), and pruning in the
same sweep (SparseGPT, arXiv 2301.00774, section 3.5).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from laconic.formats import Format, Params, Quantized, fit
from laconic.solvers.grid import GridRounder, OnlineGridRounder, order_by_energy, round_with_hessian
from laconic.solvers.masks import StackedLinear
from laconic.solvers.moments import Moments
from laconic.solvers.obs import LdlFactor, factor_hessian, run_column_loop
from laconic.solvers.prune import prune_with_hessian
from laconic.solvers.search import search_range
from laconic.stages.pruning import Masking
from laconic.stages.stage import LinearStage, Outcome, QuantizingStage


class Gptq(QuantizingStage, Masking, LinearStage):
    """actorder: `weight` rounds columns in the order of falling activation energy, on grids fixed beforehand
    (static groups: nothing is stored, nothing is slower at run time); null goes left to right and fits each
    group's grid when it comes to it. dampening_frac: share of the Hessian's mean diagonal added to it.
    observer: `mse` or `minmax` ranges. true_sequential: observe each linear after the earlier ones of its block
    are quantized. asymmetric: match the original model's output from the quantized model's input (GPTAQ), in
    part (0 to 1) or in full. sparsity, mask_structure: prune in the same sweep, what is kept being rounded: either
    makes up for the errors of both."""

    method: Literal["gptq"] = "gptq"
    actorder: Literal["weight"] | None = "weight"
    dampening_frac: float = Field(0.01, gt=0, le=1)
    observer: Literal["minmax", "mse"] = "mse"
    true_sequential: bool = True
    asymmetric: float = Field(0.0, ge=0, le=1)
    block_size: int = Field(128, ge=1)

    @model_validator(mode="after")
    def _nothing_beside_a_mask(self) -> Gptq:
        for key, given in (("outlier_ratio", self.outlier_ratio), ("low_rank", self.low_rank)):
            if self.prunes and given:
                raise ValueError(f"{key} leaves weights where a mask says zero; leave it out, or sparsity")
        return self

    @property
    def gram(self) -> bool:
        return True

    @property
    def cross(self) -> bool:
        return self.asymmetric > 0

    @property
    def sequential(self) -> bool:
        return self.true_sequential

    def compress(self, weight: Tensor, moments: Moments | None, dtype: torch.dtype) -> Outcome:
        return self.prune(weight, (), moments, dtype)

    def prune(
        self, weight: Tensor, parts: Sequence[StackedLinear], moments: Moments | None, dtype: torch.dtype
    ) -> Outcome:
        assert moments is not None
        assert moments.H is not None
        fmt = self.result.weights
        H = moments.H
        # Where the weight is zero as well nothing is lost: so are columns kept beside the codes.
        dead = (H.diagonal() == 0) & (weight != 0).any(0)
        order = order_by_energy(H, self.structure.width) if self.actorder else torch.arange(len(H), device=H.device)
        factor = factor_hessian(H, self.dampening_frac, order if self.actorder else None)
        target = self._retarget(weight, moments, H, factor.dampening_frac)
        zeros = weight == 0
        if parts:
            q = self._prune(fmt, target, H, factor, order, zeros, parts, dtype)
        else:
            q = self._sweep(fmt, target, H, factor, order, zeros if bool(zeros.any()) else None, dtype)
        return Outcome(q, {"dampening_frac": factor.dampening_frac, "dead_columns": int(dead.sum())})

    def target(self, weight: Tensor, moments: Moments | None) -> Tensor:
        assert moments is not None
        assert moments.H is not None
        if moments.D is None:
            return weight
        return self._retarget(weight, moments, moments.H, factor_hessian(moments.H, self.dampening_frac).dampening_frac)

    def _retarget(self, W: Tensor, moments: Moments, H: Tensor, dampening_frac: float) -> Tensor:
        if moments.D is None:
            return W
        return retarget(W, moments.D * self.asymmetric, H, dampening_frac)

    def _sweep(
        self,
        fmt: Format,
        W: Tensor,
        H: Tensor,
        factor: LdlFactor,
        order: Tensor,
        zeros: Tensor | None,
        dtype: torch.dtype,
    ) -> Quantized:
        # What a mask's zeros would have been does not count for a grid, but is an error that the rest answers for.
        rounded = W if zeros is None else W.masked_fill(zeros, 0)
        if self.actorder is None and fmt.tiling.strategy == "group":
            importance = H.diagonal() if self.observer == "mse" else None
            online = OnlineGridRounder(fmt, rounded, dtype, importance, zeros)
            codes = run_column_loop(W, factor.A, online, self.block_size)
            return Quantized(fmt, codes, online.params)
        params = self._grid(fmt, rounded, H, dtype)
        codes = round_with_hessian(
            fmt, W, H, params, factor=factor, order=order, block_size=self.block_size, zeros=zeros
        )
        return Quantized(fmt, codes, params)

    def _prune(
        self,
        fmt: Format,
        W: Tensor,
        H: Tensor,
        factor: LdlFactor,
        order: Tensor,
        zeros: Tensor,
        parts: Sequence[StackedLinear],
        dtype: torch.dtype,
    ) -> Quantized:
        prune = partial(prune_with_hessian, W, factor, order, zeros, parts, self.structure, columns=self.block_size)
        # Grids are fixed beforehand. What is kept grows as it answers for what goes: they are fitted to that.
        params = self._grid(fmt, prune(), H, dtype)
        grid = GridRounder(fmt, params, W.shape, order)
        return Quantized(fmt, prune(grid=grid), params)

    def _grid(self, fmt: Format, W: Tensor, H: Tensor, dtype: torch.dtype) -> Params:
        if self.observer == "minmax":
            return fit(fmt, W, dtype)
        return search_range(fmt, W, H.diagonal(), dtype=dtype)


def retarget(W: Tensor, D: Tensor, H: Tensor, dampening_frac: float) -> Tensor:
    """The real weight that best gives the original output W x_full from the quantized model's input x.

    W* = W + W D (H + lambda I)^-1, D = E[(x_full - x) x^T]: the minimiser of E||W* x - W x_full||^2. Rounding W* under
    H then minimises GPTAQ's objective ||Q X - W X_full||^2 (arXiv 2504.02692, eq. 5), since it differs from
    ||(Q - W*) X||^2 by a constant.

    W: (out, in). D, H: (in, in). Returns: (out, in).
    """
    damped = H.clone()
    damped.diagonal().add_(dampening_frac * H.diagonal().mean())
    L, info = torch.linalg.cholesky_ex(damped)
    if info != 0:
        return W
    return W + torch.cholesky_solve((W @ D).T, L).T
