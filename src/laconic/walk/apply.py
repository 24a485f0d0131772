"""Apply the plan's stages to one decoder block, or to the head, one after another.

A linear stage gets the taps of the block one after another, each with statistics of its input; a block stage gets the
block. Each result replaces its linear at once, so that later linears are observed after it, and is reported.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from laconic.calibrate.observe import observe
from laconic.calibrate.passes import Passes
from laconic.checkpoint.source import Source
from laconic.formats import Quantized
from laconic.runtime.linear import QLinear
from laconic.solvers.masks import StackedLinear
from laconic.solvers.moments import Moments
from laconic.stages.block import Block, BlockStage, Stack, stacked, stacks
from laconic.stages.linear import LinearStage, LinearTask, Outcome
from laconic.structure.anatomy import Tap, compute_head_input, linear_at, observation_rounds
from laconic.structure.links import links_without
from laconic.walk.expert_tokens import check_expert_tokens, few_tokens
from laconic.walk.flow import Flow, may_advance
from laconic.walk.install import Target, install
from laconic.walk.memory import trim_heap
from laconic.walk.original import Original
from laconic.walk.outcomes import check_block_outcomes, check_outcome, error_figures
from laconic.walk.outside import materialise_outside
from laconic.walk.plan import BlockWork, Plan
from laconic.walk.settings import Settings
from laconic.walk.side_tensors import attach, compress_stack
from laconic.walk.spans import record_span
from laconic.walk.zeros import ZeroMask, check_zeros, sparsity

Report = Callable[[Mapping[str, Any]], None]
Event = dict[str, Any]

# Tokens on which the error of a compressed head is measured.
_HEAD_TOKENS = 2048


@dataclass(frozen=True)
class CurrentBlock:
    """The decoder block that the walk has reached.

    Attributes:
        module: the block, loaded.
        index: its number.
        name: in the model.
        flow: the calibration set before it; None where nothing is calibrated.
        original: the block of the original model, if a stage compares with it.
    """

    module: nn.Module
    index: int
    name: str
    flow: Flow | None
    original: Original | None

    @property
    def column_scales(self) -> dict[str, Tensor]:
        """Factors (in,) by which the columns of linears were multiplied so far, by name; stages add to it."""
        return self.original.column_scales if self.original else {}


@dataclass(frozen=True)
class _Order:
    """When a linear stage observes the taps of a block.

    Attributes:
        at_once: all taps in one pass, before any is compressed.
        advance: whether observing replaces the stream by the block's output.
        last: whether no other stage follows in the block.
    """

    at_once: bool
    advance: bool
    last: bool


@dataclass(frozen=True)
class Applier:
    """Application of a plan's stages.

    Attributes:
        source: the checkpoint.
        model: the skeleton, of which the current block is loaded.
        plan: which stage treats which linear, and how each is stored.
        settings: where to compute, and in how much memory.
        report: called with an event for each linear.
    """

    source: Source
    model: PreTrainedModel
    plan: Plan
    settings: Settings
    report: Report

    def block(self, current: CurrentBlock) -> tuple[list[Event], bool]:
        """Apply all stages to a block.

        Args:
            current: the block; changed in place.

        Returns:
            Events for the log, and whether the stream holds the block's output already.

        Raises:
            ValueError: if a stage cannot treat the block, activations hold NaN or infinity, or a zero was filled in.
        """
        work = self.plan.work(current.index)
        observing = [k for k, item in enumerate(work) if current.flow and item.needs.observation]
        events: list[Event] = []
        advanced = False
        masks: dict[str, ZeroMask] = {}
        for k, item in enumerate(work):
            # Where only the original model's activations flow, the last stage that observes the block advances the
            # stream, before anything is quantized.
            at_once = self.plan.original_inputs and observing[-1:] == [k]
            advance = at_once and may_advance(self.plan, current.index)
            with record_span(item.stage.method):
                if isinstance(item.stage, BlockStage):
                    compared_later = any(
                        w.stage.needs.cross_moments and isinstance(w.stage, LinearStage) for w in work[k + 1 :]
                    )
                    events += self._apply_block_stage(
                        current, item, item.stage, compared_later=compared_later, advance=advance
                    )
                else:
                    assert isinstance(item.stage, LinearStage)
                    order = _Order(at_once, advance, last=k == len(work) - 1)
                    linear_events, finished = self._apply_linear_stage(current, item, item.stage, order)
                    events += linear_events
                    advanced |= finished
            advanced |= advance
            masks = check_zeros(current.module, current.name, masks, item.stage, item.schemes)
        return events, advanced

    def head(self, flow: Flow | None) -> Iterator[Event]:
        """Apply all stages that target the head.

        Args:
            flow: the calibration set after the last block; None where nothing is calibrated.

        Yields:
            Events for the log.

        Raises:
            ValueError: as `block`.
        """
        head = self.plan.anatomy.head
        masks: dict[str, ZeroMask] = {}
        for item in self.plan.head_work():
            stage = item.stage
            assert isinstance(stage, LinearStage)
            moments = None
            if flow and item.needs.observation:
                width = linear_at(self.model, head).in_features
                moments = Moments(width, self.settings.device, gram=stage.needs.second_moments)
                materialise_outside(self.model, self.plan.anatomy, self.source, self.settings.device, embeddings=False)
                for hidden in flow.stream.batches():
                    moments.add(compute_head_input(self.model, self.plan.anatomy, hidden.to(self.settings.device)))
                moments.finish()
            # A linear of codes takes the place of the dense one, whose weight stays as it is.
            dense = linear_at(self.model, head).weight.detach() if moments and stage.quantizes else None
            for event in self._compress(self.model, "", [head], item, stage, moments):
                if flow and dense is not None:
                    event["kl"] = self._head_kl(flow, dense)
                yield event
            masks = check_zeros(self.model, "", masks, stage, [head])

    def _head_kl(self, flow: Flow, dense: Tensor) -> float:
        """Return the mean KL divergence, in nats a token, that the compressed head alone causes on calibration text."""
        anatomy, device = self.plan.anatomy, self.settings.device
        hidden = flow.stream.hidden
        count = max(1, min(len(hidden), _HEAD_TOKENS // hidden.shape[1]))
        head = self.model.get_submodule(anatomy.head)
        bias = getattr(head, "bias", None)
        total = 0.0
        for sample in hidden[torch.linspace(0, len(hidden) - 1, count).long()].split(1):
            x = compute_head_input(self.model, anatomy, sample.to(device))
            expected = nn.functional.linear(x, dense, bias).float().log_softmax(-1)
            total += float((expected.exp() * (expected - head(x).float().log_softmax(-1))).sum(-1).mean())
        return total / count

    def _apply_linear_stage(
        self, current: CurrentBlock, item: BlockWork, stage: LinearStage, order: _Order
    ) -> tuple[list[Event], bool]:
        """Apply a linear stage.

        Returns:
            Events for the log, and whether the halted passes have run to their end, so that the stream holds the
            block's output.
        """
        taps = [t for t in self.plan.anatomy.taps[current.index] if item.schemes.keys() & set(t.linears)]
        sequential = stage.needs.sequential and not order.at_once
        # A pass that halts before one expert has run the others already: where there are experts, passes start again.
        resume = sequential and not any(t.experts for t in taps)
        events: list[Event] = []
        with ExitStack() as open_passes:
            passes = original_passes = None
            if current.flow and item.needs.observation:
                flow, device = current.flow, self.settings.device
                call, resume = flow.calls[current.index], flow.resume_passes and resume
                passes = open_passes.enter_context(Passes(current.module, taps, call, flow.stream, device, resume))
                if stage.needs.cross_moments and current.original:
                    module, stream = current.original.module, current.original.stream
                    original_passes = open_passes.enter_context(Passes(module, taps, call, stream, device, resume))
            for together in observation_rounds(taps) if sequential else [taps]:
                moments: dict[Tap, Moments] = {}
                if passes:
                    original = current.original.module if current.original else None
                    with record_span("observe"), self.settings.expert_routing(current.module, original):
                        moments = observe(
                            passes,
                            together,
                            gram=stage.needs.second_moments,
                            original=original_passes,
                            column_scales=current.column_scales,
                            advance=order.advance,
                        )
                    trim_heap()
                for tap in together:
                    events += self._warn(check_expert_tokens(current.name, tap, moments.get(tap)))
                    targets = [n for n in tap.linears if n in item.schemes]
                    with record_span(f"compress {', '.join(n.rpartition('.')[2] for n in targets)}"):
                        events += self._compress(current.module, current.name, targets, item, stage, moments.get(tap))
            finished = passes is not None and passes.resume and order.last and may_advance(self.plan, current.index)
            if passes and finished:
                with record_span("advance"):
                    passes.finish()
        return events, finished

    def _apply_block_stage(
        self, current: CurrentBlock, item: BlockWork, stage: BlockStage, *, compared_later: bool, advance: bool
    ) -> list[Event]:
        """Apply a block stage. The last arguments are those of `_block_for`."""
        start = time.monotonic()
        block = self._block_for(current, item, stage, compared_later=compared_later, advance=advance)
        outcomes = check_block_outcomes(stage, stage.compress(block), item.schemes)
        moments = self._ranges(item, block) if item.needs.ranges else {}
        seconds = (time.monotonic() - start) / max(1, sum(len(names) for names in outcomes))
        all_tokens = block.stream.hidden.shape[0] * block.stream.hidden.shape[1]
        tokens = {n: count for tap, count in block.tokens.items() for n in tap.linears}
        events: list[Event] = []
        for tap, count in block.tokens.items():
            if tap.experts and stage.quantizes:
                first = tap.linears[0]
                width = linear_at(current.module, first).in_features
                events += self._warn(few_tokens(f"{current.name}.{first}", count, width))
        for names, outcome in outcomes.items():
            notes = {"tokens": tokens.get(names[0], all_tokens), "seconds": round(seconds, 4)}
            stack = Stack(names, item.schemes[names[0]])
            weight, rows = stacked(current.module, names), _rows(current.module, names)
            ranges = moments.get(names[0])
            outcome = check_outcome(stage, outcome, stack.scheme, (weight.shape[0], weight.shape[1]))
            parts = attach(
                stage, outcome, scheme=stack.scheme, weight=weight, rows=rows, moments=ranges, dtype=self.source.dtype
            )
            by_name = dict(zip(names, parts, strict=True))
            events += self._install(current.module, current.name, item, by_name, ranges, notes)
        return events

    def _block_for(
        self, current: CurrentBlock, item: BlockWork, stage: BlockStage, *, compared_later: bool, advance: bool
    ) -> Block:
        """Return what a block stage is given.

        Args:
            current: the block.
            item: what the stage does in it.
            stage: the stage.
            compared_later: whether a later stage needs the inputs of the original model's linears.
            advance: whether observing replaces the stream by the block's output.
        """
        assert current.flow is not None
        target = None
        if current.original and stage.needs.cross_moments:
            target = current.original.output(keep_input=compared_later)
        quantized = {n for n, m in current.module.named_modules() if isinstance(m, QLinear)}
        return Block(
            module=current.module,
            name=current.name,
            taps=self.plan.anatomy.taps[current.index],
            schemes=item.schemes,
            links=links_without(self.plan.links[current.index], quantized) if stage.needs.links else {},
            call=current.flow.calls[current.index],
            stream=current.flow.stream,
            original_output=target,
            device=self.settings.device,
            dtype=self.source.dtype,
            stacks_linears=stage.stacks_linears,
            advance=advance,
            column_scales=current.column_scales,
            all_experts=self.settings.all_experts,
        )

    def _ranges(self, item: BlockWork, block: Block) -> dict[str, Moments]:
        """Observe the ranges of the inputs of the targeted linears, by name."""
        with (
            Passes(block.module, block.taps, block.call, block.stream, block.device, resume=False) as passes,
            self.settings.expert_routing(block.module),
        ):
            taps = [t for t in block.taps if item.schemes.keys() & set(t.linears)]
            ranges = observe(passes, taps, gram=False)
        return {n: m for tap, m in ranges.items() for n in tap.linears}

    def _compress(
        self,
        module: nn.Module,
        prefix: str,
        linears: Sequence[str],
        item: BlockWork,
        stage: LinearStage,
        moments: Moments | None,
    ) -> Iterator[Event]:
        """Compress linears that read one tensor, as the rows of one matrix.

        Each result is what it would be alone, except for a scale of a whole tensor, which engines that fuse the linears
        require to be the same.
        """
        schemes = {n: item.schemes[n] for n in linears}
        for stack in stacks(module, schemes, together=stage.stacks_linears):
            start = time.monotonic()
            weight, rows = stacked(module, stack.linears), _rows(module, stack.linears)
            parts = [_part(item.parts.get(n), r, weight) for n, r in zip(stack.linears, rows, strict=True)]
            task = LinearTask(weight, stack.scheme, moments, self.source.dtype, parts)
            outcomes = dict(zip(stack.linears, compress_stack(stage, task), strict=True))
            seconds = (time.monotonic() - start) / len(stack.linears)
            notes = {"tokens": moments.tokens if moments else 0, "seconds": round(seconds, 4)}
            yield from self._install(module, prefix, item, outcomes, moments, notes)

    def _install(
        self,
        module: nn.Module,
        prefix: str,
        item: BlockWork,
        outcomes: Mapping[str, Outcome],
        moments: Moments | None,
        notes: Mapping[str, float],
    ) -> Iterator[Event]:
        """Put the outcomes of a stage, by name of the linear within the module, into their linears, and report each."""
        for name, outcome in outcomes.items():
            before = linear_at(module, name).weight.detach().float()
            after = outcome.weight.decode() if isinstance(outcome.weight, Quantized) else outcome.weight.float()
            scheme, full_name = item.schemes[name], f"{prefix}.{name}" if prefix else name
            figures = error_figures(before, after, moments)
            if not math.isfinite(figures["weight_error"]):
                raise ValueError(
                    f"{item.stage.method} leaves NaN or infinity in {full_name}; check the model and the calibration "
                    "text, or ignore the linear"
                )
            install(module, name, outcome.weight, scheme, moments, Target(self.source.dtype, self.settings.device))
            event = {
                "event": "linear",
                "linear": full_name,
                "method": item.stage.method,
                "scheme": scheme.name if scheme else None,
                **figures,
                **({"sparsity": sparsity(after)} if item.stage.prunes else {}),
                **outcome.notes,
                **notes,
            }
            self.report(event)
            yield event

    def _warn(self, event: Event | None) -> Iterator[Event]:
        """Report an event, if there is one, and yield it."""
        if event:
            self.report(event)
            yield event


def _rows(module: nn.Module, linears: Sequence[str]) -> list[slice]:
    """Return the rows of each linear in a stack."""
    rows, start = [], 0
    for name in linears:
        stop = start + linear_at(module, name).out_features
        rows.append(slice(start, stop))
        start = stop
    return rows


def _part(part: StackedLinear | None, rows: slice, weight: Tensor) -> StackedLinear:
    """Return the part of a stack that is one linear. part: what a pruning stage removes of the linear."""
    if part is None:
        return StackedLinear(rows, 0.0)
    protected = None if part.protected is None else part.protected.to(weight.device)
    return replace(part, rows=rows, protected=protected)
