"""Networks against torchvision's own, converted files against a forward pass written out, and damaged checkpoints."""

import argparse
import dataclasses
import json
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from forks import python
from safetensors.torch import load_file, save_file

from imaginet_nb.evaluation.calibration import Calibration, fit_calibration
from imaginet_nb.evaluation.open_set import open_set_of
from imaginet_nb.models.checkpoints import (
    CheckpointError,
    ProbabilityHeader,
    amend_checkpoint,
    convert_authors_checkpoint,
    load_checkpoint,
    load_detector,
    read_header,
    save_checkpoint,
    weights_digest,
)
from imaginet_nb.models.resnet import WeightsError, create_backbone, load_imagenet_weights
from imaginet_nb.models.selfcon import ImagiNetClassifier, SelfConNet

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def images(n: int = 2, size: int = 64) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def disturb_statistics(model: torch.nn.Module) -> None:
    "Running statistics other than 0 and 1, so that a layer that is skipped or doubled shows."
    draw = torch.Generator().manual_seed(1)
    for m in model.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.running_mean.copy_(0.1 * torch.randn(m.num_features, generator=draw))
            m.running_var.copy_(0.8 + 0.4 * torch.rand(m.num_features, generator=draw))


@pytest.fixture(scope="module")
def torchvision_resnet50() -> torchvision.models.ResNet:
    torch.manual_seed(0)
    model = torchvision.models.resnet50()
    disturb_statistics(model)
    return model.eval()


def torchvision_features(model: torchvision.models.ResNet, pixels: torch.Tensor, stem_stride: int) -> tuple[torch.Tensor, torch.Tensor]:
    "Mean of stage 2 and of stage 4, by torchvision's layers and nothing of ours but the stem's strides."
    x = F.conv2d((pixels / 255 - MEAN) / STD, model.conv1.weight, stride=stem_stride, padding=3)
    x = F.max_pool2d(model.relu(model.bn1(x)), kernel_size=3, stride=stem_stride, padding=1)
    middle = model.layer2(model.layer1(x))
    return middle.mean((2, 3)), model.layer4(model.layer3(middle)).mean((2, 3))


# --- the backbone ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize("stem_stride", [1, 2])
def test_names_and_shapes_are_torchvisions_without_fc(name, stem_stride):
    with torch.device("meta"): ours, theirs = create_backbone(name, stem_stride=stem_stride), getattr(torchvision.models, name)()
    shapes = lambda model: {n: tuple(t.shape) for n, t in model.state_dict().items() if not n.startswith("fc.")}
    assert shapes(ours) == shapes(theirs)
    assert not any(n.startswith("fc.") for n in ours.state_dict())


