"""The run directory of a launch, and checks that a resumed run has the same recipe, data, teachers and plugins."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from distill import checkpoint, run
from distill.data import Dataset
from distill.errors import InputError
from distill.given import Given
from distill.launching.processes import on_main
from distill.recipe import Recipe


@dataclass(frozen=True)
class RunLocation:
    """Directory of a run, and the checkpoint to continue from, if any."""

    directory: Path
    checkpoint: Path | None = None
    resumed: bool = False
    named: bool = False
    """Whether the user named this checkpoint."""
    analysed: bool = True
    """Whether the report needs an analysis; none shows a teacher's own run."""


def locate(recipe: Recipe, out: Path | None, resume: str | None, given: Given) -> RunLocation:
    """The run directory, and the checkpoint to continue from.

    Raises:
        InputError: the directory exists, is finished, in use or of another recipe, or there is nothing to resume.
    """
    if resume is None:
        directory = out or run.new_path(recipe)
        run.check_new(directory)
        return RunLocation(directory)
    if resume == "auto":
        directory = out or run.newest_unfinished(recipe) or run.new_path(recipe)
        if not run.read_status(directory):
            run.check_new(directory)
    else:
        target = Path(resume).resolve()
        directory = resumed_directory(out, resume) or target
        if not target.is_dir() or not run.read_status(directory):
            raise InputError(f"--resume {resume}: neither a run directory nor a checkpoint in one.")
        if out is not None and out.resolve() != directory:
            raise InputError(f"--out {out}: a resumed run stays in its directory, {directory}. Leave out --out.")
        if directory != target:
            check_given(directory, given)
            run.check_resumable(directory, recipe)
            checkpoint.verify(target)
            return RunLocation(directory, target, resumed=True, named=True)
    return newest_location(directory, recipe, given)


def newest_location(directory: Path, recipe: Recipe, given: Given) -> RunLocation:
    """The newest checkpoint of the run at `directory`, or its beginning if there is none.

    Raises:
        InputError: it cannot be continued.
    """
    if not run.read_status(directory):
        return RunLocation(directory)
    check_given(directory, given)
    run.check_resumable(directory, recipe)
    return RunLocation(directory, checkpoint.newest_intact(directory / "checkpoints"), resumed=True)


def resumed_directory(out: Path | None, resume: str | None) -> Path | None:
    """The run that --out and --resume name; None: determined by the recipe, or a new run."""
    if resume in (None, "auto"):
        return out if resume else None
    target = Path(str(resume)).resolve()
    return target.parent.parent if target.parent.name == "checkpoints" else target


def check_given(directory: Path | None, given: Given) -> None:
    """Raise InputError if the run at `directory` began with Python objects that are not given now."""
    if directory is not None and (directory / "resolved.yaml").exists():
        given.check_all_there(run.read_recipe(directory), directory)


def check_data(location: RunLocation, dataset: Dataset) -> None:
    """Raise InputError if a resumed run began on other data."""
    status = on_main(lambda: run.read_status(location.directory))
    if location.resumed and status.get("data_digest") not in (None, dataset.info.digest):
        raise InputError(
            f"{location.directory}: this run began on other data than those of data.root and data.name now."
        )
    if location.resumed and status.get("unlabelled_digest") not in (None, dataset.info.unlabelled_digest):
        raise InputError(f"{location.directory}: this run began with other images than those of data.unlabelled now.")
    counted = dict(zip(dataset.info.class_names, dataset.info.class_images, strict=False))
    if location.resumed and status.get("class_images", counted) != counted:
        raise InputError(f"{location.directory}: this run began with other training images of each class than now.")


def check_variants(location: RunLocation, variants: dict[str, str]) -> None:
    """Raise InputError if a resumed run began with other plugin code."""
    began_with = (
        on_main(lambda: run.read_environment(location.directory).get("variants", {})) if location.resumed else variants
    )
    for name in sorted({*began_with, *variants}):
        if began_with.get(name) != variants.get(name):
            raise InputError(
                f"{location.directory}: began with {name} from {began_with.get(name, 'this package')}, and this is "
                f"{variants.get(name, 'built in')}. Give the plugin as it was, or start a new run with another --out."
            )


def check_initial_weights(location: RunLocation, weights: dict[str, str]) -> None:
    """Raise InputError if a resumed run's student began with other weights of its pretraining."""
    began_with = on_main(lambda: run.read_status(location.directory).get("initial_weights"))
    if location.resumed and began_with not in (None, weights):
        where = next(iter({**weights, **began_with}))
        raise InputError(
            f"{where}: these weights are not those that the student of {location.directory} began with: their SHA-256 "
            "differs. Put the earlier ones back, or start a new run with another --out."
        )


def check_teacher(location: RunLocation, weights: dict[str, str]) -> None:
    """Raise InputError if a resumed run began with other teacher weights, by the digests in its status."""
    began_with = on_main(lambda: run.read_status(location.directory).get("teacher_weights", {}))
    for where, digest in weights.items() if location.resumed and began_with else ():
        if digest not in began_with.values():  # a file may have been moved
            raise InputError(
                f"{where}: these teacher weights are not those that {location.directory} began with: their SHA-256 "
                "differs. Put the earlier ones back, or start a new run with another --out."
            )
