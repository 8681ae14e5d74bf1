"""timm's sequential datasets by name; users install the packages (datasets, tensorflow-datasets, webdataset)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distill.data.shards import check_list
from distill.errors import InputError

PACKAGES = {"hfids": "datasets", "tfds": "tensorflow-datasets", "wds": "webdataset"}


def create(name: str, root: Path, split: str, **arguments: Any) -> Any:
    """timm's dataset; raises InputError if it, or a package that it needs, is missing.

    Of webdatasets only a local folder: webdataset takes what begins like `pipe:` for a command, and runs it.
    """
    from timm.data import create_dataset

    root = root.absolute()
    if name.startswith("wds/"):
        if not root.is_dir():
            raise InputError(
                f"data.root: {root} is no folder; '{name}' is read from a local one, with the shards and their "
                "_info.json"
            )
        check_list(root)
    try:
        return create_dataset(name, root=str(root), split=split, input_img_mode="", **arguments)
    except ImportError as error:
        raise _missing(name, error) from None
    except (ValueError, RuntimeError, OSError, KeyError) as error:
        if "install" in str(error).lower():
            raise _missing(name, error) from None
        reason = " ".join(str(error).split())
        if name.startswith("wds/") and not any((root / info).is_file() for info in ("_info.json", "info.json")):
            reason = (
                "there is no _info.json, which would have, under splits and the split's name, its name, filenames, "
                "shard_lengths and num_samples"
            )
        raise InputError(
            f"data.name: timm cannot open split '{split}' of '{name}' in {root} ({reason}); check data.name and "
            "data.root"
        ) from None


def _missing(name: str, error: Exception) -> InputError:
    package = PACKAGES[name.partition("/")[0]]
    return InputError(
        f"data.name: '{name}' needs the package {package} ({' '.join(str(error).split())}); run: pip install {package}"
    )