@torch.no_grad()
def test_strided_backbone_computes_what_torchvision_computes(torchvision_resnet50):
    backbone = create_backbone("resnet50", stem_stride=2).eval()
    backbone.load_state_dict({n: t for n, t in torchvision_resnet50.state_dict().items() if not n.startswith("fc.")})
    x = (images() / 255 - MEAN) / STD
    taken = {}
    hook = torchvision_resnet50.avgpool.register_forward_hook(lambda module, inputs, output: taken.update(feature=output.flatten(1)))
    torchvision_resnet50(x)
    hook.remove()
    torch.testing.assert_close(backbone(x), taken["feature"], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_no_down_backbone_computes_torchvision_with_edited_strides(torchvision_resnet50):
    backbone = create_backbone("resnet50").eval()
    backbone.load_state_dict({n: t for n, t in torchvision_resnet50.state_dict().items() if not n.startswith("fc.")})
    _, expected = torchvision_features(torchvision_resnet50, images(), stem_stride=1)
    _, strided = torchvision_features(torchvision_resnet50, images(), stem_stride=2)
    got = backbone((images() / 255 - MEAN) / STD)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert (got - strided).abs().max() > 1e-2


def test_imagenet_weights_load_by_name_and_fc_is_left_out(tmp_path, torchvision_resnet50):
    torch.save(torchvision_resnet50.state_dict(), tmp_path / "resnet50.pth")
    backbone = load_imagenet_weights(create_backbone("resnet50"), tmp_path / "resnet50.pth")
    theirs = torchvision_resnet50.state_dict()
    assert all(torch.equal(t, theirs[n]) for n, t in backbone.state_dict().items())


def test_imagenet_weights_that_do_not_fit_are_refused(tmp_path):
    state = torchvision.models.resnet18().state_dict()
    file = tmp_path / "resnet18.pth"
    torch.save({n: t for n, t in state.items() if n != "layer4.1.bn2.running_var"}, file)
    with pytest.raises(WeightsError, match="layer4.1.bn2.running_var"): load_imagenet_weights(create_backbone("resnet18"), file)
    torch.save(state | {"layer5.weight": torch.ones(1)}, file)
    with pytest.raises(WeightsError, match="layer5.weight"): load_imagenet_weights(create_backbone("resnet18"), file)
    torch.save(torch.ones(3), file)
    with pytest.raises(WeightsError): load_imagenet_weights(create_backbone("resnet18"), file)
    with pytest.raises(WeightsError, match="width"): load_imagenet_weights(create_backbone("resnet18", width=0.5), file)


def test_pretrained_file_cannot_run_code(tmp_path):
    file = tmp_path / "resnet18.pth"
    torch.save({"conv1.weight": Trap(tmp_path / "sprung")}, file)
    with pytest.raises(WeightsError): load_imagenet_weights(create_backbone("resnet18"), file)
    assert not (tmp_path / "sprung").exists()


# --- detectors ------------------------------------------------------------------------------------------------------

def small_classifier(**options) -> ImagiNetClassifier:
    torch.manual_seed(0)
    return ImagiNetClassifier(create_backbone("resnet18", width=0.125), **options)


def test_detector_answers_do_not_depend_on_batch_mode_or_input_type():
    model, x = small_classifier().train(), images(5, 32)
    score, family, feature = model.score(x), model.identify(x), model.embed(x)
    assert (score.shape, family.shape, feature.shape) == ((5,), (5, 4), (5, 64))
    assert {t.dtype for t in (score, family, feature)} == {torch.float32}
    torch.testing.assert_close(torch.cat([model.score(one[None]) for one in x]), score, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.score(x / 255), score, rtol=1e-4, atol=1e-5)
    assert int(model.backbone.bn1.num_batches_tracked) == 0, "scoring must not move running statistics"
    assert all(m.training for m in model.modules()), "scoring must leave the mode as it was"
    (feature * torch.ones(64, requires_grad=True)).sum().backward()   # an answer can be trained on


def test_each_layer_keeps_its_own_mode():
    "Stage 2 trains BatchNorm layers inside a network that is otherwise in evaluation mode."
    model = small_classifier().eval()
    model.backbone.bn1.train()
    for answer in (model.score, model.identify, model.embed): answer(images(2, 32))
    assert [name for name, m in model.named_modules() if m.training] == ["backbone.bn1"]


def test_gradients_reach_every_parameter():
    net = SelfConNet(create_backbone("resnet18", width=0.125), exit_stage=1)
    net(images(4, 32))[..., :3].sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())
    model = small_classifier()
    _, detection, family = model(images(4, 32))
    (detection.sum() + family.exp().sum()).backward()
    assert all(p.grad is not None for p in model.parameters())


# --- the authors' files ---------------------------------------------------------------------------------------------

class Trap:
    "A pickle that makes a file when it is read."
    def __init__(self, path: Path): self.path = path
    def __reduce__(self): return Path.touch, (self.path,)


def linear(name: str, inputs: int, outputs: int) -> dict[str, torch.Tensor]:
    return {f"{name}.weight": torch.randn(outputs, inputs) / inputs**0.5, f"{name}.bias": 0.1 * torch.randn(outputs)}


