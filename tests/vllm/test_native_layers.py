"""Layers of native artifacts in vLLM: the same product on one rank and on several, and no more memory than the file.

On a GPU where there is one, otherwise on vLLM's CPU build.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from server import ENVIRONMENT, PYTHON, needs_vllm
from torch import Tensor

from laconic.formats import LowRank, Outliers, Quantized, quantize
from laconic.formats.schemes import Scheme, scheme
from laconic.runtime.products import round_activations
from laconic.runtime.quant_config import to_config
from vllm_kernels import EIGHT_BITS, FOUR_BITS

pytestmark = needs_vllm

COLUMNS = 256
OUTLIERS = [3, 77, 130, 255]
NAMES = {1: ["up"], 2: ["gate", "up"], 3: ["q", "k", "v"]}
SIZES = {"column": [128], "row": [128], "head": [200], "merged": [128, 128], "qkv": [128, 64, 64]}


def linear(kept: Scheme, rows: int, dtype: torch.dtype, seed: int) -> Quantized:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, COLUMNS, generator=generator)
    columns = torch.tensor(OUTLIERS if kept.outlier_columns else [], dtype=torch.int64)
    # Codes in outlier columns must not matter.
    q = replace(quantize(kept.weights, w, kept.weights.fit(w, dtype)), input_rotation=bool(kept.input_rotation))
    if len(columns):
        q = replace(q, outliers=Outliers(columns.to(torch.int32), (3 * w[:, columns]).to(dtype)))
    if kept.rank:
        left, right = (torch.randn(n, generator=generator) / 20 for n in ((rows, kept.rank), (kept.rank, COLUMNS)))
        q = replace(q, low_rank=LowRank(left.to(dtype), right.to(dtype)))
    return q


def case(
    name: str,
    kind: str,
    ranks: int,
    dtype: torch.dtype,
    *,
    outliers: bool = False,
    rank: int = 0,
    rotated: bool = False,
    **varied: Any,
) -> tuple[dict[str, Any], Tensor]:
    """A case for `native_layers.py`, and its product in float64."""
    kept = replace(
        scheme(name, **varied), outlier_columns=len(OUTLIERS) * outliers, rank=rank, input_rotation=COLUMNS * rotated
    )
    parts = [linear(kept, rows, dtype, i) for i, rows in enumerate(SIZES[kind])]
    x = torch.randn(5, COLUMNS, generator=torch.Generator().manual_seed(9))
    x[:, OUTLIERS] *= 20
    x = x.to(dtype)
    rounded = x
    calibrated: Mapping[str, Tensor] = {}
    stored = [q.to_tensors() for q in parts]
    if kept.input_activations:
        calibrated = kept.input_activations.calibrate(torch.tensor(-9.0), torch.tensor(9.0), dtype)
        stored = [s | {f"input_{n}": t for n, t in calibrated.items()} for s in stored]
        share = ranks if kind == "row" else 1
        columns = torch.tensor(OUTLIERS) if outliers else None
        # Each rank scales its share of the input.
        pieces = []
        for i, piece in enumerate(x.chunk(share, -1)):
            width = piece.shape[-1]
            inside = None if columns is None else columns[columns // width == i] - i * width
            pieces.append(round_activations(piece, kept.input_activations, calibrated, inside, rotated=rotated))
        rounded = torch.cat(pieces, -1)
    expected = rounded.double() @ torch.cat([q.decode() for q in parts]).double().T
    names = [f"model.{n}" for n in NAMES[len(parts)]]
    config = to_config(dict.fromkeys(names, kept), names)
    config["quant_method"] = "laconic"
    return {
        "scheme": config,
        "kind": kind,
        "parts": stored,
        "sizes": SIZES[kind],
        "columns": COLUMNS,
        "x": x,
        "ranks": ranks,
        "dtype": dtype,
    }, expected


def run(cases: list[dict[str, Any]], tmp_path: Path) -> list[dict[str, Any]]:
    torch.save(cases, tmp_path / "cases.pt")
    script = Path(__file__).with_name("native_layers.py")
    command = [PYTHON, str(script), str(tmp_path / "cases.pt"), str(tmp_path / "out.pt")]
    done = subprocess.run(
        command, env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    results: list[dict[str, Any]] = torch.load(tmp_path / "out.pt")
    return results


BF16, F32 = torch.bfloat16, torch.float32
SCHEMES: dict[str, dict[str, Any]] = {
    "LLM.int8": {"name": "W8A8", "outliers": True},
    "W8A8 tensor, static, outliers": {"name": "W8A8", "outliers": True, "dynamic": False, "strategy": "tensor"},
    "W8A8 low rank": {"name": "W8A8", "rank": 4},
    "W4A16 both": {"name": "W4A16", "outliers": True, "rank": 3, "group_size": 32},
    "W4A16_ASYM outliers": {"name": "W4A16_ASYM", "outliers": True, "group_size": 32},
    "W4A16 channel, low rank": {"name": "W4A16", "rank": 8, "group_size": -1},
    "W8A16 low rank": {"name": "W8A16", "rank": 4},
    "W6A6 both": {"name": "W6A6", "outliers": True, "rank": 2},
    "W4A6": {"name": "W4A6", "group_size": 32},
    "W8A8 rotated, both": {"name": "W8A8", "rotated": True, "outliers": True, "rank": 2},
    "W4A4 rotated": {"name": "W4A4", "rotated": True, "group_size": 32},
    "FP8_BLOCK outliers": {"name": "FP8_BLOCK", "outliers": True},
    "NVFP4A16 low rank": {"name": "NVFP4A16", "rank": 4},
}


KINDS = [("column", 1), ("row", 2), ("merged", 2), ("qkv", 4), ("head", 2)]


# Layers that cannot be cut, and what the message says of them.
REFUSED = [
    ({"name": "W4A16", "kind": "row", "ranks": 4, "rank": 2, "group_size": 128}, "a group of 128 at inputs 0:64"),
    ({"name": "W4A6", "kind": "row", "ranks": 4, "group_size": 128}, "a group of 128 at inputs 0:64"),
    ({"name": "FP8_BLOCK", "kind": "merged", "ranks": 2, "outliers": True}, "a block of 128 at outputs 0:64"),
]
MIXED = {"name": "W4A4", "kind": "row", "ranks": 2, "rotated": True, "group_size": 32}


@FOUR_BITS
@EIGHT_BITS
def test_ranks_together_compute_the_whole_product(tmp_path: Path) -> None:
    """Of float32 by our own products, exactly; of bf16 by vLLM's kernels where it has any, to bf16's precision.

    What cannot be cut is refused by name.
    """
    cases, labels = [], []
    for label, varied in SCHEMES.items():
        for kind, ranks in KINDS:
            # Blocks of FP8 are larger than the shares of other layers, and rotated inputs cannot be cut.
            if (
                (kind != "row" and ranks > 1)
                if label == "FP8_BLOCK outliers"
                else (kind == "row" and "rotated" in label)
            ):
                continue
            for dtype in (F32, BF16):
                cases.append(case(kind=kind, ranks=ranks, dtype=dtype, **varied))
                labels.append((label, kind, dtype))
    cut = [case(dtype=F32, **options) for options in (*(options for options, _ in REFUSED), MIXED)]
    results = run([c for c, _ in [*cases, *cut]], tmp_path)
    assert "inputs of model.all, which a matrix or a rotation mixes; serve with" in results[-1]["error"]
    for result, (_, place) in zip(results[len(cases) : -1], REFUSED, strict=True):
        assert result["error"].startswith(
            f"tensor parallelism would cut {place} of model.all; serve with a smaller --tensor-parallel-size"
        )
        assert "\n" not in result["error"]
    wrong = []
    for (asked, expected), result, label in zip(cases, results, labels, strict=False):
        if "error" in result:
            wrong.append((label, result["error"]))
            continue
        error = float((result["y"].double() - expected).norm() / expected.norm())
        ours = label[2] is F32
        if result["y"].shape != expected.shape or not error < (1e-5 if ours else 0.01) or (ours and result["engine"]):
            wrong.append((label, error))
        if label[1] == "column" and not result["engine"]:
            # Nothing decoded stays in memory.
            (stored,) = asked["parts"]
            assert sum(result["bytes"]) <= 1.02 * sum(t.nbytes for t in stored.values()), label
    assert not wrong
    served = {label[0] for label, result in zip(labels, results, strict=False) if result["engine"]}
    on_cpu = {name for name in SCHEMES if name.startswith(("LLM.int8", "W8A8", "W4A16"))}
    assert served == on_cpu if not torch.cuda.is_available() else served >= on_cpu
