"Headless Chromium by its own protocol: enough to open pages, look into them and see what went wrong."
import base64
import contextlib
import itertools
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import websocket

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: install chromium or google-chrome to run this test")


class Browser:
    "One window. `errors` collects exceptions, console errors and failed requests; `requests` every address that was asked for."
    def __init__(self, socket: websocket.WebSocket):
        self.socket, self.numbers, self.session = socket, itertools.count(1), ""
        self.errors, self.requests, self.loaded = [], [], 0
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"): self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict:
        "One command and its answer; what happens meanwhile is written down."
        number = next(self.numbers)
        session = {"sessionId": self.session} if self.session else {}
        self.socket.send(json.dumps({"id": number, "method": method, "params": params, **session}))
        while True:
            message = json.loads(self.socket.recv())
            if message.get("id") != number: self.note(message)
            elif "error" in message: raise RuntimeError(f"{method}: {message['error']}")
            else: return message["result"]

    def note(self, message: dict) -> None:
        "An event."
        kind, what = message.get("method"), message.get("params", {})
        if kind == "Page.loadEventFired": self.loaded += 1
        elif kind == "Network.requestWillBeSent": self.requests.append(what["request"]["url"])
        elif kind == "Network.loadingFailed" and not what.get("canceled"): self.errors.append(what["errorText"])
        elif kind == "Runtime.exceptionThrown": self.errors.append(json.dumps(what["exceptionDetails"])[:500])
        elif kind == "Log.entryAdded" and what["entry"]["level"] == "error": self.errors.append(what["entry"]["text"])
        elif kind == "Runtime.consoleAPICalled" and what["type"] in ("error", "assert"): self.errors.append(json.dumps(what["args"])[:500])

    def open(self, address: str, seconds: float = 20) -> None:
        "Go to a page and wait until it is loaded."
        before, end = self.loaded, time.monotonic() + seconds
        answer = self.call("Page.navigate", url=address)
        assert "errorText" not in answer, f"{address}: {answer['errorText']}"
        while "loaderId" in answer and self.loaded == before: # without a loader it was a jump within the page
            assert time.monotonic() < end, f"{address} did not load within {seconds} s"
            self.note(json.loads(self.socket.recv()))

    def ask(self, script: str) -> Any:
        "The value of a JavaScript expression."
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def until(self, script: str, seconds: float = 20) -> Any:
        "Wait until an expression is true, and give its value."
        end = time.monotonic() + seconds
        while not (value := self.ask(script)):
            assert time.monotonic() < end, f"not within {seconds} s: {script}"
            time.sleep(0.05)
        return value

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))


@contextlib.contextmanager
def browser(width: int = 1200, height: int = 900) -> Iterator[Browser]:
    "A window that resolves no host name; it ends with the block."
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen([CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                                    "--no-first-run", "--remote-debugging-port=0", "--remote-allow-origins=*",
                                    "--host-resolver-rules=MAP * ~NOTFOUND",
                                    f"--user-data-dir={profile}", f"--window-size={width},{height}", "about:blank"],
                                   stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
                                   env={**os.environ, "TMPDIR": profile}) # what it leaves goes with the profile
        try:
            address = next(m[1] for line in process.stderr if (m := re.search(r"listening on (ws://\S+)", line)))
            socket = websocket.create_connection(address, timeout=30)
            yield Browser(socket)
            socket.close()
        finally:
            process.terminate()
            process.wait(20)
