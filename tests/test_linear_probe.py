"""The linear probe against scikit-learn and timm used directly, and what it refuses."""
import json

import numpy as np
import pandas as pd
import pytest
import torch
from forks import python
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from imaginet_nb.data.corruptions import Perturb
from imaginet_nb.data.images import save
from imaginet_nb.data.labels import FAMILIES
from imaginet_nb.detectors.linear_probe import BACKBONE, fit_linear_probe, load_linear_probe, save_linear_probe
from imaginet_nb.detectors.predictions import embed, predict
from imaginet_nb.models.checkpoints import CheckpointError, read_weights_header, weights_digest
from imaginet_nb.models.resnet import WeightsError

timm = pytest.importorskip("timm")
TINY = "test_vit.r160_in1k" # 0.3 million parameters; normalises with mean and standard deviation 0.5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "Noise of different strength for each family, and the weights of a backbone."
    root, generator = tmp_path_factory.mktemp("probe"), np.random.default_rng(0)
    torch.manual_seed(0)
    for name in (TINY, "test_resnet.r160_in1k"):
        save_file({k: v.contiguous() for k, v in timm.create_model(name).state_dict().items()}, root/f"{name}.safetensors")
    rows = []
    for i in range(40):
        family = [*["real"]*4, *FAMILIES][i % 8]
        strength = 1 if family == "real" else 1.4 + FAMILIES.index(family)
        save((generator.integers(0, 256, (40, 40, 3))/strength).astype(np.uint8), root/f"{i}.png")
        rows.append(dict(path=f"{i}.png", origin="real" if family == "real" else "synthetic", content_type="photos",
                         generator_family=family, generator=family, split="train"))
    pd.DataFrame(rows).to_csv(root/"manifest.csv", index=False)
    return root


@pytest.fixture(scope="module")
def manifest(folder):
    return pd.read_csv(folder/"manifest.csv")


def fit(manifest, folder, name=TINY, **more):
    return fit_linear_probe(name, manifest, folder, **{**dict(weights=folder/f"{name}.safetensors", input_size=32, num_workers=0), **more})


@pytest.fixture(scope="module")
def probe(manifest, folder):
    return fit(manifest, folder)


def by_hand(manifest, folder) -> np.ndarray:
    "Features from Pillow and timm alone: the middle 32 pixels, halves for mean and deviation."
    backbone = timm.create_model(TINY, img_size=32, num_classes=0).eval()
    state = {k: v for k, v in load_file(folder/f"{TINY}.safetensors").items() if not k.startswith("head.")}
    timm_filter = timm.models.vision_transformer.checkpoint_filter_fn
    backbone.load_state_dict(timm_filter(state, backbone))
    pixels = np.stack([np.asarray(Image.open(folder/path).crop((4, 4, 36, 36))) for path in manifest["path"]])
    with torch.no_grad(): return backbone(torch.from_numpy(pixels).permute(0, 3, 1, 2)/127.5 - 1).numpy()


def test_scores_are_those_of_scikit_learn_on_timm_features(probe, manifest, folder):
    features = by_hand(manifest, folder)
    np.testing.assert_allclose(embed(probe, manifest, folder, num_workers=0), features, atol=1e-4)
    synthetic = (manifest["origin"] == "synthetic").to_numpy()
    detection = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=2000)).fit(features, synthetic)
    found = predict(probe, manifest, folder, num_workers=0)
    np.testing.assert_allclose(found["logit"], detection.decision_function(features), atol=1e-2)
    codes = manifest["generator_family"][synthetic].map({f: k for k, f in enumerate(FAMILIES)})
    families = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=2000)).fit(features[synthetic], codes)
    np.testing.assert_allclose(found[[f"p_{f}" for f in FAMILIES]], families.predict_proba(features), atol=1e-2)
    assert ((found["logit"] > 0) == synthetic).mean() > 0.9


def test_the_backbone_is_frozen_and_is_that_of_the_file(probe, folder):
    assert not any(p.requires_grad for p in probe.parameters())
    state = load_file(folder/f"{TINY}.safetensors")
    for name, tensor in probe.backbone.state_dict().items():
        if name != "pos_embed": torch.testing.assert_close(tensor, state[name], atol=0, rtol=0)
    assert probe.backbone.state_dict()["pos_embed"].shape != state["pos_embed"].shape # interpolated to 32 pixels


