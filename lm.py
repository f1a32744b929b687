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

from dataclasses import asdict, dataclass
from typing import Literal, NamedTuple

from configurator import Count, Name, Natural, Share, configure, from_dict, show


@dataclass
class LMConfig:
    """Settings of stage 1; a config file lists only what differs."""

    # run
    out_dir: Name = "out/lm_unified"  # run directory; an unfinished run found there is continued
    data_dir: Name = "data/unified_a"  # folder made by python -m prepare
    seed: Natural = 0  # seeds weights, data order and style dropout
    device: str = "auto"  # auto | cpu | cuda | mps
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # autocast; auto takes bfloat16 where the machine has it
    # model
    lm: str = "Qwen/Qwen3-0.6B-Base"  # any causal LM of transformers by name or folder; "small": a Qwen3 from scratch
    text: str = ""  # text tokenizer by name or folder; empty: the LM's own; "bytes": one token a byte
    n_layer: Count = 6  # of the small LM
    n_head: Count = 4  # of the small LM
    n_embd: Count = 256  # of the small LM
    dropout: Share = 0.0  # of the embedded sequence
    # style and loss
    style_alpha: Share = 0.5  # a of eq. 18
    style_drop: Share = 0.1  # probability that a clip's style is dropped, for guidance and for use without a reference
    coarse_weight: float = 0.5  # of the clusters' cross-entropy
    coarse_clusters: Count = 128  # clusters per codebook
    coarse: Literal["kmeans", "uniform"] = "kmeans"  # clusters of the codebook's vectors, or equal runs of ids
    code_noise: Share = 0.0  # share of the codes it reads that are replaced by random ones, against exposure bias
    # optimisation
    max_steps: Count = 100_000  # optimizer steps
    batch_tokens: Count = 16_384  # sequence positions per step and rank, padding included
    batch_size: Count = 64  # most clips per step and rank
    learning_rate: float = 1e-4  # peak of the one-cycle schedule
    lr_warmup: Share = 0.05  # share of max_steps on the way up
    weight_decay: float = 0.01  # on matrices
    beta2: Share = 0.95  # AdamW; beta1 is 0.9
    grad_clip: float = 1.0  # largest gradient norm
    # reporting
    log_every: Count = 10  # steps between rows of log.csv
    eval_every: Count = 1000  # steps between held-out losses
    eval_clips: Count = 64  # held-out clips per domain
    save_every: Count = 1000  # steps between checkpoints


if __name__ == "__main__":
    ARGS = configure(LMConfig, __doc__)  # a typo is answered before torch is imported

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import tiktoken
import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers
from scipy.cluster.vq import kmeans2
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

import audio
import common
import data
from backbones import check_weights
from common import DOMAINS, SPEECH, Machine, clip_and_step, command, step_seed
from probe import probing

audio.torchaudio()  # before transformers imports it
LOGITS = 2**28  # most logits at a time: a GiB in float32
STYLES = 16  # style placeholders, and time segments of the reference
NEEDS = "config net vocabulary model".split()  # of a checkpoint of this file
MAY_DIFFER = "out_dir data_dir device dtype log_every eval_every eval_clips save_every".split()
COLUMNS = "step loss ce coarse grad_norm lr tokens_per_s seconds".split() + [f"held_out_{name}" for name in DOMAINS]


