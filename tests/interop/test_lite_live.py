"""timm's own EfficientNet-Lites, converted (needs timm; ``make test-parity``)."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import timm
import torch

from aqdetr_jax.interop.convert import convert
from aqdetr_jax.models.backbone import build_backbone
from aqdetr_jax.models.efficientnet_lite import VARIANTS


@pytest.mark.parametrize("name", VARIANTS)
def test_they_see_the_same(name, tmp_path):
    """Whole models, classifier included, as made; those of ImageNet are not downloaded."""
    torch.manual_seed(0)
    whole = timm.create_model(f"tf_{name}", pretrained=False).eval()
    torch.save(whole.state_dict(), tmp_path / "source.pth")
    made = convert(tmp_path / "source.pth", tmp_path / "ours")
    assert made.bundle.info["name"] == name
    assert not made.report.new
    model = timm.create_model(f"tf_{name}", pretrained=False, features_only=True).eval()
    model.load_state_dict({k: whole.state_dict()[k] for k in model.state_dict()})
    image = np.random.default_rng(0).normal(size=(1, 65, 96, 3)).astype(np.float32)
    given = torch.from_numpy(image.transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        single = model(given)
        double = model.double()(given.double())
    variables = {group: tree["backbone"] for group, tree in made.bundle.variables.items()}
    found = jax.jit(build_backbone(made.bundle.config.backbone).apply)(variables, image)
    for mine, theirs, exact in zip(found, single, double, strict=True):
        # Not much further off than timm is in single precision: the deepest has 30 blocks.
        rounding = float((theirs - exact).abs().max())
        atol = 8 * rounding + 1e-6 * float(exact.abs().max())
        want = exact.numpy().transpose(0, 2, 3, 1)
        np.testing.assert_allclose(mine, want, rtol=0, atol=atol)
        assert atol < 1e-3 * np.abs(want).max()
