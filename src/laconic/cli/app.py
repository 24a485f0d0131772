"""The commands of `laconic` and their exit codes.

0: done. 1: a bug, with a traceback. 2: a mistake of the user, with one line that names the fix. 130: interrupted.
The modules of commands import only what describes their options; each command imports its implementation, and with it
torch and transformers, when it is called. `laconic --help` answers at once (`benchmarks/startup.py`).
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import warnings
from typing import Annotated, Any

import typer

from laconic.cli.bench import bench
from laconic.cli.console import err, out
from laconic.cli.dequantize import dequantize
from laconic.cli.evaluate import evaluate
from laconic.cli.profile import profile
from laconic.cli.publishing import card, push
from laconic.cli.recipes import compress, list_, validate
from laconic.cli.report import inspect, report
from laconic.cli.sweep import sweep

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Compress Hugging Face language models, and measure what it costs.",
)


def _print_version(value: bool) -> None:
    if value:
        from laconic import __version__

        out.print(f"laconic {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Take the options that stand before a command."""


app.add_typer(evaluate, name="eval")
app.add_typer(bench, name="bench")
app.add_typer(profile, name="profile")
# In the order in which `laconic --help` lists them, groups last.
app.command()(compress)
app.command()(dequantize)
app.command()(validate)
app.command("ls")(list_)
app.command()(inspect)
app.command()(report)
app.command()(sweep)
app.command()(card)
app.command()(push)


def main() -> None:
    """Run the command line."""
    try:
        _quieten()
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        # Typer catches an interruption itself, and returns the exit code for it.
        if app(standalone_mode=False) == 130:
            raise KeyboardInterrupt
    except (KeyboardInterrupt, typer.Abort):
        err.print("interrupted; run the same command again to resume", soft_wrap=True)
        sys.exit(130)
    except ValueError as e:
        _fail(str(e))
    except OSError as e:
        _fail(f"{e.strerror or e}: {e.filename}" if e.filename else str(e))
    except Exception as e:
        if hasattr(e, "format_message"):  # an error in the command line itself
            _fail(_usage(e))
        err.print_exception()
        sys.exit(1)


def _usage(error: Any) -> str:
    """Return what is wrong with a command line, and where its options are described."""
    message = error.format_message() or "name a command"
    context = getattr(error, "ctx", None)
    if context is None or "Did you mean" in message:
        return str(message)
    return f"{message.removesuffix('.')}; see '{context.command_path} --help'"


def _quieten() -> None:
    """Hide warnings and progress bars of libraries, which a user of the command line cannot act on."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    for library in ("transformers", "huggingface_hub", "datasets", "httpx", "lm_eval"):
        logging.getLogger(library).setLevel(logging.ERROR)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _fail(message: str) -> None:
    err.print(f"laconic: {' '.join(message.split())}", style="red", highlight=False, soft_wrap=True)
    sys.exit(2)
