"""What images mean: orientation, transparency, colour, depth, size and format, each as a viewer shows it, on every way
to the pixels. The table in docs/reference/images.md names these tests.
"""

from __future__ import annotations

import io
import json
import struct
import sys
import tarfile
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image, features
from torch import Tensor

from distill.data import hf_sets, open_dataset, sequential
from distill.data import images as decoder
from distill.data.given import GivenData
from distill.data.images import ImageRules, decode, decode_for, is_grey
from distill.errors import InputError
from distill.exports.prediction import Transform
from distill.inputs import InputAdapter, InputContract, Preparation
from distill.recipe import Data, from_mapping

CPU = torch.device("cpu")
UPRIGHT = np.random.default_rng(0).integers(0, 256, (5, 8, 3), dtype=np.uint8)
STORED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda image: image,
    2: lambda image: image[:, ::-1],
    3: lambda image: image[::-1, ::-1],
    4: lambda image: image[::-1],
    5: lambda image: image.swapaxes(0, 1),
    6: lambda image: np.rot90(image),  # to be turned clockwise
    7: lambda image: image[::-1, ::-1].swapaxes(0, 1),
    8: lambda image: np.rot90(image, -1),
}
"""The pixels of a file that are shown as they were, by its orientation tag (TIFF 6.0, EXIF 2.3)."""
XMP = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="{}"/></rdf:RDF></x:xmpmeta>'
)


def content(image: Image.Image, name: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, name, **options)
    return file.getvalue()


def decoded(file: bytes, **rules: Any) -> np.ndarray:
    return np.asarray(decode(io.BytesIO(file), "x", ImageRules(**rules)))


