"""What a start imports: neither torch nor transformers, which take seconds; artifacts open all the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import laconic as library
from laconic.structure.widths import add_widths

HEAVY = ("torch", "transformers")

# Runs each command in one process, and prints its exit code with those of the heavy modules that it loaded.
RUN_ALL = """
import contextlib, io, json, sys
from importlib.util import _LazyModule

def loaded(name):
    return name in sys.modules and type(sys.modules[name]) is not _LazyModule

heavy, commands = map(json.loads, sys.argv[1:])
results = []
def note(title, code):
    results.append([title, code, [name for name in heavy if loaded(name)]])

import laconic
dir(laconic), laconic.__version__
note("import laconic", 0)
from laconic.cli import main
for arguments in commands:
    sys.argv[:] = ["laconic", *arguments]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            main()
            code = 0
        except SystemExit as exit:
            code = exit.code or 0
    note(" ".join(arguments), code)
print(json.dumps(results))
"""

# Exit code of each command that answers at once.
QUICK = {
    "validate gptq-w4a16": 0,
    "validate gptq-w4a16 --set stages.0.scheme=W4A61": 2,
    "ls": 0,
    "ls gptq": 0,
    "ls gtpq": 2,
    "--help": 0,
    "--version": 0,
    "compress --help": 0,
    "eval --help": 0,
    "bench sparsity --help": 0,
    "compres": 2,
    "ls --jsn": 2,
}


def python(code: str, *arguments: str) -> str:
    """What a program prints."""
    ran = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_a_quick_answer_imports_neither_torch_nor_transformers() -> None:
    commands = [command.split() for command in QUICK]
    results = json.loads(python(RUN_ALL, json.dumps(HEAVY), json.dumps(commands)))
    assert results == [["import laconic", 0, []], *([command, code, []] for command, code in QUICK.items())]


# Prints what `read` returns with stand-ins, whether that loaded torch, and what it returns without stand-ins.
READ_TWICE = """
import json, sys
from laconic.cli.stand_ins import declarations

def read():
    from laconic.recipe import gallery, load_recipe
    from laconic.report.catalogue import catalogue

    from laconic.methods import METHODS

    results = [catalogue(), [[m.__name__, sorted(m.model_fields), sorted(m.__private_attributes__)] for m in METHODS]]
    for recipe in [*gallery(), *json.loads(sys.argv[1])]:
        try:
            results.append(load_recipe(recipe).model_dump(mode="json"))
        except ValueError as e:
            results.append(str(e))
    return results

first = declarations(["laconic.recipe", "laconic.report.catalogue"], read)
loaded = [name for name in sys.modules if name.partition(".")[0] == "torch" or name == "laconic.recipe"]
import torch
print(json.dumps([first, loaded, read()]))
"""

RECIPES = [
    {"stages": [{"method": "gptq", "scheme": "W4A16", "group_size": 48}]},
    {"stages": [{"method": "gptq", "scheme": "FP8_BLOCK", "low_rank": -1}]},
    {"stages": [{"method": "magnitude", "mask_structure": "4:4"}]},
    {"stages": [{"method": "awq", "scheme": "W4A61"}, {"method": "lora", "rank": 4}]},
    {"stages": [{"method": "kivi", "k_bits": 5}]},
    {"stages": [{"method": "gtpq"}]},
    {"stages": []},
]


def test_stand_ins_for_torch_change_nothing() -> None:
    quick, loaded, slow = json.loads(python(READ_TWICE, json.dumps(RECIPES)))
    assert loaded == []
    assert quick == slow


def test_what_stand_ins_cannot_answer_is_read_with_torch_itself() -> None:
    code = """
import sys
from laconic.cli.stand_ins import declarations

def read():
    from laconic.formats import schemes
    import torch
    return str(torch.zeros(2) + len(schemes.PRESETS) * 0)

print(declarations(["laconic.formats.schemes"], read))
"""
    assert python(code) == "tensor([0., 0.])\n"


@pytest.fixture(scope="module")
def native(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact of `quant_method: laconic`, and of `model_type: laconic`."""
    artifact = tmp_path_factory.mktemp("native") / "out"
    library.compress(str(llama), {"stages": [{"method": "rtn", "scheme": "W6A6"}]}, artifact)
    config = artifact / "config.json"
    config.write_text(json.dumps(add_widths(json.loads(config.read_text()), [{}, {"intermediate_size": 128}])))
    return artifact


@pytest.mark.parametrize(
    "imports",
    [
        "import laconic; from transformers import AutoModelForCausalLM",
        "from transformers import AutoModelForCausalLM; import laconic",
    ],
)
def test_transformers_opens_our_artifacts_in_either_order_of_imports(imports: str, native: Path) -> None:
    code = f"""
import sys
{imports}
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(type(model).__name__, type(model.model.layers[0].mlp.up_proj).__name__)
"""
    assert python(code, str(native)).split() == ["LaconicLlamaForCausalLM", "QLinear"]
