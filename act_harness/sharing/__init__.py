"""Artifacts on the model hub: their card, and the commit that brings both there."""
