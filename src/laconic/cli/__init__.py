"""The command line: thin, one function a command, one module a group of them."""

from laconic.cli.app import main

__all__ = ["main"]
