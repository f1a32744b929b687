"""Stage 1: a causal LM that writes acoustic tokens from text, in the style of a reference clip (appendix A.3).

    python lm.py config/lm_demo.py                       # a small one, from scratch, on the demo's prepared tokens
    torchrun --nproc_per_node=8 lm.py config/lm_unified.py --data_dir=data/unified_a
    python sample.py --lm out/lm_demo/ckpt.pt --ckpt out/demo/ckpt.pt --text "please enter your password"

One model, two prompts (eq. 16):
    text to speech      text [AUDIO_0] ... [AUDIO_15] [AT] codes [END]
    text to audio       [TAG] event [DES] description [AUDIO_0] ... [AUDIO_15] [AT] codes [END]
The placeholders' embeddings become (1 - a) e + a W s_i, s_i the mean of the audio encoder's features in the i-th of 16
equal time segments of a reference clip (eq. 17-18); in training that is the clip itself, dropped with style_drop.
L = CE on codes and [END] + coarse_weight * CE on the codes' clusters (eq. 19-20); prompt and padding never count.
A stopped run continues when the same command is given again. out_dir holds ckpt.pt, config.json and log.csv.

B clips, S sequence positions, D LM width, E width of the audio encoder's features, V vocabulary.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from configurator import configure, show


@dataclass
class LMConfig:
    """Settings of stage 1; a config file lists only what differs."""

    # run
    out_dir: str = "out/lm_unified"  # run directory; an unfinished run found there is continued
    data_dir: str = "data/unified_a"  # folder prepared by data.py
    seed: int = 0  # seeds weights, data order and style dropout
    device: str = "auto"  # auto | cpu | cuda | mps
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # autocast; auto takes bfloat16 where the machine has it
    # model
    lm: str = "Qwen/Qwen3-0.6B-Base"  # any causal LM of transformers by name or folder; "small": a Qwen3 from scratch
    text: str = ""  # text tokenizer by name or folder; empty: the LM's own; "bytes": one token a byte
    n_layer: int = 6  # of the small LM
    n_head: int = 4  # of the small LM
    n_embd: int = 256  # of the small LM
    dropout: float = 0.0  # of the embedded sequence
    # style
    style_alpha: float = 0.5  # a of eq. 18
    style_drop: float = 0.1  # probability that a clip's style is dropped, for guidance and for use without a reference
    # loss
    coarse_weight: float = 0.5  # of the clusters' cross-entropy
    coarse_clusters: int = 128  # clusters per codebook
    coarse: Literal["kmeans", "uniform"] = "kmeans"  # clusters of the codebook's vectors, or equal runs of ids
    code_noise: float = 0.0  # share of the codes it reads that are replaced by random ones, against exposure bias
    # optimisation
    max_steps: int = 100_000  # optimizer steps
    batch_tokens: int = 16_384  # sequence positions per step and rank, padding included
    batch_size: int = 64  # most clips per step and rank
    learning_rate: float = 1e-4  # peak of the one-cycle schedule
    lr_warmup: float = 0.05  # share of max_steps on the way up
    weight_decay: float = 0.01  # on matrices
    beta2: float = 0.95  # AdamW; beta1 is 0.9
    grad_clip: float = 1.0  # largest gradient norm
    # reporting
    log_every: int = 10  # steps between rows of log.csv
    eval_every: int = 1000  # steps between held-out losses
    eval_clips: int = 64  # held-out clips per domain
    save_every: int = 1000  # steps between checkpoints

    ranges: ClassVar[dict] = {
        **dict.fromkeys("style_alpha style_drop code_noise lr_warmup beta2 dropout".split(), (0, 1)),
        **dict.fromkeys(
            "n_layer n_head n_embd coarse_clusters max_steps batch_tokens batch_size log_every eval_every eval_clips "
            "save_every".split(),
            (1, None),
        ),
    }


if __name__ == "__main__":
    ARGS = configure(LMConfig, __doc__)  # a typo is answered before torch is imported

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import scipy.cluster.vq
import tiktoken
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import audio
import common
import data
from common import (
    DOMAINS,
    SPEECH,
    Finite,
    Log,
    Machine,
    clip_and_step,
    command,
    count_parameters,
    join_group,
    leave_group,
    make_optimizer,
    step_seed,
    time_left,
)

STYLES = 16  # style placeholders, and time segments of the reference
MAY_DIFFER = "out_dir data_dir device dtype log_every eval_every eval_clips save_every".split()
COLUMNS = ("step", "loss", "ce", "coarse", "grad_norm", "lr", "tokens_per_s", "seconds")
COLUMNS += tuple(f"held_out_{name}" for name in DOMAINS)


# ---- sequences


@dataclass(frozen=True)
class Vocabulary:
    """Token ids: the text's first, then [TAG] [DES] [AT] [END], the style placeholders, and each domain's codes."""

    text: int  # size of the text vocabulary
    codes: tuple[int, ...]  # codebook sizes

    @property
    def specials(self) -> range:
        """[TAG] [DES] [AT] [END]"""
        return range(self.text, self.text + 4)

    @property
    def end(self) -> int:
        return self.specials[3]

    @property
    def styles(self) -> range:
        return range(self.text + 4, self.text + 4 + STYLES)

    def codes_of(self, domain: int) -> range:
        """The ids of a domain's codes."""
        first = self.styles.stop + sum(self.codes[:domain])
        return range(first, first + self.codes[domain])

    def __len__(self) -> int:
        return self.styles.stop + sum(self.codes)

    def prompt(self, encode: Callable[[str], list[int]], domain: int, text: str) -> list[int]:
        """The ids before the codes (eq. 16). The text of a sound is its event, or "event: description"."""
        tag, des, at, _ = self.specials
        if domain == SPEECH:
            return [*encode(text), *self.styles, at]
        event, _, description = text.partition(": ")
        return [tag, *encode(event), des, *encode(description), *self.styles, at]