def train(config: LMConfig, machine: Machine) -> "Run":
    """Trains to max_steps or to a signal; returns the run. Rank 0 alone prints and writes. All randomness of a step
    follows from (seed, step, rank), so that a continued run repeats it. A non-finite gradient updates nothing."""
    run, corpus, held_out = open_run(config, machine)
    sampler = data.LengthBatchSampler(corpus.lengths, config, "batch_tokens", machine.rank, machine.world)
    log = start_log(run, corpus, sampler, machine) if machine.lead else None
    finite = common.Finite(lambda: save(run) if machine.lead else None)
    lm = DistributedDataParallel(run.lm) if machine.world > 1 else run.lm
    stop, start, tokens = common.StopRequest(machine.device), time.monotonic() - run.seconds, 0
    while run.step < config.max_steps and not stop.agreed():
        ids = sampler.ids(run.step)
        batch = corpus.batch(ids, machine.device)
        torch.manual_seed(step_seed(config.seed, run.step, machine.rank))
        with machine.precision():
            losses = lm(batch, config.style_drop)
        losses["loss"].backward()
        moved = clip_and_step(run.lm, run.optimizer, run.step, config)
        run.step += 1
        finite.check(run.step, moved["grad_norm"], ids.tolist())

        # log, evaluate, save
        tokens += int(corpus.lengths[ids].sum()) * machine.world
        every = (config.log_every, config.eval_every, config.save_every)
        log_due, eval_due, save_due = (run.step % n == 0 or run.step == config.max_steps for n in every)
        if log and (log_due or eval_due):
            seconds = time.monotonic() - start
            rate, run.seconds, tokens = tokens / (seconds - run.seconds), seconds, 0
            held = common.optional(lambda: held_out_loss(run.lm, held_out, machine), {}) if eval_due else {}
            numbers = {name: torch.as_tensor(value).item() for name, value in (losses | moved).items()}
            log.row(step=run.step, tokens_per_s=rate, seconds=seconds, **numbers, **held)
            shown = "  ".join(f"{k} {v:.3f}" for k, v in ({k: numbers[k] for k in ("ce", "coarse")} | held).items())
            left = f"{seconds / run.step * (config.max_steps - run.step) / 60:.1f} min"
            print(f"step {run.step:6d}/{config.max_steps}  {shown}  {rate:6.0f} tokens/s  left {left}", flush=True)
        if log and save_due:
            save(run)
    finite.check()
    if log and run.step < config.max_steps:
        save(run)
    stop.close()
    return run


@torch.no_grad()
def held_out_loss(lm: "LM", parts: list["Sequences"], machine: Machine) -> dict[str, float]:
    """CE per code of each domain on fixed clips, without style: what is known from text alone."""
    domain = torch.cat([part.domain for part in parts])
    with probing(lm, 0), machine.precision():
        ce = torch.cat([lm(part, style_drop=1.0, each=True)["ce"] for part in parts])
    return {f"held_out_{n}": float(ce[domain == d].mean()) for d, n in enumerate(DOMAINS) if d in domain}


@dataclass
class Run:
    """The state of a training run of stage 1."""

    lm: "LM"
    optimizer: torch.optim.Optimizer
    about: dict  # what its checkpoints say beside the weights
    step: int = 0
    seconds: float = 0.0


def open_run(config: LMConfig, machine: Machine) -> tuple[Run, "Corpus", list["Sequences"]]:
    """The run as it stands in out_dir, or a new one, drawn from config.seed; what it trains on; and its held-out clips
    in parts of 8. Raises CheckpointError for one that was made with incompatible settings or other data."""
    training, held_out = (data.Dataset(config.data_dir, split) for split in ("train", "held_out"))
    torch.manual_seed(config.seed)
    net, vocabulary = build_net(config, training.codes)
    corpus = Corpus(training, vocabulary)
    styles = corpus.batch(data.first_of_each_domain(training, 100)).style  # (clips, 16, E)
    lm = LM(config, net, vocabulary, code_clusters(config, training.codes), styles.shape[2])
    lm.style_scale.copy_(1 / styles.flatten(0, 1).std(0).clamp_min(1e-4))
    lm.to(machine.device)
    about = {"config": asdict(config), "net": json.loads(net.config.to_json_string(use_diff=False))}
    about |= {"vocabulary": {"text": vocabulary.text, "codes": vocabulary.codes}}
    about |= {"rates": training.meta["token_rates"], "data": data.fingerprint(training.meta), "batches": machine.world}
    run, path = Run(lm, common.make_optimizer(lm, config), about), Path(config.out_dir) / "ckpt.pt"
    if common.exists(path):
        state, used = common.load(path, set_aside=True, needs=NEEDS)
        common.same_run(config, about["data"], state, MAY_DIFFER, used, machine.world)
        check_weights(lambda: lm, 0, state["model"], used)
        lm.load_state_dict(state["model"])
        run.optimizer.load_state_dict(state["optimizer"])
        run.step, run.seconds = state["step"], state["seconds"]
    fixed = data.first_of_each_domain(held_out, config.eval_clips)
    parts, others = np.split(fixed, range(8, len(fixed), 8)), Corpus(held_out, vocabulary)
    return run, corpus, [others.batch(part, machine.device) for part in parts]


