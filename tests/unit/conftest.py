"""What unit tests share: pages as a headless Chromium makes them."""

import shutil
import subprocess

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
NEEDS_CHROMIUM = [
    pytest.mark.chromium,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH to open pages with"),
]


@pytest.fixture
def opened(tmp_path):
    """Open HTML in headless Chromium without a network and return the DOM that results."""

    def dom(html):
        path = tmp_path / "page.html"
        path.write_text(html, encoding="utf-8")
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--proxy-server=127.0.0.1:9"]
        done = subprocess.run(
            [CHROMIUM, *flags, f"--user-data-dir={tmp_path / 'profile'}",
             "--virtual-time-budget=3000", "--dump-dom", path.as_uri()],
            capture_output=True, timeout=120, check=True,
        )  # fmt: skip
        return done.stdout.decode("utf-8")

    return dom
