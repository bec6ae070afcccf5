"""`imaginet evaluate`: the numbers are those of plain computations, every picture counts, faults are named."""
import html
import os
import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from browser import browser, needs_browser
from click.testing import Result
from PIL import Image
from sklearn.metrics import balanced_accuracy_score, roc_auc_score
from typer.testing import CliRunner

from imaginet_nb.apps.calibrate import read_calibration
from imaginet_nb.apps.cli import app
from imaginet_nb.apps.evaluate import Contender, compare, judge, judge_all, keeping
from imaginet_nb.apps.evaluate import evaluate as measure
from imaginet_nb.apps.predict import TOO_SMALL_NOTE, Scorer, score_files
from imaginet_nb.audit.report import audit
from imaginet_nb.core import seed_everything
from imaginet_nb.data.folders import read_custom_dataset
from imaginet_nb.data.images import save
from imaginet_nb.data.labels import AnnotationError
from imaginet_nb.detectors.predictions import load_predictions, predict
from imaginet_nb.models.checkpoints import load_detector, save_checkpoint
from imaginet_nb.models.resnet import create_backbone
from imaginet_nb.models.selfcon import ImagiNetClassifier

METER = """
class Meter:
    name, input_size, tracks = "Brightness meter", 32, ("detection",)
    def score(self, images): return (images.float().mean((1, 2, 3)) - 100)/10
"""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    "Thirty reals, two generators of thirty; the real ones darker; one broken file; a detector and a list."
    folder, draw = tmp_path_factory.mktemp("foreign"), np.random.default_rng(0)
    rows = []
    for i in range(30):
        for place, bright in (("real", 92), ("synthetic/Flux", 112), ("synthetic/SDXL v1.0", 102)):
            picture = (draw.normal(bright, 12) + draw.normal(0, 9, (40, 48, 3))).clip(0, 255).astype(np.uint8)
            save(picture, folder/"set"/place/f"{i}.png")
            rows.append((f"{place}/{i}.png", int(place != "real"), ["cars", "birds"][i % 2], "test" if i % 3 else "calibration"))
    (folder/"set"/"synthetic"/"Flux"/"broken.png").write_bytes(b"no picture")
    (folder/"meter.py").write_text(METER)
    pd.DataFrame(rows, columns=["path", "label", "content_type", "split"]).to_csv(folder/"list.csv", index=False)
    return folder


def imaginet(folder: Path, *words) -> Result:
    here = Path.cwd()
    for name in ("meter", "other"): sys.modules.pop(name, None) # a process of its own has not imported them
    os.chdir(folder)
    try: return CliRunner().invoke(app, [*map(str, words)])
    finally: os.chdir(here)


def evaluate(folder: Path, *words) -> Result:
    return imaginet(folder, "evaluate", *words)


def test_a_folder_gives_tables_a_page_and_predictions_that_agree(pictures):
    "Catches a swapped label, a lost picture, a table of other predictions."
    result = evaluate(pictures, "--root", "set", "--detector", "meter:Meter", "--out", "out", "--workers", 0)
    assert result.exit_code == 0, result.output
    assert "1 of 91 pictures could not be scored" in result.output
    rows = pd.read_csv(pictures/"out"/"predictions.csv")
    assert len(rows) == 91 and rows["error"].notna().sum() == 1
    table = pd.read_csv(pictures/"out"/"tables"/"detection_by_generator.csv").query("detector == 'Brightness meter'").set_index("group")
    for name in ("Flux", "SDXL v1.0"): # as many reals as synthetic ones: here all of them
        part = rows[rows["error"].isna() & rows["generator"].isin([name, "real"])]
        truth = part["origin"].eq("synthetic")
        assert table.loc[name, "auc"] == pytest.approx(roc_auc_score(truth, part["logit"]), abs=6e-5)
        assert table.loc[name, "acc"] == pytest.approx(balanced_accuracy_score(truth, part["logit"] > 0), abs=6e-5)
        assert table.loc[name, "acc_low"] <= table.loc[name, "acc"] <= table.loc[name, "acc_high"]
    page = (pictures/"out"/"index.html").read_text()
    assert "Flux" in page and "Metadata" in page and str(pictures) not in page
    assert (pictures/"out"/"tables"/"detection_by_generator.provenance.json").is_file()


def test_two_columns_are_enough_and_a_calibration_split_moves_the_threshold(pictures, without_figures):
    listed = pd.read_csv(pictures/"list.csv")
    listed[["path", "label"]].to_csv(pictures/"two.csv", index=False)
    result = evaluate(pictures, "--manifest", "two.csv", "--root", "set", "--detector", "meter:Meter", "--out", "two", "--workers", 0)
    assert result.exit_code == 0 and "a plain sigmoid" in result.output, result.output
    result = evaluate(pictures, "--manifest", "list.csv", "--root", "set", "--detector", "meter:Meter", "--out", "four", "--workers", 0)
    assert result.exit_code == 0 and "fitted on the 30 pictures of the split calibration" in result.output, result.output
    rows = pd.read_csv(pictures/"four"/"predictions.csv")
    assert len(rows) == 60 and not rows["split"].eq("calibration").any()
    made = {path.stem for path in (pictures/"four"/"tables").glob("*.csv")}
    assert made == {"detection_by_generator", "detection_by_content", "operating_points"}


