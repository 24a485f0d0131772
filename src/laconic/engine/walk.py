"""The walk: for each decoder block, load it, observe it, compress it, write its shard, push activations through it.

One pass, one direction: a block is loaded once and forgotten once it is written, so that memory holds a block or two
and the calibration activations, whatever the size of the model. A finished block is its shard on disk; a restarted
walk reads finished shards back and runs them forward, which gives the same activations, bit for bit.
"""

from __future__ import annotations

import copy
import ctypes
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from laconic.engine.observe import Stream, advance, make_stream, observe
from laconic.engine.plan import Plan
from laconic.engine.stage import LinearStage
from laconic.engine.writer import Workspace
from laconic.formats import Quantized
from laconic.formats.schemes import Scheme
from laconic.formats.storage import to_stored
from laconic.model.anatomy import Call, Tap, capture_calls, head_input, linear_at, rounds
from laconic.model.checkpoint import open_shard
from laconic.model.experts import all_tokens
from laconic.model.layout import arrange, to_file
from laconic.model.linear import QLinear, replace_linear
from laconic.model.load import Source, materialise
from laconic.solvers.moments import Moments, output_error

Report = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class Settings:
    """device: where blocks are compressed. batch: samples run at once. budget: bytes of calibration activations kept
    in memory before they spill to a file. all_experts: show experts every token while they are observed."""

    device: torch.device
    batch: int
    budget: float
    all_experts: bool = False


def walk(
    source: Source,
    model: PreTrainedModel,
    plan: Plan,
    windows: Tensor | None,
    workspace: Workspace,
    settings: Settings,
    report: Report,
) -> None:
    """Compress `model` (a skeleton) block by block into `workspace`.

    windows: calibration token ids (samples, tokens), None when no stage needs them.
    """
    walker = _Walker(source, model, plan, workspace, settings, report)
    names = [plan.anatomy.block_name(i) for i in range(len(plan.anatomy.taps))]
    flow = walker.embed(windows) if windows is not None and not workspace.done(len(names)) else None
    for i, name in enumerate(names):
        report({"event": "block", "block": i, "blocks": len(names)})
        walker.block(i, name, flow)
    if not workspace.done(len(names)):
        walker.rest(len(names), flow)


