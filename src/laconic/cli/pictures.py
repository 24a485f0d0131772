"""The pictures that `laconic eval` draws into files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from laconic.cli.console import err


def check_picture(file: Path | None) -> None:
    """Check that a picture can be written, before hours of measuring.

    Args:
        file: The file; None passes.

    Raises:
        ValueError: The name does not end in .svg, or the place cannot be written.
    """
    if file is None:
        return
    from laconic.checkpoint.atomic import check_writable

    if file.suffix != ".svg":
        raise ValueError(f"pictures are SVG; give {file} a name that ends in .svg")
    check_writable(file)


def draw_reliability(result: dict[str, Any], file: Path | None) -> None:
    """Draw the reliability diagrams of a result; several go into files with the name of their domain or task.

    Args:
        result: Result of `laconic eval`; a note is printed if it has no diagram.
        file: An SVG file; None draws nothing.
    """
    if file is None:
        return
    from laconic.checkpoint.atomic import created_folder, write_text
    from laconic.evaluation.file_names import slug
    from laconic.report.chart import standalone
    from laconic.report.reliability import reliability_diagrams

    diagrams = reliability_diagrams(result)
    if not diagrams:
        note = "note: no task of several choices was measured, so --reliability has nothing to draw"
        err.print(note, highlight=False)
    with created_folder(file):
        for name, picture in diagrams:
            place = file if len(diagrams) == 1 else file.with_stem(f"{file.stem}-{slug([name])}")
            write_text(place, standalone(picture))


def draw_heat_map(result: dict[str, Any], file: Path | None) -> None:
    """Draw the share of needles found, over length and depth, of a result of `laconic eval long`.

    Args:
        result: The result, with needles.
        file: An SVG file; None draws nothing.
    """
    if file is None:
        return
    from laconic.checkpoint.atomic import created_folder, write_text
    from laconic.report.heat_map import heat_map

    with created_folder(file):
        write_text(file, heat_map(result))