@pytest.fixture(scope="module")
def authors(torchvision_resnet50) -> dict:
    "What the published training checkpoint holds, with random numbers: names and shapes are the real ones."
    torch.manual_seed(3)
    theirs = torchvision_resnet50.state_dict()
    model = {"encoder." + n.replace("downsample", "shortcut"): t for n, t in theirs.items() if not n.startswith("fc.")}
    model |= linear("encoder.selfcon_layer.1", 512, 2048)
    for head in ("head", "sub_heads.0"): model |= linear(f"{head}.0", 2048, 2048) | linear(f"{head}.2", 2048, 128)
    assert len(model) == 328
    norm = {"0.weight": torch.rand(2048) + 0.5, "0.bias": torch.randn(2048), "0.running_mean": 0.5 * torch.rand(2048),
            "0.running_var": torch.rand(2048) + 0.5, "0.num_batches_tracked": torch.tensor(2000)}
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    parameter.sum().backward(); optimizer.step()
    return {"model": model, "classifier": norm | linear("1", 2048, 1024) | linear("4", 1024, 1),
            "opt": argparse.Namespace(learning_rate=0.005, cosine=True, model="resnet50"), "optimizer": optimizer.state_dict(),
            "lr_sched": torch.optim.lr_scheduler.StepLR(optimizer, 1).state_dict(), "epoch": 400,
            "rng_states": {"torch": torch.get_rng_state(), "python": random.getstate(), "numpy": np.random.RandomState(1).get_state()}}


