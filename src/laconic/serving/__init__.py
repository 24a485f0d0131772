"""A finished artifact, served. vLLM is imported here and nowhere else."""
