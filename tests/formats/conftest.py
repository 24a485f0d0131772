"""Hypothesis here draws many small cases, each on a machine that may be busy."""

from hypothesis import settings

settings.register_profile("formats", max_examples=40, deadline=None)
settings.load_profile("formats")
