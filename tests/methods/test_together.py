"""Several methods in one block, one after another: each works beside what the ones before it quantized."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import laconic
from artifacts import Stage, gptq, original, press, quantized_linears, rtn, windows
from laconic.evaluation.fidelity import measure
from tiny import make_model

ATTENTION = "re:.*(self_attn|self_attention).*"
MLP = "re:.*mlp.*"
QKV, Q, O = "re:.*[qkv]_proj", "re:.*q_proj", "re:.*o_proj"


def awq(scheme: str, **keys: Any) -> Stage:
    return {"method": "awq", "scheme": scheme, "group_size": 32, "search_tokens": 128, **keys}


def in_groups(stage: Stage) -> Stage:
    return stage | {"group_size": 32}


SMOOTH: Stage = {"method": "smoothquant"}
LLAMA = {
    "awq behind gptq": [in_groups(gptq("W8A16", targets=ATTENTION)), awq("W8A16", targets=MLP)],
    "awq behind awq": [awq("W8A16", targets=ATTENTION), awq("W8A16", targets=MLP, symmetric=False)],
    "awq behind int8": [rtn("W8A8", targets=ATTENTION), awq("W8A16", targets=MLP)],
    "awq of o behind rtn": [rtn("W8A16", targets=QKV), awq("W8A16", targets=[O, MLP], unlinked="skip")],
    "awq of k and v beside rtn of q": [
        in_groups(rtn("W8A16", targets=Q)),
        awq("W8A16", ignore=["lm_head", Q], unlinked="skip"),
    ],
    "gptq beside rtn": [rtn("W8A16", targets=Q), gptq("W8A16", ignore=["lm_head", Q])],
    "gptq with asymmetric beside rtn": [
        rtn("W8A16", targets=Q),
        gptq("W8A16", ignore=["lm_head", Q], asymmetric_calibration=1.0),
    ],
    "static rtn beside gptq": [
        gptq("W8A8", dynamic=False, targets=Q),
        rtn("W8A8", dynamic=False, ignore=["lm_head", Q]),
    ],
    "autoround beside rtn": [
        rtn("W8A16", targets=Q),
        {"method": "autoround", "scheme": "W8A16", "iters": 2, "ignore": ["lm_head", Q]},
    ],
    "smoothquant between": [rtn("W8A16", targets=ATTENTION), SMOOTH, rtn("W8A8", targets=MLP)],
    "smoothquant beside rtn of q": [rtn("W8A8", targets=Q), SMOOTH, rtn("W8A8", ignore=["lm_head", Q])],
    "gptq with asymmetric behind smoothquant": [SMOOTH, gptq("W8A16", asymmetric_calibration=1.0)],
}
FALCON = {
    "gptq twice": [gptq("W8A16", targets=ATTENTION), in_groups(gptq("W8A16", targets=MLP))],
    "awq behind gptq": [gptq("W8A16", targets=ATTENTION), awq("W8A16", targets=MLP, unlinked="skip")],
    "gptq with asymmetric behind awq": [
        awq("W8A16", targets=ATTENTION, unlinked="skip"),
        gptq("W8A16", targets=MLP, asymmetric_calibration=1.0),
    ],
}


@pytest.mark.parametrize(
    ("arch", "stages"),
    [
        pytest.param(arch, stages, id=f"{arch}, {told}")
        for arch, lists in (("llama", LLAMA), ("falcon", FALCON))
        for told, stages in lists.items()
    ],
)
def test_stages_that_share_a_block_leave_the_model_as_it_was(
    arch: str, stages: list[Stage], text: Path, tmp_path: Path
) -> None:
    folder = make_model(tmp_path / "model", arch)
    compressed = laconic.load(press(folder, tmp_path / "artifact", *stages, text=text).path)
    # Eight bits change next to nothing: whatever else goes wrong is larger.
    assert measure(compressed, windows(folder, text), original(folder)).kl_mean < 0.01
    assert quantized_linears(compressed)


@pytest.mark.parametrize(
    ("stages", "told"),
    [
        (
            [rtn("W8A16", targets=QKV), awq("W8A16", targets=O)],
            "the scale of self_attn.o_proj cannot be moved into what feeds it",
        ),
        ([rtn("W8A8"), SMOOTH], "earlier stages have quantized all that it targets"),
        (
            [rtn("W8A8", targets=[QKV, "re:.*(gate|up)_proj"]), SMOOTH, rtn("W8A8", targets="re:.*(o|down)_proj")],
            "not quantized yet",
        ),
    ],
    ids=["a source of codes", "nothing left", "readers of codes"],
)
def test_scales_that_would_have_to_go_into_codes_are_refused(
    stages: list[Stage], told: str, llama: Path, text: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=told):
        press(llama, tmp_path / "x", *stages, text=text)
    assert not list(tmp_path.iterdir())
