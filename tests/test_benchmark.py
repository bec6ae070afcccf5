"""The fast ways give the answers of the plain ones, in the memory that they promise. Nothing here is timed."""
import os
import shutil
import sys
import sysconfig
import tracemalloc
import weakref
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch

from imaginet_nb.apps.benchmark import (
    CPU,
    RATIO_COLUMNS,
    compare,
    interleaved,
    kept_bytes,
    loader_cases,
    logit_difference,
    mixed_files,
    settled,
    summary,
    training_case,
)
from imaginet_nb.apps.plan import image_counts
from imaginet_nb.core import load_profile, repo_root, usable_precision
from imaginet_nb.data.augmentation import Stage1
from imaginet_nb.data.images import save
from imaginet_nb.data.packed import pack
from imaginet_nb.detectors import predictions as detectors
from imaginet_nb.models import fast as fast_models
from imaginet_nb.models import resnet
from imaginet_nb.models.fast import fast
from imaginet_nb.models.resnet import create_backbone
from imaginet_nb.models.selfcon import ImagiNetClassifier, SelfConNet
from imaginet_nb.reporting.tables import read_table, save_table
from imaginet_nb.training import stages
from imaginet_nb.training.grad_cache import cached_step
from imaginet_nb.training.loop import make_optimizer, random_batch
from imaginet_nb.training.losses import ImagiNetLoss


@pytest.fixture(scope="module")
def network() -> SelfConNet:
    torch.manual_seed(0)
    return SelfConNet(create_backbone("resnet50", width=0.125), projection_size=32)


@pytest.mark.parametrize("chunk_size", [None, 5])
def test_bfloat16_learns_with_the_losses_of_float32(network, chunk_size):
    "Ours: bfloat16, channels-last, perhaps in chunks. Tolerance: 5 % of the loss in each of six steps; here it is off by 1 to 2 %."
    batch = random_batch(12, 32)
    steps = [training_case(network, batch, ours=ours, precision=precision, chunk_size=chunk_size)
             for ours, precision in ((False, "float32"), (True, "bfloat16"))]
    plain, ours = (np.array([step().item() for _ in range(6)]) for step in steps)
    assert (plain != ours).any(), "no bfloat16 at all"
    assert plain[-1] < 0.9*plain[0], "nothing was learned, so equal losses mean nothing"
    np.testing.assert_allclose(ours, plain, rtol=0.05)


@pytest.mark.parametrize("size", [(32, 32), (40, 56), (33, 47)])
def test_fast_detectors_answer_as_the_plain_one(network, size):
    detector = settled(ImagiNetClassifier(network.backbone), random_batch(16, 32)[0])
    images = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (9, 3, *size), dtype=np.uint8))
    before = detector.score(images)
    exact, half = (logit_difference(detector, fast(detector, precision), images) for precision in ("float32", "bfloat16"))
    assert exact[1] > 1e-3, "logits without spread compare nothing"
    assert exact[0] < 1e-3*exact[1]
    assert half[0] < 0.3*half[1]
    if usable_precision("cpu", "bfloat16") == "bfloat16": assert exact[0] < half[0], "no bfloat16 at all"
    else: assert half == exact, "float32 stands in where the processor has no bfloat16"
    assert torch.equal(detector.score(images), before) and detector.precision == "float32", "the detector itself was changed"


def network_bytes(network: SelfConNet, batch_size: int, chunk_size: int, side: int = 32) -> int:
    "Most that the backward pass through the network has in waiting; the loss here compares nothing."
    return kept_bytes(lambda: cached_step(network.train(), random_batch(batch_size, side)[0], lambda z: z.sum(), chunk_size))


def test_memory_of_a_cached_batch_is_that_of_its_chunk(network):
    of_chunk = {size: network_bytes(network, 24, size) for size in (4, 8, 12, 24)}
    for size in (8, 12, 24): assert 0.9 < of_chunk[size]/of_chunk[4]/(size/4) < 1.1, of_chunk
    assert network_bytes(network, 48, 4) < 1.05*of_chunk[4], "grows with the batch"


def test_a_batch_of_4096_needs_the_memory_of_its_chunk():
    tiny = SelfConNet(create_backbone("resnet18", width=0.0625), projection_size=8)
    assert network_bytes(tiny, 4096, 256, side=8) < 1.02*network_bytes(tiny, 512, 256, side=8) < 0.6*network_bytes(tiny, 512, 512, side=8)


