"""What a finished artifact costs: perplexity, fidelity to the original, bits and bytes."""
