"""Opens pages in the Chromium of the machine; tests without it are skipped."""

import contextlib
import shutil
from collections.abc import Iterator
from typing import Any

import pytest


@contextlib.contextmanager
def chromium(*options: str) -> Iterator[Any]:
    """Yields a browser that is started with these options."""
    browsers = pytest.importorskip('playwright.sync_api', reason='playwright is not installed')
    program = shutil.which('chromium')
    if not program:
        pytest.skip('chromium is not installed')
    with browsers.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=['--no-sandbox', *options])
        yield browser
        browser.close()