@dataclass
class Sequences:
    """B prompts with their codes, padded at the end; tensors on one device."""

    ids: torch.Tensor  # (B, S)
    target: torch.Tensor  # (B, S) bool, True on codes and [END]
    style: torch.Tensor  # (B, 16, E)
    domain: torch.Tensor  # (B,)

    def to(self, device: str) -> "Sequences":
        return Sequences(*(x.to(device) for x in (self.ids, self.target, self.style, self.domain)))


def sequences(
    vocabulary: Vocabulary,
    prompts: Sequence[list[int]],
    codes: Sequence[np.ndarray],
    domains: Sequence[int],
    styles: np.ndarray,
) -> Sequences:
    """Prompts and codes (N,) of each clip's domain, followed by [END], as one batch; `styles` (B, 16, E)."""
    rows = [
        [*p, *(c + vocabulary.codes_of(d).start).tolist(), vocabulary.end]
        for p, c, d in zip(prompts, codes, domains, strict=True)
    ]
    ids = torch.full((len(rows), max(map(len, rows))), vocabulary.end)
    target = torch.zeros(ids.shape, dtype=torch.bool)
    for b, (row, p) in enumerate(zip(rows, prompts, strict=True)):
        ids[b, : len(row)] = torch.tensor(row)
        target[b, len(p) : len(row)] = True
    return Sequences(ids, target, torch.from_numpy(np.asarray(styles, np.float32)), torch.tensor(list(domains)))


class Corpus:
    """One split of a prepared folder as sequences; prompts are encoded once."""

    def __init__(self, dataset: data.Dataset, vocabulary: Vocabulary, encode: Callable[[str], list[int]]):
        self.dataset, self.vocabulary, self.domains = dataset, vocabulary, dataset.index["domain"].tolist()
        texts = (dataset.name_and_text(i)[1] for i in range(len(dataset)))
        self.prompts = [vocabulary.prompt(encode, d, t) for d, t in zip(self.domains, texts, strict=True)]
        self.lengths = np.array([len(p) for p in self.prompts]) + dataset.index["tokens"] + 1

    def batch(self, ids: np.ndarray) -> Sequences:
        """Clips `ids`, each with its own style; of two token streams the LM writes the primary one."""
        ids = ids.tolist()
        codes = [self.dataset.tokens(i)[:, 0] for i in ids]
        styles = np.stack([self.dataset.style(i) for i in ids])
        return sequences(self.vocabulary, [self.prompts[i] for i in ids], codes, [self.domains[i] for i in ids], styles)


