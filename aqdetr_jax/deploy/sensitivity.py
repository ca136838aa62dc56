"""Which operations of a detector can do with few bits: measured, ranked, and chosen under a budget.

Every group of operations (``deploy.groups``) is quantized alone, after calibration, at each of the
candidate bits; left float alone while all others have the bits of the configuration's policy; and,
where its bits are to be chosen, put at the other candidates there. Each time a network is judged by
its AP on some images of the evaluation set, and by the noise of its outputs against the float
model's. All of them are one compiled program (``deploy.switchboard``). Every measurement is on the
disk before the next begins; the same command goes on where it was.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from aqdetr_jax.checkpoint.model_folder import PACKAGED, load_model, model_checksum
from aqdetr_jax.config_types import from_dataclass
from aqdetr_jax.data.open import open_dataset
from aqdetr_jax.deploy.groups import Group, groups_of
from aqdetr_jax.deploy.ledger import Ledger
from aqdetr_jax.deploy.mixed import Budget, By, choose, damages, parse_budget, smallest_within
from aqdetr_jax.deploy.noise import OutputNoise, decibels
from aqdetr_jax.deploy.ranking import ranking
from aqdetr_jax.deploy.switchboard import Grids, Switchboard, grids_of
from aqdetr_jax.evaluation.models import bundle_evaluator
from aqdetr_jax.host import StoppedError
from aqdetr_jax.io import write_json_atomic
from aqdetr_jax.parallel.hosts import stop_request
from aqdetr_jax.paths import as_path
from aqdetr_jax.provenance import git_commit
from aqdetr_jax.quant.config import QuantConfig
from aqdetr_jax.quant.policy import Rule
from aqdetr_jax.quant.record import OpRecord
from aqdetr_jax.quant.report import bit_report
from aqdetr_jax.quant.spec import SUPPORTED_BITS, QuantSpec, packed_size
from aqdetr_jax.training.config import ExperimentConfig
from aqdetr_jax.training.effects import without_idle
from aqdetr_jax.training.metrics import Progress
from aqdetr_jax.training.sizing import eval_batch_size

RESULT, POLICY = "sensitivity.json", "mixed.json"
"""What is written: the measurements, and the configuration with the chosen bits."""

CANDIDATES = (8, 4, 3, 2)
IMAGES = 200


def sensitivity(
    config: ExperimentConfig,
    model: str,
    out: str | Path,
    *,
    images: int = IMAGES,
    candidates: Sequence[int] = CANDIDATES,
    budget: str | None = None,
    by: By = "AP",
) -> dict[str, Any]:
    """Measures, ranks and chooses; writes ``sensitivity.json`` and ``mixed.json``.

    Args:
      config: of the student: its data, and its policy, to which the choice is compared.
      model: folder of the float model, or ``packaged:NAME``.
      out: folder; measurements in it are not made again.
      images: of the evaluation set, the first ones.
      candidates: bits to choose from.
      by: what the choice goes by: AP lost, or noise of the outputs.
      budget: see ``mixed.parse_budget``; None = the bytes of the configuration's own policy.

    Returns:
      The content of ``sensitivity.json``, see docs/sensitivity.md.

    Raises:
      StoppedError: after SIGTERM or SIGINT; what was measured is kept.
      ValueError: the model is quantized, the policy quantizes nothing, the folder holds
        measurements of something else, or the budget cannot be kept.
    """
    limit = None if budget is None else parse_budget(budget)
    candidates = tuple(sorted(set(candidates), reverse=True))
    if not candidates or not set(candidates) <= set(SUPPORTED_BITS):
        raise ValueError(f"candidate bits are of {SUPPORTED_BITS}, got {candidates}")
    if not config.quant.quantized:
        raise ValueError(
            f"{config.name} quantizes nothing: --config.quant.policy=w4a4 (say) gives the policy "
            "that the choice is compared with"
        )
    if config.quant.align_queries:
        raise ValueError(
            "sensitivity compares with the float model, which does not normalise its decoder's "
            "queries: set --config.quant.align_queries=False"
        )
    if jax.process_count() > 1:
        raise ValueError("sensitivity runs in one process: on one host, with all of its devices")
    study = _Study(config, model, as_path(out), images, candidates)
    study.measure()
    return study.finish(limit, by)


def parse_bits(text: str) -> tuple[int, ...]:
    """Candidate bits as they are written, ``8,4,3,2``.

    Raises:
      ValueError: the text is something else.
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"candidate bits are written 8,4,3,2; got {text!r}") from None


