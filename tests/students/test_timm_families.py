"""Feature maps of every family of timm's, as student and as teacher, beside the plain forward pass."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import timm
import torch
from timm.models import is_model_in_modules

from distill.students import build_student
from teachers import Teacher
from tests.conftest import some
from tests.students.helpers import student_options

SMALLEST = [
    "botnet26t_256", "cait_xxs24_224", "coat_lite_tiny", "convit_tiny", "convmixer_768_32", "cpubone_nano",
    "cs3darknet_focus_s", "cspnext_tiny", "davit_tiny", "deit_tiny_distilled_patch16_224", "densenet121",
    "dla46x_c", "dpn48b", "edgenext_xx_small", "efficientformerv2_s0", "efficientvim_m1_dist", "efficientvit_b0",
    "efficientvit_m0", "ese_vovnet19b_slim_dw", "eva02_tiny_patch14_224", "fasternet_t0", "fastvit_t8",
    "focalnet_tiny_srf", "gcvit_xxtiny", "ghostnet_050", "gmlp_ti16_224", "hardcorenas_a", "hgnetv2_b0",
    "hiera_tiny_224", "hrnet_w18_small", "iformer_m_distilled", "inception_next_atto", "lcnet_035", "lcnetv2_small",
    "legacy_seresnet18", "legacy_xception", "levit_128s", "lowformer_b0", "mnasnet_small", "mobilevit_xxs",
    "mvitv2_tiny", "nest_tiny", "nextvit_small", "pit_ti_distilled_224", "poolformerv2_s12", "pvt_v2_b0",
    "rdnet_tiny", "regnetx_002", "repghostnet_050", "repvit_m0_9", "res2net50_14w_8s", "resnest14d", "resnet10t",
    "resnetv2_18", "rexnetr_100", "sam2_hiera_tiny", "selecsls42", "sequencer2d_s", "shvit_s1", "skresnet18",
    "starnet_s050", "swiftformer_xs", "swin_tiny_patch4_window7_224", "swinv2_cr_tiny_224",
    "swinv2_tiny_window8_256", "test_byobnet", "test_convnext", "test_mambaout", "test_maxvit", "test_nfnet",
    "test_vit", "test_vit_relpos", "tiny_vit_5m_224", "tnt_s_patch16_224", "tresnet_m", "twins_svt_small",
    "visformer_tiny", "vit_tiny_r_s16_p8_224", "vitamin_small_224", "volo_d1_224", "xception41",
    "xcit_nano_12_p16_224",
]  # fmt: skip
"""A small model of each family, which takes 32 pixels."""
LARGER = {"crossvit_tiny_240": 240, "csatv2": 64, "efficientformer_l1": 224, "inception_v3": 96}
"""Those that take no image so small, and the side of one that they do take."""
GIANT = {
    "beit", "deepseek_vit", "gemma4_vit", "inception_resnet_v2", "inception_v4", "mobilenetv5", "naflexvit", "nasnet",
    "pnasnet", "qwen3_vit", "vgg", "vision_transformer_sam",
}  # fmt: skip
"""Families whose smallest model has more than 40 million parameters. vgg is tested in tests/teachers."""


def test_no_family_is_left_out() -> None:
    """Of the version that the table was made with; a later one may have others."""
    covered = {module for name in (*SMALLEST, *LARGER) for module in _modules_of(name)}
    theirs = {name for name in timm.list_modules() if find_spec(f"timm.models.{name}")}
    left_out = theirs - covered
    print(
        f"{len(theirs & covered)} of timm's families are tested, {len(left_out)} are not: {', '.join(sorted(left_out))}"
    )
    if timm.__version__ == "1.0.31":
        assert left_out == GIANT


def _modules_of(name: str) -> list[str]:
    return [module for module in timm.list_modules() if is_model_in_modules(name, [module])]


@torch.no_grad()
@pytest.mark.parametrize("name", some(ALL := [*SMALLEST, *LARGER], *range(0, len(ALL), 6)))
def test_maps_stand_beside_the_plain_logits(name: str) -> None:
    if not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    side = LARGER.get(name, 32)
    student = build_student(
        student_options(model=name),
        resolution=side, num_classes=5, channels=3, mean=(0.5, 0.4, 0.3), std=(0.2,) * 3, seed=0,
    ).eval()  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    for weight in student.parameters():
        if weight.ndim > 1:  # timm's own let the logits of some models depend on the image too little, or not at all
            weight.normal_(0, (2 / weight[0].numel()) ** 0.5, generator=generator)
    images = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(5))
    plain = student.logits(images)
    assert all((logits[0] != logits[1]).any() for logits in plain.values()), "the images must differ for this to count"
    last = len(student.stages) - 1
    every = tuple(range(last + 1))
    for want in dict.fromkeys([every, (0,), (last,)]):
        student.check_maps(want)
        features = student(images, want)
        assert all(torch.equal(features.logits[head], plain[head]) for head in student.heads)
        assert tuple(features.maps) == want
        assert [found.shape[:2] for found in features.maps.values()] == [
            (2, student.stages[stage].channels) for stage in want
        ]
    teacher = Teacher(name, student.model, student.adapter.contract, 5)
    logits = teacher(images)
    shapes = teacher.map_shapes(side)
    # CrossViT gives its two branches the same names: a teacher's are those of the first.
    assert list(shapes) == list(dict.fromkeys(stage.name for stage in student.stages))
    for names in (tuple(shapes), tuple(shapes)[:1]):
        teacher.prepare_maps(names, side)
        answered, maps = teacher(images, names)
        assert torch.equal(answered, logits)
        assert {key: found.shape for key, found in maps.items()} == {key: (2, *shapes[key]) for key in names}
