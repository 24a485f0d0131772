"""The parts of a model, found by structure and not by name: blocks, taps, links, experts, heads, widths."""
