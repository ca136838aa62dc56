"""The vocabulary of ``deploy.operations``, written down as an ONNX graph."""

from __future__ import annotations

from aqdetr_jax.deploy.onnx.sampling import SamplingOperations


class OnnxOperations(SamplingOperations):
    """Writes nodes for every word; see the classes it is made of.

    Shapes are static, batch included. Maps are [B, C, H, W]. Every quantizer's codes are a tensor
    of the name of their grid's site, see ``sites``.
    """
