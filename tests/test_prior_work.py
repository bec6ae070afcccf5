"""Detectors of others: files of the true names and shapes against forward passes written out with torch.nn.functional."""

import json
import math
import pickle
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from imaginet_nb.core import file_sha256
from imaginet_nb.data.images import ImageError, save
from imaginet_nb.data.labels import AnnotationError
from imaginet_nb.detectors import prior_work
from imaginet_nb.detectors.predictions import predict
from imaginet_nb.detectors.prior_work import (
    PRIOR_METHODS,
    WEIGHTS,
    add_anchors,
    available_prior_methods,
    create_prior_method,
    draw_anchors,
    import_weights,
    load_prior_method,
    missing_prior_methods,
    weights_table,
)
from imaginet_nb.detectors.protocol import Detector
from imaginet_nb.models.checkpoints import CheckpointError, load_checkpoint, read_header, weights_digest

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
Shapes = dict[str, tuple[int, ...]]
State = dict[str, torch.Tensor]


def images(n: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    "Soft coloured patches with noise: images that differ in more than noise."
    draw = torch.Generator().manual_seed(seed)
    patches = F.interpolate(torch.rand((n, 3, 4, 4), generator=draw), (height, width), mode="bilinear")
    return (230 * patches + 25 * torch.rand((n, 3, height, width), generator=draw)).to(torch.uint8)


# --- names and shapes of the published files, written down anew -------------------------------------------------------

def norm(name: str, channels: int) -> Shapes:
    shapes: Shapes = {f"{name}.{part}": (channels,) for part in ("weight", "bias", "running_mean", "running_var")}
    return shapes | {f"{name}.num_batches_tracked": ()}


def bottlenecks(layers: tuple[int, ...], inputs: int, width: int) -> Shapes:
    "Four stages of 1x1, 3x3, 1x1 convolutions that quadruple the channels; the first block of each has a shortcut of its own."
    shapes: Shapes = {}
    for stage, depth in enumerate(layers, start=1):
        planes = width * 2 ** (stage - 1)
        for block in range(depth):
            name = f"layer{stage}.{block}"
            shapes |= {f"{name}.conv1.weight": (planes, inputs, 1, 1), f"{name}.conv2.weight": (planes, planes, 3, 3),
                       f"{name}.conv3.weight": (4 * planes, planes, 1, 1)}
            shapes |= norm(f"{name}.bn1", planes) | norm(f"{name}.bn2", planes) | norm(f"{name}.bn3", 4 * planes)
            if block == 0:
                shapes |= {f"{name}.downsample.0.weight": (4 * planes, inputs, 1, 1)} | norm(f"{name}.downsample.1", 4 * planes)
            inputs = 4 * planes
    return shapes


def nodown_shapes() -> Shapes:
    "The file of Gragnaniello and of Corvi: torchvision's ResNet-50 with one logit."
    stem = {"conv1.weight": (64, 3, 7, 7)} | norm("bn1", 64)
    return stem | bottlenecks((3, 4, 6, 3), 64, 64) | {"fc.weight": (1, 2048), "fc.bias": (1,)}


def clip_shapes(layers: tuple[int, ...], width: int, output_dim: int, image_size: int, heads: int) -> Shapes:
    "CLIP's ResNet: three convolutions first, attention over the positions last."
    half, top, tokens = width // 2, 32 * width, (image_size // 32) ** 2 + 1
    shapes = {"conv1.weight": (half, 3, 3, 3), "conv2.weight": (half, half, 3, 3), "conv3.weight": (width, half, 3, 3)}
    shapes |= norm("bn1", half) | norm("bn2", half) | norm("bn3", width) | bottlenecks(layers, width, width)
    shapes["attnpool.positional_embedding"] = (tokens, top)
    for name, outputs in (("q", top), ("k", top), ("v", top), ("c", output_dim)):
        shapes |= {f"attnpool.{name}_proj.weight": (outputs, top), f"attnpool.{name}_proj.bias": (outputs,)}
    return shapes


def fill(shapes: Shapes, seed: int) -> State:
    "Seeded numbers of a size that keeps signals alive; statistics other than 0 and 1."
    draw, state = torch.Generator().manual_seed(seed), {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=draw)
        if name.endswith("num_batches_tracked"): state[name] = torch.tensor(1000)
        elif name.endswith("running_var"): state[name] = 0.8 + 0.2 * noise.abs()
        elif len(shape) == 1: state[name] = 0.1 * noise + (0.9 if name.endswith("weight") else 0)
        elif "q_proj" in name or "k_proj" in name: state[name] = noise / shape[1] ** 0.5
        elif name == "fc.weight": state[name] = 5e-4 * noise                                         # logits of about 1
        else: state[name] = noise * (2 / math.prod(shape[1:])) ** 0.5
    return state


# --- the two forward passes, written out ------------------------------------------------------------------------------

def batch_norm(w: State, name: str, x: torch.Tensor) -> torch.Tensor:
    return F.batch_norm(x, w[f"{name}.running_mean"], w[f"{name}.running_var"], w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-5)


def nodown_map(w: State, pixels: torch.Tensor) -> torch.Tensor:
    "Logits at every position, `(B, 1, H/8, W/8)`: stem and pooling with stride 1."
    x = F.relu(batch_norm(w, "bn1", F.conv2d((pixels / 255 - MEAN) / STD, w["conv1.weight"], padding=3)))
    x = F.max_pool2d(x, 3, stride=1, padding=1)
    for stage, depth in enumerate((3, 4, 6, 3), start=1):
        for block in range(depth):
            name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            y = F.relu(batch_norm(w, f"{name}.bn1", F.conv2d(x, w[f"{name}.conv1.weight"])))
            y = F.relu(batch_norm(w, f"{name}.bn2", F.conv2d(y, w[f"{name}.conv2.weight"], stride=stride, padding=1)))
            y = batch_norm(w, f"{name}.bn3", F.conv2d(y, w[f"{name}.conv3.weight"]))
            if block == 0: x = batch_norm(w, f"{name}.downsample.1", F.conv2d(x, w[f"{name}.downsample.0.weight"], stride=stride))
            x = F.relu(x + y)
    return F.conv2d(x, w["fc.weight"][:, :, None, None], w["fc.bias"])


def clip_embedding(w: State, pixels: torch.Tensor, layers: tuple[int, ...], heads: int) -> torch.Tensor:
    "Unit-norm embedding, `(B, D)`."
    x = (pixels / 255 - MEAN) / STD
    for i in (1, 2, 3): x = F.relu(batch_norm(w, f"bn{i}", F.conv2d(x, w[f"conv{i}.weight"], stride=2 if i == 1 else 1, padding=1)))
    x = F.avg_pool2d(x, 2)
    for stage, depth in enumerate(layers, start=1):
        for block in range(depth):
            name, shrink = f"layer{stage}.{block}", stage > 1 and block == 0
            y = F.relu(batch_norm(w, f"{name}.bn1", F.conv2d(x, w[f"{name}.conv1.weight"])))
            y = F.relu(batch_norm(w, f"{name}.bn2", F.conv2d(y, w[f"{name}.conv2.weight"], padding=1)))
            y = batch_norm(w, f"{name}.bn3", F.conv2d(F.avg_pool2d(y, 2) if shrink else y, w[f"{name}.conv3.weight"]))
            if block == 0:
                x = F.avg_pool2d(x, 2) if shrink else x
                x = batch_norm(w, f"{name}.downsample.1", F.conv2d(x, w[f"{name}.downsample.0.weight"]))
            x = F.relu(x + y)
    tokens = x.flatten(2).transpose(1, 2)                                                     # (B, P, C)
    tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], 1) + w["attnpool.positional_embedding"]
    def project(name, t): return F.linear(t, w[f"attnpool.{name}_proj.weight"], w[f"attnpool.{name}_proj.bias"])
    def split(t): return t.unflatten(-1, (heads, -1)).transpose(1, 2)                         # (B, heads, tokens, C/heads)
    q, k, v = split(project("q", tokens[:, :1])), split(project("k", tokens)), split(project("v", tokens))
    mixed = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1) @ v
    z = project("c", mixed.transpose(1, 2).flatten(2)[:, 0])
    return z / z.square().sum(1, keepdim=True).sqrt()


