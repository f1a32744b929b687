"""lm.py: prompts, style and losses by naive loops, cached generation against plain passes, exact resume, two ranks."""

import math
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from corpora import AUDIO, SPEECH, DataError

import audio
import common
import data
import lm
from common import Machine

MACHINE = Machine(0, 1, "cpu", "float32")
ROOT = Path(__file__).parent.parent
V = lm.Vocabulary(256, (16, 12))
SMALL = lm.LMConfig(
    lm="small",
    n_layer=2,
    n_head=2,
    n_embd=32,
    device="cpu",
    dtype="float32",
    batch_tokens=1200,
    batch_size=6,
    max_steps=8,
    learning_rate=3e-3,
    log_every=1,
    eval_every=4,
    eval_clips=2,
    save_every=3,
    coarse_clusters=4,
    style_drop=0.5,
)


def small_lm(seed: int = 0) -> lm.LM:
    torch.manual_seed(seed)
    net, text = lm.build_net(SMALL, lambda old: len(lm.Vocabulary(old, V.codes)))
    assert text == 256
    clusters = torch.cat([lm.cluster_codes(None, 16, 4), 4 + lm.cluster_codes(None, 12, 4)])
    model = lm.LM(net, V, 10, clusters, 0.5)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(8)  # far from uniform, so that orders of logits are plain
    return model.eval()


def random_batch(rng: np.random.Generator, clips: int = 4) -> lm.Sequences:
    domains = [i % 2 for i in range(clips)]
    prompts = [V.prompt(lambda t: list(t.encode()), d, "ab: cde"[: 3 + i]) for i, d in enumerate(domains)]
    codes = [rng.integers(0, V.codes[d], int(rng.integers(3, 12))) for d in domains]
    return lm.sequences(V, prompts, codes, domains, rng.normal(size=(clips, 16, 10)))


# ---- sequences


def test_vocabulary_has_one_id_for_everything():
    parts = [range(256), V.specials, V.styles, V.codes_of(SPEECH), V.codes_of(AUDIO)]
    ids = [i for part in parts for i in part]
    assert ids == list(range(len(V))) and len(V) == 256 + 4 + 16 + 16 + 12


def test_prompts_are_those_of_the_paper():
    def encode(text):
        return list(text.encode())

    tag, des, at, end = V.specials
    styles = list(range(260, 276))
    assert V.prompt(encode, SPEECH, "hi") == [104, 105, *styles, at]
    assert V.prompt(encode, AUDIO, "dog: it") == [tag, *b"dog", des, *b"it", *styles, at]
    assert V.prompt(encode, AUDIO, "dog") == [tag, *b"dog", des, *styles, at]
    assert end == V.end


def test_sequences_mark_codes_and_end_alone(rng):
    batch = random_batch(rng)
    for ids, target, d in zip(batch.ids.tolist(), batch.target.tolist(), batch.domain.tolist(), strict=True):
        at = ids.index(V.specials[2])
        wanted = [i for i, t in zip(ids, target, strict=True) if t]
        assert wanted[-1] == V.end and all(i in V.codes_of(d) for i in wanted[:-1])
        assert target.index(True) == at + 1 and all(i == V.end for i in ids[at + 1 + len(wanted) :])


@pytest.mark.parametrize("book", [True, False])
def test_clusters(rng, book):
    if book:  # 5 far groups are found, whatever their order
        centres = rng.normal(size=(5, 6)) * 100
        group = rng.permutation(np.arange(40) % 5)
        found = lm.cluster_codes(centres[group] + rng.normal(size=(40, 6)), 40, 5).numpy()
        assert len({(g, f) for g, f in zip(group, found, strict=True)}) == 5
    else:
        assert lm.cluster_codes(None, 10, 3).tolist() == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2]
        assert lm.cluster_codes(None, 3, 128).tolist() == [0, 1, 2]


# ---- the model