def save(run: Run) -> None:
    """Writes ckpt.pt, of tensors and plain values only, and keeps the one before it."""
    state = {"model": run.lm.state_dict(), "optimizer": run.optimizer.state_dict()}
    state |= {"step": run.step, "seconds": run.seconds}
    common.save(Path(run.lm.config.out_dir) / "ckpt.pt", run.about | state)


def start_log(run: Run, corpus: "Corpus", sampler: data.LengthBatchSampler, machine: Machine) -> common.Log:
    """Writes config.json, prints the derived numbers before the first step, and opens log.csv."""
    config, v, per_epoch = run.lm.config, run.lm.vocabulary, sampler.steps_per_epoch
    out_dir, size = Path(config.out_dir), f"{common.count_parameters(run.lm) / 1e6:.1f} M parameters"
    epoch = f"{corpus.lengths.sum()} positions an epoch in {per_epoch} steps, padding {100 * sampler.waste()[0]:.1f} %"
    print(f"{show(config)}\n{size}; vocabulary {v.text} text + {v.size - v.text}; {machine.world} x {machine.device}")
    print(f"{len(corpus.prompts)} training clips, {epoch}; {config.max_steps / per_epoch:.0f} epochs", flush=True)
    out_dir.mkdir(parents=True, exist_ok=True)
    common.write_json(out_dir / "config.json", asdict(config))
    return common.Log(out_dir / "log.csv", COLUMNS, run.step)


def text_encoder(config: LMConfig) -> tuple[Callable[[str], list[int]], int]:
    """What turns text into ids for an LM of this config, and how many ids it has. Raises ValueError for none."""
    source = config.text or ("bytes" if config.lm == "small" else config.lm)
    if source == "bytes":
        ranks = {bytes([i]): i for i in range(256)}
        return tiktoken.Encoding("bytes", pat_str="(?s:.)", mergeable_ranks=ranks, special_tokens={}).encode, len(ranks)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(f"no text tokenizer {source!r} ({type(error).__name__}): pass a folder, or bytes") from error
    return lambda text: tokenizer.encode(text, add_special_tokens=False), len(tokenizer)


class Vocabulary:
    """Token ids: the text's first, then [TAG] [DES] [AT] [END], the style placeholders, and each domain's codes; `text`
    is the size of the LM's own vocabulary where it is not the tokenizer's, `codes` the codebooks' sizes."""

    def __init__(self, config: LMConfig, codes: Sequence[int], text: int = 0):
        self.encode, words = text_encoder(config)
        self.text, self.codes = text or words, tuple(codes)
        edges = np.cumsum([self.text, 4, STYLES, *codes]).tolist()
        self.specials, self.styles, *self.code_ids = map(range, edges, edges[1:])  # code_ids: of each domain
        self.end, self.size = self.specials[3], edges[-1]

    def prompt(self, domain: int, text: str) -> list[int]:
        """The ids before the codes (eq. 16). The text of a sound is its event, or "event: description"."""
        tag, des, at, _ = self.specials
        if domain == SPEECH:
            return [*self.encode(text), *self.styles, at]
        event, _, description = text.partition(": ")
        return [tag, *self.encode(event), des, *self.encode(description), *self.styles, at]


class Sequences(NamedTuple):
    """B prompts with their codes, padded at the end; tensors on one device."""

    ids: Tensor  # (B, S)
    target: Tensor  # (n,) where codes and [END] are in ids laid end to end; known here, so that no step asks a GPU
    style: Tensor  # (B, 16, E)
    domain: Tensor  # (B,)


