"""Runs in vLLM's own environment: layers of native artifacts as the ranks of tensor parallelism hold them.

usage: python native_layers.py CASES.pt OUT.pt

A case is {"scheme": a native quantization_config, "kind": of the layer, "parts": tensors of each stored linear by name,
"sizes": outputs of each, "columns": inputs, "x": input, "ranks": number of ranks, "dtype"}. For each case the result
is {"y": product of all ranks together, "bytes": of each rank's layer after loading, "engine": whether vLLM's own method
has the codes}, or {"error": message}.
"""

import os
import sys
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch

HEAD = 32
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def main() -> None:
    from vllm.config import DeviceConfig, LoadConfig, VllmConfig, set_current_vllm_config
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment

    from laconic.serving.vllm_plugin import register

    register()
    config = VllmConfig(device_config=DeviceConfig(DEVICE), load_config=LoadConfig())
    config.model_config = mock.Mock(dtype=torch.float32)
    with set_current_vllm_config(config):
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
        init_distributed_environment(1, 0, "env://", 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
        results = []
        for case in torch.load(sys.argv[1]):
            # As vLLM does while it loads; its kernels write outputs of the default dtype.
            config.model_config.dtype = case["dtype"]
            torch.set_default_dtype(case["dtype"])
            try:
                results.append(compute(case))
            except ValueError as e:
                results.append({"error": str(e)})
    torch.save(results, sys.argv[2])


def compute(case: dict[str, Any]) -> dict[str, Any]:
    layers = [build(case, rank) for rank in range(case["ranks"])]
    shares = [share(case, rank) for rank in range(case["ranks"])]
    outputs = [layer.quant_method.apply(layer, x) for layer, x in zip(layers, shares, strict=True)]
    if case["kind"] == "merged":
        check_graph(layers[0], shares[0], outputs[0])
    return {
        "y": (sum(outputs) if case["kind"] == "row" else join(case, outputs)).cpu(),
        "bytes": [resident(layer) for layer in layers],
        "engine": layers[0].quant_method.engine is not None,
    }


def check_graph(layer: Any, x: torch.Tensor, expected: torch.Tensor) -> None:
    """vLLM compiles models as one graph for any number of tokens."""
    torch._dynamo.reset()
    apply = torch.compile(layer.quant_method.apply, fullgraph=True, dynamic=True, backend="eager")
    assert torch.equal(apply(layer, x), expected)


def build(case: dict[str, Any], rank: int) -> Any:
    from vllm.model_executor.layers import linear
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    from laconic.serving.vllm_plugin import VllmLaconicConfig

    config, columns, sizes = VllmLaconicConfig(case["scheme"]), case["columns"], case["sizes"]
    names = {"column": ["up"], "row": ["up"], "head": ["up"], "merged": ["gate", "up"], "qkv": ["q", "k", "v"]}[
        case["kind"]
    ]
    config.packed_modules_mapping = {"all": names}
    options: dict[str, Any] = {"params_dtype": case["dtype"], "quant_config": config, "prefix": "model.all"}
    with torch.device(DEVICE), ExitStack() as patches:
        for module in ("layers.linear", "parameter", "layers.vocab_parallel_embedding"):
            function = f"vllm.model_executor.{module}.get_tensor_model_parallel"
            patches.enter_context(mock.patch(f"{function}_rank", return_value=rank))
            patches.enter_context(mock.patch(f"{function}_world_size", return_value=case["ranks"]))
        match case["kind"]:
            case "column":
                layer = linear.ColumnParallelLinear(columns, *sizes, bias=False, **options)
            case "row":
                layer = linear.RowParallelLinear(columns, *sizes, bias=False, **options)
            case "merged":
                layer = linear.MergedColumnParallelLinear(columns, sizes, bias=False, **options)
            case "qkv":
                heads = [size // HEAD for size in sizes]
                layer = linear.QKVParallelLinear(columns, HEAD, heads[0], heads[1], bias=False, **options)
            case _:
                layer = ParallelLMHead(*sizes, columns, **options)
        for i, part in enumerate(case["parts"]):
            shard = () if len(case["parts"]) == 1 else ("qkv"[i] if case["kind"] == "qkv" else i,)
            for name, tensor in part.items():
                handle = getattr(layer, name)
                handle.weight_loader(handle, tensor, *shard)
        layer.quant_method.process_weights_after_loading(layer)
    return layer


def share(case: dict[str, Any], rank: int) -> torch.Tensor:
    x: torch.Tensor = case["x"].to(DEVICE)
    return x.chunk(case["ranks"], -1)[rank].contiguous() if case["kind"] == "row" else x


def join(case: dict[str, Any], outputs: list[torch.Tensor]) -> torch.Tensor:
    """What the ranks' outputs are in the order of the stored linears; copies of key and value heads count once."""
    ranks, sizes = case["ranks"], case["sizes"]
    if case["kind"] == "head":
        return torch.cat(outputs, -1)[..., : sizes[0]]
    copies = [max(1, ranks * HEAD // n) if case["kind"] == "qkv" and i else 1 for i, n in enumerate(sizes)]
    split = [y.split([n * c // ranks for n, c in zip(sizes, copies, strict=True)], -1) for y in outputs]
    return torch.cat([torch.cat([y[i] for y in split[:: copies[i]]], -1) for i in range(len(sizes))], -1)


def resident(layer: Any) -> int:
    tensors = [*layer.parameters(), *layer.buffers()]
    return sum({t.data_ptr(): t.nbytes for t in tensors}.values())


if __name__ == "__main__":
    main()