# --- Grag2021, Corvi2022, Corvi2022*: real size -------------------------------------------------------------------------

@pytest.fixture(scope="module")
def published() -> list[State]:
    return [fill(nodown_shapes(), seed) for seed in (1, 2)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, published) -> Path:
    "Files as published, and what the import makes of them."
    root = tmp_path_factory.mktemp("prior_work")
    others = {"optimizer": {"state": {}, "param_groups": [{"lr": 1e-4}]}, "total_steps": 1000}
    bare = {n: t for n, t in published[1].items() if not n.endswith("num_batches_tracked")}
    for name, content in (("grag2021", published[0]), ("corvi2022_progan", {f"module.{n}": t for n, t in published[0].items()}),
                          ("corvi2022_latent", bare)):
        torch.save({"model": content} | others, root / f"{name}.pth")
        import_weights(name, root / f"{name}.pth", root / "weights", accept_licence=True)
    return root


@torch.no_grad()
def test_grag2021_is_the_mean_of_a_map_of_logits(folder, published):
    x = images(2, 40, 56)
    logits = nodown_map(published[0], x)
    assert logits.shape == (2, 1, 5, 7)
    assert logits.std() > 0.1 and (logits[0] - logits[1]).mean().abs() > 0.1, "else a wrong network would pass"
    grag = load_prior_method("Grag2021", folder / "weights")
    torch.testing.assert_close(grag.score(x), logits.mean((1, 2, 3)), rtol=0, atol=1e-4)
    assert (grag.name, grag.input_size, grag.tracks) == ("Grag2021", None, ("detection",)) and isinstance(grag, Detector)
    with pytest.raises(ValueError, match="no identification head"): grag.identify(x)


