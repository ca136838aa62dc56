"""One training step, as pure functions of (state, teacher, batch)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import PartitionSpec

from aqdetr_jax.losses.auxiliary import AuxiliaryLossConfig, aqdetr_detection_loss
from aqdetr_jax.losses.dense import dense_assignment, dense_loss
from aqdetr_jax.losses.distillation import DistillationWeights, layer_by_layer_loss
from aqdetr_jax.losses.foreground import foreground_distillation
from aqdetr_jax.losses.proposals import proposal_loss
from aqdetr_jax.losses.targets import Predictions, Targets
from aqdetr_jax.models.dense import DensePretrainer
from aqdetr_jax.models.detector import Detector, memory_valid
from aqdetr_jax.models.dropout import drawing, row_keys
from aqdetr_jax.models.output import DetrOutput
from aqdetr_jax.training import optimizer as optim
from aqdetr_jax.training.config import ExperimentConfig
from aqdetr_jax.training.metrics import is_loss
from aqdetr_jax.training.phases import Phase
from aqdetr_jax.training.state import TrainState, variables

Batch = dict[str, Array]
LossFn = Callable[..., tuple[Array, tuple[dict[str, Array], Any]]]
"""``(params, batch_stats, teacher_variables, batch, step, part=None) -> (loss, (terms, stats))``.

``batch`` is the whole batch of the step, or the ``Part`` of it that ``part`` describes; the losses
and terms of all parts add up to those of the whole."""

DROPOUT = 1
"""Purpose number of the dropout key, see ``step_key``."""


def step_key(seed: int, step: Array, purpose: int) -> Array:
    """The random key of a step: ``fold_in(fold_in(key(seed), step), purpose)``."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), purpose)


class Part(NamedTuple):
    """What the loss of some images of a batch must know of the whole batch.

    Attributes:
      valid: bool [B, T], real boxes of the whole batch.
      tokens: int32 scalar, valid tokens of the encoder in the whole batch.
      keys: uint32 [b, 2], dropout's keys of the part's images.
    """

    valid: Array
    tokens: Array
    keys: Array


def dropout_keys(seed: int, step: Array, batch: Batch) -> Array:
    """Dropout's keys of the images of a whole batch, uint32 [B, 2]."""
    images = len(batch["images"])
    # The step's key as many times: a TPU makes it in one vector operation, or in 250 scalar ones.
    steps = jax.lax.optimization_barrier(jnp.full(images, step))
    keys = jax.vmap(lambda step: step_key(seed, step, DROPOUT))(steps)
    return row_keys(keys[0], images)


def targets_of(batch: Batch, part: Part | None = None) -> Targets:
    """The padded ground truth of a batch, or of a part of it."""
    whole = None if part is None else part.valid
    return Targets(batch["boxes"], batch["labels"], batch["valid"], whole)


