"""From effects of heads to a chosen head set and what may be claimed of it."""
