"""data.py: what is written comes back, an impulse stays under its frames, pure batches, and which folder fits."""

import itertools
import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import write_folder

import audio
import data
from common import AUDIO, SPEECH, DataError
from prepare.__main__ import Prepared
from prepare.corpora import Clip
from train import Config

RATES = [50, 25]


def test_tokens_under_frames():
    assert data.crop_unit(RATES) == 15  # 15 frames are 160 ms: 8 and 4 tokens
    for seconds, rate in itertools.product((1, 2, 10), RATES):
        assert abs(data.token_count(round(seconds * 24000 / 256), rate) - rate * seconds) <= 1
    assert data.token_count(1, 50) == data.token_count(1, 25) == 1
    assert data.token_span(0, 100, 50, 53) == (0, 53)
    assert data.token_span(30, 30, 50, 53) == (16, 16)
    assert data.token_span(30, 30, 25, 27) == (8, 8)
    assert data.token_span(90, 10, 50, 53) == (48, 5)  # what is left
    assert data.token_span(90, 30, 50, 53) == (48, 5)  # never beyond the clip's last token


def prepared(path: Path, frames: list[int], domains: list[int], tokens=None, mels=None, size=1000) -> data.Dataset:
    """A training split of clips of the given lengths, `size` clips a shard; the first clip has a waveform."""
    rng, clips = np.random.default_rng(0), []
    for i, (T, d) in enumerate(zip(frames, domains, strict=True)):
        mel = (rng.normal(-3, 2, (T, 100)) if mels is None else mels[i]).astype(np.float16)
        wav = np.linspace(-0.5, 0.5, 256)
        codes = rng.integers(0, 16, data.token_count(T, RATES[d])) if tokens is None else tokens[i]
        codes = codes if codes.ndim == 2 else codes[:, None]
        clip = Clip(f"n{i}", b"", f"text of\nclip {i}", d, "")
        vectors = np.full((4, 6)[d], i + 0.5), np.full((16, 6), i)
        clips.append(Prepared(clip, mel, wav, 24000, i == 0, codes, *vectors))
    meta = {"teachers": [["whisper", 4], ["aisfx", 6]], "token_rates": RATES, "streams": clips[0].tokens.shape[1]}
    meta["prepared_with"] = {"speech_codes": 99, "audio_codes": 99}
    write_folder(path, {"train": clips}, meta, size)
    return data.Dataset(path, "train")


