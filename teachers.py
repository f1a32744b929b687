"""Frozen encoders: waveforms -> features at a steady rate, and one pooled embedding per clip.

    teacher = pretrained("openai/whisper-large-v3", "cuda")    # or HuBERT, ...; BEATs.load(PATH), VGGish(PATH)
    teacher.encode(wavs)                           # list of (N_i, D) float32, `rate` per second
    teacher.embed(wavs)                            # (B, D) float32, pooled over valid frames only
    teacher.transcribe(wavs)                       # Whisper only: list of str
    teacher.encode(wavs, codes=True)               # BEATs with a tokenizer's file only: list of (N_i,) integers

Waveforms are mono float32 arrays at the encoder's own `sample_rate`; the caller resamples. Padding reaches no feature:
a clip gives the same result alone and in any batch. The demo's own networks, and load_teacher, are in prepare/demo.py.
Letters: B clips, N features of a clip, D feature width, H heads, T spectrogram frames.
"""

import itertools
import math
import pickle
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.rnn import pad_sequence

from audio import torchaudio

VGGISH_WEIGHTS = "https://github.com/harritaylor/torchvggish/releases/download/v0.1/vggish-10086976.pth"
# what torch.load, and a reader of what it gives, raise for other files
UNREADABLE = (OSError, EOFError, RuntimeError, LookupError, TypeError, AttributeError, pickle.UnpicklingError)


class Teacher:
    """A frozen encoder: `name`, `sample_rate` in Hz, `dim` D of a feature, `rate` in features per second; `depth`
    layers to choose from, and `layer`, from 0, the one after which encode() takes its states, -1 for its output."""

    layer, depth = -1, 0

    def __init__(self, device: str | torch.device = "cpu"):
        self.device = torch.device(device)
        # frames per batch, padding included: a CPU gains nothing from more, a GPU has to be filled
        self.budget = 6000 if self.device.type == "cpu" else 60000

    def embed(self, wavs: list[np.ndarray]) -> np.ndarray:
        """One vector per clip, (B, D) float32: the mean of its features over valid frames."""
        return np.stack([f.mean(0) for f in self.encode(wavs)]) if wavs else np.zeros((0, self.dim), np.float32)


