"""MT-Bench: conversations of two turns (:mod:`.chat`) and their judge (:mod:`.judge`)."""
