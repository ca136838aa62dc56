"""The deployed Deformable DETR (``models.deformable_detr``), in the words of
``deploy.operations``.
"""

from __future__ import annotations

import math

import numpy as np

from aqdetr_jax.deploy.backbone import stages
from aqdetr_jax.deploy.network import (
    Network,
    attend,
    box_head,
    encode,
    feed_forward,
    joined,
    positions,
    renormalized,
    residual,
    valid_cells,
)
from aqdetr_jax.deploy.operations import Operations, Shapes, Tensor
from aqdetr_jax.quant.spec import ALIGNMENT


def detect(
    ops: Operations, network: Network, images: Tensor, sizes: Tensor
) -> tuple[Tensor, Tensor]:
    """Class scores and boxes of the last decoder layer.

    Args:
      ops: what computes.
      network: a "deformable" one, of any variant.
      images: uint8 [B, H, W, 3], real images in the top left corner.
      sizes: int32 [B, 2], (height, width) of the real images.

    Returns:
      (logits [B, N, C], boxes [B, N, 4] as cxcywh in [0, 1] of the real image).
    """
    c, options = network.config, network.config.deformable
    memory, levels = _encoded(ops, network, images, sizes)
    logits_of, boxes_of = _head_paths(network)

    if options.two_stage:
        query, x, reference = _proposed(ops, network, memory, levels)
    else:
        embedding = network.arrays["query_embed"]
        query = ops.repeat_batch(embedding[:, : c.dim], sizes)
        x = ops.repeat_batch(embedding[:, c.dim :], sizes)
        reference = ops.sigmoid(ops.dense(query, network.layers["reference_points"]))

    boxes = reference
    for i in range(c.decoder_layers):
        path = f"decoder/layer_{i}"
        on_levels = _on_levels(ops, reference, levels.ratios)

        def attend_queries(y, path=path):
            q = ops.add(y, query)
            return attend(ops, network, f"{path}/self_attention", q, q, y, None)

        def attend_image(y, path=path, on_levels=on_levels):
            return _attend_points(
                ops,
                network,
                f"{path}/cross_attention",
                ops.add(y, query),
                on_levels,
                memory,
                levels,
            )

        x = residual(ops, network, x, attend_queries, f"{path}/norm1")
        x = residual(ops, network, x, attend_image, f"{path}/norm2")
        x = residual(
            ops, network, x, lambda y, p=path: feed_forward(ops, network, p, y), f"{path}/norm3"
        )
        last = i == c.decoder_layers - 1
        if last or options.box_refine:
            features = ops.normalize(x, network.norms["decoder/norm"]) if c.pre_norm else x
            boxes = _refined(ops, box_head(ops, network, boxes_of[i], features), reference)
            reference = boxes if options.box_refine else reference
    logits = ops.floats(ops.dense(features, network.layers[logits_of[c.decoder_layers - 1]]))
    return logits, boxes


def _head_paths(network: Network) -> tuple[list[str], list[str]]:
    """Class and box heads of every decoder layer, then those of the proposals."""
    c, options = network.config, network.config.deformable
    if not options.box_refine:
        return ["class_head"] * c.decoder_layers, ["box_head"] * c.decoder_layers
    numbers = range(c.decoder_layers + options.two_stage)
    return [f"class_head_{i}" for i in numbers], [f"box_head_{i}" for i in numbers]


def _refined(ops: Operations, change: Tensor, reference: Tensor) -> Tensor:
    """``sigmoid(change + inverse_sigmoid(reference))``; a point moves the centre only."""
    start = _logit(ops, reference)
    if ops.shape(reference)[-1] == 2:
        start = ops.concatenate([start, ops.multiply(start, 0.0)], axis=2)
    return ops.sigmoid(ops.add(change, start))


def _logit(ops: Operations, x: Tensor) -> Tensor:
    """``ops.boxes.inverse_sigmoid`` of numbers in [0, 1]."""
    above = ops.clip(x, 1e-5, 1.0)
    below = ops.clip(ops.subtract(1.0, x), 1e-5, 1.0)
    return ops.log(ops.divide(above, below))


# --- levels ---------------------------------------------------------------------------------------


class Levels:
    """The feature levels of an image.

    Attributes:
      shapes: (height, width) of each.
      valid: truth values [B, S].
      rows: truth values [B, h, 1] of each.
      columns: truth values [B, 1, w] of each.
      ratios: floats [B, L, 2], (x, y) part of each that is no padding.
    """

    def __init__(self, ops: Operations, sizes: Tensor, canvas: tuple[int, int], shapes: Shapes):
        self.shapes = shapes
        cells = [valid_cells(ops, sizes, canvas, shape) for shape in shapes]
        self.rows, self.columns = ([c[i] for c in cells] for i in range(2))
        batch = ops.shape(sizes)[0]
        self.valid = joined_truths(
            ops,
            [
                ops.reshape(ops.both(r, c), (batch, h * w))
                for r, c, (h, w) in zip(self.rows, self.columns, shapes, strict=True)
            ],
        )
        self.counts = [
            ops.concatenate(
                [
                    ops.reshape(ops.total(ops.floats(c), 2), (batch, 1)),
                    ops.reshape(ops.total(ops.floats(r), 1), (batch, 1)),
                ],
                axis=1,
            )
            for r, c in zip(self.rows, self.columns, strict=True)
        ]
        parts = [
            ops.reshape(ops.divide(count, np.array([w, h], np.float32)), (batch, 1, 2))
            for count, (h, w) in zip(self.counts, shapes, strict=True)
        ]
        self.ratios = joined(ops, parts, axis=1)


