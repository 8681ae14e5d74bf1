"""Sweeps: many runs of one recipe under other keys and seeds, searched by Optuna, ranked on validation. No torch."""
