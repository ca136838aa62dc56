"""Arrays of the tensors in a file of ``torch.save``, each checked to lie in its storage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from aqdetr_jax.interop.pickle_values import Global, key_of
from aqdetr_jax.interop.source import Malformed, shown
from aqdetr_jax.interop.torch_names import DTYPE_NAMES, STORAGES, Storage, Tensor

MAX_DIMENSIONS = 32
"""Dimensions of a tensor."""


class Storages:
    """The storages that a pickle names by persistent ids, ``known`` by their keys."""

    def __init__(self, fields: int):
        """Args: how many fields an id has: 5 in the zip format, 6 before it."""
        self.fields = fields
        self.known: dict[str, Storage] = {}

    def named(self, value: Any) -> Storage:
        """The storage of a persistent id; Malformed if it is none, or contradicts another."""
        match value:
            case ("storage", Global(name=kind), str(key), str(), int(count), *view):
                dtype = STORAGES.get(kind)
                # Views of storages are written no more since torch 0.4.
                if dtype is not None and len(value) == self.fields and view in ([], [None]):
                    storage = Storage(key, dtype, count)
                    key_of(key)
                    if count < 0 or self.known.setdefault(key, storage) != storage:
                        raise Malformed(f"has two sizes for the storage {shown(key)}, or none")
                    return storage
        raise Malformed("has a persistent id that is not that of a storage")


class Arrays:
    """Makes the arrays of a result, within the bound on their bytes."""

    def __init__(self, fetch: Callable[[Storage, int], np.ndarray], swap: bool, max_bytes: int):
        """Sets the bound.

        Args:
          fetch: reads the bytes of a storage, given their number, as uint8 [size].
          swap: whether the file has the other byte order than the machine.
          max_bytes: see :func:`aqdetr_jax.interop.torch_file.read_torch`.
        """
        self.fetch = fetch
        self.swap = swap
        self.max_bytes = max_bytes
        self.counted = 0
        self.stored = 0
        self.data: dict[str, np.ndarray] = {}
        self.made: dict[Any, np.ndarray] = {}

    def leaf(self, value: Any) -> Any:
        """What a value that is no container becomes; Malformed for what may not be in a result."""
        if isinstance(value, Global) and value.name in DTYPE_NAMES:
            return value.name
        if isinstance(value, Storage):
            value = Tensor(value, 0, (value.count,), (1,))
        if not isinstance(value, Tensor):
            what = value.name if isinstance(value, Global) else type(value).__name__
            raise Malformed(f"holds {what} itself, which is no value")
        return self.array(value)

    def array(self, tensor: Tensor) -> np.ndarray:
        """The array of a tensor, read-only, of its shape, strides and the storage's dtype."""
        storage, itemsize = tensor.storage, tensor.storage.dtype.itemsize
        if not len(tensor.shape) == len(tensor.strides) <= MAX_DIMENSIONS:
            raise Malformed(
                f"has a tensor of {len(tensor.shape)} dimensions and {len(tensor.strides)} "
                f"strides; up to {MAX_DIMENSIONS} of both are read"
            )
        numbers = (tensor.offset, *tensor.shape, *tensor.strides)
        # Not isinstance: True is an int as well.
        if any(type(number) is not int or number < 0 for number in numbers):
            raise Malformed("has a tensor whose size, stride or offset is no number from 0 on")
        # Empty dimensions count as 1: NumPy wants the product of the others to be a size as well.
        size = itemsize
        for length in tensor.shape:
            size *= max(length, 1)
            if size > self.max_bytes:
                break
        self.counted += size
        if self.counted > self.max_bytes:
            raise Malformed(f"has arrays of more than {self.max_bytes} bytes")
        empty = 0 in tensor.shape
        steps = list(zip(tensor.shape, tensor.strides, strict=True))
        last = tensor.offset + (-1 if empty else sum((n - 1) * step for n, step in steps))
        if last >= storage.count:
            raise Malformed(
                f"has a tensor that leaves its storage {shown(storage.key)} of {storage.count}"
            )
        view = (storage.key, tensor.offset, tensor.shape, tensor.strides)
        made = self.made.get(view)
        if made is None:
            data = self.storage(storage)
            if empty:
                made = np.empty(tensor.shape, storage.dtype)
            else:
                # The stride of a dimension of 1 is not used, and can be any number.
                strides = [step * itemsize if n > 1 else itemsize for n, step in steps]
                made = np.ndarray(
                    tensor.shape, storage.dtype, data, tensor.offset * itemsize, strides
                )
            made.flags.writeable = False
            self.made[view] = made
        return made

    def storage(self, storage: Storage) -> np.ndarray:
        """The bytes of a storage in the machine's order, uint8 [size], read once."""
        data = self.data.get(storage.key)
        if data is None:
            itemsize = storage.dtype.itemsize
            size = storage.count * itemsize
            self.stored += size
            if self.stored > self.max_bytes:
                raise Malformed(f"has storages of more than {self.max_bytes} bytes")
            data = self.fetch(storage, size)
            if storage.dtype == np.bool_ and size and data.max() > 1:
                raise Malformed("has a tensor of bool with a byte that is neither 0 nor 1")
            if self.swap and itemsize > 1:
                data = data.view(f"u{itemsize}").byteswap().view(np.uint8)
            self.data[storage.key] = data
        return data