def test_style_enters_by_equation_18(rng):
    model, batch = small_lm(), random_batch(rng)
    keep = torch.tensor([True, True, False, True])
    got = model.embed(batch.ids, batch.style, keep)
    table, W = model.net.get_input_embeddings().weight, model.style.weight
    for b, row in enumerate(batch.ids.tolist()):
        for s, token in enumerate(row):
            wanted = table[token]
            if token in V.styles and keep[b]:
                wanted = 0.5 * wanted + 0.5 * W @ batch.style[b, token - V.styles.start]
            torch.testing.assert_close(got[b, s], wanted, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_losses_against_a_loop_over_single_clips(rng):
    """Each clip alone, unpadded, a full pass: neither padding nor prompt counts, and every target counts the same."""
    model, batch = small_lm(), random_batch(rng)
    ce, coarse = [], []
    for b in range(len(batch.ids)):
        end = int(batch.target[b].nonzero().max()) + 1
        x = model.embed(batch.ids[b : b + 1, :end], batch.style[b : b + 1], torch.tensor([True]))
        h = model.net.model(inputs_embeds=x)[0][0].double()
        log_p = (h @ model.net.lm_head.weight.double().T).log_softmax(-1)
        rough = (h @ model.coarse.weight.double().T + model.coarse.bias.double()).log_softmax(-1)
        for s in range(1, end):
            token = int(batch.ids[b, s])
            if batch.target[b, s]:
                ce.append(-log_p[s - 1, token])
            if batch.target[b, s] and token != V.end:
                coarse.append(-rough[s - 1, int(model.clusters[token - V.codes_of(SPEECH).start])])
    losses = model(batch)
    assert float(losses["ce"]) == pytest.approx(float(torch.stack(ce).mean()), rel=1e-4)
    assert float(losses["coarse"]) == pytest.approx(float(torch.stack(coarse).mean()), rel=1e-4)
    each = model(batch, each=True)["ce"] * batch.target.sum(1)
    assert float(each.sum() / batch.target.sum()) == pytest.approx(float(losses["ce"]), rel=1e-5)


def test_a_pretrained_lm_grows_by_rows_at_the_mean(tmp_path):
    audio.torchaudio()
    from transformers import Qwen3Config, Qwen3ForCausalLM

    for tied in (True, False):
        size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        old = Qwen3ForCausalLM(Qwen3Config(vocab_size=50, **size, num_key_value_heads=2, tie_word_embeddings=tied))
        old.save_pretrained(tmp_path / str(tied))
        net, text = lm.build_net(replace(SMALL, lm=str(tmp_path / str(tied))), lambda old: old + 30)
        assert text == 50 and net.config.vocab_size == 80
        for new, before in (
            (net.get_input_embeddings(), old.get_input_embeddings()),
            (net.get_output_embeddings(), old.get_output_embeddings()),
        ):
            torch.testing.assert_close(new.weight[:50], before.weight)
            torch.testing.assert_close(new.weight[50:], before.weight.mean(0).expand(30, -1))
    with pytest.raises(ValueError, match="--lm=small needs no weights"):
        lm.build_net(replace(SMALL, lm=str(tmp_path / "none")), lambda old: old)


# ---- generation

PROMPTS = [V.prompt(lambda t: list(t.encode()), d, t) for d, t in ((SPEECH, "hello"), (AUDIO, "a: b"), (SPEECH, "x"))]
DOMAINS = [SPEECH, AUDIO, SPEECH]


def naive_greedy(model, prompt, domain, style, limit, guidance, repetition, window) -> list[int]:
    """One clip, no cache, no padding: a whole pass for every code."""
    out: list[int] = []
    while len(out) < limit:
        ids = torch.tensor([prompt + out])
        logits = []
        for kept in (True, False):
            keep = torch.tensor([kept and style is not None])
            x = model.embed(ids, torch.zeros(1, 16, 10) if style is None else style[None], keep)
            logits.append(model.net.lm_head(model.net.model(inputs_embeds=x)[0][0, -1]))
        c, u = logits
        score = u + guidance * (c - u) if guidance != 1 else c
        for t in set(out[-window:]):
            score[t] -= math.log(repetition)
        allowed = [*V.codes_of(domain), *([V.end] if out else [])]
        token = max(allowed, key=lambda t: float(score[t]))
        if token == V.end:
            break
        out.append(token)
    return [t - V.codes_of(domain).start for t in out]


@pytest.mark.parametrize("guidance,repetition", [(1.0, 1.0), (1.0, 3.0), (2.5, 1.5)])
@torch.no_grad()
def test_cached_batch_equals_single_plain_passes(rng, guidance, repetition):
    model, styles = small_lm(int(rng.integers(1000))), torch.from_numpy(rng.normal(size=(3, 16, 10))).float()
    sampling = lm.Sampling(0.0, guidance=guidance, repetition=repetition, window=5)
    limits = [15, 8, 11]
    got = lm.generate(model, PROMPTS, DOMAINS, limits, styles, sampling)
    for b, (prompt, d) in enumerate(zip(PROMPTS, DOMAINS, strict=True)):
        wanted = naive_greedy(model, prompt, d, styles[b], limits[b], guidance, repetition, 5)
        assert got[b].tolist() == wanted


def test_codes_stay_in_their_codebook_and_end(rng):
    model = small_lm()
    with torch.no_grad():
        model.net.get_output_embeddings().weight[:300] *= 20  # text and specials are far likelier than codes
    for seed in range(5):
        got = lm.generate(model, PROMPTS, DOMAINS, [9, 9, 2], None, lm.Sampling(1.5, 1.0, seed=seed))
        assert all(len(g) and g.min() >= 0 and g.max() < V.codes[d] for g, d in zip(got, DOMAINS, strict=True))
        assert [len(g) <= n for g, n in zip(got, (9, 9, 2), strict=True)] == [True] * 3
    again = lm.generate(model, PROMPTS, DOMAINS, [9, 9, 2], None, lm.Sampling(1.5, 1.0, seed=4))
    assert all((a == b).all() for a, b in zip(got, again, strict=True))


def test_draw_follows_the_truncated_distribution():
    p = torch.tensor([0.5, 0.05, 0.3, 0.15])
    generator = torch.Generator().manual_seed(0)
    draws = lm.draw(p.log().expand(20_000, -1), 1.0, 0.9, generator)
    share = torch.bincount(draws, minlength=4) / 20_000
    torch.testing.assert_close(share, torch.tensor([0.5, 0, 0.3, 0.15]) / 0.95, atol=0.015, rtol=0)
    assert (lm.draw(p.log().expand(50, -1), 1.0, 0.4, generator) == 0).all()
    cold = torch.bincount(lm.draw(p.log().expand(20_000, -1), 0.5, 1.0, generator), minlength=4) / 20_000
    torch.testing.assert_close(cold, p**2 / (p**2).sum(), atol=0.015, rtol=0)


def test_limit():
    assert lm.limit(SPEECH, "x" * 10, 50, 30) == 150 and lm.limit(SPEECH, "x" * 1000, 50, 12) == 600
    assert lm.limit(AUDIO, "x", 25, 4) == 100


# ---- training


@pytest.fixture
def config(tiny_config, tmp_path) -> lm.LMConfig:
    return replace(SMALL, data_dir=tiny_config.data_dir, out_dir=str(tmp_path / "lm"))


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("stop", [2, 5])
def test_stopped_and_continued_equals_one_go(config, tmp_path, monkeypatch, stop):
    whole = lm.train(replace(config, out_dir=str(tmp_path / "whole")), MACHINE)
    with monkeypatch.context() as m:
        seen = iter(range(100))
        m.setattr(common.StopRequest, "agreed", lambda self: next(seen) >= stop)
        assert lm.train(config, MACHINE).step == stop
    resumed = lm.train(config, MACHINE)
    assert resumed.step == 8 and same(whole.lm.state_dict(), resumed.lm.state_dict())
    logs = [(tmp_path / name / "log.csv").read_text().splitlines() for name in ("whole", "lm")]
    for a, b in zip(*logs, strict=True):
        assert a.split(",")[:6] == b.split(",")[:6]  # all but the clock
    with pytest.raises(common.CheckpointError, match=r"n_embd: 32 -> 64"):
        lm.train(replace(config, n_embd=64), MACHINE)


def test_it_learns_its_training_texts_by_heart(config):
    """End to end: what was trained on is said again, code by code, from the text alone."""
    config = replace(config, n_embd=96, style_drop=0.0, max_steps=500, eval_every=1000, save_every=1000, log_every=50)
    lm.train(config, MACHINE)
    model, encode, state = lm.load_lm(Path(config.out_dir) / "ckpt.pt")
    dataset = data.Dataset(config.data_dir, "train")
    corpus = lm.Corpus(dataset, model.vocabulary, encode)
    short = np.argsort(corpus.lengths)[:4].tolist()
    got = lm.generate(
        model,
        [corpus.prompts[i] for i in short],
        [corpus.domains[i] for i in short],
        [200] * 4,
        torch.from_numpy(np.stack([dataset.style(i) for i in short])),
        lm.Sampling(0.0, repetition=1.0),
    )
    for i, codes in zip(short, got, strict=True):
        wanted = dataset.tokens(i)[:, 0]
        assert len(codes) == len(wanted) and (codes == wanted).mean() > 0.9
    assert state["rates"] == [50, 25]


def test_what_is_missing_is_named(config, tmp_path):
    with pytest.raises(DataError, match="nowhere is not prepared"):
        lm.train(replace(config, data_dir="nowhere"), MACHINE)
    with pytest.raises(DataError, match="batch_tokens=40 is below the longest clip"):
        lm.train(replace(config, batch_tokens=40), MACHINE)
    torch.save({"shape": 1}, tmp_path / "other.pt")
    with pytest.raises(common.CheckpointError, match="is not a checkpoint of lm.py"):
        lm.load_lm(tmp_path / "other.pt")


@pytest.mark.ddp
def test_two_ranks(config, tmp_path):
    keys = [f"--{k}={v}" for k, v in asdict(replace(config, out_dir=str(tmp_path / "two"))).items()]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "lm.py"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, *keys], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    state, _ = common.load(tmp_path / "two" / "ckpt.pt")
    assert state["step"] == 8
    # the first step's gradient is the mean of the two ranks' own
    dataset = data.Dataset(config.data_dir, "train")
    grads = []
    for rank in range(2):
        run = lm.new_run(config, dataset, MACHINE)
        corpus = lm.Corpus(dataset, run.lm.vocabulary, lm.text_encoder(config))
        ids = data.LengthBatchSampler(corpus.lengths, config, "batch_tokens", rank, 2).ids(0)
        torch.manual_seed(hash((config.seed, 0, rank)) % 2**63)
        losses = run.lm(corpus.batch(ids), config.style_drop)
        (losses["ce"] + config.coarse_weight * losses["coarse"]).backward()
        grads.append(torch.cat([p.grad.flatten() for p in run.lm.parameters()]))
    row = (tmp_path / "two" / "log.csv").read_text().splitlines()[1].split(",")
    assert float(row[lm.COLUMNS.index("grad_norm")]) == pytest.approx(
        float(((grads[0] + grads[1]) / 2).norm()), rel=1e-3
    )


class Unlike:
    """A split as preparation writes it, speech before sounds: styles of +-1 and of +-9."""

    meta = {"prepared_with": {"speech_codes": 16, "audio_codes": 12}}
    index, rates = {"domain": np.repeat([SPEECH, AUDIO], 300)}, [50, 25]

    def __len__(self) -> int:
        return 600

    def style(self, i: int) -> np.ndarray:
        return np.full((16, 10), (-1) ** i * (1 if i < 300 else 9), np.float16)


def test_styles_are_scaled_by_both_domains(tmp_path):
    run = lm.new_run(replace(SMALL, data_dir=str(tmp_path)), Unlike(), MACHINE)
    torch.testing.assert_close(run.lm.style_scale, torch.full((10,), 1 / np.sqrt((1 + 81) / 2)), rtol=1e-3, atol=0)
