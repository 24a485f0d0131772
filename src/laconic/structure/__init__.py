"""Parts of a model, found by their structure and not by names: blocks, taps, links, experts, heads, widths."""
