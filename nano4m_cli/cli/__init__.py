"""The command line: one file per command; normalise, one core call, show, exit code. Nothing heavy is imported here."""
