"""The part of the DevTools protocol of headless Chromium that check_viewer.py and check_chat_page.py need."""

import base64
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time

from websockets.sync.client import connect

# Timeout of a wait for the browser, in seconds.
TIMEOUT_S = 60


def find_chromium():
    """Returns the path of the browser, or ends the program if there is none."""
    names = [os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome"]
    path = next((path for name in names if name and (path := shutil.which(name))), None)
    return path or sys.exit("no Chromium on the path (Debian: apt-get install chromium) and none in $CHROMIUM")


class Browser:
    """A browser process with a temporary profile."""

    def __init__(self, program):
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        # The sandbox does not work for root, as in most containers.
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
        self.process = subprocess.Popen(
            [program, "--headless", *sandbox, "--disable-gpu", "--remote-debugging-port=0", "--no-first-run",
             f"--user-data-dir={self.profile.name}", "about:blank"], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
            text=True)
        for line in self.process.stderr:
            if match := re.search(r"DevTools listening on (ws://\S+)", line):
                break
        else:
            sys.exit(f"{program} ended before it opened its debugging port")
        self.socket = connect(match[1], max_size=None)
        self.sent, self.tabs = 0, {}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.send("Browser.close")
        self.process.wait(timeout=TIMEOUT_S)
        self.profile.cleanup()

    def send(self, method, session=None, **params):
        """Sends a command and waits for its answer. Events that arrive meanwhile are passed to their tabs."""
        self.sent += 1
        message = {"id": self.sent, "method": method, "params": params}
        self.socket.send(json.dumps(message | ({"sessionId": session} if session else {})))
        while True:
            answer = json.loads(self.socket.recv(timeout=TIMEOUT_S))
            if answer.get("id") == self.sent:
                if "error" in answer:
                    sys.exit(f"{method}: {answer['error']['message']}")
                return answer["result"]
            if answer.get("sessionId") in self.tabs:
                self.tabs[answer["sessionId"]].event(answer["method"], answer["params"])

    def open(self, path, ready="document.querySelector('.token.chosen')", width=1280, height=900, dark=False):
        """Opens a file or a URL in a tab and waits until the expression `ready` is true."""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.tabs[session] = tab = Tab(self, session)
        for domain in ["Page", "Runtime", "Network", "Log"]:
            tab.send(f"{domain}.enable")
        tab.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                 mobile=width < 500)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        tab.send("Emulation.setEmulatedMedia", features=[scheme])
        tab.send("Page.navigate", url=path if isinstance(path, str) else path.resolve().as_uri())
        tab.wait(ready)
        tab.settle()
        return tab


class Tab:
    """A page with the requests and errors that it has caused."""

    def __init__(self, browser, session):
        self.browser, self.session = browser, session
        self.requests, self.errors = [], []

    def event(self, method, params):
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description", details["text"]))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.errors.append(" ".join(str(arg.get("value", arg.get("description"))) for arg in params["args"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.errors.append(params["entry"]["text"])

    def send(self, method, **params):
        return self.browser.send(method, self.session, **params)

    def js(self, expression):
        """Evaluates an expression and awaits its value."""
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            sys.exit(f"{expression}: {answer['exceptionDetails'].get('exception', {}).get('description')}")
        return answer["result"].get("value")

    def wait(self, condition):
        end = time.monotonic() + TIMEOUT_S
        while not self.js(f"!!({condition})"):
            if time.monotonic() > end:
                sys.exit(f"not true after {TIMEOUT_S} s: {condition}; errors: {self.errors}")
            time.sleep(0.05)

    def settle(self):
        """Waits for two frames, after which requested changes are drawn."""
        self.js("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def press(self, key):
        text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
        for kind in ["keyDown", "keyUp"]:
            shown = {"text": text} if text and kind == "keyDown" else {}
            code = {"Enter": 13, "Escape": 27}.get(key, 0)
            self.send("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, **shown)

    def type(self, text):
        self.send("Input.insertText", text=text)

    def click(self, x, y):
        for kind in ["mousePressed", "mouseReleased"]:
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def shot(self, path):
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"]))