@pytest.mark.parametrize("domain", [SPEECH, AUDIO])
def test_an_impulse_stays_under_its_frames(tmp_path, rng, domain):
    """One token marked in a clip, and the mel frames it lasts: after any crop and the model's stretch they coincide."""
    from model import stretch

    T = 600
    N, rate = data.token_count(T, RATES[domain]), RATES[domain]
    k = int(rng.integers(N // 3, N // 2))
    centre = (k + 0.5) / rate * audio.FRAME_RATE - 0.5  # in frames
    mel = -((np.arange(T) - centre) ** 2)[:, None].clip(None, 1000) * np.ones(100)
    codes = np.zeros(N, np.int64)
    codes[k] = 1
    dataset = prepared(tmp_path / "p", [T, 9], [domain, 1 - domain], [codes, codes[:1]], [mel, mel[:9]])
    unit = data.crop_unit(RATES)
    for _ in range(30):
        length = int(rng.integers(40, 300))
        low, high = max(0, int(centre) - length + 20), min(T - length, int(centre) - 20)
        first = int(rng.integers(low // unit + 1, high // unit + 1)) * unit if high // unit > low // unit else 0
        length = length if first else T
        batch = dataset.batch(np.array([0]), np.array([[first, length]]))
        assert batch.frames.tolist() == [length] and batch.mel.shape == (1, length, 100)
        heard = batch.mel[0, :, 0].argmax().item()
        x = stretch(batch.tokens[..., None].double(), batch.token_len, batch.frames, length)[0, :, 0]
        seen = (x * torch.arange(length)).sum().item() / x.sum().item()  # centre of mass of the stretched impulse
        # a token count is rounded, so the stretch is off by up to half a token at the clip's far end
        assert abs(seen - heard) <= 0.5 + 0.5 / rate * audio.FRAME_RATE + 0.1, (first, length)
        assert batch.token_len.tolist() == [data.token_span(first, length, rate, N)[1]]
    with_first = dataset.batch(np.array([0]), np.array([[unit, 300]])).tokens[0].tolist()
    assert with_first == codes[unit * rate * 256 // 24000 :][: len(with_first)].tolist()


def test_dataset_gives_back_what_was_written(tmp_path, rng):
    frames, domains = [50, 80, 33, 61], [0, 1, 0, 1]
    mels = [rng.normal(-3, 2, (T, 100)).astype(np.float16) for T in frames]
    tokens = [rng.integers(0, 99, data.token_count(T, RATES[d])) for T, d in zip(frames, domains, strict=True)]
    dataset = prepared(tmp_path / "p", frames, domains, tokens, mels, size=3)
    assert len(dataset) == 4 and dataset.meta["train"]["clips"] == [2, 2]
    assert dataset.meta["train"]["seconds"] == pytest.approx([83 * 256 / 24000, 141 * 256 / 24000])
    assert dataset.name_and_text(2) == ("n2", "text of\nclip 2")
    assert [dataset.wav_path(i).exists() for i in range(4)] == [True, False, False, False]
    assert [dataset.style(i).tolist() for i in range(4)] == [np.full((16, 6), i).tolist() for i in range(4)]
    np.testing.assert_allclose(audio.read(dataset.wav_path(0), 24000), np.linspace(-0.5, 0.5, 256), atol=1e-4)
    ids = np.array([3, 0, 2])
    batch = dataset.batch(ids, prompts=np.array([7, 0, 3]))
    assert batch.ids.tolist() == [3, 0, 2] and batch.prompt.tolist() == [7, 0, 3] and batch.domain.tolist() == [1, 0, 0]
    assert batch.mel.shape == (3, 61, 100) and batch.mel.dtype == torch.float32
    for b, i in enumerate(ids):
        T, N = frames[i], len(tokens[i])
        np.testing.assert_array_equal(batch.mel[b, :T].numpy(), mels[i].astype(np.float32))
        np.testing.assert_array_equal(batch.tokens[b, :N].numpy(), tokens[i])
        assert not batch.mel[b, T:].any() and not batch.tokens[b, N:].any()
        assert batch.frames[b] == T and batch.token_len[b] == N
    # whose teacher it is not gets zeros
    assert batch.teacher["whisper"].tolist() == [[0] * 4, [0.5] * 4, [2.5] * 4]
    assert batch.teacher["aisfx"].tolist() == [[3.5] * 6, [0] * 6, [0] * 6]
    moved = batch.to("meta")
    assert moved.mel.device.type == moved.ids.device.type == moved.teacher["aisfx"].device.type == "meta"
    assert moved.padded


def test_a_split_may_lack_a_domain(tmp_path):
    """A small corpus can have no held-out clip of one domain; the other's still make batches."""
    batch = prepared(tmp_path / "p", [50, 80], [SPEECH, SPEECH]).batch(np.array([0, 1]))
    assert batch.teacher["aisfx"].tolist() == [[0] * 6] * 2


def test_two_streams(tmp_path):
    codes = [np.arange(n)[:, None] + [0, 1000] for n in (27, 21)]
    batch = prepared(tmp_path / "p", [50, 80], [0, 1], codes).batch(np.array([0, 1]))
    assert batch.tokens.shape == (2, 27, 2) and batch.token_len.tolist() == [27, 21]
    assert (batch.tokens[0, :, 1] - batch.tokens[0, :, 0] == 1000).all() and not batch.tokens[1, 21:].any()


def test_without_styles_the_error_names_the_command(tmp_path):
    dataset = prepared(tmp_path / "p", [50, 80], [0, 1])
    assert data.is_prepared(dataset.root, "styles")
    (dataset.root / "styles.json").unlink()
    (dataset.path(0) / "style.npy").unlink()
    assert not data.is_prepared(dataset.root, "styles")
    with pytest.raises(DataError, match=rf"python -m prepare --styles={dataset.root}"):
        data.Dataset(dataset.root, "train").style(1)


def test_few_files_stay_open_whatever_the_number_of_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "OPEN_SHARDS", 3)
    dataset = prepared(tmp_path / "p", [9 + i for i in range(20)], [i % 2 for i in range(20)], size=1)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        assert [dataset.batch(np.array([i])).frames.item() for i in range(20)] == [9 + i for i in range(20)]
    assert len(os.listdir("/proc/self/fd")) - before <= 3 * 6


@pytest.fixture
def many(tmp_path, rng) -> data.Dataset:
    frames = (np.exp(rng.normal(4.6, 0.6, 300)).clip(20, 400)).astype(int).tolist()
    return prepared(tmp_path / "many", frames, rng.integers(0, 2, 300).tolist(), size=128)


BATCHES = Config(batch_frames=1500, batch_size=16, seed=4, trim=0.0)


def test_every_clip_once_an_epoch(many):
    batches = data.TrainingBatches(many, BATCHES)
    n, seen = batches.steps_per_epoch, []
    for epoch in range(3):
        ids = [batches.ids(s).tolist() for s in range(epoch * n, (epoch + 1) * n)]
        assert sorted(i for batch in ids for i in batch) == list(range(300))
        seen.append(ids)
    assert sorted(map(sorted, seen[0])) != sorted(map(sorted, seen[1]))  # new neighbours, not only a new order
    assert [len(x) for x in seen[0]] != sorted(len(x) for x in seen[0])  # not from short to long


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_batches_are_a_function_of_seed_and_step(many, threads):
    """In any order, from any object, prepared ahead by however many threads."""
    plain, other = (data.TrainingBatches(many, replace(BATCHES, seed=seed)) for seed in (4, 5))
    ahead = data.Prefetcher(data.TrainingBatches(many, BATCHES), threads)
    for step in (7, *range(12), 60, 61, 3):  # of several epochs
        a, b = plain(step), ahead(step)
        assert torch.equal(a.ids, b.ids) and torch.equal(a.mel, b.mel) and torch.equal(a.prompt, b.prompt)
    assert len(ahead.pending) <= 4 * threads
    assert any(plain.ids(s).tolist() != other.ids(s).tolist() for s in range(5))


def test_the_expected_clips_of_a_batch_are_those_of_an_epoch(many):
    batches, domain = data.TrainingBatches(many, BATCHES), many.index["domain"]
    groups = [domain[batches.ids(step)] for step in range(batches.steps_per_epoch)]
    expected = [np.mean([(g == d).sum() for g in groups]) for d in (SPEECH, AUDIO)]
    assert batches.expected_clips(domain) == pytest.approx(expected)
    assert batches.expected_clips(np.zeros(300, np.int8))[AUDIO] == 0  # a corpus may lack a domain


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_an_epoch_without_overlap(many, world):
    ranks = [data.TrainingBatches(many, BATCHES, r, world) for r in range(world)]
    n = ranks[0].steps_per_epoch
    ids = [i for step in range(n, 2 * n) for r in ranks for i in r.ids(step).tolist()]
    assert len(ids) == len(set(ids)) and len(ids) >= 300 - (world - 1) * BATCHES.batch_size
    assert len({r.steps_per_epoch for r in ranks}) == 1


def test_the_frame_budget_is_kept_and_padding_is_low(many):
    batches = data.TrainingBatches(many, BATCHES)
    groups = [batches.lengths[batches.ids(step)] for step in range(2 * batches.steps_per_epoch)]
    assert all(len(g) <= 16 and len(g) * g.max() <= 1500 for g in groups)
    padding, waste = sum((g.max() - g).sum() for g in groups[: batches.steps_per_epoch]), batches.waste()[0]
    assert waste == pytest.approx(padding / (padding + batches.lengths.sum())) and waste < 0.12
    order = np.random.default_rng(0).permutation(300)  # batches of as many clips without bucketing waste far more
    groups = [batches.lengths[order[a:b]] for a, b in zip(batches.edges, batches.edges[1:], strict=False)]
    assert 1 - sum(g.sum() for g in groups) / sum(len(g) * g.max() for g in groups) > 2 * waste


def test_a_budget_below_the_longest_clip(many):
    longest = int(many.index["frames"].max())
    with pytest.raises(DataError, match=f"batch_frames={longest - 1} is below the longest clip \\({longest}\\)"):
        data.TrainingBatches(many, replace(BATCHES, batch_frames=longest - 1))
    data.TrainingBatches(many, replace(BATCHES, batch_frames=longest))
    data.TrainingBatches(many, replace(BATCHES, batch_frames=200, crop_frames=200))  # cropped, they fit


def test_crops_and_prompts(many):
    config = replace(BATCHES, crop_frames=60, prompt_max=0.3, prompt_drop=0.4, batch_size=32)
    batches = data.TrainingBatches(many, config)
    frames, firsts, prompts = many.index["frames"], set(), []
    for step in range(3 * batches.steps_per_epoch):
        batch = batches(step)
        for b, i in enumerate(batch.ids.tolist()):
            assert batch.frames[b] == min(60, frames[i])
            assert 0 <= batch.prompt[b] <= 0.3 * batch.frames[b]
            prompts.append(batch.prompt[b].item() / batch.frames[b].item())
            if frames[i] >= 150:  # where in the clip is this crop?
                whole = many.mel(i)[:, 0].astype(np.float32)
                starts = [s for s in range(frames[i] - 59) if (whole[s : s + 60] == batch.mel[b, :60, 0].numpy()).all()]
                assert len(starts) == 1 and starts[0] % data.crop_unit(RATES) == 0
                firsts.add(starts[0])
    assert len(firsts) > 5
    dropped = np.mean(np.array(prompts) == 0)
    assert 0.35 < dropped < 0.5  # 40 %, and those whose share rounds down to nothing


def test_clips_are_trimmed_to_the_shortest_of_like_length(many):
    """No frame of padding where no clip loses more than the share asked; a multiple of 16 where it costs an eighth."""
    batches, frames = data.TrainingBatches(many, replace(BATCHES, trim=0.05)), many.index["frames"]
    cuts, lost = set(), 0
    for step in range(batches.steps_per_epoch):
        batch = batches(step)
        whole, taken = frames[batch.ids.numpy()], batch.frames.numpy()
        like = whole.min() >= 0.95 * whole.max()
        most = whole.min() if like else whole.max()
        most = most // 16 * 16 if most % 16 <= most / 8 else most
        assert (taken == np.minimum(whole, most)).all()
        assert batch.padded == bool((taken < batch.mel.shape[1]).any()) and not (like and batch.padded)
        assert (batch.prompt.numpy() <= 0.3 * taken).all()
        cuts.add(like)
        lost += whole.sum() - taken.sum()
    assert cuts == {False, True} and batches.waste()[1] == pytest.approx(lost / frames.sum())
    assert data.TrainingBatches(many, BATCHES).waste()[1] == 0
    assert batches.waste()[0] < data.TrainingBatches(many, BATCHES).waste()[0]


@pytest.mark.parametrize("target", ["clip", "shuffled"])
@pytest.mark.parametrize("norm", ["raw", "centred", "zscore"])
def test_targets_are_those_of_the_clip_or_of_another_over_the_domains_statistics(many, target, norm):
    """Against float64 over all vectors at once; BiT-C's own vectors stay. Clip i's vector is i + 0.5 throughout."""
    config, domain = replace(BATCHES, align_target=target, align_norm=norm), many.index["domain"]
    batches, plain = (data.TrainingBatches(many, c) for c in (config, replace(BATCHES, align="none")))
    giver = {}
    again = data.TrainingBatches(many, config, rank=0, world=1)
    for step in range(2 * batches.steps_per_epoch):  # each clip twice
        batch, without = batches(step), plain(step)
        assert torch.equal(batch.mel, without.mel) and not without.target
        assert batch.to("meta").target["aisfx"].device.type == "meta"
        for d, name in enumerate(("whisper", "aisfx")):
            own, x = batch.domain == d, batch.target[name].double()
            assert torch.equal(batch.teacher[name], without.teacher[name]) and not x[~own].any()
            values = np.flatnonzero(domain == d) + 0.5
            mean, std = (0, 1) if norm == "raw" else (values.mean(), values.std() if norm == "zscore" else 1)
            whose = x[own] * std + mean - 0.5
            torch.testing.assert_close(whose, whose.round()[:, :1].expand(whose.shape), atol=1e-3, rtol=0)
            for i, j in zip(batch.ids[own].tolist(), whose[:, 0].round().long().tolist(), strict=True):
                assert domain[j] == d and giver.setdefault(i, j) == j
        assert torch.equal(again(step).target["whisper"], batch.target["whisper"])
    if giver:  # each vector has one clip that learns it: its own, or never
        assert sorted(giver) == sorted(giver.values()) == list(range(300))
        assert sum(i == j for i, j in giver.items()) == (300 if target == "clip" else 0)
    if target == "shuffled":
        seeds = [data.other_clips(domain, seed).tolist() for seed in (4, 4, 5)]
        assert seeds[0] == seeds[1] != seeds[2]


def store_features(dataset: data.Dataset, rng, rate: float) -> list[np.ndarray]:
    """Random teacher features in every shard; returns each clip's (N, E)."""
    rows = [None] * len(dataset)
    for shard, d in itertools.product(range(len(dataset.meta["train"]["shards"])), (SPEECH, AUDIO)):
        clips = np.flatnonzero((dataset.index["shard"] == shard) & (dataset.index["domain"] == d))
        for i in clips:
            size = max(1, round(int(dataset.index["frames"][i]) * 256 / 24000 * rate)), (4, 6)[d]
            rows[i] = rng.normal(3, 2, size).astype(np.float16)
        stored = np.concatenate([np.zeros((0, (4, 6)[d]), np.float16), *(rows[i] for i in clips)])
        np.save(dataset.path(shard) / f"features_{d}_{rate:g}.npy", stored)
    part = f"features_{rate:g}"
    assert not data.is_prepared(dataset.root, part)
    (dataset.root / f"{part}.json").write_text("{}")
    assert data.is_prepared(dataset.root, part) and not data.is_prepared(dataset.root, f"features_{2 * rate:g}")
    return rows


@pytest.mark.parametrize("target", ["crop", "frames"])
@pytest.mark.parametrize("norm", ["raw", "centred", "zscore"])
def test_targets_of_a_crop_are_the_stored_features_under_it(many, rng, target, norm):
    """In float64, the window found again in the mel. A row lasts 7.5 frames, a crop begins at a multiple of 15."""
    rows, domain = store_features(many, rng, 12.5), many.index["domain"]
    config = replace(BATCHES, crop_frames=60, align_target=target, align_norm=norm, batch_size=8)
    batches = data.TrainingBatches(many, config)
    for step in range(batches.steps_per_epoch):
        batch = batches(step)
        moved = batch.map(torch.clone)
        assert (moved.target_len is None) == (target == "crop")
        for b, i in enumerate(batch.ids.tolist()):
            d, T = domain[i], int(batch.frames[b])
            name, other = ("whisper", "aisfx")[d], ("aisfx", "whisper")[d]
            mel, seen = many.mel(i)[:, 0].astype(np.float32), batch.mel[b, :T, 0].numpy()
            first = next(s for s in range(0, len(mel) - T + 1, 15) if (mel[s : s + T] == seen).all())
            x = rows[i].astype(np.float64)[int(first / 7.5) :][: max(1, round(T / 7.5))]
            all_rows = [r.astype(np.float64) for r, of in zip(rows, domain, strict=True) if of == d]
            over = np.concatenate(all_rows) if target == "frames" else np.stack([r.mean(0) for r in all_rows])
            over = x if (target, norm) == ("frames", "zscore") else over
            wanted = x if target == "frames" else x.mean(0)
            wanted = wanted - over.mean(0) * (norm != "raw")
            wanted = wanted / np.maximum(over.std(0), 1e-6) if norm == "zscore" else wanted
            got = moved.target[name][b]
            if target == "frames":
                assert moved.target_len[b] == len(x) and not got[len(x) :].any()
                got = got[: len(x)]
            np.testing.assert_allclose(got, wanted, atol=1e-4)
            assert not moved.target[other][b].any()
    for changes in ({"align_teacher": "self"}, {"align": "none"}):
        assert not data.TrainingBatches(many, replace(config, **changes))(0).target


def test_one_clip_cannot_be_shuffled():
    with pytest.raises(DataError, match="one audio clip to train on"):
        data.other_clips(np.array([0, 0, 1]), 0)
    assert data.other_clips(np.array([0, 0]), 0).tolist() == [1, 0]


def test_fixed_batch(many):
    a, b = data.fixed_batch(many, 5, 1, 90), data.fixed_batch(many, 5, 1, 90)
    assert torch.equal(a.ids, b.ids) and torch.equal(a.mel, b.mel)
    assert a.domain.tolist() == [0] * 5 + [1] * 5 and len(set(a.ids.tolist())) == 10
    assert a.frames.tolist() == [min(90, many.index["frames"][i]) for i in a.ids.tolist()]
    np.testing.assert_array_equal(a.mel[0, 0].numpy(), many.mel(a.ids[0].item())[0].astype(np.float32))
    assert not a.prompt.any()
    assert a.ids.tolist() != data.fixed_batch(many, 5, 2, 90).ids.tolist()


def test_batches_of_librispeech_like_lengths(rng):
    """Utterances of 2 to 17 s, most of them 12 to 16, in batches of the paper's budget: little padding, few shapes, and
    eight ranks that wait little for the one with the most work, by the operations of unified_b's weights."""
    seconds = np.concatenate([rng.normal(14, 1.5, 20000), rng.uniform(2, 16, 10000)]).clip(1.5, 17)
    dataset = SimpleNamespace(index=np.zeros(30000, data.INDEX), rates=[50, 50])
    dataset.index["frames"] = seconds * audio.FRAME_RATE
    batches = data.TrainingBatches(dataset, Config())
    assert batches.waste()[0] < 0.05 and batches.waste()[1] < 0.04
    taken = [batches.taken(batches.ids(k)) for k in range(batches.steps_per_epoch)]
    assert len({(len(g), g.max()) for g in taken}) <= 150
    eight = data.TrainingBatches(dataset, Config(accumulate=8))  # in one process, in the order of eight ranks
    groups = [eight.taken(eight.ids(k)) for k in range(8 * eight.steps_per_epoch)]
    work = np.array([g.sum() * (2 * 302e6 + 4 * g.max() * 1024 * 24) for g in groups]).reshape(-1, 8)
    assert work.mean(1).sum() > 0.98 * work.max(1).sum()
    assert [len(g) for g in groups] != sorted(len(g) for g in groups)  # the steps are shuffled


def test_short_clips_and_an_untrimmed_run_keep_their_frames(tmp_path):
    """As those of an LM do, whose sequences no one may cut."""
    batches = data.LengthBatchSampler([15, 31, 31, 47, 200, 200], BATCHES, "batch_frames", trim=0.05)
    groups = ([0], [1, 2], [3], [4, 5], [1, 5])
    assert [batches.taken(np.array(g)).tolist() for g in groups] == [[15], [31, 31], [47], [192, 192], [31, 192]]
    batches.trim = 0.0
    assert [batches.taken(np.array(g)).tolist() for g in groups] == [[15], [31, 31], [47], [200, 200], [31, 200]]


def test_a_folder_of_other_settings_is_refused(tiny_config):
    assert data.check_prepared(tiny_config)["teachers"][0][0] == "whisper"
    data.check_prepared(replace(tiny_config, learning_rate=1e-5, nfe=4, n_layer=2))  # of no concern to the data
    with pytest.raises(DataError, match="--data_dir=ANOTHER_FOLDER") as error:
        data.check_prepared(replace(tiny_config, speech_codes=17, mel_floor=-9.0))
    assert "speech_codes: 16 -> 17; mel_floor: -11.5129 -> -9.0" in str(error.value) and "\n" not in str(error.value)


def test_a_finished_folder_needs_no_corpus_and_refuses_another(tiny_config):
    """Another is one that the config names, however its path is written."""
    gone = replace(tiny_config, speech_dir="", audio_dir="", librispeech_dir="/gone", manifest="gone.jsonl")
    assert data.check_prepared(gone)["prepared_with"] == data.settings_of(tiny_config)["prepared_with"]
    path = Path(tiny_config.data_dir) / "meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"corpus": data.settings_of(tiny_config)["corpus"]}))
    data.check_prepared(replace(tiny_config, speech_dir="./demo/"))
    with pytest.raises(DataError, match="audio_dir: 'demo' -> ''"):  # one domain of a folder of two
        data.check_prepared(replace(tiny_config, audio_dir=""))
    with pytest.raises(DataError, match="speech_dir: 'demo' -> 'mine'.* leave them out to use it"):
        data.check_prepared(replace(tiny_config, speech_dir="mine"))


def test_the_fingerprint_covers_the_tokens(tmp_path):
    codes = [np.arange(27), np.arange(21)]
    all_codes = {"first": codes, "same": codes, "other": [codes[0], codes[1][::-1]]}
    first, same, other = (prepared(tmp_path / k, [50, 80], [0, 1], c).meta for k, c in all_codes.items())
    assert data.fingerprint(first) == data.fingerprint(same) != data.fingerprint(other)