@dataclass(frozen=True)
class _Flow:
    """The calibration set on its way: how each block is called, the compressed model's stream, the original's."""

    calls: Sequence[Call]
    stream: Stream
    original: Stream | None


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
        spills = [self.workspace.folder / f"activations-{i}.writing" for i in range(count)]
        budget = self.settings.budget / count
        made = [make_stream((samples, tokens, width), dtype, self.settings.batch, budget, s) for s in spills]
        for ids, *hidden in zip(windows.split(self.settings.batch), *(s.batches() for s in made), strict=True):
            embedded, _ = capture_calls(self.model, self.plan.anatomy.blocks, input_ids=ids.to(device))
            for h in hidden:
                h.copy_(embedded)
        self._forget_outside()
        return _Flow([c.to(device) for c in calls], made[0], made[1] if count > 1 else None)

    def block(self, i: int, name: str, flow: _Flow | None) -> None:
        """Compress block i, or read it back, and push the activations through it."""
        done = self.workspace.done(i)
        if done and flow is None:
            return
        block = self.model.get_submodule(name)
        original = copy.deepcopy(block) if flow and flow.original else None
        if original is not None:
            self._materialise(original, f"{name}.")
        if done:
            self._read_back(block, i, name)
        else:
            self._materialise(block, f"{name}.")
            events = list(self._compress(block, i, name, flow, original))
            self.workspace.write_shard(i, to_file(self.source.checkpoint, _stored(block, name)), events)
        if flow:
            advance(block, flow.calls[i], flow.stream, self.settings.device)
            if flow.original and original is not None:
                advance(original, flow.calls[i], flow.original, self.settings.device)
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
            tensors.update(_stored(self.model.get_submodule(anatomy.head), anatomy.head))
        self.workspace.write_shard(i, to_file(checkpoint, tensors), events)

    def _compress(
        self, block: nn.Module, i: int, name: str, flow: _Flow | None, original: nn.Module | None
    ) -> Iterator[dict[str, Any]]:
        device = self.settings.device
        for stage, touched in zip(self.plan.stages, self.plan.touched, strict=True):
            taps = [t for t in self.plan.anatomy.taps[i] if any(f"{name}.{n}" in touched for n in t.linears)]
            for together in rounds(taps) if stage.sequential else [taps]:
                moments: dict[Tap, Moments] = {}
                if flow and together and self._observes(stage):
                    pair = (original, flow.original) if original is not None and flow.original and stage.cross else None
                    shown = [m for m in (block, original) if m is not None] if self.settings.all_experts else []
                    with all_tokens(*shown):
                        moments = observe(
                            block, together, flow.calls[i], flow.stream, device, gram=stage.gram, original=pair
                        )
                for tap in together:
                    yield from self._tokens_seen(name, tap, moments.get(tap))
                    linears = [n for n in tap.linears if f"{name}.{n}" in touched]
                    yield from self._compress_tap(block, name, linears, stage, moments.get(tap))

    def _compress_head(self, flow: _Flow | None) -> Iterator[dict[str, Any]]:
        head = self.plan.anatomy.head
        for stage, touched in zip(self.plan.stages, self.plan.touched, strict=True):
            if head not in touched:
                continue
            moments = None
            if flow and self._observes(stage):
                width = linear_at(self.model, head).in_features
                moments = Moments(width, self.settings.device, gram=stage.gram)
                self._materialise_outside(embeddings=False)
                for hidden in flow.stream.batches():
                    moments.add(head_input(self.model, self.plan.anatomy, hidden.to(self.settings.device)))
                moments.check()
            yield from self._compress_tap(self.model, "", [head], stage, moments)

    def _compress_tap(
        self,
        module: nn.Module,
        prefix: str,
        linears: Sequence[str],
        stage: LinearStage,
        moments: Moments | None,
    ) -> Iterator[dict[str, Any]]:
        """Compress linears that read one tensor, their rows together: each comes out as it would alone, but for a scale
        of a whole tensor, which engines that fuse them want to be one."""
        for together in _batches(module, linears, stage.result):
            begun = time.monotonic()
            weights = [linear_at(module, n).weight for n in together]
            weight = torch.cat([w.detach().float() for w in weights])
            outcome = stage.compress(weight, moments, self.source.dtype)
            made = outcome.weight.decode() if isinstance(outcome.weight, Quantized) else outcome.weight.float()
            seconds = (time.monotonic() - begun) / len(together)
            start = 0
            for name, old in zip(together, weights, strict=True):
                stop = start + old.shape[0]
                self._install(module, name, outcome.weight, slice(start, stop), stage.result, moments)
                event = {
                    "event": "linear",
                    "linear": f"{prefix}.{name}" if prefix else name,
                    "method": stage.method,
                    "scheme": stage.result.name if stage.result else None,
                    **_figures(weight[start:stop], made[start:stop], moments),
                    **outcome.notes,
                    "tokens": moments.tokens if moments else 0,
                    "seconds": round(seconds, 4),
                }
                start = stop
                self.report(event)
                yield event

    def _install(
        self,
        module: nn.Module,
        name: str,
        made: Quantized | Tensor,
        rows: slice,
        scheme: Scheme | None,
        moments: Moments | None,
    ) -> None:
        old = linear_at(module, name)
        if isinstance(made, Tensor):
            old.weight.data.copy_(made[rows])
            return
        assert scheme is not None
        new = replace_linear(module, name, scheme, self.source.dtype)
        stored = to_stored(made.rows(rows.start, rows.stop), scheme)
        acts = scheme.input_activations
        if acts and not acts.dynamic:
            assert moments is not None
            scale = acts.format.from_range(moments.lo, moments.hi, self.source.dtype)["scale"]
            stored["input_scale"] = scale.reshape(1)
        if old.bias is not None:
            stored["bias"] = old.bias.data
        _fill(new, stored, self.settings.device)

    def _tokens_seen(self, block: str, tap: Tap, moments: Moments | None) -> Iterator[dict[str, Any]]:
        """Warn of experts that saw few tokens. Raises: ValueError for one that saw none."""
        name = f"{block}.{tap.linears[0]}"
        if moments is None or tap.experts is None:
            return
        if moments.tokens == 0:
            raise ValueError(
                f"{name}: no calibration token was routed to this expert; use more samples, or set "
                "calibration.moe_calibrate_all_experts (what is finished stays in "
                f"{self.workspace.folder}, for this recipe)"
            )
        if moments.gram and moments.tokens < moments.in_features:
            told = f"{moments.tokens} calibration tokens for {moments.in_features} inputs"
            event = {"event": "few_tokens", "linear": name, "tokens": moments.tokens, "message": f"{name}: {told}"}
            self.report(event)
            yield event

    def _read_back(self, block: nn.Module, i: int, name: str) -> None:
        """The finished block i, as its shard holds it."""
        shard = arrange(open_shard(self.workspace.shard(i)), self.model)
        tensors = shard.load(shard.tensors, self.settings.device)
        local = {n.removeprefix(f"{name}."): t for n, t in tensors.items()}
        for linear in [n for n, m in block.named_modules() if isinstance(m, nn.Linear)]:
            if scheme := self.plan.schemes.get(f"{name}.{linear}"):
                new = replace_linear(block, linear, scheme, self.source.dtype)
                inside = {n.removeprefix(f"{linear}."): t for n, t in local.items() if n.startswith(f"{linear}.")}
                _fill(new, inside, self.settings.device)
        for n, p in list(block.named_parameters()):
            if p.is_meta:
                owner, _, leaf = n.rpartition(".")
                setattr(block.get_submodule(owner), leaf, nn.Parameter(local[n].to(p.dtype), requires_grad=False))
        block.to(self.settings.device)

    def _observes(self, stage: LinearStage) -> bool:
        acts = stage.result.input_activations if stage.result else None
        return stage.gram or stage.cross or bool(acts and not acts.dynamic)

    def _materialise(self, module: nn.Module, prefix: str) -> None:
        materialise(module, prefix, self.source.checkpoint, self.settings.device, self.source.dtype)

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


