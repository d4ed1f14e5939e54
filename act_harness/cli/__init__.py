"""The command line: :mod:`act_harness.cli.app` and one file a command."""
