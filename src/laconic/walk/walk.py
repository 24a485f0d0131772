"""The walk: for each decoder block, load it, observe it, compress it, write its shard, push activations through it.

One pass, one direction: a block is loaded once and forgotten once it is written, so that memory holds a block or two
and the calibration activations, whatever the size of the model. A finished block is its shard on disk; a restarted
walk reads finished shards back and runs them forward, which gives the same activations, bit for bit.
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
from laconic.calibrate.memory import give_back
from laconic.calibrate.observe import advance
from laconic.calibrate.original import Original
from laconic.checkpoint.files import open_shard
from laconic.checkpoint.layout import arrange, to_file_layout
from laconic.checkpoint.source import Source, materialise
from laconic.kv.positions import TokenPositions
from laconic.kv.rotary import rotary_of
from laconic.runtime.linear import QLinear
from laconic.walk.apply import Applier, Position, Report
from laconic.walk.domain import head_shares
from laconic.walk.flow import Flow, embed, read_after
from laconic.walk.half import quicken
from laconic.walk.install import read_back, stored
from laconic.walk.plan import Plan
from laconic.walk.settings import Settings
from laconic.walk.span import span
from laconic.walk.survey import Figures, allot, by_survey, protect, survey_block


@torch.no_grad()
def walk(
    source: Source,
    model: PreTrainedModel,
    plan: Plan,
    windows: Tensor | None,
    workspace: Workspace,
    settings: Settings,
    report: Report,
    domains: Mapping[int, Tensor] | None = None,
) -> None:
    """Compress `model` (a skeleton) block by block into `workspace`.

    windows: calibration token ids (samples, tokens), None when no stage needs them. domains: those of the texts on
    which stages find the heads that they protect, by the stage's number.
    """
    walker = _Walker(source, model, plan, workspace, settings, report)
    names = [plan.anatomy.block_name(i) for i in range(len(plan.anatomy.taps))]
    if plan.surveys or domains:
        walker = replace(walker, plan=by_survey(plan, walker.survey(names, windows, domains or {})))
    flow = walker.embed(windows) if windows is not None and not workspace.is_finished(len(names)) else None
    for i, name in enumerate(names):
        report({"event": "block", "block": i, "blocks": len(names)})
        with span(f"block {i}"):
            walker.block(i, name, flow)
    if not workspace.is_finished(len(names)):
        with span("outside of blocks"):
            walker.rest(len(names), flow)


@dataclass(frozen=True)
class _Walker:
    source: Source
    model: PreTrainedModel
    plan: Plan
    workspace: Workspace
    settings: Settings
    report: Report

    def embed(self, windows: Tensor) -> Flow:
        return embed(windows, self.source, self.model, self.plan, self.settings, self.workspace.folder)

    def survey(self, names: Sequence[str], windows: Tensor | None, domains: Mapping[int, Tensor]) -> list[Figures]:
        """What stages want to know of the original model before any of it is changed."""
        known = self.workspace.read_survey()
        if known is not None:
            return known
        plan, device = self.plan, self.settings.device
        found: list[Figures] = [{} for _ in plan.stages]
        if plan.surveys:
            assert windows is not None
            for i, block, flow in self._originals(names, windows):
                with self.settings.showing(block):
                    told = survey_block(block, i, plan, flow.calls[i], flow.stream, device)
                for all_blocks, figures in zip(found, told, strict=True):
                    all_blocks |= figures
            found = allot(plan, found)
        for number, text in domains.items():
            shares = [
                head_shares(block, plan.anatomy.taps[i], plan.heads[i], flow.calls[i], flow.stream, device)
                for i, block, flow in self._originals(names, text)
            ]
            for name, figures in protect(plan, number, shares).items():
                found[number][name] = found[number].get(name, {}) | figures
        self.workspace.write_survey(found)
        return found

    def _originals(self, names: Sequence[str], windows: Tensor) -> Iterator[tuple[int, nn.Module, Flow]]:
        """The original model block by block, each before it is passed, which is left to the caller."""
        flow = self.embed(windows)
        for i, name in enumerate(names):
            self.report({"event": "survey", "block": i, "blocks": len(names)})
            block = self.model.get_submodule(name)
            self._materialise(block, f"{name}.")
            yield i, block, flow
            _forget(block)

    def block(self, i: int, name: str, flow: Flow | None) -> None:
        """Compress block i, or read it back, and push the activations through it."""
        done = self.workspace.is_finished(i)
        if done and flow is None:
            return
        block = self.model.get_submodule(name)
        original = None
        if flow and flow.original:
            original = Original(copy.deepcopy(block), flow.calls[i], flow.original, self.settings.device, flow.room)
            self._materialise(original.module, f"{name}.")
        passed_on = False
        if done and not self.plan.original_inputs:
            self._read_back(block, i, name)
        else:
            self._materialise(block, f"{name}.")
        if not done:
            events, passed_on = self._applier.block(Position(block, i, name, flow, original))
            tensors = stored(block, name)
            if flow and self.plan.calibrates_cache:
                tensors |= self._calibrate_cache(block, i, name, flow)
            with span("write"):
                self.workspace.write_shard(i, to_file_layout(self.source.checkpoint, tensors), events)
        if flow and read_after(self.plan, i):
            with span("pass on"):
                if not passed_on:
                    advance(block, flow.calls[i], flow.stream, self.settings.device)
                if original:
                    original.finish()
        _forget(block)

    def rest(self, i: int, flow: Flow | None) -> None:
        """Everything outside the blocks: copied as it is, but for a head that is to be compressed."""
        anatomy, checkpoint = self.plan.anatomy, self.source.checkpoint
        prefix = f"{anatomy.blocks}."
        head_touched = any(anatomy.head in names for names in self.plan.targets)
        names = [n for n in checkpoint.tensors if not n.startswith(prefix)]
        tensors = checkpoint.load([n for n in names if not (head_touched and n.startswith(f"{anatomy.head}."))])
        events: list[dict[str, Any]] = []
        if head_touched:
            head = self.model.get_submodule(anatomy.head)
            self._materialise(head, f"{anatomy.head}.")
            events = list(self._applier.head(flow))
            tensors.update(stored(self.model.get_submodule(anatomy.head), anatomy.head))
        self.workspace.write_shard(i, to_file_layout(checkpoint, tensors), events)

    @property
    def _applier(self) -> Applier:
        return Applier(self.source, self.model, self.plan, self.settings, self.report)

    def _calibrate_cache(self, block: nn.Module, i: int, name: str, flow: Flow) -> dict[str, Tensor]:
        """Keep what the cache's stage wants to know of block i, as it was compressed. Returns: what goes into the
        shard, for engines."""
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

    def _read_back(self, block: nn.Module, i: int, name: str) -> None:
        """The finished block i, as its shard holds it."""
        shard = arrange(open_shard(self.workspace.shard(i)), self.model)
        read_back(block, name, shard, self.plan.schemes, self.source.dtype, self.settings.device)

    def _materialise(self, module: nn.Module, prefix: str) -> None:
        with span("read"):
            materialise(module, prefix, self.source.checkpoint, self.settings.device)
        quicken(module)


def _forget(block: nn.Module) -> None:
    """Free the block's weights: its shard has them."""
    for module in block.modules():
        if isinstance(module, QLinear):
            module.dense = None
    block.to("meta")
    give_back()
