"""The page in headless Chromium."""

import contextlib
import shutil
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from dvmsr_jax import web


def missing() -> str | None:
    """What is not installed; None if `launched` works."""
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError:
        return "the package playwright"
    return None if _path() else "Chromium"


def _path() -> str | None:
    return shutil.which("chromium") or shutil.which("chromium-browser")


@contextlib.contextmanager
def launched() -> Iterator[Any]:
    """A playwright.sync_api.Browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Chromium's sandbox does not start for root, as whom programs run in containers.
        browser = playwright.chromium.launch(executable_path=_path(), args=["--no-sandbox"])
        with contextlib.closing(browser):
            yield browser


@contextlib.contextmanager
def served(files: Mapping[str, bytes]) -> Iterator[str]:
    """Serves the files of `web.site` in a thread, at this address."""
    with web.serve(files, 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()
