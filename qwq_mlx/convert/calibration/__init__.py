"""Which input channels matter, measured by running a calibration text through the source."""
