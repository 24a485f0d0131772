"""Spellings of `laconic eval` without the name of a command.

`laconic eval MODEL` stays short for `laconic eval text MODEL`. The spellings of 0.1, when one command measured all,
run for one more release, with a hint that has the new command.
"""

from __future__ import annotations

import shlex
import sys
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from typer.core import TyperGroup

from laconic.cli.console import err

# Options without a value; all others of 0.1 had one.
_FLAGS = ("--json", "--help")
# Options that a plain `laconic eval MODEL` never had.
_COMMANDS = {
    **dict.fromkeys(("--limit", "--fewshot", "--batch-size", "--tasks-data", "--data"), "tasks"),
    **dict.fromkeys(("--kv", "--lengths", "--depths", "--trials", "--prompt", "--chunk"), "long"),
    **dict.fromkeys(("--measure", "--heat-map"), "long"),
}
_RENAMED = {"--tasks-data": "--data"}


class EvalGroup(TyperGroup):
    """The commands of `laconic eval`, and the spellings without one."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] != "--help" and not self._is_typo(args):
            args = _translate(args)
        return super().parse_args(ctx, args)

    def _is_typo(self, args: list[str]) -> bool:
        """Return whether the first argument is a command with a typing error rather than a model."""
        first = args[0]
        is_model = first.startswith("-") or "/" in first or Path(first).exists()
        return not is_model and bool(get_close_matches(first, self.commands, cutoff=0.7))


def _translate(args: list[str]) -> list[str]:
    """Return the arguments with the name of their command; print a hint unless that is `text`.

    Raises:
        ValueError: They name several commands, or an option of another one.
    """
    models, options = _split(args)
    names = [name for name, _ in options]
    values = {name: value or "" for name, value in options}
    suite, tasks = values.get("--suite"), values.get("--tasks")
    if suite not in (None, "long", "standard"):
        raise ValueError(f"--suite {suite} is not known; there are 'laconic eval long' and 'laconic eval tasks'")
    kinds = {"--domain": "domains", "--tasks": "tasks", "--suite": "long" if suite == "long" else "tasks"}
    commands = {kinds[name] for name in names if name in kinds}
    if suite == "long" and (parts := values.get("--measure", "")):
        commands = _long_commands(parts.split(","), models, commands)
    if not commands:
        for name in names:
            if name in _COMMANDS:
                command = _COMMANDS[name]
                raise ValueError(f"{name} is an option of 'laconic eval {command}'; see laconic eval {command} --help")
        return ["text", *args]
    if len(commands) > 1 or (suite == "standard" and tasks is not None):
        spelled = " and ".join(f"'laconic eval {command}'" for command in sorted(commands))
        raise ValueError(f"--domain, --tasks and --suite are commands of their own; run {spelled}, each by itself")
    (command,) = commands
    renamed = _RENAMED | ({"--lengths": "--context-length"} if command == "longbench" else {})
    positional = [value or "" for name, value in options if name == "--domain"]
    positional += [tasks] if tasks is not None else ["standard"] if suite == "standard" else []
    dropped = (*kinds, "--measure") if command == "longbench" else tuple(kinds)
    eval_options = [(renamed.get(name, name), value) for name, value in options if name not in dropped]
    new = [command, *models, *positional, *(part for option in eval_options for part in option if part is not None)]
    print_hint(["laconic", "eval", *new])
    # What a result records of its command stays right.
    sys.argv[1:] = ["eval", *new]
    return new


def _long_commands(parts: list[str], models: list[str], commands: set[str]) -> set[str]:
    """Return the command of `--suite long --measure PARTS`, in which LongBench could be mixed with others."""
    if "longbench" not in parts:
        return commands
    others = ",".join(part for part in parts if part != "longbench")
    if others:
        model = shlex.join(models)
        raise ValueError(
            "LongBench has a command of its own; run 'laconic eval longbench "
            f"{model}' with its options, and 'laconic eval long {model} --measure {others}'"
        )
    return commands - {"long", "tasks"} | {"longbench"}


def _split(args: list[str]) -> tuple[list[str], list[tuple[str, str | None]]]:
    """Return the arguments that are no options, and the options with their values."""
    positional: list[str] = []
    options: list[tuple[str, str | None]] = []
    rest = iter(args)
    for argument in rest:
        name, equals, value = argument.partition("=")
        if not argument.startswith("--"):
            positional.append(argument)
        elif name in _FLAGS:
            options.append((name, None))
        else:
            options.append((name, value if equals else next(rest, None)))
    return positional, options


def print_hint(command: list[str]) -> None:
    """Print the new spelling of a command on stderr.

    Args:
        command: The present spelling, in parts of a shell command.
    """
    err.print(f"hint: this is now: {shlex.join(command)}", style="yellow", highlight=False, soft_wrap=True)
