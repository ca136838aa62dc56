"""The names that a file of ``torch.save`` may hold, and what each stands for when we read it.

Nothing here is what it is called after: the names lead to functions and values of ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from aqdetr_jax.interop.pickle_values import Attributes, Function, NumberType, Ordered, key_of
from aqdetr_jax.interop.source import Malformed, shown


@dataclass(frozen=True, slots=True)
class Storage:
    """Memory of ``count`` elements, named in the pickle and kept beside it."""

    key: str
    dtype: np.dtype
    count: int


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor as the pickle describes it, nothing of it checked."""

    storage: Storage
    offset: Any
    shape: tuple[Any, ...]
    strides: tuple[Any, ...]


# Each function takes the pickle's arguments as one tuple.


def _unusable(arguments: tuple[Any, ...]) -> Any:
    raise Malformed("calls a type that has no parts")


def _arguments(name: str) -> Malformed:
    return Malformed(f"calls {name} with arguments that are not its own")


def _tensor(arguments: tuple[Any, ...]) -> Tensor:
    match arguments:
        case (Storage() as storage, offset, tuple(shape), tuple(strides)):
            return Tensor(storage, offset, shape, strides)
    raise _arguments("_rebuild_tensor")


def _tensor_v2(arguments: tuple[Any, ...]) -> Tensor:
    # Then come requires_grad, hooks (never saved) and marks of negated and conjugated views.
    if len(arguments) not in (6, 7):
        raise _arguments("_rebuild_tensor_v2")
    if len(arguments) == 7 and not (arguments[6] is None or arguments[6] == {}):
        raise Malformed("holds a tensor with metadata, such as a negated view")
    return _tensor(arguments[:4])


def _parameter(arguments: tuple[Any, ...]) -> Tensor:
    # Then come requires_grad, hooks, and what Python code has hung on it.
    match arguments:
        case (Tensor() as tensor, _, _) | (Tensor() as tensor, _, _, _):
            return tensor
    raise _arguments("_rebuild_parameter")