def test_swapped_labels_are_asked_about(pictures, without_figures):
    "In the terminal, on the page and in the rows of the table; never for the labels as they are."
    listed = pd.read_csv(pictures/"list.csv")[["path", "label"]]
    for name, frame in dict(right=listed, wrong=listed.assign(label=1 - listed["label"])).items():
        frame.to_csv(pictures/f"{name}.csv", index=False)
        result = evaluate(pictures, "--manifest", f"{name}.csv", "--root", "set", "--detector", "meter:Meter", "--out", name,
                          "--workers", 0)
        assert result.exit_code == 0, result.output
        table = pd.read_csv(pictures/name/"tables"/"detection_by_generator.csv").query("detector == 'Brightness meter'")
        terminal, page = " ".join(result.output.split()), (pictures/name/"index.html").read_text()
        swapped = name == "wrong"
        assert ["Are the labels swapped?" in text for text in (terminal, page)] == [swapped]*2
        assert ("Brightness meter: the AUC lies below 0.5" in terminal) == swapped # several detectors share a page
        assert table["note"].astype(str).str.contains("labels swapped").tolist() == [swapped]*len(table)
        assert (table["auc_high"] < 0.5).tolist() == [swapped]*len(table)


@pytest.fixture(scope="module")
def wide(pictures) -> Path:
    "A report with twenty real images: enough for a threshold."
    listed = pd.read_csv(pictures/"list.csv").replace({"split": {"test": "calibration", "calibration": "test"}})
    listed.to_csv(pictures/"wide.csv", index=False)
    result = evaluate(pictures, "--manifest", "wide.csv", "--root", "set", "--detector", "meter:Meter", "--out", "page",
                      "--workers", 0)
    assert result.exit_code == 0, result.output
    return pictures/"page"


@needs_browser
@pytest.mark.parametrize("width", [1300, 420])
def test_the_page_fits_a_screen_and_a_telephone(wide, width):
    "All figures are shown, and the table of operating points needs no sideways scrolling."
    assert pd.read_csv(wide/"tables"/"operating_points.csv")["empirical_tpr_high"].notna().any()
    with browser(1300, 900) as window:
        window.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
        window.open((wide/"index.html").as_uri())
        assert window.ask("innerWidth") == width
        shown = window.ask("[...document.images].map(i => [i.src.split('/').pop(), i.naturalWidth > 0])")
        assert shown == [[f"{name}.png", True] for name in ("detection_by_generator", "roc", "scores")]
        frames = window.ask("[...document.images].map(i => [i.naturalWidth/i.getBoundingClientRect().width, "
                            "i.closest('figure').clientWidth, i.closest('figure').scrollWidth])")
        for smaller, frame, inside in frames: # labels of 8 points at 150 dpi remain 10 pixels high; a narrow frame scrolls
            assert smaller < 1.6 and frame < width and (inside > frame) == (width < 600), frames
        heads = window.ask("[...document.querySelectorAll('.table')].map(t => [t.innerText.includes('Empirical FPR'), "
                           "t.scrollWidth - t.clientWidth])")
        assert [over for operating, over in heads if operating] == [0], heads
        cues = window.ask("[...document.querySelectorAll('.table, figure')].map(t => getComputedStyle(t).backgroundAttachment)")
        assert set(cues) == {"local, local, scroll, scroll"} # a shadow at the side where it goes on
        assert window.ask("document.documentElement.scrollWidth") <= width and window.errors == []


def test_the_same_seed_gives_the_same_table(pictures, monkeypatch):
    "A second run gives the same tables; another seed draws other resamples."
    monkeypatch.syspath_prepend(pictures)
    import meter  # type: ignore[import-not-found]
    foreign = read_custom_dataset(pictures/"set")
    one, two, other = (judge(meter.Meter(), foreign, resamples=50, seed=seed, num_workers=0).tables["detection_by_generator"][0]
                       for seed in (1, 1, 2))
    pd.testing.assert_frame_equal(one, two)
    assert (one["acc_low"] != other["acc_low"]).any()


def test_a_family_that_is_not_ours_is_no_wrong_answer(pictures, tmp_path, recwarn):
    "Of two generators one has a family: identification is judged on its images alone, and the page says what the checkpoint is."
    seed_everything(0)
    model = ImagiNetClassifier(create_backbone("resnet18", width=0.125), input_size=32)
    with torch.no_grad(): # says SD, and nothing else
        model.identification[-1].weight.zero_()
        model.identification[-1].bias.copy_(torch.tensor([0.0, 9.0, 0.0, 0.0]))
    save_checkpoint(model, tmp_path/"net.safetensors", profile="demo")
    result = evaluate(pictures, "--root", "set", "--checkpoint", tmp_path/"net.safetensors", "--out", tmp_path/"out", "--workers", 0,
                      "--robustness", 20)
    assert result.exit_code == 0, result.output
    loss = pd.read_csv(tmp_path/"out"/"tables"/"robustness_loss.csv").query("track == 'identification'")
    rows = pd.read_csv(tmp_path/"out"/"predictions.csv")
    assert 0 < loss["n"].max() < 10 and loss["acc_clean"].eq(1).all() and rows["generator_family"].isin(["SD"]).sum() == 30
    assert not [w for w in recwarn if "invalid value" in str(w.message)]
    assert "do not rely on its verdicts" in (tmp_path/"out"/"index.html").read_text()
    table = pd.read_csv(tmp_path/"out"/"tables"/"detection_by_generator.csv") # who passes on a row or a line passes on the warning
    trained_here = ~table["detector"].str.startswith("Metadata")
    assert table["note"].fillna("").str.contains("demo only").tolist() == trained_here.tolist()
    told = [line for line in result.output.splitlines() if "balanced accuracy" in line or "metadata-only baseline" in line]
    assert len(told) == 2 and all("- demo only: the detector was trained on stand-ins" in line for line in told), told


