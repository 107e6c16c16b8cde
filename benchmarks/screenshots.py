"""Screenshots of the page, for the docs: `python -m benchmarks.screenshots docs`.

The pictures come with scikit-image. Needs Chromium and playwright.
"""

import io
import sys
from pathlib import Path
from typing import Any

import tyro
from PIL import Image
from skimage import data

from benchmarks import chromium
from dvmsr_jax import files, web

SCREENS: dict[str, dict[str, Any]] = {
    "web": {"viewport": {"width": 1000, "height": 680}},
    "web-phone": {
        "viewport": {"width": 390, "height": 780},
        "color_scheme": "dark",
        "is_mobile": True,
        "has_touch": True,
    },
}


def main(folder: Path) -> None:
    """Writes NAME.png for each of SCREENS.

    Args:
        folder: the folder to write to.
    """
    if lack := chromium.missing():
        sys.exit(f"benchmarks.screenshots: {lack} is not installed")
    pictures = [
        {"name": f"{name}.png", "mimeType": "image/png", "buffer": contents}
        for name, contents in (
            ("astronaut", _png(data.astronaut()[:260, 80:400], (160, 130))),
            ("cat", _png(data.chelsea(), (150, 100))),
        )
    ]
    with chromium.served(web.site()) as address, chromium.launched() as browser:
        for name, options in SCREENS.items():
            page = browser.new_page(reduced_motion="reduce", **options)
            page.goto(address)
            page.set_input_files("#files", pictures)
            page.locator("[data-state=done]").nth(1).wait_for(timeout=120_000)
            shot = Image.open(io.BytesIO(page.screenshot(animations="disabled")))
            with files.replacing(folder / f"{name}.png") as path:
                shot.convert("RGB").quantize(256).save(path, "PNG", optimize=True)


def _png(pixels, size: tuple[int, int]) -> bytes:
    png = io.BytesIO()
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(png, "PNG")
    return png.getvalue()


if __name__ == "__main__":
    tyro.cli(tyro.conf.configure(tyro.conf.PositionalRequiredArgs)(main), description=__doc__)
