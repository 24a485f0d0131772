"""What a finished artifact, or a shape, takes: time, bytes, energy."""
