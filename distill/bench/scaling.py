"""What cannot be measured on one machine: how training grows with the number of GPUs, computed from volumes and rates.

Data parallelism adds one all-reduce of the gradients to a step. A ring moves 2 (n - 1) / n of their bytes through every
GPU (Patarasuk and Yuan 2009, section 3), and at worst none of that hides behind the backward pass.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from distill.bench.flops import TRAINING, cifar_resnet_forward, vit_forward
from distill.recipe import from_mapping
from distill.students import build_student

GPUS = (2, 4, 8, 16, 32, 64)
GPUS_A_NODE = 8


@dataclass(frozen=True)
class Assumptions:
    """Of one GPU and of what connects it to the others; none of them was measured here."""

    flop_per_second: float = 100e12
    """Of a step: some 15 % of an H200-class GPU's dense bf16 rate."""
    bytes_per_second_within_node: float = 200e9
    """NVLink class."""
    bytes_per_second_between_nodes: float = 25e9
    """One 200 Gbit/s network card for each GPU."""
    images_per_gpu: int = 1024
    bytes_per_gradient: int = 4


def computed() -> dict[str, Any]:
    """Speed of vit_tiny/4 at 32 px under a ResNet-56 on 2 to 64 GPUs, in multiples of one GPU's."""
    assumptions = Assumptions()
    student = from_mapping({"student": {"model": "vit_tiny", "patch_size": 4}}, source="bench").student
    model = build_student(student, resolution=32, num_classes=10, channels=3, mean=(0.5,) * 3, std=(0.5,) * 3, seed=0)
    gradients = assumptions.bytes_per_gradient * sum(parameter.numel() for parameter in model.parameters())
    image = TRAINING * vit_forward(student, resolution=32, num_classes=10) + cifar_resnet_forward(56)
    step = assumptions.images_per_gpu * image / assumptions.flop_per_second
    rows = []
    for gpus in GPUS:
        bandwidth = (
            assumptions.bytes_per_second_within_node
            if gpus <= GPUS_A_NODE
            else assumptions.bytes_per_second_between_nodes
        )
        reduce = 2 * (gpus - 1) / gpus * gradients / bandwidth
        share = reduce / (step + reduce)
        rows.append({"gpus": gpus, "speed": gpus * (1 - share), "all_reduce_share": share})
    return {"what": "vit_tiny/4 under ResNet-56, 32 px", "assumptions": asdict(assumptions), "rows": rows}
