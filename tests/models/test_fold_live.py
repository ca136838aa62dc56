"""Folded kernels and biases against torch's own folding (needs torch; ``make test-parity``)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from flax import traverse_util
from foreign import fixture, parity_cases
from torch.nn.utils.fusion import fuse_conv_bn_weights

from aqdetr_jax.interop import names
from aqdetr_jax.models.fold import convolution_of, fold_batch_norms

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.mark.parametrize("name", ["detr_bottleneck", "detr_basic"])
def test_every_convolution_is_folded_as_torch_folds_it(name):
    params, stats = names.translate(
        fixture(name)["state"], parity_cases.table_of(parity_cases.TINY[name])
    )
    tree = {
        group: traverse_util.unflatten_dict(part, sep="/")
        for group, part in (("params", params), ("batch_stats", stats))
    }
    found = traverse_util.flatten_dict(fold_batch_norms(tree)["params"], sep="/")
    norms = [path.removesuffix("/mean") for path in stats if path.endswith("/mean")]
    assert len(norms) == sum(path.startswith("backbone/") and "kernel" in path for path in params)
    for norm in norms:
        kernel = f"{convolution_of(norm)}/kernel"
        theirs = [
            torch.from_numpy(np.ascontiguousarray(array))
            for array in (
                params[kernel].transpose(3, 2, 0, 1),
                *(stats[f"{norm}/{part}"] for part in ("mean", "var")),
                *(params[f"{norm}/{part}"] for part in ("scale", "bias")),
            )
        ]
        weight, mean, var, scale, shift = theirs
        weight, bias = fuse_conv_bn_weights(weight, None, mean, var, 1e-5, scale, shift)
        want = weight.detach().numpy().transpose(2, 3, 1, 0)
        np.testing.assert_allclose(found[kernel], want, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(found[f"{norm}/bias"], bias.detach(), rtol=1e-5, atol=1e-6)