def distillation_loss(
    weights: DistillationWeights,
    teacher: DetrOutput,
    student: DetrOutput,
    num_queries: int,
    targets: Targets,
    part: Part | None = None,
) -> tuple[Array, dict[str, Array]]:
    """``λ_dist L_dist``, the optional decoder terms, and Q-DETR's over foreground queries.

    Args:
      weights: λ of each term.
      teacher: float model's output on the same images, or ``float_targets``.
      student: quantized model's output.
      num_queries: N; only the object queries' cross-attention is compared.
      targets: the images' boxes.
      part: given where the images are a part of a batch: the terms, which are means over images or
        over valid tokens, are then the part's share of the batch's.

    Returns:
      (weighted sum, unweighted terms).
    """
    terms: dict[str, Array] = {}
    if weights.encoder:
        terms["loss_distill_encoder"] = layer_by_layer_loss(
            weights.kind,
            teacher.encoder_attention,
            student.encoder_attention,
            student.memory_valid,
            weights.locations,
        )
    if weights.decoder_self:
        terms["loss_distill_decoder_self"] = layer_by_layer_loss(
            weights.kind, teacher.decoder_self_attention, student.decoder_self_attention
        )
    if weights.decoder_cross:
        terms["loss_distill_decoder_cross"] = layer_by_layer_loss(
            weights.kind,
            [maps.of_first(num_queries) for maps in teacher.decoder_cross_attention],
            [maps.of_first(num_queries) for maps in student.decoder_cross_attention],
            None,
            weights.locations,
        )
    if weights.foreground:  # of the last layer, whose boxes are predicted from these features
        terms["loss_distill_foreground"] = foreground_distillation(
            student.boxes[-1],
            teacher.boxes[-1],
            student.decoder_cross_attention[-1].output[:, :num_queries],
            teacher.decoder_cross_attention[-1].output,
            targets.boxes,
            targets.valid,
            weights.tau,
        )
    if part is not None:
        images = jnp.float32(len(student.memory_valid) / len(part.valid))
        tokens = jnp.sum(student.memory_valid) / jnp.maximum(part.tokens, 1)
        terms = {k: v * (tokens if "encoder" in k else images) for k, v in terms.items()}
    scale = {
        "loss_distill_encoder": weights.encoder,
        "loss_distill_decoder_self": weights.decoder_self,
        "loss_distill_decoder_cross": weights.decoder_cross,
        "loss_distill_foreground": weights.foreground,
    }
    return sum((scale[k] * v for k, v in terms.items()), jnp.float32(0.0)), terms


def float_targets(student: DetrOutput) -> DetrOutput:
    """A model's output with the maps of its attentions' float paths in place of its own."""

    def of(maps: tuple) -> Any:
        return tuple(each.float_path for each in maps)

    return student._replace(
        encoder_attention=of(student.encoder_attention),
        decoder_self_attention=of(student.decoder_self_attention),
        decoder_cross_attention=of(student.decoder_cross_attention),
    )


def detection_loss_fn(
    config: ExperimentConfig, model: Detector, teacher: Detector | None
) -> LossFn:
    """``L = L_det + λ_aux L_aux + λ_dist L_dist`` as a function of (params, ...).

    Args:
      config: weights and seed.
      model: the student (or a float model).
      teacher: float module of the teacher, None where no teacher is needed.
    """
    sizes = model.config
    auxiliary = AuxiliaryLossConfig(
        config.auxiliary.weight, config.auxiliary.repeats, sizes.auxiliary_groups
    )
    weights, float_path = config.distill.weights, config.distill.from_float_path

    def loss_fn(params, batch_stats, teacher_variables, batch, step, part=None):
        keys = dropout_keys(config.seed, step, batch) if part is None else part.keys
        targets = targets_of(batch, part)
        with drawing(keys):
            output, updated = model.apply(
                variables(params, batch_stats),
                batch["images"],
                batch["mask"],
                train=True,
                auxiliary=sizes.num_auxiliary > 0,
                float_path=float_path,
                mutable=["batch_stats"],
            )
        extra = (
            Predictions(output.auxiliary_logits, output.auxiliary_boxes)
            if sizes.num_auxiliary
            else None
        )
        loss, terms, diagnostics = aqdetr_detection_loss(
            Predictions(output.logits, output.boxes),
            extra,
            targets,
            config.loss,
            auxiliary,
        )
        target: Any = float_targets(output) if float_path else None
        if teacher is not None:
            target = teacher.apply(teacher_variables, batch["images"], batch["mask"])
            target = jax.lax.stop_gradient(target)
        if target is not None:
            more, distilled = distillation_loss(
                weights, target, output, sizes.num_queries, targets, part
            )
            loss, terms = loss + more, terms | distilled
        replaced = diagnostics["replaced_costs"]
        if output.proposal_logits is not None:
            found = Predictions(output.proposal_logits, output.proposal_boxes)
            more, proposed, count = proposal_loss(found, targets, config.loss)
            loss, terms, replaced = loss + more, terms | proposed, replaced + count
        terms = {"loss": loss, **terms}
        for name in ("class_error", "num_boxes", "limited_images"):
            terms[name] = diagnostics[name].astype(jnp.float32)
        terms["replaced_costs"] = replaced
        return loss, (terms, updated.get("batch_stats", batch_stats))

    return loss_fn


