"""Requests to object stores: made until answered, their failures told in words."""

from __future__ import annotations

import asyncio
import errno
import functools
import logging
import os
import random
import time
from collections.abc import Callable
from typing import Any, TypeVar

logger = logging.getLogger(__name__)

SCHEMES = {"gs": "gcsfs", "s3": "s3fs"}
"""Kinds of stores, and the package that speaks to each."""

PATIENCE = 300.0
"""Seconds for which a request is tried again."""

PAUSE = 1.0
"""Seconds before the second try; doubled every time, up to 30."""

_STALL = 60.0  # seconds without a byte, after which a connection counts as dead
_PASSING = {408, 429, 500, 502, 503, 504}  # answers of a store that has a bad minute
_Result = TypeVar("_Result")


class StoreError(OSError):
    """An object store that refuses, or does not answer; the message says which object and why."""

    def __init__(self, number: int, text: str):
        super().__init__(number, text)
        self._text = text

    def __str__(self) -> str:
        return self._text

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.errno, self._text)


@functools.cache
def _filesystem(scheme: str) -> Any:
    """The file system of a kind of store.

    Raises:
      StoreError: the package that speaks to it is not installed.
    """
    emulator = os.environ.get("STORAGE_EMULATOR_HOST")
    if emulator and "://" in emulator:
        os.environ.setdefault("TENSORSTORE_GCS_HTTP_URL", emulator)  # Orbax's arrays
    try:
        import aiohttp
        import fsspec

        # Also for Orbax: what other hosts write must be seen.
        names = ("gs", "gcs", "s3")
        for name in names:
            options = fsspec.config.conf.setdefault(name, {})
            options["use_listings_cache"] = False
            if emulator and name != "s3":
                options["token"] = "anon"  # an emulator asks for no credentials
        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # its tracebacks are said in words
        if scheme != "gs":
            return fsspec.filesystem(scheme)
        # One kind of client for every bucket, the one that is tested: not the one that asks another
        # service first, over gRPC, what kind of bucket it is.
        from gcsfs.core import GCSFileSystem

        for name in ("gs", "gcs"):
            fsspec.register_implementation(name, GCSFileSystem, clobber=True)
        limits = aiohttp.ClientTimeout(total=None, sock_connect=_STALL, sock_read=_STALL)
        return fsspec.filesystem("gs", requests_timeout=limits)
    except ImportError as error:
        raise StoreError(
            errno.ENOSYS,
            f"{scheme}:// needs the package {SCHEMES[scheme]} ({error}): pip install "
            f"{SCHEMES[scheme]}",
        ) from error


def call(path: Any, what: str, request: Callable[[Any], _Result]) -> _Result:
    """Makes a request until it is answered, or has failed for PATIENCE seconds.

    Args:
      path: the object.
      what: is done with it, for messages: "read".
      request: does it with fsspec's file system.

    Raises:
      FileNotFoundError, FileExistsError: as answered.
      StoreError: refused, or no answer.
    """
    begin, pause = time.monotonic(), PAUSE
    while True:
        try:
            return request(_filesystem(path.parts[1]))
        except (FileNotFoundError, FileExistsError) as error:
            if isinstance(error, FileNotFoundError):
                raise _absent(path, what, error) from error
            raise FileExistsError(errno.EEXIST, "exists", str(path)) from error
        except StoreError:
            raise
        except Exception as error:
            reason = _reason(error)
            if not _may_pass(error):
                raise _refused(path, what, error, reason) from error
            waited = time.monotonic() - begin
            if waited >= PATIENCE:
                raise StoreError(
                    errno.EIO,
                    f"cannot {what} {path}: the store gave no answer for {waited:.0f} s "
                    f"(last: {reason})",
                ) from error
            logger.warning(
                "cannot %s %s (%s): the store is tried again, for %.0f s at most",
                *(what, path, reason, PATIENCE - waited),
            )
            time.sleep(pause * (0.5 + random.random()))
            pause = min(2 * pause, 30.0)


def _absent(path: Any, what: str, error: Exception) -> OSError:
    """What is not found: to a writer, the bucket."""
    if what == "write":
        return StoreError(
            errno.ENOENT,
            f"cannot write {path}: there is no bucket {path.parts[1]}://{path.bucket}; make it, or "
            "name another",
        )
    return not_found(path)


def _may_pass(error: Exception) -> bool:
    """Whether the same request may be answered later."""
    import aiohttp
    import requests

    code = getattr(error, "code", None)
    if str(code).isdigit():
        return int(code) in _PASSING  # type: ignore[arg-type]
    passing = aiohttp.ClientError, requests.RequestException, TimeoutError, asyncio.TimeoutError
    if isinstance(error, passing):
        return True
    return type(error).__name__ in ("ChecksumError", "EndpointConnectionError", "TransportError")


def _refused(path: Any, what: str, error: Exception, reason: str) -> OSError:
    """An answer that will stay the same."""
    code = str(getattr(error, "code", ""))
    denied = code in ("401", "403") or str(error).startswith(("Forbidden", "Access Denied"))
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if (
        kinds & {"GoogleAuthError", "NoCredentialsError"}
        or code == "401"
        or (denied and "nonymous" in str(error))
    ):
        remedy = (
            "gcloud auth application-default login, or set GOOGLE_APPLICATION_CREDENTIALS to the "
            "file of a service account; on a Google Cloud VM give it a service account"
            if path.parts[1] == "gs"
            else "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        )
        return StoreError(
            errno.EACCES, f"cannot {what} {path}: no valid credentials ({reason}): {remedy}"
        )
    if denied:
        return StoreError(
            errno.EACCES,
            f"cannot {what} {path}: these credentials may not ({reason}): give their account the "
            f"right on the bucket {path.bucket}",
        )
    return StoreError(errno.EIO, f"cannot {what} {path}: {reason}")


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    code = getattr(error, "code", None)
    if not text.strip(" ,") or text.strip(" ,") == str(code):
        text = f"HTTP {code}" if code else type(error).__name__
    return text[:200]


def not_found(path: Any) -> FileNotFoundError:
    """The answer that nothing has the name."""
    return FileNotFoundError(errno.ENOENT, "no such object or folder in the store", str(path))