class Corpus:
    """One split of a prepared folder as sequences; prompts are encoded once."""

    def __init__(self, dataset: data.Dataset, vocabulary: Vocabulary):
        self.dataset, self.vocabulary, self.domains = dataset, vocabulary, dataset.index["domain"].tolist()
        texts = (dataset.name_and_text(i)[1] for i in range(len(dataset)))
        self.prompts = [vocabulary.prompt(d, t) for d, t in zip(self.domains, texts, strict=True)]
        self.lengths = np.array([len(p) for p in self.prompts]) + dataset.index["tokens"] + 1

    def batch(self, ids: np.ndarray, device: str = "cpu") -> Sequences:
        """Clips `ids`, each with its own style; of two token streams the LM writes the primary one."""
        v, clips, rows = self.vocabulary, ids.tolist(), []
        for i in clips:
            codes = self.dataset.tokens(i)[:, 0] + v.code_ids[self.domains[i]].start
            rows.append(torch.tensor([*self.prompts[i], *codes.tolist(), v.end]))
        padded = pad_sequence(rows, batch_first=True, padding_value=v.end)
        coded = padded >= v.styles.stop
        target = (coded | F.pad(coded[:, :-1], (1, 0))).flatten().nonzero()[:, 0]  # [END] is after the last code
        style = torch.from_numpy(np.stack([self.dataset.style(i) for i in clips]).astype(np.float32))
        domain = torch.tensor([self.domains[i] for i in clips])
        return Sequences(*(x.to(device, non_blocking=True) for x in (padded, target, style, domain)))


def code_clusters(config: LMConfig, codes: Sequence[int]) -> Tensor:
    """The cluster of every code of both domains, none shared, (sum of codes,): by k-means, or equal runs of ids."""
    parts, first = [], 0
    for name, count in zip(DOMAINS, codes, strict=True):
        clusters, book = min(config.coarse_clusters, count), data.read_codebook(config.data_dir, name)
        labels = np.arange(count) * clusters // count
        if config.coarse == "kmeans" and book is None:
            print(f"{name}: no codebook in {config.data_dir}, so its clusters are equal runs of ids")
        elif config.coarse == "kmeans":
            _, labels = kmeans2(book.double().numpy(), clusters, iter=30, minit="++", seed=config.seed)
        parts.append(first + torch.from_numpy(labels).long())
        first = int(parts[-1].max()) + 1
    return torch.cat(parts)


def build_net(config: LMConfig, codes: Sequence[int]) -> tuple[nn.Module, Vocabulary]:
    """The causal LM of transformers with room for our vocabulary beside its own; new rows of its tables start at the
    mean of the old ones. Raises ValueError for none."""
    if config.lm == "small":
        vocabulary, D = Vocabulary(config, codes), config.n_embd
        size = {"vocab_size": vocabulary.size, "tie_word_embeddings": True, "num_hidden_layers": config.n_layer}
        size |= {"hidden_size": D, "intermediate_size": 3 * D, "head_dim": D // config.n_head}
        size |= {"num_attention_heads": config.n_head, "num_key_value_heads": config.n_head}
        return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**size)), vocabulary
    try:
        net = transformers.AutoModelForCausalLM.from_pretrained(config.lm, dtype=torch.float32)
    except (OSError, ValueError) as error:
        reason = f"no causal LM {config.lm!r} here or on the hub ({type(error).__name__})"
        raise ValueError(f"{reason}: pass a folder of one; --lm=small needs no weights") from error
    vocabulary = Vocabulary(config, codes, net.get_input_embeddings().num_embeddings)
    net.resize_token_embeddings(vocabulary.size, mean_resizing=False)
    with torch.no_grad():
        for table in {net.get_input_embeddings().weight, net.get_output_embeddings().weight}:  # one, where tied
            table[vocabulary.text :] = table[: vocabulary.text].mean(0)
    return net, vocabulary


