"""The command line as a user meets it: processes of its own, real files, real faults."""
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from forks import imaginet

from imaginet_nb.core import seed_everything
from imaginet_nb.data.images import save
from imaginet_nb.models.checkpoints import save_checkpoint
from imaginet_nb.models.resnet import create_backbone
from imaginet_nb.models.selfcon import ImagiNetClassifier

COLUMNS = ["path", "logit", "probability", "verdict", "family", "error"]


@pytest.fixture(scope="module")
def detector(tmp_path_factory) -> Path:
    seed_everything(0)
    path = tmp_path_factory.mktemp("detector")/"random.safetensors"
    save_checkpoint(ImagiNetClassifier(create_backbone("resnet18", width=0.125), input_size=32), path)
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    "Five good pictures and seven files that are none, or are damaged."
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for i, name in enumerate(("a.png", "b.jpg", "deep/c.webp", "deep/er/small.png", "with, comma.png")):
        side = 8 if "small" in name else 40 + 7*i
        save(generator.integers(0, 256, (side, side + 3, 3), dtype=np.uint8), folder/name)
    good = (folder/"a.png").read_bytes()
    bad = {"empty.png": b"", "cut.png": good[:len(good)//2], "cut.jpg": (folder/"b.jpg").read_bytes()[:200], "text.txt": b"hello",
           "zeros.webp": bytes(500), "html.png": b"<html></html>", "flipped.png": good[:60] + bytes(40) + good[100:]}
    for name, content in bad.items(): (folder/name).write_bytes(content)
    return folder


def test_predict_has_a_row_for_every_file(detector, pictures, tmp_path):
    result = imaginet("predict", pictures, "--checkpoint", detector, "--out", tmp_path/"preds.csv")
    assert result.returncode == 0, result.stderr
    table = pd.read_csv(tmp_path/"preds.csv")
    assert list(table.columns)[:len(COLUMNS)] == COLUMNS
    assert sorted(table["path"]) == sorted(str(p) for p in pictures.rglob("*") if p.is_file())
    scored = table[table["error"].isna()]
    assert len(scored) == 5 and scored["verdict"].isin(["real", "synthetic", "unsure"]).all() and scored["logit"].notna().all()
    small = scored["path"].str.endswith("small.png") # 8 pixels wide: it is not judged, and has no number that could be read as one
    assert scored.loc[small, "probability"].isna().all() and scored.loc[~small, "probability"].between(0, 1).all() and small.sum() == 1
    assert table.loc[table["error"].notna(), ["logit", "verdict"]].isna().all(axis=None)


def test_predict_does_not_depend_on_neighbours(detector, pictures, tmp_path):
    imaginet("predict", pictures, "--checkpoint", detector, "--out", tmp_path/"all.csv")
    imaginet("predict", pictures/"b.jpg", "--checkpoint", detector, "--out", tmp_path/"one.csv")
    everything, one = pd.read_csv(tmp_path/"all.csv").set_index("path"), pd.read_csv(tmp_path/"one.csv").set_index("path")
    assert everything.loc[str(pictures/"b.jpg"), "logit"] == one["logit"].iloc[0]


def test_predict_fails_only_when_all_failed(detector, pictures, tmp_path):
    result = imaginet("predict", pictures/"text.txt", pictures/"missing.png", "--checkpoint", detector, "--out", tmp_path/"preds.csv")
    assert result.returncode == 1 and "none of 2 files" in result.stderr
    assert len(pd.read_csv(tmp_path/"preds.csv")) == 2


@pytest.mark.parametrize("words, code, message", [
    (["predict", __file__, "--checkpoint", "none.safetensors"], 1, "make reproduce"),
    (["predict", "my_pictuers"], 1, "no such file or folder"),
    (["predict"], 2, "Missing argument"),
    (["reproduce", "--profile", "dmeo"], 1, "known profiles: benchmark, benchmark-gpu, demo"),
    (["notebook", "p99_none", "--profile", "smoke"], 1, "there are: p05_data"),
    (["checkpoint", "convert", "none.pth", "out.safetensors"], 1, "none.pth"),
    (["data", "sandbox"], 2, "--out"),
    (["data", "sandbox", "--out", "x", "--profile", "paper"], 1, "no sandbox section"),
])
def test_wrong_use_is_answered_in_words(words, code, message, tmp_path):
    result = imaginet(*words, cwd=tmp_path)
    assert result.returncode == code and message in result.stderr, result.stderr
    assert "Traceback" not in result.stderr


def test_a_pickle_is_not_a_detector(pictures, tmp_path):
    (tmp_path/"evil.safetensors").write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path/"was-here").encode() + b"'\ntR.")
    result = imaginet("predict", pictures, "--checkpoint", tmp_path/"evil.safetensors", "--out", tmp_path/"preds.csv")
    assert result.returncode == 1 and "evil.safetensors" in result.stderr and not (tmp_path/"was-here").exists()


def test_sandbox_is_made_and_not_overwritten(tmp_path):
    words = ("data", "sandbox", "--out", tmp_path/"sandbox", "--profile", "smoke", "--images", 200)
    assert imaginet(*words).returncode == 0
    assert (tmp_path/"sandbox"/"annotations"/"test_annotations.txt").is_file()
    (tmp_path/"mine").mkdir()
    (tmp_path/"mine"/"letter.txt").write_text("keep me")
    result = imaginet("data", "sandbox", "--out", tmp_path/"mine", "--profile", "smoke")
    assert result.returncode == 1 and "Traceback" not in result.stderr and (tmp_path/"mine"/"letter.txt").read_text() == "keep me"
