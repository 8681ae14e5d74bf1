"""One suite a file: `measure(machine)` yields its rows as they are measured."""
