"""`evaluation`: how frozen features are evaluated, in runs without labels and, on request, in others."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from distill.options import Positive, Section


class NearestNeighbours(Section):
    k: int = Field(20, ge=1, description="Training images that vote; at most as many as the training split has.")
    temperature: float = Field(0.07, ge=0.02, description="Each votes for its class with exp(cosine / temperature).")


class LinearProbe(Section):
    strengths: Annotated[list[Positive], Field(min_length=1, max_length=20)] = Field(
        [1e-5, 1e-4, 1e-3, 1e-2, 1e-1],
        description="L2 penalties on standardised features; the best on the validation split is taken, without such a "
        "split the best on every tenth training image.",
    )


class Evaluation(Section):
    knn: NearestNeighbours | None = Field(
        None,
        description="Accuracy of the nearest training images by cosine of the student's features, after each epoch; "
        "null: none, but with the defaults in a run without labels, which is selected by it.",
    )
    linear: LinearProbe | None = Field(
        None,
        description="Accuracy of a linear probe on the exported student's features, at the end; null: none; left out: "
        "with the defaults in a run without labels.",
    )

    def resolved(self, *, label_free: bool) -> Evaluation:
        """With the defaults of a run without labels."""
        if not label_free:
            return self
        linear = self.linear if "linear" in self.model_fields_set else LinearProbe()
        return Evaluation(knn=self.knn or NearestNeighbours(), linear=linear)
