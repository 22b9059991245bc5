"""A headless Chromium, driven over pipes by its DevTools protocol: nothing but the browser is needed.

https://chromedevtools.github.io/devtools-protocol/; messages are JSON, each followed by a zero byte.
"""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path

PATH = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
KEYS = {
    "ArrowRight": 39,
    "ArrowLeft": 37,
    "ArrowDown": 40,
    "ArrowUp": 38,
    "Escape": 27,
    "Tab": 9,
    "Enter": 13,
}


class Browser:
    """One browser with one page, whose complaints are kept in `errors`."""

    def __init__(self, profile: Path):
        read_commands, self._write = os.pipe()
        self._read, write_answers = os.pipe()
        # Chromium expects these two at 3 and 4, where a shell puts them; first out of each other's way.
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 100) for fd in (read_commands, write_answers)]
        self._process = subprocess.Popen(
            [
                "bash",
                "-c",
                f'exec "$0" "$@" 3<&{high[0]} 4>&{high[1]}',
                PATH,
                "--headless=new",
                "--no-sandbox",  # tests may be root's, in a container
                "--disable-gpu",
                "--disable-dev-shm-usage",
                "--hide-scrollbars",
                "--remote-debugging-pipe",
                f"--user-data-dir={profile}",
                "about:blank",
            ],
            pass_fds=high,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for fd in (read_commands, write_answers, *high):
            os.close(fd)
        self._buffer, self._count, self._session, self.errors = b"", 0, None, []
        self.requests = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._read)
        os.close(self._write)

    def send(self, method, **params):
        """The result of one command."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._write, data) :]
        while True:
            answer = self._next()
            if answer.get("id") == self._count:
                assert "error" not in answer, answer
                return answer["result"]

    def _next(self, limit_s=60.0):
        deadline = time.monotonic() + limit_s
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], deadline - time.monotonic())
            assert ready, "the browser says nothing"
            part = os.read(self._read, 1 << 20)
            assert part, "the browser has ended"
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(line)
        self._hear(message.get("method"), message.get("params"))
        return message

    def _hear(self, method, params):
        if method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description", details["text"]))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.errors.append(str(params["args"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.errors.append(params["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])

    def open(self, path, width=1280, height=900, dark=False, limit_s=30.0):
        """Opens a file and waits until the page says that it is ready; returns the seconds that took."""
        self.resize(width, height, dark)
        start = time.monotonic()
        self.send("Page.navigate", url=Path(path).resolve().as_uri())
        while self.run("document.documentElement?.dataset.ready") != "true":
            assert time.monotonic() - start < limit_s, self.errors
            time.sleep(0.01)
        return time.monotonic() - start

    def resize(self, width, height=900, dark=False):
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 500,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])

    def run(self, script):
        """The value of an expression, awaited if it is a promise."""
        found = self.send("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def _place(self, selector):
        found = self.run(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)}); if (!e) return null;"
            "e.scrollIntoView({block: 'center'}); const r = e.getClientRects()[0];"
            "return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        assert found, f"{selector} is not there"
        return {"x": found[0], "y": found[1]}

    def hover(self, selector):
        self.send("Input.dispatchMouseEvent", type="mouseMoved", **self._place(selector))

    def click(self, selector):
        place = self._place(selector)
        self.send("Input.dispatchMouseEvent", type="mouseMoved", **place)
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **place)

    def key(self, name):
        for kind in ("rawKeyDown", "keyUp"):
            self.send(
                "Input.dispatchKeyEvent", type=kind, key=name, code=name, windowsVirtualKeyCode=KEYS[name]
            )

    def screenshot(self, path, full=False):
        found = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=full)
        Path(path).write_bytes(base64.b64decode(found["data"]))
