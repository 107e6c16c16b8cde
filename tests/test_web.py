"""The page that upscales in the browser, in a real one, and the command that serves it."""

import contextlib
import http.client
import io
import json
import mimetypes
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from flax import nnx
from PIL import ExifTags, Image, ImageChops, ImageCms

from benchmarks import chromium
from dvmsr_jax import registry, web
from dvmsr_jax.config import ModelConfig
from dvmsr_jax.errors import UserError
from dvmsr_jax.kernels.wasm.build import PROGRAMS
from dvmsr_jax.model import DVMSR
from dvmsr_jax.pictures.upscaler import Upscaler
from dvmsr_jax.pretrained import save_safetensors

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 60_000  # milliseconds


@pytest.fixture(scope="module")
def browser():
    if lack := chromium.missing():
        pytest.skip(f"needs {lack}")
    with chromium.launched() as browser:
        yield browser


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A file with weights of a tiny network."""
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    config = ModelConfig(channels=8, rssbs=1, vimms_per_rssb=1, states=4)
    save_safetensors(DVMSR(config, rngs=nnx.Rngs(0)), path)
    return path


@pytest.fixture(scope="module")
def tiny_site(tiny):
    """The page with the tiny network only."""
    listed = [{"name": "tiny", "scale": 4, "purpose": "tests", "file": "weights/tiny.safetensors"}]
    files = {
        "weights.json": json.dumps(listed).encode(),
        "weights/tiny.safetensors": tiny.read_bytes(),
    }
    return web.site() | files


@pytest.fixture(scope="module")
def upscale():
    """What upscale.py does by default."""
    return Upscaler()


@pytest.fixture
def open_page(browser):
    """Opens pages of servers, and checks that they report no error and ask nobody else."""
    contexts, errors, asked, servers = [], [], [], []

    def open_page(server, cores=2, **options):
        servers.append(server)
        context = browser.new_context(**options)
        context.set_default_timeout(TIMEOUT)
        contexts.append(context)
        context.on("request", lambda request: asked.append(request.url))
        page = context.new_page()
        page.on("pageerror", lambda error: errors.append(error))
        session = context.new_cdp_session(page)
        session.send("Emulation.setHardwareConcurrencyOverride", {"hardwareConcurrency": cores})
        page.goto(server)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not errors
    assert asked
    assert all(url.startswith((*servers, *(f"blob:{url}" for url in servers))) for url in asked)


@pytest.fixture(scope="module")
def server():
    with chromium.served(web.site()) as server:
        yield server


@pytest.fixture(scope="module")
def tiny_server(tiny_site):
    with chromium.served(tiny_site) as server:
        yield server


def expect(locator):
    from playwright.sync_api import expect

    expect.set_options(timeout=TIMEOUT)
    return expect(locator)


def encoded(picture, form="PNG", **options):
    if isinstance(picture, np.ndarray):
        picture = Image.fromarray(picture)
    file = io.BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()


def add(page, **files):
    """Chooses files, given by name, with __ for the dot."""
    named = {name.replace("__", "."): contents for name, contents in files.items()}
    page.set_input_files(
        "#files",
        [
            {"name": k, "mimeType": mimetypes.guess_type(k)[0] or "image/any", "buffer": v}
            for k, v in named.items()
        ],
    )


def wait_until(page, condition):
    deadline = time.monotonic() + TIMEOUT / 1000
    while not condition():
        assert time.monotonic() < deadline
        page.wait_for_timeout(50)


def select(page, name):
    page.locator("li", has_text=name).first.locator(".choose").click()


def downloaded(page):
    """The selected picture's result when it is finished: (file name, opened picture)."""
    expect(page.locator("#download")).to_be_visible()
    with page.expect_download() as download:
        page.click("#download")
    picture = Image.open(download.value.path())
    picture.load()
    return download.value.suggested_filename, picture


