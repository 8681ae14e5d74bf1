"""Distillation methods, one a file: its options, its formula and its paper. `base.py` says what a method is given."""
