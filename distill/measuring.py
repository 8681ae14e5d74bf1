"""`distill compare --measure`: the costs of all compared networks, in turns on this machine."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from distill.analysis.costs import measure_costs
from distill.console import say
from distill.environment import device_name
from distill.errors import InputError
from distill.exports.folder import load_export
from distill.launching.processes import set_threads, start_processes
from distill.report.comparison import Comparison
from distill.report.networks import TOGETHER, Measurement, on_threads
from distill.report.runs import RunFiles
from distill.students.saved import WEIGHTS_FILE
from distill.teaching.teachers import load_frozen


def measured_together(comparison: Comparison) -> Comparison:
    """The comparison with the costs of its networks, measured once each. A teacher that cannot be loaded is left out,
    which is said.

    Raises:
        InputError: a run has no export or no known recipe, or the students do not take the same images.
    """
    device = start_processes().device
    threads = set_threads()
    models: dict[str, nn.Module] = {}
    sizes: dict[str, int] = {}
    shapes = set()
    for network, (name, kind) in comparison.networks.items():
        run = comparison.runs[name]
        recipe = run.known_recipe
        if recipe is None:
            raise InputError(
                f"{run.path}: its recipe is of another version, so it cannot be measured; leave --measure away."
            )
        if kind == "student":
            student, _ = load_export(run.path / "export")
            models[network] = student
            sizes[network] = (run.path / "export" / WEIGHTS_FILE).stat().st_size
            shapes.add((student.preparation.channels, recipe.data.resolution))
        elif (teacher := _teacher(run)) is not None:
            models[network] = teacher
    if len(shapes) != 1:
        raise InputError("--measure: the runs have images of different shapes, whose speeds are not to be compared.")
    ((channels, side),) = shapes
    image = torch.rand((1, channels, side, side), generator=torch.Generator().manual_seed(0)).to(device)
    say(f"measuring {len(models)} networks, one after the other in five rounds")
    costs = measure_costs({network: model.to(device).eval() for network, model in models.items()}, image)
    for network, size in sizes.items():
        costs[network]["bytes"] = size
    words = on_threads(device_name(device), threads if device.type == "cpu" else None)
    return replace(comparison, measured=(Measurement(TOGETHER, words, costs), *comparison.measured))


def _teacher(run: RunFiles) -> nn.Module | None:
    assert run.known_recipe is not None
    if not run.known_recipe.teachers:
        return None
    try:
        return load_frozen(run.known_recipe, len(run.class_names), run.class_names)
    except InputError as error:
        say(f"the teacher of {run.path} is not measured: {error}")
        return None
