"""A compression or a generation under torch's profiler, which writes a Chrome trace with named spans."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.autograd.profiler import emit_nvtx
from torch.profiler import ProfilerActivity, profile

from laconic.artifact.artifact import Artifact
from laconic.checkpoint.trust import UNTRUSTED, Trust
from laconic.pipeline.compression import run
from laconic.pipeline.pipeline import Pipeline
from laconic.runtime.reading import load
from laconic.structure.anatomy import find_blocks
from laconic.structure.hooks import patched_forwards
from laconic.walk.spans import record_span

Report = Callable[[Mapping[str, Any]], None]


def profile_compress(
    pipeline: Pipeline,
    trace: Path,
    *,
    blocks: int = 2,
    nvtx: bool = False,
    overwrite: bool = False,
    report: Report,
) -> Artifact:
    """Compress a model, and trace its first blocks.

    Args:
        pipeline: The prepared compression.
        trace: File of the trace.
        blocks: Number of blocks to trace; the rest runs without the profiler.
        nvtx: Whether to name ranges for Nsight instead of writing a trace.
        overwrite: Whether to replace an existing output.
        report: Called with the events of the compression.

    Returns:
        The artifact.
    """
    with _profiler(trace, nvtx) as stop:

        def stop_after_blocks(event: Mapping[str, Any]) -> None:
            if event["event"] == "block" and event["block"] == blocks:
                stop()
            report(event)

        return run(pipeline, overwrite=overwrite, report=stop_after_blocks)


@torch.inference_mode()
def profile_generation(
    model: str,
    trace: Path,
    *,
    prompt: int = 128,
    tokens: int = 16,
    batch: int = 1,
    nvtx: bool = False,
    trust: Trust = UNTRUSTED,
) -> None:
    """Trace the reading of random prompts and greedy generation.

    Args:
        model: Folder of an artifact or of any model, or a name on the Hub.
        trace: File of the trace.
        prompt: Tokens of a prompt.
        tokens: Number of new tokens.
        batch: Number of prompts.
        nvtx: Whether to name ranges for Nsight instead of writing a trace.
        trust: Permissions of the model's files.

    Raises:
        ValueError: Prompt and new tokens exceed the model's context.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    opened: Any = load(model, device=device, trust=trust)
    config = opened.config.get_text_config()
    context = getattr(config, "max_position_embeddings", None)
    if context and prompt + tokens > context:
        raise ValueError(
            f"--prompt {prompt} and --tokens {tokens} are more than the model's context of {context}; lower one"
        )
    ids = torch.randint(0, config.vocab_size, (batch, prompt), generator=torch.Generator().manual_seed(0)).to(device)
    settings = {"do_sample": False, "use_cache": True, "pad_token_id": 0}
    with _block_spans(opened):
        with record_span("warm up"):
            opened.generate(ids, max_new_tokens=1, min_new_tokens=1, **settings)
        with _profiler(trace, nvtx), record_span("generate"):
            opened.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, **settings)


@contextmanager
def _block_spans(model: torch.nn.Module) -> Iterator[None]:
    """Run every block, and each module directly in it, in a span of its name."""

    def in_span(module: torch.nn.Module, name: str) -> tuple[torch.nn.Module, Callable[..., Any]]:
        forward = module.forward

        def forward_in_span(*args: Any, **kwargs: Any) -> Any:
            with record_span(name):
                return forward(*args, **kwargs)

        return module, forward_in_span

    blocks = dict(model.get_submodule(find_blocks(model)).named_children())
    patches = [in_span(child, leaf) for block in blocks.values() for leaf, child in block.named_children()]
    patches += [in_span(block, f"block {i}") for i, block in blocks.items()]
    with patched_forwards(patches):
        yield


@contextmanager
def _profiler(trace: Path, nvtx: bool) -> Iterator[Callable[[], None]]:
    """Profile until the end, or until the yielded function is called; then write the trace, unless NVTX is used."""
    if nvtx:
        if not torch.cuda.is_available():
            raise ValueError("--nvtx names ranges for Nsight, which needs a CUDA device; leave it out")
        with emit_nvtx():
            yield lambda: None
        return
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    profiler = profile(activities=activities, profile_memory=True)
    stopped = False

    def stop() -> None:
        nonlocal stopped
        if not stopped:
            stopped = True
            profiler.stop()
            partial = trace.with_name(f".{trace.name}.writing")
            profiler.export_chrome_trace(str(partial))
            partial.replace(trace)

    trace.parent.mkdir(parents=True, exist_ok=True)
    profiler.start()
    try:
        yield stop
    finally:
        stop()
