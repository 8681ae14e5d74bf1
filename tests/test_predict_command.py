"""`distill predict` on files, folders, patterns and standard input, for people and for programs."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import distill
from distill.cli import main

CLASSES = list("0123456789")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An export."""
    published = Path(__file__).resolve().parents[1] / "results" / "digits-nano"
    return shutil.copytree(published, tmp_path / "student")


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Four images in folders of two levels, one of them broken, and a text; their paths in order."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos" / "inner").mkdir(parents=True)
    names = ["photos/a.png", "photos/b.PNG", "photos/inner/broken.jpg", "photos/inner/c.webp"]
    for name in names:
        Image.fromarray(np.random.default_rng(len(name)).integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(name)
    Path(names[2]).write_bytes(b"no image")
    Path("photos/notes.txt").write_text("no image either")
    return names


def expected(export: Path, name: str, top: int) -> list[tuple[str, float]]:
    model, transform, labels = distill.load_student(export)
    shares = model(transform(Image.open(name))[None])[0].softmax(-1)
    order = torch.argsort(shares, descending=True)[:top]
    return [(labels[index], shares[index].item()) for index in order.tolist()]


@pytest.mark.parametrize("arguments", [["photos"], ["photos/**/*.*"], ["photos/a.png", "photos/b.PNG", "photos/inner"]])
def test_json_has_a_line_an_image_and_a_broken_one_costs_its_own(
    arguments: list[str],
    folder: Path,
    photos: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["predict", str(folder), *arguments, "--json", "--top", "3", "--batch", "2"]) == 2
    printed = capsys.readouterr()
    lines = [json.loads(line) for line in printed.out.splitlines()]
    assert [line["image"] for line in lines] == photos
    assert printed.err.count("\n") == 1
    assert printed.err.startswith("error: photos/inner/broken.jpg: ")
    for name, line in zip(photos, lines, strict=True):
        if name.endswith("broken.jpg"):
            assert line["classes"] == []
            assert f"error: {line['problem']}\n" == printed.err
            continue
        answers = [(entry["class"], entry["probability"]) for entry in line["classes"]]
        for (label, share), (its_label, its_share) in zip(answers, expected(folder, name, 3), strict=True):
            assert label == its_label
            assert share == pytest.approx(its_share, abs=1e-5)


def test_csv_reads_back(folder: Path, photos: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", str(folder), "photos/a.png", "photos/inner/broken.jpg", "--csv", "--top", "100"]) == 2
    good, broken = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert good["image"] == "photos/a.png"
    assert {good[f"class_{rank}"] for rank in range(1, len(CLASSES) + 1)} == set(CLASSES), "no more than there are"
    assert sum(float(good[f"probability_{rank}"]) for rank in range(1, len(CLASSES) + 1)) == pytest.approx(1, abs=1e-4)
    assert (broken["class_1"], broken["probability_1"]) == ("", "")
    assert "broken.jpg" in broken["problem"]


@pytest.mark.parametrize("given", ["image", "paths"])
def test_standard_input(
    given: str,
    folder: Path,
    photos: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    content = Path(photos[0]).read_bytes() if given == "image" else f"{photos[0]}\n{photos[1]}\n".encode()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert main(["predict", str(folder), "-", "--json", "--top=1"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["image"] for line in lines] == (["image"] if given == "image" else photos[:2])
    assert lines[0]["classes"][0]["class"] == expected(folder, photos[0], 1)[0][0]


def test_paths_that_begin_like_an_image_are_paths(
    folder: Path, photos: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("BMW 1.png", "P5 a.png"):
        Image.open(photos[0]).save(name)
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(f"{name}\n".encode())))
        assert main(["predict", str(folder), "-", "--json", "--top=1"]) == 0
        assert json.loads(capsys.readouterr().out)["image"] == name
    damaged = Path("BMW 1.png").read_bytes()[:40]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(damaged[:8] + bytes(8))))
    assert main(["predict", str(folder), "-"]) == 2
    assert "-: neither an image that can be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["nothing"], "no such file"), (["empty"], "empty: no image files there"), (["*.bmp"], "*.bmp: no image files"),
     (["-"], "standard input is empty")],
)  # fmt: skip
def test_nothing_to_predict_is_one_message(
    arguments: list[str],
    message: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO()))
    assert main(["predict", str(folder), *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("error: ") == printed.err.count("\n") == 1
    assert message in printed.err.lower()


def test_a_run_directory_is_as_good_as_its_export(
    folder: Path,
    photos: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "status.json").write_text("{}")
    folder.rename(run / "export")
    assert main(["predict", str(run), photos[0], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["image"] == photos[0]


@pytest.mark.parametrize("option", ["--top=0", "--batch=-1", "--top=x"])
def test_counts_are_counts(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["predict", "student", "image.png", option])
    assert ended.value.code == 2
    assert option.split("=")[0] in capsys.readouterr().err


def test_the_answer_does_not_depend_on_the_batch(folder: Path, photos: list[str]) -> None:
    from distill.exports.prediction import answers

    loaded = distill.load_student(folder)
    one, many = (list(answers(loaded, photos, batch=size)) for size in (1, 64))
    assert [answer.image for answer in one] == [answer.image for answer in many] == photos
    for a, b in zip(one, many, strict=True):
        assert [label for label, _ in a.classes] == [label for label, _ in b.classes]
        np.testing.assert_allclose([share for _, share in a.classes], [share for _, share in b.classes], atol=1e-6)
