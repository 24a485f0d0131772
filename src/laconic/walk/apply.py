"""Apply the plan's stages to one decoder block, or to the head, one after another.

A linear stage gets the taps of the block one after another, each with statistics of its input; a block stage gets the
block. The result replaces the linear at once, so that later linears are observed behind it, and is reported.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from laconic.calibrate.memory import give_back
from laconic.calibrate.observe import no_tokens, observe
from laconic.calibrate.original import Original
from laconic.calibrate.passes import Passes
from laconic.checkpoint.source import Source
from laconic.formats import Quantized
from laconic.runtime.linear import QLinear
from laconic.solvers.masks import StackedLinear
from laconic.solvers.moments import Moments, output_error
from laconic.stages.block import Block, BlockStage, Stack, stacked, stacks
from laconic.stages.linear import LinearStage, LinearTask, Outcome
from laconic.structure.anatomy import Tap, compute_head_input, linear_at, observation_rounds
from laconic.structure.links import links_without
from laconic.walk.flow import Flow, passes_on
from laconic.walk.install import install
from laconic.walk.outside import materialise_outside
from laconic.walk.plan import BlockWork, Plan
from laconic.walk.settings import Settings
from laconic.walk.side_tensors import attach, compress_stack
from laconic.walk.span import span
from laconic.walk.zeros import Zeros, sparsity, watch_zeros

Report = Callable[[Mapping[str, Any]], None]
Event = dict[str, Any]


@dataclass(frozen=True)
class Position:
    """A decoder block of the walk.

    Attributes:
        module: the block, loaded.
        index: its number.
        name: in the model.
        flow: the calibration set before it; None where nothing is calibrated.
        original: the block of the original model, where a stage compares with it.
    """

    module: nn.Module
    index: int
    name: str
    flow: Flow | None
    original: Original | None

    @property
    def column_scales(self) -> dict[str, Tensor]:
        """What the columns of linears were multiplied by so far, by name; stages add to it."""
        return self.original.column_scales if self.original else {}


@dataclass(frozen=True)
class Applier:
    """Applies the stages of a plan.

    Attributes:
        source: the checkpoint.
        model: the skeleton, of which the treated block is loaded.
        plan: which stage treats which linear, and how each is stored.
        settings: where to compute, and in how much memory.
        report: called with an event a linear.
    """

    source: Source
    model: PreTrainedModel
    plan: Plan
    settings: Settings
    report: Report

    def block(self, at: Position) -> tuple[list[Event], bool]:
        """Apply all stages to a block.

        Returns:
            Events for the log, and whether the stream holds the block's output already.
        """
        work = self.plan.work(at.index)
        observing = [k for k, item in enumerate(work) if at.flow and item.stage.needs.observation]
        events: list[Event] = []
        advanced = False
        zeros: dict[str, Zeros] = {}
        for k, item in enumerate(work):
            # The original model's stream is advanced by the last stage to observe it, before anything is quantized.
            at_once = self.plan.original_inputs and observing[-1:] == [k]
            through = at_once and passes_on(self.plan, at.index)
            with span(item.stage.method):
                if isinstance(item.stage, BlockStage):
                    compared_later = any(
                        w.stage.needs.cross_moments and isinstance(w.stage, LinearStage) for w in work[k + 1 :]
                    )
                    events += self._apply_block_stage(at, item, item.stage, compared_later, through)
                else:
                    assert isinstance(item.stage, LinearStage)
                    last = k == len(work) - 1
                    more, finished = self._apply_linear_stage(at, item, item.stage, at_once, through, last)
                    events += more
                    advanced |= finished
            advanced |= through
            zeros = watch_zeros(at.module, at.name, zeros, item.stage, item.schemes)
        return events, advanced

    def head(self, flow: Flow | None) -> Iterator[Event]:
        """Apply all stages that target the head, and yield events for the log."""
        head = self.plan.anatomy.head
        zeros: dict[str, Zeros] = {}
        for item in self.plan.head_work():
            stage = item.stage
            assert isinstance(stage, LinearStage)
            moments = None
            if flow and stage.needs.observation:
                width = linear_at(self.model, head).in_features
                moments = Moments(width, self.settings.device, gram=stage.needs.second_moments)
                materialise_outside(self.model, self.plan.anatomy, self.source, self.settings.device, embeddings=False)
                for hidden in flow.stream.batches():
                    moments.add(compute_head_input(self.model, self.plan.anatomy, hidden.to(self.settings.device)))
                moments.finish()
            yield from self._compress(self.model, "", [head], item, stage, moments)
            zeros = watch_zeros(self.model, "", zeros, stage, [head])

    def _apply_linear_stage(
        self, at: Position, item: BlockWork, stage: LinearStage, at_once: bool, through: bool, last: bool
    ) -> tuple[list[Event], bool]:
        taps = [t for t in self.plan.anatomy.taps[at.index] if item.schemes.keys() & set(t.linears)]
        sequential = stage.needs.sequential and not at_once
        # A pass that waits behind one expert has run the others already: where there are experts, passes begin anew.
        holds = sequential and not any(t.experts for t in taps)
        events: list[Event] = []
        with ExitStack() as open_passes:
            passes = original_passes = None
            if at.flow and stage.needs.observation:
                call, held, device = at.flow.calls[at.index], at.flow.held and holds, self.settings.device
                passes = open_passes.enter_context(Passes(at.module, taps, call, at.flow.stream, device, held))
                if stage.needs.cross_moments and at.original:
                    original = at.original
                    original_passes = open_passes.enter_context(
                        Passes(original.module, taps, call, original.stream, device, held)
                    )
            for together in observation_rounds(taps) if sequential else [taps]:
                moments: dict[Tap, Moments] = {}
                if passes:
                    module = at.original.module if at.original else None
                    with span("observe"), self.settings.showing(at.module, module):
                        moments = observe(
                            passes,
                            together,
                            gram=stage.needs.second_moments,
                            original=original_passes,
                            column_scales=at.column_scales,
                            through=through,
                        )
                    give_back()
                for tap in together:
                    events += self._check_tokens(at.name, tap, moments.get(tap))
                    targets = [n for n in tap.linears if n in item.schemes]
                    with span(f"compress {', '.join(n.rpartition('.')[2] for n in targets)}"):
                        events += self._compress(at.module, at.name, targets, item, stage, moments.get(tap))
            finished = passes is not None and passes.held and last and passes_on(self.plan, at.index)
            if passes and finished:
                with span("pass on"):
                    passes.finish()
        return events, finished

    def _apply_block_stage(
        self, at: Position, item: BlockWork, stage: BlockStage, compared_later: bool, through: bool
    ) -> list[Event]:
        assert at.flow is not None
        begun = time.monotonic()
        block = self._block_for(at, item, stage, compared_later, through)
        outcomes = stage.compress(block)
        moments = self._ranges(at, item, block) if stage.needs.ranges else {}
        seconds = (time.monotonic() - begun) / max(1, sum(len(names) for names in outcomes))
        calibrate_all_experts = block.stream.hidden.shape[0] * block.stream.hidden.shape[1]
        tokens = {n: count for tap, count in block.tokens.items() for n in tap.linears}
        events: list[Event] = []
        for tap, count in block.tokens.items():
            if tap.experts and stage.quantizes:
                first = tap.linears[0]
                events += self._warn_of_few_tokens(f"{at.name}.{first}", count, linear_at(at.module, first).in_features)
        for names, outcome in outcomes.items():
            notes = {"tokens": tokens.get(names[0], calibrate_all_experts), "seconds": round(seconds, 4)}
            stack = Stack(names, item.schemes[names[0]])
            weight, rows = stacked(at.module, names), _rows(at.module, names)
            observed = moments.get(names[0])
            parts = attach(stage, stack.scheme, weight, outcome, rows, observed, self.source.dtype)
            events += self._install(at.module, at.name, item, dict(zip(names, parts, strict=True)), observed, notes)
        return events

    def _block_for(
        self, at: Position, item: BlockWork, stage: BlockStage, compared_later: bool, through: bool
    ) -> Block:
        """Return what a block stage is given. compared_later: whether a later stage needs the original's inputs."""
        assert at.flow is not None
        target = at.original.output(read_again=compared_later) if at.original and stage.needs.cross_moments else None
        quantized = {n for n, m in at.module.named_modules() if isinstance(m, QLinear)}
        return Block(
            at.module,
            at.name,
            self.plan.anatomy.taps[at.index],
            item.schemes,
            links_without(self.plan.links[at.index], quantized) if stage.needs.links else {},
            at.flow.calls[at.index],
            at.flow.stream,
            target,
            self.settings.device,
            self.source.dtype,
            stage.stacks_linears,
            through,
            at.column_scales,
            self.settings.all_experts,
        )

    def _ranges(self, at: Position, item: BlockWork, block: Block) -> dict[str, Moments]:
        """Observe the ranges of the inputs of the targeted linears, by name."""
        with (
            Passes(block.module, block.taps, block.call, block.stream, block.device, held=False) as passes,
            self.settings.showing(block.module),
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
        """Compress linears that read one tensor.

        Their rows go together: each result is what it would be alone, but for a scale of a whole tensor, which engines
        that fuse them want to be one.
        """
        schemes = {n: item.schemes[n] for n in linears}
        for stack in stacks(module, schemes, together=stage.stacks_linears):
            begun = time.monotonic()
            weight, rows = stacked(module, stack.linears), _rows(module, stack.linears)
            parts = [_part(item.parts.get(n), r, weight) for n, r in zip(stack.linears, rows, strict=True)]
            task = LinearTask(weight, stack.scheme, moments, self.source.dtype, parts)
            outcomes = dict(zip(stack.linears, compress_stack(stage, task), strict=True))
            seconds = (time.monotonic() - begun) / len(stack.linears)
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
        """Put the outcomes of a stage into their linears, by name within the module, and report each."""
        for name, outcome in outcomes.items():
            before = linear_at(module, name).weight.detach().float()
            after = outcome.weight.decode() if isinstance(outcome.weight, Quantized) else outcome.weight.float()
            scheme = item.schemes[name]
            install(module, name, outcome.weight, scheme, moments, self.source.dtype, self.settings.device)
            event = {
                "event": "linear",
                "linear": f"{prefix}.{name}" if prefix else name,
                "method": item.stage.method,
                "scheme": scheme.name if scheme else None,
                **_figures(before, after, moments),
                **({"sparsity": sparsity(after)} if item.stage.prunes else {}),
                **outcome.notes,
                **notes,
            }
            self.report(event)
            yield event

    def _check_tokens(self, block: str, tap: Tap, moments: Moments | None) -> Iterator[Event]:
        """Warn of experts that few tokens were routed to.

        Raises:
            ValueError: for an expert without any.
        """
        name = f"{block}.{tap.linears[0]}"
        if moments is None or tap.experts is None:
            return
        if moments.tokens == 0:
            raise no_tokens(name)
        if moments.gram:
            yield from self._warn_of_few_tokens(name, moments.tokens, moments.in_features)

    def _warn_of_few_tokens(self, name: str, tokens: int, inputs: int) -> Iterator[Event]:
        if tokens < inputs:
            message = f"{name}: {tokens} calibration tokens for {inputs} inputs"
            event = {"event": "few_tokens", "linear": name, "tokens": tokens, "message": message}
            self.report(event)
            yield event


def _rows(module: nn.Module, linears: Sequence[str]) -> list[slice]:
    """Return the rows of each of some stacked linears."""
    rows, start = [], 0
    for name in linears:
        stop = start + linear_at(module, name).out_features
        rows.append(slice(start, stop))
        start = stop
    return rows


def _part(share: StackedLinear | None, rows: slice, weight: Tensor) -> StackedLinear:
    """Return the part of a stack that one linear is. share: what a pruning stage removes of it."""
    if share is None:
        return StackedLinear(rows, 0.0)
    protected = share.protected if share.protected is None else share.protected.to(weight.device)
    return replace(share, rows=rows, protected=protected)


def _figures(before: Tensor, after: Tensor, moments: Moments | None) -> dict[str, float]:
    error = float((before - after).square().sum() / before.square().sum().clamp(min=1e-30))
    figures = {"weight_error": error}
    if moments is not None and moments.H is not None:
        figures["output_error"] = output_error(before, after, moments.H)
    return figures