@torch.no_grad()
@pytest.mark.parametrize("stem_stride", [1, 2])
def test_converted_detector_computes_what_a_plain_forward_pass_computes(tmp_path, authors, torchvision_resnet50, stem_stride):
    torch.save(authors, tmp_path / "authors.pth")
    header = convert_authors_checkpoint(tmp_path / "authors.pth", tmp_path / "ours.safetensors", stem_stride=stem_stride)
    assert (header["kind"], header["architecture"], header["stem_stride"]) == ("classifier", "resnet50", stem_stride)
    assert header["classes"] == {"detection": ["real", "synthetic"]}
    detector = load_detector(tmp_path / "ours.safetensors")
    _, feature = torchvision_features(torchvision_resnet50, images(), stem_stride)
    head = authors["classifier"]
    x = F.batch_norm(feature, head["0.running_mean"], head["0.running_var"], head["0.weight"], head["0.bias"], eps=1e-5)
    expected = F.linear(F.relu(F.linear(x, head["1.weight"], head["1.bias"])), head["4.weight"], head["4.bias"])[:, 0]
    torch.testing.assert_close(detector.embed(images()), feature, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(detector.score(images()), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="no identification head"): detector.identify(images())


@torch.no_grad()
def test_stage_1_file_gives_both_exits(tmp_path, authors, torchvision_resnet50):
    torch.save({"model": authors["model"]}, tmp_path / "authors.pth")
    assert convert_authors_checkpoint(tmp_path / "authors.pth", tmp_path / "ours.safetensors")["kind"] == "selfcon"
    net, _ = load_checkpoint(tmp_path / "ours.safetensors", kind="selfcon", exit_stage=2, stem_stride=1)
    middle, feature = torchvision_features(torchvision_resnet50, images(), stem_stride=1)
    weights = authors["model"]
    def project(x, head):
        x = F.relu(F.linear(x, weights[f"{head}.0.weight"], weights[f"{head}.0.bias"]))
        x = F.linear(x, weights[f"{head}.2.weight"], weights[f"{head}.2.bias"])
        return x / x.square().sum(1, keepdim=True).sqrt()
    leaving = F.linear(middle, weights["encoder.selfcon_layer.1.weight"], weights["encoder.selfcon_layer.1.bias"])
    expected = torch.stack([project(leaving, "sub_heads.0"), project(feature, "head")], dim=1)
    torch.testing.assert_close(net(images()), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(CheckpointError, match="without classifier heads"): load_detector(tmp_path / "ours.safetensors")


@torch.no_grad()
def test_older_identification_head(tmp_path, authors, torchvision_resnet50):
    torch.manual_seed(4)
    head = linear("1", 2048, 1024) | linear("3", 1024, 4)
    torch.save({"model": authors["model"], "classifier": head}, tmp_path / "old.pth")
    with pytest.warns(UserWarning, match="stem_stride=2"): convert_authors_checkpoint(tmp_path / "old.pth", tmp_path / "ours.safetensors")
    header = convert_authors_checkpoint(tmp_path / "old.pth", tmp_path / "ours.safetensors", stem_stride=2)
    assert header["classes"] == {"identification": ["GAN", "SD", "Midjourney", "DALL-E 3"]}
    detector = load_detector(tmp_path / "ours.safetensors")
    _, feature = torchvision_features(torchvision_resnet50, images(), stem_stride=2)
    x = feature / feature.square().sum(1, keepdim=True).sqrt()
    expected = F.linear(F.relu(F.linear(x, head["1.weight"], head["1.bias"])), head["3.weight"], head["3.bias"])
    torch.testing.assert_close(detector.identify(images()), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="no detection head"): detector.score(images())


@pytest.mark.parametrize("faulty, words", [
    (lambda a: a | {"opt": "trap"}, "Nothing was run"),
    (lambda a: {"classifier": a["classifier"]}, "no entry 'model'"),
    (lambda a: a | {"model": {n: t for n, t in a["model"].items() if n != "head.2.bias"}}, "heads.1.2.bias"),
    (lambda a: a | {"model": a["model"] | {"encoder.fc.weight": torch.ones(2)}}, "backbone.fc.weight"),
    (lambda a: a | {"model": a["model"] | {"encoder.conv1.weight": torch.ones(64, 3, 3, 3)}}, "backbone.conv1.weight"),
    (lambda a: a | {"classifier": {n: t for n, t in a["classifier"].items() if n != "0.running_var"}}, "0.running_var"),
    (lambda a: a | {"classifier": linear("0", 2048, 2)}, "unknown classifier"),
    (lambda a: a | {"classifier": linear("1", 2048, 1024) | linear("3", 1024, 7)}, "unknown classifier"),
])
def test_faulty_authors_files_are_refused(tmp_path, authors, faulty, words):
    content = faulty(authors)
    if content.get("opt") == "trap": content["opt"] = Trap(tmp_path / "sprung")
    torch.save(content, tmp_path / "authors.pth")
    with pytest.raises(CheckpointError, match=words): convert_authors_checkpoint(tmp_path / "authors.pth", tmp_path / "ours.safetensors")
    assert {p.name for p in tmp_path.iterdir()} == {"authors.pth"}, "nothing run, nothing half-written"


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_bare_pickle_is_not_run(tmp_path, protocol):
    (tmp_path / "authors.pth").write_bytes(pickle.dumps({"model": Trap(tmp_path / "sprung")}, protocol=protocol))
    with pytest.raises(CheckpointError): convert_authors_checkpoint(tmp_path / "authors.pth", tmp_path / "ours.safetensors")
    with pytest.raises(CheckpointError): load_detector(tmp_path / "authors.pth")
    assert not (tmp_path / "sprung").exists()


def test_cut_off_or_missing_authors_file(tmp_path):
    torch.save({"model": {"a": torch.ones(1000)}}, tmp_path / "authors.pth")
    (tmp_path / "authors.pth").write_bytes((tmp_path / "authors.pth").read_bytes()[:2000])
    for name in ("authors.pth", "nowhere.pth"):
        with pytest.raises(CheckpointError, match=name): convert_authors_checkpoint(tmp_path / name, tmp_path / "ours.safetensors")


# --- our files ------------------------------------------------------------------------------------------------------

@pytest.fixture
def checkpoint(tmp_path) -> Path:
    save_checkpoint(small_classifier(name="Cross-entropy (baseline)", input_size=96), tmp_path / "c.safetensors", profile="smoke", note="é")
    return tmp_path / "c.safetensors"


def test_round_trip_keeps_weights_name_and_header(checkpoint):
    detector, header = load_detector(checkpoint), read_header(checkpoint)
    assert (detector.name, detector.input_size, header["profile"], header["note"]) == ("Cross-entropy (baseline)", 96, "smoke", "é")
    assert torch.equal(detector.score(images()), small_classifier().score(images()))


def test_a_changed_byte_anywhere_is_noticed(checkpoint):
    "In the length, the header, a name, a shape, a weight: the first 16 bytes and 200 places drawn at random."
    good, draw = checkpoint.read_bytes(), random.Random(0)
    clean = load_checkpoint(checkpoint)[0].state_dict()
    for place in [*range(16), *(draw.randrange(len(good)) for _ in range(100)), *(draw.randrange(3000) for _ in range(100))]:
        bad = bytearray(good)
        bad[place] ^= 1 << draw.randrange(8)
        checkpoint.write_bytes(bytes(bad))
        try: state = load_checkpoint(checkpoint)[0].state_dict()
        except CheckpointError as error: assert checkpoint.name in str(error)
        else: assert all(torch.equal(t, clean[n]) for n, t in state.items()), f"byte {place} changed weights unnoticed"


@pytest.mark.parametrize("length", [0, 5, 8, 100, 20_000, -1])
def test_a_cut_off_file_is_refused(checkpoint, length):
    checkpoint.write_bytes(checkpoint.read_bytes()[:length])
    with pytest.raises(CheckpointError, match=checkpoint.name): load_checkpoint(checkpoint)


@pytest.mark.parametrize("changes", [{"stem_stride": 2}, {"width": 0.25}, {"architecture": "resnet50"},
                                     {"heads": {"detection": "l2", "identification": None}}])
def test_a_header_of_another_network_is_refused(checkpoint, changes):
    "The strided network has the same names and shapes: only the checksum over the header notices."
    header = read_header(checkpoint)
    save_file(load_file(checkpoint), checkpoint, metadata={"header": json.dumps(header | changes)})
    with pytest.raises(CheckpointError, match=checkpoint.name): load_checkpoint(checkpoint)


def test_strided_weights_do_not_slip_into_a_no_down_pipeline(tmp_path):
    save_checkpoint(SelfConNet(create_backbone("resnet18", width=0.125, stem_stride=2)), tmp_path / "s.safetensors")
    with pytest.raises(CheckpointError, match="stem_stride is 2"): load_checkpoint(tmp_path / "s.safetensors", stem_stride=1)
    assert load_checkpoint(tmp_path / "s.safetensors")[0].backbone.conv1.stride == (2, 2)


def test_saving_is_atomic(checkpoint, monkeypatch):
    before = checkpoint.read_bytes()
    def fails(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError("disk full")
    monkeypatch.setattr("imaginet_nb.models.checkpoints.save_file", fails)
    with pytest.raises(OSError, match="disk full"): save_checkpoint(small_classifier(), checkpoint)
    assert checkpoint.read_bytes() == before and len(list(checkpoint.parent.iterdir())) == 1


# --- headers whose checksum is right ----------------------------------------------------------------------------------

FITTED = {"method": "platt", "slope": 2.0, "intercept": 0.5, "thresholds": {"0.05": 0.9, "0.001": None}, "n": 40, "n_real": 20}
OPEN = {"score": "nearest", "neighbours": 5, "thresholds": {"0.05": 3.5}, "n": 40, "generators": ["ProGAN"]}


def forged(path: Path, changes: dict, without: str = "") -> None:
    "Write another header into a file, with the checksum that belongs to it."
    header = {key: value for key, value in (read_header(path) | changes).items() if key not in ("sha256", without)}
    tensors = load_file(path)
    header["sha256"] = weights_digest(header, tensors)
    save_file(tensors, path, metadata={"header": json.dumps(header)})


@pytest.mark.parametrize("changes, words", [
    ({"input_size": "abc"}, "input_size: .*valid integer, got 'abc'"),
    ({"input_size": -96}, "input_size: .*got -96"),
    ({"input_size": True}, "input_size"),
    ({"width": 40}, "width: .*got 40"),
    ({"width": "wide"}, "width: .*got 'wide'"),
    ({"width": float("nan")}, "width"),
    ({"width": 1e-9}, "width"),
    ({"stem_stride": 3}, "stem_stride: .*got 3"),
    ({"stem_stride": None}, "stem_stride"),
    ({"architecture": ["resnet18"]}, "architecture"),
    ({"kind": ["classifier"]}, "kind: .*valid string"),
    ({"kind": "poem"}, "unknown kind .poem."),
    ({"heads": {"detection": "batchnorm"}}, "heads.identification: missing entry"),
    ({"heads": {"detection": "batchnorm", "identification": "batchnorm", "third": "l2"}}, "heads.third: unknown entry"),
    ({"heads": {"detection": "linear", "identification": None}}, "heads.detection: .*got 'linear'"),
    ({"heads": None}, "heads"),
    ({"classes": {"detection": ["synthetic", "real"], "identification": ["GAN", "SD", "Midjourney", "DALL-E 3"]}},
     r"classes: expected .*'real', 'synthetic'.* in this order, got .*'synthetic', 'real'"),
    ({"classes": {"detection": ["real", "synthetic"], "identification": ["SD", "GAN", "Midjourney", "DALL-E 3"]}}, "classes: expected"),
    ({"classes": {"detection": ["real", "synthetic"]}}, "classes: expected"),
    ({"detector": 7}, "detector: .*got 7"),
    ({"input": {"range": [0, 255]}}, "input: made for other pixels"),
    ({"profile": 5}, "profile"),
    ({"extra": "known_features"}, "extra"),
    ({"extra": ["known_features"]}, "no tensor 'known_features'"),
    ({"probability": FITTED | {"slope": float("nan")}}, "probability.slope: .*finite"),
    ({"probability": FITTED | {"intercept": float("inf")}}, "probability.intercept: .*finite"),
    ({"probability": FITTED | {"thresholds": {"0.05": 1.5}}}, "probability.thresholds.0.05"),
    ({"probability": FITTED | {"thresholds": {"0.05": float("nan")}}}, "probability.thresholds.0.05"),
    ({"probability": FITTED | {"tilt": 1}}, "probability.tilt: unknown entry"),
    ({"probability": {"slope": 1.0}}, "probability.method: missing entry"),
    ({"probability": [1.0, 0.0]}, "probability"),
    ({"open_set": OPEN | {"thresholds": {"0.05": "far"}}}, "open_set.thresholds.0.05"),
], ids=lambda value: str(value)[:60] if isinstance(value, dict) else "")
def test_an_odd_header_is_refused_with_file_and_entry(checkpoint, changes, words):
    forged(checkpoint, changes)
    with pytest.raises(CheckpointError, match=words) as error: load_checkpoint(checkpoint)
    assert "c.safetensors" in str(error.value) and len(str(error.value)) < 1000


@pytest.mark.parametrize("entry", ["kind", "architecture", "width", "stem_stride", "input", "detector", "input_size", "heads", "classes",
                                   "profile", "data_hash", "git_commit"])
def test_a_missing_entry_is_named(checkpoint, entry):
    forged(checkpoint, {}, without=entry)
    with pytest.raises(CheckpointError, match=f"c.safetensors: .*{entry}"): load_checkpoint(checkpoint)


def test_a_complete_header_is_accepted_and_what_is_unknown_at_its_top_is_kept(checkpoint):
    forged(checkpoint, {"probability": FITTED, "my_note": {"a": [1, None]}, "width": 0.125})
    detector = load_detector(checkpoint)
    assert detector.header["probability"] == FITTED and detector.header["my_note"] == {"a": [1, None]}


def test_the_schema_of_a_calibration_has_the_fields_of_a_calibration():
    assert list(ProbabilityHeader.model_fields) == [field.name for field in dataclasses.fields(Calibration)]
    rng = np.random.default_rng(0)
    fitted = fit_calibration(rng.normal(size=80) + np.repeat([0, 1], 40), np.repeat([False, True], 40)).header()
    assert ProbabilityHeader.model_validate(json.loads(json.dumps(fitted))).slope == fitted["slope"]


def test_what_could_not_be_read_again_is_not_written(checkpoint):
    before = checkpoint.read_bytes()
    bad = FITTED | {"slope": float("nan")}
    with pytest.raises(CheckpointError, match="probability.slope"): amend_checkpoint(checkpoint, probability=bad)
    assert checkpoint.read_bytes() == before


@pytest.mark.parametrize("changes", [{"architecture": "resnet50", "width": 16}, {"projection_size": 65_536, "width": 16}])
def test_no_memory_is_taken_for_a_network_that_the_file_does_not_hold(tmp_path, changes):
    "Both headers ask for gigabytes; the process may take a tenth of that above what it has."
    path = tmp_path / "s.safetensors"
    save_checkpoint(SelfConNet(create_backbone("resnet18", width=0.125), projection_size=8), path)
    forged(path, changes)
    script = ("import sys, resource, torch; from imaginet_nb.models.checkpoints import load_checkpoint\n"
              "from imaginet_nb.models.resnet import create_backbone; create_backbone('resnet18', width=0.125)\n"
              "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
              "try: load_checkpoint(sys.argv[1])\n"
              "except ValueError as error: print(type(error).__name__, 'of another shape' in str(error) or 'missing' in str(error))\n"
              "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)")
    result = python(script, path)
    what, kilobytes = result.stdout.splitlines()
    assert what == "CheckpointError True" and int(kilobytes) < 400_000


def test_an_open_set_without_its_features_is_said(checkpoint):
    forged(checkpoint, {"open_set": OPEN})
    with pytest.raises(ValueError, match="without its tensor 'known_features'"): open_set_of(load_detector(checkpoint))


ODD_VALUES = (None, True, -1, 0, 3, 1e400, float("nan"), 2**80, 0.5, "", "abc", "x" * 5000, [], ["a"], [[1]], {}, {"a": 1},
              {"detection": None})


def test_fuzzed_headers_give_a_network_or_a_checkpoint_error(tmp_path):
    "200 headers with one or two entries replaced, at any depth, and the checksum put right."
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    known = {"known_features": torch.ones(9, 64)}
    save_checkpoint(small_classifier(input_size=96), files[0], probability=FITTED, open_set=OPEN, extra=known)
    save_checkpoint(SelfConNet(create_backbone("resnet18", width=0.125), projection_size=8), files[1], history=[{"loss": 1.0}])
    draw, loaded = random.Random(0), 0
    honest = [(read_header(path), load_file(path)) for path in files]
    clean = [load_checkpoint(path)[0].state_dict() for path in files]
    for _ in range(200):
        which = draw.randrange(2)
        header, tensors = json.loads(json.dumps(honest[which][0])), honest[which][1]
        header.pop("sha256")
        for _ in range(draw.randint(1, 2)):
            place = header
            while True:
                key = draw.choice([*place, "new"]) if draw.random() < 0.9 or not place else draw.choice(list(place))
                inner = place.get(key)
                if not isinstance(inner, dict) or not inner or draw.random() < 0.4: break
                place = inner
            if draw.random() < 0.15: place.pop(key, None)
            else: place[key] = draw.choice(ODD_VALUES)
        header["sha256"] = weights_digest(header, tensors)
        save_file(tensors, files[which], metadata={"header": json.dumps(header)})
        try: model = load_checkpoint(files[which])[0]
        except CheckpointError as error: assert files[which].name in str(error)
        else:
            loaded += 1
            assert all(torch.equal(t, clean[which][n]) for n, t in model.state_dict().items())
    assert 10 < loaded < 150, "some changes are harmless, most are not"


@pytest.mark.parametrize("text", [
    "", "null", "[1]", "{", "[" * 100_000, '{"a":' * 5000 + "1" + "}" * 5000, '{"format": "imaginet_nb checkpoint", "version": [[1]]}',
    '{"format": "imaginet_nb checkpoint", "version": ' + "9" * 5000 + "}"], ids=range(8))
def test_metadata_that_is_no_header_is_refused(tmp_path, text):
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.ones(1)}, path, metadata={"header": text})
    with pytest.raises(CheckpointError, match="m.safetensors"): load_checkpoint(path)


@pytest.mark.parametrize("kind", ["BOOL", "U8", "I16", "U64", "F16", "BF16", "F64", "C64", "F8_E4M3", "F4", "F6_E2M3"])
def test_tensors_of_any_type_of_numbers_are_read_or_refused(tmp_path, checkpoint, kind):
    "Types that torch does not know must not end in a traceback; others do not fit their checksum."
    content = checkpoint.read_bytes()
    length = int.from_bytes(content[:8], "little")
    head = json.loads(content[8:8 + length])
    name = next(n for n in head if n != "__metadata__")
    head[name]["dtype"] = kind
    text = json.dumps(head).encode()
    checkpoint.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length:])
    with pytest.raises(CheckpointError, match="c.safetensors"): load_checkpoint(checkpoint)


@pytest.mark.parametrize("classifier", [[1, 2], {"4.weight": "x", "1.weight": 1, "0.weight": 2}, {3: torch.ones(1)},
                                        {f"{n}.weight": torch.tensor(1.0) for n in (0, 1, 4)}])
def test_an_odd_classifier_in_the_authors_file_is_refused(tmp_path, authors, classifier):
    torch.save({"model": authors["model"], "classifier": classifier}, tmp_path / "authors.pth")
    with pytest.raises(CheckpointError, match="authors.pth: unknown classifier"):
        convert_authors_checkpoint(tmp_path / "authors.pth", tmp_path / "ours.safetensors")
