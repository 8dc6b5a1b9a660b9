"""The lab: offline, on cases with known outcomes. Statistics, calibration, drift, pictures."""
