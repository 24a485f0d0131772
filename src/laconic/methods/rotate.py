"""Rotations (QuaRot, Ashkboos et al., arXiv 2404.00456; SpinQuant, arXiv 2405.16406): spread outliers over channels.

The residual stream is multiplied by one orthogonal matrix (SpinQuant's R1), the values of each attention head by
another (R2). Weights absorb both, and norms' weights are folded into the linears that read them, so that the model
computes what it did; a later stage rounds. No calibration is needed, and blocks are rewritten one at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from laconic.checkpoint.extra import describe_extra, extra_names
from laconic.checkpoint.files import DTYPES, Checkpoint
from laconic.checkpoint.layout import to_file_layout
from laconic.checkpoint.materialise import check_complete, materialise
from laconic.checkpoint.source import Source, arrange_source, build_skeleton
from laconic.runtime.inputs import open_input
from laconic.solvers.orthogonal import Rotation, RotationKind, make_rotation
from laconic.stages.model import ModelOutcome, ModelStage, ModelTask
from laconic.structure.anatomy import Anatomy, dissect, linears_of
from laconic.structure.stream import ResidualStream, rotate_block, rotate_readers, rotate_rows
from laconic.structure.stream_search import find_residual_stream

# From this share of zeros on, a linear is taken for pruned.
_PRUNED = 0.1


class Rotate(ModelStage):
    """Rotate the residual stream, and the values of attention heads.

    Attributes:
        rotation: `hadamard`, with random signs; or `random`, uniform among all orthogonal matrices.
        heads: whether values are rotated within each head, too, where a linear reads them unmixed.
    """

    method: Literal["rotate"] = "rotate"
    rotation: RotationKind = "hadamard"
    heads: bool = True

    @property
    def keeps_zeros(self) -> bool:
        return False

    def check(self, source: Source, model: PreTrainedModel, *, quantized: bool, reshaped: bool) -> Mapping[str, str]:
        if model.config.get_text_config() is not model.config:
            raise ValueError(f"'{model.config.model_type}' is more than a language model; rotate rotates plain ones")
        _check_extra(arrange_source(source, model).checkpoint, model)
        find_residual_stream(model, dissect(model))
        return {}

    def planned_source(self, source: Source, model: PreTrainedModel) -> Source:
        anatomy = dissect(model)
        if not anatomy.tied:
            return source
        embed = model.get_input_embeddings()
        names = (next(n for n, m in model.named_modules() if m is embed), anatomy.head)
        arranged = arrange_source(source, model).checkpoint.tensors
        stored = next(arranged[f"{n}.weight"] for n in names if f"{n}.weight" in arranged)
        tensors = {f"{n}.weight": stored for n in names} | {**source.checkpoint.tensors}
        return replace(source, config=_untied(source), checkpoint=replace(source.checkpoint, tensors=tensors))

    def warnings(self, source: Source) -> Iterator[str]:
        model = build_skeleton(source.config, source.dtype)
        if dissect(model).tied:
            weight = model.get_input_embeddings().weight
            assert isinstance(weight, Tensor)
            yield (
                "rotate gives the head a matrix of its own, since it folds the last norm into the head and not into "
                f"the embeddings that share its weights: the model grows by {weight.nbytes / 1e6:.1f} MB"
            )

    def apply(self, task: ModelTask) -> ModelOutcome:
        source, model, untied = _open(task)
        anatomy = dissect(model)
        stream = find_residual_stream(model, anatomy)
        width = next((b.values.width for b in stream.blocks if b.values), None) if self.heads else None
        rotated = _RotatedModel(
            model,
            anatomy,
            source.checkpoint,
            stream,
            make_rotation(stream.width, self.rotation, task.seed, keep_mean=stream.centred),
            make_rotation(width, self.rotation, (task.seed + 1) % 2**64) if width else None,
            task.device,
        )
        event = {"event": "rotation", "rotation": self.rotation, "residual": stream.width, "heads": width}
        config = {"tie_word_embeddings": False} if untied else {}
        return ModelOutcome(None, config, [event], shards=rotated.shards())


def _open(task: ModelTask) -> tuple[Source, PreTrainedModel, bool]:
    """Open a checkpoint, with a float32 skeleton whose head has a weight of its own, and whether it had none before."""
    source = open_input(str(task.folder), trust=task.trust)
    model = build_skeleton(source.config, torch.float32, trust=task.trust)
    source = arrange_source(source, model)
    check_complete(model, source.checkpoint)
    _check_extra(source.checkpoint, model)
    if not dissect(model).tied:
        return source, model, False
    return source, build_skeleton(_untied(source), torch.float32, trust=task.trust), True


def _untied(source: Source) -> PretrainedConfig:
    """Return the config of a model whose head has a weight of its own."""
    config = copy.deepcopy(source.config)
    config.tie_word_embeddings = False
    return config


def _check_extra(checkpoint: Checkpoint, model: PreTrainedModel) -> None:
    if names := extra_names(checkpoint, model):
        raise ValueError(
            f"the checkpoint has {describe_extra(checkpoint, names, model)}; they may read the residual stream, which "
            "would be rotated without them; remove them from the checkpoint, or leave rotate out"
        )


@dataclass(frozen=True)
class _RotatedModel:
    """A model whose parts are rotated when they are asked for.

    Attributes:
        model: its skeleton, in float32.
        anatomy: its blocks and head.
        checkpoint: its tensors before.
        stream: what reads and writes the residual stream.
        rotation: of the residual stream.
        head_rotation: of the values of each head.
        device: where to compute.
    """

    model: PreTrainedModel
    anatomy: Anatomy
    checkpoint: Checkpoint
    stream: ResidualStream
    rotation: Rotation
    head_rotation: Rotation | None
    device: torch.device

    def shards(self) -> Sequence[Callable[[], Mapping[str, Tensor]]]:
        """Return functions that compute the tensors of each block, and of all outside of them, by names in files."""
        return [*(partial(self._block, i) for i in range(len(self.stream.blocks))), self._outside]

    def _block(self, i: int) -> dict[str, Tensor]:
        name = self.anatomy.block_name(i)
        block = self.model.get_submodule(name)
        materialise(block, f"{name}.", self.checkpoint, self.device)
        for linear, module in linears_of(block).items():
            zeros = float((module.weight == 0).float().mean())
            if zeros > _PRUNED:
                raise ValueError(
                    f"{zeros:.0%} of {name}.{linear} is zero, and a rotation mixes channels, so that pruned weights "
                    "would not stay zero; rotate the model before it is pruned"
                )
        rotate_block(block, self.stream.blocks[i], self.rotation, self.head_rotation)
        tensors = {f"{name}.{n}": t for n, t in block.state_dict().items()}
        block.to("meta")
        return self._stored(tensors)

    def _outside(self) -> dict[str, Tensor]:
        names = [n for n in self.checkpoint.tensors if not n.startswith(f"{self.anatomy.blocks}.")]
        tensors = self.checkpoint.load(names, self.device)
        embeddings, norm = self.stream.embeddings, self.stream.final_norm
        head, tied = f"{self.anatomy.head}.weight", f"{embeddings[0]}.weight"
        # Files hold tied weights under one of their names.
        for name, other in ((tied, head), (head, tied)):
            if name not in tensors:
                tensors[name] = tensors[other]
        modules = [self.model.get_submodule(n) for n in (norm.source, self.anatomy.head)]
        for path, module in zip((norm.source, self.anatomy.head), modules, strict=True):
            for leaf, _ in list(module.named_parameters(recurse=False)):
                setattr(module, leaf, nn.Parameter(tensors[f"{path}.{leaf}"], requires_grad=False))
        rotate_readers(modules[0], norm.offset, modules[1:], self.rotation)
        for path, module in zip((norm.source, self.anatomy.head), modules, strict=True):
            tensors |= {f"{path}.{leaf}": p.data for leaf, p in module.named_parameters(recurse=False)}
        for name in embeddings:
            weight = tensors[f"{name}.weight"]
            tensors[f"{name}.weight"] = rotate_rows(weight, self.rotation, centre=self.stream.centred)
        return self._stored(tensors)

    def _stored(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors as files hold them, in the dtypes of the source."""
        known = self.checkpoint.tensors
        cast = {n: t.to(DTYPES.get(known[n].dtype, t.dtype)) if n in known else t for n, t in tensors.items()}
        return to_file_layout(self.checkpoint, cast)
