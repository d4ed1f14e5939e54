"""One report over everything that lies on the disk: ``act-harness report RESULTS...``."""
