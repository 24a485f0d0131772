"""Runs in vLLM's own environment: load an artifact's experts, and keep what the fused layers hold before any kernel
lays it out anew. Experts' kernels need hardware that may not be here; reading the file does not.

usage: python load_experts.py ARTIFACT OUT.pt
"""

import sys
from typing import Any

import torch


def main() -> None:
    folder, out = sys.argv[1:]
    torch.cpu._is_amx_tile_supported = lambda: True
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe_w8a8_int8 as w8a8,
    )
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe_wna16 as wna16,
    )

    from vllm import LLM

    layers: list[dict[str, torch.Tensor]] = []

    def keep(_: Any, layer: torch.nn.Module) -> None:
        layers.append({name: p.data.clone() for name, p in layer.named_parameters()})
        torch.save(layers, out)

    # What is no expert is laid out for the tiles too, by an operator that processors without AVX-512 lack.
    torch.ops._C.convert_weight_packed = lambda weight: weight.data.as_subclass(torch.Tensor)
    wna16.select_wna16_moe_backend = lambda **_: (list(wna16.WNA16MoEBackend)[-1], None)
    for method in (wna16.CompressedTensorsWNA16MoEMethod, w8a8.CompressedTensorsW8A8Int8MoEMethod):
        method.process_weights_after_loading = keep
    LLM(model=folder, tokenizer=folder, dtype="bfloat16", enforce_eager=True, max_model_len=128, max_num_seqs=2)


if __name__ == "__main__":
    main()
