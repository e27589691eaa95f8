# SPDX-License-Identifier: Apache-2.0
"""The cache folder: nothing of another user's is taken from it, and no half of a file."""

import os
import stat
from pathlib import Path

import platformdirs
import pytest
from platformdirs.macos import MacOS

from flax_lstm.machine.cache import cache_folder, intact, keep, private_cache_folder

NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "flax_lstm"


def test_the_folder_is_open_to_its_user_alone(cache):
    cache.mkdir(mode=0o777)
    cache.chmod(0o777)
    assert private_cache_folder() == cache and stat.S_IMODE(cache.stat().st_mode) == 0o700


@as_root
def test_the_folder_of_another_user_is_not_taken(cache):
    cache.mkdir()
    os.chown(cache, NOBODY, NOBODY)
    with pytest.raises(PermissionError, match="another user"):
        private_cache_folder()


def test_a_link_is_not_taken(cache, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    cache.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PermissionError, match="another user"):
        private_cache_folder()


def test_what_killed_processes_left_is_removed_after_an_hour(cache):
    (cache / "tmpold").mkdir(parents=True)
    (cache / "tmpold" / "half.so").write_bytes(b"half")
    drafts = [cache / ".123.part", cache / ".key.456.part"]
    for path in drafts:
        path.write_bytes(b"half")
    for path in (cache / "tmpold", *drafts):
        os.utime(path, (0, 0))
    (cache / "tmpnew").mkdir()
    (cache / "key.npz").write_bytes(b"whole")
    os.utime(cache / "key.npz", (0, 0))
    private_cache_folder()
    assert {path.name for path in cache.iterdir()} == {"tmpnew", "key.npz"}


def test_only_a_file_as_it_was_kept_is_intact(cache):
    library = private_cache_folder() / "kernel.so"
    library.write_bytes(b"\x7fELF and more")
    assert not intact(library)  # nobody kept it
    keep(library)
    assert intact(library)
    library.chmod(0o722)
    assert not intact(library)
    library.chmod(0o700)
    assert intact(library)
    library.write_bytes(b"\x7fELF")
    assert not intact(library)


def test_two_processes_may_keep_the_same_at_once(cache, monkeypatch):
    library = private_cache_folder() / "kernel.so"
    library.write_bytes(b"\x7fELF and more")
    fsync = os.fsync

    def other_process(descriptor):
        fsync(descriptor)
        monkeypatch.setattr(os, "fsync", fsync)
        keep(library)

    monkeypatch.setattr(os, "fsync", other_process)
    keep(library)
    assert intact(library) and len(list(cache.iterdir())) == 2


@as_root
def test_a_planted_file_is_not_intact(cache):
    library = private_cache_folder() / "kernel.so"
    library.write_bytes(b"planted")
    keep(library)
    os.chown(library, NOBODY, NOBODY)
    assert not intact(library)


def test_it_is_where_the_platform_keeps_caches(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "flax_lstm"  # XDG_CACHE_HOME
    for named in ("", "relative"):  # which the standard of these variables says to pass over
        monkeypatch.setenv("XDG_CACHE_HOME", named)
        assert cache_folder() == tmp_path / "home/.cache/flax_lstm"
    monkeypatch.setattr(platformdirs, "PlatformDirs", MacOS)
    assert cache_folder() == tmp_path / "home/Library/Caches/flax_lstm"


@pytest.mark.parametrize("version", ["raises", "returns"])
def test_without_a_home_there_is_a_folder_of_the_users_own(monkeypatch, version):
    """A container's user without HOME and without an entry among the users. platformdirs raises
    today and gave a path below `~` before."""
    for name in ("XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: (_ for _ in ()).throw(KeyError(uid)))
    if version == "returns":
        monkeypatch.setattr("platformdirs.user_cache_path", lambda *_, **__: Path("~/.cache/x"))
    assert cache_folder().name == f"flax_lstm-{os.geteuid()}"
