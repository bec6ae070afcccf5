"""Classifiers of the Hugging Face Hub: the probabilities of their own library, and what goes wrong. Tiny random networks, no hub."""
import json
import socket
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import timm
import torch
import transformers as hf
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.metrics import balanced_accuracy_score, roc_auc_score
from typer.testing import CliRunner

from imaginet_nb.apps.calibrate import read_calibration
from imaginet_nb.apps.cli import app
from imaginet_nb.apps.predict import Scorer, Settings, read_scores, score_files
from imaginet_nb.core import seed_everything
from imaginet_nb.data.folders import read_labelled_folder
from imaginet_nb.data.images import save
from imaginet_nb.detectors.custom import DetectorError
from imaginet_nb.detectors.hub import hub_folder, load_hub_detector
from imaginet_nb.detectors.predictions import predict as predict_manifest
from imaginet_nb.models import checkpoints
from imaginet_nb.models.checkpoints import CheckpointError, fetch_checkpoint
from imaginet_nb.models.resnet import create_backbone
from imaginet_nb.models.selfcon import ImagiNetClassifier

LABELS = {0: "artificial", 1: "human"}
SHAPES = [(32, 32), (50, 70), (300, 90), (41, 200), (640, 481)]
WIDE = dict(id2label=LABELS, initializer_range=0.5)


def vit(folder: Path, **changes) -> None:
    config = hf.ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=8,
                          **WIDE | changes)
    hf.ViTForImageClassification(config).save_pretrained(folder)
    hf.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)


def swin(folder: Path) -> None:
    "Resized by the shorter side, bicubic, then cropped."
    config = hf.SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4, **WIDE)
    hf.SwinForImageClassification(config).save_pretrained(folder)
    hf.ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=0.8, resample=3).save_pretrained(folder)


def siglip(folder: Path) -> None:
    vision = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=8)
    model = hf.SiglipForImageClassification(hf.SiglipConfig(vision_config=vision, **WIDE))
    torch.nn.init.normal_(model.classifier.weight, std=0.5)
    model.save_pretrained(folder)
    hf.SiglipImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.5]*3, image_std=[0.5]*3).save_pretrained(folder)