def joined_truths(ops: Operations, truths: list[Tensor]) -> Tensor:
    """Truth values [B, n] of several levels one after the other."""
    if len(truths) == 1:
        return truths[0]
    return ops.less(0.5, ops.concatenate([ops.floats(t) for t in truths], axis=1))


def _encoded(
    ops: Operations, network: Network, images: Tensor, sizes: Tensor
) -> tuple[Tensor, Levels]:
    """The encoder's tokens [B, S, d] and the levels (``models.levels``)."""
    c, options = network.config, network.config.deformable
    canvas = tuple(ops.shape(images)[1:3])
    maps = stages(ops, network, ops.image_map(images, sizes, c.pixel_mean, c.pixel_std))
    maps = maps[-min(options.stages, options.levels, len(maps)) :]
    tokens: list[Tensor] = []
    shapes: list[tuple[int, int]] = []
    source = None
    for i in range(options.levels):
        given = i < len(maps)
        source = maps[i] if given else maps[-1] if i == len(maps) else source
        size, stride = (1, 1) if given else (3, 2)
        norm = network.group_norm(f"input_norm_{i}", options.norm_groups)
        x = ops.convolve(source, network.convolution(f"input_proj_{i}", size, stride))
        shapes.append(ops.map_shape(x))
        x = ops.normalize(ops.tokens(x), norm)
        tokens.append(x)
        source = ops.to_map(x, shapes[-1]) if i >= len(maps) - 1 else source
    levels = Levels(ops, sizes, canvas, tuple(shapes))
    embedding = network.arrays["level_embed"]
    position = joined(
        ops,
        [
            ops.add(positions(ops, r, k, c.dim, -0.5), embedding[i])
            for i, (r, k) in enumerate(zip(levels.rows, levels.columns, strict=True))
        ],
        axis=1,
    )
    x = joined(ops, tokens, axis=1)
    reference = _on_levels(ops, _centres(ops, levels), levels.ratios)
    for i in range(c.encoder_layers):
        path = f"encoder/layer_{i}"

        def attend_itself(y, path=path):
            query = ops.add(y, position)
            attention = f"{path}/self_attention"
            return _attend_points(ops, network, attention, query, reference, y, levels)

        x = residual(ops, network, x, attend_itself, f"{path}/norm1")
        x = residual(
            ops, network, x, lambda y, p=path: feed_forward(ops, network, p, y), f"{path}/norm2"
        )
    return (ops.normalize(x, network.norms["encoder/norm"]) if c.pre_norm else x), levels


def _centres(ops: Operations, levels: Levels) -> Tensor:
    """Every cell's centre in units of the real image, [B, S, 2]
    (``ops.deformable.encoder_reference_points``).
    """
    points = []
    for i, (height, width) in enumerate(levels.shapes):
        ratio = ops.part(levels.ratios, 1, i, i + 1)
        extent = ops.multiply(ratio, np.array([width, height], np.float32))
        points.append(ops.divide(_cells(height, width), extent))
    return joined(ops, points, axis=1)


def _cells(height: int, width: int) -> np.ndarray:
    """Centres (x, y) of the cells in cells, float32 [1, h * w, 2]."""
    y, x = np.meshgrid(np.arange(height) + 0.5, np.arange(width) + 0.5, indexing="ij")
    return np.stack([x, y], -1).reshape(1, -1, 2).astype(np.float32)


def _on_levels(ops: Operations, reference: Tensor, ratios: Tensor) -> Tensor:
    """Points or boxes [B, Q, n] of the real image in units of each level, [B, Q, L, n]."""
    batch, queries, numbers = ops.shape(reference)
    count = ops.shape(ratios)[1]
    if numbers == 4:
        ratios = ops.concatenate([ratios, ratios], axis=2)
    return ops.multiply(
        ops.reshape(reference, (batch, queries, 1, numbers)),
        ops.reshape(ratios, (batch, 1, count, numbers)),
    )


# --- attention ------------------------------------------------------------------------------------