@pytest.mark.parametrize("words, message", [
    ((), "name the pictures: --manifest LIST.csv, or --root FOLDER"),
    (("--manifest", "none.csv"), "none.csv: no such list or folder"),
    (("--manifest", "list.csv", "--root", "nowhere"), "nowhere: no such folder"),
    (("--root", "set/real"), "real or synthetic? put it under real/ or synthetic/<generator>/"),
    (("--manifest", "list.csv", "--root", "set", "--split", "tset"), "no split 'tset' in the list; there are"),
    (("--manifest", "bad.csv", "--root", "set"), "line 3: unknown label 'maybe'"),
    (("--manifest", "one.csv", "--root", "set"), "real only: accuracy needs real and synthetic ones"),
    (("--manifest", "semicolons.csv", "--root", "set"), "separate the columns by commas"),
])
def test_faults_are_named_and_nothing_is_written(words, message, pictures):
    (pictures/"bad.csv").write_text("path,label\nreal/0.png,real\nreal/1.png,maybe\n")
    (pictures/"semicolons.csv").write_text("path;label\nreal/0.png;real\n")
    (pictures/"one.csv").write_text("path,label\nreal/0.png,real\nreal/1.png,0\n")
    result = evaluate(pictures, *words, "--detector", "meter:Meter", "--out", "nothing")
    assert result.exit_code == 1 and message in result.output, result.output
    assert not (pictures/"nothing").exists()


def test_a_rule_at_chance_tells_nothing_apart(pictures, monkeypatch):
    "All pictures are PNG of one size: where the detector is no better than that, nobody may conclude that the files give them away."
    monkeypatch.syspath_prepend(pictures)
    import meter  # type: ignore[import-not-found]
    blind = type("Blind", (meter.Meter,), {"score": lambda self, images: images.float().mean((1, 2, 3))*0 - 1})
    sentences = judge(blind(), read_custom_dataset(pictures/"set"), resamples=50, num_workers=0).sentences
    sentence, = (text for text in sentences if "metadata-only baseline" in text)
    assert "no better than chance, so nothing follows from it" in sentence
    assert not any(word in sentence for word in ("separate", "worse", "better than that", "not distinguishable"))


@pytest.fixture(scope="module")
def sizes(tmp_path_factory) -> Path:
    "Forty real images and forty synthetic ones; of these thirty-two are wider, which nothing but their size tells."
    folder, draw = tmp_path_factory.mktemp("sizes"), np.random.default_rng(1)
    for i in range(40):
        for place, bright, wide in (("real", 92, 48), ("synthetic/Flux", 112, 48 if i % 5 == 0 else 56)):
            save((draw.normal(bright, 12) + draw.normal(0, 9, (40, wide, 3))).clip(0, 255).astype(np.uint8), folder/place/f"{i}.png")
    return folder


@pytest.mark.parametrize("right, words", [(1.0, "is better than that"), (0.5, "is worse than that"),
                                          (0.9, "is not distinguishable from it at this sample size")])
def test_the_detector_is_compared_with_the_classifier_of_the_audit(sizes, right, words):
    "By the paired interval; catches a baseline without sizes, and one with other numbers than the audit's."
    from imaginet_nb.audit.files import read_properties
    from imaginet_nb.audit.shortcuts import metadata_classifier
    dataset, names = read_custom_dataset(sizes), iter(range(10**6))
    synthetic = dataset.manifest["origin"].eq("synthetic").to_numpy()
    hit = np.zeros(80, bool)
    for kind in (synthetic, ~synthetic): hit[np.flatnonzero(kind)[:round(right*40)]] = True

    class Told: # knows the label of a share of the images
        name, input_size = "Told", 32
        def score(self, images): return torch.tensor([1.0 if synthetic[i] == hit[i] else -1.0 for _, i in zip(images, names)])
    found = judge(Told(), dataset, resamples=100, num_workers=0)
    sentence, = (text for text in found.sentences if "metadata-only baseline" in text)
    assert "(properties)" in sentence and words in sentence, sentence
    audit = metadata_classifier(read_properties(dataset.manifest, sizes), rules=["properties"])
    audit = audit.query("track == 'detection' and group == 'all'")
    table, caption = found.tables["detection_by_generator"]
    own = table[table["detector"].eq("Metadata: properties") & table["group"].eq("Flux")].iloc[0]
    assert own["acc"] == pytest.approx(audit["balanced_accuracy"].iloc[0]) and own["auc"] == pytest.approx(audit["auc"].iloc[0])
    assert "each against as many real images" in caption
    ours = table[table["detector"].eq("Told") & table["group"].eq("Flux")].iloc[0]
    if right == 1.0: # a perfect score is no certainty: exact for the accuracy, none for the AUC
        assert ours["acc"] == ours["acc_high"] == 1 and 0.85 < ours["acc_low"] < 0.95
        assert ours["auc"] == 1 and np.isnan(ours["auc_low"])


