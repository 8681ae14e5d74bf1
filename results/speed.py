"""Measures what a training step of each arm of a block costs, since runs share their machine with other work.

    python -m results.speed BLOCK [--threads N] [--repetitions N]

The steps of all arms of this block of plan.yaml, teacher, methods and optimizer included, on random images, interleaved
as in `distill bench`, on the CPU. Writes results/speed/BLOCK.json: of each arm its images per second, the student's
parameters and its GFLOPs an image. build.py reads it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from statistics import median

import torch

from distill.bench import arms
from distill.bench.measure import Machine
from distill.environment import describe_environment
from distill.files.text import write_text
from distill.flops import count_flops
from distill.launching.processes import with_precision
from distill.trainer import Trainer
from results.arms import HERE, PLAN, load_arm

FOLDER = HERE / "speed"
CPU = torch.device("cpu")


def main(arguments: list[str] | None = None, *, to: Path = FOLDER) -> int:
    blocks = {block.name: block for question in PLAN.questions for block in question.blocks}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("block", choices=sorted(blocks), help="of plan.yaml")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=7)
    options = parser.parse_args(arguments)
    os.environ["ACCELERATE_USE_CPU"] = "true"
    torch.set_num_threads(options.threads)
    names = list(dict.fromkeys(row[0] for row in blocks[options.block].rows))
    found = measure(names, options.repetitions)
    environment = describe_environment(
        num_processes=1, precision=with_precision(load_arm(names[0], 0)).train.precision, device=CPU,
        threads=options.threads,
    )  # fmt: skip
    machine = {key: environment[key] for key in ("device_name", "threads", "precision", "versions")}
    to.mkdir(exist_ok=True)
    text = json.dumps({"machine": machine, "arms": found}, indent=2)
    write_text(to / f"{options.block}.json", text + "\n")
    print(text)
    return 0


def measure(names: list[str], repetitions: int) -> dict[str, dict[str, float]]:
    """By arm."""
    recipes = {name: with_precision(load_arm(name, 0)) for name in names}
    accelerator = arms.accelerator(recipes[names[0]].train.precision or "fp32")
    trainers = {
        name: arms.build_trainer(recipe, accelerator, arms.build_teacher(20, CPU)) for name, recipe in recipes.items()
    }
    machine = Machine(CPU, (), Path(), recipes[names[0]].train.batch_size, repetitions)
    measured = machine.interleave([arms.steps_of(name, trainer) for name, trainer in trainers.items()])
    return {
        name: {
            "images_per_second": round(1 / median(measured[name]), 1),
            "parameters": sum(parameter.numel() for parameter in trainer.student.parameters()),
            "gflops": round(_flops(trainer) / 1e9, 4),
        }
        for name, trainer in trainers.items()
    }


def _flops(trainer: Trainer) -> int:
    side = trainer.recipe.data.resolution
    return count_flops(trainer.student, torch.zeros(1, 3, side, side))


if __name__ == "__main__":
    sys.exit(main())
