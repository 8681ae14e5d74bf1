from __future__ import annotations

import subprocess
import sys

import pytest
import timm
from pydantic import ValidationError

import teachers.cifar_resnet
from teachers.zoo import ZOO, ZooEntry


def test_entries_agree_with_their_files_and_with_timm() -> None:
    assert {f"cifar_resnet{depth}" for depth in (20, 32, 44, 56, 110, 1202)} <= ZOO.keys()
    for name, entry in ZOO.items():
        assert entry.sha256 in entry.url.rpartition("/")[2], name
        assert len(entry.mean) == len(entry.std), name
        assert timm.is_model(entry.architecture), name
        assert 50 < entry.accuracy.top1 < 100, name


@pytest.mark.parametrize(
    "wrong",
    [{"sha256": "xyz"}, {"url": "http://insecure/file.th"}, {"num_classes": 0}, {"licence": "MIT"}, {"mean": []}],
)
def test_a_wrong_entry_is_refused(wrong: dict[str, object]) -> None:
    entry = ZOO["cifar_resnet20"].model_dump()
    ZooEntry.model_validate(entry)
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        ZooEntry.model_validate(entry | wrong)


def test_listing_the_zoo_imports_no_torch() -> None:
    code = "import sys, teachers; assert teachers.ZOO; assert not {'torch', 'timm'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_attribute() -> None:
    with pytest.raises(AttributeError, match="load_teachers"):
        teachers.load_teachers  # noqa: B018
