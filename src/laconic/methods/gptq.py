"""GPTQ (Frantar et al., arXiv 2210.17323): round with error feedback under the calibration Hessian.

In the sweep's LDL form (`solvers.obs`), with static groups in activation order, damping with retry, grids of least
(Hessian-weighted) squared error, and optionally GPTAQ's objective (Li et al., arXiv 2504.02692), and pruning in the
same sweep (SparseGPT, arXiv 2301.00774, section 3.5).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from laconic.formats import Params, Quantized
from laconic.solvers.grid import GridRounder, OnlineGridRounder, order_by_energy, round_with_hessian
from laconic.solvers.obs import LdlFactor, factor_hessian, run_column_loop
from laconic.solvers.prune import prune_with_hessian
from laconic.solvers.search import search_range
from laconic.stages.linear import LinearStage, LinearTask, Outcome
from laconic.stages.pruning import Masking
from laconic.stages.quantizing import QuantizingStage
from laconic.stages.renamed import refuse_renamed
from laconic.stages.stage import Needs


class Gptq(QuantizingStage, Masking, LinearStage):
    """Round with error feedback.

    Attributes:
        actorder: `weight` rounds columns in the order of falling activation energy, on grids fixed beforehand (static
            groups: nothing is stored, nothing is slower at run time); null goes from left to right and fits each
            group's grid when it comes to it.
        dampening_frac: share of the Hessian's mean diagonal added to it.
        observer: `mse` or `minmax` ranges.
        true_sequential: observe each linear after the earlier ones of its block are quantized.
        asymmetric_calibration: match the original model's output from the quantized model's input (GPTAQ), in part
            (0 to 1) or in full.
        block_size: columns between two large feedback products.
        sparsity: prune in the same sweep; the remaining weights are rounded and compensate for both errors.
        mask_structure: of the pruning.
    """

    example: ClassVar = {"scheme": "W4A16", "group_size": 32}

    method: Literal["gptq"] = "gptq"
    actorder: Literal["weight"] | None = "weight"
    dampening_frac: float = Field(0.01, gt=0, le=1)
    observer: Literal["minmax", "mse"] = "mse"
    true_sequential: bool = True
    asymmetric_calibration: float = Field(0.0, ge=0, le=1)
    block_size: int = Field(128, ge=1)

    _renamed = refuse_renamed(asymmetric="asymmetric_calibration")

    @model_validator(mode="after")
    def _nothing_beside_a_mask(self) -> Gptq:
        for key, value in (("outlier_ratio", self.outlier_ratio), ("low_rank", self.low_rank)):
            if self.prunes and value:
                raise ValueError(f"{key} leaves weights where a mask says zero; leave it out, or sparsity")
        return self

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
        # Where the weight is zero as well nothing is lost, as in columns that stay in 16 bit.
        dead = (H.diagonal() == 0) & (W != 0).any(0)
        order = order_by_energy(H, self.structure.width) if self.actorder else torch.arange(len(H), device=H.device)
        factor = factor_hessian(H, self.dampening_frac, order if self.actorder else None)
        job = _Sweep(task, self._retarget(task, factor.dampening_frac), H, factor, order, W == 0)
        q = self._prune(job) if self.prunes else self._round(job)
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

    def _round(self, job: _Sweep) -> Quantized:
        fmt, W, H = job.task.format, job.target, job.H
        zeros = job.zeros if bool(job.zeros.any()) else None
        # A zero that stays zero does not widen a grid, but its error is fed back to the other columns.
        rounded = W if zeros is None else W.masked_fill(zeros, 0)
        if self.actorder is None and fmt.tiling.strategy == "group":
            importance = H.diagonal() if self.observer == "mse" else None
            online = OnlineGridRounder(fmt, rounded, job.task.dtype, importance, zeros)
            codes = run_column_loop(W, job.factor.A, online, self.block_size)
            return Quantized.scalar(fmt, codes, online.params)
        params = self._grid(job, rounded)
        codes = round_with_hessian(
            fmt, W, H, params, factor=job.factor, order=job.order, block_size=self.block_size, zeros=zeros
        )
        return Quantized.scalar(fmt, codes, params)

    def _prune(self, job: _Sweep) -> Quantized:
        fmt, W, parts = job.task.format, job.target, job.task.parts
        prune = partial(
            prune_with_hessian, W, job.factor, job.order, job.zeros, parts, self.structure, columns=self.block_size
        )
        # Grids are fixed beforehand. Remaining weights grow as they compensate: grids are fitted to the pruned weight.
        params = self._grid(job, prune())
        grid = GridRounder(fmt, params, W.shape, job.order)
        return Quantized.scalar(fmt, prune(grid=grid), params)

    def _grid(self, job: _Sweep, W: Tensor) -> Params:
        fmt, dtype = job.task.format, job.task.dtype
        if self.observer == "minmax":
            return fmt.fit(W, dtype)
        return search_range(fmt, W, job.H.diagonal(), dtype=dtype)


@dataclass(frozen=True)
class _Sweep:
    """What a sweep works on.

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
