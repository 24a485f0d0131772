"""Batches of a step of vLLM: its requests, grouped by their number of new tokens."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import AttentionCGSupport, AttentionMetadataBuilder

from laconic.checkpoint.files import KV_CONFIG
from laconic.serving.page import SequenceBatch

# Tokens of history, padding included, of the requests that plain torch attends to together.
_MAX_TOGETHER = 1 << 14


class BatchBuilder(AttentionMetadataBuilder):
    """Builder of batches, which are all that attention layers read of a step.

    A step of single tokens, on a GPU whose kernels write and read all layers, is one batch of vLLM's own tensors, which
    are the same in every step and padded with requests of no tokens. Its kernels have static shapes and never wait for
    the host, so CUDA graphs replay such steps (`UNIFORM_SINGLE_TOKEN_DECODE`). Not more: with several new tokens of a
    request their exact tokens, and the units that they complete, have shapes that differ from step to step.
    """

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        layers = vllm_config.compilation_config.static_forward_context
        self.kernels_alone = all(layers[name].impl.kernels_alone for name in layer_names)
        self.longest = vllm_config.model_config.max_model_len
        scheduler = vllm_config.scheduler_config
        most = max(scheduler.max_num_seqs, scheduler.max_num_batched_tokens)
        self.token_numbers = torch.arange(most, device=device)[:, None]

    @classmethod
    def get_cudagraph_support(cls, vllm_config: VllmConfig, kv_cache_spec: Any) -> AttentionCGSupport:
        layers = vllm_config.compilation_config.static_forward_context.values()
        implementations = [layer.impl for layer in layers if hasattr(layer, "impl")]
        alone = all(getattr(impl, "kernels_alone", True) for impl in implementations)
        return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE if alone else AttentionCGSupport.NEVER

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> list[SequenceBatch]:
        step = common_attn_metadata
        if step.causal is not True:
            raise ValueError(
                "a packed cache is for causal attention, and this model's is not causal; serve an artifact without "
                f"{KV_CONFIG}"
            )
        lengths, device, requests = step.seq_lens, step.seq_lens.device, step.num_reqs
        if self.kernels_alone and step.max_query_len == 1 and step.num_actual_tokens >= requests:
            return [
                SequenceBatch(
                    step.block_table_tensor[:requests],
                    lengths[:requests],
                    self.longest,
                    self.token_numbers[:requests],
                    first_tokens=True,
                )
            ]
        starts = step.query_start_loc_cpu.tolist()
        upper_bounds = step.seq_lens_cpu_upper_bound
        known_lengths = (lengths if upper_bounds is None else upper_bounds).tolist()
        by_count: dict[int, list[int]] = defaultdict(list)
        for i in range(requests):
            if new := starts[i + 1] - starts[i]:
                by_count[new].append(i)
        batches = []
        for new, same_count in by_count.items():
            single = self.kernels_alone and new == 1
            for group in [same_count] if single else _group_requests(same_count, known_lengths):
                rows = torch.tensor(group, device=device)
                tokens = torch.tensor([starts[i] for i in group], device=device)[:, None]
                tokens = tokens + torch.arange(new, device=device)
                of_group = [known_lengths[i] for i in group]
                table = step.block_table_tensor[rows]
                # Upper bounds are exact, unless tokens of a draft are not accepted.
                exact = of_group if self.vllm_config.speculative_config is None else None
                batches.append(SequenceBatch(table, lengths[rows], max(of_group), tokens, known_lengths=exact))
        return batches


def _group_requests(requests: list[int], lengths: list[int]) -> list[list[int]]:
    """Group requests, the longest first, so that a group padded to its longest stays within `_MAX_TOGETHER`."""
    groups: list[list[int]] = []
    for i in sorted(requests, key=lambda i: -lengths[i]):
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= _MAX_TOGETHER:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups
