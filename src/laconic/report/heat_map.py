"""Heat maps of needle retrieval as one standalone SVG file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from laconic.report.chart import stacked, standalone
from laconic.report.long_plots import needle_map


def heat_map(result: Mapping[str, Any]) -> str:
    """Draw one heat map per cache of the needles found, by depth and context length.

    Args:
        result: Result of `laconic eval long` with the part `needle`.

    Returns:
        The SVG file.
    """
    return standalone(stacked([needle_map(result, name) for name in result["caches"]]))