def _attend_points(
    ops: Operations,
    network: Network,
    path: str,
    query: Tensor,
    reference: Tensor,
    memory: Tensor,
    levels: Levels,
) -> Tensor:
    """Deformable attention (``models.deformable_attention``), [B, Q, d] -> [B, Q, d]."""
    c, options = network.config, network.config.deformable
    heads, count, points = c.heads, options.levels, options.points
    batch, queries, _ = ops.shape(query)
    length = ops.shape(memory)[1]
    alignment = network.norms.get(f"{path}/{ALIGNMENT}")
    if alignment is not None:
        query = ops.normalize(query, alignment)

    values = ops.floats(ops.dense(memory, network.layers[f"{path}/value_proj"]))
    values = ops.where(ops.reshape(levels.valid, (batch, length, 1)), values, 0.0)
    values = ops.reshape(values, (batch, length, heads, c.dim // heads))
    offsets = ops.dense(query, network.layers[f"{path}/sampling_offsets"])
    offsets = ops.reshape(offsets, (batch, queries, heads, count, points, 2))
    locations = _locations(ops, reference, offsets, levels.shapes)

    scores = ops.dense(query, network.layers[f"{path}/attention_weights"])
    scores = ops.reshape(scores, (batch, queries, heads, count * points))
    weights = ops.softmax(ops.transpose(scores, (0, 2, 1, 3)))
    samples = ops.sample(values, locations, levels.shapes)
    weight_grid, sample_grid = (
        network.grids.get(f"{path}/core/{name}") for name in ("probs", "samples")
    )
    if weight_grid is not None:
        weights = ops.quantize(weights, weight_grid)
    if sample_grid is not None:
        samples = ops.quantize(samples, sample_grid)
    mixed = ops.mix_samples(weights, samples)
    mixed = renormalized(ops, network, mixed, weights, weight_grid)
    mixed = ops.reshape(ops.transpose(mixed, (0, 2, 1, 3)), (batch, queries, c.dim))
    return ops.dense(mixed, network.layers[f"{path}/output_proj"])


def _locations(ops: Operations, reference: Tensor, offsets: Tensor, shapes: Shapes) -> Tensor:
    """``ops.deformable.sampling_locations``."""
    batch, queries, _, count, points, _ = ops.shape(offsets)
    numbers = ops.shape(reference)[-1]
    reference = ops.reshape(reference, (batch, queries, 1, count, 1, numbers))
    centre = ops.part(reference, 5, 0, 2)
    if numbers == 2:
        size = np.array([(w, h) for h, w in shapes], np.float32)
        return ops.add(centre, ops.divide(offsets, size[:, None]))
    extent = ops.multiply(ops.part(reference, 5, 2, 4), 0.5)
    return ops.add(centre, ops.multiply(ops.divide(offsets, float(points)), extent))


# --- two stages -----------------------------------------------------------------------------------


def _proposed(
    ops: Operations, network: Network, memory: Tensor, levels: Levels
) -> tuple[Tensor, Tensor, Tensor]:
    """The decoder's queries, targets [B, N, d] and boxes [B, N, 4], of the best proposals."""
    c = network.config
    batch, length, _ = ops.shape(memory)
    centres, extents = [], []
    for i, (height, width) in enumerate(levels.shapes):
        count = ops.reshape(levels.counts[i], (batch, 1, 2))
        centre = ops.divide(_cells(height, width), count)
        centres.append(centre)
        extents.append(ops.add(ops.multiply(centre, 0.0), np.float32(0.05 * 2.0**i)))
    boxes = ops.concatenate([joined(ops, centres, 1), joined(ops, extents, 1)], axis=2)
    inside = ops.floats(ops.both(ops.less(0.01, boxes), ops.less(boxes, 0.99)))
    allowed = ops.both(ops.less(3.5, ops.total(inside, 2)), levels.valid)
    column = ops.reshape(allowed, (batch, length, 1))

    x = ops.where(column, memory, 0.0)
    x = ops.normalize(ops.dense(x, network.layers["proposal_proj"]), network.norms["proposal_norm"])
    last = c.decoder_layers
    logits = ops.floats(ops.dense(x, network.layers[f"class_head_{last}"]))
    # Where nothing may be proposed the box is the whole plane, as in training.
    safe = ops.where(column, boxes, 0.5)
    start = ops.log(ops.divide(safe, ops.subtract(1.0, safe)))
    coordinates = ops.add(box_head(ops, network, f"box_head_{last}", x), start)
    coordinates = ops.where(column, coordinates, math.inf)
    first = ops.reshape(ops.part(logits, 2, 0, 1), (batch, length))
    chosen = ops.rows(coordinates, ops.best(first, c.num_queries))
    reference = ops.sigmoid(chosen)
    encoded = encode(ops, ops.multiply(reference, 2 * math.pi), c.dim // 2)
    x = ops.normalize(ops.dense(encoded, network.layers["query_proj"]), network.norms["query_norm"])
    return ops.part(x, 2, 0, c.dim), ops.part(x, 2, c.dim, 2 * c.dim), reference
