"""Files are never code: what is pickled in weights, checkpoints, data and recipes never runs; names are no markup."""

from __future__ import annotations

import ast
import hashlib
import io
import json
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import yaml
from markdown_it import MarkdownIt
from rich.console import Console
from torchvision import datasets

from distill.data import open_dataset
from distill.errors import InputError
from distill.exports.folder import write_export
from distill.files.text import markdown, visible
from distill.recipe import Data, from_mapping, load
from distill.report.comparison import compare
from distill.report.document import write_report
from distill.report.tables import render_console
from distill.students import build_student
from distill.students.saved import read_export
from teachers import load_teacher
from teachers.weights import read_state_dict
from tests.conftest import Counted, Toy, environment, some
from tests.report.conftest import make_run  # noqa: F401 - a fixture
from tests.warm import launch

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(path for room in ("distill", "teachers", "results", ".ci") for path in (ROOT / room).rglob("*.py"))
FORBIDDEN_CALLS = {"eval", "exec", "__import__", "os.system", "os.popen", "pickle.load", "pickle.loads",
                   "pickle.Unpickler", "marshal.load", "marshal.loads", "dill.load", "joblib.load", "shelve.open",
                   "yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "runpy.run_path"}  # fmt: skip


def dangers(source: str) -> Iterator[str]:
    """Calls that run what a file or a name says."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if name in FORBIDDEN_CALLS:
            yield f"line {node.lineno}: {name}"
        if name == "torch.load" and options.get("weights_only") != "True":
            yield f"line {node.lineno}: torch.load without weights_only=True"
        for option, wrong in (("weights_only", "False"), ("shell", "True"), ("allow_pickle", "True"),
                              ("trust_remote_code", "True")):  # fmt: skip
            if options.get(option) == wrong:
                yield f"line {node.lineno}: {option}={wrong}"


def test_no_source_runs_what_a_file_says() -> None:
    assert len(SOURCES) > 100
    assert {str(path): found for path in SOURCES if (found := list(dangers(path.read_text(encoding="utf-8"))))} == {}


def test_the_walk_finds_what_it_looks_for() -> None:
    source = """
model.eval(); re.compile("x"); torch.load(p, weights_only=True); yaml.safe_load(t); subprocess.run(["ls"])
torch.load(p)
torch.load(p, weights_only=False)
pickle.loads(b)
yaml.load(t, Loader=L)
eval("1")
subprocess.run("ls", shell=True)
numpy.load(p, allow_pickle=True)
"""
    assert [int(found.split()[1].rstrip(":")) for found in dangers(source)] == [3, 4, 4, 5, 6, 7, 8, 9]


class Payload:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return (Path.touch, (self.mark,))


def as_pickle(content: object, path: Path) -> None:
    path.write_bytes(pickle.dumps(content))


def as_zip(content: object, path: Path) -> None:
    buffer = io.BytesIO()  # under a name of its own the archive would be refused for its suffix
    torch.save(content, buffer)
    path.write_bytes(buffer.getvalue())


def as_legacy(content: object, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


WRITERS = {"pickle": as_pickle, "zip": as_zip, "legacy": as_legacy}


@pytest.fixture
def payload(tmp_path: Path) -> Payload:
    """One that works."""
    found = Payload(tmp_path / "executed")
    pickle.loads(pickle.dumps(found))
    assert found.mark.exists()
    found.mark.unlink()
    return found


def refused(action: Callable[[], object], path: Path, payload: Payload) -> bool:
    """Whether there is one message, of one line, that names the file, and nothing ran."""
    try:
        action()
    except InputError as error:
        return str(path) in str(error) and "\n" not in str(error) and not payload.mark.exists()
    return False


def test_pickles_under_any_name_never_run(payload: Payload, toy: Toy, tmp_path: Path, counted: Counted) -> None:
    state = torch.load(toy.teacher, weights_only=True)
    contents = (payload, {"state_dict": payload}, {**state, "extra": payload}, [payload], {payload: 1})
    outcomes = []
    for write in WRITERS.values():
        for content in contents:
            for suffix in ("th", "pth", "pt", "bin", "safetensors", "npz", "pkl"):
                path = tmp_path / f"weights.{suffix}"
                write(content, path)
                outcomes.append(refused(lambda path=path: read_state_dict(path), path, payload))
    # A folder as timm writes them, and one as exports are.
    folder = tmp_path / "folder"
    student = build_student(from_mapping({"student": {"model": "vit_nano"}}).student, resolution=32, num_classes=4,
                            channels=3, mean=(0.5,) * 3, std=(0.2,) * 3, seed=0)  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(student.timm_config(list("abcd"))))
    for write in WRITERS.values():
        path = folder / "model.safetensors"
        write({"state_dict": payload}, path)
        outcomes.append(refused(lambda: read_export(folder), path, payload))
        outcomes.append(refused(lambda: load_teacher({"model": f"local-dir:{folder}"}, 4), path, payload))
        path.unlink()
        for name in ("pytorch_model.bin", "model.pth"):
            write({"state_dict": payload}, folder / name)
            action = lambda: load_teacher({"model": f"local-dir:{folder}"}, 4)  # noqa: E731
            outcomes.append(refused(action, folder / name, payload))
            (folder / name).unlink()
    counted("malicious weights refused, not run", done=sum(outcomes), of=len(outcomes))


def test_what_timm_finds_in_its_cache_never_runs(payload: Payload, toy: Toy, tmp_path: Path) -> None:
    """As the hub's client would have left it there; timm reads it by itself."""
    repository = tmp_path / "hub" / "models--timm--resnet10t.c3_in1k"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    as_zip({"state_dict": payload}, snapshot / "pytorch_model.bin")
    recipe = toy.mapping(teacher=None, student={"model": "resnet10t.c3_in1k", "pretrained": True}, distill=[])
    for key in ("patch_size", "attention", "drop_path"):
        del recipe["student"][key]
    recipe["data"]["resolution"] = 32
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    done = subprocess.run(
        [sys.executable, "-m", "distill.cli", "train", "recipe.yaml", "--dry-run"], cwd=tmp_path, capture_output=True,
        text=True, check=False, env=environment(HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1",
                                                TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD="1", PYTHONPATH=str(ROOT)),
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "student.pretrained: timm's weights resnet10t.c3_in1k cannot be used" in done.stderr
    assert "Traceback" not in done.stderr
    assert not payload.mark.exists()


def test_a_checkpoint_with_a_pickle_never_runs(payload: Payload, toy: Toy, tmp_path: Path) -> None:
    """Even one whose manifest was made to fit."""
    arguments = ["train", toy.recipe, "--out", "run", "teacher=null", "distill=[]"]
    begun = launch([*arguments, "train.max_minutes=0.00001"], cwd=tmp_path)
    assert begun.wait() == [75], begun.output
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("step_*")
    as_zip({"state": payload}, checkpoint / "optimizer.pt")
    (manifest,) = (path for path in checkpoint.iterdir() if "optimizer.pt" in path.read_bytes().decode(errors="ignore")
                   and path.suffix == ".json")  # fmt: skip
    before = json.loads(manifest.read_text())["optimizer.pt"]
    after = hashlib.sha256((checkpoint / "optimizer.pt").read_bytes()).hexdigest()
    manifest.write_text(manifest.read_text().replace(before, after))
    again = launch([*arguments, "--resume", "auto"], cwd=tmp_path)
    assert again.wait() != [0]
    assert "Traceback" not in again.output
    assert len(again.output.splitlines()) < 20
    assert not payload.mark.exists()


def test_pickled_data_of_torchvision_never_run(
    payload: Payload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "data" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for name in ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"):
        as_pickle(payload, folder / name)
    as_pickle(payload, folder / "batches.meta")
    monkeypatch.setattr(datasets.CIFAR10, "download", lambda self: None)
    with pytest.raises(InputError, match="corrupted"):
        open_dataset(Data(root=str(tmp_path / "data")), seed=0, device=torch.device("cpu"))
    assert not payload.mark.exists()


TAGS = ("object/apply:os.system", "object/new:os.system", "object:os.system", "name:os.system", "module:os", "tuple",
        "object/apply:subprocess.check_output", "object/apply:builtins.eval")  # fmt: skip


def test_tags_of_a_recipe_never_run(tmp_path: Path, counted: Counted) -> None:
    mark, path, outcomes = tmp_path / "executed", tmp_path / "recipe.yaml", []
    for tag in TAGS:
        for text in (
            f"name: !!python/{tag} ['touch {mark}']",
            f"!!python/{tag} ['touch {mark}']",
            f"? !!python/{tag} ['touch {mark}']\n: 1",
            f"%TAG !p! tag:yaml.org,2002:python/\n---\nname: !p!{tag} ['touch {mark}']",
            f"data: &a {{root: !<tag:yaml.org,2002:python/{tag}> ['touch {mark}']}}\ntrain: {{<<: *a}}",
        ):
            path.write_text(text)
            with pytest.raises(InputError) as caught:
                load(path)
            outcomes.append("\n" not in str(caught.value) and not mark.exists())
        with pytest.raises(InputError):
            from_mapping({}, [f"name=!!python/{tag} ['touch {mark}']"])
        outcomes.append(not mark.exists())
    counted("YAML tags refused, not run", done=sum(outcomes), of=len(outcomes))


NAMES = (
    "<script>alert(1)<", "<img src=x onerror=alert(1)>", "](javascript:alert(1))", "[x](javascript:alert(1))",
    "![x](http:x.png)", "a|b|c", "`code`", "```", "*bold* __x__", "# head", "- item", "&lt;b&gt;", "a\nb | c |",
    "\x1b[31mred\x1b[0m", "[bold red]x[/]", "[/]", "\u202egnp", "---", "\\", "\\|", "'\"><b>", "{{7*7}}", "$(x)",
)  # fmt: skip


class Tags(HTMLParser):
    """The tags of a page and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


RENDER = MarkdownIt("commonmark").enable("table").enable("strikethrough")


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_itself_in_markdown(name: str) -> None:
    page = Tags(RENDER.render(f"| a | b |\n| --- | --- |\n| {markdown(name)} | 1 |\n\n- key: {markdown(name)}\n"))
    assert page.tags.count("td") == 2
    assert set(page.tags) <= {"table", "thead", "tbody", "tr", "th", "td", "ul", "li", "strong", "em"}
    shown = visible(name).replace("\n", " ")
    if "_" not in name:
        assert page.text.count(shown) == 2


@pytest.mark.parametrize("step", some([4, 1]))
def test_reports_and_consoles_show_names_as_they_are(
    make_run: Callable[..., Path],  # noqa: F811
    tmp_path: Path,
    step: int,
) -> None:
    usable = [name for name in NAMES if "/" not in name][::step]
    runs = [make_run(name, seed=seed) for seed, name in enumerate(usable)]
    # Recipes of one name, as where all names but one are none.
    plain = [make_run(f"plain{seed}", seed=seed, recipe={"name": "plain"}) for seed in range(len(usable))]
    pages = []
    for number, group in enumerate((plain, runs)):
        comparison = compare(group)
        html, text, *_ = write_report(comparison, tmp_path / f"report {number}.html")
        shown = Console(file=io.StringIO(), width=400, force_terminal=False)
        shown.print(render_console(comparison))
        pages.append((Tags(html.read_text()), Tags(RENDER.render(text.read_text())), shown.file.getvalue()))
    (ours, ours_text, _), (theirs, theirs_text, console) = pages
    assert set(theirs.tags) == set(ours.tags)
    assert theirs.tags.count("td") == ours.tags.count("td")
    structures = [[tag for tag in page.tags if tag not in ("strong", "em")] for page in (ours_text, theirs_text)]
    assert structures[0] == structures[1]
    assert "\x1b" not in console
    for name in usable:
        assert visible(name).replace("\n", " ") in theirs.text.replace("\n", " ")


@pytest.mark.soak
def test_a_card_shows_names_as_they_are(toy: Toy, tmp_path: Path) -> None:
    """A teacher's name comes from the recipe: here a folder's."""
    folder = tmp_path / "<img src=x> [x](javascript:y) |`"
    student = build_student(from_mapping({"student": {"model": "vit_nano", "patch_size": 4}}).student, resolution=8,
                            num_classes=4, channels=3, mean=(0.5,) * 3, std=(0.2,) * 3, seed=0)  # fmt: skip
    write_export(student, folder, class_names=["<script>", "](x)", "a|b", "\x1b[31m"], metadata={}, readme="")
    recipe = toy.mapping(teacher={"model": f"local-dir:{folder}", "min_accuracy": 0.0})
    del recipe["teacher"]["weights"]
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    done = launch(["train", "recipe.yaml", "train.max_steps=1", "--out", "run"], cwd=tmp_path)
    assert done.wait() == [0], done.output
    card = (tmp_path / "run" / "export" / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    assert list(yaml.safe_load(front)) == [
        "library_name", "pipeline_tag", "license", "datasets", "metrics", "tags", "model-index",
    ]  # fmt: skip
    page = Tags(RENDER.render(body))
    table = {"table", "thead", "tbody", "tr", "th", "td"}
    assert set(page.tags) <= {"h1", "h2", "p", "ul", "li", "pre", "code", *table}
    assert f"teacher: local-dir:{folder}" in page.text
    assert "\x1b" not in done.output
