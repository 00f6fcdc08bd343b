"""Layers packed by what a calibration text feeds them with."""
