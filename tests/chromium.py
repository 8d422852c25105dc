"A headless browser that a test can drive: a page, its mouse and keys, what it complained of and what it asked for."
import base64
import json
import shutil
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path

import pytest

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--remote-debugging-port=0", "--hide-scrollbars")
KEYS = {"ArrowRight": 39, "ArrowDown": 40, "ArrowLeft": 37, "ArrowUp": 38, "Tab": 9, "Enter": 13, "+": 187, "0": 48}
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome here to look at the pages with")


class Chromium:
    "One page in one browser, spoken to over its debugging port."
    def __init__(self, width=1280, height=900):
        websocket = pytest.importorskip("websocket")
        self.home, self.count, self.complaints, self.asked = Path(tempfile.mkdtemp()), 0, [], []
        self.process = subprocess.Popen([BROWSER, *FLAGS, f"--user-data-dir={self.home}", "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            port = self.wait(lambda: (self.home / "DevToolsActivePort").read_text(encoding="utf-8").split()[0])
            pages = self.wait(lambda: [p for p in json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/json", timeout=10)) if p["type"] == "page"])
            self.socket = websocket.create_connection(pages[0]["webSocketDebuggerUrl"], suppress_origin=True, timeout=60)
        except BaseException:
            self.__exit__()
            raise
        for domain in ("Page", "Runtime", "Network", "Log"): self.call(f"{domain}.enable")
        self.size(width, height)

    def __enter__(self): return self

    def __exit__(self, *error):
        self.process.terminate()
        try: self.process.wait(20)
        except subprocess.TimeoutExpired: self.process.kill()
        shutil.rmtree(self.home, ignore_errors=True)

    @staticmethod
    def wait(found, seconds=60):
        "What `found` answers once it answers something."
        end = time.monotonic() + seconds
        while True:
            try: answer = found()
            except OSError: answer = None
            if answer: return answer
            if time.monotonic() > end: raise TimeoutError(f"nothing after {seconds} s")
            time.sleep(0.05)

    def call(self, method, **parameters):
        "One command; what happened before its answer is noted."
        self.count += 1
        self.socket.send(json.dumps({"id": self.count, "method": method, "params": parameters}))
        while True:
            said = json.loads(self.socket.recv())
            if said.get("id") == self.count:
                if "error" in said: raise RuntimeError(f"{method}: {said['error']}")
                return said["result"]
            self.note(said.get("method"), said.get("params", {}))

    def note(self, method, about):
        if method == "Runtime.exceptionThrown": self.complaints.append(str(about["exceptionDetails"].get("exception", about["exceptionDetails"])))
        if method == "Runtime.consoleAPICalled" and about["type"] in ("error", "warning", "assert"): self.complaints.append(str(about["args"]))
        if method == "Log.entryAdded" and about["entry"]["level"] in ("error", "warning"): self.complaints.append(about["entry"]["text"])
        if method == "Network.requestWillBeSent": self.asked.append(about["request"]["url"])

    def foreign(self):
        "What was asked of anything but this disk and the page itself."
        return [url for url in self.asked if not url.startswith(("file:", "data:", "blob:", "about:"))]

    def size(self, width, height=900):
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def open(self, path):
        self.call("Page.navigate", url=str(path) if str(path).startswith("file:") else Path(path).as_uri())
        self.wait(lambda: self("document.readyState") == "complete")

    def __call__(self, script):
        "The value of an expression on the page; a promise is waited for."
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer: raise RuntimeError(f"{script}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def mouse(self, x, y, kind="mouseMoved", **more): self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **more)

    def click(self, x, y):
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"): self.mouse(x, y, kind, **({} if kind == "mouseMoved" else dict(button="left", clickCount=1)))

    def key(self, key):
        text = {"text": key} if len(key) == 1 else {}
        for kind in ("keyDown", "keyUp"): self.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=KEYS[key], **(text if kind == "keyDown" else {}))

    def picture(self, path, whole=True):
        "A screenshot."
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        Path(path).write_bytes(base64.b64decode(data))