@torch.no_grad()
def test_corvi2022_is_the_mean_of_two_networks_of_which_one_was_wrapped_and_one_has_no_counters(folder, published):
    x = images(1, 32, 32, seed=1)
    one, other = (nodown_map(state, x).mean((1, 2, 3)) for state in published)
    assert (one - other).abs() > 1e-2
    corvi = load_prior_method("Corvi2022", folder / "weights")
    torch.testing.assert_close(corvi.score(x), (one + other) / 2, rtol=0, atol=1e-4)
    torch.testing.assert_close(load_prior_method("corvi2022_latent", folder / "weights").score(x), other, rtol=0, atol=1e-4)
    assert corvi.name == "Corvi2022" and isinstance(corvi, Detector)


def test_the_header_tells_where_the_weights_come_from(folder):
    path = folder / "weights" / "grag2021.safetensors"
    header = read_header(path)
    assert header["converted_sha256"] == file_sha256(folder / "grag2021.pth") and header["converted_from"] == "grag2021.pth"
    assert header["weights"] == "grag2021" and "non-profit" in header["licence"] and header["licence_accepted"] is True
    with pytest.raises(CheckpointError, match="grag2021.safetensors"): load_checkpoint(path)   # not one of ours


def test_corvi2022_star_needs_no_acceptance_and_no_file_serves_twice(folder, published, tmp_path):
    torch.save(published[1], tmp_path / "model_epoch_best.pth")                                # the state dict without a wrapping
    path = import_weights("corvi2022_imaginet", tmp_path / "model_epoch_best.pth", tmp_path / "weights")
    assert read_header(path)["licence_accepted"] is False
    assert torch.equal(load_file(path)["detection.weight"], published[1]["fc.weight"])
    with pytest.raises(CheckpointError, match="was imported as corvi2022_imaginet"):
        import_weights("corvi2022_progan", tmp_path / "model_epoch_best.pth", tmp_path / "weights", accept_licence=True)
    assert [p.name for p in (tmp_path / "weights").iterdir()] == ["corvi2022_imaginet.safetensors"]