def tagged(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize(
    ("name", "options", "tolerance"),
    [
        ("PNG", {}, 0),
        ("WEBP", {"lossless": True}, 0),
        ("TIFF", {}, 0),
        ("TIFF", {"compression": "tiff_lzw"}, 0),
        ("TIFF", {"compression": "tiff_deflate", "xmp": True}, 0),
        ("WEBP", {"lossless": True, "xmp": True}, 0),
        ("JPEG", {"quality": 100, "subsampling": 0}, 8),
        ("JPEG", {"quality": 100, "subsampling": 0, "xmp": True}, 8),
        pytest.param("AVIF", {"quality": 100, "subsampling": "4:4:4"}, 8,
                     marks=pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")),
    ],
)  # fmt: skip
def test_orientation(name: str, options: dict[str, Any], tolerance: int) -> None:
    for orientation, stored in STORED.items():
        tags: dict[str, Any] = {"exif": tagged(orientation)}
        if options.get("xmp"):
            tags = {"xmp": XMP.format(orientation).encode()} | (tags if name == "TIFF" else {})
        image = Image.fromarray(np.ascontiguousarray(stored(UPRIGHT)))
        seen = decoded(content(image, name, **options | tags))
        assert seen.shape == UPRIGHT.shape, orientation
        assert np.abs(seen.astype(int) - UPRIGHT).max() <= tolerance, orientation


def test_damaged_tags_turn_nothing() -> None:
    for exif in (b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"nonsense"):
        assert (decoded(content(Image.fromarray(UPRIGHT), exif=exif)) == UPRIGHT).all()
    assert (decoded(content(Image.fromarray(UPRIGHT), exif=tagged(9))) == UPRIGHT).all()


def shape(mode: str) -> Image.Image:
    """4 x 4 pixels, all of them black, the left half transparent, as `mode` has it."""
    alpha = Image.fromarray(np.repeat(np.uint8([[0, 0, 255, 255]]), 4, axis=0))
    if mode == "PA":
        image = Image.new("PA", (4, 4))
        image.putpalette([0, 0, 0] * 256)
        image.putalpha(alpha)
        return image
    if mode in ("P", "P index"):
        image = Image.new("P", (4, 4))
        image.putpalette([0, 0, 0, 0, 0, 0])
        image.paste(1, (2, 0, 4, 4))
        return image
    if mode in ("RGB", "L", "1"):  # one colour is transparent
        image = Image.new(mode, (4, 4), 0)
        image.paste(1 if mode == "1" else 9 if mode == "L" else (9, 9, 9), (0, 0, 2, 4))
        return image
    image = Image.new("LA" if mode in ("LA", "La") else "RGBA", (4, 4))
    image.putalpha(alpha)
    return image.convert(mode)


TRANSPARENT = {
    "RGBA": ("PNG", {}),
    "LA": ("PNG", {}),
    "P": ("PNG", {"transparency": bytes([0, 255])}),
    "P index": ("PNG", {"transparency": 0}),
    "RGB": ("PNG", {"transparency": (9, 9, 9)}),
    "L": ("PNG", {"transparency": 9}),
    "1": ("PNG", {"transparency": 1}),
    "PA": ("TIFF", {}),
}


@pytest.mark.parametrize("mode", TRANSPARENT)
def test_transparency(mode: str) -> None:
    name, options = TRANSPARENT[mode]
    file = content(shape(mode), name, **options)
    grey = mode in ("LA", "L", "1")
    for colour in ((255, 255, 255), (0, 0, 0), (7, 7, 7), (255, 0, 0)):
        seen = decoded(file, background=colour)
        expected = np.zeros((4, 4, 3), dtype=np.uint8)  # the drawing
        expected[:, :2] = colour
        if grey and len(set(colour)) == 1:
            assert (seen == expected[..., 0]).all()
        else:
            assert (seen == expected).all()
    white = np.repeat(np.uint8([[255, 255, 0, 0]]), 4, axis=0)
    assert (decoded(file, channels=1) == white).all()
    assert (decoded(file, channels=3) == white[..., None]).all()


@pytest.mark.parametrize(
    ("name", "options"),
    [("WEBP", {"lossless": True, "exact": True}), ("WEBP", {"quality": 100, "alpha_quality": 100}),
     ("TIFF", {}), ("GIF", {}), ("JPEG2000", {})],
)  # fmt: skip
def test_transparency_of_other_formats(name: str, options: dict[str, Any]) -> None:
    seen = decoded(content(shape("RGBA"), name, **options), background=(0, 99, 0))
    assert (seen[:, :2] == (0, 99, 0)).all()
    assert seen[:, 2:].max() <= 4


@pytest.mark.parametrize("mode", ["RGBa", "La"])
def test_premultiplied_transparency(mode: str) -> None:
    seen = np.asarray(decode(shape(mode), "x", ImageRules(3)))
    assert (seen[:, :2] == 255).all()
    assert (seen[:, 2:] == 0).all()


def test_half_transparent_pixels_are_mixed() -> None:
    file = content(Image.new("RGBA", (1, 1), (200, 0, 100, 51)))
    assert decoded(file, background=(0, 100, 100))[0, 0].tolist() == [40, 80, 100]


def test_opaque_images_are_what_they_were() -> None:
    image = Image.fromarray(UPRIGHT)
    assert (decoded(content(image.convert("RGBA"))) == UPRIGHT).all()
    grey = image.convert("L")
    assert (decoded(content(grey.convert("LA"))) == np.asarray(grey)).all()
    for mode in ("P", "CMYK", "YCbCr", "HSV", "RGBX"):
        other = image.convert(mode)
        assert (np.asarray(decode(other, "x", ImageRules())) == np.asarray(other.convert("RGB"))).all(), mode


DEEP = {
    "I;16": Image.fromarray(np.uint16([[300, 900], [60_000, 0]])),
    "I;16B": Image.new("I;16B", (2, 2)),
    "I": Image.fromarray(np.int32([[1, 70_000], [3, 4]])),
    "F": Image.fromarray(np.float32([[0.1, 0.2], [0.3, 1.0]])),
}


@pytest.mark.parametrize("mode", DEEP)
def test_more_than_8_bits_are_refused(mode: str) -> None:
    with pytest.raises(InputError, match=f"^x: has pixels of PIL mode {mode}; convert it to 8 bits per channel"):
        decode(DEEP[mode], "x", ImageRules())
    with pytest.raises(InputError, match=r"^x: has pixels of PIL mode (I|F)"):
        decode(io.BytesIO(content(DEEP[mode], "TIFF")), "x", ImageRules())


def test_colours_of_16_bits_are_scaled_by_their_range(caplog: pytest.LogCaptureFixture) -> None:
    values = np.uint16([[[0, 0x1234, 0xFFFF]]])
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    png = _png(1, 1, depth=16, colour=2, rows=rows)
    with caplog.at_level("INFO", logger="distill"):
        assert decoded(png)[0, 0].tolist() == [0, 0x12, 0xFF]
    assert "16 bits per channel are scaled to 8 bits" in caplog.text


def _png(width: int, height: int, *, depth: int, colour: int, rows: bytes) -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_only_listed_formats_are_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def started(*args: Any, **kwargs: Any) -> Any:
        pytest.fail("Ghostscript was started")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", started)
    postscript = content(Image.fromarray(UPRIGHT), "EPS")
    path = tmp_path / "a.png"
    path.write_bytes(postscript)
    for source in (path, str(path), io.BytesIO(postscript), Image.open(path)):
        with pytest.raises(InputError, match=r"none of JPEG, PNG"):
            decode(source, "a.png", ImageRules())
    with pytest.raises(InputError, match=r"none of JPEG, PNG"):
        decode(io.BytesIO(content(Image.fromarray(UPRIGHT), "TGA")), "x", ImageRules())


def test_too_large_images_get_pillows_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    path = tmp_path / "a.png"
    Image.new("L", (20, 10), 7).save(path)
    with pytest.raises(
        InputError, match=r"a.png: .*\(200 pixels\) exceeds limit of 100 pixels.* data.max_pixels can raise"
    ):
        decode(path, "a.png", ImageRules(max_pixels=90))
    with pytest.raises(InputError, match=r"a.png: has 200 pixels \(20 x 10\), more than data.max_pixels, 199"):
        decode(path, "a.png", ImageRules(max_pixels=199))
    assert (np.asarray(decode(path, "a.png", ImageRules(max_pixels=200))) == 7).all()


def test_threads_share_the_limit_on_pixels() -> None:
    file = content(Image.new("L", (10, 10)))
    entered: list[int] = []
    leave = threading.Event()

    def hold(image: Image.Image) -> None:
        entered.append(image.width)
        leave.wait(20)

    works = [(hold, io.BytesIO(file), "x", ImageRules(max_pixels=250)) for _ in range(5)]
    threads = [threading.Thread(target=decode_for, args=work) for work in works]
    for thread in threads:
        thread.start()
    while len(entered) < 2:
        leave.wait(0.01)
    leave.wait(0.1)
    assert len(entered) == 2  # a third one would be 300 pixels
    leave.set()
    for thread in threads:
        thread.join(20)
    assert entered == [10] * 5


# The same files on every way to the pixels.


def hard_images() -> list[tuple[bytes, np.ndarray]]:
    """Files, and the 6 x 6 pixels that are seen of them."""
    square = np.random.default_rng(1).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    turned = content(Image.fromarray(np.ascontiguousarray(STORED[6](square))), exif=tagged(6))
    drawing = Image.new("RGBA", (6, 6))
    drawing.paste((0, 0, 0, 255), (0, 0, 3, 6))
    grey = Image.new("LA", (6, 6), (40, 0))
    both = drawing.transpose(Image.Transpose.ROTATE_90)
    shown = np.zeros((6, 6, 3), dtype=np.uint8)
    shown[:, 3:] = (0, 200, 0)
    return [
        (turned, square),
        (content(drawing), shown),
        (content(grey), np.broadcast_to(np.uint8([0, 200, 0]), (6, 6, 3))),
        (content(both, "WEBP", lossless=True, exact=True, exif=tagged(6)), shown),
    ]


class Shards:
    """As webdataset's pipeline within timm's reader: stages that read, decode and rename."""

    def __init__(self, files: Sequence[bytes]) -> None:
        self.input_key, self.target_key, self.split_info = "jpg;png;webp", None, SimpleNamespace(alt_label="")
        self.num_samples, self.class_to_idx, self.files = len(files), {"a": 0, "b": 1}, files
        self.dist_rank, self.dist_num_replicas = 0, 1

    def _lazy_init(self) -> None:
        self.ds = SimpleNamespace(pipeline=["read", "decode", "rename"])

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        for number, file in enumerate(self.files):
            sample = {"__url__": "0.tar", "__key__": f"{number:02}", "png": file, "cls": str(number % 2).encode()}
            found = self.ds.pipeline[-2](sample)
            yield found["jpg"], found["target"]


class Records(Shards):
    """As timm's reader of TensorFlow's datasets."""

    def _input_decoders(self) -> dict[str, Any]:
        return {"image": "decode_jpeg"}

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        assert type(self._input_decoders()["image"]).__name__ == "SkipDecoding"
        yield from ((file, number % 2) for number, file in enumerate(self.files))


class Rows(Shards):
    """As timm's reader of Hugging Face's streams."""

    def _lazy_init(self) -> None:
        self.input_key, self.ds = "image", self

    def cast_column(self, column: str, feature: Any) -> Rows:
        assert (column, feature.decode) == ("image", False)
        return self

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        with tempfile.TemporaryDirectory() as folder:
            for number, file in enumerate(self.files):
                path = Path(folder) / f"{number}.png"
                path.write_bytes(file)
                yield {"bytes": None if number % 2 else file, "path": str(path)}, number % 2


class HubTable:
    """As Hugging Face's tables."""

    features: ClassVar[dict[str, Any]] = {
        "image": {"bytes": None, "path": None}, "label": SimpleNamespace(names=["a", "b"])
    }  # fmt: skip
    column_names: ClassVar[list[str]] = ["image", "label"]
    cache_files: ClassVar[list[Any]] = []

    def __init__(self, files: Sequence[bytes]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {"image": {"bytes": self.files[row], "path": None}}

    def select_columns(self, names: list[str]) -> HubTable:
        return self

    def cast_column(self, column: str, feature: Any) -> HubTable:
        assert (column, feature.decode) == ("image", False)
        return self

    def to_dict(self) -> dict[str, list[int]]:
        return {"label": [number % 2 for number in range(len(self))]}


class Timm:
    def __init__(self, reader: Any) -> None:
        self.reader = reader

    def __iter__(self) -> Iterator[Any]:
        return iter(self.reader)


class Given(torch.utils.data.Dataset):
    def __init__(self, files: Sequence[bytes]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, row: int) -> tuple[Image.Image, int]:
        return Image.open(io.BytesIO(self.files[row])), row % 2


READERS = {
    "wds/x": type("ReaderWds", (Shards,), {}),
    "tfds/x": type("ReaderTfds", (Records,), {}),
    "hfids/x": type("ReaderHfids", (Rows,), {}),
}
WAYS = ["packed", "streamed", "python", "python streamed", "hfds/x", *READERS]


@pytest.fixture
def pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Tensor]:
    """The pixels of the test split on one of `WAYS`, uint8 [N, C, R, R]."""
    monkeypatch.setitem(sys.modules, "webdataset", SimpleNamespace(map=lambda function: function))
    decoders = SimpleNamespace(SkipDecoding=type("SkipDecoding", (), {}))
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", SimpleNamespace(decode=decoders))
    monkeypatch.setitem(sys.modules, "tensorflow_datasets.decode", decoders)
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(Image=lambda decode: SimpleNamespace(decode=decode)))

    def read(way: str, files: Sequence[bytes], train: Sequence[bytes] | None = None, **values: Any) -> Tensor:
        train = files if train is None else train
        given = None
        spec: dict[str, Any] = {"name": way, "root": str(tmp_path), "resolution": 6, "validation": 0.0, "workers": 0}
        if way in READERS:

            def create(name: str, root: Path, split: str, **_: Any) -> Timm:
                return Timm(READERS[name](train if split == "train" else files))

            monkeypatch.setattr(sequential, "create", create)
            monkeypatch.setattr(sequential, "columns_of", lambda spec: ("image", "label"))
        elif way == "hfds/x":
            monkeypatch.setattr(hf_sets, "load", lambda spec: {"train": HubTable(train), "test": HubTable(files)})
        elif way.startswith("python"):
            spec |= {"name": "python", "stream": way == "python streamed"}
            given = GivenData.of((Given(train), Given(files)))
        else:
            spec |= {"name": "folder", "stream": way == "streamed"}
            for split, contents in (("train", train), ("test", files)):
                for number, file in enumerate(contents):
                    path = tmp_path / split / "ab"[number % 2] / f"{number}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    if not path.exists() or path.read_bytes() != file:
                        path.write_bytes(file)
        dataset = open_dataset(Data(**spec | values), seed=0, device=CPU, given=given)
        parts = dataset.evaluation_batches("test", 0, len(files), 3)
        images = torch.cat([images for images, _ in parts]).mul(255).round().to(torch.uint8)
        order = torch.argsort(dataset.labels("test"), stable=True) if "python" in way or "/" in way else slice(None)
        return images[order]

    return read


def by_class(images: Sequence[np.ndarray]) -> Tensor:
    """In the order of an image folder: the even ones, then the odd ones."""
    return torch.from_numpy(np.stack([*images[::2], *images[1::2]])).permute(0, 3, 1, 2)


@pytest.mark.parametrize("way", WAYS)
def test_images_are_seen_alike_on_every_way(way: str, pixels: Callable[..., Tensor]) -> None:
    files, expected = zip(*hard_images(), strict=True)
    seen = pixels(way, files, background=[0, 200, 0], channels=3)
    assert torch.equal(seen, by_class(expected))


def test_use_sees_what_training_saw(pixels: Callable[..., Tensor]) -> None:
    files, expected = zip(*hard_images(), strict=True)
    preparation = Preparation.of(torch.zeros(3, 6, 6), 6, (0, 200, 0))
    assert Preparation.from_json(preparation._asdict() | {"background": [0, 200, 0]}) == preparation
    transform = Transform(InputContract((0.0,) * 3, (1.0,) * 3, 6), preparation)
    for file, image in zip(files, expected, strict=True):
        seen = transform(Image.open(io.BytesIO(file))).mul(255).round().permute(1, 2, 0)
        assert (seen.numpy() == image).all()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("what", ["depth", "postscript", "large", "truncated"])
def test_what_is_refused_is_refused_by_name(
    way: str, what: str, pixels: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **kwargs: pytest.fail("Ghostscript was started"))
    good = content(Image.fromarray(UPRIGHT[:5, :5]))
    bad, reason = {
        "depth": (content(DEEP["I;16"]), "PIL mode I;16; convert it to 8 bits"),
        "postscript": (content(Image.fromarray(UPRIGHT), "EPS"), "none of JPEG, PNG"),
        "large": (content(Image.new("RGB", (10, 11))), r"110 pixels \(10 x 11\), more than data.max_pixels, 100"),
        "truncated": (good[:-30], "cannot be decoded as an image"),
    }[what]
    where = {
        "packed": "1.png", "streamed": "1.png", "python": r"test\[1\]", "python streamed": r"test\[1\]",
        "wds/x": r"wds/x: 0.tar, 01.png", "tfds/x": "tfds/x, image 1", "hfids/x": "hfids/x: .*/1.png",
        "hfds/x": "hfds/x, image 1",
    }[way]  # fmt: skip
    with pytest.raises(InputError, match=f"{where}.*{reason}"):
        pixels(way, [good, bad, good], [good, good], max_pixels=100)


@pytest.mark.parametrize("way", ["packed", "streamed", "python", "python streamed", "hfds/x"])
def test_a_set_is_grey_only_if_all_training_images_are(way: str, pixels: Callable[..., Tensor]) -> None:
    colour = np.full((6, 6, 3), (200, 10, 90), dtype=np.uint8)
    grey = [content(Image.new(mode, (6, 6), 77)) for mode in ("L", "L", "1", "L")] * 5  # more than were looked at once
    assert pixels(way, [grey[0], content(Image.fromarray(colour))], grey).shape == (2, 1, 6, 6)
    seen = pixels(way, [grey[0], content(Image.fromarray(colour))], [*grey, content(Image.fromarray(colour))])
    assert torch.equal(seen, by_class([np.full((6, 6, 3), 77, dtype=np.uint8), colour]))
    assert pixels(way, grey[:2], grey, channels=3).shape == (2, 3, 6, 6)
    colours = [content(Image.fromarray(value)) for value in (colour, UPRIGHT)]
    assert pixels(way, grey[:2], colours, channels=1).shape == (2, 1, 6, 6)


def test_grey_by_the_header() -> None:
    transparent, opaque = content(Image.new("LA", (2, 2))), content(Image.new("L", (2, 2)))
    red, white = ImageRules(background=(255, 0, 0)), ImageRules()
    assert is_grey(io.BytesIO(transparent), "x", white)
    assert not is_grey(io.BytesIO(transparent), "x", red)
    assert is_grey(io.BytesIO(opaque), "x", red)
    for file, rules in ((transparent, white), (transparent, red), (opaque, red)):
        mode = decode(io.BytesIO(file), "x", rules).mode
        assert (mode == "L") == is_grey(io.BytesIO(file), "x", rules)


@pytest.mark.parametrize("stream", [False, True])
def test_a_constant_channel(stream: bool, tmp_path: Path, pixels: Callable[..., Tensor]) -> None:
    for split in ("train", "test"):
        for name, colour in (("a", (200, 40, 0)), ("b", (40, 200, 0))):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (6, 6), colour).save(tmp_path / split / name / "0.png")
    spec = Data(name="folder", root=str(tmp_path), resolution=6, validation=0.0, workers=0, stream=stream)
    dataset = open_dataset(spec, seed=0, device=CPU)
    ((images, _),) = dataset.evaluation_batches("test", 0, 2, 2)
    seen = InputAdapter(InputContract(dataset.info.mean, dataset.info.std, 6))(images)
    assert seen.isfinite().all()
    if not stream:  # which is normalised by ImageNet's figures
        assert (seen[:, 2] == 0).all()
        torch.testing.assert_close(seen[:, 0, 0, 0], torch.tensor([1.0, -1.0]))


