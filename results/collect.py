"""Copies what results/README.md is built from out of finished runs: their small files, without a word of the machine.

    python -m results.collect DIR [DIR ...]

Every finished run anywhere under the folders, controls and teachers among them, that is a cell of plan.yaml goes to
results/runs/<arm>-<seed>/. A cell that is there already stays as it is. Of a run this keeps the resolved recipe,
status and environment without paths, host and commands of the machine; the metrics, one line of training an epoch and
at most thirty epochs; and the test set's logits in float16, which decide as the original ones do. A teacher's logits
are kept once.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray

from distill.errors import InputError
from distill.files.tensors import write_tensors
from distill.files.text import write_text
from distill.report.runs import Record, RunFiles, read_run
from distill.run import is_finished, read_recipe
from results.arms import HERE, all_cells, identity, load_arm

COLLECTED = HERE / "runs"
TEACHERS = "teachers"
MOST_EPOCHS = 30
STATUS = ("state", "reason", "step", "epoch", "metrics", "parameters", "data_digest", "exported")
ENVIRONMENT = ("python", "versions", "commit", "processes", "precision", "device", "device_name", "threads", "cores")
PIXELS = ("images", "correct")
"""What an analysis says of votes on raw pixels: metrics of the status."""
EVENTS = ("start", "preflight", "epoch", "resume", "control")
"""Kept as they are, beside those of training and evaluation, which are thinned."""
MEANS = re.compile(r"loss.*|lr|images_per_second|data_wait")


def main(arguments: Sequence[str] | None = None, *, to: Path = COLLECTED) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="folders with run directories")
    try:
        collect(parser.parse_args(arguments).folders, to)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def collect(folders: Sequence[Path], to: Path) -> None:
    """Copy all cells under `folders` that `to` has not yet, and say what became of every finished run."""
    names = {identity(load_arm(arm, seed)): f"{arm}-{seed}" for arm, seed in all_cells()}
    for path in sorted({status.parent for folder in folders for status in folder.rglob("status.json")}):
        try:
            if not is_finished(path):
                print(f"{path}: not finished, left out")
                continue
            name = names.get(identity(read_recipe(path)))
            if name is None:
                print(f"{path}: no cell of plan.yaml, left out")
            elif (to / name).exists():
                print(f"{path}: {name} is there already")
            else:
                copy(read_run(path), to, name)
                print(f"{path}: {name}")
        except InputError as error:
            print(f"{path}: left out: {error}")


def copy(run: RunFiles, to: Path, name: str) -> None:
    """One run's small files to the folder `name` in `to`, all of them or none."""
    folder, new = to / name, to / f".{name}.tmp"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    recipe = read_recipe(run.path)
    raw = portable(recipe.model_dump(mode="json"))
    raw["data"]["root"] = "data"
    for teacher in raw["teacher"] if isinstance(raw["teacher"], list) else [raw["teacher"]]:
        if teacher is not None and teacher["model"] is not None:
            teacher["weights"] = None  # those of its name; status.json has the hash
    write_text(new / "resolved.yaml", yaml.safe_dump(raw, sort_keys=False, allow_unicode=True))
    status = {key: run.status[key] for key in STATUS if key in run.status}
    weights = {Path(key).name: digest for key, digest in run.status.get("teacher_weights", {}).items()}
    status |= {"teacher_weights": weights, "training_seconds": run.training_seconds}
    if run.analysis is not None and (pixels := run.analysis.values.get("pixels")) is not None:
        status["metrics"] = {**(status.get("metrics") or {}), **{f"pixels/{key}": pixels[key] for key in PIXELS}}
    _write_json(new / "status.json", portable(status))
    environment = {key: run.environment[key] for key in ENVIRONMENT if key in run.environment}
    _write_json(new / "environment.json", portable(environment))
    lines = [json.dumps(portable(_rounded(line))) + "\n" for line in thinned(run.events, run.status.get("exported"))]
    write_text(new / "metrics.jsonl", "".join(lines))
    _write_predictions(run, to, new / "predictions.safetensors")
    new.rename(folder)


def _write_json(path: Path, value: Record) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")