def test_false_positives_are_in_the_summary(pictures, without_figures):
    "Share of the real images above the calibrated threshold, recomputed from the predictions; in the terminal and on the page."
    listed = pd.read_csv(pictures/"list.csv").replace({"split": {"test": "calibration", "calibration": "test"}})
    listed.to_csv(pictures/"flags.csv", index=False)
    result = evaluate(pictures, "--manifest", "flags.csv", "--root", "set", "--detector", "meter:Meter", "--out", "flags", "--workers", 0)
    assert result.exit_code == 0, result.output
    point = pd.read_csv(pictures/"flags"/"tables"/"operating_points.csv").iloc[0]
    real = pd.read_csv(pictures/"flags"/"predictions.csv").query("origin == 'real'")
    share = (real["probability"] > point["threshold"]).mean()
    told = f"{100*share:.1f} % [{100*point['empirical_fpr_low']:.1f}, "
    for text in (result.output, (pictures/"flags"/"index.html").read_text()):
        assert told in text and f"of the {len(real)} real images were flagged" in text, text


# --- several detectors --------------------------------------------------------------------------------------------------------------

class Bright:
    "Mean brightness, less by a fraction of the noise of the picture; counts what it is shown."
    input_size, tracks = 32, ("detection",)
    def __init__(self, name: str, noise: float): self.name, self.noise, self.seen = name, noise, 0
    def score(self, images):
        self.seen += len(images)
        return (images.float().mean((1, 2, 3)) - 100)/10 - self.noise*images.float().std((1, 2, 3))


def test_detectors_are_compared_in_pairs_on_the_same_images(pictures, tmp_path):
    "Catches a difference of other images, intervals that are not paired, a picture that only one detector lost, a stale score."
    dataset, two = read_custom_dataset(pictures/"set"), [Contender(Bright("A", 0), "a"), Contender(Bright("B", 0.01), "b")]
    sentences = compare(two, dataset, tmp_path/"out", resamples=200, num_workers=0)
    assert any("could not score them: 1 pictures" in text for text in sentences), sentences
    assert len([text for text in sentences if "no better than chance" in text]) == 1 # of the files alone, so not once per detector
    rows, auc = pd.read_csv(tmp_path/"out"/"predictions.csv"), {}
    assert len(rows) == 2*91 and rows["error"].notna().sum() == 2
    for name, mine in rows[rows["error"].isna()].groupby("detector"):
        parts = [mine[mine["generator"].isin([maker, "real"])] for maker in ("Flux", "SDXL v1.0")]
        auc[name] = np.mean([roc_auc_score(part["origin"].eq("synthetic"), part["logit"]) for part in parts])
    board = pd.read_csv(tmp_path/"out"/"tables"/"leaderboard.csv").set_index("detector")
    assert board["auc"][["A", "B"]].to_numpy() == pytest.approx([auc["A"], auc["B"]], abs=6e-5)
    assert board["difference_auc"]["B"] == pytest.approx(auc["B"] - auc["A"], abs=6e-5) and np.isnan(board["difference_auc"]["A"])
    width = board["difference_auc_high"]["B"] - board["difference_auc_low"]["B"]
    assert width < 0.5*(board["auc_high"]["B"] - board["auc_low"]["B"])            # scores of the same images move together
    assert list(board.index[2:]) and board.index[2:].str.startswith("Metadata: ").all()
    page = (tmp_path/"out"/"index.html").read_text()
    assert page.startswith("<!") and all(text in page for text in ("Leaderboard", "B against A: AUC", "By generator", "2 detectors on set"))

    seen = [contender.detector.seen for contender in two]
    again = dict(resamples=20, num_workers=0, kept=tmp_path/"out"/"kept")
    found = judge_all([*two, Contender(Bright("C", 0.1), "c")], dataset, **again)
    assert [contender.detector.seen for contender in two] == seen == [90, 90]      # only the one that was added is run
    assert all("30 real and 60 synthetic images" in found.figures[name][1] for name in ("roc", "scores")) # not once per detector
    forest, _ = found.figures["detection_by_generator"][0].axes[0].get_legend_handles_labels()
    colours = {str(bars.get_label()): bars.lines[0].get_color() for bars in forest if hasattr(bars, "lines")}
    for name, panel in zip("ABC", found.figures["roc"][0].axes, strict=True):
        assert panel.lines[1].get_color() == colours[name]                         # a detector has one colour on a page
    os.utime(pictures/"set"/"real"/"0.png", (1, 1))
    judge_all(two, dataset, **again)
    assert [contender.detector.seen for contender in two] == [180, 180]            # a picture changed


class Busy(Bright):
    "Fails on bright pictures while the memory is full."
    full = True
    def score(self, images):
        if self.full and (images.float().mean((1, 2, 3)) > 105).any(): raise RuntimeError("CUDA out of memory")
        return super().score(images)


