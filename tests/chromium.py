"""Pages in a headless Chromium: what they request and report as errors, how they are laid out, and as PDF.

It is driven over two pipes (--remote-debugging-pipe), so that no package is needed. bimedix_jax itself never starts a
browser, and the tests are skipped where Chromium is not installed.
"""

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = """--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --disable-extensions
--disable-background-networking --disable-component-update --hide-scrollbars --remote-debugging-pipe""".split()
WITH_PIPES = """
import fcntl, os, sys
for pipe, place in [(fcntl.fcntl(int(pipe), fcntl.F_DUPFD, 10), place) for pipe, place in zip(sys.argv[1:3], (3, 4))]:
    os.dup2(pipe, place)
os.execv(sys.argv[3], sys.argv[3:])
"""
"""Starts the browser with the two pipes where it expects them."""
SECONDS = 300.0
"""After which an answer counts as missing."""
NARROW, WIDE = 360, 1280

OVERLAPS = """
(() => {
  const found = [];
  for (const picture of document.querySelectorAll('svg')) {
    const frame = picture.getBoundingClientRect(), scale = frame.width / picture.viewBox.baseVal.width;
    const texts = [...picture.querySelectorAll('text')].filter(text => text.textContent.trim());
    const boxes = texts.map(text => text.getBoundingClientRect());
    const outside = box => box.left < frame.left - 1 || box.right > frame.right + 1 || box.top < frame.top - 1
      || box.bottom > frame.bottom + 1;
    boxes.forEach((box, one) => {
      if (outside(box)) found.push('outside its figure: ' + texts[one].textContent);
      for (let two = one + 1; two < boxes.length; two++) {
        const other = boxes[two], wide = Math.min(box.right, other.right) - Math.max(box.left, other.left);
        const tall = Math.min(box.bottom, other.bottom) - Math.max(box.top, other.top);
        if (wide > scale && tall > 3 * scale)  // the boxes of lines are taller than their letters
          found.push('overlap: ' + texts[one].textContent + ' | ' + texts[two].textContent);
      }
    });
    if (texts.length && 11 * scale < 6) found.push('letters of ' + (11 * scale).toFixed(1) + ' pixels');
  }
  return found;
})()
"""
"""Texts of figures that are clipped, on top of each other, or too small to read."""
LEFT_TO_RIGHT = """
(() => {
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = [];
  while (walker.nextNode()) {
    const text = walker.currentNode.textContent, first = text.match(/\\p{L}/u);
    if (first && /[\\u0600-\\u06ff]/.test(first[0]) && getComputedStyle(walker.currentNode.parentElement).direction
        !== 'rtl') found.push(text);
  }
  return found;
})()
"""
"""Texts that begin in Arabic and are laid out from left to right."""


class Chromium:
    """A browser with one page."""

    def __init__(self, process: subprocess.Popen[bytes], to_browser: int, from_browser: int):
        self.process, self.to_browser, self.from_browser = process, to_browser, from_browser
        self.number, self.buffer, self.session = 0, b"", None
        self.events: list[dict[str, Any]] = []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of a command of the DevTools protocol."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.to_browser, json.dumps(message).encode() + b"\0")
        while (found := self._message()).get("id") != self.number:
            self.events.append(found)
        assert "error" not in found, (method, found)
        return found["result"]

    def _message(self) -> dict[str, Any]:
        until = time.monotonic() + SECONDS
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.from_browser], [], [], until - time.monotonic())
            assert ready, "Chromium does not answer"
            read = os.read(self.from_browser, 1 << 20)
            assert read, "Chromium has ended"
            self.buffer += read
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def show(self, page: Path, width: int = WIDE, media: str = "") -> None:
        """Loads a page; a narrow one as on a telephone."""
        self.events.clear()
        narrow = width < 600
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=narrow)
        self.ask("Emulation.setEmulatedMedia", media=media)
        self.ask("Page.navigate", url=page.resolve().as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self._message())

    def value(self, script: str) -> Any:
        """The value of an expression on the page."""
        found = self.ask("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    @property
    def requests(self) -> list[str]:
        """The addresses of everything that the page asked for, itself first; data within it do not count."""
        sent = [event["params"] for event in self.events if event["method"] == "Network.requestWillBeSent"]
        return [one["request"]["url"] for one in sent if not one["request"]["url"].startswith("data:")]

    @property
    def errors(self) -> list[Any]:
        """What the console shows."""
        names = ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled")
        return [event["params"] for event in self.events if event["method"] in names]

    def pdf(self) -> bytes:
        return base64.b64decode(self.ask("Page.printToPDF", printBackground=False)["data"])

    def picture(self) -> bytes:
        """The whole page as PNG, to look at."""
        height = self.value("document.documentElement.scrollHeight")
        width = self.value("document.documentElement.clientWidth")
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        return base64.b64decode(self.ask("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)["data"])


def installed() -> str | None:
    """The program, if there is one."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


@contextmanager
def opened(program: str, profile: Path) -> Iterator[Chromium]:
    """A browser that ends with the block."""
    commands, to_browser = os.pipe()
    from_browser, answers = os.pipe()
    words = [sys.executable, "-c", WITH_PIPES, str(commands), str(answers), program, *FLAGS]
    words.append(f"--user-data-dir={profile}")
    silent = subprocess.DEVNULL
    with subprocess.Popen(words, stdout=silent, stderr=silent, pass_fds=(commands, answers)) as process:
        os.close(commands)
        os.close(answers)
        try:
            yield Chromium(process, to_browser, from_browser)
        finally:
            os.close(to_browser)
            os.close(from_browser)
            process.kill()


def check(browser: Chromium, page: Path) -> None:
    """Asserts what every page of the project promises: on a telephone, on a screen and in print."""
    address = page.resolve().as_uri()
    for width, media in ((NARROW, ""), (WIDE, ""), (680, "print")):
        browser.show(page, width, media)
        where = f"{page.name}, {width} pixels wide, {media or 'screen'}"
        assert browser.requests == [address], where
        assert browser.errors == [], where
        assert browser.value("document.documentElement.scrollWidth") <= width, f"{where}: it is wider than the window"
        assert browser.value(LEFT_TO_RIGHT) == [], where
        assert browser.value(OVERLAPS) == [], where
    assert browser.pdf().startswith(b"%PDF")