# --- what is refused ------------------------------------------------------------------------------------------------

class Trap:
    "A pickle that makes a file when it is read."
    def __init__(self, path: Path): self.path = path
    def __reduce__(self): return Path.touch, (self.path,)


def hollow(shapes: Shapes) -> State:
    "Tensors of the right shapes that take no room in a file."
    return {n: torch.ones((), dtype=torch.int64 if n.endswith("tracked") else torch.float32).expand(s) for n, s in shapes.items()}


def without(state: State, name: str) -> State: return {n: t for n, t in state.items() if n != name}


@pytest.mark.parametrize("content, words", [
    (lambda s: {"model": without(s, "layer4.2.bn3.running_var")}, r"1 missing \(such as backbone.layer4.2.bn3.running_var\).*grip-unina"),
    (lambda s: {"model": without(s, "fc.bias")}, "detection.bias"),
    (lambda s: {"model": s | {"layer5.weight": torch.ones(1)}}, "1 unexpected .*backbone.layer5.weight"),
    (lambda s: {"model": s | {"fc.weight": torch.ones(1000, 2048)}}, r"of another shape \(such as detection.weight\)"),
    (lambda s: {"model": s | {"bn1.bias": torch.full((64,), torch.nan)}}, r"1 weights are not finite \(such as backbone.bn1.bias\)"),
    (lambda s: {"model": s | {"bn1.bias": "no tensor"}}, "no state dict"),
    (lambda s: {"net": s}, "no state dict"),
    (lambda s: {"model": {}}, "no state dict"),
    (lambda s: list(s.values()), "no state dict"),
])
def test_files_that_do_not_fit_are_refused(tmp_path, content, words):
    torch.save(content(hollow(nodown_shapes())), tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match=words) as error: import_weights("grag2021", tmp_path / "file.pth", tmp_path / "w", True)
    assert "file.pth" in str(error.value) and not (tmp_path / "w").exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("bare", [True, False])
def test_a_pickle_with_code_is_not_run(tmp_path, bare):
    content = {"model": hollow(nodown_shapes()), "opt": Trap(tmp_path / "sprung")}
    if bare: (tmp_path / "file.pth").write_bytes(pickle.dumps({"model": content["opt"]}))
    else: torch.save(content, tmp_path / "file.pth")
    for name in WEIGHTS:
        with pytest.raises(CheckpointError, match="Nothing was run"): import_weights(name, tmp_path / "file.pth", tmp_path / "w", True)
    assert {p.name for p in tmp_path.iterdir()} == {"file.pth"}


