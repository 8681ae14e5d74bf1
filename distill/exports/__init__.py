"""A student as it leaves the house: timm folder, model card, ONNX, and what reads them."""