def test_an_error_of_the_moment_is_not_kept(pictures, tmp_path):
    "Rows with `CUDA out of memory` that stay for good; a second run that fails, or that scores all anew."
    dataset, detector = read_custom_dataset(pictures/"set"), Busy("A", 0)
    def errors() -> pd.Series:
        found = score(detector, dataset.manifest, dataset.root, num_workers=0)
        assert found["path"].tolist() == dataset.manifest["path"].tolist() and found["logit"].isna().equals(found["error"].notna())
        return found["error"].dropna()
    score = keeping(tmp_path, "a")
    first = errors()
    lost = first.str.contains("out of memory").sum()
    assert 20 < lost < 60 and len(first) == lost + 1 and errors().to_dict() == first.to_dict() # the detector fails on all of them again
    detector.full, detector.seen = False, 0
    assert "out of memory" not in "".join(errors()) and detector.seen == lost
    assert len(errors()) == 1 and detector.seen == lost                            # now they are kept; one file is broken
    everything = predict(detector, dataset.manifest, dataset.root, num_workers=0)
    assert np.allclose(score(detector, dataset.manifest, dataset.root)["logit"], everything["logit"], equal_nan=True)


@pytest.mark.parametrize("side", [32, 64, None])
def test_a_picture_too_small_to_judge_is_counted_and_not_scored(tmp_path, side, without_figures):
    "Catches a score of a single pixel, a rule that is not that of `predict`, a picture that is missing without a word."
    sides = {"dot": (1, 1), "line": (2, 3000), "strip": (1, 400), "icon": (16, 16)}
    small = set(sides) if side == 64 else {"dot", "line", "strip"} # 16 pixels are enough for a crop of 32
    shapes = sides | {str(k): (64, 64) for k in range(12)}
    for k, (name, shape) in enumerate(shapes.items()):
        save(np.full((*shape, 3), 60 + 10*k, np.uint8), tmp_path/"set"/("real", "synthetic/Flux")[k % 2]/f"{name}.png")
    dataset, detector = read_custom_dataset(tmp_path/"set"), Bright("A", 0)
    detector.input_size = side
    sentences = measure(detector, dataset, tmp_path/"out", resamples=10, num_workers=0)
    told = f"{len(small)} of {len(shapes)} pictures could not be scored"
    assert told in " ".join(sentences) and told in (tmp_path/"out"/"index.html").read_text()
    rows = load_predictions(tmp_path/"out"/"predictions.csv").set_index("path")
    left_out = rows[rows["error"].notna()]
    assert {Path(path).stem for path in left_out.index} == small and left_out["logit"].isna().all()
    assert left_out["error"].tolist() == [f"{path}: {TOO_SMALL_NOTE}" for path in left_out.index]
    judged = score_files([dataset.root/path for path in rows.index], Scorer(detector), readers=0)
    assert [row["reason"] == TOO_SMALL_NOTE for row in judged] == rows["error"].notna().tolist()


class Fails(Bright):
    "A detector that cannot score bright pictures."
    def score(self, images):
        brightest = images.float().mean((1, 2, 3)).max()
        if brightest > 200: raise RuntimeError(f"too bright: {brightest}")
        return super().score(images)


@pytest.mark.parametrize("several", [False, True])
def test_every_picture_left_out_or_noted_has_its_reason_in_table_page_and_result(tmp_path, several, without_figures):
    "Catches a note that only scored pictures have, reasons that are not counted, a picture that the page does not show."
    for k in range(12):
        save(np.full((48, 48, 3), 60 + 10*k, np.uint8), tmp_path/"set"/("real", "synthetic/Flux")[k % 2]/f"{k}.png")
    lost_end = "the end of the file is missing, but all pixels are present"
    for name, side, value in (("small", 8, 90), ("no_end", 48, 90), ("bright", 48, 250), ("light", 48, 251)):
        path = tmp_path/"set"/"real"/f"{name}.png"
        save(np.full((side, side, 3), value, np.uint8), path)
        if name in ("small", "no_end", "bright"): path.write_bytes(path.read_bytes()[:-12])
    (tmp_path/"set"/"real"/"page.jpg").write_bytes(b"<html>404</html>")
    dataset, detector = read_custom_dataset(tmp_path/"set"), Fails("A", 0)
    first = [Contender(detector, "a"), Contender(Bright("B", 0), "b")] if several else detector
    sentences = (compare if several else measure)(first, dataset, tmp_path/"out", resamples=10, num_workers=0)
    rows = load_predictions(tmp_path/"out"/"predictions.csv").query("detector == 'A'").set_index("path")
    noted = {f"real/{name}.png": lost_end for name in ("bright", "no_end", "small")}
    assert rows["note"].dropna().to_dict() == noted
    errors = rows["error"].dropna().to_dict()
    assert list(errors) == ["real/bright.png", "real/light.png", "real/page.jpg", "real/small.png"]
    page, told = (tmp_path/"out"/"index.html").read_text(), " ".join(sentences)
    for text in (page, told):
        assert "RuntimeError (2)" in text and "too small to judge (1)" in text
        assert "not an image, but a web page, so its download failed (1)" in text
        assert f"Pictures with a note on their file: 3; {lost_end} (3)." in text
    _, _, section = page.partition("Pictures without a score, or with a note")
    cells = [html.unescape(cell).strip() for cell in re.findall(r"<td[^>]*>(.*?)</td>", section, re.DOTALL)]
    shown = {cells[k]: (cells[k + 1], cells[k + 2]) for k in range(0, len(cells), 3)}
    wanted = {path: (errors.get(path, "").removeprefix(f"{path}: "), noted.get(path, "")) for path in {*errors, *noted}}
    assert shown == wanted and 3*len(shown) == len(cells)


