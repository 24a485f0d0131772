"""Time to quantize one decoder block of Llama-8B with GPTQ, by step, and the paper's loop beside the column loop.

    python benchmarks/column_loop.py [--device auto|cpu|cuda] [--small] [--repeat 3]

Four-bit symmetric static groups of 128, quantized in activation order, from 128 samples of 2048 tokens. `--small` takes
an eighth of every width and a sixty-fourth of the tokens, for a CPU. Times are medians of a few runs after a warm-up,
in seconds; `times` is the time of the paper's loop divided by that of the column loop, on the same device, shape and
grids, and `error` is tr(E H E^T) of the column loop divided by that of the paper's loop.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from time import perf_counter

import torch
from torch import Tensor

from laconic.formats import Format, Params
from laconic.formats.int_affine import IntAffine
from laconic.formats.tiling import Tiling
from laconic.solvers.grid import GridRounder
from laconic.solvers.moments import Moments
from laconic.solvers.obs import factor_hessian, run_column_loop
from laconic.solvers.search import search_range

BLOCKS = 32
GROUP = 128
DAMPENING = 0.01
INT4 = IntAffine(4, symmetric=True, tiling=Tiling("group", GROUP))
STEPS = ("hessian", "feedback", "search", "column loop")


@dataclass(frozen=True)
class Linear:
    """Linears with one input, which are quantized as one matrix of stacked rows."""

    name: str
    rows: int
    columns: int

    def shrunk(self, by: int) -> Linear:
        return Linear(self.name, self.rows // by, self.columns // by)


LLAMA_8B = (
    Linear("q, k, v", 6144, 4096),
    Linear("o", 4096, 4096),
    Linear("gate, up", 28672, 4096),
    Linear("down", 4096, 14336),
)


def measure(linear: Linear, tokens: int, chunk: int, device: torch.device, repeat: int) -> dict[str, float]:
    """Return the seconds of each step and of the paper's loop, and the ratio of their errors."""

    def seconds(work: Callable[[], object]) -> float:
        times = []
        for _ in range(1 + repeat):
            synchronize(device)
            start = perf_counter()
            work()
            synchronize(device)
            times.append(perf_counter() - start)
        return median(times[1:])

    W = torch.randn(linear.rows, linear.columns, device=device) / linear.columns**0.5
    x = activations(chunk, linear.columns, device)
    H = gram(x, tokens)
    order = H.diagonal().argsort(descending=True)
    sorted_H = H[order][:, order]
    factor = factor_hessian(sorted_H, DAMPENING)
    params = search_range(INT4, W, H.diagonal())
    sorted_W = W[:, order]

    def column_loop() -> Tensor:
        return run_column_loop(sorted_W, factor.A, GridRounder(INT4, params, W.shape, order))

    times = {
        "hessian": seconds(lambda: gram(x, tokens)),
        "feedback": seconds(lambda: factor_hessian(sorted_H, DAMPENING)),
        "search": seconds(lambda: search_range(INT4, W, H.diagonal())),
        "column loop": seconds(column_loop),
    }
    U = inverse_factor(sorted_H, factor.dampening_frac)
    groups = (order // GROUP).tolist()
    start = perf_counter()
    codes = paper_loop(sorted_W, U, INT4, params, groups)
    synchronize(device)
    times["paper loop"] = perf_counter() - start

    def error(codes: Tensor) -> Tensor:
        E = W - INT4.decode(codes[:, order.argsort()], params)
        return ((E @ H) * E).sum()

    return times | {"error": float(error(column_loop()) / error(codes))}


def activations(tokens: int, columns: int, device: torch.device) -> Tensor:
    """Make activations (tokens, columns) bfloat16: correlated, with a few columns of large values."""
    shared = torch.randn(tokens, 64, device=device) @ torch.randn(64, columns, device=device) / 8
    scales = torch.randn(columns, device=device).exp()
    return ((torch.randn(tokens, columns, device=device) + shared) * scales).bfloat16()


def gram(x: Tensor, tokens: int) -> Tensor:
    """Compute the second moments of `tokens` tokens, in chunks of the size of `x`."""
    moments = Moments(x.shape[1], x.device)
    while moments.tokens < tokens:
        moments.add(x)
    H = moments.finish().H
    assert H is not None
    return H


def inverse_factor(H: Tensor, dampening_frac: float) -> Tensor:
    """Compute the upper triangular U with U^T U = inverse of the damped H."""
    damped = H.clone()
    damped.diagonal().add_(dampening_frac * H.diagonal().mean())
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)


def paper_loop(W: Tensor, U: Tensor, fmt: Format, params: Params, groups: list[int]) -> Tensor:
    """Quantize by GPTQ as in the paper (arXiv 2210.17323, Algorithm 1), updating all later columns after each one.

    Args:
        W: (rows, columns).
        U: Result of `inverse_factor`.
        fmt: Format of the codes.
        params: Parameters of the groups.
        groups: Group of each column.

    Returns:
        Codes (rows, columns).
    """
    W = W.T.contiguous()
    codes = torch.empty(W.shape, dtype=fmt.code_dtype, device=W.device)
    for j, group in enumerate(groups):
        group_params = {name: p[:, group] for name, p in params.items()}
        codes[j] = fmt.encode_tiles(W[j][:, None], group_params)[:, 0]
        error = (W[j] - fmt.decode_tiles(codes[j][:, None], group_params)[:, 0]) / U[j, j]
        W[j + 1 :].addr_(U[j, j + 1 :], error, alpha=-1)
    return codes.T.contiguous()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--small", action="store_true", help="an eighth of every width, for a CPU")
    parser.add_argument("--repeat", type=int, default=3, help="timed runs of each step")
    arguments = parser.parse_args()

    has_gpu = torch.cuda.is_available()
    device = torch.device(arguments.device if arguments.device != "auto" else "cuda" if has_gpu else "cpu")
    torch.manual_seed(0)
    tokens, chunk = (4096, 2048) if arguments.small else (128 * 2048, 8 * 2048)
    linears = [linear.shrunk(8) for linear in LLAMA_8B] if arguments.small else LLAMA_8B
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}; torch {torch.__version__}; {tokens} tokens; seconds")
    titles = (*STEPS, "paper loop", "times", "error")
    print(f"{'linear':<10}{'rows x columns':>16}" + "".join(f"{title:>12}" for title in titles))
    block = dict.fromkeys(STEPS, 0.0)
    for linear in linears:
        result = measure(linear, tokens, chunk, device, arguments.repeat)
        block = {step: block[step] + result[step] for step in STEPS}
        cells = "".join(f"{result[step]:>12.4f}" for step in (*STEPS, "paper loop"))
        times = f"{result['paper loop'] / result['column loop']:>12.1f}{result['error']:>12.4f}"
        print(f"{linear.name:<10}{f'{linear.rows} x {linear.columns}':>16}{cells}{times}", flush=True)
    total = sum(block.values())
    print(f"{'block':<26}" + "".join(f"{block[step]:>12.4f}" for step in STEPS))
    print(f"all steps: {total:.3f} s per block, {BLOCKS * total:.1f} s for {BLOCKS} blocks, forward passes not counted")


if __name__ == "__main__":
    main()
