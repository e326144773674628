"""Takes docs/images/report.png: the top of a run's report, in Chromium.

    make quickstart
    .venv/bin/python docs/images/make_report.py runs/quickstart

Needs Chromium and the extra `test` (Playwright).
"""

import io
import pathlib
import shutil
import sys

from PIL import Image
from playwright.sync_api import sync_playwright

WIDTH, HEIGHT = 1200, 750  # pixels
OUT = pathlib.Path(__file__).with_name('report.png')


def main(workdir: str) -> None:
    page = pathlib.Path(workdir, 'report.html').resolve()
    with sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=shutil.which('chromium'), args=['--no-sandbox', '--disable-gpu']
        )
        view = browser.new_page(viewport={'width': WIDTH, 'height': HEIGHT})
        view.goto(page.as_uri(), timeout=120_000)
        view.wait_for_selector('body[data-drawn]', timeout=120_000)
        picture = view.screenshot()
        browser.close()
    # 128 colors are enough for text and curves.
    Image.open(io.BytesIO(picture)).convert('RGB').quantize(128).save(OUT, optimize=True)


if __name__ == '__main__':
    main(sys.argv[1])