def test_the_page_shows_errors_before_notes(tmp_path, without_figures):
    "Files without their end filled the excerpt, and no picture without a score was on the page."
    for k in range(30):
        save(np.full((32, 32, 3), 60 + k, np.uint8), path := tmp_path/"set"/("real", "synthetic/Flux")[k % 2]/f"{k}.png")
        path.write_bytes(path.read_bytes()[:-12])
    (tmp_path/"set"/"synthetic"/"Flux"/"z.png").write_bytes(b"")
    measure(Bright("A", 0), read_custom_dataset(tmp_path/"set"), tmp_path/"out", resamples=10, num_workers=0)
    _, _, section = (tmp_path/"out"/"index.html").read_text().partition("Pictures without a score, or with a note")
    assert "The first 20 of 31." in section and section.index("synthetic/Flux/z.png") < section.index("real/0.png")


class Gaps(Bright):
    "A detector without a finite score of bright pictures."
    def score(self, images):
        found = super().score(images)
        return found.masked_fill(images.float().mean((1, 2, 3)) > 200, float("nan"))


def test_errors_of_detectors_with_one_name_say_which_and_are_counted_by_reason(tmp_path, without_figures):
    "The reason was the beginning of the detector's name, and the page showed one error for two detectors."
    for k in range(12): save(np.full((48, 48, 3), 60 + 10*k, np.uint8), tmp_path/"set"/("real", "synthetic/Flux")[k % 2]/f"{k}.png")
    save(np.full((48, 48, 3), 250, np.uint8), tmp_path/"set"/"real"/"bright.png")
    dataset, name = read_custom_dataset(tmp_path/"set"), r"Net \1 (ours)"
    told = judge(Gaps(name, 0), dataset, resamples=10, num_workers=0).sentences
    assert any("could not be scored: the detector gave a score that is not finite (1). The" in text for text in told), told
    for first, second in ((Fails, Gaps), (Gaps, Fails)):
        found = judge_all([Contender(first(name, 0), "a"), Contender(second(name, 0), "b")], dataset, resamples=10, num_workers=0)
        errors = found.predictions.set_index("detector")["error"].dropna()
        assert all(error.startswith((f"{detector}: RuntimeError", f"{detector} gave")) for detector, error in errors.items())
        assert sorted(errors.index) == [f"{name} (a)", f"{name} (b)"]
        reason = "RuntimeError" if first is Fails else "the detector gave a score that is not finite"
        assert any(f"could not score them: 1 pictures; {reason} (1). The" in text for text in found.sentences), found.sentences


def test_scores_are_kept_when_other_columns_of_a_list_change(tmp_path):
    "Every picture was scored again for a new remark or a corrected label, or has the columns of the first list."
    for k in range(4): save_plain(tmp_path/f"{k}.bmp", 60 + 10*k)
    listed = pd.DataFrame({"path": [f"{k}.bmp" for k in range(4)], "label": ["real", "fake"]*2, "note": "first"})
    detector, score = Bright("A", 0), keeping(tmp_path/"kept", "a")
    for changed in (listed, listed.assign(note="second", camera="X", label=["fake", "real"]*2)):
        changed.to_csv(tmp_path/"list.csv", index=False)
        manifest = read_custom_dataset(tmp_path/"list.csv").manifest
        found = score(detector, manifest, tmp_path, num_workers=0)
        assert found[list(manifest)].equals(manifest) and detector.seen == 4
    score(detector, manifest[::-1].reset_index(drop=True), tmp_path, num_workers=0)
    assert detector.seen == 8                                                      # other rows


def test_a_list_s_own_columns_stand_beside_the_results(tmp_path, without_figures):
    "Catches a column of the list that a result replaces, in a first run, one that reads kept scores, and the audit."
    for k in range(8): save(np.full((32, 32, 3), 60 + 10*k, np.uint8), tmp_path/f"{k}.png")
    own = {name: [f"{name} {k}" for k in range(8)] for name in ("note", "error", "logit", "width", "provenance", "camera")}
    listed = pd.DataFrame({"path": [f"{k}.png" for k in range(8)], "label": ["real", "fake"]*4, **own})
    listed.to_csv(source := tmp_path/"list.csv", index=False)
    dataset = read_custom_dataset(source)
    for _ in range(2): measure(Bright("A", 0), dataset, tmp_path/"out", "a", resamples=10, num_workers=0)
    audit(source, tmp_path/"audit", jobs=1)
    for table in ("out/predictions.csv", "audit/properties.csv"):
        found = pd.read_csv(tmp_path/table)
        for name, values in own.items(): assert found[name if name == "camera" else f"list_{name}"].tolist() == values, table
        assert found["error"].isna().all() and found["note"].isna().all(), table


def test_a_picture_that_was_replaced_is_scored_again(tmp_path):
    "Catches a state of size and time alone: `cp -p` and archives set the time."
    for k, name in enumerate(("real/0.bmp", "real/1.bmp", "synthetic/Flux/0.bmp")): save_plain(tmp_path/"set"/name, 50*k)
    dataset, score = read_custom_dataset(tmp_path/"set"), keeping(tmp_path/"kept", "a")
    before = score(Bright("A", 0), dataset.manifest, dataset.root, num_workers=0)
    file = tmp_path/"set"/"synthetic"/"Flux"/"0.bmp"
    was = file.stat()
    save_plain(file, 250)
    os.utime(file, ns=(was.st_atime_ns, was.st_mtime_ns))
    assert file.stat().st_size == was.st_size
    after = score(Bright("A", 0), dataset.manifest, dataset.root, num_workers=0)
    assert (after["logit"] - before["logit"]).tolist() == pytest.approx([0, 0, 15])


