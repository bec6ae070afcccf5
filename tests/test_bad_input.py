"""Each bad picture, and each odd one, by every way that leads in; `verify` and `external` have theirs in their own files."""
from pathlib import Path

import pandas as pd
import pytest
from bad_images import BAD, ODD
from typer.testing import CliRunner

from imaginet_nb.apps.cli import app
from imaginet_nb.audit.files import read_properties
from imaginet_nb.core import seed_everything
from imaginet_nb.data.corruptions import Perturb
from imaginet_nb.data.images import ImageError, decode
from imaginet_nb.data.manifest import MANIFEST_COLUMNS
from imaginet_nb.data.perturbed import make_testset
from imaginet_nb.models.checkpoints import save_checkpoint
from imaginet_nb.models.resnet import create_backbone
from imaginet_nb.models.selfcon import ImagiNetClassifier

NAMES = {**{name: f"bad-{i}.png" for i, name in enumerate(BAD)}, **{name: f"odd-{i}.png" for i, name in enumerate(ODD)}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mixed")
    for name, make in {**BAD, **ODD}.items(): make(folder/NAMES[name])
    return folder


def manifest(names) -> pd.DataFrame:
    rows = [(NAMES[name], "synthetic", "photos", "SD", "SD v2.1", "test") for name in names]
    return pd.DataFrame(rows, columns=list(MANIFEST_COLUMNS))


def test_predict_scores_the_odd_and_says_why_it_cannot_the_bad(folder, tmp_path):
    seed_everything(0)
    checkpoint, out = tmp_path/"random.safetensors", tmp_path/"predictions.csv"
    save_checkpoint(ImagiNetClassifier(create_backbone("resnet18", width=0.125), input_size=32), checkpoint)
    result = CliRunner().invoke(app, ["predict", str(folder), "--checkpoint", str(checkpoint), "--out", str(out)])
    assert result.exit_code == 0, result.output
    table = pd.read_csv(out).set_index("path")
    for name, file in NAMES.items():
        row = table.loc[str(folder/file)]
        assert pd.isna(row["error"]) == (name in ODD) and pd.notna(row["logit"]) == (name in ODD), name
    reasons = ("empty file", "not an image", "damaged", "more than max_pixels")
    for name, reason in zip(BAD, reasons, strict=True): assert reason in table.loc[str(folder/NAMES[name]), "error"]


def test_audit_lists_the_odd_and_says_why_it_cannot_the_bad(folder):
    read = read_properties(manifest(NAMES), folder, jobs=1).set_index("path")
    assert [name for name in NAMES if isinstance(read.loc[NAMES[name], "error"], str)] == list(BAD)
    assert read.loc[[NAMES[name] for name in ODD], "mode"].tolist() == ["CMYK", "I;16", "RGB"]


@pytest.mark.parametrize("name", BAD)
def test_perturb_names_the_bad(folder, name):
    with pytest.raises(ImageError, match=NAMES[name]): make_testset(manifest([name]), folder, Perturb(size=32), seed=0)
    assert not list((folder/"testset").rglob("*.webp"))


def test_perturb_reads_the_odd(folder):
    made = make_testset(manifest(ODD), folder, Perturb(size=32), seed=0)
    assert [decode(folder/path).shape for path in made["path"]] == [(32, 32, 3)]*len(ODD)
