"""Programs that are compiled once for each known shape of their batch, and never for another.

``jax.jit`` compiles whatever comes, whenever it comes. A run has a short list of shapes, each of
which takes minutes: they are compiled ahead, what does not fit the memory is found then, and a
batch of another shape is an error, not an hour lost.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from aqdetr_jax.parallel.hosts import say

Batch = Any
"""A tree of arrays, or of their shapes."""

_WORTH_A_WORD = 1.0  # seconds of compiling


class DoesNotFitError(RuntimeError):
    """A program needs more memory than a device has; the message says which one and what helps."""


class Programs:
    """A jitted function as one program for each batch that it may be given.

    Args:
      function: jitted; called as ``f(*held, *batch)``.
      batches: the batches as ``jax.ShapeDtypeStruct`` with shardings.
      name: of the function in messages.
      remedies: what to do about a program that does not fit; a sentence for the user.
      reserved: bytes on each device that are in use besides what the function is given.
    """

    def __init__(
        self,
        function: Any,
        batches: Sequence[tuple[Batch, ...]],
        *,
        name: str,
        remedies: str,
        reserved: int = 0,
    ):
        self._function, self._name, self._remedies = function, name, remedies
        self._reserved = reserved
        self._batches = {_signature(batch): batch for batch in batches}
        self._programs: dict[Any, Callable[..., Any]] = {}

    def reserve(self, count: int) -> None:
        """Says how many bytes on each device are in use besides what the function is given."""
        self._reserved = count

    def compile_all(self, *held: Any) -> None:
        """Compiles what is not compiled yet, and says what each takes.

        Args:
          *held: arguments before the batch, or their shapes with shardings.

        Raises:
          DoesNotFitError: a program does not fit the devices' memory.
        """
        for signature in self._batches:
            self._compile(signature, held)

    def __call__(self, held: tuple[Any, ...], batch: tuple[Batch, ...]) -> Callable[..., Any]:
        """The program for a batch, compiled now if it was not; to be called as the function is.

        Args:
          held: arguments before the batch.
          batch: the rest of them.

        Raises:
          ValueError: no program is known for this shape; the message names it.
          DoesNotFitError: see :meth:`compile_all`.
        """
        return self._compile(_signature(batch), held)

    def _compile(self, signature: Any, held: tuple[Any, ...]) -> Callable[..., Any]:
        if signature in self._programs:
            return self._programs[signature]
        if signature not in self._batches:
            known = "; ".join(f"{_described(one)} {_shapes(one)}" for one in self._batches)
            raise ValueError(
                f"{self._name}: a batch of {_described(signature)} {_shapes(signature)} is none of "
                f"those that a program is made for: {known}"
            )
        start = time.perf_counter()
        described = f"{self._name} of {_described(signature)}"
        try:
            program = self._function.lower(*held, *self._batches[signature]).compile()
        except jax.errors.JaxRuntimeError as error:
            # Of a chip's own memories none has room for more because a batch is smaller.
            if "RESOURCE_EXHAUSTED" not in str(error) or "memory space vmem" in str(error):
                raise
            reason = " ".join(str(error).split())[:300]
            raise DoesNotFitError(
                f"the {described} does not fit the devices' memory: {self._remedies} ({reason})"
            ) from error
        seconds = time.perf_counter() - start
        used, limit = needed_bytes(program), device_bytes()
        memory = ""
        if used is not None and limit is not None:
            memory = f", {used / 2**30:.1f} of {limit / 2**30:.1f} GiB a device"
            if used + self._reserved > limit:
                more = f" beside {self._reserved / 2**30:.1f} GiB" if self._reserved else ""
                raise DoesNotFitError(
                    f"the {described} does not fit the devices' memory: it takes "
                    f"{used / 2**30:.1f} GiB{more} of {limit / 2**30:.1f} GiB: {self._remedies}"
                )
        if memory or seconds >= _WORTH_A_WORD:
            say(f"{described}: compiled in {seconds:.1f} s{memory}")
        self._programs[signature] = program
        return program


def needed_bytes(program: Any) -> int | None:
    """Bytes that a compiled program takes on each device, its arguments included; None = unknown.

    What is donated counts once.
    """
    found = program.memory_analysis()
    if found is None:
        return None
    return (
        found.argument_size_in_bytes
        + found.output_size_in_bytes
        - found.alias_size_in_bytes
        + found.temp_size_in_bytes
        + found.generated_code_size_in_bytes
    )


def device_bytes() -> int | None:
    """Bytes that programs may use of this process's devices, each; None where they do not say."""
    found = [(device.memory_stats() or {}).get("bytes_limit") for device in jax.local_devices()]
    known = [limit for limit in found if limit]
    return min(known) if known else None


def _signature(batch: tuple[Batch, ...]) -> tuple[tuple[tuple[int, ...], Any], ...]:
    """Shape and type of every array."""
    return tuple((x.shape, x.dtype) for x in jax.tree.leaves(batch))


def _described(signature: Any) -> str:
    """How many images of which bucket a batch has, in words."""
    images = [shape for shape, dtype in signature if len(shape) == 4 and dtype == "uint8"]
    if len(images) != 1:
        return f"{len(signature)} arrays"
    rows, height, width, _ = images[0]
    return f"{rows} images of {width}x{height}"


def _shapes(signature: Any) -> str:
    return f"({', '.join(f'{dtype}{list(shape)}' for shape, dtype in signature)})"
