"""Runs in Weights & Biases: what is logged, and by whom."""
