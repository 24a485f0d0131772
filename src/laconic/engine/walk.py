"""The walk: for each decoder block, load it, observe it, compress it, write its shard, push activations through it.

One pass, one direction: a block is loaded once and forgotten once it is written, so that memory holds a block or two
and the calibration activations, whatever the size of the model. A finished block is its shard on disk; a restarted
walk reads finished shards back and runs them forward, which gives the same activations, bit for bit.
"""

from __future__ import annotations

import copy
import ctypes
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from laconic.engine.attention import look
from laconic.engine.beside import attach, compress_tap
from laconic.engine.block import Block, stacked, stacks
from laconic.engine.domain import head_shares
from laconic.engine.install import install, read_back, stored
from laconic.engine.observe import advance, no_tokens, observe
from laconic.engine.original import Original
from laconic.engine.passes import Passes
from laconic.engine.plan import Plan
from laconic.engine.span import span
from laconic.engine.stage import BlockStage, LinearStage, Outcome, Stage
from laconic.engine.stream import Room, Stream
from laconic.engine.survey import Figures, allot, by_survey, protect, survey_block
from laconic.engine.writer import Workspace
from laconic.engine.zeros import Zeros, sparsity, watch_zeros
from laconic.formats import Quantized
from laconic.model.anatomy import Call, Tap, capture_calls, head_input, linear_at, rounds
from laconic.model.checkpoint import open_shard
from laconic.model.experts import all_tokens
from laconic.model.half import quicken
from laconic.model.layout import arrange, to_file
from laconic.model.linear import QLinear
from laconic.model.links import without
from laconic.model.load import Source, materialise
from laconic.model.places import places_of
from laconic.solvers.masks import Part
from laconic.solvers.moments import Moments, output_error

Report = Callable[[Mapping[str, Any]], None]

# What a pass that waits before a tap holds, in sizes of its hidden states: a gated MLP's input, mostly.
_HELD = 8


@dataclass(frozen=True)
class Settings:
    """device: where blocks are compressed. batch: samples run at once. budget: bytes of calibration activations kept
    in memory before they spill to a file. all_experts: show experts every token while they are observed."""

    device: torch.device
    batch: int
    budget: float
    all_experts: bool = False


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
    flow = walker.embed(windows) if windows is not None and not workspace.done(len(names)) else None
    for i, name in enumerate(names):
        report({"event": "block", "block": i, "blocks": len(names)})
        with span(f"block {i}"):
            walker.block(i, name, flow)
    if not workspace.done(len(names)):
        with span("outside of blocks"):
            walker.rest(len(names), flow)


@dataclass(frozen=True)
class _Flow:
    """The calibration set on its way: how each block is called, the compressed model's stream, the original's.
    held: whether there is room for halted passes. room: for one more stream of the kind."""

    calls: Sequence[Call]
    stream: Stream
    original: Stream | None
    held: bool
    room: Room


