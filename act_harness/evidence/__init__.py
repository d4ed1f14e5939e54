"""What may be said about results: read, paired, resampled, compared, drawn."""
