"""ResNets for CIFAR: He et al. 2015, "Deep Residual Learning" (arXiv 1512.03385), section 4.2, with option A shortcuts.

Importing this module registers cifar_resnet20, 32, 44, 56, 110 and 1202 with timm. The names of the parameters are
those of the public weights listed in zoo.yaml.
"""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from teachers.zoo import ZOO


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters: [B, in, H, W] -> [B, out, H / stride, W / stride]."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.stride = stride
        self.padding = (out_channels - in_channels) // 2

    def forward(self, x: Tensor) -> Tensor:
        residual = F.relu(self.bn1(self.conv1(x)), inplace=True)
        residual = self.bn2(self.conv2(residual))
        if self.padding:
            # Option A: every second pixel, and zeros for the new channels, half of them on either side.
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(residual + x, inplace=True)


class CifarResNet(nn.Module):
    """Depth 6n + 2: a 3x3 convolution, three stages of n blocks with 16, 32 and 64 channels, global mean, linear head.

    Normalised images [B, in_chans, H, W] of any size (32 px in the paper) -> logits [B, num_classes], or the 64 pooled
    features if num_classes is 0. The interface is that of timm's models.
    """

    def __init__(self, depth: int, num_classes: int = 10, in_chans: int = 3) -> None:
        super().__init__()
        assert depth % 6 == 2, f"a CIFAR ResNet has depth 6n + 2, not {depth}"
        blocks = (depth - 2) // 6
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = 64
        self.conv1 = nn.Conv2d(in_chans, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks, stride=1)
        self.layer2 = _stage(16, 32, blocks, stride=2)
        self.layer3 = _stage(32, 64, blocks, stride=2)
        self.linear = _head(64, num_classes)
        self.feature_info = [
            {"num_chs": 16 * reduction, "reduction": reduction, "module": f"layer{stage}"}
            for stage, reduction in ((1, 1), (2, 2), (3, 4))
        ]
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward_features(self, x: Tensor) -> Tensor:
        """[B, in_chans, H, W] -> [B, 64, H / 4, W / 4]."""
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return self.layer3(self.layer2(self.layer1(x)))

    def forward_intermediates(
        self, x: Tensor, indices: int | list[int] | None = None, intermediates_only: bool = False, **kwargs: Any
    ) -> Any:
        """The output of `forward_features` and those of stages `indices` (timm: of the last n, or of all), in order.

        timm's other arguments are ignored: maps are [B, C, h, w], without extra norms.
        """
        assert kwargs.get("output_fmt", "NCHW") == "NCHW", "a CNN's maps are NCHW"
        wanted, _ = feature_take_indices(3, indices)
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        intermediates = []
        for index, stage in enumerate((self.layer1, self.layer2, self.layer3)):
            x = stage(x)
            if index in wanted:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """[B, 64, H / 4, W / 4] -> logits [B, num_classes], or [B, 64] with `pre_logits`."""
        x = x.mean((2, 3))
        return x if pre_logits else self.linear(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        return self.linear

    def reset_classifier(self, num_classes: int) -> None:
        """A new head for `num_classes`, on the device of the old weights."""
        self.num_classes = num_classes
        self.linear = _head(self.num_features, num_classes).to(self.conv1.weight)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's map from parameter names to layers, for layer-wise learning rates."""
        return {"stem": r"^(?:conv1|bn1)", "blocks": r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"}

    def fold_batch_norms(self) -> None:
        """Fold every batch norm into the preceding convolution, for inference; changes the state dict."""
        self.eval()
        for module in list(self.modules()):
            for conv, norm in (("conv1", "bn1"), ("conv2", "bn2")):
                if hasattr(module, conv):
                    setattr(module, conv, fuse_conv_bn_eval(getattr(module, conv), getattr(module, norm)))
                    setattr(module, norm, nn.Identity())


def _stage(in_channels: int, out_channels: int, blocks: int, stride: int) -> nn.Sequential:
    rest = (BasicBlock(out_channels, out_channels, 1) for _ in range(blocks - 1))
    return nn.Sequential(BasicBlock(in_channels, out_channels, stride), *rest)


def _head(features: int, num_classes: int) -> nn.Module:
    return nn.Linear(features, num_classes) if num_classes else nn.Identity()


def _create(variant: str, depth: int, pretrained: bool, kwargs: dict[str, Any]) -> CifarResNet:
    # Of features_only; timm's default wants five stages, and calls modules one after another, without what is between.
    features = {"out_indices": (0, 1, 2), "feature_cls": "getter"}
    return build_model_with_cfg(CifarResNet, variant, pretrained, depth=depth, feature_cfg=features, **kwargs)


# No URLs: weights are loaded by `load_teacher`, which checks their hash.
default_cfgs = generate_default_cfgs(
    {
        name: {
            "num_classes": entry.num_classes,
            "input_size": (len(entry.mean), entry.size, entry.size),
            "pool_size": (entry.size // 4, entry.size // 4),
            "interpolation": entry.interpolation,
            "crop_pct": 1.0,
            "mean": entry.mean,
            "std": entry.std,
            "first_conv": "conv1",
            "classifier": "linear",
        }
        for name, entry in ZOO.items()
        if name == entry.architecture and name.startswith("cifar_resnet")
    }
)


@register_model
def cifar_resnet20(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    return _create("cifar_resnet20", 20, pretrained, kwargs)


@register_model
def cifar_resnet32(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    return _create("cifar_resnet32", 32, pretrained, kwargs)


@register_model
def cifar_resnet44(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    return _create("cifar_resnet44", 44, pretrained, kwargs)


@register_model
def cifar_resnet56(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    return _create("cifar_resnet56", 56, pretrained, kwargs)


@register_model
def cifar_resnet110(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    return _create("cifar_resnet110", 110, pretrained, kwargs)


@register_model
def cifar_resnet1202(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    return _create("cifar_resnet1202", 1202, pretrained, kwargs)
