"""The folder that a compression writes: its workspace, locks, results and size."""
