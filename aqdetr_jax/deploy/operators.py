"""Where a deployed network's time goes, by operator, and where integers lose to floats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

ROLES = {
    "convolutions": (
        "Conv",
        "FusedConv",
        "QLinearConv",
        "ConvInteger",
        "NhwcConv",
        "NhwcFusedConv",
    ),
    "products": (
        *("MatMul", "FusedMatMul", "Gemm", "FusedGemm", "MatMulInteger", "MatMulIntegerToFloat"),
        *("DynamicQuantizeMatMul", "QLinearMatMul", "QGemm"),
    ),
    "grids": ("QuantizeLinear", "DequantizeLinear", "Round", "Cast"),
    "sums": ("Add", "Sum", "QLinearAdd"),
    "norms and softmax": (
        *(
            "LayerNormalization",
            "SkipLayerNormalization",
            "Softmax",
            "BiasSoftmax",
            "QLinearSoftmax",
        ),
        *("GroupNorm", "InstanceNormalization"),
    ),
    "samples": ("GridSample", "Gather", "GatherND", "GatherElements"),
}
"""What operators are there for; the rest is "others"."""

_ROLE = {name: role for role, names in ROLES.items() for name in names}
_PRODUCTS = ("convolutions", "products")
_BYTES = frozenset(("int8", "uint8"))
_NAMED = 6


def role_of(node: Mapping[str, Any]) -> str:
    """The role of a node; what clips or chooses among bytes keeps codes on their grid."""
    role = _ROLE.get(node["operator"], "others")
    clips = node["operator"] in ("Min", "Max", "Clip", "Relu")
    return "grids" if clips and _BYTES.intersection(node["types"]) else role


def is_integer(node: Mapping[str, Any]) -> bool:
    """Whether a node computes with codes."""
    return bool(_BYTES.intersection(node["types"]))


def summary(nodes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Time by operator type and by role.

    Args:
      nodes: see ``onnx.running.operator_times``.

    Returns:
      Plain JSON values: ``milliseconds`` of all; ``operators``, the slowest first, each with
      ``operator``, ``numbers`` ("integer", "float"), ``role``, ``count``, ``milliseconds``,
      ``share``; ``roles``, milliseconds each; ``float_products``, names of the convolutions and
      products that compute with floats, and ``products``, how many there are of both.
    """
    total = sum(node["milliseconds"] for node in nodes) or 1e-9
    operators: dict[tuple[str, str, str], dict[str, Any]] = {}
    roles: dict[str, float] = {}
    for node in nodes:
        role, numbers = role_of(node), "integer" if is_integer(node) else "float"
        row = operators.setdefault(
            (node["operator"], numbers, role),
            {
                "operator": node["operator"],
                "numbers": numbers,
                "role": role,
                "count": 0,
                "milliseconds": 0.0,
            },
        )
        row["count"] += 1
        row["milliseconds"] += node["milliseconds"]
        roles[role] = roles.get(role, 0.0) + node["milliseconds"]
    rows = sorted(operators.values(), key=lambda row: -row["milliseconds"])
    products = [node for node in nodes if role_of(node) in _PRODUCTS]
    return {
        "milliseconds": round(total, 4),
        "operators": [
            {**row, "milliseconds": round(row["milliseconds"], 4)}
            | {"share": round(row["milliseconds"] / total, 4)}
            for row in rows
        ],
        "roles": {role: round(ms, 4) for role, ms in sorted(roles.items(), key=lambda x: -x[1])},
        "products": len(products),
        "float_products": [node["node"] for node in products if not is_integer(node)],
    }


def format_summary(found: Mapping[str, Any], most: int = 10) -> list[str]:
    """A summary as lines of text: the slowest operators, and what stayed float."""
    lines = []
    for row in found["operators"][:most]:
        lines.append(
            f"  {row['operator']:22} {row['numbers']:8} {row['count']:5} "
            f"{row['milliseconds']:9.2f} ms {row['share']:6.1%}"
        )
    rest = found["operators"][most:]
    if rest:
        count, ms = (sum(row[key] for row in rest) for key in ("count", "milliseconds"))
        share = ms / max(found["milliseconds"], 1e-9)
        lines.append(f"  {'all others':22} {'':8} {count:5} {ms:9.2f} ms {share:6.1%}")
    left = found["float_products"]
    if 0 < len(left) < found["products"]:
        named = ", ".join(left[:_NAMED])
        more = f" and {len(left) - _NAMED} more" if len(left) > _NAMED else ""
        lines.append(
            f"  left in float: {len(left)} of {found['products']} convolutions and products "
            f"({named}{more})"
        )
    return lines


def losses(integer: Mapping[str, Any], floats: Mapping[str, Any]) -> str:
    """Where integers are slower than floats, in one sentence; "" where they nowhere are.

    Args:
      integer: summary of an integer file.
      floats: of its float file.
    """
    slower = []
    for role, ms in integer["roles"].items():
        before = floats["roles"].get(role, 0.0)
        if ms <= before or ms - before < 0.01 * integer["milliseconds"]:
            continue  # as fast, or of no account
        rows = [row for row in integer["operators"] if row["role"] == role]
        named = ", ".join(f"{row['operator']} {row['milliseconds']:.2f}" for row in rows[:3])
        slower.append((ms - before, f"{role} {ms:.2f} ms against {before:.2f} ({named})"))
    if not slower:
        return ""
    return "integers are slower than floats in " + "; ".join(
        text for _, text in sorted(slower, reverse=True)
    )
