"""Warnings of experts to which the router sent few calibration tokens."""

from __future__ import annotations

from typing import Any

from laconic.calibrate.observe import no_tokens_error
from laconic.solvers.moments import Moments
from laconic.structure.anatomy import Tap


def check_expert_tokens(block: str, tap: Tap, moments: Moments | None) -> dict[str, Any] | None:
    """Check how many tokens were routed to an expert.

    Args:
        block: Name of the block in the model.
        tap: The tap, of an expert or of all tokens.
        moments: Statistics of its input, if it was observed.

    Returns:
        An event for the log, where they are fewer than a Hessian of full rank needs.

    Raises:
        ValueError: No token was.
    """
    name = f"{block}.{tap.linears[0]}"
    if moments is None or tap.experts is None:
        return None
    if moments.tokens == 0:
        raise no_tokens_error(name)
    return few_tokens(name, moments.tokens, moments.in_features) if moments.gram else None


def few_tokens(name: str, tokens: int, inputs: int) -> dict[str, Any] | None:
    """Return an event for the log where a linear read fewer tokens than it has inputs.

    Args:
        name: Name of the linear in the model.
        tokens: Number of calibration tokens that it read.
        inputs: Number of its inputs.
    """
    if tokens >= inputs:
        return None
    message = f"{name}: {tokens} calibration tokens for {inputs} inputs"
    return {"event": "few_tokens", "linear": name, "tokens": tokens, "message": message}
