"""Text and instructions as token ids: calibration windows, training mixes."""
