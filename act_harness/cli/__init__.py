"""Parts of the command line that :mod:`act_harness.cli` puts together."""