def cluster_codes(book: np.ndarray | None, codes: int, clusters: int, seed: int = 0) -> torch.Tensor:
    """Cluster of each code: k-means of the codebook's vectors (codes, W), or equal runs of ids without one."""
    clusters = min(clusters, codes)
    if book is None:
        return torch.arange(codes) * clusters // codes
    _, labels = scipy.cluster.vq.kmeans2(book.astype(np.float64), clusters, iter=30, minit="++", seed=seed)
    return torch.from_numpy(labels).long()


def all_clusters(config: LMConfig, codes: Sequence[int]) -> torch.Tensor:
    """The cluster of every code of both domains, no cluster shared between them: (sum of codes,)."""
    parts = []
    for d, name in enumerate(DOMAINS):
        path = Path(config.data_dir) / f"{name}_codebook.npy"
        book = np.load(path) if config.coarse == "kmeans" and path.exists() else None
        if config.coarse == "kmeans" and book is None:
            print(f"{name}: no codebook at {path}, so its clusters are equal runs of ids")
        own = cluster_codes(book, codes[d], config.coarse_clusters, config.seed)
        parts.append(own + (int(parts[-1].max()) + 1 if parts else 0))
    return torch.cat(parts)


# ---- the model


def load_text_tokenizer(source: str = "bytes"):
    """What turns text into ids, with encode(text) and decode(ids). "bytes" is one token a byte and needs no download;
    else a tokenizer of transformers by name or folder, such as Qwen/Qwen3-0.6B-Base. Raises ValueError for none."""
    if source == "bytes":
        ranks = {bytes([i]): i for i in range(256)}
        return tiktoken.Encoding("bytes", pat_str=r"(?s:.)", mergeable_ranks=ranks, special_tokens={})
    audio.torchaudio()
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(f"no text tokenizer {source!r} ({type(error).__name__}): pass a folder, or bytes") from error


def build_net(config: LMConfig, size: Callable[[int], int]) -> tuple[nn.Module, int]:
    """The causal LM with room for its text vocabulary and ours, and the size of the former; `size` of the one is the
    other. New rows of its tables start at the mean of the old ones."""
    audio.torchaudio()
    from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

    if config.lm == "small":
        text, D = load_text_tokenizer(config.text or "bytes"), config.n_embd
        old = text.n_vocab if hasattr(text, "n_vocab") else len(text)
        shape = Qwen3Config(
            vocab_size=size(old), hidden_size=D, intermediate_size=3 * D, num_hidden_layers=config.n_layer,
            num_attention_heads=config.n_head, num_key_value_heads=config.n_head, head_dim=D // config.n_head,
            tie_word_embeddings=True,
        )  # fmt: skip
        return Qwen3ForCausalLM(shape), old
    try:
        net = AutoModelForCausalLM.from_pretrained(config.lm, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"lm={config.lm!r}: neither a folder of a causal LM nor a reachable hub name ({type(error).__name__}); "
            f"--lm=small needs no weights"
        ) from error
    old = net.get_input_embeddings().num_embeddings
    net.resize_token_embeddings(size(old), mean_resizing=False)
    with torch.no_grad():
        for table in {net.get_input_embeddings().weight, net.get_output_embeddings().weight}:  # one, where tied
            table[old:] = table[:old].mean(0)
    return net, old


