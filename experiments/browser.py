"""A headless Chromium, told what to do over a pipe; nothing but the standard library.

For the test of the browser's page and for its picture in the documentation.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import http.server
import json
import os
import select
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome")
HUNG_SECONDS = 1800


def find_browser() -> str | None:
    """Path of a Chromium: ``AQDETR_CHROMIUM``, or one of the usual names."""
    given = os.environ.get("AQDETR_CHROMIUM")
    return given or next(filter(None, map(shutil.which, NAMES)), None)


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[str]:
    """Serves a folder as ``python -m http.server`` does; gives its address."""
    handler = functools.partial(_QuietHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


class _QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


class Page:
    """One tab of a browser of its own; a context that ends it.

    Args:
      browser: path of a Chromium.
      size: (width, height) of the window, pixels.
    """

    def __init__(self, browser: str, size: tuple[int, int] = (1000, 800)):
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        (theirs_in, ours_out), (ours_in, theirs_out) = os.pipe(), os.pipe()
        options = [
            *("--headless", "--remote-debugging-pipe", "--disable-gpu", "--no-first-run"),
            *(f"--user-data-dir={self._profile.name}", f"--window-size={size[0]},{size[1]}"),
            *(("--no-sandbox",) if os.geteuid() == 0 else ()),
        ]
        # Chromium reads commands from descriptor 3 and answers on 4.
        shell = f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}'
        self._process = subprocess.Popen(
            ["bash", "-c", shell, "browser", browser, *options],
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._out, self._in, self._buffer = ours_out, ours_in, b""
        self._count, self._tab = 0, None
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        attached = self.ask("Target.attachToTarget", targetId=target, flatten=True)
        self._tab = attached["sessionId"]
        self.ask("Page.enable")
        self.ask("DOM.enable")

    def __enter__(self) -> Page:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the browser, by itself if it can: its helpers still write into the profile."""
        self._tab = None
        with contextlib.suppress(RuntimeError, OSError, subprocess.TimeoutExpired):
            self.ask("Browser.close")
            self._process.wait(timeout=30)
        self._process.kill()
        self._process.wait()
        os.close(self._out)
        os.close(self._in)
        self._profile.cleanup()

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Result of a command of the DevTools protocol."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        if self._tab:
            message["sessionId"] = self._tab
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._count:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._in], [], [], HUNG_SECONDS)
            read = os.read(self._in, 1 << 20) if ready else b""
            if not read:
                raise RuntimeError(f"the browser is gone or hangs: status {self._process.poll()}")
            self._buffer += read
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def open(self, address: str) -> None:
        """Goes to an address."""
        self.ask("Page.navigate", url=address)

    def run(self, script: str) -> Any:
        """Value of an expression in the page; a promise is waited for."""
        found = self.ask(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        if "exceptionDetails" in found:
            raise RuntimeError(str(found["exceptionDetails"]))
        return found["result"].get("value")

    def wait(self, condition: str) -> None:
        """Until an expression in the page is true."""
        self.run(
            "new Promise(done => { const look = () => { try { if ("
            + condition
            + ") return done(); }"
            " catch {} setTimeout(look, 50); }; look(); })"
        )

    def choose_files(self, selector: str, *files: Path) -> None:
        """Gives files to an input element, as a visitor would."""
        root = self.ask("DOM.getDocument")["root"]["nodeId"]
        node = self.ask("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.ask("DOM.setFileInputFiles", nodeId=node, files=[str(f.resolve()) for f in files])

    def picture(self) -> bytes:
        """What is seen, PNG."""
        return base64.b64decode(self.ask("Page.captureScreenshot", format="png")["data"])
