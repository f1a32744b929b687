"""tokenizer.py: each step against a plain loop, and the whole on features whose answer is known."""

import importlib.util
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import common
import lm
from prepare import corpora, tokenizer
from prepare.tokenizer import Tokenizer, TokenizerConfig

ROOT = Path(__file__).parent.parent


def small(seed: int = 0, **changes) -> Tokenizer:
    torch.manual_seed(seed)
    model = Tokenizer(TokenizerConfig(**{"dim": 6, "codes": 9, "rate": 50, "width": 16, **changes}))
    model.codebook.normal_()
    return model


def clips(rng: np.random.Generator, *lengths: int, dim: int = 6) -> list[np.ndarray]:
    return [rng.normal(size=(n, dim)).astype(np.float32) for n in lengths]


def test_nearest_is_the_nearest(rng):
    model = small(codes=40)
    z = torch.from_numpy(rng.normal(size=(3, 50, 16)).astype(np.float32))
    expected = ((z.double()[:, :, None] - model.codebook.double()) ** 2).sum(-1).argmin(-1)
    assert torch.equal(model.nearest(z), expected)
    assert torch.equal(model.nearest(model.codebook), torch.arange(40))


def test_a_padded_clip_gives_the_same_as_alone(rng):
    """The network sees no padding: outputs, codes and losses of a padded batch are those of the clips alone."""
    model = small().double()
    parts = [torch.from_numpy(c).double() for c in clips(rng, 5, 17, 1, 40)]
    batch = torch.full((4, 40, 6), 1e3, dtype=torch.float64)  # rubbish where no clip is
    mask = torch.zeros(4, 40, dtype=torch.bool)
    for i, p in enumerate(parts):
        batch[i, : len(p)], mask[i, : len(p)] = p, True
    together = model(batch, mask)
    alone = [model(p[None], torch.ones(1, len(p), dtype=torch.bool)) for p in parts]
    torch.testing.assert_close(together["z"], torch.cat([a["z"] for a in alone]), atol=1e-10, rtol=0)
    assert torch.equal(together["codes"], torch.cat([a["codes"] for a in alone]))
    for name in ("mse", "commitment"):
        mean = sum(a[name] * len(p) for a, p in zip(alone, parts, strict=True)) / mask.sum()
        torch.testing.assert_close(together[name], mean, atol=1e-10, rtol=1e-10)


