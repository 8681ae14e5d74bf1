"""The batch path must not wait for the device: nothing in it may need a value on the host."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from distill.data import BatchPlan, open_dataset, rows
from distill.recipe import Augment, Data

SPEC = Data(
    name="digits",
    augment={"crop_padding": 2, "hflip": True, "random_erasing": 0.25, "mixup": 0.8, "cutmix": 1.0},
)
CROP = SPEC.model_copy(
    update={"augment": SPEC.augment.model_validate({"random_resized_crop": {}, "hflip": True, "cutmix": 1.0})}
)
JITTER = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}
RAND_AUGMENT = Data(
    name="digits", augment={"crop_padding": 2, "hflip": True, "rand_augment": {}, "color_jitter": JITTER, "mixup": 0.8}
)
TRIVIAL_AUGMENT = Data(name="digits", augment={"random_resized_crop": {}, "trivial_augment": True})
SPECS = pytest.mark.parametrize(
    "spec",
    [SPEC, CROP, RAND_AUGMENT, TRIVIAL_AUGMENT],
    ids=["pad and crop", "resized crop", "RandAugment", "TrivialAugment"],
)
PLAN = BatchPlan(0, 64, accumulation=2)


class Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(func.overloadpacket.__name__)
        # A boolean mask as an index has a result of unknown shape, just as nonzero.
        masks = args[1] if func.overloadpacket.__name__ in ("index", "index_put", "index_put_") else []
        if any(mask is not None and mask.dtype == torch.bool for mask in masks):
            self.seen.add("nonzero")
        return func(*args, **(kwargs or {}))


@SPECS
def test_no_operator_of_a_batch_needs_the_host(spec: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "picks_rows", lambda device: False)  # which only a CPU does
    batches = open_dataset(spec, seed=0, device=torch.device("cpu")).training_batches(PLAN, epoch=0)
    next(batches)  # keys are made once an epoch
    with Operators() as operators:
        next(batches)
    assert "gather" in operators.seen or "grid_sampler_2d" in operators.seen
    waiting = {"_local_scalar_dense", "item", "nonzero", "masked_select", "unique", "_unique2", "is_nonzero"}
    assert not operators.seen & waiting


@SPECS
def test_no_compiled_index_arithmetic_leaves_32_bits(spec: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor computes what is made of `arange` alone in 32 bits on a GPU, where a larger factor does not compile."""
    monkeypatch.setattr(rows, "picks_rows", lambda device: False)  # as on a GPU
    seen: list[int] = []

    def backend(module: torch.fx.GraphModule, _: Any) -> Any:
        made: set[torch.fx.Node] = set()  # of no input
        for node in module.graph.nodes:
            seen.extend(argument for argument in node.args if isinstance(argument, int))
            if node.op == "call_function" and all(source in made for source in node.all_input_nodes):
                made.add(node)
                large = [argument for argument in node.args if isinstance(argument, int) and abs(argument) >= 2**31]
                assert not large, f"{node.name}: {large}"
        return module

    augmenter = open_dataset(spec, seed=0, device=torch.device("cpu")).augmenter
    augmenter._augment = torch.compile(augmenter._augment, backend=backend, dynamic=False)
    indices = torch.arange(8)
    augmenter(torch.zeros(8, 1, 32, 32, dtype=torch.uint8), indices, indices, seed=0, epoch=0)
    assert max(seen) >= 2**31 - 1  # hashes of what was given to it


def test_switching_mixing_off_compiles_nothing_anew_and_gives_what_eager_code_gives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    augment = {"hflip": True, "mixup": 0.8, "cutmix": 1.0, "mix_probability": 0.7, "mix_off_epoch": 2}
    spec = Data(name="digits", resolution=32, augment=Augment.model_validate(augment))
    images = torch.randint(0, 256, (8, 1, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    indices = torch.arange(8)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    eager, compiled = (open_dataset(spec, seed=0, device=torch.device("cpu")).augmenter for _ in range(2))
    compiled.compile()
    for epoch in range(4):
        expected, found = (one(images, indices, indices, seed=0, epoch=epoch) for one in (eager, compiled))
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
        assert (found[1].max(1).values < 1).any() == (epoch < 2)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@SPECS
@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_batches_on_a_gpu_are_those_of_the_cpu_and_never_wait(spec: Data, compiled: bool) -> None:
    datasets = [open_dataset(spec, seed=0, device=torch.device(kind)) for kind in ("cpu", "cuda")]
    if compiled:
        torch.compiler.reset()
        datasets[1].augmenter.compile()
    on_cpu, on_gpu = (dataset.training_batches(PLAN, epoch=0) for dataset in datasets)
    next(on_cpu), next(on_gpu)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step = next(on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for ours, theirs in zip(next(on_cpu), step, strict=True):
        assert torch.equal(ours.indices, theirs.indices.cpu())
        torch.testing.assert_close(ours.images, theirs.images.cpu(), atol=1e-5 if spec is CROP else 1e-6, rtol=0)
        torch.testing.assert_close(ours.targets, theirs.targets.cpu(), atol=1e-6, rtol=0)