def timm_model(folder: Path) -> None:
    "As timm itself pushes a network: configuration of its own, no image processor of transformers."
    from timm.models import save_for_hf
    network = timm.create_model("test_vit.r160_in1k", num_classes=2)
    torch.nn.init.normal_(network.head.weight, std=0.5)
    save_for_hf(network, folder, model_config=dict(label_names=["human", "artificial"]), safe_serialization=True)
    config = json.loads((folder/"config.json").read_text())
    config["model_args"] = dict(img_size=160) # the number of classes, repeated here, makes the pipeline of transformers 5.24 fail
    (folder/"config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    "Five shapes: noise on gradients, as PNG."
    folder, draw = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for number, (height, width) in enumerate(SHAPES):
        ramp = np.linspace(0, 200, width)[None, :, None]*np.linspace(0.2, 1, height)[:, None, None]*draw.uniform(0.2, 1, 3)
        kind = "real" if number % 2 else "synthetic/gan"
        save(np.clip(ramp + draw.normal(0, 30, (height, width, 3)), 0, 255).astype(np.uint8), folder/kind/f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny")/"tiny-vit"
    vit(folder)
    return folder


@pytest.mark.parametrize("make", [vit, swin, siglip, timm_model])
def test_probabilities_are_those_of_the_pipeline_of_its_own_library(tmp_path, pictures, make):
    torch.manual_seed(1)
    make(tmp_path/"model")
    detector, theirs = load_hub_detector(f"hf:{tmp_path/'model'}"), hf.pipeline("image-classification", model=str(tmp_path/"model"))
    files = sorted(pictures.rglob("*.png"))
    expected = [{row["label"]: row["score"] for row in theirs(Image.open(path))}["artificial"] for path in files]
    assert np.ptp(expected) > 0.01 # the pictures are told apart, so equal numbers mean something
    rows = list(score_files(files, Scorer(detector, Settings(views=False)), readers=0))
    assert [row["probability"] for row in rows] == pytest.approx(expected, abs=1e-3)
    whole = read_labelled_folder(pictures).manifest
    found = predict_manifest(detector, whole, pictures, num_workers=0).set_index("path")["probability"]
    assert [found[path.relative_to(pictures).as_posix()] for path in files] == pytest.approx(expected, abs=1e-3)


def test_the_command_asks_for_the_synthetic_label_and_adds_probabilities(tmp_path, pictures):
    torch.manual_seed(2)
    vit(tmp_path/"four", id2label={0: "real", 1: "sd", 2: "midjourney", 3: "dalle"})
    command = ["predict", str(pictures), "--detector", f"hf:{tmp_path/'four'}", "--out", str(tmp_path/"a.csv"), "--no-views"]
    asked = CliRunner().invoke(app, command)
    assert asked.exit_code == 1 and "real, sd, midjourney, dalle" in asked.output and "--synthetic-label" in asked.output
    labels = [word for name in ("sd", "midjourney", "dalle") for word in ("--synthetic-label", name)]
    done = CliRunner().invoke(app, [*command, *labels])
    assert done.exit_code == 0, done.output
    theirs = hf.pipeline("image-classification", model=str(tmp_path/"four"))
    for row in read_scores(tmp_path/"a.csv"):
        real = next(found["score"] for found in theirs(Image.open(row["path"])) if found["label"] == "real")
        assert row["probability"] == pytest.approx(1 - real, abs=1e-3)
    other = CliRunner().invoke(app, [*command, *labels[:2], "--resume"]) # another class is another detector
    assert other.exit_code == 1 and "detector" in other.output and "changed" in other.output


def test_a_repository_is_found_in_the_cache_by_its_commit_and_a_missing_one_is_named(tmp_path, tiny, monkeypatch):
    from huggingface_hub import constants
    commit, repository = "0123456789abcdef0123456789abcdef01234567", tmp_path/"hub"/"models--owner--detector"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path/"hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for path in tiny.iterdir(): save_bytes(repository/"snapshots"/commit/path.name, path.read_bytes())
    save_bytes(repository/"refs"/"main", commit.encode())
    for spec in ("hf:owner/detector", "hf:owner/detector@main", f"hf:owner/detector@{commit}"):
        detector = load_hub_detector(spec)
        assert (detector.name, detector.revision) == ("owner/detector", commit)
        assert Scorer(detector, identity=detector.identity).fingerprint.endswith(f"revision {commit}")
    with pytest.raises(DetectorError, match="hf:owner/other: not in the cache, and no download.*hf download owner/other"):
        hub_folder("owner/other")


def test_a_hub_that_does_not_answer_costs_seconds_and_the_cache_serves(tmp_path, tiny, monkeypatch):
    "A machine behind a firewall: connections are taken and nothing comes back. The library alone waits for minutes."
    from huggingface_hub import constants
    commit = "0123456789abcdef0123456789abcdef01234567"
    for path in tiny.iterdir(): save_bytes(tmp_path/"hub"/"models--owner--detector"/"snapshots"/commit/path.name, path.read_bytes())
    save_bytes(tmp_path/"hub"/"models--owner--detector"/"refs"/"main", commit.encode())
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path/"hub"))
    monkeypatch.setattr(checkpoints, "HUB_SECONDS", 0.3)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address, start = f"http://127.0.0.1:{silent.getsockname()[1]}", time.monotonic()
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
        assert hub_folder("owner/detector")[1] == commit
        with pytest.raises(DetectorError, match="no download .the hub cannot be reached.*name the folder"): hub_folder("owner/other")
        with pytest.raises(CheckpointError, match="the hub cannot be reached"): fetch_checkpoint("hf:owner/other")
    assert time.monotonic() - start < 5


def test_a_classifier_is_calibrated_on_real_pictures(tiny, tmp_path):
    "The threshold is the highest probability that its own library gives 19 pictures, and is refused with another classifier."
    theirs, draw = hf.pipeline("image-classification", model=str(tiny)), np.random.default_rng(0)
    pictures = [draw.integers(0, draw.integers(30, 256, 3), (40, 50, 3), dtype=np.uint8) for _ in range(24)]
    score = [{row["label"]: row["score"] for row in theirs(Image.fromarray(one))}["artificial"] for one in pictures]
    order = np.argsort(score)
    for place, number in enumerate(order): # the 19 lowest are the real ones
        save(pictures[number], tmp_path/("real" if place < 19 else "new")/f"{place}.png")

    def run(*words): return CliRunner().invoke(app, [str(word) for word in (*words, "--device", "cpu")])
    file, table = tmp_path/"calibration.json", tmp_path/"a.csv"
    made = run("calibrate", "--detector", f"hf:{tiny}", "--real", tmp_path/"real", "--out", file)
    assert made.exit_code == 0, made.output
    assert "19 real and 0 synthetic pictures" in made.output and "1 % false positives: no threshold from 19" in made.output
    assert read_calibration(file).calibration.thresholds["0.05"] == pytest.approx(score[order[18]], abs=1e-3)
    words = ("predict", tmp_path/"real", tmp_path/"new", "--no-views", "--calibration", file, "--out", table)
    scored = run(*words, "--detector", f"hf:{tiny}")
    assert scored.exit_code == 0, scored.output
    found = {row["path"]: row["verdict"] for row in read_scores(table)}
    expected = {"real": "not flagged", "new": "synthetic"}
    assert len(found) == 24 and found == {path: expected[Path(path).parent.name] for path in found}
    refused = run(*words, "--detector", changed(tiny, tmp_path/"other", "preprocessor_config.json", resample=0))
    assert refused.exit_code == 1 and "made for another detector" in refused.output, refused.output