def _batches(module: nn.Module, linears: Sequence[str], scheme: Scheme | None) -> list[list[str]]:
    """Which linears of a tap can be stacked: all, unless a block of one format would reach from one into the next."""
    structure = scheme.weights.tiling.block_structure if scheme else None
    if structure and any(linear_at(module, n).out_features % structure[0] for n in linears):
        return [[n] for n in linears]
    return [list(linears)]


def _figures(weight: Tensor, made: Tensor, moments: Moments | None) -> dict[str, float]:
    error = float((weight - made).square().sum() / weight.square().sum().clamp(min=1e-30))
    figures = {"weight_error": error}
    if moments is not None and moments.H is not None:
        figures["output_error"] = output_error(weight, made, moments.H)
    return figures


def _fill(linear: QLinear, stored: Mapping[str, Tensor], device: torch.device) -> None:
    """Give a QLinear its tensors, and decode it once for the passes to come."""
    for name, tensor in stored.items():
        setattr(linear, name, nn.Parameter(tensor.to(device), requires_grad=False))
    linear.to(device)
    linear.unpack()


def _stored(module: nn.Module, name: str) -> dict[str, Tensor]:
    return {f"{name}.{n}": p.data for n, p in module.named_parameters()} | {
        f"{name}.{n}": b for n, b in module.named_buffers() if n in module.state_dict()
    }


def _forget(block: nn.Module) -> None:
    """Free the block's weights: its shard has them."""
    for module in block.modules():
        if isinstance(module, QLinear):
            module.dense = None
    block.to("meta")
    # The allocator keeps what small tensors leave behind, in pieces that the next block does not quite fit into.
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