@dataclass(frozen=True)
class _Walker:
    source: Source
    model: PreTrainedModel
    plan: Plan
    workspace: Workspace
    settings: Settings
    report: Report

    def embed(self, windows: Tensor) -> _Flow:
        """Hidden states as the first block gets them."""
        samples, tokens = windows.shape
        device, dtype = self.settings.device, self.source.dtype
        self._materialise_outside(embeddings=True)
        _, calls = capture_calls(self.model, self.plan.anatomy.blocks, input_ids=windows[:1].to(device))
        width = self.source.config.get_text_config().hidden_size
        count = 1 + self.plan.two_streams
        budget = self.settings.budget / count
        rooms = [Room(budget, self.workspace.folder / f"activations-{i}.writing") for i in range(count + 1)]
        made = [r.stream((samples, tokens, width), dtype, self.settings.batch) for r in rooms[:count]]
        for ids, *hidden in zip(windows.split(self.settings.batch), *(s.batches() for s in made), strict=True):
            embedded, _ = capture_calls(self.model, self.plan.anatomy.blocks, input_ids=ids.to(device))
            for h in hidden:
                h.copy_(embedded)
        self._forget_outside()
        held = made[0].hidden.nbytes * count * _HELD <= min(self.settings.budget, _free_memory(device) / 2)
        return _Flow([c.to(device) for c in calls], made[0], made[1] if count > 1 else None, held, rooms[-1])

    def survey(self, names: Sequence[str], windows: Tensor | None, domains: Mapping[int, Tensor]) -> list[Figures]:
        """What stages want to know of the original model before any of it is changed."""
        known = self.workspace.survey()
        if known is not None:
            return known
        plan, device = self.plan, self.settings.device
        found: list[Figures] = [{} for _ in plan.stages]
        if plan.surveys:
            assert windows is not None
            for i, block, flow in self._originals(names, windows):
                with self._showing(block):
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

    def _originals(self, names: Sequence[str], windows: Tensor) -> Iterator[tuple[int, nn.Module, _Flow]]:
        """The original model block by block, each before it is passed, which is left to the caller."""
        flow = self.embed(windows)
        for i, name in enumerate(names):
            self.report({"event": "survey", "block": i, "blocks": len(names)})
            block = self.model.get_submodule(name)
            self._materialise(block, f"{name}.")
            yield i, block, flow
            _forget(block)

    def block(self, i: int, name: str, flow: _Flow | None) -> None:
        """Compress block i, or read it back, and push the activations through it."""
        done = self.workspace.done(i)
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
            events, passed_on = self._compress(block, i, name, flow, original)
            tensors = stored(block, name)
            if flow and self.plan.calibrates_cache:
                tensors |= self._calibrate_cache(block, i, name, flow)
            with span("write"):
                self.workspace.write_shard(i, to_file(self.source.checkpoint, tensors), events)
        if flow and self._read_after(i):
            with span("pass on"):
                if not passed_on:
                    advance(block, flow.calls[i], flow.stream, self.settings.device)
                if original:
                    original.finish()
        _forget(block)

    def rest(self, i: int, flow: _Flow | None) -> None:
        """Everything outside the blocks: copied as it is, but for a head that is to be compressed."""
        anatomy, checkpoint = self.plan.anatomy, self.source.checkpoint
        prefix = f"{anatomy.blocks}."
        head_touched = any(anatomy.head in names for names in self.plan.touched)
        names = [n for n in checkpoint.tensors if not n.startswith(prefix)]
        tensors = checkpoint.load([n for n in names if not (head_touched and n.startswith(f"{anatomy.head}."))])
        events: list[dict[str, Any]] = []
        if head_touched:
            head = self.model.get_submodule(anatomy.head)
            self._materialise(head, f"{anatomy.head}.")
            events = list(self._compress_head(flow))
            tensors.update(stored(self.model.get_submodule(anatomy.head), anatomy.head))
        self.workspace.write_shard(i, to_file(checkpoint, tensors), events)

    def _compress(
        self, block: nn.Module, i: int, name: str, flow: _Flow | None, original: Original | None
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
            through = at_once and self._passes_on(i)
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

    def _compress_linears(
        self,
        block: nn.Module,
        i: int,
        name: str,
        stage: LinearStage,
        linears: Set[str],
        shares: Mapping[str, Part],
        flow: _Flow | None,
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
            for together in rounds(taps) if sequential else [taps]:
                moments: dict[Tap, Moments] = {}
                if passes:
                    with span("observe"), self._showing(block, original.module if original else None):
                        moved = original.moved if original else {}
                        moments = observe(
                            passes, together, gram=stage.gram, original=others, moved=moved, through=through
                        )
                    _give_back()
                for tap in together:
                    events += self._tokens_seen(name, tap, moments.get(tap))
                    targeted = [n for n in tap.linears if n in linears]
                    with span(f"compress {', '.join(n.rpartition('.')[2] for n in targeted)}"):
                        events += self._compress_tap(block, name, targeted, stage, shares, moments.get(tap))
            finished = passes is not None and passes.held and last and self._passes_on(i)
            if passes and finished:
                with span("pass on"):
                    passes.finish()
        return events, finished

    def _calibrate_cache(self, block: nn.Module, i: int, name: str, flow: _Flow) -> dict[str, Tensor]:
        """Keep what the cache's stage wants to know of block i, as it was compressed. Returns: what goes into the
        shard, for engines."""
        assert self.plan.cache is not None
        stage, shape = self.plan.cache
        places = places_of(self.model, rotary=True) if stage.pre_rope else None
        seen = look(block, self.model.config, flow.calls[i], flow.stream, self.settings.device, places, i)
        told = stage.calibrate(seen, shape)
        self.workspace.write_calibration(i, told)
        attention = f"{name}.{self.plan.anatomy.taps[i][0].linears[0]}".rpartition(".")[0]
        found = stage.engine_scales(told)
        return {f"{attention}.{leaf}": scale for leaf, scale in found.items()}

    def _passes_on(self, i: int) -> bool:
        """Whether a stage's passes may replace what block i reads by what it puts out: nothing looks at it after."""
        return self._read_after(i) and not self.plan.calibrates_cache

    def _read_after(self, i: int) -> bool:
        """Whether anything reads what block i puts out: the next block, or a stage that observes the head."""
        head = self.plan.anatomy.head
        observed = any(
            s.observes and head in names for s, names in zip(self.plan.stages, self.plan.touched, strict=True)
        )
        return i + 1 < len(self.plan.anatomy.taps) or observed

    def _showing(self, *modules: nn.Module | None) -> AbstractContextManager[None]:
        """While this lasts every token is shown to every expert, if that was asked for."""
        return all_tokens(*(m for m in modules if m is not None and self.settings.all_experts))

    def _compress_block(
        self,
        block: nn.Module,
        i: int,
        name: str,
        stage: BlockStage,
        linears: Set[str],
        flow: _Flow,
        taught: Stream | None,
        moved: dict[str, Tensor],
        through: bool,
    ) -> list[dict[str, Any]]:
        begun = time.monotonic()
        taps, device, call = self.plan.anatomy.taps[i], self.settings.device, flow.calls[i]
        quantized = {n for n, m in block.named_modules() if isinstance(m, QLinear)}
        links = without(self.plan.links[i], quantized) if stage.links else {}
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
            with Passes(block, taps, call, flow.stream, device, held=False) as passes, self._showing(block):
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

    def _compress_head(self, flow: _Flow | None) -> Iterator[dict[str, Any]]:
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
                self._materialise_outside(embeddings=False)
                for hidden in flow.stream.batches():
                    moments.add(head_input(self.model, self.plan.anatomy, hidden.to(self.settings.device)))
                moments.finish()
            yield from self._compress_tap(self.model, "", [head], stage, shares, moments)
            zeros = watch_zeros(self.model, "", zeros, stage, [head])

    def _compress_tap(
        self,
        module: nn.Module,
        prefix: str,
        linears: Sequence[str],
        stage: LinearStage,
        shares: Mapping[str, Part],
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

    def _read_back(self, block: nn.Module, i: int, name: str) -> None:
        """The finished block i, as its shard holds it."""
        shard = arrange(open_shard(self.workspace.shard(i)), self.model)
        read_back(block, name, shard, self.plan.schemes, self.source.dtype, self.settings.device)

    def _materialise(self, module: nn.Module, prefix: str) -> None:
        with span("read"):
            materialise(module, prefix, self.source.checkpoint, self.settings.device)
        quicken(module)

    def _outside(self) -> Iterator[tuple[str, nn.Module]]:
        """Modules that are in no block and are not the head: embeddings and norms."""
        anatomy = self.plan.anatomy
        for name, module in self.model.named_modules():
            if name != anatomy.head and name != anatomy.blocks and not name.startswith(f"{anatomy.blocks}."):
                yield name, module

    def _materialise_outside(self, *, embeddings: bool) -> None:
        skipped = None if embeddings else self.model.get_input_embeddings()
        for name, module in self._outside():
            if module is not skipped:
                for leaf, _ in list(module.named_parameters(recurse=False)):
                    full = f"{name}.{leaf}" if name else leaf
                    tensor = self.source.checkpoint.load([full])[full].to(self.settings.device, self.source.dtype)
                    setattr(module, leaf, nn.Parameter(tensor, requires_grad=False))
                for leaf, buffer in list(module.named_buffers(recurse=False)):
                    setattr(module, leaf, buffer.to(self.settings.device))

    def _forget_outside(self) -> None:
        for _, module in self._outside():
            for leaf, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, leaf, nn.Parameter(parameter.to("meta"), requires_grad=False))


def _free_memory(device: torch.device) -> float:
    """Bytes that a GPU has to spare; a CPU's are counted by the budget."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else math.inf


def _figures(weight: Tensor, made: Tensor, moments: Moments | None) -> dict[str, float]:
    error = float((weight - made).square().sum() / weight.square().sum().clamp(min=1e-30))
    figures = {"weight_error": error}
    if moments is not None and moments.H is not None:
        figures["output_error"] = output_error(weight, made, moments.H)
    return figures


def _forget(block: nn.Module) -> None:
    """Free the block's weights: its shard has them."""
    for module in block.modules():
        if isinstance(module, QLinear):
            module.dense = None
    block.to("meta")
    _give_back()


def _give_back() -> None:
    """Have the allocator return what freed tensors left behind, in pieces that the next do not quite fit into."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
