"""Text and instructions as token ids: calibration windows, and mixes of datasets for training."""
