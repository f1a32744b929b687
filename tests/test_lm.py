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
import transformers
from conftest import same
from test_train import MACHINE, ROOT, stopped
from torch.utils._python_dispatch import TorchDispatchMode

import audio
import common
import data
import lm
from common import AUDIO, SPEECH, DataError

SIZE = dict(lm="small", n_layer=2, n_head=2, n_embd=32, coarse_clusters=4, device="cpu", dtype="float32")
STEPS = dict(max_steps=8, batch_tokens=1200, batch_size=6, learning_rate=3e-3, style_drop=0.5)
SMALL = lm.LMConfig(**SIZE, **STEPS, log_every=1, eval_every=4, eval_clips=2, save_every=3)
V = lm.Vocabulary(SMALL, (16, 12))


class Clips:
    """A split as data.Dataset gives it: clips of `domains` with random codes, and `styles`, a (16, 10) each."""

    meta, codes = {"token_rates": [50, 25]}, V.codes

    def __init__(self, rng: np.random.Generator, domains: list[int], styles: np.ndarray):
        codes = [rng.integers(0, V.codes[d], (int(rng.integers(3, 12)), 1)) for d in domains]
        self.index = {"domain": np.array(domains), "tokens": np.array(list(map(len, codes)))}
        self.tokens, self.style = codes.__getitem__, styles.__getitem__

    def __len__(self) -> int:
        return len(self.index["domain"])

    def name_and_text(self, i: int) -> tuple[str, str]:
        return f"clip{i}", "ab: cde"[: 3 + i % 4]


def random_batch(rng: np.random.Generator) -> lm.Sequences:
    clips = Clips(rng, [SPEECH, AUDIO] * 2, rng.normal(size=(4, 16, 10)))
    return lm.Corpus(clips, V).batch(np.arange(4))


def small_lm(seed: int = 0) -> lm.LM:
    torch.manual_seed(seed)
    net, vocabulary = lm.build_net(SMALL, V.codes)
    assert vocabulary.text == 256
    model = lm.LM(SMALL, net, V, lm.code_clusters(replace(SMALL, coarse="uniform"), V.codes), 10)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(8)  # far from uniform, so that orders of logits are plain
    return model.eval()


def test_vocabulary_and_prompts_are_those_of_the_paper():
    ids = [i for part in (range(256), V.specials, V.styles, *V.code_ids) for i in part]
    assert ids == list(range(V.size)) and V.size == 256 + 4 + 16 + 16 + 12
    (tag, des, at, end), styles = V.specials, list(range(260, 276))
    assert V.prompt(SPEECH, "hi") == [104, 105, *styles, at]
    assert V.prompt(AUDIO, "dog: it") == [tag, *b"dog", des, *b"it", *styles, at]
    assert V.prompt(AUDIO, "dog") == [tag, *b"dog", des, *styles, at]
    assert end == V.end


def test_sequences_mark_codes_and_end_alone(rng):
    batch = random_batch(rng)
    S = batch.ids.shape[1]
    for b, (ids, d) in enumerate(zip(batch.ids.tolist(), batch.domain.tolist(), strict=True)):
        places = [k - b * S for k in batch.target.tolist() if k // S == b]
        assert places == list(range(ids.index(V.specials[2]) + 1, places[-1] + 1))
        assert all(ids[k] in V.code_ids[d] for k in places[:-1]) and all(i == V.end for i in ids[places[-1] :])


def test_clusters_of_a_codebook_and_of_none(rng, tmp_path, capsys):
    centres, group = rng.normal(size=(5, 6)) * 100, rng.permutation(np.arange(40) % 5)
    np.save(tmp_path / "speech_codebook.npy", centres[group] + rng.normal(size=(40, 6)))
    config = replace(SMALL, data_dir=str(tmp_path), coarse_clusters=5)
    found = lm.code_clusters(config, (40, 10)).tolist()
    # 5 far groups are found, whatever their order
    assert len(set(zip(group.tolist(), found[:40], strict=True))) == 5 and set(found[:40]) == set(range(5))
    assert found[40:] == [5, 5, 6, 6, 7, 7, 8, 8, 9, 9] and "audio: no codebook in" in capsys.readouterr().out
    uniform = lm.code_clusters(replace(config, coarse="uniform", coarse_clusters=3), (10, 2))
    assert uniform.tolist() == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 4]


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
    ce, coarse, target = [], [], torch.zeros(batch.ids.numel(), dtype=torch.bool)
    target = target.index_fill(0, batch.target, True).view_as(batch.ids)
    for b in range(len(batch.ids)):
        end = int(target[b].nonzero().max()) + 1
        x = model.embed(batch.ids[b : b + 1, :end], batch.style[b : b + 1], torch.tensor([True]))
        h = model.net.model(inputs_embeds=x)[0][0].double()
        log_p = (h @ model.net.lm_head.weight.double().T).log_softmax(-1)
        rough = (h @ model.coarse.weight.double().T + model.coarse.bias.double()).log_softmax(-1)
        for s in range(1, end):
            token = int(batch.ids[b, s])
            if target[b, s]:
                ce.append(-log_p[s - 1, token])
            if target[b, s] and token != V.end:
                coarse.append(-rough[s - 1, int(model.clusters[token - V.code_ids[SPEECH].start])])
    losses = model(batch)
    assert float(losses["ce"]) == pytest.approx(float(torch.stack(ce).mean()), rel=1e-4)
    assert float(losses["coarse"]) == pytest.approx(float(torch.stack(coarse).mean()), rel=1e-4)
    each = model(batch, each=True)["ce"] * target.sum(1)
    assert float(each.sum() / target.sum()) == pytest.approx(float(losses["ce"]), rel=1e-5)