def test_the_ratios_of_a_tiny_run(tmp_path, network):
    manifest = mixed_files(tmp_path/"files", files=7, shrink=8)
    store, batch = pack(manifest, tmp_path/"files", tmp_path/"store", jobs=1), random_batch(4, 32)
    detector = settled(ImagiNetClassifier(network.backbone), batch[0])
    sooner = fast(detector)
    groups = {
        "loader_stage1": (loader_cases(manifest, tmp_path/"files", store, Stage1(32)), 7),
        "training_cpu": ({"plain": training_case(network, batch, ours=False), "ours": training_case(network, batch)}, 4),
        "inference_cpu": ({"plain": lambda: detector.score(batch[0]), "ours": lambda: sooner.score(batch[0])}, 4)}
    rows = pd.concat([compare(interleaved(cases, 3), group, "plain", CPU, per, condition="tiny") for group, (cases, per) in groups.items()])
    save_table(summary(rows, dict.fromkeys(groups, "tiny")), tmp_path/"ratios", "A tiny run.")
    table = read_table(tmp_path/"ratios")
    assert list(table) == RATIO_COLUMNS == ["group", "case", "baseline", "median", "baseline_median", "ratio", "unit", "device"]
    assert list(zip(table["group"], table["case"])) == [
        ("loader_stage1", "direct"), ("loader_stage1", "packed"), ("training_cpu", "ours"), ("inference_cpu", "ours")]
    assert set(table["baseline"]) == {"plain"} and (table["median"] > 0).all()
    np.testing.assert_allclose(table["ratio"], table["baseline_median"]/table["median"], rtol=0.05)


class Stub:
    "A detector that counts which of the batches it has seen are still in memory."
    name, input_size = "stub", None

    def __init__(self) -> None:
        self.batches: list[weakref.ref] = []
        self.most = 0

    def score(self, images: torch.Tensor) -> torch.Tensor:
        self.batches = [batch for batch in self.batches if batch() is not None] + [weakref.ref(images)]
        self.most = max(self.most, len(self.batches))
        return images[:, 0, 0, 0].float()


def test_forty_thousand_files_are_scored_in_the_memory_of_a_few(monkeypatch):
    "All images together would take 123 MB; the paths and answers of 40,000 rows take some tens."
    monkeypatch.setattr(detectors, "decode", lambda path: np.full((32, 32, 3), int(path.name) % 251, np.uint8))
    stub, n = Stub(), 40_000
    manifest = pd.DataFrame({"path": [str(i) for i in range(n)]})
    tracemalloc.start()
    try:
        rows = detectors.predict(stub, manifest, "", batch_size=500, num_workers=0)
        peak = tracemalloc.get_traced_memory()[1]
    finally: tracemalloc.stop()
    assert rows["logit"].tolist() == [i % 251 for i in range(n)] and rows["error"].isna().all()
    assert peak < 60e6 and 1 <= stub.most <= 2, (peak, stub.most)


def test_the_table_of_compilation_has_every_row_before_anything_is_compiled():
    "The cell of the benchmark as on a GPU, with a stub for the compiler, stopped in the third case."
    book = nbformat.read(repo_root()/"nbs"/"pipelines"/"p95_benchmark.ipynb", as_version=4)
    cell, = [c.source for c in book.cells if c.source.startswith("#papermill_description=compiling_all")]
    tables: list[pd.DataFrame] = []

    def compiled(group, case, cases, make, images, size, device, condition):
        if len(tables) == 3: raise KeyboardInterrupt
        return dict(group=group, case=case, condition=condition, ratio=2.0, note="")

    def write():
        tables.append(names["compiling"])
        return None, None, None

    groups = {"training_gpu": "200 crops of 96x96", "stage2_gpu": "100 crops of 256x256"}
    scoring = [("inference_gpu", "32 of 256x256"), ("inference_448_gpu", "8 of 448x448"), ("inference_gpu", "1 of 256x256")]
    names = dict(
        pd=pd, torch=torch, CPU=CPU, devices=[], gpu=torch.device("cuda"), side=256, large=448, seed=0, conditions=groups,
        stages=[(group, None, None, 200, 96) for group in groups], learning=dict.fromkeys(groups),
        scoring=dict.fromkeys(scoring), random_batch=lambda *_: [None], compiled=compiled, write=write)
    with pytest.raises(KeyboardInterrupt): exec(cell, names)
    waiting = "not run: stopped before"
    assert [table["note"].tolist() for table in tables] == [[""]*done + [waiting]*(8 - done) for done in range(3)]
    assert tables[0]["case"].tolist()[-2:] == ["max-autotune"]*2 # the slowest to compile
    committed = read_table(repo_root()/"reports"/"benchmark-gpu"/"tables"/"compile")
    columns = ["group", "case", "condition"]
    assert committed[columns].to_numpy().tolist() == tables[0][columns].to_numpy().tolist()


