"""Quantized models written in 16 bit: `laconic dequantize`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from laconic.artifact.identity import RECIPE
from laconic.artifact.workspace import Workspace, check_output
from laconic.checkpoint.atomic import copy_file
from laconic.checkpoint.files import KV_CONFIG, Checkpoint
from laconic.checkpoint.layout import stack_experts
from laconic.checkpoint.source import Source, build_skeleton
from laconic.checkpoint.streaming import write_tensors
from laconic.checkpoint.trust import UNTRUSTED, Trust
from laconic.pipeline.provenance import identify_source
from laconic.runtime.adapters import ADAPTER
from laconic.runtime.inputs import open_input

# Most bytes of a shard.
_SHARD_BYTES = 5_000_000_000

Report = Callable[[Mapping[str, Any]], None]


def dequantize(
    model: str,
    output: str | Path,
    *,
    overwrite: bool = False,
    trust: Trust = UNTRUSTED,
    report: Report = lambda _: None,
) -> Path:
    """Write a quantized model as a plain 16-bit checkpoint, one tensor in memory at a time.

    A run that was interrupted resumes at the first unfinished shard.

    Args:
        model: Folder or Hub name of the model: an artifact, or a checkpoint of another tool in a format that is read.
        output: Folder of the 16-bit checkpoint.
        overwrite: Whether unfinished work on another model may be discarded there.
        trust: Permissions of the model's files.
        report: Called with an event for each tensor.

    Returns:
        The folder of the 16-bit checkpoint.

    Raises:
        ValueError: The model is not quantized, its format is not read, or the output cannot be written.
    """
    source = open_input(model, trust=trust, cached=True)
    if not source.quantized and KV_CONFIG not in source.raw:
        raise ValueError(f"{model} is not quantized; use it as it is")
    target = Path(output).expanduser().resolve()
    if target in (original := source.folder.resolve(), *original.parents):
        raise ValueError(f"output {target} is the model's own folder, or holds it; choose another")
    check_output(target, overwrite=overwrite)
    checkpoint, config = _readable(source, trust), {k: v for k, v in source.raw.items() if k != KV_CONFIG}
    shards = _shards(checkpoint)
    done, total = 0, len(checkpoint.tensors)
    with Workspace(target, {"dequantize": identify_source(source)}, len(shards), overwrite=overwrite) as workspace:
        for i, names in enumerate(shards):
            if not workspace.is_finished(i):

                def load(name: str, done: int = done, names: list[str] = names) -> Tensor:
                    report({"event": "work", "done": done + names.index(name), "total": total})
                    return checkpoint.load([name], finite=checkpoint.tensors[name].decoding is not None)[name]

                write_tensors(workspace.shard(i), {name: checkpoint.tensors[name] for name in names}, load)
            done += len(names)
        _copy_adapter(source.folder, workspace.folder)
        workspace.finish(config, source.folder)
    # What remains is a plain model.
    (target / RECIPE).unlink()
    return target


def _readable(source: Source, trust: Trust) -> Checkpoint:
    """Return the decoded tensors as transformers reads them in 16 bit: experts stacked, where it knows no others."""
    try:
        model = build_skeleton(source.config, source.dtype, trust=trust)
    except ValueError:
        return source.checkpoint  # an architecture that Laconic cannot split into linears has no single experts
    return stack_experts(source.checkpoint, model)


def _shards(checkpoint: Checkpoint) -> list[list[str]]:
    """Divide the tensors among shards, in the order of their names."""
    shards: list[list[str]] = [[]]
    size = 0
    for name in sorted(checkpoint.tensors):
        nbytes = checkpoint.tensors[name].nbytes
        if shards[-1] and size + nbytes > _SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    return shards


def _copy_adapter(source: Path, target: Path) -> None:
    """Copy the adapter that an artifact keeps beside its weights."""
    for file in (source / ADAPTER).glob("*"):
        (target / ADAPTER).mkdir(exist_ok=True)
        copy_file(file, target / ADAPTER / file.name)