def test_cross_entropy_in_parts_is_the_plain_formula(rng, monkeypatch):
    """Loss and gradients, logits of 5 targets at a time, against all logits in float64; none of them is kept."""
    model, batch = small_lm().double(), random_batch(rng)
    batch, saved = batch._replace(style=batch.style.double()), []
    logits = model.net(inputs_embeds=model.embed(batch.ids, batch.style, torch.ones(4, dtype=torch.bool))).logits
    places, wanted = batch.target - 1, batch.ids.flatten()[batch.target]
    plain = -logits.flatten(0, 1).log_softmax(-1)[places, wanted].mean()
    params = [*model.net.parameters(), model.style.weight]
    monkeypatch.setattr(lm, "LOGITS", 5 * V.size)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.shape) or x, lambda x: x):
        ce = model(batch)["ce"]
    assert ce.item() == pytest.approx(plain.item(), rel=1e-6) and all(shape[-1:] != (V.size,) for shape in saved)
    got, expected = (torch.autograd.grad(x, params) for x in (ce, plain))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


class Unwaiting(TorchDispatchMode):
    """Fails where the host would wait for what a GPU computes: a value that is read, a shape that depends on one."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        places = args[1] if name.startswith("index") and isinstance(args[1], (list, tuple)) else []
        by_mask = any(x is not None and x.dtype == torch.bool for x in places)
        assert not by_mask and name not in ("_local_scalar_dense", "nonzero", "masked_select"), name
        return function(*args, **(kwargs or {}))


def test_a_training_step_never_waits_for_the_device(rng, monkeypatch):
    monkeypatch.setattr(transformers.masking_utils, "find_packed_sequence_indices", lambda _: None)  # which does
    batch, model = random_batch(rng), small_lm().train()
    model.config = replace(SMALL, code_noise=0.5, dropout=0.1)
    optimizer = common.make_optimizer(model, model.config)
    with Unwaiting():
        losses = model(batch, style_drop=0.5)
        (losses["ce"] + losses["coarse"]).backward()
        moved = common.clip_and_step(model, optimizer, 0, model.config)
    assert 0 < moved["grad_norm"] < 1e6


@pytest.mark.parametrize("tied", [True, False])
def test_a_pretrained_lm_grows_by_rows_at_the_mean(tmp_path, tied):
    audio.torchaudio()
    size = dict(vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    size |= dict(num_key_value_heads=2, tie_word_embeddings=tied)
    old = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**size))
    old.save_pretrained(tmp_path)
    net, vocabulary = lm.build_net(replace(SMALL, lm=str(tmp_path), text="bytes"), (6, 4))
    assert vocabulary.text == 50 and vocabulary.size == net.config.vocab_size == 80
    for table in ("get_input_embeddings", "get_output_embeddings"):
        new, before = getattr(net, table)().weight, getattr(old, table)().weight
        torch.testing.assert_close(new[:50], before)
        torch.testing.assert_close(new[50:], before.mean(0).expand(30, -1))
    with pytest.raises(ValueError, match="--lm=small needs no weights"):
        lm.build_net(replace(SMALL, lm=str(tmp_path / "none")), V.codes)


TEXTS = [(SPEECH, "hello"), (AUDIO, "a: b"), (SPEECH, "x")]


def naive_greedy(model, domain, text, limit, style, guidance, repetition) -> list[int]:
    """One clip, no cache, no padding: a whole pass for every code; repetition looks 5 codes back."""
    out: list[int] = []
    while len(out) < limit:
        ids = torch.tensor([V.prompt(domain, text) + out])
        embedded = [model.embed(ids, style[None], torch.tensor([kept])) for kept in (True, False)]
        c, u = (model.net.lm_head(model.net.model(inputs_embeds=x)[0][0, -1]) for x in embedded)
        score = u + guidance * (c - u) if guidance != 1 else c
        for t in set(out[-5:]):
            score[t] -= math.log(repetition)
        token = max([*V.code_ids[domain], *([V.end] if out else [])], key=lambda t: float(score[t]))
        if token == V.end:
            break
        out.append(token)
    return [t - V.code_ids[domain].start for t in out]


@pytest.mark.parametrize("guidance,repetition", [(1.0, 1.0), (1.0, 3.0), (2.5, 1.5)])
@torch.no_grad()
def test_cached_batch_equals_single_plain_passes(rng, guidance, repetition):
    model, styles = small_lm(int(rng.integers(1000))), torch.from_numpy(rng.normal(size=(3, 16, 10))).float()
    how, limits = {"guidance": guidance, "repetition": repetition}, [15, 8, 11]
    got = lm.generate(model, TEXTS, limits, styles, temperature=0, window=5, **how)
    for codes, text, limit, style in zip(got, TEXTS, limits, styles, strict=True):
        assert codes.tolist() == naive_greedy(model, *text, limit, style, **how)


def test_codes_stay_in_their_codebook_and_end(rng):
    model = small_lm()
    with torch.no_grad():
        model.net.get_output_embeddings().weight[:300] *= 20  # text and specials are far likelier than codes
    runs = []
    for seed in (0, 1, 2, 3, 4, 4):
        got = lm.generate(model, TEXTS, [9, 9, 2], temperature=1.5, top_p=1.0, seed=seed)
        for codes, (d, _), n in zip(got, TEXTS, (9, 9, 2), strict=True):
            assert 0 < len(codes) <= n and codes.min() >= 0 and codes.max() < V.codes[d]
        runs.append([codes.tolist() for codes in got])
    assert runs[4] == runs[5]


@pytest.mark.parametrize("temperature,top_p", [(1.0, 0.9), (1.0, 0.4), (0.5, 1.0)])
@torch.no_grad()
def test_codes_follow_the_truncated_distribution(temperature, top_p):
    """The first code of 4000 clips of one text, against the probabilities of a plain pass in float64, by hand."""
    model = small_lm()
    logits = model.net(torch.tensor([V.prompt(SPEECH, "a")])).logits[0, -1, V.code_ids[SPEECH]].double()
    p, order = (logits / temperature).softmax(0).sort(descending=True)
    kept = 1 + sum(bool(p[: k + 1].sum() < top_p) for k in range(len(p) - 1))
    wanted = torch.zeros(len(p)).double().index_copy(0, order[:kept], p[:kept] / p[:kept].sum())
    got = lm.generate(model, [(SPEECH, "a")] * 4000, [1] * 4000, temperature=temperature, top_p=top_p, repetition=1.0)
    share = np.bincount(np.concatenate(got), minlength=len(p)) / 4000
    assert share == pytest.approx(wanted.numpy(), abs=0.035)  # 4.4 deviations of a half


@pytest.fixture
def config(tiny_config, tmp_path) -> lm.LMConfig:
    return replace(SMALL, data_dir=tiny_config.data_dir, out_dir=str(tmp_path / "lm"))


@pytest.mark.parametrize("stop", [2, 5])
def test_stopped_and_continued_equals_one_go(config, tmp_path, monkeypatch, stop):
    whole = lm.train(replace(config, out_dir=str(tmp_path / "whole")), MACHINE)
    assert stopped(monkeypatch, stop, config, lm.train).step == stop
    resumed = lm.train(config, MACHINE)
    assert resumed.step == 8 and same(whole.lm.state_dict(), resumed.lm.state_dict())
    a, b = (common.read_csv(tmp_path / name / "log.csv") for name in ("whole", "lm"))
    clock = {"tokens_per_s": "", "seconds": ""}
    assert len(a) == 8 and [row | clock for row in a] == [row | clock for row in b]
    with pytest.raises(common.CheckpointError, match=r"n_embd: 32 -> 64"):
        lm.train(replace(config, n_embd=64), MACHINE)


def test_it_learns_its_training_texts_by_heart(config):
    """End to end: what was trained on is said again, code by code, from the text alone."""
    config = replace(config, n_embd=96, style_drop=0.0, max_steps=500, eval_every=1000, save_every=1000, log_every=50)
    lm.train(config, MACHINE)
    model, state = lm.load_lm(Path(config.out_dir) / "ckpt.pt")
    dataset = data.Dataset(config.data_dir, "train")
    corpus = lm.Corpus(dataset, model.vocabulary)
    short = np.argsort(corpus.lengths)[:4]
    texts = [(corpus.domains[i], dataset.name_and_text(i)[1]) for i in short]
    got = lm.generate(model, texts, [200] * 4, corpus.batch(short).style, temperature=0, repetition=1.0)
    for i, codes in zip(short, got, strict=True):
        wanted = dataset.tokens(i)[:, 0]
        assert len(codes) == len(wanted) and (codes == wanted).mean() > 0.9
    assert state["rates"] == [50, 25]


def test_styles_are_asked_for_where_they_are_not(config, monkeypatch):
    """By a process of every rank, whose exit code ends lm.py; where they are there, none is started."""
    asked = []
    monkeypatch.setattr(common, "run_script", lambda *words: asked.append(words) or 3)
    assert lm.main(replace(config, max_steps=1)) == 0 and not asked
    (Path(config.data_dir) / "styles.json").unlink()
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        assert lm.main(config) == 3 and asked[rank:] == [("prepare", f"--styles={config.data_dir}")]


def test_what_is_missing_is_named(config):
    with pytest.raises(DataError, match="nowhere is not prepared; python -m prepare CONFIG makes it"):
        lm.train(replace(config, data_dir="nowhere"), MACHINE)
    with pytest.raises(DataError, match="batch_tokens=40 is below the longest clip"):
        lm.train(replace(config, batch_tokens=40), MACHINE)


@pytest.mark.ddp
def test_two_ranks(config, tmp_path):
    keys = [f"--{k}={v}" for k, v in asdict(replace(config, out_dir=str(tmp_path / "two"))).items()]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "lm.py"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, *keys], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert common.load(tmp_path / "two" / "ckpt.pt")[0]["step"] == 8
    # the first step's gradient is the mean of the two ranks' own
    grads = []
    for rank in range(2):
        run, corpus, _ = lm.open_run(config, MACHINE)
        ids = data.LengthBatchSampler(corpus.lengths, config, "batch_tokens", rank, 2).ids(0)
        torch.manual_seed(hash((config.seed, 0, rank)) % 2**63)
        losses = run.lm(corpus.batch(ids), config.style_drop)
        (losses["ce"] + config.coarse_weight * losses["coarse"]).backward()
        grads.append(torch.cat([p.grad.flatten() for p in run.lm.parameters()]))
    norm = float(common.read_csv(tmp_path / "two" / "log.csv")[0]["grad_norm"])
    assert norm == pytest.approx(float(((grads[0] + grads[1]) / 2).norm()), rel=1e-3)


def test_styles_are_scaled_by_both_domains(tmp_path, rng, monkeypatch):
    """Of a split as preparation writes it, speech before sounds: styles of +-1 and of +-9."""
    sign = np.where(np.arange(600) < 300, 1.0, 9.0) * (-1.0) ** np.arange(600)
    clips = Clips(rng, [SPEECH] * 300 + [AUDIO] * 300, sign[:, None, None].repeat(16, 1).repeat(10, 2))
    monkeypatch.setattr(data, "Dataset", lambda data_dir, split: clips)
    run, _, _ = lm.open_run(replace(SMALL, data_dir=str(tmp_path), out_dir=str(tmp_path)), MACHINE)
    torch.testing.assert_close(run.lm.style_scale, torch.full((10,), 1 / np.sqrt((1 + 81) / 2)), rtol=1e-3, atol=0)
