"""Speed of linears with 16-bit side tensors on a GPU, beside bf16.

    python benchmarks/native_linears.py [--output RESULT.json]

Linears of a Llama of 8 billion parameters, 4096 inputs and 4096 or 14336 outputs, for 1 to 512 tokens. In each run the
baseline is `torch.mm` in bf16. Timed are LLM.int8 (1 % of the columns in 16 bit) in plain torch, and, where vLLM is
installed, as the plugin serves it; W8A8 and W4A16 by vLLM's own kernels alone; W4A16 with outlier columns, those once
more in plain torch, and with a product of rank 32. Every linear is first compared with its decoded weight; nothing is
timed if one is wrong.

All calls are CUDA graphs over copies of the weight that together are larger than the L2 cache. Times of one size are
interleaved, so that ratios are of one run. `kernels` has the longest kernels of a call, by torch's profiler.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from laconic.bench.timing import Times, time_interleaved
from laconic.formats import LowRank, Outliers, Quantized, quantize
from laconic.formats.schemes import Scheme, scheme
from laconic.runtime.products import integer_linear, round_activations
from laconic.runtime.quant_config import to_config

COLUMNS = 4096
OUTPUTS = (4096, 14336)
TOKENS = (1, 16, 64, 512)
# Number of outlier columns (1 %), and rank.
OUTLIERS, RANK = 41, 32
BYTES = 192 << 20
PROFILED = (1, 512)
Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Linear:
    """A way to compute a linear.

    Attributes:
        scheme: Scheme of the weight, side tensors included.
        build: Returns the product with a weight.
        vllm: Whether it needs vLLM.
    """

    scheme: Scheme
    build: Callable[[Quantized, Scheme], Product]
    vllm: bool = True


def main() -> int:
    """Check and time the linears; return 2 without a GPU, 1 if one is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="file for the result; the standard output otherwise")
    parser.add_argument("--seconds", type=float, default=0.8, help="time of each size and number of tokens")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU: nothing to time")
        return 2
    torch.manual_seed(0)
    has_vllm = find_spec("vllm") is not None
    result: dict[str, Any] = {
        "card": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "vllm": version("vllm") if has_vllm else None,
        "linears": [],
    }
    with torch.inference_mode(), torch.device("cuda"), started_vllm() if has_vllm else nullcontext():
        for outputs in OUTPUTS:
            calls = products(outputs, has_vllm)
            if calls is None:
                return 1
            result["linears"] += [measure(outputs, tokens, calls, args.seconds) for tokens in TOKENS]
    text = json.dumps(result, indent=1)
    if args.output:
        args.output.write_text(text)
    print(text)
    return 0


def version(package: str) -> str:
    """Return the version of an installed package."""
    return str(__import__(package).__version__)


def linears() -> dict[str, Linear]:
    """Return the linears by name."""
    w8a8, w4a16 = scheme("W8A8"), scheme("W4A16")
    return {
        "LLM.int8, torch": Linear(replace(w8a8, outlier_columns=OUTLIERS), torch_int8, vllm=False),
        "LLM.int8": Linear(replace(w8a8, outlier_columns=OUTLIERS), vllm_layer),
        "W8A8": Linear(w8a8, vllm_layer),
        "W4A16": Linear(w4a16, vllm_layer),
        "W4A16 + outliers": Linear(replace(w4a16, outlier_columns=OUTLIERS), vllm_layer),
        "W4A16 + outliers, torch": Linear(replace(w4a16, outlier_columns=OUTLIERS), vllm_layer_torch),
        "W4A16 + rank": Linear(replace(w4a16, rank=RANK), vllm_layer),
    }


def products(outputs: int, has_vllm: bool) -> dict[str, list[Product]] | None:
    """Return the products with copies of each weight by name, bf16 among them; None if one is wrong."""
    w = torch.randn(outputs, COLUMNS) / math.sqrt(COLUMNS)
    dense = w.bfloat16()
    calls: dict[str, list[Product]] = {"bf16": [bf16(dense.clone()) for _ in range(copies(dense.nbytes))]}
    for name, linear in linears().items():
        if linear.vllm and not has_vllm:
            continue
        q = weight(w, linear.scheme)
        size = sum(t.nbytes for t in q.to_tensors().values())
        calls[name] = [linear.build(q, linear.scheme) for _ in range(copies(size))]
        error = relative_error(calls[name][0], q, linear.scheme)
        if not error < 0.01:
            print(f"{name} with {outputs} outputs is wrong by {error:.3g}: nothing is timed", file=sys.stderr)
            return None
    return calls


def copies(size: int) -> int:
    """Return the number of weights of a size in bytes that exceed the L2 cache."""
    return math.ceil(BYTES / size)


