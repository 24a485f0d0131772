"""Running blocks on calibration data: streams, halted passes, observation, attention capture."""
