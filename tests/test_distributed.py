"""Several processes compute what one computes; nobody dies with a half-written file; plans run side by side."""
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
import torch.multiprocessing as mp
import yaml
from torch.optim.optimizer import register_optimizer_step_pre_hook

from imaginet_nb.core import Profile, load_profile, repo_root, seed_everything
from imaginet_nb.data.corruptions import Perturb
from imaginet_nb.data.images import save
from imaginet_nb.data.manifest import write_manifest_csv
from imaginet_nb.detectors.predictions import embed, predict
from imaginet_nb.models.checkpoints import load_checkpoint
from imaginet_nb.models.resnet import create_backbone
from imaginet_nb.models.selfcon import ImagiNetClassifier, SelfConNet
from imaginet_nb.training import loop
from imaginet_nb.training import stages as training
from imaginet_nb.training.processes import joined, rank_and_size

ROOT, CPU = repo_root(), torch.device("cpu")
ENVIRONMENT = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1",
               "TQDM_DISABLE": "1"}


def make_images(root: Path, n: int = 47) -> pd.DataFrame:
    "Noise, and noise doubled in size. Of 47, one process makes two batches of 16; 24 for each of two would make a third."
    rows = []
    for i in range(n):
        synthetic, draw = i % 2, np.random.default_rng(i)
        small = draw.integers(60, 200, (16, 16, 3) if synthetic else (32, 32, 3), dtype=np.uint8)
        save(small.repeat(2, 0).repeat(2, 1) if synthetic else small, root/f"{i}.png")
        family, which = (("GAN", "ProGAN"), ("SD", "SD v2.1"), ("Midjourney",)*2, ("DALL-E 3",)*2)[i//2 % 4]
        rows.append((f"{i}.png", *(("synthetic", "photos", family, which) if synthetic else ("real", "photos", "real", "real")), "train"))
    return pd.DataFrame(rows, columns=["path", "origin", "content_type", "generator_family", "generator", "split"])


def small_profile(epochs: int = 1, learning_rate: float = 1.0, **pretrain) -> Profile:
    """With plain gradient descent at rate 1, one step moves each weight by its gradient.

    BatchNorm is frozen: torch synchronises it on GPUs only."""
    smoke, sgd = load_profile("smoke"), dict(epochs=epochs, batch_size=16, optimizer="sgd", learning_rate=learning_rate,
                                             weight_decay=0.0, precision="float32")
    return smoke.model_copy(update=dict(
        batchnorm="frozen",
        data=smoke.data.model_copy(update=dict(crop_size=24, image_size=28)),
        pretrain=smoke.pretrain.model_copy(update=sgd | dict(warmup_epochs=0, temperature=0.5, chunk_size=None) | pretrain),
        calibrate=smoke.calibrate.model_copy(update=sgd)))


def selfcon() -> SelfConNet:
    seed_everything(0)
    return SelfConNet(create_backbone("resnet18", width=0.125), exit_stage=2, projection_size=16)


def classifier() -> ImagiNetClassifier:
    seed_everything(0)
    return ImagiNetClassifier(create_backbone("resnet18", width=0.125))


# what is done by one process and by two; each gives a mean loss and the weights afterwards

def one_step(root: Path, manifest: pd.DataFrame, stage: str) -> tuple[list[float], dict]:
    manifest, profile = manifest[:16], small_profile(chunk_size=8 if stage == "selfcon, cached" else None)
    if stage == "baseline":
        model = classifier().backbone
        history = training.pretrain_cross_entropy(model, manifest, root, profile, CPU)
    elif stage == "stage 2":
        history = training.calibrate(model := classifier(), manifest, root, profile, CPU)
    else: history = training.pretrain(model := selfcon(), manifest, root, profile, CPU)
    return history["loss"].tolist(), model.state_dict()


def whole_run(root: Path, manifest: pd.DataFrame, resume: Path | None = None) -> tuple[list[float], dict]:
    "Four epochs with all that goes with them, in double precision: what is left of a difference is a mistake, not rounding."
    model = selfcon().double()
    history = training.pretrain(model, manifest, root, small_profile(epochs=4, learning_rate=0.01, chunk_size=8), CPU, resume)
    return history["loss"].tolist(), model.state_dict()


def predictions(root: Path, manifest: pd.DataFrame) -> tuple[pd.DataFrame, np.ndarray]:
    model, options = classifier(), dict(transform=Perturb(24, None), batch_size=4)
    damaged = pd.concat([manifest[:10], manifest[:1].assign(path="damaged.png")], ignore_index=True)
    return predict(model, damaged, root, **options), embed(model, manifest[:10], root, **options)


STAGES = ("selfcon", "selfcon, cached", "baseline", "stage 2")


def both(root: Path, manifest: pd.DataFrame, folder: Path) -> dict:
    results: dict = {stage: one_step(root, manifest, stage) for stage in STAGES}
    results["resumed"] = whole_run(root, manifest, folder/"left_by_one.pt")
    results["predictions"] = predictions(root, manifest)
    return results


def dies_in_third_epoch(root: Path, manifest: pd.DataFrame, states: Path) -> None:
    "The second process ends without a word in its fifth step, the first of the third epoch."
    steps = []

    def count(*_):
        steps.append(1)
        if len(steps) == 5 and rank_and_size()[0] == 1: os._exit(9)
    register_optimizer_step_pre_hook(count)
    whole_run(root, manifest, states/"left_by_two.pt")


def process(rank: int, port: int, folder: Path, images: tuple[Path, pd.DataFrame]) -> None:
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
                       MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1", TQDM_DISABLE="1")
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    try:
        with joined(CPU):
            torch.save(both(*images, folder), folder/f"{rank}.result")
            dies_in_third_epoch(*images, folder/"states")
    except RuntimeError as error:
        (folder/f"{rank}.error").write_text(str(error))
        sys.exit(1)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> tuple[Path, pd.DataFrame]:
    root = tmp_path_factory.mktemp("images")
    manifest = make_images(root)
    (root/"damaged.png").write_bytes((root/"0.png").read_bytes()[:200])
    return root, manifest


@pytest.fixture(scope="module")
def alone(images) -> dict:
    torch.set_num_threads(1)
    return {stage: one_step(*images, stage) for stage in STAGES} | dict(run=whole_run(*images), predictions=predictions(*images))


@pytest.fixture(scope="module")
def folder(images, tmp_path_factory) -> Path:
    """What two processes, joined over gloo, leave behind: their results, and, as one of them dies at last, a state.

    They are forked, which saves their imports, and nobody ends the one that survives but itself."""
    folder = tmp_path_factory.mktemp("together")

    class Killed(Exception): pass

    def killed(text):
        if text.startswith("epoch 3/4"): raise Killed
    say, loop._print_once = loop._print_once, killed # after two epochs of a single process, to be continued by two
    try: whole_run(*images, folder/"left_by_one.pt")
    except Killed: pass
    finally: loop._print_once = say
    assert (folder/"left_by_one.pt").exists()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = mp.start_processes(process, (port, folder, images), nprocs=2, join=False, start_method="fork").processes
    for started in processes: started.join(120)
    try: assert [started.exitcode for started in processes] == [1, 9]
    finally:
        for started in processes: started.kill()
    return folder


@pytest.fixture(scope="module")
def together(folder) -> list[dict]:
    return [torch.load(folder/f"{rank}.result", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("stage", STAGES)
def test_loss_and_gradients_of_two_processes_are_those_of_one(alone, together, stage):
    """BatchNorm frozen, in float32. Catches a contrast within each process alone, losses averaged over unequal numbers
    of synthetic images, the heads' BatchNorm of one process, dropout that differs, gradients summed or not shared."""
    before = (selfcon() if "selfcon" in stage else classifier().backbone if stage == "baseline" else classifier()).state_dict()
    (loss,), after = alone[stage]
    largest = max((after[name] - before[name]).abs().max() for name in before if after[name].is_floating_point())
    assert largest > 1e-3, "nothing moved"
    for (other,), weights in (results[stage] for results in together):
        assert abs(other - loss) <= 1e-5*abs(loss)
        for name in before: assert (weights[name] - after[name]).abs().max() <= 1e-5*largest, name


def test_both_processes_end_with_the_same_weights(together):
    first, second = (results["resumed"][1] for results in together)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_two_processes_go_on_where_one_was_killed(alone, together):
    "Images, order, momentum, schedule: all as in an uninterrupted run of one process, to the rounding of float64."
    losses, weights = alone["run"]
    for resumed, state in (results["resumed"] for results in together):
        assert resumed == pytest.approx(losses, rel=1e-9)
        for name in weights: assert torch.allclose(state[name], weights[name], rtol=1e-8, atol=1e-9), name


def test_one_process_goes_on_where_two_died(alone, images, folder):
    "One of two processes died in the third epoch and the other ended with it: what was written is whole."
    left = folder/"states"/"left_by_two.pt"
    assert list(left.parent.iterdir()) == [left]
    assert torch.load(left, weights_only=True)["epoch"] == 2
    losses, weights = whole_run(*images, left)
    assert losses == pytest.approx(alone["run"][0], rel=1e-9)
    for name in weights: assert torch.allclose(weights[name], alone["run"][1][name], rtol=1e-8, atol=1e-9), name


def test_the_survivor_says_why_it_ends(folder):
    error = (folder/"0.error").read_text()
    assert "another of the processes that train together has ended" in error and "start all of them again" in error
    assert not (folder/"1.error").exists()


def test_predictions_of_two_processes_are_those_of_one(alone, together):
    "Every process has the whole table, to the last bit, with the row of the damaged file."
    frame, features = alone["predictions"]
    assert frame["error"].notna().tolist() == [False]*10 + [True]
    for other, embedded in (results["predictions"] for results in together):
        pd.testing.assert_frame_equal(other, frame, check_exact=True)
        assert np.array_equal(embedded, features)


@pytest.fixture
def profile(images, tmp_path):
    "A profile with a manifest in reports/, which is removed afterwards."
    root, manifest = images
    settings = small_profile(epochs=2, learning_rate=0.01, chunk_size=8).model_dump() | dict(name="distributed-test")
    settings["data"]["root"] = str(root)
    (tmp_path/"distributed-test.yaml").write_text(yaml.safe_dump(settings))
    report = ROOT/"reports"/"distributed-test"
    write_manifest_csv(manifest, report/"manifests"/"train.csv")
    yield tmp_path/"distributed-test.yaml", report
    shutil.rmtree(report)


def test_accelerate_launch_trains_what_the_notebook_trains(profile):
    "From the command line with two processes and, as p30 does, in this one: one line an epoch and the outcome, same losses, weights."
    path, report = profile
    words = ["accelerate", "launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
             "--dynamo_backend", "no", "--main_process_port", "0", "-m", "imaginet_nb.training.stages",
             "--profile", path, "--stage", "pretrain"]
    result = subprocess.run([str(w) for w in words], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert [line[:9] for line in result.stdout.splitlines()] == ["epoch 1/2", "epoch 2/2", "pretrain:"] and "epoch" not in result.stderr
    assert [p.name for p in (report/"checkpoints").iterdir()] == ["pretrain.safetensors"]
    model, header = load_checkpoint(report/"checkpoints"/"pretrain.safetensors")
    training.launch("pretrain", str(path))
    again, expected = load_checkpoint(report/"checkpoints"/"pretrain.safetensors")
    assert [row["loss"] for row in header["history"]] == pytest.approx([row["loss"] for row in expected["history"]], rel=1e-5)
    for name, weight in again.state_dict().items(): assert torch.allclose(model.state_dict()[name], weight, rtol=1e-3, atol=1e-4), name


def test_a_sweep_runs_side_by_side_under_the_profile_for_slurm(tmp_path):
    """Two profiles as one plan, tried with the local executor: the second job starts before the first one ends.

    In the place of `imaginet` stands a script that only leaves the files of p63."""
    for name in ("sweep-a", "sweep-b"):
        text = (ROOT/"profiles"/"smoke.yaml").read_text()
        (tmp_path/f"{name}.yaml").write_text(text.replace("name: smoke", f"name: {name}"))
    stand_in = tmp_path/"imaginet"
    stand_in.write_text('#!/bin/sh\ntest "$1 $2 $3" = "notebook p63_speed --profile" && test -f "$4" || exit 1\n'
                        'report=reports/$(basename "$4" .yaml); mkdir -p $report/tables $report/notebooks; sleep 1\n'
                        'touch $report/tables/inference_time.csv $report/notebooks/p63_speed.ipynb\n')
    stand_in.chmod(0o755)
    environment = ENVIRONMENT | dict(PATH=f"{tmp_path}{os.pathsep}{ENVIRONMENT['PATH']}")
    words = ["snakemake", "--profile", "cluster/slurm", "--executor", "local", "--jobs", "2", "--cores", "2", "--latency-wait", "1",
             "--config", f"profile={tmp_path}/sweep-a.yaml,{tmp_path}/sweep-b.yaml"]
    plan = subprocess.run([*words, "--dry-run"], cwd=ROOT, env=environment, capture_output=True, text=True)
    told = plan.stdout + plan.stderr
    assert plan.returncode == 0 and "slurm_partition=gpu" in told, told
    for name in ("sweep-a", "sweep-b"): assert f"reports/{name}/checkpoints/pretrain.safetensors" in told
    targets = [f"reports/{name}/tables/inference_time.csv" for name in ("sweep-a", "sweep-b")]
    try:
        run = subprocess.run([*words, "--", *targets], cwd=ROOT, env=environment, capture_output=True, text=True)
        told = run.stdout + run.stderr
        assert run.returncode == 0, told
        assert told.rindex("rule p63_speed:") < told.index("Finished jobid")
        for target in targets: assert (ROOT/target).is_file()
    finally:
        for name in ("sweep-a", "sweep-b"): shutil.rmtree(ROOT/"reports"/name, ignore_errors=True)
