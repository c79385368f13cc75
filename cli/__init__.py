"""The command line. Every command imports what it needs inside its function: `--help` never waits for torch."""