def test_the_gpu_profile_is_the_configuration_of_the_paper():
    gpu, paper = load_profile("gpu"), load_profile("paper")
    assert (gpu.model.name, gpu.model.width, gpu.model.exit_stage, gpu.model.projection_size) == (
        paper.model.name, paper.model.width, paper.model.exit_stage, paper.model.projection_size)
    assert (gpu.data.crop_size, gpu.data.image_size, gpu.pretrain.batch_size) == (96, 256, 200)
    assert gpu.pretrain.chunk_size is None and gpu.pretrain.precision == "bfloat16" # a GPU holds the whole batch
    assert gpu.sandbox is not None and gpu.sandbox.sides[0] >= gpu.data.crop_size
    crops = gpu.pretrain.epochs*4*gpu.sandbox.images//5 # four fifths are for training
    assert gpu.pretrain.epochs >= 15 and crops >= 60_000, "too few steps for a curve to flatten"


@pytest.mark.parametrize("name", ["demo", "gpu", "paper"])
def test_stage_2_has_the_steps_to_forget_where_its_running_statistics_started(name):
    """Each step moves running statistics by a tenth: 0.9 to the number of steps is the share of the first ones that is left.

    Those of the heads are 0 and 1, those of the backbone belong to crops. The profile gpu had 12 steps, and a share of 0.28."""
    profile = load_profile(name)
    images = image_counts(profile)["calibration"] - profile.evaluation.calibration_images
    small = stages.small_stages(profile).calibrate
    for settings, count in ((profile.calibrate, images), (small, profile.generalisation.train_images)):
        assert 0.9**(settings.epochs*(count//settings.batch_size)) < 0.01, settings


def test_wide_heads_do_not_begin_with_too_long_steps():
    "Adam moves each weight by the learning rate at first, so an output moves by the rate times the width: the rule of the profiles."
    for name in ("demo", "gpu", "paper"):
        profile = load_profile(name)
        features = create_backbone(profile.model.name, profile.model.width).num_features
        assert profile.calibrate.learning_rate*features <= 1.1, name # demo 0.26, paper 0.2; the profile gpu had 4.1


@pytest.fixture
def long_training(tmp_path, monkeypatch):
    """Settings, images and a network whose training is compiled, with as few layers as a ResNet can have.

    torch traces the network forward and backward, and its debug compiler `aot_eager` runs the graphs: the C++ kernels of a whole
    network would take minutes to compile on a CPU. Those of a block are tested below, and those of a GPU by the benchmark."""
    graphs = []
    def compiler(graph, inputs, **options):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs, **options)
    compile_as = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **options: compile_as(module, **{"backend": compiler, **options}))
    monkeypatch.setitem(resnet._LAYOUTS, "resnet18", ("BasicBlock", (1, 1, 1, 1)))
    monkeypatch.setattr(fast_models, "compilation_pays", lambda backbone, pixels, device: True)
    rows = []
    for i in range(8):
        save(np.random.default_rng(i).integers(0, 256, (24, 24, 3), dtype=np.uint8), tmp_path/f"{i}.png")
        rows.append({"path": f"{i}.png", "origin": ["real", "synthetic"][i % 2], "content_type": "photos",
                     "generator_family": "real" if i % 2 == 0 else ["GAN", "SD"][i//2 % 2], "generator": "x", "split": "train"})
    smoke = load_profile("smoke")
    data = smoke.data.model_copy(update=dict(crop_size=16, image_size=16))
    stage1 = smoke.pretrain.model_copy(update=dict(
        epochs=2, batch_size=4, chunk_size=None, precision="float32", optimizer="sgd", learning_rate=0.01))
    profile = smoke.model_copy(update=dict(data=data, pretrain=stage1, compile="auto"))

    def train(choice: str, resume: Path | None = None) -> tuple[pd.DataFrame, dict[str, torch.Tensor]]:
        torch.manual_seed(0)
        # channels-last layers of under 16 channels crash in torch on a CPU
        model = SelfConNet(create_backbone("resnet18", width=0.25), projection_size=8)
        history = stages.pretrain(model, pd.DataFrame(rows), tmp_path, profile.model_copy(update=dict(compile=choice)), CPU, resume)
        return history, model.state_dict()
    train.graphs = graphs
    yield train
    torch.compiler.reset()
    torch.compiler.set_stance("default")


def test_compiled_training_is_that_of_the_eager_network(long_training, tmp_path, monkeypatch, capsys):
    "Tolerance: the loss to 1e-4 of itself, weights to 1e-4, after four steps. Names of weights stay; going on equals not stopping."
    eager, compiled = long_training("never"), long_training("auto")
    assert "compile: took" in capsys.readouterr().out
    np.testing.assert_allclose(compiled[0]["loss"], eager[0]["loss"], rtol=1e-4)
    assert list(compiled[1]) == list(eager[1])
    for name, weight in eager[1].items(): torch.testing.assert_close(compiled[1][name], weight, rtol=1e-3, atol=1e-4, msg=name)
    assert long_training.graphs, "nothing was compiled"

    def stop(text: str) -> None:
        if text.startswith("epoch 2/2"): raise InterruptedError
    with monkeypatch.context() as patched, pytest.raises(InterruptedError):
        patched.setattr("imaginet_nb.training.loop._print_once", stop)
        long_training("auto", tmp_path/"state.pt")
    history, weights = long_training("auto", tmp_path/"state.pt")
    assert "continuing after epoch 1" in capsys.readouterr().out
    assert history["loss"].tolist() == compiled[0]["loss"].tolist()
    for name, weight in compiled[1].items(): assert torch.equal(weights[name], weight), name


class StemAndBlock(torch.nn.Module):
    "What a compiler fuses, once each: scaled pixels, BatchNorm with ReLU, BatchNorm with addition and ReLU, mean over space."

    def __init__(self):
        super().__init__()
        backbone = create_backbone("resnet18", width=1/16)
        self.stem, self.block = torch.nn.Sequential(backbone.conv1, backbone.bn1, backbone.relu), backbone.layer1[0]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.block(self.stem(images/255)).mean((2, 3))
        return torch.nn.functional.normalize(features, dim=1)[:, None]


@pytest.fixture
def cpp_kernels(tmp_path, monkeypatch):
    "An empty folder for torch's own compiler, inductor, whose settings stay as they are, but for what shortens a compilation."
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if not shutil.which(compiler): pytest.skip(f"no C++ compiler here ({compiler})")
    if not Path(sysconfig.get_path("include"), "Python.h").is_file(): pytest.skip("the headers of Python are not here")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    inductor = pytest.importorskip("torch._inductor.config")
    with inductor.patch({"compile_threads": 1, "cpp.vec_isa_ok": True}): yield tmp_path
    torch.compiler.reset()
    torch.compiler.set_stance("default")


def test_a_step_compiled_to_kernels_is_the_eager_step(cpp_kernels, capsys):
    """Inductor's C++ kernels, forward and backward, in float32, as in stage 1: the network compiled, the loss eager.

    Tolerance: loss to 1e-5 of itself, weights and running statistics to 1e-5, in each of four steps of SGD. Before them, the
    compilation leaves no trace. About 20 s of processor time, for six kernels: a whole ResNet has ten times as many."""
    batch = random_batch(4, 12)

    def four_steps(compiled: bool) -> tuple[list[float], list[dict[str, torch.Tensor]]]:
        torch.manual_seed(0)
        model = StemAndBlock().train()
        step, losses, states = stages.selfcon_step(model, ImagiNetLoss(0.5), CPU, "float32", None), [], []
        if compiled: assert fast_models.compile_network(model, lambda: step(batch)), capsys.readouterr().out
        optimizer = make_optimizer(model.parameters(), "sgd", learning_rate=0.5, weight_decay=0)
        for _ in range(4):
            losses.append(step(batch)["loss"].item())
            optimizer.step()
            optimizer.zero_grad()
            states.append({name: value.clone() for name, value in model.state_dict().items()})
        return losses, states

    (eager, expected), (compiled, found) = four_steps(False), four_steps(True)
    assert list(cpp_kernels.rglob("*.so")), "no kernel was compiled"
    assert eager[-1] < eager[0] - 0.01, "nothing was learned, so equal losses mean nothing"
    np.testing.assert_allclose(compiled, eager, rtol=1e-5)
    for one, other in zip(found, expected, strict=True):
        for name, value in other.items(): torch.testing.assert_close(one[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_a_compiler_that_fails_leaves_an_eager_training(long_training, monkeypatch, capsys):
    eager = long_training("never")
    compile_as = torch.nn.Module.compile
    def fail(*_): raise RuntimeError("no kernels today\nwith a long story")
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **options: compile_as(module, backend=fail, **options))
    failed = long_training("auto")
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("compile")]
    assert len(said) == 1 and "failed, eager instead" in said[0]
    assert failed[0]["loss"].tolist() == eager[0]["loss"].tolist()
    for name, weight in eager[1].items(): assert torch.equal(failed[1][name], weight), name
