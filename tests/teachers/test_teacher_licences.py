"""Licences of teachers: where they are read, what is said of them, and the list of recommended teachers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch

from teachers import load_teacher
from teachers.licences import Origin, brief, identifier, of_folder, of_hub, remark
from teachers.zoo import RECOMMENDED, ZOO
from tests.conftest import Command


@pytest.mark.parametrize("name", RECOMMENDED)
def test_recommended_teachers_are_as_timm_says(name: str) -> None:
    config = timm.get_pretrained_cfg(name)
    with torch.device("meta"):
        parameters = sum(weight.numel() for weight in timm.create_model(name).parameters())
    found = (config.license, config.num_classes, config.input_size[-1], parameters)
    assert found == tuple(RECOMMENDED[name].model_dump().values())
    assert config.has_weights


@pytest.mark.parametrize(
    ("license", "word", "sentence"),
    [
        ("apache-2.0", "", "the licence of its weights is apache-2.0"),
        ("cc-by-nc-4.0", "non-commercial", "cc-by-nc-4.0, excludes commercial use"),
        ("fair-noncommercial-research-license", "non-commercial", "excludes commercial use"),
        ("apple-amlr", "non-commercial", "excludes commercial use"),
        ("dinov3-license", "its own terms", "dinov3-license, has terms of its own: read them"),
        (None, "unknown", "the licence of its weights is unknown"),
    ],
)
def test_what_licences_allow(license: str | None, word: str, sentence: str) -> None:
    assert brief(license) == word
    assert sentence in remark("t", license)


@pytest.mark.parametrize(
    ("stated", "found"),
    [
        ("BSD-2-Clause", "bsd-2-clause"),
        (" mit ", "mit"),
        ("unknown", None),
        (None, None),
        (["mit"], None),
        ("a b", None),
    ],
)
def test_identifiers(stated: Any, found: str | None) -> None:
    assert identifier(stated) == found


def test_weights_that_are_known_and_others(tmp_path: Path) -> None:
    """A name with a tag is that of certain weights; a file of one's own under any other name may be anything."""
    for name, expected in (
        ("convnextv2_atto.fcmae", Origin("cc-by-nc-4.0", "timm/convnextv2_atto.fcmae")),
        ("convnextv2_atto", Origin()),
        ("cifar_resnet20", Origin()),
    ):
        torch.save(timm.create_model(name, num_classes=5).state_dict(), tmp_path / "w.pth")
        teacher = load_teacher({"model": name, "weights": str(tmp_path / "w.pth"), "size": 32}, 5)
        assert teacher.origins == (expected,)


def test_the_zoos(teacher_weights: Path) -> None:
    spec = {"model": "cifar_resnet20", "weights": str(teacher_weights / "resnet20-12fca82f.th")}
    assert load_teacher([spec, spec], 10).origins == (Origin("bsd-2-clause"),) * 2


@pytest.mark.parametrize(
    ("card", "config", "expected"),
    [
        ("---\nlicense: MIT\nbase_model: timm/a.b\n---\n# A\n", {}, Origin("mit", "timm/a.b")),
        ("---\nlicense: other\nbase_model: [timm/a.b, timm/c]\n---", {}, Origin("other", "timm/a.b")),
        ("# no front matter", {"license": "apache-2.0"}, Origin("apache-2.0")),
        ("---\nlicense: unknown\n---", {}, Origin()),
        ("---\n: [ no yaml\n---", {}, Origin()),
        ("---\nlicense: {a: b}\nbase_model: ../../x y\n---", {}, Origin()),
        (None, {}, Origin()),
    ],
)
def test_folders(tmp_path: Path, card: str | None, config: dict[str, Any], expected: Origin) -> None:
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert of_folder(tmp_path, config) == expected


def test_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    card = huggingface_hub.ModelCard("---\nlicense: cc-by-nc-4.0\n---\n")
    monkeypatch.setattr(huggingface_hub.ModelCard, "load", lambda name: card)
    assert of_hub("a/b@main", {}) == Origin("cc-by-nc-4.0", "a/b")
    assert of_hub("a/b", {"license": "mit"}) == Origin("mit", "a/b")

    def unreachable(name: str) -> None:
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub.ModelCard, "load", unreachable)
    assert of_hub("a/b", {}) == Origin(None, "a/b")


def test_the_list(command: Command) -> None:
    listed = command("teachers")
    assert listed.returncode == 0, listed.stderr
    for name in (*RECOMMENDED, *ZOO):
        assert name in listed.stdout
    assert "dinov3-license" in listed.stdout
    assert "non-commercial" in " ".join(listed.stdout.split())
    one = command("teachers", "convnextv2_atto.fcmae")
    assert one.returncode == 0, one.stderr
    for text in ("cc-by-nc-4.0", "none: for methods on feature maps", "stages.3"):
        assert text in one.stdout
