"""Distillation methods, one per file. `base.py` has the interface."""
