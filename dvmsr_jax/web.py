"""The page that upscales in the browser: serves it here, or writes it for a static host."""

import json
import os
import sys
import tempfile
import threading
import webbrowser
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from dvmsr_jax import registry
from dvmsr_jax.errors import UserError, printable

PAGE = Path(__file__).parent / "page"
"""The page's own files."""

LIST = "weights.json"
"""The page's list of the weights that it offers; the first are chosen at first."""

_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".svg": "image/svg+xml",
    ".wasm": "application/wasm",
}


def web(output: Path | None = None, port: int = 8765, browse: bool = True) -> None:
    """Serves the page that upscales pictures in the browser, on this computer only, until Ctrl-C.

    Args:
        output: write the page and its weights to this folder instead, to put on any static host.
        port: the port to serve it on.
        browse: open the page in the browser.
    """
    if output is not None:
        output = output.expanduser()
        write(site(), output)
        print(printable(f"{output}: put this folder on any host for static files, by https"))
        return
    with serve(site(), port) as server:
        address = f"http://127.0.0.1:{server.server_port}/"
        print(f"{address} (Ctrl-C ends it)", flush=True)
        if browse:  # in a thread, as a browser in the terminal keeps it busy
            threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
        server.serve_forever()


def site() -> dict[str, bytes]:
    """The contents of all files, by path relative to the page: its own, and the weights of LIST.

    Raises:
        RegistryError: weights are missing or damaged.
    """
    files = {path.name: path.read_bytes() for path in PAGE.glob("[!.]*") if path.is_file()}
    # In the repository, web/weights is a link to these.
    weights = {one["file"]: registry.find(one["name"]) for one in json.loads(files[LIST])}
    return files | {file: path.read_bytes() for file, path in weights.items()}


def write(files: Mapping[str, bytes], folder: Path) -> None:
    """Writes all files of `site` to a folder, or none.

    Raises UserError if the folder exists and is not empty.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder}: already exists; remove it, or choose another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".dvmsr-") as temporary:
        for name, contents in files.items():
            path = Path(temporary, "site", name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(contents)
        os.replace(Path(temporary, "site"), folder)


def serve(files: Mapping[str, bytes], port: int) -> ThreadingHTTPServer:
    """A server for the files of `site`, to be closed; 0 stands for any free port.

    Raises:
        UserError: the port cannot be used.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = unquote(urlsplit(self.path).path).removeprefix("/") or "index.html"
            if name not in files:
                self.send_error(404)
                return
            self.send_response(200)
            kind = _TYPES.get(PurePosixPath(name).suffix, "application/octet-stream")
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(files[name])))
            self.send_header("Cache-Control", "no-cache")
            self.end_headers()
            self.wfile.write(files[name])

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    try:
        return _Server(("127.0.0.1", port), Handler)
    except (OSError, OverflowError) as error:
        raise UserError(
            f"port {port} cannot be used ({error}); choose another with --port"
        ) from error


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # the browser has gone away
            super().handle_error(request, client_address)