def save_plain(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((32, 32, 3), value, np.uint8)).save(path)


@pytest.mark.parametrize("column, what", [("model", "generator"), ("content_type", "content type"), ("source", "source")])
def test_a_group_that_is_called_as_the_mean_is_refused(pictures, tmp_path, column, what):
    "Its row was taken for the mean over all generators."
    paths = [f"{kind}/{k}.png" for kind in ("real", "synthetic/Flux") for k in range(4)]
    rows = pd.DataFrame({"path": paths, "label": [0]*4 + [1]*4})
    rows.assign(**{"model": "Flux", column: "Mean"}).to_csv(tmp_path/"list.csv", index=False)
    dataset = read_custom_dataset(tmp_path/"list.csv", pictures/"set")
    message = f"a {what} is called Mean, which is how the tables call the mean over all of them; rename"
    with pytest.raises(AnnotationError, match=message): judge(Bright("A", 0), dataset, num_workers=0)
    two = [Contender(Bright("A", 0)), Contender(Bright("B", 1))]
    with pytest.raises(AnnotationError, match=message): judge_all(two, dataset, num_workers=0)


def test_two_detectors_in_the_terminal(pictures, without_figures):
    words = ("--root", "set", "--out", "pair", "--workers", 0, "--detector", "meter:Meter", "--detector", "meter:Meter")
    result = evaluate(pictures, *words)
    assert result.exit_code == 0, result.output
    assert "Brightness meter (meter:Meter), 2 against Brightness meter (meter:Meter), 1" in result.output
    assert result.output.index("set: 91 images") < result.output.index("balanced accuracy")
    result = evaluate(pictures, *words, "--robustness", 8)
    assert result.exit_code == 1 and "--robustness measures one detector" in result.output


# --- options as those of `predict` --------------------------------------------------------------------------------------------------

def test_the_largest_picture_that_is_read(pictures, monkeypatch, without_figures):
    "Catches a limit that is not passed on, one that stays in the environment, and scores that a run with another limit has kept."
    words = ("--root", "set", "--detector", "meter:Meter", "--out", "limit", "--workers", 0, "--max-megapixels")
    monkeypatch.setenv("IMAGINET_MAX_PIXELS", "1000")
    result = evaluate(pictures, *words, 0.00192)
    assert result.exit_code == 0 and "1 of 91 pictures could not be scored" in result.output, result.output
    assert os.environ["IMAGINET_MAX_PIXELS"] == "1000"
    monkeypatch.delenv("IMAGINET_MAX_PIXELS")
    result = evaluate(pictures, *words, 0.0019)
    assert result.exit_code == 1 and "more than max_pixels=1900" in result.output, result.output
    assert "`imaginet predict`, `evaluate` and `calibrate`: --max-megapixels 1" in result.output and "IMAGINET_MAX_PIXELS" not in os.environ
    result = evaluate(pictures, *words, "nan")
    assert result.exit_code == 1 and "--max-megapixels nan: choose a number" in result.output, result.output


def test_the_largest_picture_that_a_calibration_reads(pictures):
    "Catches a limit that is not passed on, and a refusal without its reason; a picture of exactly the limit is read."
    words = ("calibrate", "--detector", "meter:Meter", "--real", "set/real", "--device", "cpu", "--out", "limit.json", "--max-megapixels")
    result = imaginet(pictures, *words, 0.0019)
    assert result.exit_code == 1 and "0 different real pictures with a score" in result.output, result.output
    assert "30 have no score, the first: set/real/0.png: 48x40 pixels are more than max_pixels=1900" in result.output
    assert "`calibrate`: --max-megapixels 1" in result.output and not (pictures/"limit.json").exists()
    result = imaginet(pictures, *words, 0.00192)
    assert result.exit_code == 0 and "30 real and 0 synthetic pictures" in result.output, result.output
    result = imaginet(pictures, *words, "nan")
    assert result.exit_code == 1 and "--max-megapixels nan: choose a number" in result.output, result.output


@pytest.fixture(scope="module")
def calibrated(pictures) -> Path:
    "Three calibrations beside the pictures: of the meter, the same anew, and one with other crops; and a second detector."
    (pictures/"other.py").write_text(METER.replace("Brightness meter", "Other meter"))
    for name, crops in (("meter", 5), ("again", 5), ("crops", 2)):
        result = imaginet(pictures, "calibrate", "--detector", "meter:Meter", "--real", "set/real", "--synthetic", "set/synthetic",
                          "--crops", crops, "--out", f"{name}.json", "--device", "cpu")
        assert result.exit_code == 0, result.output
    return pictures


