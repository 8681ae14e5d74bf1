"""Evaluation sees every sample once and answers the same, whatever the number of processes and the batch."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file, save_file

from distill.data import open_dataset
from distill.data.packed import write_packed
from distill.evaluation import predict
from distill.launching.processes import build_accelerator, start_processes
from distill.recipe import Data
from distill.recipe.schema import Train
from distill.report.metrics import measure
from tests.conftest import Counted
from tests.warm import launch

SAMPLES = 10_007
PROCESSES = (1, 2, 3)
BATCHES = (37, 64, 128, 1000, 20_000)


def write_images(folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for split, size in (("train", 20), ("test", SAMPLES)):
        tensors[f"{split}.images"] = torch.randint(0, 256, (size, 3, 8, 8), generator=generator, dtype=torch.uint8)
        tensors[f"{split}.labels"] = torch.arange(size) % 10
    write_packed(folder / "many.safetensors", name="many", class_names=tuple("abcdefghij"), tensors=tensors)


def evaluate_in_all_batches(folder: Path) -> None:
    """Write this process's logits [SAMPLES, 10] for each batch size, then end."""
    state = start_processes()
    accelerator = build_accelerator(Train(), folder)
    spec = Data(name="many.safetensors", root=str(folder), validation=0, resolution=8)
    dataset = open_dataset(spec, seed=0, device=accelerator.device)
    torch.manual_seed(0)
    student = timm.create_model(
        "vit_tiny_patch16_224", img_size=8, patch_size=4, embed_dim=16, depth=1, num_heads=2, num_classes=10
    ).eval()
    logits = {}
    for batch in BATCHES:
        (outputs,) = predict(lambda images: [10 * student(images)], dataset, "test", accelerator, batch_size=batch)
        logits[str(batch)] = outputs.contiguous()
    save_file(logits, folder / f"{state.num_processes}-{state.process_index}.safetensors")
    raise SystemExit(0)


def test_the_same_counts_and_logits(tmp_path: Path, counted: Counted) -> None:
    write_images(tmp_path)
    for processes in PROCESSES:
        launched = launch([], cwd=tmp_path, processes=processes, before=partial(evaluate_in_all_batches, tmp_path))
        assert launched.wait() == [0] * processes, launched.output
    labels = load_file(tmp_path / "many.safetensors")["test.labels"].numpy()
    expected = load_file(tmp_path / "1-0.safetensors")["20000"]
    assert expected.shape == (SAMPLES, 10)
    assert expected.std() > 0.1
    metrics = measure(expected.numpy(), labels)
    done, difference = 0, 0.0
    for processes in PROCESSES:
        found = [load_file(tmp_path / f"{processes}-{rank}.safetensors") for rank in range(processes)]
        for batch in map(str, BATCHES):
            assert all(torch.equal(logits[batch], found[0][batch]) for logits in found), "every process has them all"
            gap = float((found[0][batch] - expected).abs().max())
            counts = measure(found[0][batch].numpy(), labels)
            same = (counts.top1_correct, counts.topk_correct) == (metrics.top1_correct, metrics.topk_correct)
            done += same and gap <= 1e-5
            difference = max(difference, gap)
    counted("evaluation is exact", done=done, of=len(PROCESSES) * len(BATCHES), samples=SAMPLES, difference=difference)
