"""Time of the page in Chromium: `python -m benchmarks.web`.

It takes turns with its engine alone, in Chromium and in Node, and with JAX and the CPU kernels on
one thread. The page's time is from choosing a PNG to the finished result, with decoding and
encoding, on all cores. In Chromium, each turn opens a new page. `first` is the time of the first
picture, in which programs are translated, and `seconds` that of the second, both medians; `ratio`
is that to JAX. Needs Node, Chromium and playwright.
"""

import contextlib
import functools
import io
import shutil
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from PIL import Image

from benchmarks import chromium, machine, web_engine
from benchmarks.table import Measured, Report
from dvmsr_jax import web
from dvmsr_jax.registry import find

WEIGHTS = "x4"

ENGINE = f"""
async (size) => {{
  const {{ Engine, programFile }} = await import("./engine.js");
  const load = async (name) => (await fetch(name)).arrayBuffer();
  const weights = await load("weights/{WEIGHTS}.safetensors");
  const engine = await Engine.create(await load(programFile()), weights);
  const rows = Float32Array.from({{ length: size * size * 3 }}, Math.random);
  const times = [];
  while (times.length < 2) {{
    const start = performance.now();
    engine.start(size, size);
    engine.push(rows);
    times.push((performance.now() - start) / 1000);
  }}
  return times;
}}
"""
"""Seconds of two pictures."""

PAGE = """
async (png) => {
  const input = document.getElementById("files");
  const list = document.getElementById("list");
  const times = [];
  while (times.length < 2) {
    const start = performance.now();
    const done = new Promise((resolve) => {
      const observer = new MutationObserver(() => {
        if (list.querySelector("[data-state=done]")) resolve(observer.disconnect());
      });
      observer.observe(list, { subtree: true, attributes: true });
    });
    const files = new DataTransfer();
    files.items.add(new File([new Uint8Array(png)], "photo.png"));
    input.files = files.files;
    input.dispatchEvent(new Event("change"));
    await done;
    times.push((performance.now() - start) / 1000);
    list.querySelector(".remove").click();
  }
  return times;
}
"""
"""Seconds from choosing a picture to its result, twice."""

# The time of a phone's processor is not imitated: Chromium's CPU throttling leaves out workers.
PHONE = {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 3, "is_mobile": True}

Way = Callable[[], list[float]]
"""Seconds of the first and the second picture."""


def main(sizes: tuple[int, ...] = (64, 256), rounds: int = 5, json: Path | None = None) -> None:
    """Prints a Markdown table.

    Args:
        sizes: sides of the low-resolution pictures, which are squares.
        rounds: number of turns.
        json: also write the table to this file.
    """
    lack = "Node" if shutil.which("node") is None else chromium.missing()
    if lack:
        sys.exit(f"benchmarks.web: {lack} is not installed")
    report = Report(machine.describe(), json)
    report.table(("size", "", "first", "seconds", "ratio"), text=("",))
    with chromium.served(web.site()) as site, chromium.launched() as browser:
        for size in sizes:
            _measure(size, rounds, browser, site, report)


def _measure(size: int, rounds: int, browser: Any, site: str, report: Report) -> None:
    def in_page(program: str, argument: object, options: dict[str, Any]) -> list[float]:
        with contextlib.closing(browser.new_page(**options)) as page:
            page.goto(site)
            page.wait_for_load_state("networkidle")
            times: list[float] = page.evaluate(program, argument)
            return times

    def in_worker(worker: web_engine.Worker, first: float) -> list[float]:
        return [first, worker.upscale()[0]]

    png = _png(size)
    workers = web_engine.start_workers(str(find(WEIGHTS)), size)
    ways: dict[str, Way] = {
        f"{name}, one thread": functools.partial(in_worker, worker, worker.upscale()[0])
        for name, worker in workers.items()
    }
    ways |= {
        "engine, Chromium": functools.partial(in_page, ENGINE, size, {}),
        "page": functools.partial(in_page, PAGE, png, {}),
        "page, screen of a phone": functools.partial(in_page, PAGE, png, PHONE),
    }
    times: dict[str, list[list[float]]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            times[name].append(way())
    for worker in workers.values():
        worker.close()
    of_jax = statistics.median(second for _, second in times["JAX, one thread"])
    for name, pairs in times.items():
        first, second = (statistics.median(x) for x in zip(*pairs, strict=True))
        cells = Measured(first, "s"), Measured(second, "s"), Measured(second / of_jax, "x")
        report.row([f"{size} x {size}", name, *cells])


def _png(size: int) -> list[int]:
    pixels = np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8)
    png = io.BytesIO()
    Image.fromarray(pixels).save(png, "PNG")
    return list(png.getvalue())


if __name__ == "__main__":
    tyro.cli(main)