class LM(nn.Module):
    """A causal LM of transformers whose vocabulary is extended by specials, placeholders and codes."""

    def __init__(self, config: LMConfig, net: nn.Module, vocabulary: Vocabulary, clusters: Tensor, width: int):
        super().__init__()
        self.config, self.net, self.vocabulary = config, net, vocabulary
        D = net.get_input_embeddings().embedding_dim
        self.style = nn.Linear(width, D, bias=False)  # W of eq. 18
        self.coarse = nn.Linear(D, int(clusters.max()) + 1)  # eq. 20
        self.register_buffer("clusters", clusters)  # (sum of codes,)
        self.register_buffer("style_scale", torch.ones(width))  # one over the features' deviation

    def embed(self, ids: Tensor, style: Tensor, keep: Tensor) -> Tensor:
        """(B, S) -> (B, S, D); placeholders of clips with `keep` (B,) take on style (B, 16, E) by eq. 18."""
        x, a, places = self.net.get_input_embeddings()(ids), self.config.style_alpha, self.vocabulary.styles
        place = torch.arange(places.start, places.stop, device=ids.device)
        styled = ((ids[..., None] == place) & keep[:, None, None]).to(x.dtype)  # (B, S, 16), one-hot or zeros
        return x * (1 - a * styled.sum(2, keepdim=True)) + a * (styled @ self.style(style * self.style_scale))

    def noisy(self, batch: Sequences) -> Tensor:
        """The ids (B, S) with a share of the codes replaced by random codes of the same domain."""
        of_speech, (speech, sounds) = batch.domain[:, None] == SPEECH, self.vocabulary.code_ids
        first = torch.where(of_speech, speech.start, sounds.start)  # (B, 1)
        size = torch.where(of_speech, len(speech), len(sounds))
        other = first + (torch.rand(batch.ids.shape, device=size.device) * size).long()
        hit = torch.rand(batch.ids.shape, device=size.device) < self.config.code_noise
        return torch.where(hit & (batch.ids >= speech.start), other, batch.ids)

    def ce(self, h: Tensor, wanted: Tensor) -> Tensor:
        """The cross-entropy of n targets, (n,), from h (n, D); logits in float32."""
        return F.cross_entropy(self.net.get_output_embeddings()(h).float(), wanted, reduction="none")

    def forward(self, batch: Sequences, style_drop: float = 0.0, each: bool = False) -> dict[str, Tensor]:
        """ce over codes and [END], coarse over codes, and loss (eq. 19-20); with `each`, ce is a clip's own mean, (B,).
        Padding is at the end and attention causal, so no target ever sees it and no mask is needed."""
        keep = torch.rand(len(batch.ids), device=batch.ids.device) >= style_drop
        ids = self.noisy(batch) if self.training and self.config.code_noise else batch.ids
        x = F.dropout(self.embed(ids, batch.style, keep), self.config.dropout, self.training)
        states = self.net.base_model(inputs_embeds=x, use_cache=False)[0].flatten(0, 1)  # position i predicts i + 1
        h, wanted = states.index_select(0, batch.target - 1), batch.ids.flatten()[batch.target]  # (n, D), (n,)
        room = max(1, LOGITS // self.vocabulary.size)
        parts = zip(h.split(room), wanted.split(room), strict=True)  # of several, backward computes the logits again
        ce = torch.cat([checkpoint(self.ce, *p, use_reentrant=False) if len(h) > room else self.ce(*p) for p in parts])
        if each:
            row = batch.target // batch.ids.shape[1]
            return {"ce": ce.new_zeros(len(batch.ids)).scatter_reduce(0, row, ce, "mean", include_self=False)}
        code = wanted - self.vocabulary.styles.stop  # its row in the codebooks laid end to end; below 0 for [END]
        cluster = torch.where(code < 0, -100, self.clusters[code.clamp_min(0)])  # -100 does not count
        ce, coarse = ce.mean(), F.cross_entropy(self.coarse(h).float(), cluster)
        return {"ce": ce, "coarse": coarse, "loss": ce + self.config.coarse_weight * coarse}


def load_lm(path: str | Path, device: str = "cpu") -> tuple[LM, dict]:
    """The LM of a checkpoint in eval mode, and the checkpoint's other contents."""
    state, used = common.load(path, needs=NEEDS)
    config, weights = from_dict(LMConfig, state["config"], str(used)), state.pop("model")
    state.pop("optimizer", None)
    vocabulary = Vocabulary(config, **state["vocabulary"])

    def build() -> LM:
        net = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**state["net"]))
        return LM(config, net, vocabulary, weights["clusters"], weights["style.weight"].shape[1])

    check_weights(build, state["net"].get("num_hidden_layers", 0), weights, used)
    lm = build()
    lm.load_state_dict(weights)
    return lm.to(device).eval(), state


