"""Start-up of processes, signals, the other processes of a launch, exit codes and exit messages."""
