"""The contract of formats holds more than grids: a codebook of pairs goes from a recipe to logits, and over a kill."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import pytest
import torch
from torch import Tensor

import laconic
from artifacts import logits, original, quantized_linears, recipe, same_bytes, with_decoded_weights
from extra_methods import allow_methods
from interruptions import Killed
from laconic.formats import Format, Params, Quantized, Transforms
from laconic.formats.schemes import PRESETS, Scheme
from laconic.stages.linear import LinearStage, LinearTask, Outcome
from laconic.stages.quantizing import QuantizingStage

pytestmark = pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")


@dataclass(frozen=True)
class PairCodebook(Format):
    """Pairs of neighbouring inputs as one of 16 vectors of a codebook: half as many codes as weights, two a byte."""

    num_bits: int = 2
    symmetric: bool = False

    @property
    def title(self) -> str:
        return "pairs"

    @property
    def storage(self) -> str:
        return "pair-codebook"

    @property
    def standard(self) -> bool:
        return False

    def check_shape(self, name: str, shape: tuple[int, int]) -> None:
        if shape[1] % 4:
            raise ValueError(f"pairs do not fill the {shape[1]} inputs of {name}; use another scheme there")

    def fit(self, w: Tensor, dtype: torch.dtype = torch.float32) -> Params:
        pairs = w.float().reshape(-1, 2)
        return {"codebook": pairs[torch.linspace(0, len(pairs) - 1, 16).long()].to(dtype)}

    def encode(self, w: Tensor, params: Params) -> Tensor:
        distances = torch.cdist(w.float().reshape(-1, 2), params["codebook"].float())
        return distances.argmin(1).to(torch.uint8).view(w.shape[0], -1)

    def decode(self, codes: Tensor, params: Params, shape: tuple[int, int]) -> Tensor:
        return params["codebook"].float()[codes.long()].reshape(shape)

    def empty(self, shape: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Params]:
        codes = torch.empty(shape[0], shape[1] // 2, dtype=torch.uint8, device="meta")
        return codes, {"codebook": torch.empty(16, 2, dtype=dtype, device="meta")}

    def to_tensors(self, codes: Tensor, params: Params) -> dict[str, Tensor]:
        return {"weight_codes": codes[:, ::2] | codes[:, 1::2] << 4, "weight_codebook": params["codebook"]}

    def from_tensors(self, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> tuple[Tensor, Params]:
        packed = tensors["weight_codes"]
        codes = torch.stack((packed & 15, packed >> 4), -1).flatten(-2)
        return codes, {"codebook": tensors["weight_codebook"]}

    def cut_rows(
        self, codes: Tensor, params: Params, shape: tuple[int, int], start: int, stop: int
    ) -> tuple[Tensor, Params]:
        return codes[start:stop], {"codebook": params["codebook"].clone()}

    def to_config(self) -> dict[str, Any]:
        return {"type": "pair_codebook"}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self | None:
        return cls() if config["type"] == "pair_codebook" else None


class Pairs(QuantizingStage, LinearStage):
    """Take the nearest pair of weights whose channels have random signs."""

    formats: ClassVar = (PairCodebook,)
    example: ClassVar = {}

    method: Literal["pairs"] = "pairs"
    scheme: str = "PAIRS"

    def scheme_for(self, shape: tuple[int, int]) -> Scheme:
        return replace(super().scheme_for(shape), input_transform=1, output_transform=1)

    def compress(self, task: LinearTask) -> Outcome:
        assert task.scheme is not None
        fmt, W = task.scheme.weights, task.weight
        generator = torch.Generator().manual_seed(0)
        s_in, s_out = (torch.randint(2, (n,), generator=generator) * 2.0 - 1 for n in reversed(W.shape))
        rotated = s_out[:, None] * W * s_in
        params = fmt.fit(rotated, task.dtype)
        transforms = Transforms(s_in.to(task.dtype), s_out.to(task.dtype))
        codes = fmt.encode(rotated, params)
        return Outcome(Quantized(fmt, codes, params, (W.shape[0], W.shape[1]), transforms=transforms))


@pytest.fixture
def pairs(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A recipe's stages with the new format and method."""
    monkeypatch.setitem(PRESETS, "PAIRS", Scheme("PAIRS", PairCodebook(), engine="laconic"))
    allow_methods(monkeypatch, Pairs)
    # Another scheme beside it, so that config.json describes both.
    mlp = {"method": "gptq", "scheme": "W4A16", "group_size": 32, "targets": "re:.*mlp.*"}
    return [{"method": "pairs", "targets": "re:.*self_attn.*"}, mlp]


def test_a_vector_codebook_goes_from_a_recipe_to_logits(
    pairs: list[dict[str, Any]], llama: Path, text: Path, tmp_path: Path
) -> None:
    artifact = laconic.compress(str(llama), recipe(*pairs, text=text), tmp_path / "out")
    model = laconic.load(artifact.path)
    attention = {n: m for n, m in quantized_linears(model).items() if "self_attn" in n}
    assert len(attention) == 8
    before = original(llama)
    for name, linear in attention.items():
        assert isinstance(linear.scheme.weights, PairCodebook)
        W = before.get_submodule(name).weight.float()
        # Each pair is one of 16, up to the signs of its channels.
        assert len({(abs(float(a)), abs(float(b))) for a, b in linear.decode(torch.float32).reshape(-1, 2)}) <= 16
        assert float((linear.decode(torch.float32) - W).norm() / W.norm()) < 0.9
    expected = logits(with_decoded_weights(llama, artifact.path))
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(original(artifact.path)), expected)


def test_a_kill_between_its_blocks_changes_nothing(
    pairs: list[dict[str, Any]], llama: Path, text: Path, tmp_path: Path
) -> None:
    asked = recipe(*pairs, text=text)
    whole = laconic.compress(str(llama), asked, tmp_path / "whole")

    def die(event: Mapping[str, Any]) -> None:
        if event["event"] == "block" and event["block"] == 1:
            raise Killed

    with pytest.raises(Killed):
        laconic.compress(str(llama), asked, tmp_path / "out", report=die)
    assert same_bytes(laconic.compress(str(llama), asked, tmp_path / "out").path, whole.path)


def test_grids_refuse_a_codebook(pairs: list[dict[str, Any]], llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rtn cannot choose codes of pairs; use another method or scheme"):
        laconic.compress(str(llama), {"stages": [{"method": "rtn", "scheme": "PAIRS"}]}, tmp_path / "out")
