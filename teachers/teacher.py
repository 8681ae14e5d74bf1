"""Frozen teacher network with its own input contract: images in [0, 1] -> logits and feature maps."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distill import recipe
from distill.errors import InputError
from distill.features import example_image, problem_of_maps
from distill.files.digests import state_digest
from distill.inputs import InputAdapter, InputContract
from teachers.cifar_resnet import CifarResNet
from teachers.classes import class_order
from teachers.licences import Origin
from teachers.maps import Reader, cannot_be_read, map_names, no_map, reader_of
from teachers.sources import Wanted, open_source
from teachers.weights import check_numbers

Spec = Mapping[str, Any] | recipe.Teacher


class Teacher(nn.Module):
    """Images in [0, 1], float [B, C, H, W], C the network's channels or 1 -> logits, float32 [B, num_classes].

    A network without a classifier (`num_classes` 0) has no logits: its output is its pooled features, [B, features].

    Frozen: always in eval mode, without gradients, with float32 outputs also under autocast. Keep it outside of the
    student and do not wrap or prepare it, so that it is in no checkpoint.

    Attributes:
        name: as the recipe gives it.
        contract: the input contract, which it applies itself.
        num_classes: of its logits; 0 without a classifier.
        digest: SHA-256 (hex) of its weights; the outputs also depend on the contract.
        origins: licence and source of its weights; of an ensemble, those of each member.
    """

    name: str
    contract: InputContract
    num_classes: int
    digest: str
    origins: tuple[Origin, ...] = (Origin(),)
    order: Tensor | None

    def __init__(
        self,
        name: str,
        network: nn.Module,
        contract: InputContract,
        num_classes: int,
        order: Sequence[int] | None = None,
    ) -> None:
        """`order`: the network's output for each class; None: the same order."""
        super().__init__()
        check_numbers(network, name)
        self.name, self.contract, self.num_classes = name, contract, num_classes
        self.digest = state_digest(network.state_dict())
        self.num_parameters = sum(parameter.numel() for parameter in network.parameters())
        if isinstance(network, CifarResNet):
            network.fold_batch_norms()
        self.adapter = InputAdapter(contract)
        self.register_buffer("order", None if order is None else torch.tensor(order), persistent=False)
        # With folded batch norms: 1,733 images/s instead of 1,199 for ResNet-20 on 2 cores (batch 128).
        self.network = network.to(memory_format=torch.channels_last)
        self.requires_grad_(False)
        self.eval()
        self._readers: dict[tuple[str, ...], Reader] = {}
        self._check_forward()

    @torch.no_grad()  # not inference_mode, whose tensors cannot be targets in the student's graph
    def forward(self, images: Tensor, maps: tuple[str, ...] = ()) -> Any:
        """The output; with names of prepared `maps`, the output and these feature maps, as in `features`."""
        channels = len(self.contract.mean)
        if images.shape[1] not in (1, channels):
            raise InputError(
                f"teacher {self.name}: takes images of {channels} channel(s), the data have {images.shape[1]}."
            )
        inputs = self.adapter(images)
        if not maps:
            return self._output(self.network(inputs))
        output, found = self._readers[maps](inputs)
        return self._output(output), found

    def _output(self, output: Any) -> Tensor:
        """In float32; unpooled features are averaged over all but the first two dimensions."""
        if not isinstance(output, Tensor):
            raise InputError(
                f"teacher {self.name}: returns {type(output).__name__} instead of logits [B, classes]. Wrap it in a "
                "module that returns them, such as `output.logits`."
            )
        if output.dim() > 2 and not self.num_classes:
            output = output.flatten(2).mean(2)
        if self.order is not None and self.num_classes:
            output = output[:, self.order]
        return output.float()

    def features(self, images: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """Feature maps [B, C, h, w] by name, in the network's own precision; see `map_shapes`.

        Raises:
            InputError: no such map.
        """
        return self._features(images, names)[1]

    def _features(self, images: Tensor, names: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        self.prepare_maps(names, images.shape[-1])
        logits, maps = self(images, tuple(names))
        if wrong := [name for name, found in maps.items() if not isinstance(found, Tensor) or found.dim() != 4]:
            raise no_map(self.name, wrong[0], map_names(self.network, self._example(images.shape[-1])))
        return logits, maps

    def prepare_maps(self, names: Sequence[str], resolution: int) -> None:
        """Prepare for these maps at this resolution; raises InputError if there is no such map."""
        if (key := tuple(names)) and key not in self._readers:
            self._readers[key] = reader_of(self.name, self.network, names, self._example(resolution))

    def map_shapes(self, resolution: int, names: Sequence[str] | None = None) -> dict[str, tuple[int, int, int]]:
        """(C, h, w) of its feature maps, first to last, or of those named, at this resolution.

        Raises:
            InputError: as `features`, or they cannot be read along with its logits.
        """
        image = self._example(resolution)
        chosen = map_names(self.network, image) if names is None else names
        if not chosen:
            raise InputError(f"teacher {self.name}: has no feature maps. Take another, or a method on logits.")
        try:
            logits, maps = self._features(image, chosen)
            problem = problem_of_maps([logits], [self(image)], list(maps.values()))
        except (AttributeError, AssertionError, NotImplementedError, RuntimeError, TypeError) as error:
            problem = str(error).partition("\n")[0] or type(error).__name__
        if problem is not None:
            raise cannot_be_read(self.name, problem)
        return {name: (*found.shape[1:],) for name, found in maps.items()}

    def _example(self, resolution: int) -> Tensor:
        """An image as the network takes it, of the size that images of this side are resized to."""
        device = next((weight.device for weight in self.network.parameters()), torch.device("cpu"))
        return example_image(len(self.contract.mean), self.contract.size or resolution, device)

    def train(self, mode: bool = True) -> Teacher:
        """Stays in eval mode."""
        super().train(False)
        return self

    def under(self, contract: InputContract) -> Teacher:
        """The same network, not copied, under another contract.

        Raises:
            InputError: it cannot take such inputs.
        """
        other = copy.copy(self)
        other._modules = {**self._modules, "adapter": InputAdapter(contract).to(self.adapter.mean.device)}
        other.contract, other._readers = contract, {}
        other._check_forward()
        return other

    def with_weights_in(self, precision: torch.dtype) -> Teacher:
        """A copy for use under autocast to `precision`: the same logits, bit for bit, without casting all weights in
        each forward pass. Autocast remembers the casts of weights only if they are trained.
        """
        copied = copy.deepcopy(self)
        copied._readers = {}
        for module in copied.modules():
            # A subclass may compute with its weights before it uses them (weight standardisation).
            if type(module) in (nn.Conv2d, nn.Linear):
                module.to(precision)
        return copied

    def describe(self) -> str:
        """One line: name, size, inputs, weights."""
        classes = f"{self.num_classes} classes" if self.num_classes else "no classifier"
        classes += "" if self.order is None else " in another order than the data's"
        return (
            f"{self.name}: {self.num_parameters / 1e6:.2f} M parameters, {classes}, "
            f"inputs {self.contract}, weights {self.digest[:8]}"
        )

    def _check_forward(self) -> None:
        try:
            shape = list(self(self._example(32)).shape)
        except (RuntimeError, AssertionError, ValueError, TypeError) as error:
            raise InputError(
                f"teacher {self.name}: cannot take its inputs, {self.contract} ({error}). "
                "Check teacher.size, teacher.mean and teacher.std."
            ) from error
        if shape != [1, self.num_classes] and (self.num_classes or len(shape) != 2):
            raise InputError(
                f"teacher {self.name}: no classifier of {self.num_classes} classes; its output has the shape {shape}."
            )


class Ensemble(Teacher):
    """Several teachers, each under its own contract: the log of the weighted mean of their probabilities.

    These log-probabilities are its logits: their softmax is that mean. Its own contract changes nothing.
    """

    def __init__(self, members: Sequence[Teacher], weights: Sequence[float]) -> None:
        assert len(members) == len(weights) > 0
        nn.Module.__init__(self)
        self.members = nn.ModuleList(members)
        self.weights = [weight / sum(weights) for weight in weights]
        self.name = " + ".join(member.name for member in members)
        channels = max(len(member.contract.mean) for member in members)
        self.contract = InputContract((0.0,) * channels, (1.0,) * channels)
        self.num_classes = members[0].num_classes
        self.origins = tuple(origin for member in members for origin in member.origins)
        self.num_parameters = sum(member.num_parameters for member in members)
        pairs = list(zip(members, self.weights, strict=True))
        self._lines = "; ".join(f"{share:.3g} x {member.describe()}" for member, share in pairs)
        parts = [f"{member.digest} {share!r}" for member, share in pairs]
        self.digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()

    @property
    def teachers(self) -> list[Teacher]:
        """The members, typed."""
        return [member for member in self.members if isinstance(member, Teacher)]

    @torch.no_grad()
    def forward(self, images: Tensor, maps: tuple[str, ...] = ()) -> Any:
        assert not maps, "the members have maps, the ensemble has none"
        pairs = zip(self.members, self.weights, strict=True)
        return torch.stack([member(images).log_softmax(1) + math.log(share) for member, share in pairs]).logsumexp(0)

    def prepare_maps(self, names: Sequence[str], resolution: int) -> None:
        if names:
            raise InputError(f"teacher {self.name}: an ensemble has no feature maps of its own; name a single teacher.")

    def map_shapes(self, resolution: int, names: Sequence[str] | None = None) -> dict[str, tuple[int, int, int]]:
        raise InputError(f"teacher {self.name}: an ensemble has no feature maps of its own; name a single teacher.")

    def describe(self) -> str:
        return f"ensemble of {len(self.members)}: {self._lines}"


def load_teacher(
    spec: Spec | Sequence[Spec],
    num_classes: int,
    class_names: Sequence[str] | None = None,
    *,
    any_classifier: bool = False,
) -> Teacher:
    """The teacher of a recipe's `teacher` section, with `num_classes` classes or without a classifier; a sequence is an
    ensemble. Logits are in the order of `class_names`, the data's, where the order of its own is known.

    Args:
        any_classifier: whether one of another number of classes is taken off, for methods on feature maps, rather than
            an error.

    Raises:
        InputError: `spec` is invalid, model or weights cannot be loaded, or they do not fit each other or the data.
    """
    section = [_plain(one) for one in spec] if isinstance(spec, Sequence) else _plain(spec)
    specs = recipe.from_mapping({"teacher": section}, source="teacher").teachers
    members = []
    for one in specs:
        if one.model is None:
            raise InputError(
                f"teacher.recipe: {one.recipe} has to be trained first; then give teacher.model=local-dir:ITS_EXPORT."
            )
        source = open_source(one, Wanted(num_classes, any_classifier))
        order = class_order(one, source.class_names, class_names) if source.num_classes else None
        members.append(Teacher(one.model, source.network, source.contract, source.num_classes, order))
        members[-1].origins = (source.origin,)
        if len(specs) > 1 and not members[-1].num_classes:
            raise InputError(f"teacher {one.model}: has no classifier and cannot be part of an ensemble; leave it out.")
    return members[0] if len(members) == 1 else Ensemble(members, [one.weight for one in specs])


def _plain(spec: Spec) -> dict[str, Any]:
    plain = dict(spec) if isinstance(spec, Mapping) else spec.model_dump()
    return plain | {"cache": False}  # the cache is not part of the teacher
