"""Exported students: timm folder, model card, ONNX, and what reads them."""