def test_a_calibration_of_one_s_own_gives_the_thresholds(calibrated, without_figures):
    "Those of the file, on scores that are those of `predict`; said in the terminal and on the page."
    words = ("--detector", "meter:Meter", "--calibration", "meter.json", "--out")
    result = evaluate(calibrated, "--root", "set", "--workers", 0, *words, "own")
    assert result.exit_code == 0, result.output
    stored = read_calibration(calibrated/"meter.json").calibration
    rows = pd.read_csv(calibrated/"own"/"predictions.csv").set_index("path").dropna(subset="logit")
    assert np.allclose(rows["probability"], stored.probability(rows["logit"]))
    point = pd.read_csv(calibrated/"own"/"tables"/"operating_points.csv").iloc[0]
    assert point["threshold"] == pytest.approx(stored.thresholds["0.05"], abs=6e-5)
    share = (rows.query("origin == 'real'")["probability"] > stored.thresholds["0.05"]).mean()
    for text in (result.output, (calibrated/"own"/"index.html").read_text()):
        assert "as in meter.json, fitted by imaginet calibrate on" in text
        assert f"false-positive rate of at most 5 %, {100*share:.1f} % [" in text
        assert "crops of 32 x 32 pixels all over the picture, as it was for the calibration" in text and "was not checked" in text
    result = imaginet(calibrated, "predict", "set", "--no-views", *words, "p.csv")
    assert result.exit_code == 0, result.output
    theirs = pd.read_csv(calibrated/"p.csv").assign(path=lambda frame: frame["path"].str.removeprefix("set/")).set_index("path")
    assert np.allclose(theirs["probability"][rows.index], rows["probability"], atol=1e-5)


def test_a_checkpoint_and_a_custom_detector_share_one_leaderboard(pictures, tmp_path, without_figures):
    "Catches an option that replaces the other one, and a reference that depends on the order of the options."
    seed_everything(0)
    save_checkpoint(ImagiNetClassifier(create_backbone("resnet18", width=0.125), input_size=32), tmp_path/"net.safetensors")
    result = evaluate(pictures, "--root", "set", "--detector", "meter:Meter", "--checkpoint", tmp_path/"net.safetensors",
                      "--out", tmp_path/"out", "--workers", 0)
    assert result.exit_code == 0, result.output
    name = load_detector(tmp_path/"net.safetensors").name
    board = pd.read_csv(tmp_path/"out"/"tables"/"leaderboard.csv").set_index("detector")
    assert sorted(board.index[~board.index.str.startswith("Metadata")]) == sorted([name, "Brightness meter"])
    rows, auc = pd.read_csv(tmp_path/"out"/"predictions.csv").dropna(subset="logit"), {}
    for detector, mine in rows.groupby("detector"):
        parts = [mine[mine["generator"].isin([maker, "real"])] for maker in ("Flux", "SDXL v1.0")]
        auc[detector] = np.mean([roc_auc_score(part["origin"].eq("synthetic"), part["logit"]) for part in parts])
    assert board["auc"][[name, "Brightness meter"]].tolist() == pytest.approx([auc[name], auc["Brightness meter"]], abs=6e-5)
    assert np.isnan(board["difference_auc"][name]) # others are compared with the checkpoint
    assert board["difference_auc"]["Brightness meter"] == pytest.approx(auc["Brightness meter"] - auc[name], abs=6e-5)


def test_of_several_detectors_each_has_its_own_calibration(calibrated, without_figures):
    "Catches a detector that is another one if a second one is loaded beside it."
    words = ("--root", "set", "--detector", "other:Meter", "--detector", "meter:Meter", "--out", "several", "--workers", 0)
    result = evaluate(calibrated, *words, "--calibration", "meter.json")
    assert result.exit_code == 0, result.output
    points = pd.read_csv(calibrated/"several"/"tables"/"operating_points.csv")
    assert points["detector"].unique().tolist() == ["Brightness meter"] and points["threshold"].notna().any()
    lines = {name: next(line for line in result.output.splitlines() if f"- {name}: balanced" in line) for name in
             ("Other meter", "Brightness meter")}
    assert "a plain sigmoid: this detector has no calibration" in lines["Other meter"]
    assert "as in meter.json" in lines["Brightness meter"] and "were flagged" in lines["Brightness meter"]
    page = (calibrated/"several"/"index.html").read_text()
    assert "<li>Brightness meter at 1.0%: " in page
    assert "Not in the table, for lack of a calibration: Other meter." in page and page.count("was not checked") == 1


@pytest.mark.parametrize("detectors, files, message", [
    (["other:Meter"], ["meter"], "meter.json: the calibration was made for another detector: Brightness meter"),
    (["other:Meter", "other:Meter"], ["meter"], "meter.json: the calibration was made for another detector: Brightness meter"),
    (["meter:Meter"], ["meter", "again"], "again.json: a second calibration of Brightness meter; give one for each detector"),
    (["meter:Meter"], ["crops"], "crops.json: made with at most 2 crops of a picture, but Brightness meter is shown up to 5 here; "
                                 "calibrate with --crops 5"),
    (["meter:Meter"], ["list"], "list.json: not a calibration of `imaginet calibrate`")])
def test_a_calibration_that_does_not_fit_is_refused(calibrated, detectors, files, message):
    (calibrated/"list.json").write_text("[]")
    words = [word for name in detectors for word in ("--detector", name)]
    words += [word for name in files for word in ("--calibration", f"{name}.json")]
    result = evaluate(calibrated, "--root", "set", *words, "--out", "refused", "--workers", 0)
    assert result.exit_code == 1 and message in result.output, result.output
    assert not (calibrated/"refused").exists()
