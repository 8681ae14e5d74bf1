"""Images that a .csv file lists, with the columns path, label and, unless `data.test` is set, split.

Paths are relative to the file's folder. Splits are train, test and val (or validation): with only one of test and
val, it is the test split. Labels are names of classes, sorted, or whole numbers if all are.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, NamedTuple

from distill.data.dataset import Dataset
from distill.data.folder import open_files
from distill.data.image_files import REMEDY, Folder, ImageFiles
from distill.data.labels import Value, check_labelled, encode
from distill.data.opening import DataReader, Opening
from distill.errors import InputError
from distill.recipe import Data
from distill.registry import register

SPLITS = {"train": "train", "training": "train", "val": "validation", "valid": "validation", "dev": "validation",
          "validation": "validation", "test": "test", "testing": "test"}  # fmt: skip


class Options(Data):
    names: ClassVar[Sequence[str]] = (".csv",)


class Row(NamedTuple):
    line: int
    path: str
    label: str
    split: str


@register("datasets", "csv_files", Options)
class CsvReader(DataReader):
    skips_unreadable = True
    has_columns = True

    @classmethod
    def open(cls, options: Data, opening: Opening) -> Dataset:
        return open_files(scan(options), options, opening)


def scan(options: Data) -> Folder:
    """The listed images.

    Raises:
        InputError: names the file, and the line where there is one.
    """
    in_root = Path(options.root) / options.name
    table = in_root if in_root.exists() or not Path(options.name).exists() else Path(options.name)
    left_out: list[str] = []
    rows = _existing(read_rows(table, options), table, options.skip_unreadable, left_out)
    by_split: dict[str, list[Row]] = {"train": []}
    for row in rows:
        by_split.setdefault(row.split, []).append(row)
    if "test" not in by_split and "validation" in by_split and options.test is None:
        by_split["test"] = by_split.pop("validation")
    class_names, labels = encode(_values(by_split), str(table))
    if len(class_names) < 2:
        raise InputError(f"{table}: split train has {len(class_names)} class(es), at least two are needed")
    splits = {}
    for split, of_split in by_split.items():
        if check_labelled(labels[split], f"{table}: split {split}"):
            paths = [row.path for row in of_split]
            splits[split] = ImageFiles(table.parent, paths, labels[split].tolist())
        elif split == "test" and options.test is None:
            raise InputError(f"{table}: split test has no labels; set data.test=0.2 to hold out a fifth of train")
    return Folder(table.parent, class_names, splits, {}, tuple(left_out), table)


def read_rows(table: Path, options: Data) -> list[Row]:
    """The lines of the file, all columns as text."""
    path_column, label_column = options.image_column or "path", options.label_column or "label"
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            file.seek(0)
            reader = csv.DictReader(file, delimiter=max(",;\t", key=first.count), strict=True)
            has = [name for name in reader.fieldnames or () if name]
            wanted = [path_column, label_column, *(["split"] if options.test is None else [])]
            if missing := [name for name in wanted if name not in has]:
                raise InputError(
                    f"{table}: has no column '{missing[0]}', but {', '.join(has) or 'none'}; its first line names the "
                    "columns path, label and split (data.image_column and data.label_column name others; there need be "
                    "no split with data.test)"
                )
            rows = [_row(record, reader.line_num, path_column, label_column, table) for record in reader]
    except FileNotFoundError:
        raise InputError(f"{table}: no such file; put it there, or change data.root or data.name") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{table}: cannot be read as a .csv file in UTF-8 ({error})") from None
    lines: dict[str, int] = {}
    for row in rows:
        if (earlier := lines.setdefault(os.path.normpath(row.path), row.line)) != row.line:
            raise InputError(f"{table}: line {row.line}: {row.path} is in line {earlier} already; remove one of them")
    return rows


def _row(record: Mapping[str, str | None], line: int, path_column: str, label_column: str, table: Path) -> Row:
    path, label, split = (str(record.get(name) or "").strip() for name in (path_column, label_column, "split"))
    if not path or "\0" in path:
        raise InputError(f"{table}: line {line}: has no path; remove the line")
    if split and split.casefold() not in SPLITS:
        raise InputError(f"{table}: line {line}: split '{split}' is none of train, val and test")
    if "split" in record and not split:
        raise InputError(f"{table}: line {line}: has no split; write train, val or test")
    return Row(line, path, label, SPLITS[split.casefold()] if split else "train")


def _existing(rows: list[Row], table: Path, skip: bool, left_out: list[str]) -> list[Row]:
    """The rows whose files exist; the others are appended to `left_out`, or refused."""
    kept = []
    for row in rows:
        if _is_file(table.parent / row.path):
            kept.append(row)
        elif skip:
            left_out.append(f"{table}: line {row.line}: {row.path}: no such file")
        else:
            raise InputError(f"{table}: line {row.line}: {table.parent / row.path}: no such file; {REMEDY}")
    return kept


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # it cannot be reached
        return False


def _values(rows: Mapping[str, Sequence[Row]]) -> dict[str, list[Value]]:
    """Labels by split: numbers if all are whole numbers."""
    labels = {split: [row.label for row in of_split] for split, of_split in rows.items()}
    given = [label for of_split in labels.values() for label in of_split if label]
    numeric = all(re.fullmatch(r"-1|0|[1-9]\d{0,17}", label) for label in given)
    return {
        split: [(int(label) if numeric else label) if label else None for label in of_split]
        for split, of_split in labels.items()
    }
