"""Distil a pretrained CNN into a small vision transformer with area attention and a distillation token."""

__version__ = "0.1.0"
