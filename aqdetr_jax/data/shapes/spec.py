"""How hard the generated set is."""

from __future__ import annotations

import dataclasses

from aqdetr_jax.data.dataset import DatasetError


@dataclasses.dataclass(frozen=True)
class ShapesSpec:
    """How hard the generated set is. All values enter the fingerprint.

    Attributes:
      hue_fidelity: share of objects drawn near the hue of their class; others take any.
      texture_fidelity: share of objects filled with the texture of their class.
      noise: standard deviation of the sensor noise is drawn from [0, noise] (grey levels).
      blur: share of images that are slightly blurred.
      clutter: mean number of clutter strokes and blobs behind the objects.
      size_mix: wanted shares of small, medium and large boxes by COCO's absolute area bins.
      min_side: smallest box side in pixels.
      max_objects: most objects on one image.
      mean_objects: wanted mean number of objects (approximate).
      empty: share of images with no object.
      min_visible: smallest visible fraction an object may be left with by later ones.
    """

    hue_fidelity: float = 0.9
    texture_fidelity: float = 0.85
    noise: float = 10.0
    blur: float = 0.25
    clutter: float = 7.0
    size_mix: tuple[float, float, float] = (0.40, 0.45, 0.15)
    min_side: int = 10
    max_objects: int = 12
    mean_objects: float = 4.5
    empty: float = 0.04
    min_visible: float = 0.35

    def __post_init__(self) -> None:
        """Checks ranges.

        Raises:
          DatasetError: a value is out of range; the message names the field.
        """
        for field in ("hue_fidelity", "texture_fidelity", "blur", "empty", "min_visible"):
            if not 0 <= getattr(self, field) <= 1:
                raise DatasetError(f"ShapesSpec.{field} must be in [0, 1]: {getattr(self, field)}")
        if len(self.size_mix) != 3 or min(self.size_mix) < 0 or sum(self.size_mix) <= 0:
            raise DatasetError(f"ShapesSpec.size_mix needs three shares >= 0: {self.size_mix}")
        if self.max_objects < 1 or not 0 < self.mean_objects <= self.max_objects:
            raise DatasetError(
                "ShapesSpec needs 0 < mean_objects <= max_objects, got "
                f"{self.mean_objects} and {self.max_objects}"
            )
        if self.min_side < 4 or self.noise < 0 or self.clutter < 0:
            raise DatasetError("ShapesSpec needs min_side >= 4, noise >= 0 and clutter >= 0")
