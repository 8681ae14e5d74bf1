"""Process start-up, signals, watching of other ranks, exit codes and exit messages."""