@pytest.mark.parametrize("way", ["packed", "python"])
def test_images_of_one_colour_are_refused(way: str, pixels: Callable[..., Tensor]) -> None:
    same = content(Image.new("RGB", (6, 6), (9, 200, 30)))
    with pytest.raises(InputError, match=r"all training images of .* are the same colour"):
        pixels(way, [content(Image.fromarray(UPRIGHT))] * 2, [same] * 4)


def test_packs_are_made_anew_for_other_rules(pixels: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    files = [content(shape("RGBA")), content(Image.fromarray(UPRIGHT))]
    assert pixels("packed", files, background="red")[0, :, 0, 0].tolist() == [255, 0, 0]
    assert pixels("packed", files)[0, :, 0, 0].tolist() == [255, 255, 255]
    monkeypatch.setattr(decoder, "RULES", "of another version")
    monkeypatch.setattr(decoder, "_opaque", lambda image, background: image.convert("RGB"))
    assert pixels("packed", files)[0, :, 0, 0].tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("key", "value"),
    [("background", "no colour"), ("background", [1, 2]), ("background", [0, 0, 256]), ("background", "#ff000080"),
     ("channels", 2), ("max_pixels", 0)],
)  # fmt: skip
def test_wrong_values_are_named(key: str, value: object) -> None:
    with pytest.raises(InputError, match=f"data.{key}: "):
        from_mapping({"data": {key: value}})


