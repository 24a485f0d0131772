"""The stages of a plan at work: a block, or the head, taken through those that mean it, one after the other.

A linear stage is shown its taps one after another, what they read observed as they stand then; a block stage gets the
block. What they make is put in its place at once, and told.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from laconic.calibrate.memory import give_back
from laconic.calibrate.observe import no_tokens, observe
from laconic.calibrate.original import Original
from laconic.calibrate.passes import Passes
from laconic.calibrate.stream import Stream
from laconic.checkpoint.source import Source
from laconic.formats import Quantized
from laconic.runtime.linear import QLinear
from laconic.solvers.masks import StackedLinear
from laconic.solvers.moments import Moments, output_error
from laconic.stages.block import Block, stacked, stacks
from laconic.stages.stage import BlockStage, LinearStage, Outcome, Stage
from laconic.structure.anatomy import Tap, compute_head_input, linear_at, observation_rounds
from laconic.structure.links import links_without
from laconic.walk.beside import attach, compress_tap
from laconic.walk.flow import Flow, passes_on
from laconic.walk.install import install
from laconic.walk.outside import materialise_outside
from laconic.walk.plan import Plan
from laconic.walk.settings import Settings
from laconic.walk.span import span
from laconic.walk.zeros import Zeros, sparsity, watch_zeros

Report = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class Treatment:
    """model: the skeleton, what is treated of it read. report: is told of each linear."""

    source: Source
    model: PreTrainedModel
    plan: Plan
    settings: Settings
    report: Report

    def block(
        self, block: nn.Module, i: int, name: str, flow: Flow | None, original: Original | None
    ) -> tuple[list[dict[str, Any]], bool]:
        """Take block i through all stages. Returns: what happened, and whether the stream holds its output already."""
        touched = [frozenset(n.removeprefix(f"{name}.") for n in t) for t in self.plan.touched]
        present = {n for tap in self.plan.anatomy.taps[i] for n in tap.linears}
        work = [
            (stage, linears & present, shares)
            for stage, linears, shares in zip(self.plan.stages, touched, self.plan.shares, strict=True)
            if linears & present
        ]
        observing = [k for k, (stage, _, _) in enumerate(work) if flow and stage.observes]
        events: list[dict[str, Any]] = []
        passed_on = False
        zeros: dict[str, Zeros] = {}
        for k, (stage, linears, shares) in enumerate(work):
            # The original model's stream is passed on by the last to look at it, before anything is quantized.
            at_once = self.plan.original_inputs and observing[-1:] == [k]
            through = at_once and passes_on(self.plan, i)
            if isinstance(stage, BlockStage):
                assert flow is not None
                read_again = any(s.cross and isinstance(s, LinearStage) for s, _, _ in work[k + 1 :])
                taught = original.output(read_again=read_again) if original and stage.cross else None
                moved = original.moved if original else {}
                with span(stage.method):
                    events += self._compress_block(block, i, name, stage, linears, flow, taught, moved, through)
            else:
                assert isinstance(stage, LinearStage)
                last = k == len(work) - 1
                with span(stage.method):
                    found, finished = self._compress_linears(
                        block, i, name, stage, linears, shares, flow, original, at_once, through, last
                    )
                events += found
                passed_on |= finished
            passed_on |= through
            zeros = watch_zeros(block, name, zeros, stage, linears)
        return events, passed_on

    def head(self, flow: Flow | None) -> Iterator[dict[str, Any]]:
        """Take the head through all stages that mean it, and tell what happens."""
        head = self.plan.anatomy.head
        zeros: dict[str, Zeros] = {}
        for stage, touched, shares in zip(self.plan.stages, self.plan.touched, self.plan.shares, strict=True):
            if head not in touched:
                continue
            assert isinstance(stage, LinearStage)
            moments = None
            if flow and stage.observes:
                width = linear_at(self.model, head).in_features
                moments = Moments(width, self.settings.device, gram=stage.gram)
                materialise_outside(self.model, self.plan.anatomy, self.source, self.settings.device, embeddings=False)
                for hidden in flow.stream.batches():
                    moments.add(compute_head_input(self.model, self.plan.anatomy, hidden.to(self.settings.device)))
                moments.finish()
            yield from self._compress_tap(self.model, "", [head], stage, shares, moments)
            zeros = watch_zeros(self.model, "", zeros, stage, [head])

    def _compress_linears(
        self,
        block: nn.Module,
        i: int,
        name: str,
        stage: LinearStage,
        linears: Set[str],
        shares: Mapping[str, StackedLinear],
        flow: Flow | None,
        original: Original | None,
        at_once: bool,
        through: bool,
        last: bool,
    ) -> tuple[list[dict[str, Any]], bool]:
        taps = [t for t in self.plan.anatomy.taps[i] if linears & set(t.linears)]
        sequential = stage.sequential and not at_once
        # What waits behind one expert has run the others already: where there are experts, passes begin anew.
        holds = sequential and not any(t.experts for t in taps)
        events: list[dict[str, Any]] = []
        with ExitStack() as open_passes:
            passes = others = None
            if flow and stage.observes:
                call, held, device = flow.calls[i], flow.held and holds, self.settings.device
                passes = open_passes.enter_context(Passes(block, taps, call, flow.stream, device, held))
                if stage.cross and original:
                    taught = Passes(original.module, taps, call, original.stream, device, held)
                    others = open_passes.enter_context(taught)
            for together in observation_rounds(taps) if sequential else [taps]:
                moments: dict[Tap, Moments] = {}
                if passes:
                    with span("observe"), self.settings.showing(block, original.module if original else None):
                        moved = original.moved if original else {}
                        moments = observe(
                            passes, together, gram=stage.gram, original=others, moved=moved, through=through
                        )
                    give_back()
                for tap in together:
                    events += self._tokens_seen(name, tap, moments.get(tap))
                    targeted = [n for n in tap.linears if n in linears]
                    with span(f"compress {', '.join(n.rpartition('.')[2] for n in targeted)}"):
                        events += self._compress_tap(block, name, targeted, stage, shares, moments.get(tap))
            finished = passes is not None and passes.held and last and passes_on(self.plan, i)
            if passes and finished:
                with span("pass on"):
                    passes.finish()
        return events, finished

    def _compress_block(
        self,
        block: nn.Module,
        i: int,
        name: str,
        stage: BlockStage,
        linears: Set[str],
        flow: Flow,
        taught: Stream | None,
        moved: dict[str, Tensor],
        through: bool,
    ) -> list[dict[str, Any]]:
        begun = time.monotonic()
        taps, device, call = self.plan.anatomy.taps[i], self.settings.device, flow.calls[i]
        quantized = {n for n, m in block.named_modules() if isinstance(m, QLinear)}
        links = links_without(self.plan.links[i], quantized) if stage.links else {}
        given = Block(
            block,
            name,
            taps,
            frozenset(linears),
            links,
            call,
            flow.stream,
            taught,
            device,
            self.source.dtype,
            through,
            moved,
            self.settings.all_experts,
        )
        made = stage.compress(given)
        moments: dict[str, Moments] = {}
        if stage.ranges:
            with Passes(block, taps, call, flow.stream, device, held=False) as passes, self.settings.showing(block):
                ranges = observe(passes, [t for t in taps if linears & set(t.linears)], gram=False)
                moments = {n: m for tap, m in ranges.items() for n in tap.linears}
        seconds = (time.monotonic() - begun) / max(1, sum(len(names) for names in made))
        whole = flow.stream.hidden.shape[0] * flow.stream.hidden.shape[1]
        read = {n: tokens for tap, tokens in given.tokens.items() for n in tap.linears}
        events: list[dict[str, Any]] = []
        for tap, tokens in given.tokens.items():
            if tap.experts and stage.result:
                first = tap.linears[0]
                events += self._few_tokens(f"{name}.{first}", tokens, linear_at(block, first).in_features)
        for names, outcome in made.items():
            notes = {"tokens": read.get(names[0], whole), "seconds": round(seconds, 4)}
            rows = [linear_at(block, n).out_features for n in names]
            seen = moments.get(names[0])
            outcomes = attach(stage, stacked(block, names), outcome, rows, seen, self.source.dtype)
            events += self._put(block, name, names, stage, outcomes, seen, notes)
        return events

    def _compress_tap(
        self,
        module: nn.Module,
        prefix: str,
        linears: Sequence[str],
        stage: LinearStage,
        shares: Mapping[str, StackedLinear],
        moments: Moments | None,
    ) -> Iterator[dict[str, Any]]:
        """Compress linears that read one tensor, their rows together: each comes out as it would alone, but for a scale
        of a whole tensor, which engines that fuse them want to be one."""
        for together in stacks(module, linears, stage.result):
            begun = time.monotonic()
            rows = [linear_at(module, n).out_features for n in together]
            own = [shares[full] for n in together if (full := f"{prefix}.{n}" if prefix else n) in shares]
            outcomes = compress_tap(stage, stacked(module, together), rows, moments, self.source.dtype, own)
            seconds = (time.monotonic() - begun) / len(together)
            notes = {"tokens": moments.tokens if moments else 0, "seconds": round(seconds, 4)}
            yield from self._put(module, prefix, together, stage, outcomes, moments, notes)

    def _put(
        self,
        module: nn.Module,
        prefix: str,
        linears: Sequence[str],
        stage: Stage,
        outcomes: Sequence[Outcome],
        moments: Moments | None,
        notes: Mapping[str, float],
    ) -> Iterator[dict[str, Any]]:
        """Put what a stage made of some linears in their place, and tell of each."""
        for name, outcome in zip(linears, outcomes, strict=True):
            old = linear_at(module, name).weight.detach().float()
            made = outcome.weight.decode() if isinstance(outcome.weight, Quantized) else outcome.weight.float()
            install(module, name, outcome.weight, stage.result, moments, self.source.dtype, self.settings.device)
            event = {
                "event": "linear",
                "linear": f"{prefix}.{name}" if prefix else name,
                "method": stage.method,
                "scheme": stage.result.name if stage.result else None,
                **_figures(old, made, moments),
                **({"sparsity": sparsity(made)} if stage.prunes else {}),
                **outcome.notes,
                **notes,
            }
            self.report(event)
            yield event

    def _tokens_seen(self, block: str, tap: Tap, moments: Moments | None) -> Iterator[dict[str, Any]]:
        """Warn of experts that saw few tokens. Raises: ValueError for one that saw none."""
        name = f"{block}.{tap.linears[0]}"
        if moments is None or tap.experts is None:
            return
        if moments.tokens == 0:
            raise no_tokens(name)
        if moments.gram:
            yield from self._few_tokens(name, moments.tokens, moments.in_features)

    def _few_tokens(self, name: str, tokens: int, inputs: int) -> Iterator[dict[str, Any]]:
        if tokens < inputs:
            told = f"{tokens} calibration tokens for {inputs} inputs"
            event = {"event": "few_tokens", "linear": name, "tokens": tokens, "message": f"{name}: {told}"}
            self.report(event)
            yield event


def _figures(weight: Tensor, made: Tensor, moments: Moments | None) -> dict[str, float]:
    error = float((weight - made).square().sum() / weight.square().sum().clamp(min=1e-30))
    figures = {"weight_error": error}
    if moments is not None and moments.H is not None:
        figures["output_error"] = output_error(weight, made, moments.H)
    return figures