def pretrain_loss_fn(config: ExperimentConfig, model: DensePretrainer) -> LossFn:
    """The dense detection loss of the pretraining."""

    def loss_fn(params, batch_stats, teacher_variables, batch, step, part=None):
        del teacher_variables
        if part is not None:
            raise ValueError("the pretraining's norms need the whole batch")
        with drawing(dropout_keys(config.seed, step, batch)):
            output, updated = model.apply(
                variables(params, batch_stats),
                batch["images"],
                batch["mask"],
                train=True,
                mutable=["batch_stats"],
            )
        targets = targets_of(batch)
        matched = dense_assignment(output.centres, targets, output.cell)
        loss, terms = dense_loss(output.logits, output.boxes, output.valid, matched, targets)
        return loss, ({"loss": loss, **terms}, updated["batch_stats"])

    return loss_fn


def accumulated_gradient(config: ExperimentConfig, loss_fn: LossFn) -> Callable[..., Any]:
    """``value_and_grad(loss_fn, has_aux=True)`` from micro-batches, one after the other.

    Each device cuts its own images into ``config.train.accumulate`` parts, whose gradients it sums
    by itself; one sum over the devices ends it (under automatic sharding there would be one in
    every round of the loop). What a loss is divided by is of the whole batch, and dropout's keys
    are of the images: the result is the whole batch's, but for rounding.

    Args:
      config: sizes, seed, and the number of micro-batches.
      loss_fn: see ``detection_loss_fn``.
    """

    def of_images(params, batch_stats, teacher_variables, step, valid, tokens, batch, keys):
        """Sums over images that lie on one device: (terms, gradients), and counts by image."""

        def body(total, images):
            batch, keys = images
            (_, (terms, _)), gradients = jax.value_and_grad(loss_fn, has_aux=True)(
                params, batch_stats, teacher_variables, batch, step, Part(valid, tokens, keys)
            )
            return jax.tree.map(jnp.add, total, gradients), terms

        parts = jax.tree.map(
            lambda x: x.reshape(config.train.accumulate, -1, *x.shape[1:]), (batch, keys)
        )
        gradients, terms = jax.lax.scan(body, jax.tree.map(jnp.zeros_like, params), parts)
        replaced = terms.pop("replaced_costs").reshape(-1)
        return (jax.tree.map(lambda x: jnp.sum(x, 0), terms), gradients), replaced

    def gradient(params, batch_stats, teacher_variables, batch, step):
        tokens = jnp.sum(memory_valid(config.model, batch["mask"]))
        mesh = jax.sharding.get_abstract_mesh()
        run = of_images
        if not mesh.empty:
            each, whole = PartitionSpec("data"), PartitionSpec()

            def of_device(*arguments):
                sums, replaced = of_images(*arguments)
                return jax.lax.psum(sums, "data"), replaced

            # check_vma=False: the gradient of what every device has shall stay the device's own.
            run = jax.shard_map(
                of_device,
                mesh=mesh,
                in_specs=(whole,) * 6 + (each,) * 2,
                out_specs=(whole, each),
                axis_names={"data"},
                check_vma=False,
            )
        keys = dropout_keys(config.seed, step, batch)
        known = params, batch_stats, teacher_variables, step, batch["valid"], tokens
        (terms, gradients), replaced = run(*known, batch, keys)
        return (terms["loss"], (terms | {"replaced_costs": replaced}, batch_stats)), gradients

    return gradient


