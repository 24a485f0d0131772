"""Model card and data card of an artifact: its sizes, its measurements, and the sources of its texts."""
