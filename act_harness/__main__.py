"""``python -m act_harness``: the same as the command ``act-harness``."""

from __future__ import annotations

from act_harness.cli.app import main

if __name__ == "__main__":
    main()
