"""What happens to files on bad disks and in bad transfers."""

from __future__ import annotations

import random
from pathlib import Path


def damage(path: Path, chance: random.Random) -> str:
    """Flip a bit, change a byte, cut off, lengthen, blank a stretch of or delete the file; says what was done."""
    content = bytearray(path.read_bytes())
    how = chance.choice(["bit", "bit", "bit", "byte", "cut", "cut", "longer", "blank", "delete"])
    # Half of it near the beginning, where headers are: a file of tensors is mostly tensors.
    at = chance.randrange(len(content) if chance.random() < 0.5 else min(len(content), 1000))
    if how == "delete":
        path.unlink()
        return f"{path.name} deleted"
    before = bytes(content)
    while bytes(content) == before:
        if how == "bit":
            content[at] ^= 1 << chance.randrange(8)
        elif how == "byte":
            content[at] = chance.randrange(256)
        elif how == "cut":
            del content[at:]
        elif how == "longer":
            content += bytes(chance.randint(1, 100))
        else:
            content[at : at + 64] = bytes(64) if any(content[at : at + 64]) else b"\xff" * 64
    path.write_bytes(content)
    return f"{path.name}: {how} at byte {at} of {len(before)}"