@torch.inference_mode()
def generate(
    lm: LM, texts, limits, styles=None, temperature=0.6, top_p=0.95, guidance=1.0, repetition=1.1, window=20, seed=0
) -> list[np.ndarray]:
    """Codes (N,) of each (domain, text), drawn with a key-value cache until [END] or its limit; never outside the
    domain's codebook, never empty. `styles` (B, 16, E) or None for no reference; guidance takes u + guidance (c - u) of
    logits c with style and u without; codes of the last `window` have their probability divided by `repetition`. All
    texts are one batch with one seed: a text's codes depend on those beside it."""
    v, B, device = lm.vocabulary, len(texts), lm.clusters.device
    copies = 2 if guidance != 1 and styles is not None else 1  # with style, and without
    keep = torch.arange(copies * B, device=device) < (0 if styles is None else B)
    styles = torch.zeros(B, STYLES, lm.style.in_features) if styles is None else styles.float()
    # padded at the front, so that every prompt ends at the same place and new codes join without gaps
    prompts = [torch.tensor(v.prompt(d, text)) for d, text in texts] * copies
    ids = pad_sequence(prompts, batch_first=True, padding_value=v.end, padding_side="left").to(device)
    all_ids, allowed = torch.arange(v.size, device=device), [v.code_ids[d] for d, _ in texts]
    codes = torch.stack([(all_ids >= r.start) & (all_ids < r.stop) for r in allowed])  # (B, V)
    generator, limit = torch.Generator(device).manual_seed(seed), torch.tensor(limits, device=device)[:, None]

    def choose(written: Tensor, logits: Tensor) -> Tensor:
        """Ids so far (copies B, n), logits (copies B, V) -> scores whose largest is the next id."""
        c, u, n = logits[:B], logits[-B:], written.shape[1]
        open_ids = (codes & (n < limit)) | ((all_ids == v.end) & (n > 0))
        scores = (u + guidance * (c - u) if copies == 2 else c).masked_fill(~open_ids, -torch.inf)
        recent = written[:B, -window:]
        scores.scatter_(1, recent, scores.gather(1, recent) - np.log(repetition))
        if temperature:  # the largest of log p + Gumbel noise is a draw from p
            noise = -torch.empty_like(scores).exponential_(generator=generator).log()
            scores = transformers.TopPLogitsWarper(top_p)(written, scores / temperature) + noise
        return scores.repeat(copies, 1)

    how = {"max_new_tokens": max(limits), "do_sample": False, "eos_token_id": v.end, "pad_token_id": v.end}
    x = lm.embed(ids, styles.repeat(copies, 1, 1).to(device), keep)
    out = lm.net.generate(inputs_embeds=x, attention_mask=(ids != v.end).long(), logits_processor=[choose], **how)
    rows = zip(out[:B].cpu().numpy(), allowed, strict=True)
    return [row[row != v.end] - r.start for row, r in rows]


def main(config: LMConfig) -> int:
    """Trains, after the style vectors are there; returns the exit code, INTERRUPTED for a run that a signal stopped.
    Raises ValueError that lists what the config needs and is not here, before any work."""
    with common.alone_in(config.out_dir):
        missing = []
        if not data.is_prepared(config.data_dir):
            missing.append(f"--data_dir=FOLDER  made by python -m prepare CONFIG; now {config.data_dir!r}")
        try:
            if config.lm != "small":
                transformers.AutoConfig.from_pretrained(config.lm)
        except (OSError, ValueError):
            missing.append(f"--lm=FOLDER  a causal LM, or small; {config.lm!r} is neither here nor on a reachable hub")
        if missing:
            raise ValueError("\n  ".join(["this config needs what is not here:", *missing]))
        # every rank starts it: they share the work, or wait at its lock, where a barrier would time out
        styled = data.is_prepared(config.data_dir, "styles")
        if not styled and (code := common.run_script("prepare", f"--styles={config.data_dir}")):
            return code  # it has said why
        machine = common.join_group(config)
        run = train(config, machine)
        common.leave_group(machine)
    finished, path = run.step == config.max_steps, Path(config.out_dir) / "ckpt.pt"
    told = f"stopped at step {run.step}, saved in {path}; the same command continues"
    if machine.lead:
        print(f"trained {run.step} steps in {run.seconds / 60:.1f} min; {path}" if finished else told)
    return 0 if finished else common.INTERRUPTED


if __name__ == "__main__":
    command(main, ARGS)
