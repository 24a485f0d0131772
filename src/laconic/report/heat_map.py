"""Needles found, as a picture: an SVG file that needs nothing to be drawn or read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from laconic.report.chart import stacked, standalone
from laconic.report.long_plots import needle_map


def heat_map(result: Mapping[str, Any]) -> str:
    """Of a result of `laconic eval --suite long` that has needles, one map a cache: depth by length, in each cell how
    many were found."""
    return standalone(stacked([needle_map(result, name) for name in result["caches"]]))
