"""From a recipe to an artifact: checks, steps, provenance."""