def test_damaged_missing_and_unknown_files_are_refused(tmp_path):
    torch.save({"model": hollow(nodown_shapes())}, tmp_path / "cut.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "cut.pth").read_bytes()[:5000])
    (tmp_path / "empty.pth").write_bytes(b"")
    for name in ("cut.pth", "empty.pth", "nowhere.pth"):
        with pytest.raises(CheckpointError, match=name): import_weights("grag2021", tmp_path / name, tmp_path / "w", True)
    with pytest.raises(ValueError, match="known: grag2021, corvi2022_progan"): import_weights("Grag2021", tmp_path / "cut.pth", tmp_path)


@pytest.mark.parametrize("name", ["grag2021", "corvi2022_progan", "corvi2022_latent"])
def test_restricted_weights_are_not_even_read_before_the_terms_are_accepted(tmp_path, name):
    with pytest.raises(ValueError, match=r"non-profit use only; read https://github.com/grip-unina/.*--accept-licence"):
        import_weights(name, tmp_path / "does not exist.pth", tmp_path)


def test_a_changed_or_exchanged_imported_file_is_refused(folder, tmp_path):
    content = bytearray((folder / "weights" / "grag2021.safetensors").read_bytes())
    (tmp_path / "corvi2022_latent.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="holds grag2021, not corvi2022_latent"): load_prior_method("corvi2022_latent", tmp_path)
    content[-5] ^= 16
    (tmp_path / "grag2021.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="checksum"): load_prior_method("Grag2021", tmp_path)
    with pytest.raises(CheckpointError, match="checksum"): available_prior_methods(tmp_path)           # not passed over as missing
    with pytest.raises(CheckpointError, match=r"get Grag2021_progan/model_epoch_best.pth from .*imaginet weights import corvi2022_progan"):
        load_prior_method("Corvi2022", tmp_path)
    with pytest.raises(ValueError, match="unknown weights 'Corvi'"): load_prior_method("Corvi", tmp_path)


# --- Wu2023 -----------------------------------------------------------------------------------------------------------

SMALL = dict(layers=(1, 2, 2, 1), output_dim=24, heads=4, image_size=64, width=8)


def lasted_file(shapes: Shapes, seed: int | None = None) -> State:
    "State dict of LASTED inside DataParallel: image encoder, and names of what is not used."
    tower = hollow(shapes) if seed is None else fill(shapes, seed)
    unused = {"clip_model.logit_scale": (), "clip_model.positional_embedding": (77, 8), "clip_model.text_projection": (8, 8),
              "clip_model.transformer.resblocks.0.ln_1.weight": (8,), "output_layer.0.weight": (8, 8), "fc.bias": (4,)}
    return {f"module.clip_model.visual.{n}": t for n, t in tower.items()} | {f"module.{n}": torch.ones(s) for n, s in unused.items()}


@pytest.fixture
def lasted(tmp_path, monkeypatch) -> State:
    "A LASTED with a small tower, imported; what is returned are its weights under their short names."
    pytest.importorskip("open_clip")
    monkeypatch.setattr(prior_work, "CLIP_RN50X64", SMALL)
    state = lasted_file(clip_shapes(**SMALL), seed=3)
    torch.save(state, tmp_path / "lasted.pt")
    import_weights("wu2023", tmp_path / "lasted.pt", tmp_path / "weights")
    return {n.removeprefix("module.clip_model.visual."): t for n, t in state.items()}


@torch.no_grad()
def test_wu2023_is_minus_the_similarity_to_the_mean_anchor(tmp_path, lasted):
    x, real = images(3, 64, 64), images(5, 64, 64, seed=1)
    wu = load_prior_method("Wu2023", tmp_path / "weights")
    z, a = (clip_embedding(lasted, pixels, SMALL["layers"], SMALL["heads"]) for pixels in (x, real))
    torch.testing.assert_close(wu.embed(x), z, rtol=0, atol=1e-4)
    assert (z[0] - z[1]).norm() > 0.05, "else any network would pass"
    assert (clip_embedding(lasted, x, SMALL["layers"], 8) - z).norm() > 0.05, "else the number of heads would not matter"
    with pytest.raises(ValueError, match="add_anchors"): wu.score(x)
    wu.set_anchors(wu.embed(real))
    assert a.mean(0).norm() < 1 - 1e-4, "the mean of unit vectors is shorter, and stays so"
    torch.testing.assert_close(wu.score(x), -(z @ a.mean(0)), rtol=0, atol=1e-4)
    assert wu.name == "Wu2023" and wu.input_size == 64 and isinstance(wu, Detector)


@torch.no_grad()
@pytest.mark.parametrize("height, width", [(64, 64), (70, 101), (40, 64), (20, 150)])
def test_wu2023_pads_by_reflection_or_takes_the_middle(tmp_path, lasted, height, width):
    wu, x = load_prior_method("Wu2023", tmp_path / "weights"), images(1, height, width)
    down, right = max(0, 64 - height), max(0, 64 - width)
    padded = np.pad(x[0].numpy(), ((0, 0), (down // 2, down - down // 2), (right // 2, right - right // 2)), mode="reflect")
    top, left = (padded.shape[1] - 64) // 2, (padded.shape[2] - 64) // 2
    square = torch.from_numpy(padded[:, top:top + 64, left:left + 64].copy())[None]
    torch.testing.assert_close(wu.embed(x), clip_embedding(lasted, square, SMALL["layers"], SMALL["heads"]), rtol=0, atol=1e-4)


def test_scores_of_wu2023_stay_fine_in_bfloat16(tmp_path, lasted):
    wu = load_prior_method("Wu2023", tmp_path / "weights")
    wu.set_anchors(wu.embed(images(5, 64, 64, seed=1)))
    exact, wu.precision = wu.score(images(32, 64, 64)), "bfloat16"
    rounded = wu.score(images(32, 64, 64))
    torch.testing.assert_close(rounded, exact, rtol=0, atol=0.02)
    assert len(rounded.unique()) == 32 and (rounded.bfloat16().float() != rounded).any()


def test_the_true_tower_has_the_names_and_shapes_of_clip_rn50x64():
    open_clip = pytest.importorskip("open_clip")
    config = open_clip.get_model_config("RN50x64")
    with torch.device("meta"):
        tower = prior_work._clip_tower()
        theirs = open_clip.model._build_vision_tower(config["embed_dim"], config["vision_cfg"])
    shapes = {n: tuple(t.shape) for n, t in tower.state_dict().items()}
    assert shapes == clip_shapes((3, 15, 36, 10), 128, 1024, 448, 64) == {n: tuple(t.shape) for n, t in theirs.state_dict().items()}
    assert tower.attnpool.num_heads == theirs.attnpool.num_heads == 64 and theirs.image_size == 448
    assert sum(math.prod(s) for n, s in shapes.items() if "running" not in n and "tracked" not in n) == 420_380_352


@pytest.mark.parametrize("change, words", [
    (lambda s: {n.removeprefix("module."): t for n, t in s.items()}, "weights that LASTED does not have"),
    (lambda s: s | {"module.extra.weight": torch.ones(1)}, r"has 1 weights that LASTED does not have \(such as module.extra.weight\)"),
    (lambda s: without(s, "module.clip_model.visual.attnpool.c_proj.bias"), "1 missing .*backbone.0.attnpool.c_proj.bias"),
    (lambda s: s | {"module.clip_model.visual.attnpool.positional_embedding": torch.ones(50, 256)}, "of another shape .*positional_emb"),
    (lambda s: {n: t for n, t in s.items() if ".visual." not in n}, "missing .*HighwayWu/LASTED"),
])
def test_lasted_files_that_do_not_fit_are_refused(tmp_path, monkeypatch, change, words):
    pytest.importorskip("open_clip")
    monkeypatch.setattr(prior_work, "CLIP_RN50X64", SMALL)
    torch.save(change(lasted_file(clip_shapes(**SMALL))), tmp_path / "lasted.pt")
    with pytest.raises(CheckpointError, match=words): import_weights("wu2023", tmp_path / "lasted.pt", tmp_path / "w")
    assert not (tmp_path / "w").exists()


def test_without_open_clip_the_remedy_is_named(tmp_path, monkeypatch):
    for module in ("open_clip", "open_clip.modified_resnet"): monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=r"pip install imaginet_nb\[detectors\]"): create_prior_method("Wu2023")
    (tmp_path / "wu2023.safetensors").touch()
    monkeypatch.setattr(prior_work, "find_spec", lambda name: None)
    assert missing_prior_methods(tmp_path)["Wu2023"].endswith("pip install imaginet_nb[detectors]")
    assert available_prior_methods(tmp_path) == []


# --- anchors, tables --------------------------------------------------------------------------------------------------

@pytest.fixture
def pictures(tmp_path) -> tuple[pd.DataFrame, Path]:
    draw, rows = np.random.default_rng(0), []
    for i in range(12):
        rows.append(dict(path=f"{i}.png", origin="real" if i % 2 else "synthetic", content_type="photos",
                         generator_family="real" if i % 2 else "GAN", generator="real" if i % 2 else "ProGAN", split="train"))
        save(draw.integers(0, 256, (50 + 7*(i % 3), 64, 3), dtype=np.uint8), tmp_path / f"{i}.png")
    return pd.DataFrame(rows), tmp_path


def test_anchors_are_drawn_from_reals_and_do_not_depend_on_order_or_batches(pictures, lasted):
    manifest, root = pictures
    anchors = draw_anchors(manifest, seed=5, n=4)
    assert len(anchors) == 4 and set(anchors["origin"]) == {"real"}
    assert draw_anchors(manifest.iloc[::-1], seed=5, n=4)["path"].tolist() == anchors["path"].tolist()
    assert len(draw_anchors(manifest, seed=5)) == 6
    with pytest.raises(AnnotationError): draw_anchors(manifest[manifest["origin"] == "synthetic"], seed=5)
    one, two = (load_prior_method("Wu2023", root / "weights") for _ in range(2))
    add_anchors(one, anchors, root, batch_size=1)
    add_anchors(two, anchors.iloc[::-1], root)
    torch.testing.assert_close(one.detection.anchor, two.detection.anchor, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="0.png: anchors must be real"): add_anchors(one, manifest, root)
    (root / anchors["path"].iloc[0]).write_bytes(b"no image")
    with pytest.raises(ImageError, match=anchors["path"].iloc[0]): add_anchors(one, anchors, root)


def test_all_that_is_there_takes_part_and_the_rest_says_why_not(pictures, lasted, folder):
    manifest, root = pictures
    for name in ("grag2021", "corvi2022_progan"):
        (root / "weights" / f"{name}.safetensors").symlink_to(folder / "weights" / f"{name}.safetensors")
    ready = available_prior_methods(root / "weights", draw_anchors(manifest, seed=0), root)
    assert [method.name for method in ready] == ["Grag2021", "Wu2023"]
    rows = predict(ready[1], manifest, root)
    assert rows["logit"].between(-1, 1).all() and rows["error"].isna().all() and rows["predicted_family"].isna().all()
    notes = missing_prior_methods(root / "weights", [method.name for method in ready])
    assert notes == {"Corvi2022": "not run: weights not supplied: imaginet weights import corvi2022_latent FILE",
                     "Corvi2022*": "not run: weights not supplied: imaginet weights import corvi2022_imaginet FILE"}
    assert list(missing_prior_methods(root / "nowhere")) == list(PRIOR_METHODS)
    assert "p47_predict" in missing_prior_methods(root / "weights")["Grag2021"]
    table = weights_table(root / "weights").set_index("weights")
    assert list(table.index) == ["grag2021", "corvi2022_progan", "corvi2022_latent", "wu2023", "corvi2022_imaginet"]
    assert table["imported"].tolist() == ["grag2021.pth", "corvi2022_progan.pth", "", "lasted.pt", ""]


def test_a_header_without_its_weights_is_refused(folder, tmp_path):
    path = folder / "weights" / "grag2021.safetensors"
    save_file({"detection.bias": torch.zeros(1)}, tmp_path / "grag2021.safetensors", metadata={"header": json.dumps(read_header(path))})
    with pytest.raises(CheckpointError, match="checksum"): load_prior_method("Grag2021", tmp_path)


@pytest.mark.parametrize("changes, words", [
    ({"converted_from": None}, "converted_from: .*got None"),
    ({"licence_accepted": "yes"}, "licence_accepted: .*got 'yes'"),
    ({"page": ["x"]}, "page: .*valid string"),
    ({"kind": "classifier"}, "architecture: missing entry"),
    ({"kind": 7}, "kind: .*got 7"),
    ({"weights": ["grag2021"]}, r"holds \['grag2021'\], not grag2021"),
], ids=str)
def test_an_odd_header_of_imported_weights_is_refused(folder, tmp_path, changes, words):
    """The checksum is right; the entries are not."""
    path = folder / "weights" / "grag2021.safetensors"
    header = {key: value for key, value in (read_header(path) | changes).items() if key != "sha256"}
    tensors = load_file(path)
    header["sha256"] = weights_digest(header, tensors)
    save_file(tensors, tmp_path / "grag2021.safetensors", metadata={"header": json.dumps(header)})
    with pytest.raises(CheckpointError, match=f"grag2021.safetensors: .*{words}"): load_prior_method("Grag2021", tmp_path)