def _write_predictions(run: RunFiles, to: Path, path: Path) -> None:
    labels = torch.from_numpy(run.predictions.labels.astype(np.uint8))
    fused = torch.from_numpy(halved(run.predictions.logits["student.fused"]))
    write_tensors(path, {"labels": labels, "student.fused": fused}, {})
    teacher = run.predictions.logits.get("teacher")
    digest = teacher_of(run)
    if teacher is not None and digest is not None and not (to / TEACHERS / f"{digest}.safetensors").exists():
        (to / TEACHERS).mkdir(exist_ok=True)
        logits = torch.from_numpy(halved(teacher))
        write_tensors(to / TEACHERS / f"{digest}.safetensors", {"labels": labels, "student.fused": logits}, {})


def teacher_of(run: RunFiles) -> str | None:
    """The first digits of the SHA-256 of its teacher's weights."""
    found = [event["teacher_sha256"] for event in run.events if "teacher_sha256" in event]
    return found[0][:16] if found else None


def halved(logits: NDArray[Any]) -> NDArray[np.float16]:
    """As float16, with the same decisions: where rounding makes the largest two of a row equal, the larger one gets the
    next larger number.
    """
    half = logits.astype(np.float16)
    rows, best = np.arange(len(logits)), logits.argmax(axis=1)
    wrong = half.argmax(axis=1) != best
    half[rows[wrong], best[wrong]] = np.nextafter(half[rows[wrong], best[wrong]], np.float16(np.inf))
    assert np.array_equal(half.argmax(axis=1), best)
    return half


def thinned(events: Sequence[Record], exported: Record | None = None) -> list[dict[str, Any]]:
    """The lines to keep, in their order: of training one for every k-th epoch and the last, with its means; evaluations
    of the same epochs, of the test set, and of what was `exported`.
    """
    whole = [event for event in events if event.get("event") == "train"]
    epochs = sorted({_epoch(event) for event in whole})
    step = -(-len(epochs) // MOST_EPOCHS) or 1
    kept = {*epochs[step - 1 :: step], *epochs[-1:]}
    last = {_epoch(event): index for index, event in enumerate(events) if event.get("event") == "train"}
    found = []
    for index, event in enumerate(events):
        kind = event.get("event")
        if kind in EVENTS and (kind != "epoch" or _epoch(event) == 0 or _epoch(event) in kept):
            found.append(dict(event))
        elif kind == "train" and _epoch(event) in kept and last[_epoch(event)] == index:
            found.append(_mean([other for other in whole if _epoch(other) == _epoch(event)]))
        elif kind == "eval" and (event.get("split") == "test" or _epoch(event) in kept or is_chosen(event, exported)):
            found.append(dict(event))
    return found


def _epoch(event: Record) -> int:
    """What is logged at 2.3 and at 3.0 belongs to the third."""
    return int(np.ceil(event["epoch"]))


def is_chosen(event: Record, exported: Record | None) -> bool:
    """Whether this is the evaluation, on the split that checkpoints are chosen on, of what was exported."""
    if exported is None or (event.get("event"), event.get("split")) != ("eval", "validation"):
        return False
    return event.get("step") == exported.get("step") and event.get("weights") == exported.get("weights")


def _mean(lines: Sequence[Record]) -> dict[str, Any]:
    """One line in the place of all of an epoch: what was measured is averaged, the rest is the last one's."""
    last = dict(lines[-1])
    for key in last:
        if MEANS.fullmatch(key):
            values = [line[key] for line in lines if isinstance(line.get(key), int | float)]
            last[key] = float(np.mean(values)) if values else last[key]
    return last


def _rounded(line: Mapping[str, Any]) -> dict[str, Any]:
    """Six digits of what was measured; the time to the tenth of a second."""
    rounded = {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in line.items()}
    return rounded | ({"time": round(line["time"], 1)} if "time" in line else {})


def portable(value: Any) -> Any:
    """Plain data without paths of a machine: of one that does not lie within the project its last part is left."""
    if isinstance(value, Mapping):
        return {key: portable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [portable(item) for item in value]
    return _PATH.sub(lambda match: match["last"], value) if isinstance(value, str) else value


_PATH = re.compile(r"""(?:^|(?<=[\s'"=:,(]))(?:~|\.\.)?/(?:[^/\s'",]+/)*(?P<last>[^/\s'",]+)""")


if __name__ == "__main__":
    sys.exit(main())
