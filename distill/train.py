"""What users launch: `accelerate launch distill/train.py RECIPE.yaml [key=value ...] [--resume auto|PATH] [--out DIR]
[--dry-run]`.
"""

from __future__ import annotations

import sys
from pathlib import Path

# Run as a file, Python puts this folder on the path, where module names would shadow other packages.
if sys.path and Path(sys.path[0] or ".").resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from distill.cli import run

if __name__ == "__main__":
    run(["train", *sys.argv[1:]])
