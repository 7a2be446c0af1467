"""A real browser, where there is one, and a text that means harm to it."""

import shutil

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
HOSTILE = "</script><img src=x onerror='window.hit=1'><!-- & \u2028 {} <b>bold</b>"
FLAGS = (
    "no-sandbox disable-gpu disable-dev-shm-usage no-first-run disable-sync disable-quic "
    "disable-background-networking disable-component-update"
).split()


@pytest.fixture(scope="module")
def browser():
    """Playwright's, with the system's chromium. A test that asks for it is skipped without them."""
    api = pytest.importorskip("playwright.sync_api", reason="needs pip install playwright")
    if not CHROMIUM:
        pytest.skip("needs a chromium, such as Debian's package of that name")
    with api.sync_playwright() as playwright:
        try:
            arguments = [f"--{flag}" for flag in FLAGS]
            opened = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        except api.Error as error:
            pytest.skip(f"{CHROMIUM} does not start here: {error.message:.200}")
        yield opened
        opened.close()
