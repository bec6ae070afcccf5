"""`imaginet predict` under everyday conditions: every format, every size, and the plug pulled half way."""
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from bad_images import BAD, ODD
from forks import python
from PIL import Image
from typer.testing import CliRunner

from imaginet_nb.apps import predict as predicting
from imaginet_nb.apps.cli import app
from imaginet_nb.apps.predict import Scorer, Settings, find_files, part_of, read_scores, score_files, score_to_file, write_scores
from imaginet_nb.core import file_sha256, only_run, seed_everything, text_path
from imaginet_nb.models.checkpoints import load_detector, save_checkpoint
from imaginet_nb.models.resnet import create_backbone
from imaginet_nb.models.selfcon import ImagiNetClassifier

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


@pytest.mark.parametrize("accepted", [False, True])
def test_reasons_against_a_verdict_are_in_the_row_and_on_the_terminal(net, tmp_path, accepted):
    "A picture too small to judge and a page of text have no verdict, whatever the options; the reason is said once in a row."
    folder = tmp_path/"pictures"
    folder.mkdir()
    page = np.full((SIDE, 2*SIDE, 3), 255, np.uint8)
    page[4::8, 4:-4] = noise(0, SIDE//8, 2*SIDE - 8)
    pictures = {"dot": noise(0, 1, 1), "page": page, "large": noise(0, 200, 200)}
    for name, picture in pictures.items(): Image.fromarray(picture).save(folder/f"{name}.png")
    detector = load_detector(net)
    save_checkpoint(detector, tmp_path/"net.safetensors", profile="demo")
    words = [folder, "--checkpoint", tmp_path/"net.safetensors", "--no-views", "--out", tmp_path/"p.csv", *(["--demo"] if accepted else [])]
    result = predict(*words)
    rows = pd.DataFrame(list(read_scores(tmp_path/"p.csv"))).set_index("path").rename(lambda path: Path(path).stem)
    for name, reason in (("dot", predicting.TOO_SMALL_NOTE), ("page", predicting.FLAT_NOTE)):
        assert rows.loc[name, "verdict"] == ("unsure" if accepted else "demo only")
        assert rows.loc[name, "reason"] == reason and f"1 {reason}" in result.output
        assert reason not in rows.loc[name, "note"]
    assert "looked at 13 % of its area" in rows.loc["large", "note"] and rows.loc["large", "reason"] != predicting.FLAT_NOTE
    assert ("no error rate is promised" in result.output) == accepted


def test_after_a_calibration_on_real_pictures_alone_nothing_is_called_real(tmp_path, monkeypatch):
    "How many synthetic pictures lie below the threshold is unknown: table, terminal and page say `not flagged`, and rows are kept."
    monkeypatch.chdir(tmp_path)
    write_graph(tmp_path, 1.0)
    Path("real").mkdir()
    for i in range(20): Image.fromarray(noise(i, SIDE, SIDE)//2 + 3*i).save(f"real/{i:02d}.png")
    made = CliRunner().invoke(app, ["calibrate", "--real", "real", "--detector", "net.onnx", "--out", "c.json"])
    assert made.exit_code == 0 and "at the threshold 0.5." in made.output and "flagged above a score of 0." in made.output, made.output
    Image.fromarray(noise(0, SIDE, SIDE)//2 + 127).save("bright.png")
    words = ["real", "bright.png", "--detector", "net.onnx", "--calibration", "c.json", "--out", "p.csv", "--no-views", "--html", "p.html"]
    found = predict(*words)
    assert found.exit_code == 0 and "21 scored (1 synthetic, 0 unsure, 20 not flagged)" in found.output, found.output
    verdicts, page = [row["verdict"] for row in read_scores("p.csv")], Path("p.html").read_text()
    assert verdicts == ["not flagged"]*20 + ["synthetic"] and page.count("<b>not flagged</b>") == 20
    assert "<b>real</b>" not in page and "else real" not in page and "synthetic ones are not flagged was not measured" in page
    assert "; 21 rows kept" in predict(*words, "--resume").output


def test_the_largest_picture_that_is_read_is_an_option(net, tmp_path):
    Image.fromarray(noise(0, 50, 60)).save(tmp_path/"a.png")
    for limit in ((), ("--max-megapixels", 0.003)):
        assert table(tmp_path/"a.png", "--checkpoint", net, "--no-views", *limit, out=tmp_path/"p.csv")["error"].isna().all()
    refused = predict(tmp_path/"a.png", "--checkpoint", net, "--max-megapixels", 0.002, "--out", tmp_path/"p.csv")
    error = next(iter(read_scores(tmp_path/"p.csv")))["error"]
    assert refused.exit_code == 1 and "more than max_pixels=2000" in error and "--max-megapixels 1" in error


@pytest.mark.parametrize("number", ["inf", "nan", "0", "-1", "1e-9"])
def test_an_impossible_limit_of_the_largest_picture_is_refused(net, tmp_path, number):
    Image.fromarray(noise(0, SIDE, SIDE)).save(tmp_path/"a.png")
    result = predict(tmp_path/"a.png", "--checkpoint", net, "--out", tmp_path/"preds.csv", "--max-megapixels", number)
    assert result.exit_code == 1 and f"--max-megapixels {float(number):g}: choose a number" in result.output, result.output


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
    assert wrong.exit_code == 1 and "is given with --checkpoint" in wrong.output
    assert Path("preds.csv").read_bytes() == before


@pytest.mark.parametrize("words", [
    ["predict", "{here}/list.csv", "--out", "list.csv"], ["predict", "list.csv", "a.png", "--out", "list.csv"],
    ["predict", "link.csv", "--out", "list.csv"], ["predict", "*.csv", "a.png", "--out", "list.csv"],
    ["predict", "a.png", "page.html", "--html", "page.html"], ["predict", ".", "--html", "{here}/page.html"],
    ["calibrate", "--real", "list.csv", "--out", "list.csv"], ["calibrate", "--real", ".", "--out", "a.png"],
    ["calibrate", "--real", "a.png", "--real", "{here}/list.csv", "--out", "link.csv"],
    ["evaluate", "--manifest", "list.csv", "--out", "."], ["evaluate", "--root", ".", "--out", "{here}"],
    ["audit", "list.csv", "--out", "{here}"], ["audit", ".", "--out", "."]], ids=" ".join)
def test_a_source_is_never_replaced_by_a_result(net, tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(noise(0, SIDE, SIDE)).save("a.png")
    Path("list.csv").write_text("path,label\na.png,real\n")
    Path("link.csv").symlink_to("list.csv")
    Path("page.html").write_text("notes")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    detector = [] if words[0] == "audit" else ["--checkpoint", net]
    result = CliRunner().invoke(app, [*(word.format(here=tmp_path) for word in words), *map(str, detector)])
    assert result.exit_code == 1 and "which its results could replace" in result.output, result.output
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.suffix != ".lock"} == before


def test_an_earlier_table_among_the_words_is_made_anew(net, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(noise(0, SIDE, SIDE)).save("a.png")
    words = ["--checkpoint", net, "--html", "report.html"]
    assert predict("a.png", *words).exit_code == 0
    again = predict("a.png", "preds.csv", "report.html", *words) # as `*` of a shell names them
    assert again.exit_code == 0 and "not read as a list" in again.output, again.output
    assert [row["path"] for row in read_scores("preds.csv")] == ["a.png"]


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
    assert second.exit_code == 1 and "another run is writing to" in second.output and not (slow/"preds.csv").exists()
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
    done = python(script)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 60 # MB; all of them would be 240


def test_rows_depend_neither_on_the_number_of_readers_nor_on_the_pictures_beside_them(net, tmp_path):
    "Reading processes and batches of several pictures: every row is, to the last bit, the row of the picture alone."
    for i in range(6): Image.fromarray(noise(i, SIDE + 9*i, SIDE + 20*i)).save(tmp_path/f"{i}.png")
    (tmp_path/"broken.png").write_bytes(b"no picture")
    paths, detector = find_files([tmp_path]), load_detector(net)
    alone = Scorer(detector)
    rows = list(score_files(paths, alone, readers=0))
    assert [row["path"] for row in rows] == [str(path) for path in paths] and sum("error" in row for row in rows) == 1
    for readers in (1, 2): assert list(score_files(paths, alone, readers)) == rows
    together = replace(alone, batch_size=4)
    batches = list(score_files(paths, together, readers=2))
    assert batches == [row for path in paths for row in score_files([path], together)]
    assert [row.get("logit") for row in batches] == pytest.approx([row.get("logit") for row in rows], abs=1e-4)


def test_one_picture_that_a_detector_fails_on_costs_one_row_of_its_batch(tmp_path):
    for i, value in enumerate((100, 200, 50)): Image.fromarray(np.full((SIDE, SIDE, 3), value, np.uint8)).save(tmp_path/f"{i}.png")
    def score(images):
        if (images == 200).flatten(1).all(1).any(): raise SystemExit("no such thing")
        return images.float().mean((1, 2, 3)) - 128
    detector = SimpleNamespace(name="Fickle", input_size=SIDE, score=score)
    rows = list(score_files(find_files([tmp_path]), Scorer(detector, batch_size=8)))
    assert [row.get("error") for row in rows] == [None, "Fickle: no such thing", None] and rows[2]["logit"] == pytest.approx(-78, abs=1)


def test_a_reader_that_is_killed_ends_the_run_and_keeps_the_rows(tmp_path, monkeypatch):
    "As by the system when memory runs out; `--resume` goes on."
    for i in range(6): Image.fromarray(noise(i, SIDE, SIDE)).save(tmp_path/f"{i}.png")
    paths, here, read = find_files([tmp_path]), os.getpid(), predicting.read_picture
    def deadly(reader, source, name=None):
        if os.getpid() != here and source.name == "4.png": os.kill(os.getpid(), signal.SIGKILL)
        return read(reader, source, name)
    monkeypatch.setattr(predicting, "read_picture", deadly)
    with pytest.raises(RuntimeError, match="was killed.*--resume"): score_to_file(paths, stub(tmp_path), tmp_path/"preds.csv", readers=1)
    assert part_of(tmp_path/"preds.csv").read_bytes().count(b"\n") >= 3
    counts = score_to_file(paths, stub(tmp_path), tmp_path/"preds.csv", resume=True, readers=0)
    assert counts["kept"] >= 3 and counts["error"] == 0 and len(list(read_scores(tmp_path/"preds.csv"))) == 6


def same_row(before: pd.DataFrame, after: pd.DataFrame, name: str) -> bool:
    return before.loc[name].equals(after.loc[name])


def write_graph(folder: Path, weight: float) -> None:
    "An ONNX file whose only weight lies in a file beside it, and its YAML."
    import onnx
    from onnx import TensorProto, helper, numpy_helper
    value = numpy_helper.from_array(np.full((1, 300), weight, np.float32), "w")
    nodes = [helper.make_node("GlobalAveragePool", ["x"], ["p"]), helper.make_node("Flatten", ["p"], ["f"]),
             helper.make_node("ReduceMean", ["f"], ["m"], axes=[1]), helper.make_node("MatMul", ["m", "w"], ["a"]),
             helper.make_node("ReduceMean", ["a"], ["y"], axes=[1])]
    graph = helper.make_graph(nodes, "net", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ("B", 3, "H", "W"))],
                              [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)], [value])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (folder/"weights.bin").unlink(missing_ok=True)
    onnx.save(model, folder/"net.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    write_settings(folder)


def write_settings(folder: Path, mean: float = 0.5) -> None:
    values = f"range: [0, 1]\nmean: [{mean}, {mean}, {mean}]\nstd: [1, 1, 1]\noutput: logit\n"
    (folder/"net.yaml").write_text("name: Net\ninput_size: 32\n" + values)


@pytest.mark.parametrize("change", ["settings", "external data", "libraries", "options", "nothing"])
def test_resume_refuses_rows_that_were_made_in_another_way(tmp_path, monkeypatch, change):
    write_graph(tmp_path, 1.0)
    for i in range(2): Image.fromarray(noise(i, SIDE, SIDE)).save(tmp_path/f"{i}.png")
    words = [tmp_path/"0.png", tmp_path/"1.png", "--detector", tmp_path/"net.onnx", "--out", tmp_path/"preds.csv"]
    assert predict(*words).exit_code == 0
    before, graph = (tmp_path/"preds.csv").read_bytes(), (tmp_path/"net.onnx").read_bytes()
    if change == "settings": write_settings(tmp_path, 0.25)
    if change == "external data": write_graph(tmp_path, -1.0)
    if change == "libraries": monkeypatch.setattr("imaginet_nb.apps.predict._LIBRARIES", ("numpy",))
    assert (tmp_path/"net.onnx").read_bytes() == graph # the graph itself tells nothing
    resumed = predict(*words, "--resume", *(["--crops", 1] if change == "options" else []))
    part = {"settings": "detector", "external data": "detector"}.get(change, change)
    if change == "nothing": assert resumed.exit_code == 0 and "; 2 rows kept" in resumed.output
    else: assert resumed.exit_code == 1 and f"({part} changed)" in resumed.output and "choose another --out" in resumed.output
    assert (tmp_path/"preds.csv").read_bytes() == before


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_names_that_look_alike_or_break_lines_have_each_their_own_row(net, tmp_path, suffix):
    "One raw byte and its spelling in four characters; carriage returns and all else that some reader takes for the end of a line."
    names = [b"\xff.png", rb"\xff.png", rb"\\xff.png", b"a\rb.png", b"a\r\nb.png", b"a\nb.png", b"a\x0bb\x0cc\x1cd.png",
             "a\x85b\u2028c\u2029.png".encode(), b"=1+1.png", b"-1.png", b'"a",b.png', b"NA.png", b" .png"]
    folder = tmp_path/"pictures"
    folder.mkdir()
    for i, name in enumerate(names):
        with open(os.fsencode(folder) + b"/" + name, "wb") as file: Image.fromarray(noise(i, SIDE, SIDE)).save(file, "PNG")
    out = tmp_path/f"preds{suffix}"
    rows = table(folder, "--checkpoint", net, out=out)
    paths = {text_path(text) for text in rows.index}
    assert len(rows) == len(names) and paths == set(folder.iterdir())
    for text, row in rows.iterrows(): assert row["sha256"] == file_sha256(text_path(text)) and pd.isna(row["error"])
    assert rows["logit"].nunique() == len(names)
    if suffix == ".csv":
        assert len(pd.read_csv(out)) == len(names)
        with open(out, newline="", encoding="utf-8") as file: assert len(list(csv.DictReader(file))) == len(names)
        assert out.read_text(encoding="utf-8").count("\n") == len(names) + 1 and "\r" not in out.read_bytes().decode()
    if suffix == ".jsonl": assert len(out.read_text().splitlines()) == len(names)
    if suffix == ".parquet": assert len(pd.read_parquet(out, engine="pyarrow")) == len(names)
    again = predict(folder, "--checkpoint", net, "--out", out, "--resume")
    assert f"; {len(names)} rows kept" in again.output


def test_a_picture_that_was_replaced_by_an_older_one_is_scored_again(net, tmp_path):
    for i in range(2): Image.fromarray(noise(i, SIDE, SIDE)).save(tmp_path/f"{i}.png")
    before = table(tmp_path/"*.png", "--checkpoint", net, out=tmp_path/"preds.csv")
    old = os.stat(tmp_path/"0.png")
    Image.fromarray(noise(7, SIDE, SIDE)).save(tmp_path/"0.png")
    os.utime(tmp_path/"0.png", ns=(old.st_atime_ns, old.st_mtime_ns - 10**12))
    os.utime(tmp_path/"1.png") # touched only
    resumed = predict(tmp_path/"*.png", "--checkpoint", net, "--out", tmp_path/"preds.csv", "--resume")
    after = pd.DataFrame(list(read_scores(tmp_path/"preds.csv"))).set_index("path")
    assert "; 1 rows kept" in resumed.output
    assert not same_row(before, after, str(tmp_path/"0.png")) and same_row(before, after, str(tmp_path/"1.png"))


FICKLE = """
class Fickle:
    name, input_size = "Fickle", 32
    def score(self, images):
        if (images == 200).all(): raise KeyError("no\\rsuch\\nthing")
        return images.float().mean((1, 2, 3)) - 128
"""


def test_a_detector_that_fails_on_a_picture_costs_one_row(tmp_path, monkeypatch):
    (tmp_path/"fickle.py").write_text(FICKLE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "fickle", raising=False)
    for name, value in (("a", 100), ("b", 200), ("c", 50)): Image.fromarray(np.full((SIDE, SIDE, 3), value, np.uint8)).save(f"{name}.png")
    rows = table("a.png", "b.png", "c.png", "--detector", "fickle:Fickle", out=tmp_path/"preds.csv")
    assert rows["error"].notna().tolist() == [False, True, False] and r"no\rsuch\nthing" in rows.loc["b.png", "error"]
    alone = predict("b.png", "--detector", "fickle:Fickle", "--out", "alone.csv")
    assert alone.exit_code == 1 and alone.output.count("imaginet:") == 1 and "none of 1 files could be scored" in alone.output
    assert Path("alone.csv").exists() and not Path("alone.csv.part").exists()


def test_pictures_inside_parquet_files_are_scored_and_resumed(net, tmp_path, monkeypatch):
    "A folder of parts: the rows of the same pictures as files; a run goes on; the page shows them; a damaged part has its row."
    monkeypatch.chdir(tmp_path)
    for folder in ("files", "set"): Path(folder).mkdir()
    for i in range(6): Image.fromarray(noise(i, SIDE + 9*i, SIDE)).save(f"files/{i}.png")
    cells = [{"bytes": Path(f"files/{i}.png").read_bytes(), "path": f"{i}.png"} for i in range(6)]
    def write(part: int) -> None:
        pd.DataFrame({"image": cells[3*part:3*part + 3]}).to_parquet(f"set/{part}.parquet", row_group_size=2)
    for part in (0, 1): write(part)
    inside, scorer = find_files(["set"]), Scorer(load_detector(net))
    assert list(map(str, inside)) == [f"set/{part}.parquet/{place}.png" for part in (0, 1) for place in ("0/0", "0/1", "1/0")]
    alone = list(score_files(find_files(["files"]), scorer, readers=0))
    expected = [row | {"path": str(path)} for row, path in zip(alone, inside, strict=True)]
    for readers in (0, 2): assert list(score_files(inside, scorer, readers=readers)) == expected
    words = ["--checkpoint", net, "--out", "p.csv"]
    assert predict("set/0.parquet", *words).exit_code == 0
    more = predict("set", *words, "--resume", "--html", "p.html")
    assert more.exit_code == 0 and "; 3 rows kept" in more.output, more.output
    page = Path("p.html").read_text()
    assert page.count('<img loading="lazy"') == 6 and '<span class="name">1.parquet/1/0.png</span>' in page
    cells[0] = cells[5]
    write(0)
    assert "; 5 rows kept" in predict("set", *words, "--resume").output # its content has changed
    Path("set/1.parquet").write_bytes(b"PAR1")
    assert "1 with an error; 3 rows kept" in predict("set", *words, "--resume").output
    *_, damaged = read_scores("p.csv")
    assert damaged["path"] == "set/1.parquet" and "no pictures are found: it must be whole" in damaged["error"]
    refused = predict("set/1.parquet", *words)
    assert refused.exit_code == 1 and "set/1.parquet: not a readable Parquet file" in refused.output


def test_resume_scores_again_what_another_limit_of_pixels_concerns(net, tmp_path):
    for side in (40, 60): Image.fromarray(noise(0, side, side)).save(tmp_path/f"{side}.png")
    words = [tmp_path/"*.png", "--checkpoint", net, "--no-views", "--out", tmp_path/"p.csv"]
    assert "1 with an error" in predict(*words, "--max-megapixels", 0.002).output
    assert "0 with an error; 1 rows kept" in predict(*words, "--resume").output
    assert "1 with an error; 1 rows kept" in predict(*words, "--resume", "--max-megapixels", 0.002).output


def test_a_detector_is_known_by_its_content_however_its_path_is_typed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_graph(tmp_path, 1.0)
    for folder in ("real", "other"): Path(folder).mkdir()
    for i in range(19): Image.fromarray(noise(i, SIDE, SIDE)//2 + 3*i).save(f"real/{i:02d}.png")
    for name in ("net.onnx", "net.yaml", "weights.bin"): shutil.copy(name, f"other/{name.replace('net', 'copy')}")
    made = CliRunner().invoke(app, ["calibrate", "--real", "real", "--detector", "./net.onnx", "--out", "c.json"])
    assert made.exit_code == 0, made.output
    words = ["real/00.png", "--calibration", "c.json", "--out", "p.csv", "--no-views", "--detector"]
    for spelling in ("net.onnx", tmp_path/"net.onnx", "other/copy.onnx"):
        found = predict(*words, spelling, "--resume")
        assert found.exit_code == 0 and ("1 rows kept" in found.output) == (spelling != "net.onnx"), found.output
    write_graph(tmp_path, 2.0)
    assert "made for another detector" in predict(*words, "net.onnx").output


def test_results_that_cannot_be_written_are_refused_before_the_first_picture(net, tmp_path, monkeypatch):
    def never(*args, **kwargs): raise AssertionError("a detector was loaded")
    monkeypatch.setattr("imaginet_nb.apps.cli._detector", never)
    Image.fromarray(noise(0, SIDE, SIDE)).save(tmp_path/"a.png")
    (tmp_path/"folder.csv").mkdir()
    (tmp_path/"folder.html").mkdir()
    (tmp_path/"file").touch()
    wrong = (["--out", tmp_path/"folder.csv"], ["--html", tmp_path/"folder.html"], ["--out", tmp_path/"file"/"a.csv"],
             ["--html", tmp_path/"file"/"a.html"], ["--html", "/proc/none/a.html"])
    for words in wrong:
        found = predict(tmp_path/"a.png", "--out", tmp_path/"preds.csv", *words)
        named = str(words[1]).removesuffix("/a.csv").removesuffix("/a.html") # a file that stands in a folder's place is named itself
        assert found.exit_code == 1 and named in found.output and "Traceback" not in found.output, found.output
    (tmp_path/"kept.csv").write_text("mine")
    (tmp_path/"kept.csv").chmod(0o444)
    as_other(tmp_path, """
        for path in ("kept.csv", "closed/a.csv", "closed/a.html"):
            try: check_writable(path)
            except OSError as error: assert path in str(error)
            else: raise AssertionError(path)""")


def as_other(folder: Path, code: str) -> None:
    "Run lines as a user who is not root, in a folder with a sub-folder `closed` that this user cannot write to or enter."
    folder.chmod(0o777)
    (folder/"closed").mkdir(exist_ok=True)
    (folder/"closed").chmod(0o744)
    drop = "os.setgroups([]), os.setgid(65534), os.setuid(65534)" if os.getuid() == 0 else "os.chmod('closed', 0o400)"
    script = f"import os\nfrom types import SimpleNamespace\nfrom imaginet_nb.apps.predict import *\n{drop}\n" + textwrap.dedent(code)
    for parent in folder.parents:
        if parent.stat().st_uid == os.getuid() and not parent.stat().st_mode & 0o001: parent.chmod(parent.stat().st_mode | 0o011)
    done = python(script, cwd=folder)
    assert done.returncode == 0, done.stderr


def test_closed_folders_and_impossible_lines_are_rows_with_errors(net, tmp_path):
    (tmp_path/"closed").mkdir()
    for place in (tmp_path, tmp_path/"closed"): Image.fromarray(noise(0, SIDE, SIDE)).save(place/"a.png")
    as_other(tmp_path, """
        detector = SimpleNamespace(name="stub", input_size=32, score=lambda images: images.float().mean((1, 2, 3)))
        score_to_file(find_files(["a.png", "closed"]), Scorer(detector), "preds.csv")
        a, b = read_scores("preds.csv")
        assert a["error"] is None and b["path"] == "closed/a.png" and "Permission denied" in b["error"], b""")
    lines = [b"x"*300, b"\xff.png", b"nul\0.png", os.fsencode(tmp_path/"a.png"), b"x"*300 + b"/*", b"-"]
    listed = predict("-", "--checkpoint", net, "--out", tmp_path/"listed.csv", input=b"\n".join(lines))
    assert listed.exit_code == 0, listed.output
    rows = list(read_scores(tmp_path/"listed.csv"))
    assert [os.fsencode(text_path(row["path"])) for row in rows] == lines
    assert [row["error"] is None for row in rows] == [line.endswith(b"a.png") for line in lines]


@pytest.mark.parametrize("name, content, told", [
    ("p.jsonl", b'{"id": 1}\n', "line 1"), ("p.jsonl", b"[" * 100_000 + b"\n", "line 1"), ("p.jsonl", b"\xff\n", "line 1"),
    ("p.csv.part", b'{"id": 1}\n', "line 1"), ("p.csv.part", b"\0\0\0\n", "line 1"), ("p.csv.part", b"x"*3_000_000, "line 1"),
    ("p.csv", b"", "damaged"), ("p.csv", b"\xff\xfe\n\0", "damaged"), ("p.csv", b'path\n"a', "damaged"),
    ("p.parquet", b"", "damaged"), ("p.parquet", b"PAR1" + bytes(100) + b"PAR1", "damaged"), ("p.parquet", b"no table", "damaged")])
def test_resume_on_somebody_elses_or_a_damaged_file_says_so_and_leaves_it(net, tmp_path, name, content, told):
    Image.fromarray(noise(0, SIDE, SIDE)).save(tmp_path/"a.png")
    (tmp_path/name).write_bytes(content)
    out = tmp_path/name.removesuffix(".part")
    found = predict(tmp_path/"a.png", "--checkpoint", net, "--out", out, "--resume")
    assert found.exit_code == 1 and isinstance(found.exception, SystemExit), found.exception
    assert str(tmp_path/name) in found.output and told in found.output and "choose another --out" in found.output
    assert (tmp_path/name).read_bytes() == content


def test_resume_on_a_csv_that_is_cut_in_its_last_column_says_that_it_is_cut(net, tmp_path):
    Image.fromarray(noise(0, SIDE, SIDE)).save(tmp_path/"a.png")
    out = tmp_path/"p.csv"
    table(tmp_path/"a.png", "--checkpoint", net, out=out)
    whole = out.read_bytes()
    for end in range(1, 90): # within the column settings, which ends each row
        out.write_bytes(whole[:-end])
        with pytest.raises(ValueError, match="p.csv: damaged.*cut off"): list(read_scores(out))
    found = predict(tmp_path/"a.png", "--checkpoint", net, "--out", out, "--resume")
    assert found.exit_code == 1 and "cut off" in found.output and out.read_bytes() == whole[:-end], found.output


def test_results_go_through_a_link_and_the_link_stays(net, tmp_path):
    Image.fromarray(noise(0, SIDE, SIDE)).save(tmp_path/"a.png")
    (tmp_path/"disk").mkdir()
    (tmp_path/"disk"/"old.csv").write_text("an older table")
    for link, target in (("p.csv", "old.csv"), ("p.html", "page.html")): (tmp_path/link).symlink_to(tmp_path/"disk"/target)
    found = predict(tmp_path/"a.png", "--checkpoint", net, "--out", tmp_path/"p.csv", "--html", tmp_path/"p.html")
    assert found.exit_code == 0 and (tmp_path/"p.csv").is_symlink() and (tmp_path/"p.html").is_symlink(), found.output
    assert len(list(read_scores(tmp_path/"disk"/"old.csv"))) == 1 and "<html" in (tmp_path/"disk"/"page.html").read_text()
    assert sorted(path.name for path in (tmp_path/"disk").iterdir()) == ["old.csv", "page.html"]
    again = predict(tmp_path/"a.png", "--checkpoint", net, "--out", tmp_path/"p.csv", "--resume")
    assert "1 rows kept" in again.output and (tmp_path/"p.csv").is_symlink()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes")
@pytest.mark.parametrize("name", ["p.csv", "p.jsonl", "p.csv.part"])
def test_resume_does_not_wait_for_a_pipe(net, tmp_path, name):
    Image.fromarray(noise(0, SIDE, SIDE)).save(tmp_path/"a.png")
    os.mkfifo(tmp_path/name)
    found = predict(tmp_path/"a.png", "--checkpoint", net, "--out", tmp_path/name.removesuffix(".part"), "--resume")
    assert found.exit_code == 1 and f"{tmp_path/name}: damaged" in found.output and "no regular file" in found.output


def test_a_list_with_a_byte_order_mark_and_one_that_is_none(net, tmp_path):
    Image.fromarray(noise(0, SIDE, SIDE)).save(tmp_path/"a.png")
    marked = b"\xef\xbb\xbf" + os.fsencode(tmp_path/"a.png") + b"\r\n"
    assert "1 scored" in predict("-", "--checkpoint", net, "--out", tmp_path/"p.jsonl", input=marked).output
    other = predict("-", "--checkpoint", net, "--out", tmp_path/"q.jsonl", input=marked + b"x"*2_000_000)
    assert other.exit_code == 1 and "line 2 of the list has 2,000,000 characters" in other.output and not (tmp_path/"q.jsonl").exists()


def stub(path: Path) -> Scorer:
    "A scorer that takes no time."
    detector = SimpleNamespace(name="stub", input_size=8, score=lambda images: images.float().mean((1, 2, 3)) - 128)
    return Scorer(detector, Settings(views=False, crops=1))


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_part_that_is_cut_at_any_byte_is_gone_on_with(tmp_path, suffix):
    "Hostile names, each file format, every place where a crash can cut the finished rows: no row is lost, doubled or changed."
    draw, folder = np.random.default_rng(0), tmp_path/"pictures"
    folder.mkdir()
    for i in range(2):
        name = bytes(draw.choice([*range(1, 47), *range(48, 256)], 6).astype(np.uint8)) + b"%d" % i
        with open(os.fsencode(folder) + b"/" + name, "wb") as file: Image.fromarray(noise(i, 8, 8)).save(file, "PNG")
    (folder/"broken").write_bytes(b"none")
    paths, scorer, whole, cut = find_files([folder]), stub(tmp_path), tmp_path/f"whole{suffix}", tmp_path/f"cut{suffix}"
    score_to_file(paths, scorer, whole)
    write_scores(read_scores(whole), tmp_path/"lines.jsonl")
    lines = (tmp_path/"lines.jsonl").read_bytes()
    step = {".csv": 23, ".jsonl": 101, ".parquet": 10**9}[suffix]
    for end in range(len(lines) + 1): # every byte for the reader; the whole run where a line ends, and every so often
        part_of(cut).write_bytes(lines[:end])
        ended = [json.loads(line) for line in lines[:end].split(b"\n")[:-1]]
        assert list(read_scores(part_of(cut))) == ended, end
        if end % step and b"\n" not in lines[max(end - 1, 0):end + 1]: continue
        counts = score_to_file(paths, scorer, cut, resume=True)
        assert counts["kept"] == sum(row["error"] is None for row in ended), end
        assert not part_of(cut).exists(), end
        if suffix == ".parquet": assert list(read_scores(cut)) == list(read_scores(whole)), end
        else: assert cut.read_bytes() == whole.read_bytes(), end


def test_damaged_tables_and_parts_give_rows_or_one_kind_of_error(tmp_path):
    "Random damages to each kind of file: rows, or a `ValueError` that names the file; no crash of the reader either."
    draw = np.random.default_rng(1)
    for i in range(3): Image.fromarray(noise(i, 8, 8)).save(tmp_path/f"{i}.png")
    rows = list(score_files(find_files([tmp_path]), stub(tmp_path)))
    for suffix in (".csv", ".jsonl", ".parquet", ".part"):
        write_scores(rows, tmp_path/f"good{'.jsonl' if suffix == '.part' else suffix}")
        good = (tmp_path/f"good{'.jsonl' if suffix == '.part' else suffix}").read_bytes()
        for _ in range(200):
            bad = bytearray(good)
            for _ in range(draw.integers(1, 4)): bad[draw.integers(len(bad))] = draw.integers(256)
            (tmp_path/f"bad{suffix}").write_bytes(bad[:draw.integers(len(bad))] if draw.random() < 0.3 else bad)
            try: found = list(read_scores(tmp_path/f"bad{suffix}"))
            except ValueError as error: assert f"bad{suffix}: damaged, or not" in str(error)
            else: assert len(found) <= len(rows)
