from __future__ import annotations

import copy

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from torch.nn import functional as F

import teachers.cifar_resnet
from teachers.cifar_resnet import CifarResNet

# He et al. 2015, table 6, gives 0.27, 0.46, 0.66, 0.85, 1.7 and 19.4 M; to the unit they follow from the layers.
PARAMETERS = {20: 269_722, 32: 464_154, 44: 658_586, 56: 853_018, 110: 1_727_962, 1202: 19_421_274}


def _lively(model: nn.Module) -> nn.Module:
    """Batch norms that would be noticed if they were left out."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model.eval()


def _oracle(state: dict[str, Tensor], x: Tensor, blocks: int) -> Tensor:
    """The network of section 4.2, written from its state dict alone."""

    def conv_norm(x: Tensor, conv: str, norm: str, stride: int = 1) -> Tensor:
        x = F.conv2d(x, state[f"{conv}.weight"], stride=stride, padding=1)
        mean, var = state[f"{norm}.running_mean"], state[f"{norm}.running_var"]
        x = (x - mean[:, None, None]) / torch.sqrt(var + 1e-5)[:, None, None]
        return x * state[f"{norm}.weight"][:, None, None] + state[f"{norm}.bias"][:, None, None]

    x = conv_norm(x, "conv1", "bn1").clamp(min=0)
    for stage in (1, 2, 3):
        for block in range(blocks):
            at = f"layer{stage}.{block}"
            stride = 2 if stage > 1 and block == 0 else 1
            y = conv_norm(x, f"{at}.conv1", f"{at}.bn1", stride).clamp(min=0)
            y = conv_norm(y, f"{at}.conv2", f"{at}.bn2")
            if stride == 2:
                shortcut = torch.zeros_like(y)
                extra = (y.shape[1] - x.shape[1]) // 2
                for channel in range(x.shape[1]):
                    shortcut[:, channel + extra] = x[:, channel, 0::2, 0::2]
                x = shortcut
            x = (x + y).clamp(min=0)
    return x.flatten(2).mean(2) @ state["linear.weight"].T + state["linear.bias"]


@pytest.mark.parametrize("depth", PARAMETERS)
def test_parameters(depth: int) -> None:
    with torch.device("meta"):
        model = timm.create_model(f"cifar_resnet{depth}")
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[depth]


@pytest.mark.parametrize(("depth", "side"), [(20, 32), (32, 12)])
def test_equals_the_paper_written_out(depth: int, side: int) -> None:
    model = _lively(timm.create_model(f"cifar_resnet{depth}", num_classes=7)).double()
    x = torch.randn(2, 3, side, side, dtype=torch.float64)
    expected = _oracle(model.state_dict(), x, (depth - 2) // 6)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-10)


def test_folding_batch_norms_changes_nothing_but_rounding() -> None:
    model = _lively(timm.create_model("cifar_resnet20")).double()
    folded = copy.deepcopy(model)
    folded.fold_batch_norms()
    assert not [module for module in folded.modules() if isinstance(module, nn.BatchNorm2d)]
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(folded(x), model(x), rtol=0, atol=1e-10)


def test_interface_of_timm() -> None:
    model = timm.create_model("cifar_resnet20", num_classes=5, in_chans=1)
    x = torch.randn(2, 1, 16, 16)
    features = model.forward_features(x)
    assert features.shape == (2, model.num_features, 4, 4)
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
    torch.testing.assert_close(
        model.forward_head(features), model(x), rtol=0, atol=1e-4
    )  # batch norm moves between the two
    assert model.get_classifier() is model.linear
    model.reset_classifier(3)
    assert model.num_classes == 3
    assert model(x).shape == (2, 3)
    model.reset_classifier(0)
    assert model(x).shape == (2, 64)
    for info in model.feature_info:
        assert isinstance(model.get_submodule(info["module"])[-1].conv2, nn.Conv2d)
        assert model.get_submodule(info["module"])[-1].conv2.out_channels == info["num_chs"]
    assert model.pretrained_cfg["input_size"] == (3, 32, 32)


def test_layer_decay_sees_every_layer() -> None:
    groups = param_groups_layer_decay(timm.create_model("cifar_resnet20"), layer_decay=0.5)
    scales = sorted({group["lr_scale"] for group in groups})
    assert scales == [0.5**power for power in range(10, -1, -1)]  # stem, nine blocks, head


def test_timm_gives_no_random_weights_for_pretrained() -> None:
    with pytest.raises(RuntimeError, match="No pretrained weights"):
        timm.create_model("cifar_resnet20", pretrained=True)


def test_a_depth_that_does_not_exist() -> None:
    assert teachers.cifar_resnet.CifarResNet is CifarResNet
    with pytest.raises(AssertionError, match="6n"):
        CifarResNet(21)
