"""Headless Chromium, offline, for tests of the HTML report."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium: scripts/get-chromium")
SWITCHES = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
]


@contextmanager
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=SWITCHES)
        try:
            yield running
        finally:
            running.close()


@contextmanager
def page_of(browser: Any, path: Path, **options: Any) -> Iterator[Any]:
    """The file in a tab of its own; errors of scripts, messages of the console and requests to anything else fail."""
    url = path.as_uri()
    complaints: list[str] = []
    context = browser.new_context(**options)
    page = context.new_page()
    page.set_default_timeout(30_000)
    page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
    page.on("dialog", lambda dialog: (complaints.append(f"dialog: {dialog.message}"), dialog.dismiss()))

    def requested(request: Any) -> None:
        if request.url != url and not request.url.startswith("data:"):
            complaints.append(f"request: {request.url}")

    page.on("request", requested)
    try:
        page.goto(url)
        yield page
    finally:
        context.close()
    assert not complaints