def test_the_losses_are_those_of_eq_14(rng):
    model = small()
    x = torch.from_numpy(clips(rng, 30)[0])[None]
    mask = torch.ones(1, 30, dtype=torch.bool)
    out = model(x, mask)
    z = model.encoder(x.transpose(1, 2), mask[:, None].float())[0].T
    q = model.codebook[out["codes"]]
    decoded = model.decoder(q.T[None], mask[:, None].float())[0].T  # the decoder gets the codes, not z
    torch.testing.assert_close(out["commitment"], ((z - q) ** 2).mean(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(out["mse"], ((decoded - x[0]) ** 2).mean(), atol=1e-5, rtol=1e-5)


def test_encode_gives_the_codes_of_each_clip(rng):
    model, parts = small().eval(), clips(rng, 3, 50, 1)
    model.mean.copy_(torch.arange(6.0)), model.std.fill_(2.0)
    codes = model.encode(parts)
    assert [c.shape for c in codes] == [(3,), (50,), (1,)] and all(c.dtype == np.int32 for c in codes)
    for c, p in zip(codes, parts, strict=True):
        x = (torch.from_numpy(p) - torch.arange(6.0)) / 2
        out = model(x[None], torch.ones(1, len(p), dtype=torch.bool))
        np.testing.assert_array_equal(c, out["codes"].numpy())


def test_straight_through_gradient(rng):
    """d mse / d z is d mse / d q, as if the quantiser were not there; and nothing reaches the codebook by gradient."""
    model = small()
    x = torch.from_numpy(clips(rng, 20)[0])[None]
    mask = torch.ones(1, 20, dtype=torch.bool)
    out = model(x, mask)
    out["mse"].backward()
    got = {k: p.grad.clone() for k, p in model.encoder.named_parameters()}
    assert all(g.abs().sum() > 0 for g in got.values())
    q = model.codebook[out["codes"]].clone().requires_grad_()
    decoded = model.decoder(q.T[None], mask[:, None].float()).transpose(1, 2)
    (downstream,) = torch.autograd.grad((decoded - x).square().mean(), q)
    z = model.encoder(x.transpose(1, 2), mask[:, None].float())[0].T
    expected = torch.autograd.grad(z, list(model.encoder.parameters()), downstream)
    for (name, g), e in zip(got.items(), expected, strict=True):
        torch.testing.assert_close(g, e, atol=1e-6, rtol=1e-3, msg=name)
    assert not any("codebook" in name or "code_" in name for name, _ in model.named_parameters())


def test_update_codebook_is_a_moving_average(rng):
    model = small(codes=5, decay=0.8)
    count, total = [1.0] * 5, [model.codebook[k].double().clone() for k in range(5)]
    model.code_count.fill_(1), model.code_sum.copy_(model.codebook)
    for _ in range(6):
        z = torch.from_numpy(rng.normal(size=(37, 16)).astype(np.float32))
        codes = torch.from_numpy(rng.integers(0, 5, 37))
        codes[:5] = torch.arange(5)  # all stay alive
        model.update_codebook(z, codes)
        for k in range(5):
            mine = [z[i].double() for i in range(37) if codes[i] == k]
            count[k] = 0.8 * count[k] + 0.2 * len(mine)
            total[k] = 0.8 * total[k] + 0.2 * sum(mine)
            torch.testing.assert_close(model.codebook[k].double(), total[k] / count[k], atol=1e-5, rtol=1e-4)


def test_a_dead_code_restarts_where_vectors_are(rng):
    model = small(codes=4)
    model.code_count.fill_(1), model.code_sum.copy_(model.codebook)
    before = model.codebook.clone()
    z = torch.from_numpy(rng.normal(50, 1, (20, 16)).astype(np.float32))
    codes = torch.zeros(20, dtype=torch.long)  # codes 1, 2 and 3 are never used
    alive = math.ceil(math.log(0.02) / math.log(0.8)) - 1  # 0.8^n >= 0.02 until then
    for _ in range(alive):
        model.update_codebook(z, codes)
    torch.testing.assert_close(model.codebook[1:], before[1:], atol=1e-4, rtol=1e-3)  # unused: it fades, unmoved
    model.update_codebook(z, codes)
    for k in (1, 2, 3):
        assert (model.codebook[k] == z).all(1).any()
        assert model.code_count[k] == 1


def test_fit_recovers_clusters():
    """Runs of noisy copies of 8 centres: the codes tell the centres apart, and little more. Of one seed, because random
    centres can lie too close to tell apart."""
    rng = np.random.default_rng(0)
    centres, features, labels = 3 * rng.normal(size=(8, 12)), [], []
    for _ in range(40):
        label = np.repeat(rng.integers(0, 8, 12), 8)
        labels.append(label)
        features.append((centres[label] + 0.1 * rng.normal(size=(96, 12))).astype(np.float32))
    losses = []
    model = tokenizer.fit(
        features, 16, 150, 50, width=48, batch=8, lr=3e-3, progress=lambda _, loss: losses.append(loss)
    )
    assert len(losses) == 150 and np.mean(losses[-10:]) < 0.3 * losses[0]
    codes = model.encode(features)
    used, perplexity = tokenizer.usage(codes, 16)
    assert 6 < perplexity <= 16 and used > 0.4
    table = np.zeros((16, 8))
    np.add.at(table, (np.concatenate(codes), np.concatenate(labels)), 1)
    purity = table.max(1).sum() / table.sum()  # of knowing the centre from the code
    assert purity > 0.9, purity
    x = model.standardise(torch.from_numpy(np.concatenate(features)))
    torch.testing.assert_close(x.mean(0), torch.zeros(12), atol=1e-3, rtol=0)
    torch.testing.assert_close(x.std(0), torch.ones(12), atol=1e-3, rtol=0)


@pytest.mark.parametrize("steps", [1, 5, 10, 11])
def test_fit_takes_any_number_of_steps_and_is_deterministic(rng, steps):
    features = clips(rng, 100, 1, 30)
    a, b = (tokenizer.fit(features, 8, steps, 50, width=16, batch=2, seed=3) for _ in range(2))
    for key, value in a.state_dict().items():
        assert torch.equal(value, b.state_dict()[key]), key
    other = tokenizer.fit(features, 8, steps, 50, width=16, batch=2, seed=4)
    assert not torch.equal(a.codebook, other.codebook)


# ---- position


def test_position_table_is_whispers():
    import audio

    audio.torchaudio()
    from transformers.models.whisper.modeling_whisper import sinusoids

    torch.testing.assert_close(tokenizer.position_table(64), sinusoids(1500, 64), atol=1e-4, rtol=0)


def position_and_content(rng, content: float) -> list[np.ndarray]:
    """Features that are a smooth function of position, the same in all clips, plus content of a given size."""
    table = tokenizer.position_table(64).numpy()
    waves = table @ rng.normal(size=(64, 10)) / 4
    out = []
    for n in rng.integers(50, 400, 60).tolist():
        own = np.repeat(rng.normal(size=(n // 5 + 1, 10)), 5, 0)[:n]  # as long as a phone
        out.append((waves[:n] + content * own).astype(np.float32))
    return out


def test_position_share_and_its_removal(rng):
    mostly = position_and_content(rng, 0.1)
    before = tokenizer.position_share(mostly, bins=1)
    assert before > 0.9
    model = small(dim=10, positions=64)
    model.position.copy_(tokenizer.fit_position(mostly, 64))
    after = tokenizer.position_share([model.standardise(torch.from_numpy(f)).numpy() for f in mostly], bins=1)
    assert after < 0.15, after
    fitted = tokenizer.fit(mostly, 8, 1, 50, remove_position=True, width=16)
    assert tokenizer.position_share([fitted.standardise(torch.from_numpy(f)).numpy() for f in mostly], bins=1) < 0.15
    kept = tokenizer.fit(mostly, 8, 1, 50, width=16)
    assert tokenizer.position_share([kept.standardise(torch.from_numpy(f)).numpy() for f in mostly], bins=1) > 0.8


def test_removal_leaves_the_content(rng):
    features = position_and_content(rng, 1.0)
    table = tokenizer.position_table(64).numpy()
    weights = tokenizer.fit_position(features, 64).numpy()
    # by lstsq on the stacked problem: ridge regression as plain least squares with extra rows
    p, x = np.concatenate([table[: len(f)] for f in features]).astype(np.float64), np.concatenate(features)
    rows = np.concatenate([p - p.mean(0), np.sqrt(10) * np.eye(64)])
    expected = np.linalg.lstsq(rows, np.concatenate([x - x.mean(0), np.zeros((64, 10))]), rcond=None)[0]
    np.testing.assert_allclose(p @ weights, p @ expected, atol=1e-3)


def test_position_share_by_hand_and_of_noise(rng):
    # two clips, bins of one: groups {0, 2}, {4, 4} -> within 2, total 11; R^2 corrected: 1 - (2 / 2) / (11 / 3)
    values = [np.array([[0.0], [4.0]]), np.array([[2.0], [4.0]])]
    assert tokenizer.position_share(values, bins=1) == pytest.approx(1 - (2 / 2) / (11 / 3))
    noise = [rng.normal(size=(n, 20)) for n in rng.integers(20, 300, 80)]
    assert abs(tokenizer.position_share(noise)) < 0.02
    steps = [np.repeat(np.arange(30), 10)[:n, None] * 1.0 for n in (300, 200, 120)]
    assert tokenizer.position_share(steps) == pytest.approx(1)


# ---- files and usage


def test_save_and_load(rng, tmp_path):
    features = [f * 3 + 1 for f in clips(rng, 60, 20)]
    model = tokenizer.fit(features, 8, 3, 25, remove_position=True, width=16)
    tokenizer.save(model, tmp_path / "t.pt")
    assert [f.name for f in tmp_path.iterdir()] == ["t.pt"]
    loaded = tokenizer.load(tmp_path / "t.pt")
    assert loaded.shape == model.shape and loaded.shape.positions == 64 and loaded.shape.rate == 25
    for a, b in zip(model.encode(features), loaded.encode(features), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not loaded.training


def test_usage_by_hand():
    used, perplexity = tokenizer.usage([np.array([0, 0, 1]), np.array([1, 5, 5])], 8)
    assert used == 3 / 8 and perplexity == pytest.approx(3)
    used, perplexity = tokenizer.usage([np.array([2, 2, 2, 3])], 4)
    assert used == 0.5 and perplexity == pytest.approx((3 / 4) ** -(3 / 4) * (1 / 4) ** -(1 / 4))


# ---- S3


def test_s3_by_onnxruntime(tmp_path, rng, monkeypatch):
    """A stand-in graph of CosyVoice's signature: the code of a token is the mel bin that is loudest over two frames."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    make, info = onnx.helper.make_node, onnx.helper.make_tensor_value_info
    nodes = [
        make("AveragePool", ["feats"], ["pooled"], kernel_shape=[2], strides=[2]),
        make("ArgMax", ["pooled"], ["codes"], axis=1, keepdims=0),
    ]
    inputs = [info("feats", 1, [1, 128, "T"]), info("feats_length", 6, [1])]
    graph = onnx.helper.make_graph(nodes, "s3", inputs, [info("codes", 7, [1, "N"])])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=8)
    path = tmp_path / "speech_tokenizer_v1.onnx"
    onnx.save(model, path)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "s3tokenizer" else find(name))
    wavs = [np.sin(2 * np.pi * f * np.arange(n) / 16000).astype("f4") for f, n in ((440, 16000), (2000, 8000))]
    low, high = tokenizer.S3(str(path)).encode(wavs)
    assert len(low) == 50 and len(high) == 25 and low.dtype == np.int64
    assert np.ptp(low[2:-2]) <= 1 and np.ptp(high[2:-2]) <= 1 and high[10] > low[10] + 20


def test_s3_by_its_package(monkeypatch):
    """The package's own network with random weights: a batch gives what each clip gives alone."""
    pytest.importorskip("s3tokenizer", reason="s3tokenizer is not installed")
    from s3tokenizer.model import ModelConfig, S3Tokenizer

    torch.manual_seed(0)
    model = S3Tokenizer("small", ModelConfig(n_audio_state=32, n_audio_head=2, n_audio_layer=2, n_codebook_size=64))
    model.quantizer._codebook.embed.data.normal_()
    monkeypatch.setattr("s3tokenizer.load_model", lambda name: model)
    s3, rng = tokenizer.S3("speech_tokenizer_v1"), np.random.default_rng(0)
    wavs = [(0.1 * rng.standard_normal(n)).astype("f4") for n in (16000, 24000, 9600)]
    for wav, codes in zip(wavs, s3.encode(wavs), strict=True):
        assert abs(len(codes) - len(wav) / 16000 * s3.rate) <= 1
        np.testing.assert_array_equal(codes, s3.encode([wav])[0])


def test_s3_without_its_packages_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install s3tokenizer"):
        tokenizer.S3("speech_tokenizer_v1")


def test_s3_out_of_reach_is_one_line(monkeypatch):
    def load_model(name: str):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "s3tokenizer")
    monkeypatch.setattr(importlib, "import_module", lambda name: SimpleNamespace(load_model=load_model))
    with pytest.raises(ValueError, match="s3='speech_tokenizer_v1' is not there or out of reach") as error:
        tokenizer.S3("speech_tokenizer_v1")
    assert "\n" not in str(error.value)


# ---- token times


def test_to_rate():
    x = np.linspace(0, 1, 50, dtype=np.float32)[:, None] * np.array([1.0, -2.0], np.float32)
    y = tokenizer.to_rate(x, 100)
    assert y.shape == (100, 2)
    np.testing.assert_allclose(y[1:-1, 0], (np.arange(1, 99) - 0.5) / 2 / 49, atol=1e-6)  # centres, not edges
    np.testing.assert_array_equal(tokenizer.to_rate(x, 50), x)


def test_at_token_times_covers_the_middle_of_each_token(rng):
    rows = np.arange(40)
    np.testing.assert_array_equal(tokenizer.at_token_times(rows, 40, 50, 50), rows)
    np.testing.assert_array_equal(tokenizer.at_token_times(rows, 20, 25, 50), 2 * np.arange(20) + 1)
    assert tokenizer.at_token_times(rows, 45, 50, 50)[-5:].tolist() == [39] * 5  # past its end the last one
    for rate, own in ((50, 49.6), (25, 50), (50, 21.5)):
        n = int(40 / own * rate)
        got = tokenizer.at_token_times(rows, n, rate, own)
        middle = (np.arange(n) + 0.5) / rate
        assert ((got / own <= middle + 1e-8) & (middle < (got + 1) / own + 1e-8)).all()


# ---- training of the AST


def test_a_fitting_goes_on_where_it_stopped(rng):
    features = clips(rng, 120, 40, 200, 97)
    shape = TokenizerConfig(6, 8, 50, 16)
    whole, first, second = (tokenizer.Fitting(features, shape, 12, batch=3, seed=5) for _ in range(3))
    a = [whole.step() for _ in range(12)]
    b = [first.step() for _ in range(5)]
    second.restore(first.state())
    b += [second.step() for _ in range(7)]
    assert a == b
    for x, y in zip(whole.model.state_dict().values(), second.model.state_dict().values(), strict=True):
        assert torch.equal(x, y)


def test_explained_is_one_minus_the_relative_error(rng):
    model, features = small().eval(), clips(rng, 30, 50)
    error = total = 0.0
    with torch.no_grad():
        for f in features:
            x = (torch.from_numpy(f) - model.mean) / model.std
            mask = torch.ones(1, 1, len(x))
            z = model.encoder(x.T[None], mask)
            q = model.codebook[model.nearest(z[0].T)]
            error += (model.decoder(q.T[None], mask)[0].T - x).square().sum()
            total += x.square().sum()
    assert tokenizer.explained(model, features) == pytest.approx(float(1 - error / total), rel=1e-4)


class Loud:
    """A stand-in teacher, 50 features a second: the loudness of each 20 ms."""

    name, sample_rate, dim, rate, longest = "loud", 1000, 1, 50.0, 0

    def encode(self, wavs: list) -> list[np.ndarray]:
        self.longest = max(map(len, wavs))
        return [np.abs(w[: len(w) // 20 * 20]).reshape(-1, 20).mean(1, keepdims=True) for w in wavs]


def test_long_clips_are_encoded_in_pieces(rng):
    teacher, wavs = Loud(), [rng.normal(size=n).astype("f4") for n in (30_000, 600_000, 500, 45_000)]
    got = tokenizer.features_of(teacher, wavs, 50)
    assert teacher.longest == 30_000
    for f, whole in zip(got, teacher.encode(wavs), strict=True):
        np.testing.assert_array_equal(f, whole)


def test_the_momentum_stays_what_it_is(rng):
    fitting = tokenizer.Fitting(clips(rng, 120), TokenizerConfig(6, 8, 50, 16), 12, batch=2)
    fitting.step()
    assert fitting.optimizer.param_groups[0]["betas"] == (0.5, 0.9)


def test_nonsense_is_no_tokenizer_and_no_folder_of_sounds(tmp_path):
    common.save(tmp_path / "model.pt", {"shape": {"n_layer": 4, "codes": (16, 16)}, "model": {}})
    with pytest.raises(ValueError, match="model.pt is not a checkpoint of tokenizer.py"):
        tokenizer.load(tmp_path / "model.pt")
    for source in ("", str(tmp_path / "none")):
        with pytest.raises(ValueError, match=f"features_from='{source}' is no folder"):
            tokenizer.sounds(source)
    with pytest.raises(common.DataError, match=f"^features_from={tmp_path}: no audio files"):
        tokenizer.sounds(str(tmp_path))


AST = ["--audio_teacher=demo", "--codes=16", "--width=16", "--max_steps=30", "--log_every=10", "--save_every=10"]


def run_ast(*words: str, env: dict | None = None) -> subprocess.CompletedProcess:
    command = [sys.executable, "tokenizer.py", "config/ast.py", *AST, *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=env)


def test_ast_from_the_command_line(tmp_path, audio_dir):
    done = run_ast(f"--features_from={audio_dir}", f"--out_dir={tmp_path / 'ast'}", "--device=cpu")
    assert done.returncode == 0, done.stderr
    assert "features of 2 clips" in done.stdout and "step 30/30" in done.stdout and "perplexity" in done.stdout
    model = tokenizer.load(tmp_path / "ast" / "ckpt.pt")
    [codes] = model.encode([np.random.default_rng(0).normal(size=(20, 512)).astype("f4")])
    assert codes.shape == (20,) and codes.max() < 16
    refused = run_ast(f"--features_from={audio_dir}", f"--out_dir={tmp_path / 'ast'}", "--width=8")
    assert refused.returncode == 1 and "pass --out_dir=ANOTHER_FOLDER" in refused.stderr


@pytest.fixture
def stopped(tmp_path, rng, monkeypatch) -> tokenizer.TokenizerArgs:
    """The arguments of a training of 4 steps that has ended, on features of a stand-in teacher."""
    args = tokenizer.TokenizerArgs(
        out_dir=str(tmp_path / "ast"), features_from=str(tmp_path), audio_teacher="demo", codes=8, width=8, units=1,
        max_steps=4, batch_size=2, save_every=2, device="cpu",
    )  # fmt: skip
    found = [corpora.Clip(str(i), b"", "", common.AUDIO, "") for i in range(3)]
    monkeypatch.setattr(tokenizer, "sounds", lambda source: found)
    monkeypatch.setattr(tokenizer.fetch, "fetch", lambda role: role)
    monkeypatch.setattr(tokenizer.teachers, "load_teacher", lambda *_: Loud())
    monkeypatch.setattr(tokenizer.audio, "read", lambda *_: rng.normal(size=4000).astype("f4"))
    assert tokenizer.main(args) == 0
    return args


@pytest.mark.parametrize(
    "change, file",
    [
        ({"features_from": "elsewhere"}, "features.json"),
        ({"audio_teacher": "beats.pt"}, "features.json"),
        ({"max_clips": 2}, "features.json"),
        ({"max_steps": 8}, "ckpt.pt"),
        ({"learning_rate": 1.0}, "ckpt.pt"),
    ],
)
def test_a_training_begun_with_other_arguments_is_refused(stopped, change, file):
    [key] = change
    with pytest.raises(common.CheckpointError, match=f"{file} was made with other settings .{key}: "):
        tokenizer.main(replace(stopped, **change))
    assert tokenizer.main(replace(stopped, log_every=1)) == 0


def test_a_damaged_checkpoint_does_not_replace_the_good_one(stopped, capsys):
    path = Path(stopped.out_dir) / "ckpt.pt"
    good = common.previous(path).read_bytes()
    path.write_bytes(path.read_bytes()[:-100])
    fitting = tokenizer.open_fitting(stopped, tokenizer.read_features(path.parent), 25.0, 0, "cpu")
    assert fitting.done == 2 and "damaged" in capsys.readouterr().err
    common.save(path, fitting.state())
    assert common.previous(path).read_bytes() == good


@pytest.mark.ddp
def test_two_ranks_train_one_ast(tmp_path, audio_dir):
    """Weights and codebook end equal on both ranks: rank 1's are compared by hand with what rank 0 saved."""
    script = tmp_path / "both.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import os, torch, torch.distributed as dist, numpy as np, tokenizer\n"
        "dist.init_process_group('gloo'); rank = dist.get_rank(); rng = np.random.default_rng(0)\n"
        "features = [rng.normal(size=(n, 6)).astype('f4') for n in (120, 40, 200)]\n"
        "fit = tokenizer.Fitting(features, tokenizer.TokenizerConfig(6, 8, 50, 16), 20, batch=3, rank=rank)\n"
        "for _ in range(20): fit.step()\n"
        f"torch.save(fit.model.state_dict(), {str(tmp_path)!r} + f'/{{rank}}.pt')\n"
        "dist.destroy_process_group()\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    a, b = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for key in a:
        assert torch.equal(a[key], b[key]), key


# ---- text


def test_text_as_bytes():
    encoding, text = lm.load_text_tokenizer(), "Héllo,\n  日本 \U0001f600 <|endoftext|>"
    ids = encoding.encode(text, disallowed_special=())
    assert ids == list(text.encode()) and encoding.decode(ids) == text and encoding.n_vocab == 256


def test_a_text_tokenizer_by_folder(tmp_path):
    from tokenizers import Tokenizer as Words
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=Words(WordLevel({"a": 0, "?": 1}, unk_token="?"))).save_pretrained(
        tmp_path
    )
    assert lm.load_text_tokenizer(str(tmp_path)).encode("a") == [0]
    with pytest.raises(ValueError, match="pass a folder, or bytes"):
        lm.load_text_tokenizer(str(tmp_path / "none"))
