"""An interruption at any moment loses nothing: the same command goes on, and ends with the very same bytes."""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

import laconic.artifact.workspace as writer
from artifacts import linear_events
from commands import Laconic
from interruptions import Killed, contents, is_whole
from laconic.artifact.identity import partial_folder
from laconic.artifact.workspace import Workspace
from laconic.pipeline.compression import compress, prepare, run
from tiny import make_model, make_recipe, make_text

RTN = {"method": "rtn", "scheme": "W8A16"}
GPTQ = {"method": "gptq", "scheme": "W4A16", "group_size": 32}
TUNED = {"method": "autoround", "scheme": "W4A16", "group_size": 32, "iters": 3}
ATTENTION, MLP = {"targets": "re:.*self_attn.*"}, {"targets": "re:.*mlp.*"}


@pytest.fixture(scope="module")
def recipe(llama: Path, text: Path) -> dict[str, Any]:
    """One that observes: GPTQ for the blocks, the head rounded."""
    return {
        "model": str(llama),
        "calibration": {"dataset": str(text), "num_calibration_samples": 4, "max_seq_length": 32},
        "stages": [GPTQ, {"method": "rtn", "scheme": "W8A16", "targets": "lm_head", "ignore": []}],
    }


@pytest.fixture(scope="module")
def expected(recipe: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an uninterrupted run makes of it."""
    return contents(compress(recipe=recipe, output=tmp_path_factory.mktemp("expected") / "out").path)


# --- a kill at every moment that matters, one after the other ---


def test_a_kill_in_every_block_changes_nothing(
    recipe: dict[str, Any], expected: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"

    def die_in(block: int) -> Callable[[Mapping[str, Any]], None]:
        def report(event: Mapping[str, Any]) -> None:
            if f"layers.{block}.mlp.down_proj" in event.get("linear", "") or (block, event.get("linear")) == (
                2,
                "lm_head",
            ):
                raise Killed

        return report

    for block in range(3):
        with pytest.raises(Killed):
            compress(recipe=recipe, output=out, report=die_in(block))
        assert not out.exists()
        assert len(list(partial_folder(out).glob("*.safetensors"))) == block
    artifact = compress(recipe=recipe, output=out)
    assert artifact.results["compress"]["resumed_shards"] == 2
    assert contents(out) == expected
    assert is_whole(out)
    assert [(e["linear"], e["shard"]) for e in linear_events(artifact)] == [
        *((f"model.layers.{i}.{n}", i) for i in range(2) for n in LINEARS),
        ("lm_head", 2),
    ]


@pytest.mark.parametrize(
    "stage",
    [
        # How many columns each tap keeps is known only once it is calibrated, or read back.
        {"method": "llm_int8", "threshold": 2.5},
        GPTQ | {"outlier_ratio": 0.05, "low_rank": 3},
        {"method": "gptq", "scheme": "NVFP4A16", "outlier_ratio": 0.05, "low_rank": 3},
    ],
    ids=["llm_int8", "gptq", "fp4"],
)
def test_what_is_kept_beside_the_codes_is_read_back(
    recipe: dict[str, Any], stage: dict[str, Any], tmp_path: Path
) -> None:
    asked = recipe | {"stages": [stage]}
    expected = contents(compress(recipe=asked, output=tmp_path / "expected").path)

    def die(event: Mapping[str, Any]) -> None:
        if event.get("block") == 1:
            raise Killed

    with pytest.raises(Killed):
        compress(recipe=asked, output=tmp_path / "out", report=die)
    artifact = compress(recipe=asked, output=tmp_path / "out")
    assert artifact.results["compress"]["resumed_shards"] == 1
    assert contents(tmp_path / "out") == expected


@pytest.mark.parametrize(
    "stages",
    [
        [{"method": "smoothquant"}, GPTQ | {"asymmetric_calibration": 1.0}],
        [TUNED | ATTENTION, TUNED | MLP],
        [TUNED | ATTENTION, GPTQ | MLP | {"asymmetric_calibration": 1.0}],
        # These are content with the original's activations, but the last to look comes after one that quantizes.
        [RTN | ATTENTION, {"method": "smoothquant"}, RTN | MLP],
        [{"method": "llm_int8"} | ATTENTION, {"method": "llm_int8"} | MLP],
    ],
    ids=lambda stages: "-".join(s["method"] for s in stages),
)
def test_several_stages_of_a_block_go_on_to_the_same_bytes(
    recipe: dict[str, Any], stages: list[dict[str, Any]], tmp_path: Path
) -> None:
    asked = recipe | {"stages": stages}
    expected = contents(compress(recipe=asked, output=tmp_path / "expected").path)

    def die(event: Mapping[str, Any]) -> None:
        if event.get("block") == 1:
            raise Killed

    with pytest.raises(Killed):
        compress(recipe=asked, output=tmp_path / "out", report=die)
    compress(recipe=asked, output=tmp_path / "out")
    assert contents(tmp_path / "out") == expected


LINEARS = [f"self_attn.{n}_proj" for n in "qkvo"] + [f"mlp.{n}_proj" for n in ("gate", "up", "down")]


@contextmanager
def killed_at_rename(number: int, *, after: bool) -> Iterator[None]:
    """Die just before, or just after, the file or folder of this number gets its name."""
    true_rename, count = Path.rename, 0

    def rename(self: Path, target: Path) -> Path:
        nonlocal count
        count += 1
        if count == number and not after:
            raise Killed
        renamed = true_rename(self, target)
        if count == number:
            raise Killed
        return renamed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        yield


@pytest.mark.parametrize(("overwrite", "after"), [(False, True), (True, False), (True, True)])
def test_a_kill_at_any_rename_leaves_the_old_output_or_the_new(
    llama: Path, tmp_path: Path, overwrite: bool, after: bool
) -> None:
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    new = contents(compress(str(llama), {"stages": [RTN]}, tmp_path / "expected").path)
    old = contents(compress(str(llama), {"stages": [RTN | {"ignore": "re:.*down_proj"}]}, tmp_path / "old").path)
    for number in range(1, 100):
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(partial, ignore_errors=True)
        if overwrite:
            shutil.copytree(tmp_path / "old", out)
        try:
            with killed_at_rename(number, after=after):
                compress(str(llama), {"stages": [RTN]}, out, overwrite=overwrite)
            break
        except Killed:
            pass
        there = {name: kept for name, kept in contents(out).items() if not name.startswith(".replaced/")}
        assert there in ({}, old, new)
        assert there or not overwrite or contents(partial / ".replaced") == old
        if there != new:
            compress(str(llama), {"stages": [RTN]}, out, overwrite=overwrite)
            assert contents(out) == new
            assert is_whole(out)
            assert not partial.exists()
    assert 8 < number < 99
    assert contents(out) == new


def test_an_interrupted_run_can_go_on_in_the_same_process(llama: Path, tmp_path: Path) -> None:
    def interrupt(_: Any) -> None:
        raise KeyboardInterrupt

    prepared = prepare(str(llama), {"stages": [RTN]}, tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        run(prepared, report=interrupt)
    assert is_whole(run(prepared).path)


def test_activations_that_spill_to_disk_give_the_same_and_leave_no_file(
    recipe: dict[str, Any], expected: dict[str, bytes], tmp_path: Path
) -> None:
    calibration = recipe["calibration"] | {"max_memory_gb": 1e-6}
    out = compress(recipe=recipe | {"calibration": calibration}, output=tmp_path / "out").path
    assert contents(out) == expected
    assert is_whole(out)


# --- a partial output, and an old one ---


@pytest.fixture
def begun(llama: Path, tmp_path: Path) -> Path:
    """The output of a run that died in its second block; returns where it would have been."""

    def die(event: Mapping[str, Any]) -> None:
        if event.get("block") == 1:
            raise Killed

    with pytest.raises(Killed):
        compress(str(llama), {"stages": [RTN]}, tmp_path / "out", report=die)
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("change", "different"),
    [
        ({"stages": [RTN | {"observer": "mse"}]}, "stages.0.observer"),
        (
            {"stages": [RTN, RTN | {"scheme": "W4A16", "group_size": 32, "targets": "lm_head", "ignore": []}]},
            "stages.1.",
        ),
        ({"seed": 1}, "seed"),
    ],
)
def test_another_recipe_does_not_go_on_with_what_was_begun(
    laconic: Laconic, llama: Path, begun: Path, tmp_path: Path, change: dict[str, Any], different: str
) -> None:
    stages = change.pop("stages", [RTN])
    recipe = make_recipe(tmp_path / "other.yaml", *stages, model=str(llama), output=str(begun), **change)
    before = contents(partial_folder(begun))
    said = laconic("compress", recipe).complaint
    assert said.startswith(f"{begun}.partial was begun with another recipe (different: {different}")
    assert said.endswith("); finish it with that one, choose another output, or pass --overwrite")
    assert contents(partial_folder(begun)) == before
    assert laconic("compress", recipe, "--overwrite").code == 0
    assert is_whole(begun)


def test_another_model_does_not_go_on_with_what_was_begun(laconic: Laconic, begun: Path, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", seed=1)
    recipe = make_recipe(tmp_path / "recipe.yaml", RTN)
    said = laconic("compress", other, "--recipe", recipe, "-o", begun).complaint
    assert "(different: model, source.model, source.sha256)" in said


def test_memory_and_device_may_change_before_going_on(recipe: dict[str, Any], tmp_path: Path) -> None:
    def die(_: Any) -> None:
        raise Killed

    with pytest.raises(Killed):
        compress(recipe=recipe, output=tmp_path / "out", report=die)
    overrides = ["calibration.max_memory_gb=1", "device=cpu"]
    assert is_whole(compress(recipe=recipe, output=tmp_path / "out", overrides=overrides).path)


def test_a_record_that_cannot_be_read_is_another_recipe(laconic: Laconic, llama: Path, begun: Path) -> None:
    (partial_folder(begun) / "recipe.yaml").write_bytes(b"\xff\x00")
    said = laconic("compress", llama, "--recipe", "rtn-w4a16", "--set", "stages.0.group_size=32", "-o", begun).complaint
    assert "was begun with another recipe" in said


def test_overwriting_keeps_the_old_output_until_the_new_one_is_whole(llama: Path, tmp_path: Path) -> None:
    out = compress(str(llama), {"stages": [RTN]}, tmp_path / "out").path
    old = contents(out)

    def look(_: Any) -> None:
        assert contents(out) == old

    compress(str(llama), {"stages": [RTN | {"observer": "mse"}]}, out, overwrite=True, report=look)
    assert contents(out) != old
    assert is_whole(out)
    assert {f.name for f in tmp_path.iterdir()} == {"out"}


def test_an_empty_folder_is_as_good_as_none(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert is_whole(compress(str(llama), {"stages": [RTN]}, tmp_path / "out").path)
    assert {f.name for f in tmp_path.iterdir()} == {"out"}


def test_a_link_is_followed(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert compress(str(llama), {"stages": [RTN]}, tmp_path / "link").path == tmp_path / "real"
    assert is_whole(tmp_path / "link")


def test_one_output_has_one_writer(laconic: Laconic, llama: Path, tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path / "recipe.yaml", RTN)
    arguments = ("compress", llama, "--recipe", recipe, "-o", tmp_path / "out")
    identity = prepare(str(llama), str(recipe), tmp_path / "out").identity
    with Workspace(tmp_path / "out", identity, 3, overwrite=False):
        told = f"another process is writing {tmp_path}/out.partial; wait for it, or choose another output"
        assert laconic(*arguments).complaint == told
        assert laconic(*arguments, "--overwrite").complaint == told
    assert laconic(*arguments).code == 0


# --- a disk that fails ---


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_told_and_the_run_goes_on_when_there_is_space(
    laconic: Laconic, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    arguments = ("compress", llama, "--recipe", make_recipe(tmp_path / "recipe.yaml", RTN), "-o", tmp_path / "out")
    true_save = writer.save_file

    def save(tensors: Any, file: Path, **rest: Any) -> None:
        if "00002" in file.name:
            file.write_bytes(b"half")
            raise error
        true_save(tensors, file, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(writer, "save_file", save)
        said = laconic(*arguments).complaint
    assert said == f"the disk of {tmp_path}/out.partial is full; free some space and run the same command: it resumes"
    assert not list(tmp_path.rglob("*.writing"))
    assert laconic(*arguments).code == 0
    assert is_whole(tmp_path / "out")


def test_a_file_larger_than_the_system_allows_is_told(laconic: Laconic, llama: Path, tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path / "recipe.yaml", RTN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        ran = laconic("compress", llama, "--recipe", recipe, "-o", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert ran.complaint.startswith(f"File too large: {tmp_path}/out.partial/model-00001-of-00003.safetensors")


# --- real processes, really killed ---


def _laconic(arguments: list[str], said: Path, begun: Event) -> None:
    """The body of a child process: the command line, its words in a file."""
    from laconic.cli import main

    with said.open("a") as sys.stdout:
        sys.stderr = sys.stdout
        sys.argv = ["laconic", *arguments]
        signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever the tests were started by
        begun.set()
        main()


@pytest.fixture(scope="module")
def start() -> Callable[..., Any]:
    """Start `laconic ARGUMENTS` in a process of its own, forked from one that has imported everything already, and
    wait until it has begun: a signal before that would hit the tests' own code, not ours."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["laconic.cli", "laconic.pipeline.compression"])

    def begin(said: Path, *arguments: object) -> Any:
        begun = context.Event()
        process = context.Process(target=_laconic, args=([str(a) for a in arguments], said, begun))
        process.start()
        assert begun.wait(120)
        return process

    # The first start imports everything, and would not do to measure how long a run takes.
    finish(begin(Path(os.devnull), "ls"))
    return begin


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and a text that take a second or two to compress."""
    folder = tmp_path_factory.mktemp("larger")
    make_model(folder / "model", hidden_size=128, intermediate_size=256, head_dim=32, num_hidden_layers=3)
    (folder / "text.txt").write_text(make_text(10_000))
    return folder


KILLS = [
    *((GPTQ, how) for how in (signal.SIGINT, signal.SIGKILL, signal.SIGTERM)),
    (GPTQ | {"asymmetric_calibration": 1.0}, signal.SIGKILL),
    ({"method": "gptq", "scheme": "W8A8", "dynamic": False}, signal.SIGKILL),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "how"), KILLS, ids=["SIGINT", "SIGKILL", "SIGTERM", "two streams", "static activations"]
)
def test_a_process_killed_at_random_moments_ends_with_the_same_bytes(
    start: Callable[..., Any], larger: Path, tmp_path: Path, stage: dict[str, Any], how: signal.Signals
) -> None:
    calibration = {"dataset": str(larger / "text.txt"), "num_calibration_samples": 32, "max_seq_length": 128}
    recipe = make_recipe(tmp_path / "recipe.yaml", stage, model=str(larger / "model"), calibration=calibration)
    said, out = tmp_path / "said.txt", tmp_path / "out"

    begun = time.monotonic()
    assert finish(start(said, "compress", recipe, "-o", tmp_path / "expected")) == 0, said.read_text()
    whole_run = time.monotonic() - begun

    moments = random.Random(f"{stage} {how}")
    for _ in range(4):
        process = start(said, "compress", recipe, "-o", out)
        process.join(moments.uniform(0.2, 0.8) * whole_run)
        if process.is_alive():
            os.kill(process.pid, how)
        code = finish(process)
        if out.exists():
            break
        # A signal that comes before Python's handlers are set ends the process as it would any other.
        assert code in (-how, {signal.SIGINT: 130, signal.SIGTERM: 143}.get(how)), said.read_text()
    if not out.exists():
        assert finish(start(said, "compress", recipe, "-o", out)) == 0, said.read_text()
    assert contents(out) == contents(tmp_path / "expected")
    assert is_whole(out)
    assert not partial_folder(out).exists()


@pytest.mark.slow
def test_of_two_processes_at_once_one_writes(start: Callable[..., Any], larger: Path, tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path / "recipe.yaml", RTN, model=str(larger / "model"), output=str(tmp_path / "out"))
    said = [tmp_path / f"said-{i}.txt" for i in range(3)]
    processes = [start(s, "compress", recipe) for s in said]
    assert sorted(finish(p) for p in processes) == [0, 2, 2]
    assert is_whole(tmp_path / "out")
    assert not partial_folder(tmp_path / "out").exists()


def finish(process: Any) -> int:
    process.join(120)
    return int(process.exitcode)