class LM(nn.Module):
    """A causal LM of transformers whose vocabulary is extended by specials, placeholders and codes."""

    def __init__(self, net: nn.Module, vocabulary: Vocabulary, style_width: int, clusters: torch.Tensor, alpha: float):
        super().__init__()
        self.net, self.vocabulary, self.alpha = net, vocabulary, alpha
        self.dropout = self.code_noise = 0.0  # in training
        D = net.get_input_embeddings().embedding_dim
        self.style = nn.Linear(style_width, D, bias=False)  # W of eq. 18
        self.coarse = nn.Linear(D, int(clusters.max()) + 1)  # eq. 20
        self.register_buffer("clusters", clusters)  # (sum of codes,)
        self.register_buffer("style_scale", torch.ones(style_width))  # one over the features' deviation

    def embed(self, ids: torch.Tensor, style: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        """(B, S) -> (B, S, D); placeholders of clips with `keep` (B,) take on style (B, 16, E) by eq. 18."""
        e = self.net.get_input_embeddings()(ids)
        place = ids - self.vocabulary.styles.start  # which placeholder
        projected = self.style(style * self.style_scale)  # (B, 16, D)
        rows = torch.arange(len(ids), device=ids.device)[:, None]
        mixed = (1 - self.alpha) * e + self.alpha * projected[rows, place.clamp(0, STYLES - 1)].to(e.dtype)
        styled = (place >= 0) & (place < STYLES) & keep[:, None]
        return torch.where(styled[..., None], mixed, e)

    def noisy(self, batch: Sequences) -> torch.Tensor:
        """The ids (B, S) with a share of the codes replaced by random codes of the same domain."""
        size = torch.tensor(self.vocabulary.codes, device=batch.ids.device)[batch.domain][:, None]
        first = torch.tensor([r.start for r in map(self.vocabulary.codes_of, range(len(DOMAINS)))], device=size.device)
        other = first[batch.domain][:, None] + (torch.rand(batch.ids.shape, device=size.device) * size).long()
        hit = torch.rand(batch.ids.shape, device=size.device) < self.code_noise
        return torch.where(hit & batch.target & (batch.ids != self.vocabulary.end), other, batch.ids)

    def hidden(self, x: torch.Tensor, **options):
        """The LM's last hidden states before its head, with whatever else transformers returns."""
        return self.net.base_model(inputs_embeds=x, **options)

    def logits(self, h: torch.Tensor) -> torch.Tensor:
        """Hidden states (..., D) -> logits over the whole vocabulary (..., V), float32."""
        return self.net.get_output_embeddings()(h).float()

    def forward(self, batch: Sequences, style_drop: float = 0.0, each: bool = False) -> dict[str, torch.Tensor]:
        """ce over codes and [END], coarse over codes (eq. 19-20); with `each`, ce is a clip's own mean, (B,).

        Padding is at the end and attention causal, so no target ever sees it and no mask is needed.
        """
        keep = torch.rand(len(batch.ids), device=batch.ids.device) >= style_drop
        ids = self.noisy(batch) if self.training and self.code_noise else batch.ids
        x = F.dropout(self.embed(ids, batch.style, keep), self.dropout, self.training)
        hidden = self.hidden(x, use_cache=False)[0]
        counts = batch.target[:, 1:]  # position i predicts i + 1
        h, wanted = hidden[:, :-1][counts], batch.ids[:, 1:][counts]
        ce = F.cross_entropy(self.logits(h), wanted, reduction="none")
        if each:
            row = counts.nonzero()[:, 0]
            return {"ce": torch.zeros(len(counts), device=ce.device).index_add_(0, row, ce) / counts.sum(1)}
        code = wanted - self.vocabulary.codes_of(0).start
        coarse = self.coarse(h[code >= 0]).float()
        return {"ce": ce.mean(), "coarse": F.cross_entropy(coarse, self.clusters[code[code >= 0]])}


# ---- generation


@dataclass
class Sampling:
    """How codes are drawn."""

    temperature: float = 0.6  # 0 takes the likeliest
    top_p: float = 0.95  # draw from the likeliest codes that together have this probability
    guidance: float = 1.0  # logits u + guidance (c - u), u without style; 1 is none
    repetition: float = 1.1  # codes of the last `window` have their probability divided by this
    window: int = 20
    seed: int = 0


@torch.inference_mode()
def generate(
    lm: LM,
    prompts: Sequence[list[int]],
    domains: Sequence[int],
    limits: Sequence[int],
    styles: torch.Tensor | None = None,
    sampling: Sampling | None = None,
) -> list[np.ndarray]:
    """Codes (N,) of each prompt, drawn with a key-value cache until [END] or its limit, all prompts as one batch; never
    outside the domain's codebook, never empty. `styles` (B, 16, E) or None for no reference. A batch is seeded as one:
    a prompt's codes depend on those beside it."""
    v, device, s = lm.vocabulary, next(lm.parameters()).device, sampling or Sampling()
    guided, B = s.guidance != 1 and styles is not None, len(prompts)
    keep = torch.full((B,), styles is not None, device=device)
    styles = torch.zeros(B, STYLES, lm.style.in_features) if styles is None else styles.float()
    longest = max(map(len, prompts))
    # padded at the front, so that every prompt ends at the same place and new codes join without gaps
    ids = torch.tensor([[v.end] * (longest - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    styles = styles.to(device)
    if guided:
        ids, mask, styles = ids.repeat(2, 1), mask.repeat(2, 1), styles.repeat(2, 1, 1)
        keep = torch.cat([keep, ~keep])
    banned = torch.ones(B, len(v), dtype=torch.bool, device=device)
    for b, d in enumerate(domains):
        banned[b, v.codes_of(d).start : v.codes_of(d).stop] = False
    generator = torch.Generator(device).manual_seed(s.seed)
    out: list[list[int]] = [[] for _ in prompts]
    done, cache, x = [False] * B, None, lm.embed(ids, styles, keep)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    while not all(done):
        options = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache, "use_cache": True}
        state = lm.hidden(x, **options)
        cache, logits = state.past_key_values, lm.logits(state[0][:, -1])
        if guided:
            c, u = logits.chunk(2)
            logits = u + s.guidance * (c - u)
        logits = logits[:, : len(v)].masked_fill(banned, -torch.inf)
        banned[:, v.end] = False  # from the second step on
        for b, codes in enumerate(out):
            logits[b, list(set(codes[-s.window :]))] -= math.log(s.repetition)
        token = draw(logits, s.temperature, s.top_p, generator)
        for b, t in enumerate(token.tolist()):
            if not done[b] and t != v.end:
                out[b].append(t)
            done[b] = done[b] or t == v.end or len(out[b]) >= limits[b]
        token = token.repeat(2) if guided else token
        x = lm.net.get_input_embeddings()(token[:, None])
        mask, positions = torch.cat([mask, mask.new_ones(len(mask), 1)], 1), positions[:, -1:] + 1
    return [np.array(codes, np.int64) - v.codes_of(d).start for codes, d in zip(out, domains, strict=True)]


def draw(logits: torch.Tensor, temperature: float, top_p: float, generator: torch.Generator) -> torch.Tensor:
    """One id per row of logits (B, V): the largest at temperature 0, else drawn from the smallest set of ids whose
    probability reaches top_p."""
    if temperature == 0:
        return logits.argmax(-1)
    p, order = (logits / temperature).softmax(-1).sort(descending=True, stable=True)
    p[p.cumsum(-1) - p >= top_p] = 0
    return order.gather(1, torch.multinomial(p, 1, generator=generator))[:, 0]


def limit(domain: int, text: str, rate: float, max_seconds: float) -> int:
    """Most codes for a text: max_seconds, and for speech no more than a slow reader needs, so that babble ends."""
    slow = 1.5 + 0.15 * len(text)
    return max(1, round(rate * (min(max_seconds, slow) if domain == SPEECH else max_seconds)))


# ---- training


@dataclass
class Run:
    """The state of a training run of stage 1."""

    config: LMConfig
    lm: LM
    optimizer: torch.optim.Optimizer
    rates: list[int]  # tokens per second of each domain
    data: str  # identity of the prepared folder
    step: int = 0
    seconds: float = 0.0

    def state(self) -> dict:
        return {
            "config": asdict(self.config),
            "net": json.loads(self.lm.net.config.to_json_string(use_diff=False)),
            "vocabulary": asdict(self.lm.vocabulary),
            "rates": self.rates,
            "data": self.data,
            "model": self.lm.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
        }


def text_encoder(config: LMConfig | dict) -> Callable[[str], list[int]]:
    """What turns text into ids for an LM of this config."""
    c = asdict(config) if isinstance(config, LMConfig) else config
    text = load_text_tokenizer(c["text"] or ("bytes" if c["lm"] == "small" else c["lm"]))
    options = {} if hasattr(text, "n_vocab") else {"add_special_tokens": False}  # tiktoken's adds none
    return lambda words: text.encode(words, **options)


def load_lm(path: str | Path, device: str = "cpu") -> tuple[LM, Callable[[str], list[int]], dict]:
    """The LM of a checkpoint in eval mode, what encodes its text, and the checkpoint's other contents."""
    audio.torchaudio()
    from transformers import AutoConfig, AutoModelForCausalLM

    state, used = common.load(path)
    if "vocabulary" not in state:
        raise common.CheckpointError(f"{used} is not a checkpoint of lm.py")
    kind = dict(state["net"])
    net = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind.pop("model_type"), **kind))
    vocabulary = Vocabulary(state["vocabulary"]["text"], tuple(state["vocabulary"]["codes"]))
    weights, c = state.pop("model"), state["config"]
    lm = LM(net, vocabulary, weights["style.weight"].shape[1], weights["clusters"], c["style_alpha"])
    lm.load_state_dict(weights)
    state.pop("optimizer")
    return lm.to(device).eval(), text_encoder(c), state


def new_run(config: LMConfig, dataset: data.Dataset, machine: Machine) -> Run:
    """A run at step 0 for a prepared folder."""
    torch.manual_seed(config.seed)
    with_keys = dataset.meta["prepared_with"]
    codes = (with_keys["speech_codes"], with_keys["audio_codes"])
    net, text = build_net(config, lambda old: len(Vocabulary(old, codes)))
    some = data.first_of_each_domain(dataset, 100).tolist()  # a prepared folder begins with speech alone
    sample = np.stack([dataset.style(i) for i in some]).astype(np.float32)
    lm = LM(net, Vocabulary(text, codes), sample.shape[2], all_clusters(config, codes), config.style_alpha)
    lm.style_scale.copy_(1 / torch.from_numpy(sample).flatten(0, 1).std(0).clamp_min(1e-4))
    lm.dropout, lm.code_noise = config.dropout, config.code_noise
    lm.to(machine.device)
    return Run(config, lm, make_optimizer(lm, config), dataset.rates, data.fingerprint(dataset.meta))


def save(run: Run) -> None:
    """Writes ckpt.pt, and keeps the one before it."""
    common.save(Path(run.config.out_dir) / "ckpt.pt", run.state())


def restore(run: Run, path: Path) -> None:
    """Loads ckpt.pt into `run`. Raises CheckpointError when it was made with incompatible settings or other data."""
    state, used = common.load(path, set_aside=True)
    common.same_run(run.config, run.data, state, MAY_DIFFER, used)
    run.lm.load_state_dict(state["model"])
    run.optimizer.load_state_dict(state["optimizer"])
    run.step, run.seconds = state["step"], state["seconds"]


def train_step(run: Run, lm: nn.Module, batch: Sequences, machine: Machine) -> dict[str, float]:
    """One optimizer step. Its randomness follows from (seed, step, rank), so that a continued run repeats it."""
    config = run.config
    torch.manual_seed(step_seed(config.seed, run.step, machine.rank))
    with machine.precision():
        losses = lm(batch, config.style_drop)
    loss = losses["ce"] + config.coarse_weight * losses["coarse"]
    loss.backward()
    moved = clip_and_step(run.lm, run.optimizer, run.step, config)
    run.step += 1
    return {name: value.item() for name, value in losses.items()} | moved | {"loss": loss.item()}


@torch.no_grad()
def held_out_loss(lm: LM, batch: Sequences, machine: Machine) -> dict[str, float]:
    """CE per code of each domain on fixed clips, without style: what is known from text alone."""
    lm.eval()
    with torch.random.fork_rng([]), machine.precision():
        ce = torch.cat([lm(part, style_drop=1.0, each=True)["ce"] for part in split(batch, 8)])
    lm.train()
    return {f"held_out_{n}": float(ce[batch.domain == d].mean()) for d, n in enumerate(DOMAINS) if d in batch.domain}


def split(batch: Sequences, size: int) -> list[Sequences]:
    """The batch as several of at most `size` clips."""
    parts = zip(*(x.split(size) for x in (batch.ids, batch.target, batch.style, batch.domain)), strict=True)
    return [Sequences(*part) for part in parts]


def train(config: LMConfig, machine: Machine) -> Run:
    """Trains to max_steps or to a signal; returns the run. Rank 0 alone prints and writes."""
    dataset, held_out = (data.Dataset(config.data_dir, split) for split in ("train", "held_out"))
    run, out_dir, encode = new_run(config, dataset, machine), Path(config.out_dir), text_encoder(config)
    if machine.rank == 0:
        common.remove_leftovers(out_dir)
    if common.exists(out_dir / "ckpt.pt"):
        restore(run, out_dir / "ckpt.pt")
    corpus = Corpus(dataset, run.lm.vocabulary, encode)
    buckets = data.LengthBatchSampler(corpus.lengths, config, "batch_tokens", machine.rank, machine.world)
    reporter = None
    if machine.rank == 0:
        out_dir.mkdir(parents=True, exist_ok=True)
        (out_dir / "config.json").write_text(json.dumps(asdict(config), indent=1))
        announce(run, corpus, buckets, machine)
        rows = data.first_of_each_domain(held_out, config.eval_clips)
        held = Corpus(held_out, run.lm.vocabulary, encode).batch(rows)
        reporter = Reporter(run, machine, held.to(machine.device))
    lm = DistributedDataParallel(run.lm) if machine.world > 1 else run.lm
    stop = common.StopRequest(machine.device)
    finite = Finite(lambda: save(run) if machine.rank == 0 else None)
    while run.step < config.max_steps and not stop.agreed():
        ids = buckets.ids(run.step)
        numbers = train_step(run, lm, corpus.batch(ids).to(machine.device), machine)
        finite.check(run.step, numbers["grad_norm"], ids.tolist())
        if reporter:
            reporter.step(numbers, int(corpus.lengths[ids].sum()) * machine.world)
    if reporter and run.step < config.max_steps:
        save(run)
    return run


def announce(run: Run, corpus: Corpus, buckets: data.LengthBatchSampler, machine: Machine) -> None:
    """The derived numbers, before step 0."""
    v, per_epoch = run.lm.vocabulary, buckets.steps_per_epoch
    print(show(run.config))
    print(
        f"{count_parameters(run.lm) / 1e6:.1f} M parameters; vocabulary {v.text} text + {len(v) - v.text}; "
        f"{machine.world} x {machine.device}\n{len(corpus.prompts)} training clips, {corpus.lengths.sum()} positions "
        f"an epoch in {per_epoch} steps, padding {100 * buckets.padding():.1f} %; "
        f"{run.config.max_steps / per_epoch:.0f} epochs",
        flush=True,
    )


class Reporter:
    """What rank 0 prints and writes along a run: rows of log.csv, held-out losses, checkpoints."""

    def __init__(self, run: Run, machine: Machine, held_out: Sequences):
        self.run, self.machine, self.held_out = run, machine, held_out
        self.log = Log(Path(run.config.out_dir) / "log.csv", COLUMNS, run.step)
        self.since, self.tokens = time.time(), 0

    def step(self, numbers: dict[str, float], tokens: int) -> None:
        run, last = self.run, self.run.step == self.run.config.max_steps
        self.tokens += tokens
        due = {k: run.step % getattr(run.config, f"{k}_every") == 0 or last for k in ("log", "eval", "save")}
        if due["log"] or due["eval"]:
            now = time.time()
            rate = self.tokens / (now - self.since)
            run.seconds += now - self.since
            self.since, self.tokens = now, 0
            held = held_out_loss(run.lm, self.held_out, self.machine) if due["eval"] else {}
            self.log.row(step=run.step, tokens_per_s=rate, seconds=run.seconds, **numbers, **held)
            extra = "".join(f"  {k.replace('held_out_', 'held-out ')} {v:.3f}" for k, v in held.items())
            print(
                f"step {run.step:6d}/{run.config.max_steps}  ce {numbers['ce']:.3f}  coarse {numbers['coarse']:.3f}  "
                f"{rate:6.0f} tokens/s  left {time_left(run.seconds, run.step, run.config.max_steps)}{extra}",
                flush=True,
            )
        if due["save"]:
            save(run)


def main(config: LMConfig) -> int:
    machine = join_group(config)
    run = train(config, machine)
    leave_group(machine)
    path = Path(config.out_dir) / "ckpt.pt"
    if machine.rank == 0 and run.step == config.max_steps:
        print(f"trained {run.step} steps in {run.seconds / 60:.1f} min; {path}")
    elif machine.rank == 0:
        print(f"stopped at step {run.step}, saved in {path}; the same command continues")
    return 0 if run.step == config.max_steps else common.INTERRUPTED


if __name__ == "__main__":
    command(main, ARGS)
