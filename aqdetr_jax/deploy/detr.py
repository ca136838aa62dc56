"""The deployed DETR (``models.detr``), in the words of ``deploy.operations``."""

from __future__ import annotations

import numpy as np

from aqdetr_jax.deploy.backbone import stages
from aqdetr_jax.deploy.network import (
    Network,
    attend,
    box_head,
    feed_forward,
    positions,
    residual,
    valid_cells,
)
from aqdetr_jax.deploy.operations import Operations, Tensor


def detect(
    ops: Operations, network: Network, images: Tensor, sizes: Tensor
) -> tuple[Tensor, Tensor]:
    """Class scores and boxes of the last decoder layer.

    Args:
      ops: what computes.
      network: a "detr".
      images: uint8 [B, H, W, 3], real images in the top left corner.
      sizes: int32 [B, 2], (height, width) of the real images.

    Returns:
      (logits [B, N, C + 1], boxes [B, N, 4] as cxcywh in [0, 1] of the real image).
    """
    c = network.config
    canvas = tuple(ops.shape(images)[1:3])
    x = stages(ops, network, ops.image_map(images, sizes, c.pixel_mean, c.pixel_std))[-1]
    level = ops.map_shape(x)
    x = ops.tokens(ops.convolve(x, network.convolution("input_proj", 1)))
    rows, columns = valid_cells(ops, sizes, canvas, level)
    position = positions(ops, rows, columns, c.dim)
    batch = ops.shape(sizes)[0]
    valid = ops.reshape(ops.both(rows, columns), (batch, level[0] * level[1]))

    for i in range(c.encoder_layers):
        path = f"encoder/layer_{i}"

        def attend_itself(y, path=path):
            q = ops.add(y, position)
            return attend(ops, network, f"{path}/self_attention", q, q, y, valid)

        x = residual(ops, network, x, attend_itself, f"{path}/norm1")
        x = residual(
            ops, network, x, lambda y, p=path: feed_forward(ops, network, p, y), f"{path}/norm2"
        )
    memory = ops.normalize(x, network.norms["encoder/norm"]) if c.pre_norm else x
    key = ops.add(memory, position)

    query = ops.repeat_batch(network.arrays["query_embed"], sizes)
    x = ops.repeat_batch(np.zeros((c.num_queries, c.dim), np.float32), sizes)
    for i in range(c.decoder_layers):
        path = f"decoder/layer_{i}"

        def attend_queries(y, path=path):
            q = ops.add(y, query)
            return attend(ops, network, f"{path}/self_attention", q, q, y, None)

        def attend_image(y, path=path):
            q = ops.add(y, query)
            return attend(ops, network, f"{path}/cross_attention", q, key, memory, valid)

        x = residual(ops, network, x, attend_queries, f"{path}/norm1")
        x = residual(ops, network, x, attend_image, f"{path}/norm2")
        x = residual(
            ops, network, x, lambda y, p=path: feed_forward(ops, network, p, y), f"{path}/norm3"
        )
    x = ops.normalize(x, network.norms["decoder/norm"])
    logits = ops.floats(ops.dense(x, network.layers["class_head"]))
    return logits, ops.sigmoid(box_head(ops, network, "box_head", x))