def test_colours() -> None:
    for value in ("red", "#ff0000", "rgb(255, 0, 0)", [255, 0, 0]):
        assert ImageRules.of(from_mapping({"data": {"background": value}}).data).background == (255, 0, 0)


def test_real_shards(tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    files, expected = zip(*hard_images(), strict=True)
    for split in ("train", "validation"):
        with tarfile.open(tmp_path / f"{split}-0.tar", "w") as tar:
            for number, file in enumerate(files):
                for name, body in ((f"{number}.png", file), (f"{number}.cls", str(number % 2).encode())):
                    member = tarfile.TarInfo(name)
                    member.size = len(body)
                    tar.addfile(member, io.BytesIO(body))
    splits = {
        split: {"name": split, "filenames": [f"{split}-0.tar"], "shard_lengths": [4], "num_samples": 4}
        for split in ("train", "validation")
    }
    (tmp_path / "_info.json").write_text(json.dumps({"splits": splits}))
    spec = Data(name="wds/x", root=str(tmp_path), resolution=6, validation=0.0, workers=0, background=[0, 200, 0])
    dataset = open_dataset(spec, seed=0, device=CPU)
    ((images, labels),) = dataset.evaluation_batches("test", 0, 4, 4)
    assert labels.tolist() == [0, 1, 0, 1]
    seen = images.mul(255).round().to(torch.uint8)
    assert torch.equal(seen, torch.from_numpy(np.stack(expected)).permute(0, 3, 1, 2))
