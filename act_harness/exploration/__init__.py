"""Look at calibrated attention: maps of heads, their effects on one document, and sinks."""
