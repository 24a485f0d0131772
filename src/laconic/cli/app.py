"""The commands of `laconic`, and what becomes of their errors. Exit codes: 0 done, 2 the user's mistake, 1 ours, 130
interrupted."""

from __future__ import annotations

import logging
import os
import signal
import sys
import warnings

import typer

from laconic.cli.bench import bench
from laconic.cli.console import err
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
    help="Compress Hugging Face language models, and say honestly what it cost.",
)
app.add_typer(bench, name="bench")
app.add_typer(profile, name="profile")
# In the order in which `laconic --help` lists them.
app.command()(card)
app.command()(push)
app.command()(compress)
app.command("eval")(evaluate)
app.command()(report)
app.command()(sweep)
app.command()(inspect)
app.command("ls")(list_)
app.command()(validate)


def main() -> None:
    """The entry point: every error of the user's is one line and exit code 2."""
    try:
        _quieten()
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        # Typer catches an interruption itself, and returns the exit code for it.
        if app(standalone_mode=False) == 130:
            raise KeyboardInterrupt
    except (KeyboardInterrupt, typer.Abort):
        err.print("interrupted; run the same command again to go on where it stopped", soft_wrap=True)
        sys.exit(130)
    except ValueError as e:
        _complain(str(e))
    except OSError as e:
        _complain(f"{e.strerror or e}: {e.filename}" if e.filename else str(e))
    except Exception as e:
        if hasattr(e, "format_message"):  # what click says of the command line itself
            _complain(e.format_message() or "name a command")
        err.print_exception()
        sys.exit(1)


def _quieten() -> None:
    """What the libraries below would say is not for the user of a command line."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    for noisy in ("transformers", "huggingface_hub", "datasets", "httpx", "lm_eval"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _complain(message: str) -> None:
    err.print(f"laconic: {' '.join(message.split())}", style="red", highlight=False, soft_wrap=True)
    sys.exit(2)
