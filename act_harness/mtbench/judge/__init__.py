"""The judge of MT-Bench: prompts, client, ledger, scores and tables."""