def weight(w: Tensor, kept: Scheme) -> Quantized:
    """Return a weight with the side tensors of a scheme."""
    columns = torch.randperm(COLUMNS)[: kept.outlier_columns].sort().values
    coded = w.index_fill(1, columns, 0)
    q = quantize(kept.weights, coded, kept.weights.fit(coded, torch.bfloat16))
    if kept.outlier_columns:
        q = replace(q, outliers=Outliers(columns.int(), w[:, columns].bfloat16()))
    if kept.rank:
        left, right = torch.randn(w.shape[0], kept.rank), torch.randn(kept.rank, COLUMNS)
        q = replace(q, low_rank=LowRank((left / 100).bfloat16(), (right / 100).bfloat16()))
    return q


def relative_error(product: Product, q: Quantized, kept: Scheme) -> float:
    """Return the error of a product, relative to one in float32 with the decoded weight."""
    x = torch.randn(64, COLUMNS).bfloat16()
    rounded = x.float()
    if kept.input_activations:
        exempt = None if q.outliers is None else q.outliers.indices
        rounded = round_activations(x, kept.input_activations, {}, exempt)
    expected = rounded @ q.decode().T
    return float((product(x).float() - expected).norm() / expected.norm())


def bf16(w: Tensor) -> Product:
    """Return the product of the baseline."""
    return lambda x: torch.mm(x, w.T)


def torch_int8(q: Quantized, kept: Scheme) -> Product:
    """Return the product of `QLinear`, with a copy of the weight."""
    acts, codes, scale = kept.input_activations, q.codes.clone(), q.params["scale"].clone()
    assert acts is not None
    return lambda x: integer_linear(x, codes, scale, acts, {}, outliers=q.outliers, bias=None)


@contextmanager
def started_vllm() -> Iterator[None]:
    """Set up what vLLM's layers need: a config, and groups of one process."""
    from types import SimpleNamespace

    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment

    from laconic.serving.vllm_plugin import register

    register()
    config: Any = VllmConfig()
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, "tcp://127.0.0.1:29517", 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
        config.model_config = SimpleNamespace(dtype=torch.bfloat16)
        yield


def vllm_layer(q: Quantized, kept: Scheme) -> Product:
    """Return the product of a layer as the plugin builds it."""
    from vllm.model_executor.layers.linear import ColumnParallelLinear

    from laconic.serving.vllm_plugin import VllmLaconicConfig

    config = VllmLaconicConfig(to_config({"model.up": kept}, ["model.up"]) | {"quant_method": "laconic"})
    torch.set_default_dtype(torch.bfloat16)
    layer: Any = ColumnParallelLinear(COLUMNS, q.shape[0], bias=False, quant_config=config, prefix="model.up")
    for name, tensor in q.to_tensors().items():
        handle = getattr(layer, name)
        handle.weight_loader(handle, tensor)
    layer.quant_method.process_weights_after_loading(layer)
    torch.set_default_dtype(torch.float32)
    if layer.quant_method.engine is None:
        print(f"{kept.title}: vLLM has no kernel here, so that codes are decoded", file=sys.stderr)
    return lambda x: layer.quant_method.apply(layer, x)


def vllm_layer_torch(q: Quantized, kept: Scheme) -> Product:
    """Return the product of a layer whose outlier columns are multiplied in plain torch, for any number of tokens."""
    from laconic.serving.side_tensors import SideTensors, StoredSides, add_side_products_torch

    codes = vllm_layer(replace(q, outliers=None), kept.plain)
    sides = SideTensors.combine([StoredSides(q.shape, q.outliers)], q.shape[0], torch.bfloat16)
    assert sides is not None
    return lambda x: add_side_products_torch(codes(sides.coded_input(x)), x, None, sides.indices, sides.weight)


def measure(outputs: int, tokens: int, calls: Mapping[str, list[Product]], seconds: float) -> dict[str, Any]:
    """Time the products of one size, and profile them."""
    x = torch.randn(tokens, COLUMNS).bfloat16()
    bound = {name: [lambda p=p: p(x) for p in entry] for name, entry in calls.items()}  # type: ignore[misc]
    times = time_interleaved(bound, torch.device("cuda"), rounds=200, seconds=seconds)
    row: dict[str, Any] = {"inputs": COLUMNS, "outputs": outputs, "tokens": tokens}
    row["microseconds"] = {name: round(1e6 * t.median, 2) for name, t in times.items()}
    row["times_bf16"] = {name: ratio(times["bf16"], t) for name, t in times.items()}
    row["no_graph"] = [name for name, t in times.items() if not t.graph]
    if tokens in PROFILED:
        row["kernels"] = {name: kernels(entry[0], x) for name, entry in calls.items()}
    return row


def ratio(baseline: Times, t: Times) -> float:
    """Return how many times as fast as the baseline."""
    return round(baseline.median / t.median, 2)


def kernels(product: Product, x: Tensor) -> dict[str, float]:
    """Return the microseconds of the longest kernels of a call, by name."""
    product(x)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        product(x)
        torch.cuda.synchronize()
    events = sorted(profile.key_averages(), key=lambda e: -e.device_time_total)
    return {e.key[:90]: round(e.device_time_total, 2) for e in events[:6] if e.device_time_total}


if __name__ == "__main__":
    sys.exit(main())
