"""Speed of single linears: dense, sparse and smaller ones, over numbers of tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from laconic.bench.forms import Form, KernelWeight, forms_for
from laconic.bench.options import SparsityOptions
from laconic.bench.shapes import Shape
from laconic.bench.timing import Call, Times, time_interleaved

# Allowed error of a 16-bit product against float32, relative to its largest value.
_TOLERANCE = 2e-2
_UNAVAILABLE = (RuntimeError, ValueError, NotImplementedError)


@dataclass(frozen=True)
class _Linear:
    """A linear in every form.

    Attributes:
        name: Name of the linear.
        shape: (out, in).
        weights: By form, copies of the weight.
        unavailable: By form that cannot be made here, the reason.
        dtype: Dtype of the activations.
        device: Device of the weights.
    """

    name: str
    shape: Shape
    weights: dict[Form, list[KernelWeight]]
    unavailable: dict[Form, str]
    dtype: torch.dtype
    device: torch.device


def bench_linears(
    shapes: Mapping[Shape, str],
    options: SparsityOptions,
    dtype: torch.dtype,
    device: torch.device,
    report: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Time every form of every shape at every number of tokens, against the dense product of the same dtype.

    Weights are random; zeros are put in by magnitude. On a GPU a round uses several copies of the weight, together far
    larger than the L2 cache.

    Args:
        shapes: Shapes with the names of their linears.
        options: Kinds of sparsity, numbers of tokens, rounds and seconds.
        dtype: Dtype of the activations and of dense weights.
        device: Device to measure.
        report: Called with the name of each measurement before it starts.

    Returns:
        A row per shape, number of tokens and form; one that cannot be measured gives the reason under `unavailable`.

    Raises:
        AssertionError: A kernel's product is wrong.
    """
    rows = []
    forms = forms_for(device, dtype, options.sparsities, options.block, options.kinds)
    for shape, name in shapes.items():
        report(f"{name} {shape[0]} x {shape[1]}")
        linear = _make_forms(name, shape, forms, dtype, device)
        for batch in sorted(set(options.batches)):
            report(f"{name} {shape[0]} x {shape[1]}, {batch} tokens")
            rows += _bench(linear, batch, options)
        del linear
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


def _make_forms(name: str, shape: Shape, forms: Sequence[Form], dtype: torch.dtype, device: torch.device) -> _Linear:
    """Make copies of a random weight in every form."""
    weights: dict[Form, list[KernelWeight]] = {}
    unavailable: dict[Form, str] = {}
    generator = torch.Generator(device).manual_seed(0)
    W = torch.randn(shape, generator=generator, device=device).to(dtype)
    for form in forms:
        try:
            first = form.pack(W)
            copies = _copies(first.nbytes, device)
            weights[form] = [first, *(form.pack(W.roll(i + 1, 0)) for i in range(copies - 1))]
        except _UNAVAILABLE as e:
            unavailable[form] = _reason(e)
    return _Linear(name, shape, weights, unavailable, dtype, device)


def _bench(linear: _Linear, batch: int, options: SparsityOptions) -> list[dict[str, Any]]:
    """Time a linear at one number of tokens, and return a row per form."""
    generator = torch.Generator(linear.device).manual_seed(1)
    x = torch.randn(batch, linear.shape[1], generator=generator, device=linear.device).to(linear.dtype)
    unavailable = dict(linear.unavailable)
    calls: dict[str, Sequence[Call]] = {}
    for form, copies in linear.weights.items():
        activations = form.cast(x)
        try:
            _check(form, copies[0], activations)
        except _UNAVAILABLE as e:
            unavailable[form] = _reason(e)
            continue
        calls[form.name] = [partial(w.multiply, activations) for w in copies]
    times = time_interleaved(calls, linear.device, rounds=options.rounds, seconds=options.seconds)
    rows = []
    for form in [*linear.weights, *linear.unavailable]:
        row = {
            "linear": linear.name,
            "shape": list(linear.shape),
            "batch": batch,
            "form": form.name,
            "kind": form.kind,
            "kernel": form.kernel,
            "dtype": str(form.dtype).removeprefix("torch."),
            "sparsity": form.sparsity,
        }
        rows.append(
            row | ({"unavailable": unavailable[form]} if form in unavailable else _speed(linear, form, batch, times))
        )
    return rows


def _speed(linear: _Linear, form: Form, batch: int, times: Mapping[str, Times]) -> dict[str, Any]:
    """Compare the time of a form with the dense ones."""
    dense = {f.dtype: times[f.name] for f in linear.weights if f.is_dense and f.name in times}
    elapsed, weight, baseline = times[form.name], linear.weights[form][0], dense.get(form.dtype)
    return elapsed.as_result() | {
        "weight_bytes": weight.nbytes,
        "flops": 2 * batch * weight.multiplied,
        "speedup": None if baseline is None else baseline.median / elapsed.median,
        "cpu_speedup": None if baseline is None else baseline.cpu_median / elapsed.cpu_median,
        "speedup_over_16_bit": dense[linear.dtype].median / elapsed.median,
    }


def _check(form: Form, weight: KernelWeight, activations: Tensor) -> None:
    """Check a product, so that no wrong kernel is timed."""
    y = weight.multiply(activations).float()
    # torch does not use TF32 by default, so this is float32 on a GPU too.
    expected = activations.float() @ weight.dense.float().T
    error = float((y - expected).abs().max() / expected.abs().max().clamp(min=1e-6))
    assert y.shape == expected.shape, f"{form.name} returns {tuple(y.shape)}"
    assert error < _TOLERANCE, f"{form.name} has an error of {error:.1e} at {tuple(activations.shape)}"


def _copies(nbytes: int, device: torch.device) -> int:
    """Return the number of copies of a weight that exceed the L2 cache four times."""
    if device.type != "cuda":
        return 1
    return math.ceil(4 * torch.cuda.get_device_properties(device).L2_cache_size / nbytes)


def _reason(e: Exception) -> str:
    return (str(e).strip() or repr(e)).splitlines()[0][:200]