def test_the_same_seed_gives_the_same_probe_and_random_state_is_left_alone(manifest, folder):
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    one, other = (fit(manifest, folder, transform=Perturb(32, None), seed=5) for _ in range(2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(one.detection.weight, other.detection.weight)
    assert not torch.equal(one.detection.weight, fit(manifest, folder, transform=Perturb(32, None), seed=6).detection.weight)


def test_a_convolutional_backbone_of_any_size(manifest, folder):
    probe = fit(manifest, folder, "test_resnet.r160_in1k", input_size=36)
    assert probe.score(torch.zeros(2, 3, 36, 36, dtype=torch.uint8)).shape == (2,)


def test_the_default_backbone_takes_weights_of_its_own_size(manifest, folder, tmp_path):
    "DINOv2 is published at 518 pixels and used at 224: position embeddings are interpolated, nothing else is missing."
    torch.manual_seed(0)
    save_file(timm.create_model(BACKBONE).state_dict(), tmp_path/"dinov2.safetensors")
    probe = fit(manifest.iloc[:8], folder, BACKBONE, weights=tmp_path/"dinov2.safetensors", input_size=224)
    assert probe.input_size == 224 and probe.detection.in_features == 384 and probe.backbone.patch_embed.grid_size == (16, 16)


def test_a_file_gives_the_same_scores(probe, folder, tmp_path):
    save_linear_probe(probe, tmp_path/"probe.safetensors")
    back = load_linear_probe(tmp_path/"probe.safetensors")
    images = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (3, 3, 50, 20), dtype=np.uint8))
    for method in ("score", "identify", "embed"): assert torch.equal(getattr(back, method)(images), getattr(probe, method)(images))
    assert back.facts["weights"] == f"{TINY}.safetensors" and len(back.facts["weights_sha256"]) == 64 and back.facts["images"] == 40


def test_damaged_and_foreign_files_are_refused(probe, tmp_path):
    path = tmp_path/"probe.safetensors"
    save_linear_probe(probe, path)
    content = bytearray(path.read_bytes())
    content[-9] ^= 4
    (tmp_path/"flipped.safetensors").write_bytes(content)
    (tmp_path/"cut.safetensors").write_bytes(content[:1000])
    save_file({"x": torch.zeros(1)}, tmp_path/"other.safetensors", metadata={"header": json.dumps(["no", "probe"])})
    for name, why in (("flipped", "checksum"), ("cut", "not a complete"), ("other", "not a linear probe"), ("none", "cannot be read")):
        with pytest.raises(CheckpointError, match=why) as caught: load_linear_probe(tmp_path/f"{name}.safetensors")
        assert f"{name}.safetensors" in str(caught.value)


def test_no_connection_is_one_clear_error_at_once(manifest, folder, monkeypatch, tmp_path):
    "A closed port of this machine stands for a hub that cannot be reached."
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: _Hub())
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    with pytest.raises(WeightsError, match="not supplied, and no download") as caught: fit_linear_probe(BACKBONE, manifest, folder)
    assert BACKBONE in str(caught.value) and "timm/vit_small_patch14_dinov2.lvd142m" in str(caught.value)


class _Hub:
    def model_info(self, repository, timeout):
        from huggingface_hub import HfApi
        return HfApi(endpoint="http://127.0.0.1:9").model_info(repository, timeout=timeout)


def test_weights_that_do_not_fit_are_refused(manifest, folder, tmp_path):
    "timm itself would leave what is missing random as soon as it is asked for no classifier."
    state = load_file(folder/f"{TINY}.safetensors")
    save_file({k: v for k, v in state.items() if k != "blocks.3.mlp.fc1.weight"}, tmp_path/"hole.safetensors")
    (tmp_path/"text.safetensors").write_text("not weights")
    torch.save({"run": print}, tmp_path/"code.pth")
    wrong = [(tmp_path/"hole.safetensors", "blocks.3.mlp.fc1.weight"), (folder/"test_resnet.r160_in1k.safetensors", "cannot be used"),
             (tmp_path/"text.safetensors", "cannot be used"), (tmp_path/"code.pth", "weights_only"), (tmp_path/"none.pth", "no such file")]
    for path, why in wrong:
        with pytest.raises(WeightsError, match=why) as caught: fit(manifest, folder, weights=path)
        assert path.name in str(caught.value)


