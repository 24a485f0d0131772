"""Untying of a head from the embeddings, where a recipe quantizes both: engines read quantized embeddings only so."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

from laconic.checkpoint.source import Source
from laconic.stages.quantizing import QuantizingStage
from laconic.stages.stage import Stage
from laconic.stages.targets import EMBEDDING, HEAD, matches
from laconic.structure.anatomy import Anatomy


def unties(stages: Sequence[Stage], anatomy: Anatomy) -> bool:
    """Return whether stages quantize both the head and the embeddings of a model that ties them.

    Args:
        stages: of one walk.
        anatomy: of the model.
    """
    targets = {t for stage in stages if isinstance(stage, QuantizingStage) for t in stage.targets}
    head = any(target == HEAD or matches(anatomy.head, [target]) for target in targets)
    return anatomy.tied and head and bool(targets & {EMBEDDING, anatomy.embeddings})


def untie(source: Source, anatomy: Anatomy) -> Source:
    """Return a source whose head has a weight of its own, the one that it shares with the embeddings.

    Args:
        source: the source, its checkpoint arranged.
        anatomy: of its model.
    """
    config = copy.deepcopy(source.config)
    for part in (config, config.get_text_config()):
        part.tie_word_embeddings = False
    shared = source.checkpoint.tensors[f"{anatomy.embeddings}.weight"]
    tensors = {**source.checkpoint.tensors, f"{anatomy.head}.weight": shared}
    return replace(
        source,
        raw={**source.raw, "tie_word_embeddings": False},
        config=config,
        checkpoint=replace(source.checkpoint, tensors=tensors),
    )
