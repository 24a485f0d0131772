"""Quality of a finished artifact: perplexity, fidelity to the original, tasks, and long contexts through a cache."""