def make_train_step(
    config: ExperimentConfig,
    loss_fn: LossFn,
    optimizer: optim.Optimizer,
    phase: Phase | None = None,
) -> Callable[[TrainState, Any, Batch], tuple[TrainState, dict[str, Array]]]:
    """The update step: loss, gradient, guarded AdamW update, step sizes kept positive, average.

    If a loss term or the gradient is not finite, or a step size would not be finite and positive
    after it, nothing but the step number changes, and ``bad_in_a_row`` counts it; the metrics then
    show what was at fault (``training.faults``).

    Args:
      config: for the moving average's decay, and ``train.accumulate``.
      loss_fn: see ``detection_loss_fn``.
      optimizer: see ``optimizer.make_optimizer``.
      phase: which parameters are trained; None = all that the optimizer trains.

    Returns:
      ``step(state, teacher_variables, batch) -> (state, metrics)``, to be jitted with the state
      donated. Metrics are scalars on the device, but for ``replaced_costs`` (int32 ``[B]``,
      non-finite matching costs of each image) and ``gradient_squares`` (of each part of
      ``Packing.names``, the sum of the squares of its gradient).
    """
    decay = config.optimizer.ema
    if config.train.accumulate > 1:
        gradient_fn = accumulated_gradient(config, loss_fn)
    else:
        gradient_fn = jax.value_and_grad(loss_fn, has_aux=True)
    phase = phase or Phase(0, config.train.steps)

    def step(state: TrainState, teacher_variables, batch: Batch):
        state = phase.begun(state)
        (loss, (terms, batch_stats)), gradients = gradient_fn(
            state.params, state.batch_stats, teacher_variables, batch, state.step
        )
        packing = optimizer.packing
        # Small parameters side by side: what follows is one operation for all of a group.
        old, gradients = packing.pack(state.params), packing.pack(gradients)
        # What stays as it is does not count in the norm that gradients are clipped by.
        gradients = phase.of_trained(packing, gradients, jax.tree.map(jnp.zeros_like, gradients))
        squares = jnp.stack([jnp.sum(jnp.square(x)) for x in jax.tree.leaves(gradients)])
        norm = optax.tree.norm(gradients)
        updates, opt_state = optimizer.transformation.update(gradients, state.opt_state, old)
        updates = phase.at_rate(updates)
        params = optim.keep_steps_positive(optax.apply_updates(old, updates), packing.groups)
        params = phase.of_trained(packing, params, old)
        bad_steps = optim.count_bad_steps(params, packing.groups)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm) & (bad_steps == 0)
        for name, term in terms.items():
            if is_loss(name):
                finite &= jnp.isfinite(term)

        def guard(new, old):
            return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)

        ema = state.ema
        if decay:
            # A young average follows closely, so that it does not remember the random start.
            d = jnp.minimum(decay, (1.0 + state.step) / (10.0 + state.step))

            def average(mean, value):
                return jax.tree.map(lambda e, p: e + (p - e) * (1 - d), mean, value)

            before = packing.pack(ema["params"])
            after = guard(average(before, params), before)
            stats = guard(average(ema["batch_stats"], batch_stats), ema["batch_stats"])
            ema = variables(packing.unpack(after, ema["params"]), stats)
        new = TrainState(
            step=state.step + 1,
            params=packing.unpack(guard(params, old), state.params),
            batch_stats=guard(batch_stats, state.batch_stats),
            opt_state=guard(opt_state, state.opt_state),
            ema=ema,
            skipped=state.skipped + jnp.where(finite, 0, 1).astype(jnp.int32),
            bad_in_a_row=jnp.where(finite, 0, state.bad_in_a_row + 1).astype(jnp.int32),
        )
        metrics = {
            **terms,
            "gradient_norm": norm,
            "gradient_squares": squares,
            "bad_step_sizes": bad_steps,
            "bad_in_a_row": new.bad_in_a_row,
            "skipped": new.skipped,
        }
        return new, metrics

    return step
