"""Catalogue of methods, schemes and recipes, read from the code."""

from __future__ import annotations

import inspect

from laconic.formats.schemes import PRESETS, Scheme
from laconic.formats.support import tried_in
from laconic.methods import METHODS
from laconic.recipe import gallery


def catalogue() -> dict[str, list[dict[str, str]]]:
    """Return the tables of methods, schemes and recipes, as rows of text by column."""
    return {
        "methods": [
            {
                "name": m.model_fields["method"].default,
                "scope": m.scope,
                "about": _first_line(inspect.getmodule(m)),
            }
            for m in METHODS
        ],
        "schemes": [
            {
                "name": s.name,
                "weights": _weights(s),
                "activations": _activations(s),
                "tried in": tried_in(s.name),
            }
            for s in PRESETS.values()
        ],
        "recipes": [
            {"name": name, "about": file.read_text().splitlines()[0].removeprefix("# ")}
            for name, file in gallery().items()
        ],
    }


def support_matrix() -> str:
    """Return the schemes as a Markdown table."""
    rows = catalogue()["schemes"]
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    return "\n".join(lines + ["| " + " | ".join(r.values()) + " |" for r in rows])


def _weights(scheme: Scheme) -> str:
    return f"{scheme.weights.title}, {scheme.weights.granularity}"


def _activations(scheme: Scheme) -> str:
    acts = scheme.input_activations
    if acts is None:
        return "16 bit"
    timing = {True: "dynamic", False: "static", "local": "dynamic in a static range"}[acts.dynamic]
    # Activations are always symmetric.
    return f"{acts.format.title}, {timing}, {acts.format.granularity.removeprefix('symmetric, ')}"


def _first_line(module: object) -> str:
    return (inspect.getdoc(module) or "").splitlines()[0]
