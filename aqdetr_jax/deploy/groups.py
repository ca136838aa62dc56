"""The operations of a detector in groups that bits are chosen for: by module path.

A group is a row of a policy: its pattern finds its operations and no others, whatever other rows
there are.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable


@dataclasses.dataclass(frozen=True)
class Group:
    """Operations whose bits are one choice.

    Attributes:
      name: for people, and in files.
      pattern: regular expression, searched in module paths.
      paths: the operations, in the order in which they run.
    """

    name: str
    pattern: str
    paths: tuple[str, ...]


# A path's regular expression, the group's name, and the group's own pattern; what the first one
# finds in its brackets fills in the others.
_TABLE = (
    (r"^backbone/stem$", "stem", r"^backbone/stem$"),
    (
        r"^backbone/layer(\d+)_\d+/(?:conv\d+|shortcut)$",
        "backbone stage {0}",
        r"^backbone/layer{0}_\d+/(conv\d+|shortcut)$",
    ),
    (
        r"^backbone/layer(\d+)_\d+/(?:expand|project)$",
        "backbone stage {0}",
        r"^backbone/layer{0}_\d+/(expand|project)$",
    ),
    (
        r"^backbone/layer(\d+)_\d+/depthwise$",
        "backbone stage {0} depthwise",
        r"^backbone/layer{0}_\d+/depthwise$",
    ),
    (r"^backbone/layer\d+_\d+/residual$", "residual sums", r"^backbone/layer\d+_\d+/residual$"),
    (r"^input_proj(?:_\d+)?$", "input projection", r"^input_proj(_\d+)?$"),
    (
        r"^(encoder|decoder)/layer_(\d+)/(self|cross)_attention/core$",
        "{0} {1} {2}-attention products",
        r"^{0}/layer_{1}/{2}_attention/core$",
    ),
    (
        r"^(encoder|decoder)/layer_(\d+)/(self|cross)_attention/[^/]+$",
        "{0} {1} {2}-attention projections",
        r"^{0}/layer_{1}/{2}_attention/(?!core$)[^/]+$",
    ),
    (
        r"^(encoder|decoder)/layer_(\d+)/feed_forward/[^/]+$",
        "{0} {1} FFN",
        r"^{0}/layer_{1}/feed_forward/[^/]+$",
    ),
    (r"(?:class_head|box_head)", "heads", r"(class_head|box_head)"),
)


def groups_of(paths: Iterable[str]) -> tuple[Group, ...]:
    """The groups that operations belong to, in the order in which their first ones run.

    An operation that the table does not know is a group of its own.

    Args:
      paths: module paths of quantized operations.
    """
    found: dict[tuple[str, str], list[str]] = {}
    for path in dict.fromkeys(paths):
        found.setdefault(_group_of(path), []).append(path)
    return tuple(Group(name, pattern, tuple(members)) for (name, pattern), members in found.items())


def _group_of(path: str) -> tuple[str, str]:
    for search, name, pattern in _TABLE:
        match = re.search(search, path)
        if match:
            parts = match.groups()
            for number, part in enumerate(parts):
                pattern = pattern.replace(f"{{{number}}}", part)
            return name.format(*parts), pattern
    return path, f"^{re.escape(path)}$"
