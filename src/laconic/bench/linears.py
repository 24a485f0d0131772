"""One linear after another: dense against sparse against smaller, over numbers of tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from laconic.bench.forms import Form, Held, forms_for
from laconic.bench.shapes import Shape
from laconic.bench.timing import Call, take_turns

# Of the largest number, as a product in 16 bit may be off the one in float32.
_TOLERANCE = 2e-2


def bench_linears(
    shapes: Mapping[Shape, str],
    batches: Sequence[int],
    device: torch.device,
    *,
    dtype: torch.dtype,
    sparsities: Sequence[float],
    block: int,
    kinds: Sequence[str],
    rounds: int,
    seconds: float,
    report: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Every form of every shape at every number of tokens, against the dense product of the same dtype.

    rounds, seconds: of one shape and number of tokens, whichever is reached first. Weights are random; zeros are put
    in by magnitude. On a GPU a round goes over copies that are together far larger than its cache.

    Returns: a row each; one that could not be measured says why under `unavailable`.
    Raises: AssertionError when a kernel's product is wrong.
    """
    rows = []
    for shape, name in shapes.items():
        report(f"{name} {shape[0]} x {shape[1]}")
        held, missing = _hold(shape, device, dtype, forms_for(device, dtype, sparsities, block, kinds))
        for batch in batches:
            report(f"{name} {shape[0]} x {shape[1]}, {batch} tokens")
            rows += _at(batch, shape, name, held, missing, device, dtype, rounds, seconds)
        del held
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


def _hold(
    shape: Shape, device: torch.device, dtype: torch.dtype, forms: Sequence[Form]
) -> tuple[dict[Form, list[Held]], dict[Form, str]]:
    """Every form with its copies, and those that there are none of here, with the reason."""
    held: dict[Form, list[Held]] = {}
    missing: dict[Form, str] = {}
    noise = torch.Generator(device).manual_seed(0)
    W = torch.randn(shape, generator=noise, device=device).to(dtype)
    for form in forms:
        try:
            first = form.hold(W)
            copies = _over_cache(first.nbytes, device)
            held[form] = [first, *(form.hold(W.roll(i + 1, 0)) for i in range(copies - 1))]
        except (RuntimeError, ValueError, NotImplementedError) as e:
            missing[form] = _reason(e)
    return held, missing


def _at(
    batch: int,
    shape: Shape,
    name: str,
    held: dict[Form, list[Held]],
    missing: dict[Form, str],
    device: torch.device,
    dtype: torch.dtype,
    rounds: int,
    seconds: float,
) -> list[dict[str, Any]]:
    x = torch.randn(batch, shape[1], generator=torch.Generator(device).manual_seed(1), device=device).to(dtype)
    missing = dict(missing)
    calls: dict[str, Sequence[Call]] = {}
    for form, copies in held.items():
        read = form.cast(x)
        try:
            _check(form, copies[0], read)
        except (RuntimeError, ValueError, NotImplementedError) as e:
            missing[form] = _reason(e)
            continue
        calls[form.name] = [partial(h.call, read) for h in copies]
    times = take_turns(calls, device, rounds=rounds, seconds=seconds)
    baselines = {f.dtype: times[f.name].median for f in held if f.baseline and f.name in times}
    worked = {f.dtype: times[f.name].worked for f in held if f.baseline and f.name in times}
    rows = []
    for form in [*held, *(f for f in missing if f not in held)]:
        row = {
            "linear": name,
            "shape": list(shape),
            "batch": batch,
            "form": form.name,
            "kind": form.kind,
            "kernel": form.kernel,
            "dtype": str(form.dtype).removeprefix("torch."),
            "sparsity": form.sparsity,
        }
        if form in missing:
            rows.append(row | {"unavailable": missing[form]})
            continue
        spent, first = times[form.name], held[form][0]
        rows.append(
            row
            | spent.told()
            | {
                "weight_bytes": first.nbytes,
                "flops": 2 * batch * first.kept,
                "speedup": baselines[form.dtype] / spent.median if form.dtype in baselines else None,
                "cpu_speedup": worked[form.dtype] / spent.worked if form.dtype in worked else None,
                "speedup_over_16_bit": baselines[dtype] / spent.median,
            }
        )
    return rows


def _check(form: Form, held: Held, read: Tensor) -> None:
    """Nothing is timed that is wrong."""
    y = held.call(read).float()
    # In float32 on a GPU too: its default there is that.
    expected = read.float() @ held.weight.float().T
    off = float((y - expected).abs().max() / expected.abs().max().clamp(min=1e-6))
    assert y.shape == expected.shape, f"{form.name} puts out {tuple(y.shape)}"
    assert off < _TOLERANCE, f"{form.name} is off by {off:.1e} at {tuple(read.shape)}"


def _over_cache(nbytes: int, device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return math.ceil(4 * torch.cuda.get_device_properties(device).L2_cache_size / nbytes)


def _reason(e: Exception) -> str:
    return (str(e).strip() or repr(e)).splitlines()[0][:200]
