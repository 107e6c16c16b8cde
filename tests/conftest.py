"""Settings for all tests, and shared fixtures."""

import errno
import functools
import http.server
import os
import shutil
import tempfile
import threading
from pathlib import Path

# Before JAX starts a backend.
if list(Path("/dev").glob("nvidia*")):
    # Tests run side by side, and some in processes of their own.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    # Without it, sums in another order may round differently each time.
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = flags + " --xla_gpu_deterministic_ops=true"
else:
    # On CPUs, tests spend most of their time compiling programs that run once.
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = flags + " --xla_backend_optimization_level=0"

import jax
import numpy as np
import pytest

from dvmsr_jax import files, images

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Published weights, reference activations and benchmark images."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the reference files in {SHARED}")
    return SHARED


@pytest.fixture(scope="session", autouse=True)
def _compile_each_program_once():
    """Several tests train, and compile the same programs."""
    folder = tempfile.mkdtemp(prefix="dvmsr-jax-test-")
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    yield
    shutil.rmtree(folder)


@pytest.fixture
def optax_promotes_dtypes():
    """Optax mixes types of numbers, which is an error in all other tests."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Three smooth pictures."""
    folder = tmp_path_factory.mktemp("photos")
    y, x = np.mgrid[:72, :80] / 10
    for i in range(3):
        waves = [np.sin(x * (i + 1) / 2 + c) + np.cos(y + c + i) for c in range(3)]
        images.write_png(folder / f"{i}.png", np.uint8(np.stack(waves, -1) * 63 + 127))
    return folder


@pytest.fixture
def doubling():
    """A stand-in for a model: doubles each side, a few rows at a time."""

    def upscale(image):
        for first in range(0, len(image), 4):
            yield image[first : first + 4].repeat(2, 0).repeat(2, 1)

    return upscale


@pytest.fixture
def web():
    """The URL of a server of the current folder, which lists folders too. Files in signed/ need a
    signature, which is for GET only."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def send_head(self):
            path, _, query = self.path.partition("?")
            signed = self.command == "GET" and query == "a=1/2&b=c*.png"
            if path.startswith("/signed/") and not signed:
                self.send_error(403)
                return None
            return super().send_head()

        def log_message(self, *_):
            pass

    handler = functools.partial(Handler, directory=os.getcwd())
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def no_locks(monkeypatch):
    """Replaces flock; some NFS, Lustre and FUSE file systems have no locks."""

    def flock(*arguments):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", flock)
    monkeypatch.setattr(files, "_POLL", 0.01)


@pytest.fixture(params=["locks", "no locks"])
def locks(request):
    """A file system with and without locks."""
    if request.param == "no locks":
        request.getfixturevalue("no_locks")


def pytest_collection_modifyitems(items):
    if jax.default_backend() == "gpu":
        return
    for item in items:
        if item.get_closest_marker("gpu"):  # keywords also hold the names of folders
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
