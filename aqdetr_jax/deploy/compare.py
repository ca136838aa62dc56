"""Two back ends side by side: the codes at every quantizer of the network, one by one.

Codes are compared in lockstep: each grid of one network is given what the other's grids before it
made. So a difference is counted where it arises, and not again in all that follows from it. What
remains has two causes only, and both need a value that lies on the border between two codes to
within its rounding: float operations in another order (norms, softmax, sums of the transformer),
and the single float product of a requantization, where training has two.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from aqdetr_jax.checkpoint.model_folder import ModelBundle
from aqdetr_jax.deploy.detector import DeployedDetector
from aqdetr_jax.deploy.jax_operations import aligned
from aqdetr_jax.deploy.network import Network
from aqdetr_jax.models.quantized import CODES


@dataclasses.dataclass
class SiteCount:
    """How the codes of one quantizer compare.

    Attributes:
      codes: that were compared.
      different: of those.
      largest: the largest difference.
    """

    codes: int = 0
    different: int = 0
    largest: int = 0

    def add(self, codes: int, different: int, largest: int) -> None:
        """Counts more."""
        self.codes += codes
        self.different += different
        self.largest = max(self.largest, largest)


class Comparison:
    """Counts over many images.

    Attributes:
      sites: by name, in the order of the network.
      images: compared so far.
      logits: the largest difference of a class score before its softmax or sigmoid.
      boxes: the largest difference of a coordinate, in image sizes.
    """

    def __init__(self) -> None:
        self.sites: dict[str, SiteCount] = {}
        self.images = 0
        self.logits = self.boxes = 0.0

    @property
    def codes(self) -> int:
        """All codes compared."""
        return sum(site.codes for site in self.sites.values())

    @property
    def different(self) -> int:
        """All that differ."""
        return sum(site.different for site in self.sites.values())

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable."""
        return {
            "images": self.images,
            "codes": self.codes,
            "different": self.different,
            "largest_logit_difference": self.logits,
            "largest_box_difference": self.boxes,
            "sites": {name: dataclasses.asdict(site) for name, site in self.sites.items()},
        }


class NetworkComparer:
    """Compares a deployed network, computed in JAX, with codes that came from elsewhere.

    Args:
      network: the deployed network.
    """

    def __init__(self, network: Network):
        self._network = network
        module = DeployedDetector(network.config)

        def counted(network, images, mask, given, real):
            output, codes = module.apply_with_codes(network, images, mask, given)
            counts = {}
            for site, mine in codes.items():
                gap = jnp.abs(mine - aligned(given[site], mine.shape).astype(jnp.float32))
                gap = jnp.where(real.reshape(-1, *(1,) * (gap.ndim - 1)), gap, 0.0)
                counts[site] = jnp.sum(gap > 0), jnp.max(gap), mine.size // len(mine)
            return output.logits[-1], output.boxes[-1], counts

        self._counted = jax.jit(counted)

    def add(
        self,
        comparison: Comparison,
        images: np.ndarray,
        mask: np.ndarray,
        codes: Mapping[str, ArrayLike],
        outputs: Sequence[ArrayLike],
        real: np.ndarray | None = None,
    ) -> None:
        """Compares one batch.

        Args:
          comparison: where it is counted.
          images: uint8 [B, H, W, 3].
          mask: bool [B, H, W].
          codes: of the other network, by site; of every site of this one.
          outputs: the other's last class scores [B, N, C] and boxes [B, N, 4], or ().
          real: bool [B], which images count.

        Raises:
          ValueError: a site has no codes; the message names it.
        """
        real = np.ones(len(images), bool) if real is None else np.asarray(real, bool)
        missing = self.sites(images, mask) - codes.keys()
        if missing:
            raise ValueError(f"there are no codes of the quantizer {min(missing)} to compare with")
        mine, mine_boxes, counts = jax.device_get(
            self._counted(self._network, images, mask, dict(codes), real)
        )
        for site, (different, largest, each) in counts.items():
            entry = comparison.sites.setdefault(site, SiteCount())
            entry.add(int(each) * int(real.sum()), int(different), int(largest))
        comparison.images += int(real.sum())
        if outputs:
            logits, boxes = (np.asarray(x)[real] for x in outputs)
            comparison.logits = _larger(comparison.logits, mine[real] - logits)
            comparison.boxes = _larger(comparison.boxes, mine_boxes[real] - boxes)

    def sites(self, images: Any, mask: Any) -> set[str]:
        """The names of all quantizers."""
        module = DeployedDetector(self._network.config)
        one = [jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype) for x in (images, mask)]
        return set(jax.eval_shape(module.apply_with_codes, self._network, *one)[1])


def _larger(largest: float, gaps: np.ndarray) -> float:
    """The largest magnitude so far; NaN once there was one (which Python's ``max`` loses)."""
    return float(np.abs(gaps).max(initial=largest))


def model_codes(bundle: ModelBundle) -> Any:
    """The trained, fake-quantized model as a function that leaves its codes.

    Returns:
      Jitted ``f(variables, images, mask) -> (logits [B, N, C], boxes [B, N, 4], codes by site)``.
    """
    module = bundle.module()

    @jax.jit
    def run(variables, images, mask):
        output, state = module.apply(variables, images, mask, mutable=[CODES])
        return output.logits[-1], output.boxes[-1], _by_site(state.get(CODES, {}))

    return run


def _by_site(tree: Mapping[str, Any], path: str = "") -> dict[str, Array]:
    found: dict[str, Array] = {}
    for key, value in tree.items():
        name = f"{path}/{key}" if path else key
        found.update(_by_site(value, name) if isinstance(value, Mapping) else {name: value})
    return found
