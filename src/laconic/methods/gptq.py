"""GPTQ (Frantar et al., arXiv 2210.17323): round with error feedback under the calibration Hessian.

It uses the column loop in LDL form (`solvers.obs`), static groups in activation order, damping with retry, and grids of
least (Hessian-weighted) squared error. Optional are GPTAQ's objective (Li et al., arXiv 2504.02692), pruning in the
same column loop (SparseGPT, arXiv 2301.00774, section 3.5), and refinement after it (`solvers.refine`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from laconic.formats import Params, Quantized
from laconic.formats.schemes import Scheme
from laconic.solvers.grid import GridRounder, OnlineGridRounder, order_by_energy, round_with_hessian
from laconic.solvers.obs import LdlFactor, factor_hessian, run_column_loop
from laconic.solvers.prune import prune_with_hessian
from laconic.solvers.refine import refine
from laconic.solvers.search import search_range
from laconic.stages.linear import LinearStage, LinearTask, Outcome
from laconic.stages.pruning import Masking
from laconic.stages.quantizing import QuantizingStage
from laconic.stages.stage import Needs


class Gptq(QuantizingStage, Masking, LinearStage):
    """Round with error feedback.

    Attributes:
        actorder: `weight` rounds columns in the order of falling activation energy, on grids fixed beforehand (static
            groups: no order is stored, and inference is not slower); null goes from left to right, and fits each
            group's grid when the group is reached.
        dampening_frac: share of the Hessian's mean diagonal added to it.
        observer: how a grid's range is chosen: `minmax`, or `mse` for the range of least squared error.
        true_sequential: observe each linear after the earlier ones of its block are quantized.
        asymmetric_calibration: match the original model's output from the quantized model's input (GPTAQ), in part
            (0 to 1) or in full.
        block_size: columns after which their feedback to all later columns is computed, as one matrix product.
        refine: passes after the column loop in which each column is rounded anew with all others fixed, and scales are
            fitted in closed form; none raises the error of the output.
        sparsity: share of the weights to prune in the same column loop; the remaining weights are rounded, and
            compensate for both errors.
    """

    example: ClassVar = {"scheme": "W4A16", "group_size": 32}
    renamed: ClassVar = {"asymmetric": "asymmetric_calibration"}

    method: Literal["gptq"] = "gptq"
    actorder: Literal["weight"] | None = "weight"
    dampening_frac: float = Field(0.01, gt=0, le=1)
    observer: Literal["minmax", "mse"] = "mse"
    true_sequential: bool = True
    asymmetric_calibration: float = Field(0.0, ge=0, le=1)
    block_size: int = Field(128, ge=1)
    refine: int = Field(0, ge=0)

    def check_scheme(self, scheme: Scheme) -> None:
        super().check_scheme(scheme)
        fillers = {
            "outlier_ratio": scheme.outlier_columns,
            "low_rank": scheme.rank,
            "rotate_inputs": scheme.input_rotation,
        }
        for key, value in fillers.items():
            if self.prunes and value:
                raise ValueError(f"{key} adds values where pruned weights are zero; leave it out, or sparsity")

    @property
    def needs(self) -> Needs:
        return replace(
            super().needs,
            second_moments=True,
            cross_moments=self.asymmetric_calibration > 0,
            sequential=self.true_sequential,
        )

    def compress(self, task: LinearTask) -> Outcome:
        W, H = task.weight, task.hessian
        # Columns of zeros are not counted: outlier columns, which stay in 16 bit, are zero here.
        dead = (H.diagonal() == 0) & (W != 0).any(0)
        order = order_by_energy(H, self.structure.width) if self.actorder else torch.arange(len(H), device=H.device)
        factor = factor_hessian(H, self.dampening_frac, order if self.actorder else None)
        loop = _ColumnLoop(task, self._retarget(task, factor.dampening_frac), H, factor, order, W == 0)
        q = self._prune(loop) if self.prunes else self._round(loop)
        if self.refine:
            damped = H.clone()
            damped.diagonal().add_(factor.dampening_frac * H.diagonal().mean())
            zeros = loop.zeros | (q.decode() == 0) if self.prunes else loop.zeros
            q = refine(q, loop.target, damped, self.refine, zeros=zeros, block_size=self.block_size)
        return Outcome(q, {"dampening_frac": factor.dampening_frac, "dead_columns": int(dead.sum())})

    def target(self, task: LinearTask) -> Tensor:
        assert task.moments is not None
        if task.moments.D is None:
            return task.weight
        return self._retarget(task, factor_hessian(task.hessian, self.dampening_frac).dampening_frac)

    def _retarget(self, task: LinearTask, dampening_frac: float) -> Tensor:
        assert task.moments is not None
        if task.moments.D is None:
            return task.weight
        return retarget(task.weight, task.moments.D * self.asymmetric_calibration, task.hessian, dampening_frac)

    def _round(self, loop: _ColumnLoop) -> Quantized:
        fmt, W, H = loop.task.format, loop.target, loop.H
        zeros = loop.zeros if bool(loop.zeros.any()) else None
        # A weight that stays zero does not widen a grid, but its error is fed back to the other columns.
        rounded = W if zeros is None else W.masked_fill(zeros, 0)
        if self.actorder is None and fmt.tiling.strategy == "group":
            importance = H.diagonal() if self.observer == "mse" else None
            online = OnlineGridRounder(fmt, rounded, loop.task.dtype, importance, zeros)
            codes = run_column_loop(W, loop.factor.A, online, self.block_size)
            return Quantized.scalar(fmt, codes, online.params)
        params = self._grid(loop, rounded)
        codes = round_with_hessian(
            fmt, W, H, params, factor=loop.factor, order=loop.order, block_size=self.block_size, zeros=zeros
        )
        return Quantized.scalar(fmt, codes, params)

    def _prune(self, loop: _ColumnLoop) -> Quantized:
        fmt, W, parts = loop.task.format, loop.target, loop.task.parts
        prune = partial(
            prune_with_hessian, W, loop.factor, loop.order, loop.zeros, parts, self.structure, columns=self.block_size
        )
        # Grids are fixed before the loop. Remaining weights grow as they compensate for pruned ones, so grids are
        # fitted to the result of a first loop that only prunes.
        params = self._grid(loop, prune())
        grid = GridRounder(fmt, params, W.shape, loop.order)
        return Quantized.scalar(fmt, prune(grid=grid), params)

    def _grid(self, loop: _ColumnLoop, W: Tensor) -> Params:
        fmt, dtype = loop.task.format, loop.task.dtype
        if self.observer == "minmax":
            return fmt.fit(W, dtype)
        return search_range(fmt, W, loop.H.diagonal(), dtype=dtype)


@dataclass(frozen=True)
class _ColumnLoop:
    """Inputs of a column loop.

    Attributes:
        task: the linears.
        target: (out, in), the real weight to come close to.
        H: (in, in), second moments of the input.
        factor: of H, its inputs in `order`.
        order: of the columns.
        zeros: (out, in) bool, weights that stay zero.
    """

    task: LinearTask
    target: Tensor
    H: Tensor
    factor: LdlFactor
    order: Tensor
    zeros: Tensor


def retarget(W: Tensor, D: Tensor, H: Tensor, dampening_frac: float) -> Tensor:
    """Return the real weight that best gives the original output W x_full from the quantized model's input x.

    W* = W + W D (H + lambda I)^-1, D = E[(x_full - x) x^T]: the minimiser of E||W* x - W x_full||^2. Rounding W* under
    H then minimises GPTAQ's objective ||Q X - W X_full||^2 (arXiv 2504.02692, eq. 5), since it differs from
    ||(Q - W*) X||^2 by a constant.

    Args:
        W: (out, in).
        D: (in, in), cross moments.
        H: (in, in), second moments.
        dampening_frac: share of H's mean diagonal added to it.

    Returns:
        W*, (out, in); W where H cannot be factored.
    """
    damped = H.clone()
    damped.diagonal().add_(dampening_frac * H.diagonal().mean())
    L, info = torch.linalg.cholesky_ex(damped)
    if info != 0:
        return W
    return W + torch.cholesky_solve((W @ D).T, L).T