class _Study:
    def __init__(
        self,
        config: ExperimentConfig,
        model: str,
        out: Path,
        images: int,
        candidates: tuple[int, ...],
    ):
        self._config, self._model, self._out = config, model, out
        self._commit = git_commit()  # of the code that runs, whatever happens to it meanwhile
        self._candidates = candidates
        teacher = load_model(model)
        if teacher.quant.quantized:
            raise ValueError(f"{model} is quantized ({teacher.quant.policy}): give its float model")
        train_set, eval_set = (open_dataset(config.data, train=t) for t in (True, False))
        self._ledger = Ledger(
            out / RESULT,
            {
                "config": config.name,
                "model": model_checksum(model),
                "data": {"train": train_set.fingerprint, "eval": eval_set.fingerprint},
                "images": min(images, len(eval_set)),
                "dtype": config.model.dtype,
                "quant": from_dataclass(config.quant),
            },
        )
        self._board = Switchboard(config, teacher, train_set)
        architecture = self._board.bundle.config
        self._noise = OutputNoise(
            architecture.class_loss,
            by_box=architecture.family == "deformable" and architecture.deformable.two_stage,
        )
        self._evaluator = bundle_evaluator(
            self._board.bundle,
            eval_set,
            config.data,
            batch_size=eval_batch_size(config),
            first=images,
            outputs=self._noise.take,
        )
        self._policy_rows = self._board.record(config.quant)
        self._policy = grids_of(self._policy_rows)
        self._groups = groups_of(row.path for row in self._board.rows if grids_of([row]))
        self._sizes = {row.path: row.kernel_size for row in self._board.rows if row.kernel_size}
        self._float: dict[str, Any] | None = None
        uniform = {bits: self._board.uniform(bits) for bits in candidates}
        self._at = {
            (group.name, bits): _of_group(group, rows)
            for bits, rows in uniform.items()
            for group in self._groups
        }
        self._free = [group for group in self._groups if self._is_free(group)]
        if not self._free:
            raise ValueError(
                f"{config.name} quantizes weights and inputs of no group as a whole: there is "
                "nothing to choose"
            )

    # --- measuring ----------------------------------------------------------------------------

    def measure(self) -> None:
        """Everything but the choice."""
        tasks = list(self._tasks())
        new = [task for task in tasks if self._ledger.find(*task[:3]) is None]
        self._done = len(tasks) - len(new)
        self._progress = Progress(len(tasks) + 1, self._out, start=self._done)
        with stop_request() as stop:
            for kind, group, bits, grids in new:
                self._measured(kind, group, bits, grids)
                if stop.seen(self._done):
                    self._progress.close()
                    raise StoppedError(
                        f"stopped after {self._done} of {len(tasks)} measurements, which are in "
                        f"{self._out}: run the same command to go on"
                    )
        self._progress.close()

    def _tasks(self) -> Iterator[tuple[str, str, int | None, Grids]]:
        """(kind, group, bits, grids) of every measurement; the float model's is first."""
        yield "float", "", None, {}
        yield "policy", "", None, self._policy
        for group in self._groups:
            own = _of_group(group, self._policy_rows)
            for bits in self._candidates:
                yield "alone", group.name, bits, self._at[group.name, bits]
            if own:
                # At the policy's own bits, unless that is one of the above.
                if own not in [self._at[group.name, bits] for bits in self._candidates]:
                    yield "alone", group.name, None, own
                rest = {site: spec for site, spec in self._policy.items() if site not in own}
                yield "all but", group.name, None, rest
        for group in self._free:
            for bits in self._candidates:
                if bits != self._own(group):
                    grids = {**self._policy, **self._at[group.name, bits]}
                    yield "in policy", group.name, bits, grids

    def _judge(self, grids: Grids) -> dict[str, Any]:
        """The float model is first, whose outputs the others are compared with."""
        if self._float is None:
            self._float = self._passed({})
        return self._passed(grids) if grids else self._float

    def _passed(self, grids: Grids) -> dict[str, Any]:
        metrics, _ = self._evaluator.evaluate(self._board.variables(grids))
        noise = self._noise.finish()
        total = (noise["logits_noise"] + noise["boxes_noise"]) / 2
        return {
            "AP": metrics["AP"],
            "AP50": metrics["AP50"],
            **noise,
            "noise": total,
            "snr_db": decibels(total),
        }

    def _measured(self, kind: str, group: str, bits: Any, grids: Grids) -> dict[str, Any]:
        """A row of the ledger, measured if it is not there."""
        row = self._ledger.find(kind, group, bits)
        if row is None:
            start = time.perf_counter()
            found = self._judge(grids)
            row = self._ledger.add(kind, group, bits, found, time.perf_counter() - start)
            self._done += 1
            self._progress.update(self._done, {"AP": row["AP"]})
        return row

    # --- choosing -----------------------------------------------------------------------------

    def finish(self, budget: Budget | None, by: By) -> dict[str, Any]:
        """Chooses, judges the choice, and writes."""
        packed = bit_report(self._policy_rows)
        if budget is None:
            budget = Budget("bytes", packed["packed_bytes"])
        chosen = dict(
            zip(self._free, self._choice(budget, by, packed["packed_bytes"]), strict=True)
        )
        judged = self._measured("mixed", "", list(chosen.values()), self._mixed(chosen))
        quant, rows = self._as_policy(chosen)
        size, policy = bit_report(rows)["packed_bytes"], self._row("policy", "", None)
        kept = self._keeps(budget, packed["packed_bytes"]) and (
            policy["AP"] > judged["AP"] if budget.kind == "bytes" else packed["packed_bytes"] < size
        )
        if kept:
            chosen, judged, quant, size = {}, policy, self._config.quant, packed["packed_bytes"]
        mixed = dataclasses.replace(
            self._config, name=f"{self._config.name}_mixed", init_from=self._source(), quant=quant
        )
        write_json_atomic(self._out / POLICY, without_idle(mixed))
        return self._ledger.close(
            {
                "commit": self._commit,
                "candidates": list(self._candidates),
                "ranking": self._ranking(),
                "groups": [self._described(group, chosen.get(group)) for group in self._groups],
                "choice": {
                    "budget": {"kind": budget.kind, "value": budget.value},
                    "by": by,
                    "kept_policy": kept,
                    "bits": {group.name: b for group, b in chosen.items()},
                    "bytes": size,
                    "policy_bytes": packed["packed_bytes"],
                    "float_bytes": packed["float_bytes"],
                    "AP": judged["AP"],
                    "snr_db": judged["snr_db"],
                },
            }
        )

    def _is_free(self, group: Group) -> bool:
        """Whether its bits are chosen: it has weights, and the policy quantizes all of them.

        What stays float does so for a reason, and of what has no weights (the attention products,
        the residual sums) a budget of bytes says nothing: both stay as the policy has them.
        """
        own = _of_group(group, self._policy_rows)
        return all(f"{path}/kernel" in own and f"{path}/input" in own for path in group.paths)

    def _own(self, group: Group) -> int | None:
        """The candidate bits that the policy gives all of a group's grids, if it does so."""
        grids = _of_group(group, self._policy_rows)
        return next((b for b in self._candidates if self._at[group.name, b] == grids), None)

    def _keeps(self, budget: Budget, policy_bytes: int) -> bool:
        """Whether the policy keeps the budget."""
        if budget.kind == "bytes":
            return policy_bytes <= budget.value
        lost = self._row("float", "", None)["AP"] - self._row("policy", "", None)["AP"]
        return lost <= budget.value

    def _choice(self, budget: Budget, by: By, policy_bytes: int) -> list[int]:
        # Bytes of kernels: all else (steps, biases, floats) is the same whatever is chosen.
        def size(group: Group, bits: int | None = None) -> int:
            return sum(
                packed_size(self._sizes[path], bits or self._policy[f"{path}/kernel"].bits)
                for path in group.paths
            )

        policy = self._row("policy", "", None)
        options = []
        for group in self._free:
            own = self._own(group)
            rows = {
                bits: policy if bits == own else self._row("in policy", group.name, bits)
                for bits in self._candidates
            }
            damage = damages(rows, policy, own, by)
            options.append({bits: (size(group, bits), damage[bits]) for bits in damage})
        others = policy_bytes - sum(size(group) for group in self._free)
        if budget.kind == "AP":
            reference = self._row("float", "", None)["AP"]

            def lost(bits: Sequence[int]) -> float:
                grids = self._mixed(dict(zip(self._free, bits, strict=True)))
                return reference - self._measured("mixed", "", list(bits), grids)["AP"]

            return smallest_within(options, lost, budget.value)
        bits = choose(options, int(budget.value) - others)
        if bits is None:
            least = sum(min(size for size, _ in option.values()) for option in options)
            raise ValueError(
                f"a budget of {int(budget.value)} bytes cannot be kept: with every group at its "
                f"fewest bits the model takes {others + least}"
            )
        return bits

    def _row(self, *key: Any) -> dict[str, Any]:
        row = self._ledger.find(*key)
        assert row is not None  # all tasks are done
        return row

    def _as_policy(self, chosen: Mapping[Group, int]) -> tuple[QuantConfig, list[OpRecord]]:
        """The choice as rows of the policy, and the operations under it."""
        rules = (
            Rule(group.pattern, bits, bits, bits, f"{group.name}: chosen by sensitivity")
            for group, bits in chosen.items()
        )
        quant = self._config.quant
        quant = dataclasses.replace(quant, rules=(*rules, *quant.rules))
        rows = self._board.record(quant)
        if grids_of(rows) != self._mixed(chosen):
            raise RuntimeError("the chosen policy's grids are not those that were measured")
        return quant, rows

    def _mixed(self, chosen: Mapping[Group, int]) -> dict[str, QuantSpec]:
        """The policy's grids, those of some groups at bits of their own."""
        mixed = dict(self._policy)
        for group, bits in chosen.items():
            mixed |= self._at[group.name, bits]
        return mixed

    def _ranking(self) -> dict[str, Any]:
        """At the candidate that most of the policy's weights have, else at the fewest bits."""
        weights: dict[int, int] = {}
        for path, size in self._sizes.items():
            if spec := self._policy.get(f"{path}/kernel"):
                weights[spec.bits] = weights.get(spec.bits, 0) + size
        common = max(weights, key=lambda bits: weights[bits], default=0)
        bits = common if common in self._candidates else min(self._candidates)
        names = [group.name for group in self._groups]
        return ranking(names, self._ledger.rows, bits, self._row("float", "", None)["AP"])

    # --- writing ------------------------------------------------------------------------------

    def _source(self) -> str:
        if self._model.startswith(PACKAGED):
            return self._model
        return str(as_path(self._model).absolute())

    def _described(self, group: Group, chosen: int | None) -> dict[str, Any]:
        own = sorted({spec.bits for spec in _of_group(group, self._policy_rows).values()})
        records = [row for row in self._board.rows if row.path in group.paths]
        return {
            "name": group.name,
            "pattern": group.pattern,
            "operations": len(group.paths),
            "weights": sum(self._sizes.get(path, 0) for path in group.paths),
            "macs": sum(row.macs for row in records),
            "policy_bits": own,
            "chosen_bits": chosen,
        }


def _of_group(group: Group, rows: Sequence[Any]) -> dict[str, QuantSpec]:
    """The grids of a group's operations."""
    return grids_of([row for row in rows if row.path in group.paths])
