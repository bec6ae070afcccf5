"The recipes of the tutorial on changes: what its cells do not try by themselves."
import json
import os
import re
import shutil
import subprocess
import sys
import types

import numpy as np
import pandas as pd
import pytest

from imaginet_nb.core import repo_root
from imaginet_nb.data.labels import FAMILIES
from imaginet_nb.detectors.protocol import DETECTORS

ROOT = repo_root()
RECIPES = ROOT/"nbs"/"tutorials"/"change_things.ipynb"

# what has to follow from two lines in labels.py, computed by a copy of the library that has them
FOLLOWS = """
import json, pandas as pd, torch
from imaginet_nb.data.datasets import ManifestDataset
from imaginet_nb.data.labels import FAMILIES, Generator
from imaginet_nb.detectors.predictions import FAMILY_COLUMNS
from imaginet_nb.models.resnet import create_backbone
from imaginet_nb.models.selfcon import ImagiNetClassifier
from imaginet_nb.training.stages import two_track_loss
model = ImagiNetClassifier(create_backbone("resnet18", width=0.125), input_size=32)
manifest = pd.DataFrame({"path": list("abc"), "origin": ["synthetic"]*2 + ["real"], "generator_family": ["Flow", "GAN", "real"]})
classes = ManifestDataset(manifest, ".", None, 0, "test")
pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.manual_seed(0))
loss = two_track_loss(model, model.features(pixels), torch.tensor(classes.origins), torch.tensor(classes.families))
print(json.dumps({"families": FAMILIES, "family": Generator.from_label("FLUX").family.label, "classes": classes.families,
                  "outputs": model.identify(pixels).shape[1], "columns": FAMILY_COLUMNS, "loss": loss.item()}))
"""


def sources(kind: str) -> list[str]:
    return ["".join(c["source"]) for c in json.loads(RECIPES.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == kind]


def test_a_family_is_added_by_the_two_lines_of_the_recipe(tmp_path):
    "Heads, columns and class numbers follow; a class number beyond the outputs of the head would raise in the loss."
    shutil.copytree(ROOT/"imaginet_nb", tmp_path/"imaginet_nb", ignore=shutil.ignore_patterns("__pycache__"))
    labels = tmp_path/"imaginet_nb"/"data"/"labels.py"
    text = labels.read_text(encoding="utf-8")
    recipe = next(cell for cell in sources("markdown") if "class Family(Label):" in cell)
    for name in ("Family", "Generator"):
        line = re.search(rf"class {name}\(Label\):\n    \.\.\.\n(.+)", recipe)[1]
        head, start, rest = text.partition(f"class {name}(Label):")
        body, last, after = rest.partition("    REAL = ")
        text = f"{head}{start}{body}{line}\n{last}{after}"
    labels.write_text(text, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", FOLLOWS], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads(result.stdout)
    assert found["families"][-1] == found["family"] == "Flow" and len(found["families"]) == found["outputs"] == 5
    assert found["classes"] == [4, 0, 5] and found["columns"][-1] == "p_Flow" and found["loss"] > 0


def test_a_metric_is_added_by_the_line_of_the_recipe(monkeypatch):
    "Tables of detectors, of differences and of the metadata-only baselines have it, each with an interval."
    source = (ROOT/"imaginet_nb"/"evaluation"/"detection.py").read_text(encoding="utf-8")
    line = next(re.findall(r'^    "fpr": .+$', cell, re.M) for cell in sources("markdown") if '"fpr": ' in cell)[0]
    head, last, rest = source.partition("auc_statistic(synthetic, score)}\n")
    module = types.ModuleType("imaginet_nb.evaluation.with_a_metric")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    module.__package__ = "imaginet_nb.evaluation"
    exec(f"from .metrics import recall_statistic\n{head}auc_statistic(synthetic, score),\n{line}}}\n{rest}", module.__dict__)

    draw, origin = np.random.default_rng(0), np.repeat(["real", "synthetic"], 80)
    images = pd.DataFrame({"path": [f"{i}.{'png' if i % 3 else 'jpg'}" for i in range(160)], "error": None, "origin": origin,
                           "generator_family": ["real"]*80 + list(FAMILIES)*20,
                           "content_type": ["photos", "faces"]*80, "group": list(FAMILIES)*40})
    logits = [draw.normal(1.0*(origin == "synthetic")) for _ in DETECTORS]
    predictions = pd.concat([images.assign(detector=name, logit=logit, probability=1/(1 + np.exp(-logit)))
                             for name, logit in zip(DETECTORS, logits, strict=True)], ignore_index=True)
    table = module.detection_table(predictions, "family", 50, 0, missing={"Other": "not run: no weights"})
    differences, metadata = module.difference_rows(predictions, "family", 50, 0), module.metadata_rows(predictions, "family", 50, 0)
    rates = [[(logit[:80][images["group"][:80].eq(family)] > 0).mean() for family in FAMILIES] for logit in logits]
    for name, expected in zip(DETECTORS, rates, strict=True):
        rows = table[table["detector"].eq(name)]
        assert rows["fpr"].tolist() == pytest.approx([*expected, np.mean(expected)]) and (rows["fpr_low"] <= rows["fpr"]).all()
    assert differences["fpr"].tolist()[:-1] == pytest.approx(np.subtract(*rates)) and metadata["fpr"].notna().all()
    assert table.loc[table["detector"].eq("Other"), "fpr"].isna().all()


def test_every_name_in_the_recipes_is_in_the_library():
    "A function or constant that was renamed would leave a recipe behind that nobody can follow."
    names = set(re.findall(r"`([A-Za-z_]+)`", "\n".join(sources("markdown")))) - {"name", "git", "uint8", "input_size", "score"}
    library = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT/"imaginet_nb").rglob("*.py"))
    missing = {name for name in names if not re.search(rf"^\s*(def|class) {name}\b|^{name}\b.* = ", library, re.M)}
    assert len(names) > 10 and not missing, missing
