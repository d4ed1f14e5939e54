"""Engines: the calibration operation behind one signature."""
