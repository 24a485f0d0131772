"""The walk: for each decoder block, load it, observe it, compress it, write its shard, run activations through it.

It is one pass in one direction: a block is loaded once and freed once it is written, so that memory holds one or two
blocks and the calibration activations, whatever the size of the model. A finished block is its shard on disk; a
restarted walk reads finished shards and runs them forward, which gives the same activations, bit for bit.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from laconic.artifact.workspace import Workspace
from laconic.calibrate.attention import capture_attention
from laconic.calibrate.observe import advance_stream
from laconic.checkpoint.extra import load_extra
from laconic.checkpoint.files import open_shard
from laconic.checkpoint.layout import arrange, to_file_layout
from laconic.checkpoint.materialise import materialise
from laconic.checkpoint.source import Source
from laconic.kv.positions import TokenPositions
from laconic.kv.rotary import rotary_of
from laconic.runtime.linear import QLinear
from laconic.solvers.moments import NonFiniteError
from laconic.stages.survey import Figures
from laconic.walk.apply import Applier, CurrentBlock, Report
from laconic.walk.embeddings import compress_embeddings
from laconic.walk.flow import Flow, embed, output_is_read
from laconic.walk.half import use_half_linear
from laconic.walk.head_importance import head_importance
from laconic.walk.install import Target, read_block, stored_tensors
from laconic.walk.memory import trim_heap
from laconic.walk.original import Original
from laconic.walk.plan import Plan
from laconic.walk.settings import Settings
from laconic.walk.spans import record_span
from laconic.walk.survey import protect_heads, set_sparsities, survey_block, with_survey


@torch.no_grad()
def walk(
    source: Source,
    model: PreTrainedModel,
    plan: Plan,
    windows: Tensor | None,
    *,
    workspace: Workspace,
    settings: Settings,
    report: Report,
    extra: Sequence[Sequence[str]] = (),
    domains: Mapping[int, Tensor] | None = None,
) -> None:
    """Compress a model block by block into a workspace.

    Args:
        source: the checkpoint.
        model: a skeleton of it.
        plan: which stage treats which linear.
        windows: calibration token ids (samples, tokens); None if no stage needs them.
        workspace: receives the shards.
        settings: where to compute, and in how much memory.
        report: called with events of progress.
        extra: names of tensors that are written unchanged, by shard (`checkpoint.extra`).
        domains: token ids (samples, tokens) of the texts on which stages choose the heads that they protect, by the
            number of the stage in the plan.

    Raises:
        ValueError: if a stage cannot treat a block, activations hold NaN or infinity, or the disk has no space.
    """
    walker = _Walker(source, model, plan, workspace, settings, report, frozenset(n for names in extra for n in names))
    names = [plan.anatomy.block_name(i) for i in range(len(plan.anatomy.taps))]
    if plan.surveys or domains:
        walker = replace(walker, plan=with_survey(plan, walker.survey(names, windows, domains or {})))
    flow = walker.embed(windows) if windows is not None and not workspace.is_finished(len(names)) else None
    for i, name in enumerate(names):
        report({"event": "block", "block": i, "blocks": len(names)})
        with record_span(f"block {i}"):
            walker.block(i, name, flow)
    if not workspace.is_finished(len(names)):
        with record_span("outside of blocks"):
            walker.outside(len(names), flow)
    for i, extra_tensors in enumerate(extra, len(names) + 1):
        if not workspace.is_finished(i):
            workspace.write_shard(i, load_extra(source.checkpoint, extra_tensors), [])


@dataclass(frozen=True)
class _Walker:
    source: Source
    model: PreTrainedModel
    plan: Plan
    workspace: Workspace
    settings: Settings
    report: Report
    extra: frozenset[str]

    def embed(self, windows: Tensor, *, original: bool = False) -> Flow:
        return embed(
            windows,
            self.source,
            self.model,
            plan=self.plan,
            settings=self.settings,
            folder=self.workspace.folder,
            original=original,
        )

    def survey(self, names: Sequence[str], windows: Tensor | None, domains: Mapping[int, Tensor]) -> list[Figures]:
        """Return the figures of each stage, from the workspace or by a pass over the original model."""
        written = self.workspace.read_survey()
        if written is not None:
            return written
        plan, device = self.plan, self.settings.device
        by_stage: list[Figures] = [{} for _ in plan.stages]
        if plan.surveys:
            assert windows is not None
            for i, block, flow in self._original_blocks(names, windows):
                with self.settings.expert_routing(block):
                    of_block = survey_block(block, i, plan, call=flow.calls[i], stream=flow.stream, device=device)
                for of_all_blocks, figures in zip(by_stage, of_block, strict=True):
                    of_all_blocks |= figures
            by_stage = set_sparsities(plan, by_stage)
        for number, text in domains.items():
            importance = []
            for i, block, flow in self._original_blocks(names, text):
                taps, heads, call = plan.anatomy.taps[i], plan.heads[i], flow.calls[i]
                importance.append(head_importance(block, taps, heads, call=call, stream=flow.stream, device=device))
            for name, figures in protect_heads(plan, number, importance).items():
                by_stage[number][name] = by_stage[number].get(name, {}) | figures
        self.workspace.write_survey(by_stage)
        return by_stage

    def _original_blocks(self, names: Sequence[str], windows: Tensor) -> Iterator[tuple[int, nn.Module, Flow]]:
        """Load each block of the original model; the caller advances the stream through it."""
        flow = self.embed(windows, original=True)
        for i, name in enumerate(names):
            self.report({"event": "survey", "block": i, "blocks": len(names)})
            block = self.model.get_submodule(name)
            self._materialise(block, f"{name}.")
            yield i, block, flow
            _free(block)

    def block(self, i: int, name: str, flow: Flow | None) -> None:
        """Compress block i, or read it if it is finished, and run the activations through it."""
        finished = self.workspace.is_finished(i)
        if finished and flow is None:
            return
        block = self.model.get_submodule(name)
        original = None
        if flow and flow.original:
            device = self.settings.device
            original = Original(copy.deepcopy(block), flow.calls[i], flow.original, device, flow.storage)
            self._materialise(original.module, f"{name}.")
        advanced = False
        if finished and not self.plan.original_inputs:
            self._read_block(block, i, name)
        else:
            self._materialise(block, f"{name}.")
        if not finished:
            try:
                events, advanced = self._applier.block(CurrentBlock(block, i, name, flow, original))
            except NonFiniteError as e:
                raise ValueError(f"{name}: {e}{self._overflow_fix}") from e
            if flow and self.source.dtype == torch.float16 and not output_is_read(self.plan, i):
                self._check_output(block, i, name, flow)
            tensors = stored_tensors(block, name)
            if flow and self.plan.calibrates_cache:
                tensors |= self._calibrate_cache(block, i, name, flow)
            with record_span("write"):
                self.workspace.write_shard(i, to_file_layout(self.source.checkpoint, tensors), events)
        if flow and output_is_read(self.plan, i):
            with record_span("pass on"):
                if not advanced:
                    advance_stream(block, flow.calls[i], flow.stream, self.settings.device)
                if original:
                    original.advance()
        _free(block)

    def outside(self, i: int, flow: Flow | None) -> None:
        """Write shard i, everything outside the blocks: copied, but for a targeted head or embeddings."""
        anatomy, checkpoint = self.plan.anatomy, self.source.checkpoint
        prefix = f"{anatomy.blocks}."
        names = [n for n in checkpoint.tensors if not n.startswith(prefix) and n not in self.extra]
        compressed = [
            n for n in (anatomy.head, anatomy.embeddings) if any(n in targets for targets in self.plan.targets)
        ]
        tensors = checkpoint.load([n for n in names if n.rpartition(".")[0] not in compressed])
        events: list[dict[str, Any]] = []
        if anatomy.embeddings in compressed:
            table, event = compress_embeddings(self.model, self.plan, self.source, self.settings.device)
            self.report(event)
            events.append(event)
            tensors.update(stored_tensors(table, anatomy.embeddings))
        if anatomy.head in compressed:
            head = self.model.get_submodule(anatomy.head)
            self._materialise(head, f"{anatomy.head}.")
            events += self._applier.head(flow)
            tensors.update(stored_tensors(self.model.get_submodule(anatomy.head), anatomy.head))
        self.workspace.write_shard(i, to_file_layout(checkpoint, tensors), events)

    def _check_output(self, block: nn.Module, i: int, name: str, flow: Flow) -> None:
        """Check that float16 holds the output of a block that nothing reads, by one batch."""
        samples, hidden = next(iter(flow.stream.numbered_batches()))
        if not torch.isfinite(flow.calls[i](block, hidden.to(self.settings.device), samples)).all():
            raise ValueError(f"{name}: its output holds NaN or infinity{self._overflow_fix}")

    @property
    def _overflow_fix(self) -> str:
        """Fix of numbers beyond those of float16; empty for other dtypes."""
        if self.source.dtype != torch.float16:
            return ""
        return ", or save the model in bfloat16 and compress that (float16 ends at 65504)"

    @property
    def _applier(self) -> Applier:
        return Applier(self.source, self.model, self.plan, self.settings, self.report)

    def _calibrate_cache(self, block: nn.Module, i: int, name: str, flow: Flow) -> dict[str, Tensor]:
        """Calibrate the cache of the compressed block i, and return the scales that its shard holds for engines."""
        assert self.plan.cache is not None
        stage, shape = self.plan.cache
        capture = capture_attention(
            block,
            self.model.config,
            flow.calls[i],
            flow.stream,
            device=self.settings.device,
            positions=TokenPositions(rotary_of(self.model)) if stage.pre_rope else None,
            layer=i,
        )
        calibration = stage.calibrate(capture, shape)
        self.workspace.write_calibration(i, calibration)
        attention = f"{name}.{self.plan.anatomy.taps[i][0].linears[0]}".rpartition(".")[0]
        scales = stage.engine_scales(calibration)
        return {f"{attention}.{leaf}": scale for leaf, scale in scales.items()}

    def _read_block(self, block: nn.Module, i: int, name: str) -> None:
        """Read the finished block i from its shard."""
        shard = arrange(open_shard(self.workspace.shard(i)), self.model)
        read_block(block, name, shard, self.plan.schemes, Target(self.source.dtype, self.settings.device))

    def _materialise(self, module: nn.Module, prefix: str) -> None:
        with record_span("read"):
            materialise(module, prefix, self.source.checkpoint, self.settings.device)
        use_half_linear(module)


def _free(block: nn.Module) -> None:
    """Free the block's weights, which its shard holds."""
    for module in block.modules():
        if isinstance(module, QLinear):
            module.dense = None
    block.to("meta")
    trim_heap()