def assert_equal(picture, expected):
    """Pictures with the same kind of pixels, which differ only by float rounding."""
    assert picture.mode == expected.mode
    assert picture.size == expected.size
    difference = np.abs(np.asarray(picture, np.int16) - np.asarray(expected))
    assert (difference == 0).mean() >= 0.999
    assert difference.max() <= 1


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def waves(height, width):
    """A smooth RGB picture."""
    y, x = np.mgrid[:height, :width] / 7
    return np.uint8(
        np.stack([np.sin(x + y * c / 2) + np.cos(y - c) for c in range(3)], -1) * 60 + 127
    )


def test_equals_the_jax_model(open_page, server, upscale, subtests):
    pictures = {"square": waves(64, 64), "odd": waves(37, 53)}
    page = open_page(server)
    add(page, **{f"{name}__png": encoded(picture) for name, picture in pictures.items()})
    for name, picture in pictures.items():
        with subtests.test(name):
            select(page, name)
            result, large = downloaded(page)
            assert result == f"{name}_x4.png"
            assert_equal(large, upscale(Image.fromarray(picture)))


def test_other_weights(open_page, server):
    """The choice applies to the selected picture, and to those that come."""
    picture = waves(20, 30)
    page = open_page(server)
    add(page, photo__png=encoded(picture))
    downloaded(page)
    page.select_option("#weights", "x2")
    expect(page.locator("[data-state=done]")).to_have_count(2)
    name, large = downloaded(page)
    assert name == "photo_x2.png"
    assert_equal(large, Upscaler("x2")(Image.fromarray(picture)))
    page.locator(".choose").first.click()
    expect(page.locator("#weights")).to_have_value("x4")
    expect(page.locator("#download")).to_have_text("Download photo_x4.png")


def kinds_of_pictures():
    """Contents of files."""
    alpha = np.uint8(np.linspace(0, 255, 600)).reshape(30, 20)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return {
        "transparent": encoded(np.dstack([waves(30, 20), alpha])),
        "transparent noise": encoded(noise(12, 16, 4)),
        "grey": encoded(waves(20, 30)[:, :, 0]),
        "grey and transparent": encoded(
            Image.fromarray(np.dstack([waves(30, 20)[:, :, 0], alpha]))
        ),
        "turned": encoded(waves(20, 30), "JPEG", exif=exif, subsampling=0),
        "with a profile": encoded(waves(20, 30), "JPEG", icc_profile=profile),
        "PNG with a profile": encoded(waves(20, 30), icc_profile=profile),
        "WebP with a profile": encoded(waves(9, 7), "WEBP", lossless=True, icc_profile=profile),
        "one pixel": encoded(noise(1, 1, 3)),
    }


def test_equals_upscale_py(open_page, server, upscale, subtests):
    kinds = kinds_of_pictures()
    page = open_page(server)
    add(page, **kinds)
    for kind, contents in kinds.items():
        with subtests.test(kind):
            select(page, kind)
            _, large = downloaded(page)
            expected = upscale(Image.open(io.BytesIO(contents)))
            assert large.mode == expected.mode
            if "transparent" in kind:  # dividing by a small alpha magnifies float rounding
                assert_equal(large.getchannel("A"), expected.getchannel("A"))
                large, expected = blended(large, expected), blended(expected, expected)
            assert_equal(large, expected)
            assert large.info.get("icc_profile") == expected.info.get("icc_profile")
            assert ("icc_profile" in large.info) == ("profile" in kind)


def blended(picture, opacity):
    """Colours multiplied by the alpha of `opacity`."""
    alpha = opacity.getchannel("A")
    return Image.merge(
        "RGB", [ImageChops.multiply(c, alpha) for c in picture.convert("RGB").split()]
    )


def test_large_pictures(open_page, tiny_server, tiny):
    """They need little memory, and are shown in full size where somebody looks."""
    picture = noise(1000, 1000, 3)
    page = open_page(tiny_server, reduced_motion="reduce")
    add(page, first__png=encoded(noise(8, 1000, 3)))
    downloaded(page)
    before = peak_memory(page)
    add(page, photo__png=encoded(picture))
    expect(page.locator("[data-state=done]")).to_have_count(2)
    needed = peak_memory(page) - before
    _, large = downloaded(page)
    assert_equal(large, Upscaler(tiny)(Image.fromarray(picture)))
    assert needed < 256 * 2**20  # with all bands held: 192 MB more
    page.click("#full")
    page.get_by_role("slider").press("Home")
    # Its tiles are JPEGs, which keep brightness well, and the overview has half its resolution.
    middle = large.crop((1850, 1850, 2150, 2150)).convert("L")
    wait_until(
        page, lambda: mean_difference(shown_result(page, middle.size).convert("L"), middle) < 8
    )


