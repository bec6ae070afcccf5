"""`imaginet predict` under everyday conditions: every format, every size, and the plug pulled half way."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from bad_images import BAD, ODD
from PIL import Image
from typer.testing import CliRunner

from imaginet_nb.apps.cli import app
from imaginet_nb.apps.predict import read_scores
from imaginet_nb.core import only_run, seed_everything
from imaginet_nb.models.checkpoints import load_detector, save_checkpoint
from imaginet_nb.models.resnet import ImagiNetClassifier, create_backbone

SIDE = 32 # of the detector's images
SLOW = """
import os, time
class Slow:
    name, input_size = "Slow", 32
    def score(self, images):
        time.sleep(float(os.environ.get("SLOW", 0)))
        return images.float().mean((1, 2, 3)) - 128
"""


def noise(seed: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def predict(*words, **options):
    return CliRunner().invoke(app, ["predict", *map(str, words)], **options)


def table(*words, out: Path) -> pd.DataFrame:
    result = predict(*words, "--out", out)
    assert result.exit_code == 0, result.output
    return pd.DataFrame(list(read_scores(out))).set_index("path")


@pytest.fixture(scope="module")
def net(tmp_path_factory) -> Path:
    seed_everything(0)
    path = tmp_path_factory.mktemp("net")/"random.safetensors"
    save_checkpoint(ImagiNetClassifier(create_backbone("resnet18", width=0.125), input_size=SIDE), path)
    return path


@pytest.fixture(scope="module")
def score(net):
    "The logit of one crop, without any of `predict`."
    import torch
    detector = load_detector(net)
    return lambda crop: detector.score(torch.from_numpy(np.ascontiguousarray(crop)).permute(2, 0, 1)[None]).item()


def test_every_format_is_read_and_every_file_has_a_row(net, tmp_path):
    import pillow_heif
    pillow_heif.register_heif_opener()
    picture, folder = Image.fromarray(noise(0, SIDE, SIDE)), tmp_path/"pictures"
    folder.mkdir()
    kinds = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP", "avif": "AVIF", "tif": "TIFF", "bmp": "BMP", "gif": "GIF", "heic": "HEIF"}
    for suffix, kind in kinds.items(): picture.save(folder/f"a.{suffix}", kind)
    for i, make in enumerate([*BAD.values(), *ODD.values()]): make(folder/f"odd-{i}.png")
    strange = os.fsencode(folder) + b"/caf\xe9, \"b\"\n.png" # no UTF-8
    picture.save(os.fsdecode(strange), "PNG")
    rows = table(folder, "--checkpoint", net, out=tmp_path/"preds.parquet")
    assert len(rows) == sum(len(files) for _, _, files in os.walk(folder))
    assert rows["error"].notna().sum() == len(BAD)
    assert [rows.loc[str(folder/f"a.{suffix}"), "format"] for suffix in kinds] == list(kinds.values())
    assert rows.loc[rf'{folder}/caf\xe9, "b"\x0a.png', "logit"] == rows.loc[str(folder/"a.png"), "logit"]


def test_an_animation_and_a_turned_picture_are_told_apart_from_plain_ones(net, score, tmp_path):
    upright, exif = noise(1, SIDE, SIDE), Image.Exif()
    exif[0x0112] = 8 # turn to the left
    Image.fromarray(np.rot90(upright, -1)).save(tmp_path/"turned.png", exif=exif)
    frames = [Image.fromarray(np.full((SIDE, SIDE, 3), value, np.uint8)) for value in (200, 10)]
    frames[0].save(tmp_path/"moving.gif", save_all=True, append_images=frames[1:])
    rows = table(tmp_path/"*.png", tmp_path/"*.gif", "--checkpoint", net, out=tmp_path/"preds.jsonl")
    assert rows.loc[str(tmp_path/"turned.png"), "logit"] == pytest.approx(score(upright), abs=1e-5)
    assert rows.loc[str(tmp_path/"moving.gif"), "logit"] == pytest.approx(score(np.array(frames[0])), abs=1e-5)
    assert "first of 2 frames" in rows.loc[str(tmp_path/"moving.gif"), "note"]


def test_small_pictures_are_mirrored_and_large_ones_averaged_over_five_places(net, score, tmp_path):
    small, large = noise(2, SIDE, 20), noise(3, 80, 200)
    for name, picture in dict(small=small, large=large).items(): Image.fromarray(picture).save(tmp_path/f"{name}.png")
    rows = table(tmp_path, "--checkpoint", net, out=tmp_path/"preds.csv")
    mirrored = np.pad(small, ((0, 0), (6, 6), (0, 0)), mode="reflect")
    assert rows.loc[str(tmp_path/"small.png"), "logit"] == pytest.approx(score(mirrored), abs=1e-5)
    parts = [score(large[y:y + SIDE, x:x + SIDE]) for y, x in ((24, 80), (0, 0), (0, 168), (48, 0), (48, 168))]
    own = rows.loc[str(tmp_path/"large.png")]
    assert own["logit"] == pytest.approx(np.mean(parts), abs=1e-5) and own["crops"] == 5
    assert own["crop_spread"] == pytest.approx(np.std(parts, ddof=1), abs=1e-5)


def test_a_verdict_that_does_not_survive_saving_is_unsure(tmp_path, monkeypatch):
    (tmp_path/"fragile.py").write_text("class Fragile:\n    name, input_size = 'Fragile', 32\n"
                                       "    def score(self, images): return 5 - 10*(images % 4 != 0).any(3).any(2).any(1).float()\n")
    for i in range(3): Image.fromarray(noise(i, SIDE, SIDE)//4*4 + (0 if i else 1)).save(tmp_path/f"{i}.png") # multiples of 4 but the first
    monkeypatch.chdir(tmp_path)
    rows = table("0.png", "1.png", "--detector", "fragile:Fragile", out=tmp_path/"preds.csv")
    assert rows["verdict"].tolist() == ["real", "unsure"] and "re-saved" in rows["reason"].iloc[1]
    assert rows["probability_low"].iloc[1] < 0.01 < 0.99 < rows["probability_high"].iloc[1]
    trusting = table("1.png", "--no-views", "--detector", "fragile:Fragile", out=tmp_path/"preds.csv")
    assert trusting["verdict"].tolist() == ["synthetic"]


def test_files_may_come_on_standard_input(net, tmp_path):
    for i in range(2): Image.fromarray(noise(i, SIDE, SIDE)).save(tmp_path/f"{i}.png")
    listed = f"{tmp_path}/1.png\n\n{tmp_path}/0.png\r\n{tmp_path}/none.png\n"
    result = predict("-", "--checkpoint", net, "--out", tmp_path/"preds.csv", input=listed)
    rows = list(read_scores(tmp_path/"preds.csv"))
    assert [Path(row["path"]).name for row in rows] == ["1.png", "0.png", "none.png"] and "no such file" in rows[2]["error"]
    assert "no calibration" in result.output
    assert "the list is empty" in predict("-", "--checkpoint", net, "--out", tmp_path/"none.csv", input="\n").output


def test_what_cannot_be_reached_in_a_folder_has_a_row_too(net, tmp_path, monkeypatch):
    for name in ("a.png", "inner/b.png", "closed/c.png"):
        (tmp_path/"all"/name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(0, SIDE, SIDE)).save(tmp_path/"all"/name)
    os.symlink(tmp_path/"all"/"inner", tmp_path/"all"/"other")
    os.symlink("nowhere.png", tmp_path/"all"/"lost.png")
    os.mkfifo(tmp_path/"all"/"pipe.png")
    scandir = os.scandir
    def guarded(path):
        if str(path).endswith("closed"): raise PermissionError(13, "Permission denied", str(path)) # for whoever runs this as root
        return scandir(path)
    monkeypatch.setattr(os, "scandir", guarded)
    rows = table(tmp_path/"all", "--checkpoint", net, out=tmp_path/"preds.csv")
    errors = {str(Path(path).relative_to(tmp_path/"all")): error for path, error in rows["error"].items()}
    assert [name for name, error in errors.items() if pd.isna(error)] == ["a.png", "inner/b.png"]
    assert "no such file" in errors.pop("lost.png") and "not a file" in errors.pop("pipe.png")
    assert "cannot be opened" in errors["closed"] and "a link to a folder" in errors["other"]


def test_a_slip_does_not_cost_an_earlier_table(net, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(noise(0, SIDE, SIDE)).save("a.png")
    Path("empty").mkdir()
    assert predict("a.png", "--checkpoint", net).exit_code == 0
    before = Path("preds.csv").read_bytes()
    for words, message in ((["phtos"], "phtos: no such file or folder; check the spelling"), (["*.jpeg"], "check the spelling"),
                           (["empty"], "the folder or the list is empty"), (["preds.csv"], "the folder or the list is empty"),
                           (["a.png", "--html", "preds.csv"], "a report ends in .html"), (["a.png", "--crops", 6], "crops must be 1 to 5")):
        result = predict(*words, "--checkpoint", net)
        assert result.exit_code == 1 and message in result.output, result.output
    wrong = predict("a.png", "--detector", net)
    assert wrong.exit_code == 1 and "goes to --checkpoint" in wrong.output
    assert Path("preds.csv").read_bytes() == before


@pytest.fixture
def slow(tmp_path, monkeypatch) -> Path:
    "A folder of pictures and a detector that takes its time."
    (tmp_path/"slow.py").write_text(SLOW)
    (tmp_path/"pictures").mkdir()
    for i in range(40): Image.fromarray(noise(i, SIDE + i, SIDE)//2 + 3*i).save(tmp_path/"pictures"/f"{i:02d}.png")
    (tmp_path/"pictures"/"07.png").write_bytes(b"no picture")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "slow", raising=False)
    return tmp_path


WORDS = ["predict", "pictures", "--detector", "slow:Slow", "--out"]


def interrupted(folder: Path, out: str, how: int) -> subprocess.CompletedProcess:
    "Start the command, and stop it when some rows are there."
    program, part = Path(sys.executable).with_name("imaginet"), folder/f"{out}.part"
    process = subprocess.Popen([program, *WORDS, out], cwd=folder, env={**os.environ, "SLOW": "0.1"}, stderr=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler)) # else ignored in the background
    end = time.monotonic() + 60
    while not part.exists() or part.read_bytes().count(b"\n") < 5:
        assert process.poll() is None and time.monotonic() < end, process.stderr.read()
        time.sleep(0.02)
    os.kill(process.pid, how)
    words = process.communicate(timeout=30)[1]
    assert not (folder/out).exists() and 5 <= part.read_bytes().count(b"\n") < 40
    return subprocess.CompletedProcess(process.args, process.returncode, stderr=words)


def test_killed_and_resumed_is_as_if_nothing_had_happened(slow):
    "The table lies among the pictures, which is hardest, with what a run leaves that is killed while it writes the table."
    out = "pictures/cut.csv"
    assert CliRunner().invoke(app, [*WORDS, "whole.csv"]).exit_code == 0
    assert interrupted(slow, out, signal.SIGKILL).returncode == -signal.SIGKILL
    (slow/"pictures"/".cut.0a1b2c3d.csv").write_text("path")
    result = CliRunner().invoke(app, [*WORDS, out, "--resume"])
    kept = int(result.output.split("; ")[-1].split()[0])
    assert result.exit_code == 0 and 5 <= kept < 40, result.output
    assert (slow/out).read_bytes() == (slow/"whole.csv").read_bytes() and not (slow/f"{out}.part").exists()
    assert CliRunner().invoke(app, [*WORDS, out]).exit_code == 0 # now with a table among the pictures
    assert (slow/out).read_bytes() == (slow/"whole.csv").read_bytes()


def test_control_c_says_how_to_go_on(slow):
    stopped = interrupted(slow, "cut.csv", signal.SIGINT)
    assert stopped.returncode == 130 and "--resume" in stopped.stderr and "Traceback" not in stopped.stderr
    anew = CliRunner().invoke(app, [*WORDS, "cut.csv"])
    assert anew.exit_code == 0 and "made anew" in anew.output


def test_resume_makes_anew_what_is_not_the_same(slow):
    assert CliRunner().invoke(app, [*WORDS, "preds.csv"]).exit_code == 0
    first = (slow/"preds.csv").read_bytes()
    Image.fromarray(noise(99, SIDE, SIDE)).save(slow/"pictures"/"03.png")
    os.utime(slow/"pictures"/"03.png", (time.time() + 5,)*2)
    (slow/"pictures"/"05.png").unlink()
    assert "; 37 rows kept" in CliRunner().invoke(app, [*WORDS, "preds.csv", "--resume"]).output # without 03, 05 and the broken 07
    assert (slow/"preds.csv").read_bytes() != first
    (slow/"slow.py").write_text(SLOW + "# another version\n")
    del sys.modules["slow"]
    kept = (slow/"preds.csv").read_bytes()
    other = CliRunner().invoke(app, [*WORDS, "preds.csv", "--resume"])
    assert other.exit_code == 1 and "(detector changed)" in other.output and "leave out --resume" in other.output
    assert (slow/"preds.csv").read_bytes() == kept and not (slow/"preds.csv.part").exists()
    assert CliRunner().invoke(app, [*WORDS, "preds.csv"]).exit_code == 0
    (slow/"mine.csv").write_text("path,score\na,1\n")
    foreign = CliRunner().invoke(app, [*WORDS, "mine.csv", "--resume"])
    assert foreign.exit_code == 1 and "not a table of `imaginet predict`" in foreign.output
    assert (slow/"mine.csv").read_text() == "path,score\na,1\n"


def test_two_runs_on_one_table_and_folders_that_cannot_be(slow):
    with only_run("preds.csv"): second = CliRunner().invoke(app, [*WORDS, "preds.csv"])
    assert second.exit_code == 1 and "another run is at work" in second.output and not (slow/"preds.csv").exists()
    inside_a_file = CliRunner().invoke(app, [*WORDS, "slow.py/preds.csv"])
    assert inside_a_file.exit_code == 1 and "slow.py" in inside_a_file.output


def test_memory_does_not_grow_with_the_number_of_pictures(tmp_path):
    "80 pictures of 3 MB each: at most a few of them at a time."
    Image.fromarray(np.full((1000, 1000, 3), 99, np.uint8)).save(tmp_path/"0.png")
    for i in range(1, 80): os.link(tmp_path/"0.png", tmp_path/f"{i}.png")
    script = f"""if True:
        import resource, sys
        from types import SimpleNamespace
        from imaginet_nb.apps.predict import Scorer, find_files, score_to_file
        detector = SimpleNamespace(name="stub", input_size=32, score=lambda images: images.float().mean((1, 2, 3)))
        files = find_files(["{tmp_path}"])
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss//1024
        score_to_file(files[:10], Scorer(detector), "{tmp_path}/few.csv")
        before = peak()
        score_to_file(files, Scorer(detector), "{tmp_path}/all.csv")
        print(peak() - before)"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ, "TQDM_DISABLE": "1"})
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 60 # MB; all of them would be 240