def test_what_else_is_refused(manifest, folder, tmp_path):
    with pytest.raises(ValueError, match="got 20 and 0"): fit(manifest[manifest["origin"] == "real"], folder)
    with pytest.raises(WeightsError, match="no model 'vit_of_dreams'"): fit_linear_probe("vit_of_dreams", manifest, folder)
    with pytest.raises(WeightsError, match="at 33 pixels"): fit(manifest, folder, input_size=33)
    broken = {k: v*float("nan") for k, v in load_file(folder/f"{TINY}.safetensors").items()}
    save_file(broken, tmp_path/"nan.safetensors")
    with pytest.raises(WeightsError, match="not finite"): fit(manifest, folder, weights=tmp_path/"nan.safetensors")


def test_a_family_that_is_missing_means_no_identification(manifest, folder):
    without = fit(manifest[manifest["generator_family"] != "SD"], folder)
    assert without.tracks == ("detection",)
    found = predict(without, manifest, folder, num_workers=0)
    assert found["predicted_family"].isna().all() and found["logit"].notna().all()


def rewritten(probe, path, changes):
    "A probe's file with other entries in its header, and a checksum that is right for them."
    save_linear_probe(probe, path)
    tensors = load_file(path)
    header = read_weights_header(path, "imaginet_nb linear probe", 1, "") | changes
    header = {key: value for key, value in header.items() if key != "sha256"}
    header["sha256"] = weights_digest(header, tensors)
    save_file(tensors, path, metadata={"header": json.dumps(header)})
    return path


@pytest.mark.parametrize("changes, words", [
    ({"backbone_name": ["x"]}, "header: backbone_name: .*string"),
    ({"backbone_name": "vit_of_dreams"}, "no model 'vit_of_dreams'"),
    ({"backbone_name": "test_resnet.r160_in1k"}, "weights do not fit the network"),
    ({"input_size": 10**9}, "header: input_size: .*got 1000000000"),
    ({"input_size": "32"}, "header: input_size: .*got '32'"),
    ({"input_size": 64}, "weights do not fit the network"), # a transformer has one embedding per patch
    ({"tracks": ["segmentation"]}, "header: tracks.0: .*got 'segmentation'"),
    ({"tracks": []}, "header: tracks: "),
    ({"name": ""}, "header: name: "),
    ({"facts": None}, "header: facts: .*got None"),
    ({"version": 2}, "header version 2"),
], ids=str)
def test_an_odd_header_is_refused_with_file_and_entry(probe, tmp_path, changes, words):
    "The checksum is right; the entries are not."
    with pytest.raises(CheckpointError, match=f"odd.safetensors: .*{words}"):
        load_linear_probe(rewritten(probe, tmp_path/"odd.safetensors", changes))


@pytest.mark.parametrize("backbone", ["vit_large_patch16_224.augreg_in21k", "resnet152.a1_in1k"])
def test_no_memory_is_taken_for_a_backbone_that_the_file_does_not_hold(probe, tmp_path, backbone):
    "The header of a file of two megabytes names a network of 240 MB or more."
    path = rewritten(probe, tmp_path/"odd.safetensors", {"backbone_name": backbone, "input_size": 224})
    script = ("import sys, resource, timm; from imaginet_nb.detectors.linear_probe import load_linear_probe\n"
              "from imaginet_nb.models.checkpoints import CheckpointError\n"
              "timm.create_model('test_vit.r160_in1k')\n"
              "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
              "try: load_linear_probe(sys.argv[1])\n"
              "except CheckpointError as error: assert 'do not fit the network' in str(error), error\n"
              "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)")
    done = python(script, path)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 100_000 # KiB