def mean_difference(a, b):
    return np.abs(np.asarray(a, np.int16) - np.asarray(b)).mean()


def shown_result(page, size):
    """A screenshot of so many pixels in the middle of the stage, without the divider."""
    box = page.locator("#stage").bounding_box()
    page.evaluate("document.getElementById('divider').style.visibility = 'hidden'")
    x, y = (
        round(box[start] + (box[side] - n) / 2)
        for start, side, n in zip("xy", ("width", "height"), size, strict=True)
    )
    clip = {"x": x, "y": y, "width": size[0], "height": size[1]}
    return Image.open(io.BytesIO(page.screenshot(clip=clip))).convert("RGB")


def peak_memory(page):
    """Of the page's processes, in bytes."""
    session = page.context.browser.new_browser_cdp_session()
    processes = session.send("SystemInfo.getProcessInfo")["processInfo"]
    total = 0
    for process in processes:
        if process["type"] == "renderer":
            status = Path(f"/proc/{process['id']}/status").read_text()
            total += int(re.search(r"VmHWM:\s+(\d+)", status)[1]) * 1024
    return total


WRONG = {
    "notes.txt": (b"These are notes.", "not a picture"),
    "photo.heic": (b"\0\0\0\x18ftypheic", "cannot read HEIC"),
    "empty.png": (b"", "not a picture"),
    "drawing.svg": (b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', "an SVG"),
    "wide.png": (encoded(np.zeros((1, 20_000), np.uint8)), "too large: 20000 \u00d7 1 pixels"),
    "large.png": (
        encoded(np.zeros((8_000, 8_000), np.uint8)),
        "too large: 8000 \u00d7 8000 pixels",
    ),
}


def test_files_that_are_no_pictures(open_page, tiny_server):
    page = open_page(tiny_server)
    add(page, **{name.replace(".", "__"): contents for name, (contents, _) in WRONG.items()})
    lines = page.get_by_role("alert").locator("p")
    expect(lines).to_have_text(
        [re.compile(f"{name}: .*{message}") for name, (_, message) in WRONG.items()]
    )
    expect(page.locator("#drop")).to_be_visible()
    add(page, good__png=encoded(noise(4, 4, 3)))
    downloaded(page)
    expect(lines).to_have_count(0)


def test_all_controls_fit_a_phone(open_page, tiny_server):
    phone = {"width": 390, "height": 780}
    page = open_page(tiny_server, viewport=phone, is_mobile=True, has_touch=True)
    for step in ("empty", "finished"):
        if step == "finished":
            add(page, photo__png=encoded(noise(30, 40, 3)))
            downloaded(page)
        controls = page.locator("button:visible, select:visible, a:visible, #drop:visible")
        boxes = [control.bounding_box() for control in controls.all()]
        assert len(boxes) >= (2 if step == "empty" else 8)
        for box in boxes:
            assert min(box["x"], box["y"]) >= 0
            assert box["x"] + box["width"] <= phone["width"]
            assert box["y"] + box["height"] <= phone["height"]


def test_damaged_pictures(open_page, tiny_server):
    whole = {form: encoded(noise(40, 40, 3), form) for form in ("PNG", "JPEG", "WEBP")}
    page = open_page(tiny_server)
    add(page, **{form: contents[: len(contents) // 2] for form, contents in whole.items()})
    add(page, good=whole["PNG"])
    expect(page.locator("[data-state=failed]")).to_have_count(3)
    for form in whole:
        select(page, form)
        expect(page.locator("#facts")).to_have_text("The picture is damaged or incomplete.")
        expect(page.locator("#download")).to_be_hidden()
    select(page, "good")
    downloaded(page)


def test_cancel(open_page, server):
    page = open_page(server, cores=2)
    add(page, large__png=encoded(waves(600, 600)), small__png=encoded(waves(8, 8)))
    item = page.locator("li", has_text="large.png")
    expect(item.locator(".state")).to_have_text(re.compile(r"[1-9]\d? %"))
    workers = page.workers
    assert len(workers) == 3  # two of them have a part of the network each
    page.get_by_label("Cancel large.png").click()
    expect(item).to_have_count(0)
    wait_until(page, lambda: not {*workers} & {*page.workers})
    name, large = downloaded(page)  # the next one has begun, and is shown
    assert (name, large.size) == ("small_x4.png", (32, 32))
    page.get_by_label("Remove small.png").click()
    expect(page.locator("#drop")).to_be_visible()
    expect(page.locator("#files")).to_be_focused()


def test_two_at_once(open_page, tiny_server, tiny):
    pictures = {"a__png": waves(300, 310), "b__png": waves(310, 300), "c__png": waves(9, 9)}
    page = open_page(tiny_server, cores=3)
    add(page, **{name: encoded(picture) for name, picture in pictures.items()})
    working = page.locator("[data-state=working]")
    # One for each picture, and one for its network.
    wait_until(page, lambda: len(page.workers) == 4 and working.count() == 2)
    expect(page.locator("[data-state=done]")).to_have_count(3)
    upscale = Upscaler(tiny)
    for i, picture in enumerate(pictures.values()):
        page.locator(".choose").nth(i).click()
        assert_equal(downloaded(page)[1], upscale(Image.fromarray(picture)))


PIPELINE = """
async ([cores, width, height]) => {
  const { programFile } = await import("./engine.js");
  const { Pipeline } = await import("./pipeline.js");
  const load = async (name) => (await fetch(name)).arrayBuffer();
  const module = await WebAssembly.compile(await load(programFile()));
  const pipeline = new Pipeline(module, await load("weights/x4.safetensors"), cores, width, height);
  const pushed = [];
  for (let first = 0; first < height; first += 2) {
    const rows = new Float32Array(width * 3 * Math.min(2, height - first));
    pushed.push(pipeline.push(rows.map((_, i) => ((first + 1) * i * 7 % 11) / 11)));
  }
  const all = await Promise.allSettled(pushed);
  return [
    pipeline.stages,
    all.map(({ reason }) => reason?.message ?? ""),
    all.flatMap(({ value }) => [...value ?? []]),
  ];
}
"""


@pytest.mark.parametrize(("width", "height"), [(1, 9), (37, 12)])
def test_pipelines_give_the_same_bits(open_page, server, width, height):
    page = open_page(server)
    results = [page.evaluate(PIPELINE, [cores, width, height]) for cores in (1, 2, 3, 8)]
    assert [stages for stages, _, _ in results] == [1, 2, 3, 4]
    first = results[0][2]
    assert len(first) == width * height * 16 * 3
    for _, failures, rows in results:
        assert not any(failures)
        assert rows == first


def test_a_stage_that_fails(open_page, server):
    """All bands under way fail, as when memory runs out."""
    stages, failures, rows = open_page(server).evaluate(PIPELINE, [2, 2**23, 3])
    assert stages == 2
    assert failures == ["there is not enough memory for this picture"] * 2
    assert not rows


def test_names(open_page, tiny_server):
    """As upscale.py names results: pictures with the same stem get longer names."""
    contents = encoded(noise(4, 4, 3))
    page = open_page(tiny_server)
    add(page, photo__jpg=contents, Photo__png=contents, a__b__png=contents)
    for i, expected in enumerate(["photo_jpg_x4.png", "Photo_png_x4.png", "a.b_x4.png"]):
        page.locator(".choose").nth(i).click()
        assert downloaded(page)[0] == expected


def test_works_offline(open_page, tiny_site):
    with chromium.served(tiny_site) as server:
        page = open_page(server)
        page.evaluate("async () => { await navigator.serviceWorker.ready }")
    with pytest.raises(ConnectionRefusedError), contextlib.closing(connection(server)) as gone:
        gone.request("GET", "/")
    page.reload()
    add(page, photo__png=encoded(noise(4, 4, 3)))
    assert downloaded(page)[1].size == (16, 16)


def test_the_service_worker_keeps_all_files():
    listed = re.search(r"FILES = \[(.*?)\]", (web.PAGE / "sw.js").read_text(), re.DOTALL)[1]
    kept = set(re.findall(r'"(.*?)"', listed))
    files = {path.name for path in web.PAGE.iterdir() if path.is_file()}
    assert kept == files - {"sw.js", "index.html"} | {"./"}


def test_reaches_no_other_server(open_page, tiny_server, tiny_site):
    page = open_page(tiny_server)
    with chromium.served(tiny_site) as other:
        fetch = """url => fetch(url, { mode: "no-cors" }).then(() => "reached", () => "refused")"""
        assert page.evaluate(fetch, other) == "refused"
        assert page.evaluate(fetch, tiny_server) == "reached"


def test_a_browser_without_simd(open_page, tiny_site):
    """Its WebAssembly.validate says no to the network, as here to damaged bytes."""
    with chromium.served(tiny_site | dict.fromkeys(PROGRAMS, b"no program")) as server:
        page = open_page(server)
        expect(page.locator("#messages")).to_contain_text("lacks WebAssembly SIMD")


def test_weights_that_cannot_be_loaded(open_page, tiny_site):
    missing = {name: x for name, x in tiny_site.items() if name != "weights/tiny.safetensors"}
    with chromium.served(missing) as server:
        page = open_page(server)
        add(page, photo__png=encoded(noise(4, 4, 3)))
        expect(page.locator("#facts")).to_contain_text("weights/tiny.safetensors cannot be loaded")


def test_keyboard(open_page, tiny_server):
    page = open_page(tiny_server, reduced_motion="reduce")
    page.locator("#files").focus()
    add(page, photo__png=encoded(waves(30, 40)))
    expect(page.locator(".choose")).to_be_focused()
    downloaded(page)
    divider, zoomed = page.get_by_role("slider"), page.locator("#zoomed")
    expect(divider).to_have_attribute("aria-valuenow", "50")
    divider.focus()
    page.keyboard.press("ArrowRight")
    expect(divider).to_have_attribute("aria-valuetext", "52 % before, 48 % after")
    page.keyboard.press("Home")
    expect(divider).to_have_attribute("aria-valuenow", "0")
    page.locator("#stage").focus()
    page.keyboard.press("1")
    expect(zoomed).to_have_text("100 %")
    page.keyboard.press("+")
    expect(zoomed).to_have_text("125 %")
    page.keyboard.press("0")
    expect(zoomed).to_have_text("200 %")  # small pictures are fitted no larger
    expect(page.get_by_role("status")).to_have_text("photo.png is finished.")  # is spoken


def test_pointers(open_page, tiny_server):
    page = open_page(tiny_server, reduced_motion="reduce", has_touch=True)
    add(page, photo__png=encoded(waves(30, 40)))
    downloaded(page)
    divider, zoomed = page.get_by_role("slider"), page.locator("#zoomed")
    expect(zoomed).to_have_text("200 %")
    box = page.locator("#stage").bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 32, y)  # a tenth of the picture's width
    page.mouse.up()
    expect(divider).to_have_attribute("aria-valuenow", "60")
    page.mouse.move(x - 100, y)
    page.mouse.wheel(0, 500)
    expect(zoomed).to_have_text("95 %")
    page.mouse.dblclick(x - 100, y + 20)
    expect(zoomed).to_have_text("200 %")
    session = page.context.new_cdp_session(page)
    for kind, distance in (("touchStart", 50), ("touchMove", 75), ("touchMove", 100)):
        points = [{"x": x - 60, "y": y + side * distance, "id": side + 1} for side in (-1, 1)]
        session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
    session.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    expect(zoomed).to_have_text("400 %")


def test_before_and_after(open_page, server, upscale):
    """The divider separates the picture before from the result, pixel by pixel."""
    picture = waves(40, 60)
    page = open_page(server, reduced_motion="reduce", viewport={"width": 1000, "height": 800})
    add(page, photo__png=encoded(picture))
    downloaded(page)
    page.click("#full")
    large = upscale(Image.fromarray(picture))
    shown = shown_result(page, large.size)
    after = (large.width // 2 + 2, 0, *large.size)
    before = (0, 0, large.width // 2 - 2, large.height)
    assert_equal(shown.crop(after), large.crop(after))
    assert (np.asarray(shown.crop(before)) == np.asarray(large.crop(before))).mean() < 0.9


def test_asks_before_unfinished_work_is_lost(open_page, server):
    page = open_page(server)
    add(page, photo__png=encoded(waves(400, 400)))
    expect(page.locator("[data-state=working]")).to_be_visible()
    page.click("#stage")  # browsers ask only if somebody has used the page
    with page.expect_event("dialog") as dialog:
        page.close(run_before_unload=True)
    assert dialog.value.type == "beforeunload"
    dialog.value.accept()


# The command


def connection(address):
    return http.client.HTTPConnection(urlsplit(address).netloc, timeout=10)


@pytest.mark.parametrize(
    ("path", "status", "kind"),
    [
        ("/", 200, "text/html; charset=utf-8"),
        ("/index.html?a=b", 200, "text/html; charset=utf-8"),
        ("/dvmsr.wasm", 200, "application/wasm"),
        ("/weights/tiny.safetensors", 200, "application/octet-stream"),
        ("/../README.md", 404, None),
        ("/%2e%2e/README.md", 404, None),
    ],
)
def test_serves_the_site_only(path, status, kind, tiny_server):
    with contextlib.closing(connection(tiny_server)) as client:
        client.request("GET", path)
        response = client.getresponse()
        response.read()
    assert response.status == status
    assert kind in (None, response.getheader("Content-Type"))


def test_lists_the_projects_weights():
    files = web.site()
    listed = json.loads(files["weights.json"])
    assert [one["name"] for one in listed] == ["x4", "x4-real", "x2", "x3"]
    for one in listed:
        named = registry.NAMED[one["name"]]
        assert one["scale"] == named.scale
        assert named.purpose.startswith(one["purpose"])
        assert files[one["file"]] == registry.find(one["name"]).read_bytes()


def test_the_folder_is_a_site():
    """web/ can be put on a host as it is, for hosts and programs that follow links."""
    for name, contents in web.site().items():
        assert (ROOT / "web" / name).read_bytes() == contents


def run(*arguments, **options):
    command = [sys.executable, "-m", "dvmsr_jax", "web", *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
    )


def test_command_serves_until_ctrl_c():
    with run("--port", "0", "--no-browse") as process:
        line = process.stdout.readline()
        (address,) = re.fullmatch(r"(http://127.0.0.1:\d+/) \(Ctrl-C ends it\)\n", line).groups()
        with contextlib.closing(connection(address)) as client:
            client.request("GET", "/weights.json")
            assert client.getresponse().status == 200
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=10) == ("", "stopped\n")


def test_command_names_a_port_that_is_taken(tiny_server):
    port = urlsplit(tiny_server).port
    with run("--port", str(port), "--no-browse") as process:
        output, error = process.communicate(timeout=60)
    assert (output, process.returncode) == ("", 1)
    assert re.fullmatch(rf"error: port {port} cannot be used \(.*\); choose .* --port\n", error)


def test_writes_the_site(tmp_path, capsys):
    web.web(output=tmp_path / "new" / "site")
    written = {
        path.relative_to(tmp_path / "new/site").as_posix(): path.read_bytes()
        for path in (tmp_path / "new/site").rglob("*")
        if path.is_file()
    }
    assert written == web.site()
    assert "put this folder on any host" in capsys.readouterr().out


def test_writes_over_nothing(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for there in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(UserError, match="already exists; remove it, or choose another"):
            web.web(output=there)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_needs_no_jax():
    program = "import sys, dvmsr_jax.web; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
