"""What models write is the likeliest token each time, the artifact's beside its original's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from artifacts import original, press, rtn
from commands import Laconic
from laconic import Artifact
from laconic.evaluation.options import TextOptions
from laconic.evaluation.samples import continue_greedily
from laconic.evaluation.text import evaluate_text
from tiny import EOS, make_model


@torch.no_grad()
def likeliest(model: PreTrainedModel, prompt: Tensor, most: int, end: int | None) -> Tensor:
    """The same, read anew from the beginning for every token."""
    ids = prompt
    for _ in range(most):
        ids = torch.cat([ids, model(input_ids=ids[None], use_cache=False).logits[0, -1:].argmax(-1)])
        if ids[-1] == end:
            break
    return ids[len(prompt) :]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    return original(make_model(tmp_path_factory.mktemp("models") / "m", dtype=torch.float32))


@pytest.mark.parametrize("seed", range(3))
def test_it_is_the_likeliest_each_time(model: PreTrainedModel, seed: int) -> None:
    prompt = torch.randint(3, 100, (9,), generator=torch.Generator().manual_seed(seed))
    free = likeliest(model, prompt, 12, None)
    # Some token that it writes for the first time in its sixth place ends the text there, if there is one.
    end = int(free[5])
    for own in (None, end):
        model.generation_config = GenerationConfig(
            eos_token_id=own, do_sample=True, temperature=9.0, repetition_penalty=5.0, max_new_tokens=2
        )
        assert torch.equal(continue_greedily(model, prompt, 12), likeliest(model, prompt, 12, own))
        assert model.generation_config.repetition_penalty == 5.0


def test_both_continue_the_same_openings(llama: Path, text: Path, tmp_path: Path) -> None:
    folder = press(llama, tmp_path / "out", rtn("W2A16", group_size=32)).path
    found = evaluate_text(
        folder, TextOptions(baseline=str(llama), text=str(text), context_length=32, windows=9, generate=3)
    )
    kept = Artifact(folder).results["samples-calibration-32-9"]
    assert kept["samples"] == found["samples"]
    assert "samples" not in Artifact(folder).results["eval-calibration-32-9"]
    written = text.read_text()
    places = [written.index(sample["prompt"]) for sample in kept["samples"]]
    assert places == sorted(places)
    assert len(set(places)) == 3
    assert all(len(sample[who]) <= 16 and EOS not in sample[who] for sample in kept["samples"] for who in sample)
    assert any(sample["original"] != sample["written"] for sample in kept["samples"]), "2 bits leave a trace"
    alone = evaluate_text(folder, TextOptions(text=str(text), context_length=32, windows=9, generate=3))["samples"]
    assert alone == [{k: s[k] for k in ("prompt", "written")} for s in kept["samples"]]


def test_the_command_shows_them(llama: Path, text: Path, laconic: Laconic) -> None:
    asked = ("eval", "text", llama, "--text", text, "--context-length", 32, "--windows", 2, "--generate")
    ran = laconic(*asked, 2)
    assert ran.code == 0, ran.err
    assert "prompt" in ran.out
    assert len(json.loads(laconic(*asked, 1, "--json").out)["samples"]) == 1


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (("--generate", 3), "--generate 3 is more than the 2 windows of the text; ask for fewer"),
        (("--generate", 0), "greater than or equal to 1"),
    ],
    ids=str,
)
def test_what_cannot_be_continued(
    llama: Path, text: Path, laconic: Laconic, more: tuple[object, ...], complaint: str
) -> None:
    asked = ("eval", "text", llama, "--text", text, "--context-length", 32, "--windows", 2, *more)
    assert complaint in laconic(*asked).complaint
