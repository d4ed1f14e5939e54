"""Finding the heads whose calibration helps: exact, fast, resumable, statistically honest."""
