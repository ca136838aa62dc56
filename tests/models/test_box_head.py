"""The box head against NumPy: three layers, a ReLU after each of the first two, a sigmoid."""

import jax
import numpy as np

from aqdetr_jax.models.heads import BoxHead

DIM = 6


def test_box_head_agrees_with_numpy():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 3, 5, DIM)).astype(np.float32)
    params = {
        f"layer_{i}": {
            "kernel": rng.normal(0, 0.6, (DIM, width)).astype(np.float32),
            "bias": rng.normal(0, 0.5, width).astype(np.float32),
        }
        for i, width in enumerate((DIM, DIM, 4))
    }
    module = BoxHead(DIM)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
    assert jax.tree.map(np.shape, shapes) == jax.tree.map(np.shape, params)
    y = x.astype(np.float64)
    for i in range(3):
        y = y @ params[f"layer_{i}"]["kernel"] + params[f"layer_{i}"]["bias"]
        y = np.maximum(y, 0) if i < 2 else 1 / (1 + np.exp(-y))
    out = jax.nn.sigmoid(jax.jit(module.apply)({"params": params}, x))
    assert np.ptp(y) > 0.5  # not all near one half
    np.testing.assert_allclose(out, y, atol=1e-5)
