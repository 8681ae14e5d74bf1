"""Labelled and unlabelled images in one batch: which ones, in which order, and what is refused."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from distill.data import Batch, BatchPlan, Dataset, open_dataset
from distill.data.facts import facts
from distill.data.given import GivenData
from distill.data.packed import write_packed
from distill.data.unlabelled import Layout, MixedDataset, count_leaks, warn_of_leaks
from distill.errors import InputError
from distill.recipe import Data, from_mapping
from tests.data.test_dataset import assert_same, joined

CPU = torch.device("cpu")
AUGMENT = {"crop_padding": 1, "hflip": True, "mixup": 0.8}


def write(root: Path, images: Tensor, **splits: int) -> None:
    """A packed dataset of four classes in turn, with these numbers of images of each split, one after the other."""
    tensors, at = {}, 0
    for split, size in splits.items():
        tensors[f"{split}.images"], at = images[at : at + size], at + size
        tensors[f"{split}.labels"] = torch.arange(size) % 4
    write_packed(root / "set.safetensors", name="set", class_names=("a", "b", "c", "d"), tensors=tensors)


def pictures(number: int, seed: int = 0, shape: tuple[int, int, int] = (3, 6, 6)) -> Tensor:
    return torch.randint(0, 256, (number, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path, pictures(120), train=80, test=40)
    return tmp_path


def packed(root: Path, **keys: Any) -> Data:
    return Data(name="set.safetensors", root=str(root), resolution=6, **{"validation": 0.0, **keys})


def opened(spec: Data, **arguments: Any) -> Dataset:
    return open_dataset(spec, seed=5, device=CPU, **arguments)


@pytest.fixture(params=["labelled", "file", "folder", "streams"])
def mixed(request: pytest.FixtureRequest, root: Path, make_folder: Any) -> Data:
    """20 labelled images (in the last case 30) and 60 unlabelled ones, in each form."""
    if request.param == "labelled":
        return packed(root, labelled=20, augment=AUGMENT)
    if request.param == "file":
        write(root, pictures(60), train=20, test=40)
        save_file({"images": pictures(60, seed=1)}, root / "more.safetensors")
        return packed(root, unlabelled=str(root / "more.safetensors"), augment=AUGMENT)
    for index, image in enumerate(pictures(60, seed=1)):
        (folder := root / "more" / str(index % 3) / "deeper").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{index}.png")
    if request.param == "folder":
        write(root, pictures(60), train=20, test=40)
        return packed(root, unlabelled=str(root / "more"), augment=AUGMENT)
    crop = {"random_resized_crop": {}, "mixup": 0.8}
    keys = {"root": str(make_folder(train=10)), "validation": 0.0, "unlabelled": str(root / "more")}
    return Data(name="folder", resolution=6, augment=crop, stream=True, workers=0, **keys)


def test_batches(mixed: Data) -> None:
    dataset = opened(mixed)
    own = dataset.info.sizes["train"]
    assert dataset.info.unlabelled == 60
    assert len(dataset.labels("train")) == own
    plan, number = BatchPlan(7, 16), 4 if own == 20 else 6  # of 16, in pairs
    dataset.use_unlabelled(True)
    assert dataset.labelled_images(plan) == number
    seen: list[Batch] = []
    for epoch in range(3):
        steps = list(dataset.training_batches(plan, epoch))
        assert len(steps) == dataset.steps_per_epoch(plan) == max(own // number, 60 // (16 - number))
        seen += [batch for (batch,) in steps]
    for batch in seen:
        labelled = batch.labels >= 0
        assert labelled[0]
        assert int(labelled.sum()) == number
        assert torch.equal(labelled, batch.indices < own)
        assert torch.equal(labelled.view(-1, 2)[:, 0], labelled.view(-1, 2)[:, 1])  # pairs of one kind
        torch.testing.assert_close(batch.targets.sum(1), labelled.float())
        assert torch.equal(batch.labels[labelled], dataset.labels("train")[batch.indices[labelled]])
        if own == 20:
            assert labelled.tolist() == [True, True, *[False] * 6] * 2
    for kind, size, each in (("labelled", own, number), ("unlabelled", 60, 16 - number)):
        indices = torch.cat([batch.indices[(batch.labels >= 0) == (kind == "labelled")] for batch in seen])
        in_pass = size // each * each
        passes = [part.tolist() for part in indices.split(in_pass)]
        assert all(len(set(one)) == len(one) for one in passes), kind
        assert passes[0] != passes[1][: len(passes[0])]


def test_processes_micro_batches_and_resumption_change_nothing(mixed: Data) -> None:
    for used in (True, False):

        def of(dataset: Dataset, *plan: int, first: int = 0, used: bool = used) -> list[Batch]:
            dataset.use_unlabelled(used)
            return [joined(step) for step in dataset.training_batches(BatchPlan(3, 16, *plan), 2, first)]

        whole = of(opened(mixed))
        ranks = [of(opened(mixed, num_processes=2, process_index=rank), 1, 2, rank) for rank in range(2)]
        parts, rest = of(opened(mixed), 2), of(opened(mixed), first=2)
        assert len(whole) == len(ranks[0]) == len(parts) == len(rest) + 2 >= 4
        for step, *halves in zip(whole, *ranks, strict=True):
            assert_same(step, joined(halves))
        for step, other in zip([*whole, *whole[2:]], [*parts, *rest], strict=True):
            assert_same(step, other)


def test_images_are_their_own_and_augmented_by_draws_of_their_own(root: Path) -> None:
    """Without augmentation the pixels are those of the file; with it an image is not augmented as its namesake is."""
    save_file({"images": pictures(80, seed=1)}, root / "more.safetensors")
    plain = opened(packed(root, unlabelled=str(root / "more.safetensors")))
    files = torch.cat([pictures(120)[:80], pictures(80, seed=1)])
    for (batch,) in plain.training_batches(BatchPlan(0, 16), 0):
        assert torch.equal(batch.images, files[batch.indices].float() / 255)
    same = pictures(80).clone()
    save_file({"images": same}, root / "more.safetensors")
    augmented = opened(packed(root, unlabelled=str(root / "more.safetensors"), augment={"hflip": True}))
    seen: dict[int, Tensor] = {}
    for (batch,) in augmented.training_batches(BatchPlan(0, 16), 0):
        seen |= dict(zip(batch.indices.tolist(), batch.images, strict=True))
    equal = [torch.equal(seen[index], seen[index + 80]) for index in range(80)]
    assert 20 < sum(equal) < 60


def test_labels_of_a_stream_and_of_python_objects(make_folder: Any) -> None:
    """Kept by the same rule as in memory, and the images that lose theirs are the same ones."""
    keys: dict[str, Any] = {"labelled": 6, "validation": 0.0, "resolution": 8}
    root = str(make_folder(train=10))
    found = []
    for stream in (False, True):
        dataset = opened(Data(name="folder", root=root, stream=stream, workers=0, **keys))
        assert dataset.info.sizes == {"train": 6, "validation": 0, "test": 9}
        assert dataset.info.unlabelled == 24
        found.append([joined(step) for step in dataset.training_batches(BatchPlan(0, 10), 1)])
    for one, other in zip(*found, strict=True):
        assert_same(one, other)
    pairs = {split: (pictures(size), torch.arange(size) % 4) for split, size in (("train", 80), ("test", 8))}
    given = open_dataset(Data(name="python", **keys), seed=0, device=CPU, given=GivenData.of(pairs))
    assert sorted(torch.bincount(given.labels("train")).tolist()) == [1, 1, 2, 2]
    for (batch,) in given.training_batches(BatchPlan(0, 16), 0):
        assert int((batch.labels >= 0).sum()) == 1


def test_without_methods_all_of_a_batch_is_labelled(root: Path) -> None:
    """As many steps, full batches, and the first one begins alike; with fewer labels than a batch has, all of them."""
    dataset = opened(packed(root, labelled=20, augment=AUGMENT))
    plan = BatchPlan(0, 16)
    (first,), *_ = dataset.training_batches(plan, 0)
    steps = dataset.steps_per_epoch(plan)
    dataset.use_unlabelled(False)
    alone = [batch for (batch,) in dataset.training_batches(plan, 0)]
    assert len(alone) == steps == dataset.steps_per_epoch(plan) == 5
    assert dataset.labelled_images(plan) is None
    assert first.first().digest() == alone[0].first().digest()
    assert all(len(batch.labels) == 16 and batch.labels.min() >= 0 for batch in alone)
    assert [sorted(batch.indices.tolist()) != sorted(alone[0].indices.tolist()) for batch in alone[1:]] == [True] * 4
    few = opened(packed(root, labelled=5, unlabelled_share=0.75, augment=AUGMENT))
    few.use_unlabelled(False)
    assert few.labelled_images(BatchPlan(0, 16, 2)) == 2.0
    assert [joined(step).indices.unique().numel() for step in few.training_batches(BatchPlan(0, 16, 2), 0)] == [4] * 6


def test_mixing_ends_by_the_epochs_of_the_run(root: Path) -> None:
    """Though a pass over the few labelled images is shorter, and one over the others may be longer."""
    augment = {"mixup": 0.8, "mix_off_epoch": 2}
    for keys in ({"labelled": 8}, {"labelled": 40, "unlabelled_share": 0.25}):
        dataset = opened(packed(root, augment=augment, **keys))
        for epoch, mixed in enumerate((True, True, False, False)):
            batches = [batch for (batch,) in dataset.training_batches(BatchPlan(0, 8), epoch)]
            files = pictures(120)[:80].float() / 255
            originals = {image.numpy().tobytes() for image in files}
            changed = {image.numpy().tobytes() not in originals for batch in batches for image in batch.images}
            assert changed == {mixed}, (keys, epoch)


@pytest.mark.parametrize(("share", "labelled", "steps"), [(None, 4, 5), (0.5, 8, 7), (0.9, 2, 10), (0.25, 12, 15)])
def test_the_share_of_a_batch_and_the_steps_of_an_epoch(
    root: Path, share: float | None, labelled: int, steps: int
) -> None:
    """20 of 80 images are labelled; an epoch is a pass over the part that takes more steps."""
    dataset = opened(packed(root, labelled=20, unlabelled_share=share))
    assert dataset.labelled_images(BatchPlan(0, 16)) == labelled
    assert dataset.steps_per_epoch(BatchPlan(0, 16)) == steps
    (batch,) = next(iter(dataset.training_batches(BatchPlan(0, 16), 0)))
    assert int((batch.labels >= 0).sum()) == labelled


def test_a_share_of_0_leaves_them_out(root: Path) -> None:
    dataset = opened(packed(root, labelled=20, unlabelled_share=0.0))
    dataset.use_unlabelled(True)
    batches = [batch for (batch,) in dataset.training_batches(BatchPlan(0, 16), 0)]
    assert len(batches) == 5
    assert all(batch.labels.min() >= 0 for batch in batches)
    assert "left out" in dict(facts(dataset.info, packed(root, labelled=20, unlabelled_share=0.0)))["unlabelled"]


@pytest.mark.parametrize(("batch", "labelled", "unit"), [(16, 4, 1), (16, 4, 2), (16, 1, 1), (10, 3, 1), (12, 10, 2)])
def test_a_layout_spreads_evenly(batch: int, labelled: int, unit: int) -> None:
    layout = Layout(batch, labelled, unit)
    mask = layout.mask.tolist()
    assert sum(mask) == labelled
    assert mask[0]
    for parts in (2, 3, 5):
        if batch % (parts * unit) == 0:
            counts = [sum(mask[at : at + batch // parts]) for at in range(0, batch, batch // parts)]
            assert max(counts) - min(counts) <= unit
    assert layout.before(True)[-1] == labelled
    assert layout.before(False)[-1] == batch - labelled


def test_which_labels_are_kept(root: Path) -> None:
    """So many, in the classes' proportions, by a seed of their own, whatever the run's; most of them for any validation
    split, and never one of its images.
    """
    dataset = opened(packed(root, labelled=0.25, validation=16))
    assert isinstance(dataset, MixedDataset)
    assert dataset.info.sizes == {"train": 16, "validation": 16, "test": 40}
    assert dataset.info.unlabelled == 48
    assert torch.bincount(dataset.labels("train")).tolist() == [4] * 4

    def kept(seed: int, **keys: Any) -> set[bytes]:
        dataset = open_dataset(packed(root, labelled=0.25, **keys), seed=seed, device=CPU)
        parts = [image for images, _ in dataset.evaluation_batches("train", 0, 80, 8) for image in images]
        return {image.numpy().tobytes() for image in parts}

    assert kept(0) == kept(1) != kept(0, labelled_seed=1)
    assert len(kept(0, validation=16) & kept(1, validation=16)) >= 8


def test_facts(root: Path) -> None:
    spec = packed(root, labelled=0.25)
    said = dict(facts(opened(spec).info, spec))
    assert said["labels"] == "20 of 80 training images"
    assert said["unlabelled"].startswith("60 images of the training split (data.labelled=0.25), 75 % of a batch")
    assert "no method learns" in dict(facts(opened(spec).info, spec, methods=False))["unlabelled"]


def test_images_of_the_held_out_splits_are_counted(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    images = torch.cat([pictures(3, seed=1), pictures(120)[90:92], pictures(120)[:1]])  # two of the test images
    save_file({"images": images}, root / "more.safetensors")
    dataset = opened(packed(root, unlabelled=str(root / "more.safetensors")))
    assert count_leaks(dataset) == 2
    with caplog.at_level(logging.WARNING, "distill"):
        warn_of_leaks(dataset)
    assert "2 of 6 unlabelled images are also in the validation or test split" in caplog.text
    assert count_leaks(opened(packed(root, labelled=20))) == 0
    assert count_leaks(opened(packed(root))) == 0


def test_statistics_are_of_the_labelled_images(root: Path) -> None:
    save_file({"images": torch.zeros(9, 3, 6, 6, dtype=torch.uint8)}, root / "more.safetensors")
    alone, both = opened(packed(root)), opened(packed(root, unlabelled=str(root / "more.safetensors")))
    assert (alone.info.mean, alone.info.std) == (both.info.mean, both.info.std)
    assert alone.info.digest == both.info.digest
    assert both.info.unlabelled_digest


def refused(root: Path, **keys: Any) -> str:
    with pytest.raises(InputError) as caught:
        opened(packed(root, **keys))
    return str(caught.value)


def test_what_is_no_set_of_images(root: Path) -> None:
    assert "is not there" in refused(root, unlabelled=str(root / "absent"))
    assert "no such file" in refused(root, unlabelled=str(root / "absent.safetensors"))
    (root / "empty").mkdir()
    assert "holds no image" in refused(root, unlabelled=str(root / "empty"))
    (root / "empty" / "notes.txt").write_text("no image")
    assert "notes.txt: is no image by its name" in refused(root, unlabelled=str(root / "empty"))
    (root / "broken").mkdir()
    (root / "broken" / "a.png").write_bytes(b"no image either")
    assert "a.png: cannot be decoded" in refused(root, unlabelled=str(root / "broken"))
    assert "holds no image" in refused(root, unlabelled=str(root / "broken"), skip_unreadable=True)
    Image.new("RGB", (6, 6)).save(root / "broken" / "b.png")
    skipping = opened(packed(root, unlabelled=str(root / "broken"), skip_unreadable=True))
    assert skipping.info.unlabelled == 1
    assert len(skipping.info.left_out) == 1


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"labels": torch.zeros(3)}, "holds the tensors labels"),
        ({"images": torch.zeros(9, 3, 6, 6)}, "is float32 [9, 3, 6, 6], not uint8 [N, C, H, W]"),
        ({"images": torch.zeros(9, 6, 6, 3, dtype=torch.uint8)}, "in the order [N, H, W, C]"),
        ({"images": torch.zeros(9, 1, 6, 6, dtype=torch.uint8)}, "images of 1 channel(s), the data have 3"),
        ({"images": torch.zeros(9, 4, 6, 6, dtype=torch.uint8)}, "images of 4 channel(s), the data have 3"),
        ({"train.images": torch.zeros(9, 3, 8, 6, dtype=torch.uint8)}, "images of 6 x 8 pixels, the data's are 6 x 6"),
        ({"images": torch.zeros(0, 3, 6, 6, dtype=torch.uint8)}, "of at least one image"),
    ],
)
def test_packed_images_that_do_not_fit(root: Path, tensors: dict[str, Tensor], message: str) -> None:
    save_file(tensors, root / "more.safetensors")
    assert message in refused(root, unlabelled=str(root / "more.safetensors"))


@pytest.mark.parametrize(("mode", "channels"), [("L", 3), ("RGB", 1)])
@pytest.mark.parametrize("stream", [False, None])
def test_files_of_another_channel_count(tmp_path: Path, mode: str, channels: int, stream: bool | None) -> None:
    write(tmp_path, pictures(20, shape=(channels, 6, 6)), train=12, test=8)
    (tmp_path / "more").mkdir()
    Image.new(mode, (9, 7), 90 if mode == "L" else (9, 90, 200)).save(tmp_path / "more" / "a.png")
    keys = {"unlabelled": str(tmp_path / "more"), "stream": stream}
    assert f"set data.channels={channels}" in refused(tmp_path, **keys)
    decoded = opened(packed(tmp_path, channels=channels, **keys))
    assert decoded.info.unlabelled == 1


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"labelled": 3}, "data.labelled: 3 of 80 training images would keep 3 labels; from one of each of the 4"),
        ({"labelled": 80}, "would keep 80 labels"),
        ({"labelled": 0.001}, "would keep 0 labels"),
    ],
)
def test_numbers_of_labels_that_cannot_be(root: Path, keys: dict[str, Any], message: str) -> None:
    assert message in refused(root, **keys)


def test_batches_that_cannot_be(root: Path) -> None:
    def problem(spec: Data, *plan: int) -> str:
        with pytest.raises(InputError) as caught:
            opened(spec).training_batches(BatchPlan(0, *plan), 0)
        return str(caught.value)

    assert "of 4 that there are" in problem(packed(root, labelled=4, unlabelled_share=0.5), 16)
    assert "2 labelled and 14 unlabelled images, too few for 4" in problem(packed(root, labelled=0.1), 16, 4)
    assert "too few for 1" in problem(packed(root, labelled=0.1), 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"labelled": 0.1, "unlabelled": "x"}}, "data.unlabelled: images without labels come from one of the"),
        ({"data": {"labelled": 1.5}}, "data.labelled: a share below 1 or a whole count"),
        ({"data": {"unlabelled_share": 0.5}}, "data.unlabelled_share: no images are without labels"),
        ({"data": {"labelled": 0.1}, "distill": [{"method": "dkd"}]}, "distill.0: dkd needs the label of each image"),
        ({"data": {"unlabelled": "x"}, "teacher": {"model": "x", "cache": True}, "distill": [{"method": "soft"}]},
         "teacher.cache: logits are stored for labelled images only"),
    ],
)  # fmt: skip
def test_recipes_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    raw = {"teacher": {"model": "x"}} | changes if "distill" in changes else changes
    with pytest.raises(InputError) as caught:
        from_mapping(raw)
    assert message in " ".join(str(caught.value).split())
    if changes.get("distill") == [{"method": "dkd"}]:
        from_mapping(raw | {"data": {"labelled": 0.1, "unlabelled_share": 0.0}})


def test_data_in_a_readers_order(root: Path) -> None:
    from distill.data.unlabelled_files import with_images

    dataset = opened(packed(root))
    dataset.in_order = True  # type: ignore[misc]
    dataset.spec = dataset.spec.model_copy(update={"unlabelled": str(root)})
    with pytest.raises(InputError, match=r"data\.unlabelled: 'set\.safetensors' is read in its reader's order"):
        with_images(dataset, root, lambda number: False, 0)
