"""A local file server with the failures of real servers."""

import contextlib
import os
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@contextlib.contextmanager
def serving(contents: dict[str, bytes]) -> Iterator["Server"]:
    """Runs a server of these files in a thread."""
    with Server(contents) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


class Server(ThreadingHTTPServer):
    """Serves files, with the quirks of real servers."""

    def __init__(self, contents):
        super().__init__(("127.0.0.1", 0), Handler)
        self.contents = dict(contents)
        self.ranges = True
        self.lengths = True
        """Whether responses have a Content-Length; otherwise they end with the connection."""
        self.cut_after = None
        """Bytes of a response after which the connection breaks."""
        self.status = None
        """Status of all responses, if set."""
        self.asked = []
        """(file name, first byte or None) of each request."""

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/copies"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self):
        server, name = self.server, os.path.basename(self.path)
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        server.asked.append((name, asked and int(asked[1])))
        status = server.status or (200 if self.path == f"/copies/{name}" else 404)
        if status != 200:
            return self.send_error(status)
        content = server.contents[name]
        start = int(asked[1]) if asked and server.ranges else 0
        if start >= len(content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        self.send_response(206 if asked and server.ranges else 200)
        if asked and server.ranges:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if server.lengths:
            self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            self.wfile.write(content[start:][: server.cut_after])

    def log_message(self, *args):
        pass
