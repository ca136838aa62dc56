"""DETR (Carion et al., 2020) at low bits, with auxiliary queries in training (AQ-DETR).

Q-CNN, Q-Encoder and Q-Decoder are the same modules as the float ones under a quantization policy.
Where the auxiliary queries enter is one line in ``Detr.__call__``: they are appended to the object
queries, kept apart from them in self-attention, and share everything else. At inference they are
not appended and their parameter is not read.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from aqdetr_jax.models.config import DetrConfig
from aqdetr_jax.models.heads import TORCH_LINEAR, BoxHead, normalize_images, query_start
from aqdetr_jax.models.layers import FLOAT
from aqdetr_jax.models.output import DetrOutput, split_queries
from aqdetr_jax.models.quantized import QConv, QDense, module_path
from aqdetr_jax.models.resnet import ResNet
from aqdetr_jax.models.transformer import Decoder, Encoder
from aqdetr_jax.ops.position import downsample_mask, sine_position_encoding
from aqdetr_jax.quant.policy import Policy
from aqdetr_jax.quant.record import OpRecord, record


class Detr(nn.Module):
    """DETR under a quantization policy.

    Attributes:
      config: sizes.
      policy: which operation gets which bits; the default is the float model.
    """

    config: DetrConfig
    policy: Policy = Policy()

    @nn.compact
    def __call__(
        self,
        images: Array,
        mask: Array,
        *,
        train: bool = False,
        auxiliary: bool = False,
        float_path: bool = False,
    ) -> DetrOutput:
        """Detects.

        Args:
          images: uint8 [B, H, W, 3] (normalised here), or float32, normalised already; data, to
            which no gradient flows.
          mask: bool [B, H, W], True = real pixel.
          train: dropout and learning norms on (which draws by ``models.dropout.drawing``).
          auxiliary: run the auxiliary queries too.
          float_path: in the maps also those of the same attentions unquantized.

        Returns:
          See ``DetrOutput``.

        Raises:
          ValueError: auxiliary queries are asked for that the model has not.
        """
        c, policy = self.config, self.policy
        sets = c.active_sets(auxiliary, self.is_initializing())
        x = normalize_images(images, mask, c)
        features = ResNet(c.backbone, policy, c.carrier, name="backbone")(x, train=train)
        x = features[-1]
        batch, height, width, _ = x.shape
        cells = downsample_mask(mask, height, width)
        position = sine_position_encoding(cells, c.dim).reshape(batch, -1, c.dim).astype(c.carrier)
        record(OpRecord(f"{module_path(self)}position".strip("/"), "position", note=FLOAT))
        x = QConv(
            c.dim,
            (1, 1),
            policy,
            use_bias=True,
            kernel_init=TORCH_LINEAR,
            dtype=c.carrier,
            name="input_proj",
        )(x)
        valid = cells.reshape(batch, -1)
        memory, encoder_maps = Encoder(c, policy, name="encoder")(
            x.reshape(batch, -1, c.dim), position, valid, train, float_path
        )

        queries = self.param("query_embed", query_start(c, 0), (c.num_queries, c.dim))
        record(OpRecord("query_embed", "embedding", parameters=queries.size, note=FLOAT))
        if len(sets) > 1:
            more = self.param(
                "auxiliary_queries", query_start(c, c.num_queries), (c.num_auxiliary, c.dim)
            )
            queries = jnp.concatenate([queries, more])
        query = jnp.broadcast_to(queries, (batch, *queries.shape)).astype(c.carrier)
        decoded, self_maps, cross_maps = Decoder(c, policy, name="decoder")(
            query, memory, position, valid, sets, train, float_path
        )
        logits = QDense(c.class_outputs, policy, kernel_init=TORCH_LINEAR, name="class_head")(
            decoded
        )
        boxes = jax.nn.sigmoid(BoxHead(c.dim, policy, name="box_head")(decoded))
        logits, auxiliary_logits = split_queries(logits, c.num_queries)
        boxes, auxiliary_boxes = split_queries(boxes, c.num_queries)
        return DetrOutput(
            logits,
            boxes,
            auxiliary_logits,
            auxiliary_boxes,
            encoder_maps,
            self_maps,
            cross_maps,
            memory,
            decoded[:, :, : c.num_queries],
            valid,
        )
