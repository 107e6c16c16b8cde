"""Folders for compiled programs: other users cannot write there, and libraries can be loaded."""

import ctypes
import shutil
import subprocess
import tempfile

import pytest

from dvmsr_jax.kernels import native_library, user_cache
from dvmsr_jax.kernels.selective_scan import native


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "dvmsr_jax"


@pytest.fixture
def noexec_cache(monkeypatch, tmp_path):
    """A real file system mounted noexec, and a temporary directory beside it that is not."""
    home = tmp_path / "home"
    home.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "noexec", "tmpfs", home]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    yield home / "dvmsr_jax"
    subprocess.run(["umount", "--lazy", home], check=True)


def test_the_folder_is_private(cache):
    assert user_cache.folder() == user_cache.binaries_folder() == cache
    assert cache.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("mode", [0o720, 0o770, 0o775, 0o702, 0o707, 0o777])
def test_a_folder_that_others_can_write_to_is_refused(cache, mode):
    user_cache.folder().chmod(mode)
    for find in (user_cache.folder, user_cache.binaries_folder):
        with pytest.raises(PermissionError, match="can be written by others"):
            find()


def test_a_folder_that_others_can_read_is_fine(cache):
    user_cache.folder().chmod(0o755)
    assert user_cache.folder() == cache


def test_a_folder_of_another_user_is_refused(cache, monkeypatch):
    user = user_cache.folder().stat().st_uid
    monkeypatch.setattr("os.geteuid", lambda: user + 1)
    with pytest.raises(PermissionError, match="another user"):
        user_cache.folder()


def test_no_home(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "~nobody-of-that-name")
    with pytest.raises(OSError, match="no cache folder"):
        user_cache.folder()


@pytest.mark.skipif(native.missing() is not None, reason="needs a C++ compiler")
def test_on_a_noexec_home_the_scan_is_compiled_once(noexec_cache, monkeypatch):
    compiled = []
    compile_ = native_library._compile

    def counted(*arguments):
        compiled.append(compile_(*arguments))
        return compiled[-1]

    monkeypatch.setattr(native_library, "_compile", counted)
    names = {native.LIBRARY.load()[0] for _ in range(2)}
    (library,) = compiled
    assert names == {library.stem}
    assert noexec_cache not in library.parents
    with pytest.raises(OSError, match="failed to map"):  # as in the home directory
        ctypes.CDLL(shutil.copy(library, noexec_cache))


def test_the_folder_elsewhere_is_private_too(noexec_cache):
    elsewhere = user_cache.binaries_folder()
    assert user_cache.folder() == noexec_cache != elsewhere
    assert elsewhere.stat().st_mode & 0o777 == 0o700
    elsewhere.chmod(0o770)
    with pytest.raises(PermissionError, match="can be written by others"):
        user_cache.binaries_folder()
    elsewhere.rmdir()
    elsewhere.symlink_to("/etc")
    with pytest.raises(PermissionError, match="symbolic link"):
        user_cache.binaries_folder()
