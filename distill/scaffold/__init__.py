"""`distill init`: from a folder of images to a recipe, by rules (docs/reference/init.md) and a few measurements."""