def onnx_file(path: Path) -> None:
    "A tenth of the mean of all values, less ten; its YAML lies beside it."
    from onnx import TensorProto, helper, save_model
    nodes = [helper.make_node("GlobalAveragePool", ["x"], ["p"]), helper.make_node("Flatten", ["p"], ["f"]),
             helper.make_node("ReduceMean", ["f"], ["y"], axes=[1])]
    ends = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ("B", 3, "H", "W")),
            helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    graph = helper.make_graph(nodes, "net", ends[:1], ends[1:])
    save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    values = "range: [0, 255]\nmean: [100, 100, 100]\nstd: [10, 10, 10]\noutput: logit\n"
    path.with_suffix(".yaml").write_text(f"name: Net\ninput_size: 32\n{values}")


def test_hub_onnx_and_checkpoint_share_a_leaderboard_and_a_table_by_source(tiny, tmp_path, without_figures):
    "Numbers are scikit-learn's. Catches scores under another detector's name, rows of another source, a generator left out of the mean."
    rows, draw = [], np.random.default_rng(0)
    for k in range(30):
        maker, source = (("", "A", "B")[k // 10], "hub" if k >= 20 else ("flickr", "laion")[k % 2])
        rows.append((f"{k}.png", int(k >= 10), maker, source))
        save((draw.normal(100 + k // 3, 12, (1, 1, 3)) + draw.normal(0, 9, (32, 32, 3))).clip(0, 255).astype(np.uint8), tmp_path/f"{k}.png")
    listed = pd.DataFrame(rows, columns=["path", "label", "model", "source"])
    listed.to_csv(tmp_path/"list.csv", index=False)
    (tmp_path/"0.png").write_bytes((tmp_path/"0.png").read_bytes()[:-12]) # without its last chunk, which is a note
    onnx_file(tmp_path/"net.onnx")
    seed_everything(0)
    checkpoints.save_checkpoint(ImagiNetClassifier(create_backbone("resnet18", width=0.125), input_size=32), tmp_path/"net.safetensors")
    words = ["--detector", f"hf:{tiny}", "--detector", str(tmp_path/"net.onnx"), "--checkpoint", str(tmp_path/"net.safetensors")]
    result = CliRunner().invoke(app, ["evaluate", "--manifest", str(tmp_path/"list.csv"), *words, "--out", str(tmp_path/"out"),
                                      "--workers", "0", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    names = [checkpoints.load_detector(tmp_path/"net.safetensors").name, load_hub_detector(f"hf:{tiny}").name, "Net"]
    found = pd.read_csv(tmp_path/"out"/"predictions.csv")
    assert found.loc[found["note"].notna(), "path"].tolist() == ["0.png"]*3 and "with a note on their file: 1; " in result.output
    scores = {name: mine.set_index("path")["logit"][listed["path"]].to_numpy() for name, mine in found.groupby("detector")}
    means = [np.asarray(Image.open(tmp_path/path)).mean()/10 - 10 for path in listed["path"]]
    assert sorted(scores) == sorted(names) and scores["Net"] == pytest.approx(means, abs=1e-3)
    real, synthetic = listed["label"].eq(0), listed["label"].eq(1)
    groups = {"flickr": listed["source"].eq("flickr"), "laion": listed["source"].eq("laion"), # of `hub` there are no real ones: all others'
              "hub": listed["source"].eq("hub") | real, "A": listed["model"].eq("A") | real, "B": listed["model"].eq("B") | real}
    tables = {stem: pd.read_csv(tmp_path/"out"/"tables"/f"{stem}.csv") for stem in ("leaderboard", "detection_by_source")}
    board, by_source = tables["leaderboard"].set_index("detector"), tables["detection_by_source"].set_index(["detector", "group"])
    means = {}
    for name, logit in scores.items():
        auc, acc = ({group: metric(synthetic[own], values[own]) for group, own in groups.items()}
                    for metric, values in ((roc_auc_score, logit), (balanced_accuracy_score, logit > 0)))
        for group in ("flickr", "laion", "hub"):
            assert by_source.loc[(name, group), ["auc", "acc"]].tolist() == pytest.approx([auc[group], acc[group]], abs=6e-5)
        means[name] = np.array([(one["A"] + one["B"])/2 for one in (auc, acc)])
        assert board.loc[name, ["auc", "acc"]].tolist() == pytest.approx(means[name], abs=6e-5)
    for name in names[1:]: # others are compared with the checkpoint
        difference = board.loc[name, ["difference_auc", "difference_acc"]].tolist()
        assert difference == pytest.approx(means[name] - means[names[0]], abs=1.1e-4)
    assert len({round(value[0], 3) for value in means.values()}) == 3 and np.isnan(board.loc[names[0], "difference_auc"])
    assert [name for name in board.index if name in names] == sorted(names, key=lambda name: -means[name][0]) # the best first


def save_bytes(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def changed(tiny: Path, folder: Path, name: str = "config.json", **keys) -> str:
    "A copy of a classifier with other settings, as a specification."
    for path in tiny.iterdir(): save_bytes(folder/path.name, path.read_bytes())
    (folder/name).write_text(json.dumps(json.loads((folder/name).read_text()) | keys))
    return f"hf:{folder}"


def test_a_folder_whose_timm_arguments_repeat_the_number_of_classes_gives_the_same_scores(tmp_path):
    torch.manual_seed(3)
    timm_model(tmp_path/"model")
    repeated = changed(tmp_path/"model", tmp_path/"repeated", model_args=dict(num_classes=2, img_size=160))
    images = torch.randint(0, 256, (2, 3, 200, 170), dtype=torch.uint8)
    found, expected = (load_hub_detector(spec).score(images) for spec in (repeated, f"hf:{tmp_path/'model'}"))
    assert found.tolist() == pytest.approx(expected.tolist(), abs=1e-5) and expected.abs().max() > 1e-3


def sharded(tiny: Path, folder: Path, scale: float = 1) -> str:
    "A classifier whose weights have a name that only its index says, beside a file that is not read; a specification."
    spec, names = changed(tiny, folder), list(tensors := load_file(tiny/"model.safetensors"))
    (folder/"model.safetensors").unlink()
    save_bytes(folder/"model-dummy.safetensors", b"")
    save_file({name: tensor*scale for name, tensor in tensors.items()}, folder/"w.safetensors", metadata={"format": "pt"})
    index = dict(metadata=dict(total_size=1), weight_map=dict.fromkeys(names, "w.safetensors"))
    save_bytes(folder/"model.safetensors.index.json", json.dumps(index).encode())
    return spec


def test_weights_that_only_an_index_names_belong_to_the_fingerprint(tiny, tmp_path):
    "A calibration of one detector is refused by another."
    first = load_hub_detector(sharded(tiny, tmp_path/"a"/"tiny"))
    same, other = (load_hub_detector(sharded(tiny, tmp_path/part/"tiny", scale)) for part, scale in (("b", 1), ("c", 2)))
    images = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8)
    assert first.score(images).tolist() == pytest.approx(load_hub_detector(f"hf:{tiny}").score(images).tolist())
    assert first.identity == same.identity != other.identity


@pytest.mark.parametrize("index, words", [
    ("{", "not an index of weights"), ('{"weight_map": {}}', "names no weights"),
    ('{"weight_map": {"a": "gone.safetensors"}}', "names gone.safetensors, which is missing"),
    ('{"weight_map": {"a": "config.json"}}', "names config.json.* not a safetensors file")])
def test_an_index_without_its_weights_is_named(tiny, tmp_path, index, words):
    spec = sharded(tiny, tmp_path/"model")
    (tmp_path/"model"/"model.safetensors.index.json").write_text(index)
    with pytest.raises(DetectorError, match=f"model.safetensors.index.json: .*{words}"): load_hub_detector(spec)


def test_nothing_but_data_is_loaded(tiny, tmp_path):
    "Code in a folder is not run, and pickled weights are not read."
    spec = changed(tiny, tmp_path/"code", model_type="unheard-of", architectures=["Evil"],
                   auto_map={"AutoConfig": "evil.Config", "AutoModelForImageClassification": "evil.Evil"})
    (tmp_path/"code"/"evil.py").write_text(f"open({str(tmp_path/'ran')!r}, 'w')\n")
    with pytest.raises(DetectorError, match="not an image classifier"): load_hub_detector(spec)
    code = dict(image_processor_type="Evil", auto_map={"AutoImageProcessor": "evil.Evil"})
    spec = changed(tiny, tmp_path/"processor", "preprocessor_config.json", **code)
    (tmp_path/"processor"/"evil.py").write_text(f"open({str(tmp_path/'ran')!r}, 'w')\n")
    with pytest.raises(DetectorError, match="image processor"): load_hub_detector(spec)
    assert not (tmp_path/"ran").exists()
    spec = changed(tiny, tmp_path/"pickle")
    (tmp_path/"pickle"/"model.safetensors").rename(tmp_path/"pickle"/"pytorch_model.bin")
    with pytest.raises(DetectorError, match="no weights as safetensors"): load_hub_detector(spec)


@pytest.mark.parametrize("keys, words", [
    (dict(num_hidden_layers=2), "weights are missing"), (dict(model_type="bert"), "not an image classifier"),
    (dict(problem_type="multi_label_classification"), "exclude each other"),
    (dict(id2label={"0": "cat", "1": "dog"}, label2id={"cat": 0, "dog": 1}), "cat, dog"),
    (dict(id2label={"1": "real", "2": "fake"}), "config.json: id2label has the keys 1, 2; expected 0 to 1"),
    (dict(transformers_weights="model-other.safetensors"), "config.json: transformers_weights names model-other.safetensors")])
def test_what_cannot_be_used_is_refused(tiny, tmp_path, keys, words):
    spec = changed(tiny, tmp_path/"other", **keys)
    save_bytes(tmp_path/"other"/"model-other.safetensors", (tiny/"model.safetensors").read_bytes())
    with pytest.raises(DetectorError, match=words): load_hub_detector(spec)


@pytest.mark.parametrize("key, value", [("resample", 99), ("image_mean", "abc"), ("image_std", None), ("rescale_factor", "a"),
                                        ("size", {"height": -5, "width": 32})])
def test_a_wrong_setting_of_an_image_processor_is_named_with_its_file(tiny, tmp_path, key, value):
    spec = changed(tiny, tmp_path/"wrong", "preprocessor_config.json", **{key: value})
    with pytest.raises(DetectorError) as error: load_hub_detector(spec)
    assert f"{spec}: preprocessor_config.json: {key} {value!r}: no picture" in str(error.value)


def test_weights_of_a_named_detector_that_are_damaged_or_asked_for_labels(tmp_path):
    folder = tmp_path/"commfor-model-224"
    save_bytes(folder/"model.safetensors", b"garbage")
    with pytest.raises(DetectorError, match="commfor-model-224: the weights are not complete safetensors files"):
        load_hub_detector(f"hf:{folder}")
    with pytest.raises(DetectorError, match="leave out --synthetic-label"):
        load_hub_detector(f"hf:{folder}", synthetic_labels=["fake"])


def test_processors_of_any_size_and_missing_ones_are_refused(tiny, tmp_path):
    spec = changed(tiny, tmp_path/"any", "preprocessor_config.json", do_resize=False)
    with pytest.raises(DetectorError, match="different sizes"): load_hub_detector(spec)
    (tmp_path/"any"/"preprocessor_config.json").unlink()
    with pytest.raises(DetectorError, match="image processor of its own"): load_hub_detector(spec)


def test_the_image_processor_belongs_to_the_fingerprint(tiny, tmp_path):
    def detector_part(spec): return Scorer(load_hub_detector(spec)).made_with["detector"]
    nearest = changed(tiny, tmp_path/"tiny-vit", "preprocessor_config.json", resample=0)
    assert detector_part(f"hf:{tiny}") != detector_part(nearest)


def test_the_list_of_detectors():
    listed = CliRunner().invoke(app, ["detectors", "list"]).output
    assert "OwensLab/commfor-model-384" in listed and "Grag2021" in listed
    shown = CliRunner().invoke(app, ["detectors", "show", "Organika/sdxl-detector"])
    assert "CC BY-NC 3.0" in shown.output and "not run here" in shown.output
    assert CliRunner().invoke(app, ["detectors", "show", "nobody"]).exit_code == 1
