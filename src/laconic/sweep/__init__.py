"""A study: one recipe varied along axes, each variant compressed, measured and remembered once."""