def _size(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    match arguments:
        case (tuple(size),):
            return size
    raise _arguments("torch.Size")


def _device(arguments: tuple[Any, ...]) -> str:
    match arguments:
        case (str(kind),):
            return kind
        case (str(kind), int(index)) if 0 <= index < 128:
            return f"{kind}:{index}"
    raise _arguments("torch.device")


def _ordered(arguments: tuple[Any, ...]) -> Ordered:
    # Python 2 wrote the items as pairs; Python 3 sets them afterwards.
    match arguments:
        case ():
            return Ordered()
        case (list(items),):
            if all(isinstance(item, list | tuple) and len(item) == 2 for item in items):
                return Ordered((key_of(key), value) for key, value in items)
    raise _arguments("OrderedDict")


def _counter(arguments: tuple[Any, ...]) -> dict[Any, Any]:
    match arguments:
        case ():
            return {}
        case (dict(counts),):
            return dict(counts)
    raise _arguments("Counter")


def _elements(arguments: tuple[Any, ...]) -> list[Any]:
    match arguments:
        case ():
            return []
        case (list(items),):
            return [key_of(item) for item in items]
    raise _arguments("set")


def _encoded(arguments: tuple[Any, ...]) -> bytes:
    # Protocol 2 has no bytes.
    match arguments:
        case (str(text), "latin1"):
            try:
                return text.encode("latin-1")
            except UnicodeEncodeError:
                pass
    raise _arguments("_codecs.encode")


def _no_bytes(arguments: tuple[Any, ...]) -> bytes:
    if arguments:
        raise _arguments("bytes")
    return b""


def _path(separator: str) -> Function:
    """Paths of :mod:`pathlib`, which are written as their parts."""

    def joined(parts: tuple[Any, ...]) -> str:
        if not all(isinstance(part, str) for part in parts):
            raise _arguments("a path of pathlib")
        if not parts:
            return "."
        root = parts[0] if len(parts) == 1 or parts[0].endswith(separator) else parts[0] + separator
        return root + separator.join(parts[1:])

    return joined


def _number_type(arguments: tuple[Any, ...]) -> NumberType:
    match arguments:
        case (str(code), _, _) if code in NumberType.CODES:
            return NumberType(code)
        case (str(code), _, _):
            raise Malformed(f"holds a NumPy value of the type {shown(code)}, no plain number")
    raise _arguments("numpy.dtype")


def _number(arguments: tuple[Any, ...]) -> int | float | bool:
    match arguments:
        case (NumberType() as kind, bytes(data)):
            return kind.value(data)
    raise _arguments("numpy's scalar")


def _namespace(arguments: tuple[Any, ...]) -> Attributes:
    if arguments:
        raise _arguments("Namespace")
    return Attributes()


STORAGES: Mapping[str, np.dtype] = {
    "torch.HalfStorage": np.dtype(np.float16),
    "torch.FloatStorage": np.dtype(np.float32),
    "torch.DoubleStorage": np.dtype(np.float64),
    "torch.BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch.CharStorage": np.dtype(np.int8),
    "torch.ShortStorage": np.dtype(np.int16),
    "torch.IntStorage": np.dtype(np.int32),
    "torch.LongStorage": np.dtype(np.int64),
    "torch.ByteStorage": np.dtype(np.uint8),
    "torch.BoolStorage": np.dtype(np.bool_),
    "torch.storage.UntypedStorage": np.dtype(np.uint8),
}
"""Types of storages, and the types of arrays they become."""

DTYPE_NAMES = frozenset(
    f"torch.{name}"
    for name in (
        *("float16", "float32", "float64", "bfloat16"),
        *("int8", "int16", "int32", "int64", "uint8", "bool"),
        *("uint16", "uint32", "uint64", "complex64", "complex128", "float8_e4m3fn", "float8_e5m2"),
    )
)
"""Types as values, for example among the arguments of a run; they become these names."""

FUNCTIONS: Mapping[str, Function] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor_v2,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch.Size": _size,
    "torch.device": _device,
    "collections.OrderedDict": _ordered,
    "collections.Counter": _counter,
    "argparse.Namespace": _namespace,
    **{
        f"{module}.{pure}{kind}Path": _path(separator)
        for module in ("pathlib", "pathlib._local")  # of Python 3.13
        for pure in ("", "Pure")
        for kind, separator in (("Posix", "/"), ("Windows", "\\"))
    },
    # NumPy 2 has moved it.
    "numpy.core.multiarray.scalar": _number,
    "numpy._core.multiarray.scalar": _number,
    "numpy.dtype": _number_type,
    "_codecs.encode": _encoded,
    # Protocol 2 names the built-in types as Python 2 did.
    "__builtin__.bytes": _no_bytes,
    "__builtin__.set": lambda arguments: set(_elements(arguments)),
    "__builtin__.frozenset": lambda arguments: frozenset(_elements(arguments)),
    "builtins.bytes": _no_bytes,
    "builtins.set": lambda arguments: set(_elements(arguments)),
    "builtins.frozenset": lambda arguments: frozenset(_elements(arguments)),
}
"""All that a pickle can call, with the class of run arguments and the types of containers."""

NAMES: Mapping[str, Function] = {
    **FUNCTIONS,
    **dict.fromkeys((*STORAGES, *DTYPE_NAMES), _unusable),
}

_SPARSE, _OTHER = "a sparse tensor", "a tensor with attributes, or of a class of its own"
REFUSED: Mapping[str, str] = {
    "torch.ComplexFloatStorage": "a complex tensor",
    "torch.ComplexDoubleStorage": "a complex tensor",
    "torch._utils._rebuild_tensor_v3": "a tensor of float8, of large unsigned integers or the like",
    "torch._utils._rebuild_qtensor": "a quantized tensor",
    "torch._utils._rebuild_sparse_tensor": _SPARSE,
    "torch._utils._rebuild_sparse_csr_tensor": _SPARSE,
    "torch._utils._rebuild_nested_tensor": "a nested tensor",
    "torch._utils._rebuild_meta_tensor_no_storage": "a tensor without values",
    "torch._tensor._rebuild_from_type_v2": _OTHER,
    "numpy.core.multiarray._reconstruct": "a NumPy array",
    "numpy._core.multiarray._reconstruct": "a NumPy array",
}
"""What some names outside the list stand for, for messages."""