def style_vectors(features: np.ndarray, segments: int = 16) -> np.ndarray:
    """Means of a clip's features (N, D) over `segments` equal stretches of its time, (segments, D): s_i of eq. 17. A
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


def batches(lengths: list[int], budget: int) -> Iterator[list[int]]:
    """Clip indices by similar length, longest first, so that longest * count is within `budget` or it is one clip."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    while order:
        size = max(1, budget // lengths[order[-1]])
        yield order[-size:]
        del order[-size:]


def split_layer(source: str) -> tuple[str, int]:
    """NAME@LAYER as name and layer, counted from 1; 0 where none is named."""
    found = re.fullmatch(r"(.+)@([1-9]\d*)", source)
    return (found[1], int(found[2])) if found else (source, 0)


def mel_filters(n_fft: int, n_mels: int, fmin: float, fmax: float, sample_rate: int, kind: str) -> torch.Tensor:
    """Mel filterbank (n_fft / 2 + 1, n_mels). kind 'slaney': librosa's default, as Whisper; 'htk': triangles linear in
    Hz that each sum to one, as aisfx; 'tensorflow': HTK triangles linear in mel with unit peak, as YAMNet."""
    torchaudio()
    from transformers.audio_utils import mel_filter_bank

    scale, norm = ("slaney", "slaney") if kind == "slaney" else ("htk", None)
    bank = mel_filter_bank(n_fft // 2 + 1, n_mels, fmin, fmax, sample_rate, norm, scale, kind == "tensorflow")
    return torch.from_numpy(bank / bank.sum(0) if kind == "htk" else bank).float()


def whisper_mel(wavs: list[np.ndarray], samples: int, filters: torch.Tensor) -> torch.Tensor:
    """Whisper's input, of clips padded with silence to `samples`: (B, bins, samples // 160), log10 power
    floored at 8 below the clip's maximum, then (x + 4) / 4. At 480000 samples the same as WhisperFeatureExtractor's."""
    x = pad_sequence([torch.from_numpy(w) for w in wavs], batch_first=True).to(filters.device)
    x, hann = F.pad(x, (0, samples - x.shape[1])), torch.hann_window(400, device=filters.device)
    x = torch.stft(x, 400, 160, window=hann, return_complex=True)[..., :-1]  # (B, 201, T)
    x = (filters.T @ x.abs().square()).clamp(min=1e-10).log10()
    return (x.maximum(x.amax((1, 2), keepdim=True) - 8) + 4) / 4


class Whisper(Teacher):
    """OpenAI's Whisper (arXiv:2212.04356): speech teacher (its encoder's states) and recogniser. 16 kHz, 50 per second.
    `suppress` and `suppress_first` are ids of `tokenizer` that it never writes, and never writes first."""

    name, sample_rate, rate = "whisper", 16000, 50.0
    window = 480000  # samples in the 30 s that its positions cover

    def __init__(self, model, tokenizer, suppress: list[int], suppress_first: list[int], device="cpu"):
        super().__init__(device)
        self.model = model.float().eval().requires_grad_(False).to(self.device)
        self.tokenizer, self.suppress, self.suppress_first = tokenizer, suppress, suppress_first
        self.dim, self.depth = model.config.d_model, model.config.encoder_layers
        self.filters = mel_filters(400, model.config.num_mel_bins, 0.0, 8000.0, 16000, "slaney").to(self.device)

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
    def encode(self, wavs: list[np.ndarray], layer: int | None = None) -> list[np.ndarray]:
        """Encoder states of every clip at its own length, (N_i, D), 50 per second: those after `layer`, None for its
        own, -1 for the final, normalised ones. Raises ValueError for a clip over 30 s."""
        wavs, layer = checked(wavs, self.window), self.layer if layer is None else layer
        frames = [max(1, len(w) // 160) for w in wavs]  # two make a state
        out = [np.empty(0)] * len(wavs)
        for batch in batches(frames, self.budget):
            clips, counts = [wavs[i] for i in batch], [frames[i] for i in batch]
            # 400 samples of silence keep the STFT's mirrored end away from the clip, as in the 30 s window
            mel = whisper_mel(clips, min(max(map(len, clips)) + 400, self.window), self.filters)[..., : max(counts)]
            states = self._states(mel, torch.tensor(counts, device=self.device), layer).cpu().numpy()
            for i, x in zip(batch, states, strict=True):
                out[i] = x[: (frames[i] + 1) // 2].copy()
        return out

    @torch.inference_mode()
    def transcribe(self, wavs: list[np.ndarray], language: str = "en") -> list[str]:
        """Text of every clip in `language`: greedy decoding on the 30 s window, without timestamps. At most 16 tokens
        and 8 more per second, so babble ends. Raises ValueError for a clip over 30 s, or a language it lacks."""
        from transformers import GenerationMixin
        from transformers.modeling_outputs import BaseModelOutput

        wavs, end = checked(wavs, self.window), self.tokenizer.token_to_id("<|endoftext|>")
        how = {"do_sample": False, "num_beams": 1, "eos_token_id": end, "pad_token_id": end}
        how |= {"suppress_tokens": self.suppress, "begin_suppress_tokens": self.suppress_first}
        multilingual = self.model.config.vocab_size >= 51865  # the .en models have one token less and no language
        words = ["startoftranscript", *([language, "transcribe"] if multilingual else []), "notimestamps"]
        prompt = [self.tokenizer.token_to_id(f"<|{word}|>") for word in words]
        if None in prompt or (language != "en" and not multilingual):
            raise ValueError(f"this Whisper has no language '{language}': pass a multilingual one, and a code like es")
        texts = [""] * len(wavs)
        size = self.budget // 750  # 8 clips on a CPU, 80 on a GPU
        order = sorted(range(len(wavs)), key=lambda i: len(wavs[i]))  # similar lengths end after similar steps
        for batch in (order[i : i + size] for i in range(0, len(order), size)):
            mel = whisper_mel([wavs[i] for i in batch], self.window, self.filters)
            states = self._states(mel, torch.full((len(batch),), mel.shape[2], device=self.device))
            limits = [16 + 8 * len(wavs[i]) // self.sample_rate for i in batch]
            # not Whisper's own generate, which hears mels
            ids = GenerationMixin.generate(
                self.model, decoder_input_ids=torch.tensor([prompt] * len(batch), device=self.device),
                encoder_outputs=BaseModelOutput(states), max_new_tokens=max(limits), **how,
            )  # fmt: skip
            rows = [row[: len(prompt) + limit] for row, limit in zip(ids.tolist(), limits, strict=True)]
            for i, text in zip(batch, self.tokenizer.decode_batch(rows), strict=True):
                texts[i] = text.strip()
        return texts


class Encoder(Teacher):
    """An encoder of transformers' AutoModel, a clip at a time, as norms over time hear padding: HuBERT, WavLM, wav2vec
    2.0, MERT; AST and CLAP's audio tower, which hear `window` samples at a time, their bands of a moment averaged."""

    def __init__(self, extractor, model, device: str | torch.device = "cpu"):
        super().__init__(device)
        self.extractor, self.model = extractor, model.float().eval().requires_grad_(False).to(self.device)
        self.name, self.sample_rate = model.config.model_type, extractor.sampling_rate
        windows = {
            "audio-spectrogram-transformer": lambda: extractor.max_length * self.sample_rate // 100,  # it counts 10 ms
            "clap_audio_model": lambda: extractor.nb_max_samples,
        }
        self.window = windows.get(self.name, lambda: 0)()
        # CLAP's layers have each a width of their own: none but its output can be had
        self.dim, self.depth = model.config.hidden_size, 0 if "clap" in self.name else model.config.num_hidden_layers
        # features per second, of what they are for two lengths: edges count the same in both
        short, long = (s * (self.window or 2 * self.sample_rate) for s in (1, 2))
        fewer, more = (len(x) for x in self.encode([np.ones(n, np.float32) for n in (short, long)]))
        self.rate = (more - fewer) * self.sample_rate / (long - short)
        if self.rate <= 0:
            raise ValueError(f"a {self.name} gives {more} features whatever a clip's length")

    @torch.inference_mode()
    def states(self, wav: np.ndarray, layer: int) -> torch.Tensor:
        """States (N, D) of a clip that is no longer than the window, whose rest has none."""
        padded = np.pad(wav, (0, max(0, self.sample_rate // 20 - len(wav))))  # what convolutions need at least
        x = self.extractor(padded, sampling_rate=self.sample_rate, return_tensors="pt").to(self.device)
        x = self.model(**x, output_hidden_states=True)
        x = x.last_hidden_state if layer == -1 else x.hidden_states[layer + 1]  # the first is its input
        if x.dim() == 4:  # CLAP's (1, D, bands, N)
            x = x.mean(2).mT
        elif self.window:  # AST's (1, 2 + bands * N, D): the first two are of the whole
            c = self.model.config
            x = x[:, 2:].unflatten(1, ((c.num_mel_bins - c.patch_size) // c.frequency_stride + 1, -1)).mean(1)
        return x[0, : math.ceil(x.shape[1] * len(wav) / self.window) if self.window else None].cpu()

    def encode(self, wavs: list[np.ndarray], layer: int | None = None) -> list[np.ndarray]:
        """States of every clip, (N_i, D), after layer `layer`, by default its own; -1 is the output."""
        layer, out = self.layer if layer is None else layer, []
        for wav in map(torch.from_numpy, checked(wavs)):
            parts = wav.split(self.window or len(wav))
            out.append(torch.cat([self.states(part.numpy(), layer) for part in parts]).numpy())
        return out


def pretrained(source: str | Path, device: str | torch.device = "cpu", recognises: bool = False) -> Teacher:
    """A Whisper, or unless it `recognises` words another Encoder, from a transformers folder or hub name, looked up on
    disk first. Raises ValueError that says what is there, and what to pass."""
    torchaudio()
    import transformers as tf

    for local in (True, False):
        where = {"pretrained_model_name_or_path": str(source), "local_files_only": local, "trust_remote_code": False}
        try:
            settings, _ = tf.PretrainedConfig.get_config_dict(**where)
            if (kind := settings.get("model_type")) == "whisper":
                model = tf.WhisperForConditionalGeneration.from_pretrained(**where)
                tokenizer, rules = tf.AutoTokenizer.from_pretrained(**where).backend_tokenizer, model.generation_config
                return Whisper(model, tokenizer, rules.suppress_tokens or [], rules.begin_suppress_tokens or [], device)
            if recognises:
                raise ValueError(f"it is a {kind}")
            extractor = tf.AutoFeatureExtractor.from_pretrained(**where)
            if kind == "mert_model" and not (settings.get("feature_extractor_cqt") or settings.get("deepnorm")):
                model = tf.HubertModel.from_pretrained(**where, config=tf.HubertConfig(**settings))  # under its name
            else:
                model = tf.AutoModel.from_pretrained(**where)
            return Encoder(extractor, getattr(model, "audio_model", model), device)
        except (ValueError, *UNREADABLE) as error:
            reason = str(error).strip().split("\n")[0][:160]
    found = "neither on disk nor on a reachable hub"
    if Path(source).is_dir():
        found = f"a folder with {', '.join(sorted(f.name for f in Path(source).iterdir())[:5]) or 'nothing'} in it"
    wanted = "an openai/whisper-* model" if recognises else "a Whisper, HuBERT, WavLM, wav2vec 2.0, MERT, AST or CLAP"
    raise ValueError(f"'{source}' is {found} ({reason}): pass the folder or hub name of {wanted}, or demo")


class BEATsAttention(nn.Module):
    """Self-attention whose bias of relative position the query gates."""

    def __init__(self, cfg: dict):
        super().__init__()
        D, H = cfg["encoder_embed_dim"], cfg["encoder_attention_heads"]
        self.heads = H
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(D, D) for _ in range(4))
        self.relative_attention_bias = nn.Embedding(cfg["num_buckets"], H)
        self.grep_linear, self.grep_a = nn.Linear(D // H, 8), nn.Parameter(torch.ones(1, H, 1, 1))

    def forward(self, x: torch.Tensor, bias: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """(B, N, D) -> (B, N, D); bias (1, H, N, N), keys (B, 1, 1, N) bool."""
        B, N, D = x.shape
        q, k, v = (p(x).view(B, N, self.heads, -1).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        a, b = self.grep_linear(q).unflatten(-1, (2, 4)).sum(-1).sigmoid().chunk(2, dim=-1)  # (B, H, N, 1) each
        mask = ((a * (b * self.grep_a - 1) + 2) * bias).masked_fill(~keys, -torch.inf)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, H, N, D / H)
        return self.out_proj(y.transpose(1, 2).reshape(B, N, D))


class BEATsLayer(nn.Module):
    """A post-norm transformer layer, its residual scaled as in DeepNet."""

    def __init__(self, cfg: dict):
        super().__init__()
        D, hidden = cfg["encoder_embed_dim"], cfg["encoder_ffn_embed_dim"]
        self.alpha = (2 * cfg["encoder_layers"]) ** 0.25 if cfg.get("deep_norm") else 1.0
        self.self_attn, self.self_attn_layer_norm = BEATsAttention(cfg), nn.LayerNorm(D)
        self.fc1, self.fc2, self.final_layer_norm = nn.Linear(D, hidden), nn.Linear(hidden, D), nn.LayerNorm(D)

    def forward(self, x: torch.Tensor, bias: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        x = self.self_attn_layer_norm(self.alpha * x + self.self_attn(x, bias, keys))
        return self.final_layer_norm(self.alpha * x + self.fc2(F.gelu(self.fc1(x))))


class BEATsModel(nn.Module):
    """Patches of a spectrogram -> features, and codes where there is a `codebook`. Modules have the official names."""

    def __init__(self, cfg: dict, codebook: torch.Tensor | None):
        super().__init__()
        E, D, side, kernel = cfg["embed_dim"], cfg["encoder_embed_dim"], cfg["input_patch_size"], cfg["conv_pos"]
        self.cfg, self.has_codes = cfg, codebook is not None
        self.patch_embedding = nn.Conv2d(1, E, side, side, bias=cfg.get("conv_bias", False))
        self.layer_norm = nn.LayerNorm(E)
        self.post_extract_proj = nn.Identity() if E == D else nn.Linear(E, D)
        position = nn.Conv1d(D, D, kernel, padding=kernel // 2, groups=cfg["conv_pos_groups"])
        self.encoder = nn.ModuleDict({"pos_conv": nn.Sequential(weight_norm(position, dim=2))})
        self.encoder["layers"] = nn.ModuleList(BEATsLayer(cfg) for _ in range(cfg["encoder_layers"]))
        self.encoder["layer_norm"] = nn.LayerNorm(D)
        if self.has_codes:
            self.quantize_layer = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, codebook.shape[1]))
            self.quantize = nn.ModuleDict({"embedding": nn.Embedding(*codebook.shape)})

    def position_bias(self, N: int, device: torch.device) -> torch.Tensor:
        """T5's bucketed relative positions, (1, H, N, N). All layers hold the same table."""
        buckets, furthest = self.cfg["num_buckets"] // 2, self.cfg["max_distance"]
        at = torch.arange(N, device=device)
        offset = at - at[:, None]
        exact, size = buckets // 2, offset.abs()
        far = (size.clamp(min=1).float() / exact).log() / math.log(furthest / exact) * (buckets - exact)
        bucket = torch.where(size < exact, size, (exact + far.long()).clamp(max=buckets - 1)) + (offset > 0) * buckets
        return self.encoder["layers"][0].self_attn.relative_attention_bias(bucket).permute(2, 0, 1)[None]

    def forward(self, fbank: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """(B, N, D) of fbanks (B, T, 128), of which the first `counts` (B,) patches are valid; N = 8 (T // 16)."""
        x = self.patch_embedding(fbank[:, None]).flatten(2).transpose(1, 2)  # (B, 512, T / 16, 8) -> (B, N, 512)
        x = self.post_extract_proj(self.layer_norm(x))
        valid = torch.arange(x.shape[1], device=x.device) < counts[:, None]  # (B, N)
        x = x * valid[..., None]
        position = self.encoder["pos_conv"](x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)
        x = self.encoder["layer_norm"](x + F.gelu(position))
        bias, keys = self.position_bias(x.shape[1], x.device), valid[:, None, None]
        for layer in self.encoder["layers"]:
            x = layer(x, bias, keys)
        return x

    def codes(self, x: torch.Tensor) -> torch.Tensor:
        """The code (B, N) nearest to each feature (B, N, D) in direction."""
        z, book = F.normalize(self.quantize_layer(x), dim=-1), self.quantize["embedding"].weight
        return (book.square().sum(1) - 2 * z @ book.T).argmin(-1)


class BEATs(Teacher):
    """BEATs (Chen et al. 2023, arXiv:2212.09058): audio teacher, and with a tokenizer's checkpoint the second stream of
    config B. 16 kHz, 768-d, one feature per 160 ms and each of 8 frequency bands, time-major: 50 per second."""

    name, sample_rate, rate = "beats", 16000, 50.0

    def __init__(self, cfg: dict, weights: dict[str, torch.Tensor], device: str | torch.device = "cpu"):
        super().__init__(device)
        unused = re.compile(r"predictor|quantize\.(?!embedding\.weight)")  # a classifier, the codebook's running sums
        with torch.device("meta"):  # no random weights that the next line would replace
            model = BEATsModel(cfg, weights.get("quantize.embedding.weight"))
        model.load_state_dict({k: v.float() for k, v in weights.items() if not unused.match(k)}, assign=True)
        self.model, self.dim = model.eval().requires_grad_(False).to(self.device), cfg["encoder_embed_dim"]

    @classmethod
    def load(cls, source: str | Path, device: str | torch.device = "cpu") -> "BEATs":
        """From an official .pt file, of the encoder or of a tokenizer. Raises ValueError for another file, or none."""
        try:
            stored = torch.load(source, map_location="cpu", weights_only=True)
            cfg = dict(stored["cfg"])
            wanted = {"layer_norm_first": False, "activation_fn": "gelu", "input_patch_size": 16}
            if any(cfg.get(k, v) != v for k, v in wanted.items()):
                raise ValueError(f"{source}: only post-norm BEATs with gelu and 16 x 16 patches are read here")
            return cls(cfg, stored["model"], device)
        except UNREADABLE as error:
            fix = "pass the path of BEATs_iter3_plus_AS2M.pt, or for tokens of Tokenizer_iter3_plus_AS2M.pt, from"
            what = f"no BEATs checkpoint in {source} ({type(error).__name__})"
            raise ValueError(f"{what}: {fix} github.com/microsoft/unilm/tree/master/beats") from error

    def fbank(self, wav: np.ndarray) -> torch.Tensor:
        """Kaldi's log-mel of the clip scaled to 16 bits, normalised as in training: (frames, 128)."""
        torchaudio()
        from torchaudio.compliance import kaldi

        x = torch.from_numpy(wav).to(self.device)[None] * 2**15
        x = F.pad(x, (0, max(0, 400 + 15 * 160 - x.shape[1])))  # silence, up to the 16 frames of a patch
        x = kaldi.fbank(x, num_mel_bins=128, sample_frequency=16000, frame_length=25, frame_shift=10)
        return (x - 15.41663) / (2 * 6.55582)

    @torch.inference_mode()
    def encode(self, wavs: list[np.ndarray], codes: bool = False) -> list[np.ndarray]:
        """Features of every clip, (N_i, 768), N_i = 8 per whole 160 ms, at least 8; or its tokenizer's codes (N_i,)."""
        if codes and not self.model.has_codes:
            raise ValueError("this BEATs has no codebook: load Tokenizer_iter3_plus_AS2M.pt for tokens")
        fbanks = [self.fbank(w) for w in checked(wavs)]
        counts, out = [len(f) // 16 * 8 for f in fbanks], [np.empty(0)] * len(wavs)
        for batch in batches([len(f) for f in fbanks], self.budget):
            x = pad_sequence([fbanks[i] for i in batch], batch_first=True)
            x = self.model(x, torch.tensor([counts[i] for i in batch], device=self.device))
            x = self.model.codes(x) if codes else x
            for i, rows in zip(batch, x.cpu().numpy(), strict=True):
                out[i] = rows[: counts[i]].copy()
        return out


class PatchNetwork(Teacher):
    """A network over log(64 mel magnitudes + `offset`) of 25 ms windows every 10 ms at 16 kHz, in patches of 96 frames
    every `hop`. features() of a subclass has one feature (patches, D) for each of (patches, 1, 96, 64)."""

    sample_rate = 16000

    def __init__(self, device: str | torch.device = "cpu"):
        super().__init__(device)
        self.filters = mel_filters(512, 64, 125.0, 7500.0, self.sample_rate, "tensorflow").to(self.device)
        self.hann = torch.hann_window(400, device=self.device)

    def patches(self, wav: np.ndarray) -> torch.Tensor:
        """Patches (N, 96, 64) of a clip, at least one: a tail that fills none is dropped, a clip below one (0.975 s) is
        repeated to fill it, so that no silence it lacks is judged."""
        x = torch.from_numpy(np.resize(wav, max(len(wav), 400))).to(self.device)
        x = x.unfold(0, 400, 160) * self.hann  # (T, 400)
        x = (torch.fft.rfft(x, 512).abs() @ self.filters + self.offset).log()
        x = x[torch.arange(max(len(x), 96), device=x.device) % len(x)]
        return x.unfold(0, 96, self.hop).transpose(1, 2)

    @torch.inference_mode()
    def encode(self, wavs: list[np.ndarray]) -> list[np.ndarray]:
        """Features of every patch of every clip, (N_i, D), N_i at least 1."""
        patches = [self.patches(w) for w in checked(wavs)]
        out = torch.cat([self.features(x[:, None]).cpu() for x in torch.cat(patches).split(self.budget // 96)])
        return [x.numpy() for x in out.split([len(p) for p in patches])]


class VGGish(PatchNetwork):
    """VGGish (Hershey et al. 2017), the network of most published FADs: 128-d, one feature per 0.96 s, no overlap, no
    PCA and no last ReLU, as in the frechet-audio-distance package. Weights by torchvggish's names."""

    name, dim, rate, offset, hop = "vggish", 128, 1 / 0.96, 0.01, 96

    def __init__(self, source: str | Path = "", device: str | torch.device = "cpu"):
        """From a .pth file of torchvggish, or its published one when `source` is empty; ValueError if there is none."""
        super().__init__(device)
        convs, inputs = [], 1
        for width, last in ((64, True), (128, True), (256, False), (256, True), (512, False), (512, True)):
            convs += [nn.Conv2d(inputs, width, 3, padding=1, device="meta"), nn.ReLU(), *[nn.MaxPool2d(2)] * last]
            inputs = width
        sizes = (512 * 6 * 4, 4096, 4096, 128)
        linears = [l for size in itertools.pairwise(sizes) for l in (nn.Linear(*size, device="meta"), nn.ReLU())]
        self.model = nn.ModuleDict({"features": nn.Sequential(*convs), "embeddings": nn.Sequential(*linears[:-1])})
        where, read = (source, torch.load) if source else (VGGISH_WEIGHTS, torch.hub.load_state_dict_from_url)
        try:
            weights = read(where, map_location="cpu", weights_only=True)
            used = {k: v.float() for k, v in weights.items() if not k.startswith("pproc.")}  # its PCA is not used here
            self.model.load_state_dict(used, assign=True)
        except UNREADABLE as error:
            fix = "pass --fad_weights=PATH of torchvggish's vggish-10086976.pth"
            raise ValueError(f"no VGGish weights ({where}: {type(error).__name__}): {fix}") from error
        self.model.requires_grad_(False).to(self.device)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        x = self.model["features"](x).permute(0, 2, 3, 1)  # (patches, 6, 4, 512), channels last as in TensorFlow
        return self.model["embeddings"](x.flatten(1))
