"""tokenizer.py: each step against a plain loop, and the whole on features whose answer is known."""

import math
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import DEFAULT, Mock

import numpy as np
import pytest
import torch

import audio
import common
import lm
from prepare import tokenizer
from prepare.tokenizer import Tokenizer, TokenizerConfig


def small(**changes) -> Tokenizer:
    torch.manual_seed(0)
    model = Tokenizer(TokenizerConfig(**{"dim": 6, "codes": 9, "rate": 50, "width": 16, **changes}))
    model.codebook.normal_()
    model.code_count.fill_(1)
    model.code_sum.copy_(model.codebook)
    return model


def clips(rng: np.random.Generator, *lengths: int, dim: int = 6) -> list[np.ndarray]:
    return [rng.normal(size=(n, dim)).astype(np.float32) for n in lengths]


def fit(features: list[np.ndarray], codes: int = 8, steps: int = 3, positions: int = 0, **options) -> Tokenizer:
    options = {"batch": 2, "lr": 1e-3, "seed": 0, "device": "cpu", "resume": Path("none.pt")} | options
    config = TokenizerConfig(features[0].shape[1], codes, 50, options.pop("width", 16), positions=positions)
    return tokenizer.fit(features, config, steps, **options)


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


def test_the_losses_are_those_of_eq_14_with_a_straight_through_gradient(rng):
    """d mse / d z is d mse / d q, as if the quantiser were not there; and nothing reaches the codebook by gradient."""
    model, x, mask = small(), torch.from_numpy(clips(rng, 30)[0])[None], torch.ones(1, 30, dtype=torch.bool)
    out = model(x, mask)
    z = model.encoder(x.transpose(1, 2), mask[:, None].float())[0].T
    q = model.codebook[out["codes"]].clone().requires_grad_()
    decoded = model.decoder(q.T[None], mask[:, None].float())[0].T  # the decoder gets the codes, not z
    mse = ((decoded - x[0]) ** 2).mean()
    torch.testing.assert_close(out["commitment"], ((z - q) ** 2).mean(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(out["mse"], mse, atol=1e-5, rtol=1e-5)
    out["mse"].backward()
    got = {k: p.grad.clone() for k, p in model.encoder.named_parameters()}
    assert all(g.abs().sum() > 0 for g in got.values())
    (downstream,) = torch.autograd.grad(mse, q)
    expected = torch.autograd.grad(z, list(model.encoder.parameters()), downstream)
    for (name, g), e in zip(got.items(), expected, strict=True):
        torch.testing.assert_close(g, e, atol=1e-6, rtol=1e-3, msg=name)
    assert not any("codebook" in name or "code_" in name for name, _ in model.named_parameters())


def test_encode_gives_the_codes_of_each_clip(rng):
    model, parts = small().eval(), clips(rng, 3, 50, 1)
    model.mean.copy_(torch.arange(6.0))
    model.std.fill_(2.0)
    codes = model.encode(parts)
    assert [c.shape for c in codes] == [(3,), (50,), (1,)] and all(c.dtype == np.int32 for c in codes)
    for c, p in zip(codes, parts, strict=True):
        x = (torch.from_numpy(p) - torch.arange(6.0)) / 2
        out = model(x[None], torch.ones(1, len(p), dtype=torch.bool))
        np.testing.assert_array_equal(c, out["codes"].numpy())


def test_update_codebook_is_a_moving_average(rng):
    model = small(codes=5, decay=0.8)
    count, total = [1.0] * 5, [model.codebook[k].double().clone() for k in range(5)]
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
    before = model.codebook.clone()
    z = torch.from_numpy(rng.normal(50, 1, (20, 16)).astype(np.float32))
    codes = torch.zeros(20, dtype=torch.long)  # codes 1, 2 and 3 are never used
    alive = math.ceil(math.log(0.02) / math.log(0.8)) - 1  # 0.8^n >= 0.02 until then
    for _ in range(alive):
        model.update_codebook(z, codes)
    torch.testing.assert_close(model.codebook[1:], before[1:], atol=1e-4, rtol=1e-3)  # unused: it fades, unmoved
    model.update_codebook(z, codes)
    for k in (1, 2, 3):
        assert (model.codebook[k] == z).all(1).any() and model.code_count[k] == 1


def test_fit_recovers_clusters():
    """Runs of noisy copies of 8 centres: the codes tell the centres apart, and little more. Of one seed, because random
    centres can lie too close to tell apart."""
    rng = np.random.default_rng(0)
    centres, features, labels = 3 * rng.normal(size=(8, 12)), [], []
    for _ in range(40):
        label = np.repeat(rng.integers(0, 8, 12), 8)
        labels.append(label)
        features.append((centres[label] + 0.1 * rng.normal(size=(96, 12))).astype(np.float32))
    model = fit(features, 16, 150, width=48, batch=8, lr=3e-3)
    codes = model.encode(features)
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
    a, b = (fit(features, 8, steps, seed=3) for _ in range(2))
    for key, value in a.state_dict().items():
        assert torch.equal(value, b.state_dict()[key]), key
    assert not torch.equal(a.codebook, fit(features, 8, steps, seed=4).codebook)


@pytest.mark.parametrize("damaged", [False, True])
def test_a_fit_goes_on_where_it_stopped(rng, tmp_path, monkeypatch, damaged, capsys):
    """To the last bit; from the file before when the newest is damaged, which does not take that one's place."""
    features, path, steps = clips(rng, 120, 40, 200, 97), tmp_path / "fit.pt", Mock(wraps=tokenizer.windows)
    whole = fit(features, steps=12, batch=3, seed=5)
    monkeypatch.setattr(tokenizer, "SAVE_EVERY", 3)
    monkeypatch.setattr(tokenizer, "windows", steps)
    steps.side_effect = [*[DEFAULT] * 8, KeyboardInterrupt]
    with pytest.raises(KeyboardInterrupt):
        fit(features, steps=12, batch=3, seed=5, resume=path)
    state = common.load(path)[0]
    assert state["step"] == 6 and state["optimizer"]["param_groups"][0]["betas"] == (0.5, 0.9)  # no cycled momentum
    if damaged:
        path.write_bytes(path.read_bytes()[:-100])
    steps.reset_mock(side_effect=True)
    rest = fit(features, steps=12, batch=3, seed=5, resume=path)
    assert steps.call_count == 1 + (9 if damaged else 6) and ("damaged" in capsys.readouterr().err) == damaged
    for x, y in zip(whole.state_dict().values(), rest.state_dict().values(), strict=True):
        assert torch.equal(x, y)
    assert common.load(path)[0]["step"] == 12 and common.load(common.previous(path))[0]["step"] == 9


def test_position_table_is_whispers():
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


def position_share(values: list[np.ndarray]) -> float:
    """Share of the variance of vectors (N, W) that their position explains: R^2 of each position's mean, corrected."""
    x, where = np.concatenate(values).astype(np.float64), np.concatenate([np.arange(len(v)) for v in values])
    k, n = where.max() + 1, len(x)
    within = sum(((x[where == i] - x[where == i].mean(0)) ** 2).sum() for i in range(k))
    return 1 - within / (n - k) * (n - 1) / ((x - x.mean(0)) ** 2).sum()


def test_position_share_and_its_removal(rng):
    def share(model: Tokenizer) -> float:
        return position_share([model.standardise(torch.from_numpy(f)).numpy() for f in mostly])

    mostly = position_and_content(rng, 0.1)
    assert position_share(mostly) > 0.9
    model = small(dim=10, positions=64)
    model.position.copy_(tokenizer.fit_position(mostly, 64))
    assert share(model) < 0.15
    assert share(fit(mostly, steps=1, positions=64)) < 0.15
    assert share(fit(mostly, steps=1)) > 0.8


def test_removal_leaves_the_content(rng):
    features = position_and_content(rng, 1.0)
    table = tokenizer.position_table(64).numpy()
    weights = tokenizer.fit_position(features, 64).numpy()
    # by lstsq on the stacked problem: ridge regression as plain least squares with extra rows
    p, x = np.concatenate([table[: len(f)] for f in features]).astype(np.float64), np.concatenate(features)
    rows = np.concatenate([p - p.mean(0), np.sqrt(10) * np.eye(64)])
    expected = np.linalg.lstsq(rows, np.concatenate([x - x.mean(0), np.zeros((64, 10))]), rcond=None)[0]
    np.testing.assert_allclose(p @ weights, p @ expected, atol=1e-3)


def test_save_and_load(rng, tmp_path):
    features = [f * 3 + 1 for f in clips(rng, 60, 20)]
    model = fit(features, positions=64)
    tokenizer.save(model, tmp_path / "t.pt")
    assert [f.name for f in tmp_path.iterdir()] == ["t.pt"]
    loaded = tokenizer.load(tmp_path / "t.pt")
    assert loaded.config == model.config and loaded.config.positions == 64 and loaded.config.rate == 50
    for a, b in zip(model.encode(features), loaded.encode(features), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not loaded.training
    common.save(tmp_path / "model.pt", {"config": {"n_layer": 4, "audio_codes": 16}, "model": {}})
    with pytest.raises(common.CheckpointError, match="model.pt is another kind of checkpoint"):
        tokenizer.load(tmp_path / "model.pt")


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


def test_s3_without_its_package_or_out_of_reach_is_one_line(monkeypatch):
    def load_model(name: str):
        raise ConnectionError("no route\nto host")

    for module in (None, SimpleNamespace(load_model=load_model)):
        monkeypatch.setitem(sys.modules, "s3tokenizer", module)
        with pytest.raises(ValueError, match="s3='x' is not there or .*; pip install s3tokenizer") as error:
            tokenizer.S3("x")
        assert "\n" not in str(error.value)


def test_features_of_other_teachers_are_interpolated():
    teacher = SimpleNamespace(name="whisper", rate=50)
    x = np.linspace(0, 1, 50, dtype=np.float32)[:, None] * np.array([1.0, -2.0], np.float32)
    y = tokenizer.token_features(teacher, x, 100, 100)
    assert y.shape == (100, 2)
    np.testing.assert_allclose(y[1:-1, 0], (np.arange(1, 99) - 0.5) / 2 / 49, atol=1e-6)  # centres, not edges
    np.testing.assert_array_equal(tokenizer.token_features(teacher, x, 50, 50), x)


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


def test_text_as_bytes_or_by_a_tokenizer_in_a_folder(tmp_path):
    from tokenizers import Tokenizer as Words
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    encode, count = lm.text_encoder(lm.LMConfig(lm="small"))
    text = "Héllo,\n  日本 \U0001f600 <|endoftext|>"
    assert encode(text) == list(text.encode()) and bytes(encode(text)).decode() == text and count == 256
    words = Words(WordLevel({"a": 0, "?": 1}, unk_token="?"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    assert lm.text_encoder(lm.LMConfig(text=str(tmp_path)))[0]("a") == [0]
    with pytest.raises(ValueError, match="pass a folder, or bytes"):
        lm.text_encoder(lm.LMConfig(text=str(tmp_path / "none")))
