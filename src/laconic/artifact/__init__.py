"""The folder that a compression writes: workspace, results, sizes."""
