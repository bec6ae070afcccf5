"""Files, ledger and index page of a report: properties that span several functions of `imaginet_nb.reporting`."""
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from imaginet_nb.core import load_profile
from imaginet_nb.reporting import figures
from imaginet_nb.reporting.figures import new_figure, plot_embedding, save_figure
from imaginet_nb.reporting.pages import report_index
from imaginet_nb.reporting.published import PAPER_ITEMS, ledger, published
from imaginet_nb.reporting.tables import read_table, save_table

OURS = "SelfCon (ours)"


@pytest.fixture
def table():
    "Two detectors, one of them not run; a name that LaTeX and Markdown would misread."
    return pd.DataFrame({
        "detector": [OURS, OURS, "Corvi2022*"], "group": ["GAN", "a_b & 50 % #1", "GAN"], "acc": [0.93719, 0.5, np.nan],
        "acc_low": [0.9, 0.45, np.nan], "acc_high": [0.96, 0.55, np.nan], "auc": [0.98, 0.6, np.nan],
        "n_real": [10, 20, np.nan], "note": ["", "", "not run: weights not supplied"]})


def test_saving_twice_gives_the_same_bytes(tmp_path, table):
    first = {p.name: p.read_bytes() for p in save_table(table, tmp_path/"t", "Caption.", {"seed": 1})}
    assert set(first) == {"t.csv", "t.md", "t.tex", "t.provenance.json"}
    assert {p.name: p.read_bytes() for p in save_table(table, tmp_path/"t", "Caption.", {"seed": 1})} == first
    assert not list(tmp_path.glob(".*"))                        # no temporary file stays


def test_figures_have_the_same_bytes_and_no_date(tmp_path):
    points = pd.DataFrame({"x": [0.0, 1.0], "y": [0.0, 1.0], "origin": ["real", "synthetic"]})
    saved = [[p.read_bytes() for p in save_figure(plot_embedding(points, "origin", "Title"), tmp_path/"f", "Points.")]
             for _ in range(2)]
    assert saved[0] == saved[1] and b"CreationDate" not in saved[0][1]


def test_csv_markdown_and_latex_agree(tmp_path, table):
    csv, md, tex = (p.read_text(encoding="utf-8") for p in save_table(table, tmp_path/"t", "Caption.")[:3])
    assert "0.9372" in csv and "0.937 [0.900, 0.960]" in md and "0.937 [0.900, 0.960]" in tex
    numbers = [re.findall(r"\d\.\d{3} \[\d\.\d{3}, \d\.\d{3}\]", text) for text in (md, tex)]
    assert numbers[0] == numbers[1] and len(numbers[0]) == 2
    back = read_table(tmp_path/"t")
    assert list(back) == list(table) and back["note"].tolist() == table["note"].tolist()
    assert back["acc"].isna().tolist() == [False, False, True]


def test_special_characters_are_escaped(tmp_path, table):
    _, md, tex, _ = (p.read_text(encoding="utf-8") for p in save_table(table, tmp_path/"t", "50 % of a_b."))
    assert r"a\_b \& 50 \% \#1" in tex and r"50 \% of a\_b." in tex
    body = tex[tex.index(r"\midrule"):tex.index(r"\bottomrule")].splitlines()[1:]
    assert all(len(re.findall(r"(?<!\\)&", row)) == len(re.findall(r"(?<!\\)&", body[0])) for row in body)   # no cell split
    assert r"Corvi2022\*" in md


def test_missing_numbers_are_called_not_run(tmp_path, table):
    md = save_table(table, tmp_path/"t", "Caption.")[1].read_text(encoding="utf-8")
    row = next(line for line in md.splitlines() if "Corvi2022" in line)
    assert row.count("not run") == 3 and "weights not supplied" in row and "nan" not in md.lower()
    with pytest.raises(ValueError, match="not run"): save_table(table.iloc[:0], tmp_path/"empty", "Caption.")
    assert not list(tmp_path.glob("empty*"))


def test_demo_ledger_compares_nothing(tmp_path, table):
    save_table(table, tmp_path/"detection_by_family", "Made up.")
    lines = ledger(tmp_path, "demo")
    assert list(lines) == ["paper_item", "test_set", "group", "detector", "metric", "published", "reproduced", "difference", "status"]
    assert lines["reproduced"].isna().all() and lines["difference"].isna().all()
    assert set(lines["status"]) == {"not run (profile demo measures the embedded sandbox)"}


def test_ledger_has_a_line_for_every_published_number(tmp_path):
    lines = ledger(tmp_path, "demo")
    assert not lines["detector"].str.startswith("Ours").any() and not lines["detector"].str.contains("pre-v1").any()
    for item, stem in {"Table 2": "table2_dataset_structure", "Table 3": "table3_detection_by_family", "Table 4": "table4_practical",
                       "Table 5": "table5_corvi", "Table 6": "table6_inference_time", "Table 7": "table7_identification"}.items():
        theirs = published(stem)["value"].astype(float)
        assert sorted(lines.loc[lines["paper_item"] == item, "published"].astype(float)) == sorted(theirs), item


def test_paper_ledger_gives_differences(tmp_path):
    def scores(groups, **more): return pd.DataFrame({"detector": OURS, "group": groups, "acc": 0.9, "auc": 0.95, "note": "", **more})
    peer = pd.DataFrame({"detector": "Wu2023", "group": ["GAN"], "acc": np.nan, "auc": np.nan, "note": "not run: weights not supplied"})
    save_table(pd.concat([scores(["GAN", "Mean"]), peer], ignore_index=True), tmp_path/"detection_by_family", "Made up.")
    save_table(scores(["photos"]), tmp_path/"detection_by_content", "Made up.")
    both = pd.concat([scores(["GAN"], setting="clean").assign(acc=0.1), scores(["GAN"], setting="perturbed")], ignore_index=True)
    save_table(both, tmp_path/"identification", "Made up.")
    save_table(pd.DataFrame({"content_type": ["faces", "total"], "share": [0.2, 1.0], "origin": "real", "source": ["FFHQ", "all"],
                               "images": [22000, 100000]}), tmp_path/"dataset_structure", "Made up.")
    absent = pd.DataFrame({"detector": [OURS], "group": [""], "acc": [np.nan], "auc": [np.nan], "note": ["not run: set not supplied"]})
    save_table(absent, tmp_path/"practical", "Made up.")
    lines = ledger(tmp_path, "paper")

    def line(item, group, metric, detector=OURS):
        found = lines.query("paper_item.str.startswith(@item) and group == @group and metric == @metric and detector == @detector")
        assert len(found) == 1, (item, group, metric, detector, len(found))
        return found.iloc[0]
    assert line("Table 3", "GAN", "acc")["difference"] == pytest.approx(0.9 - 0.9372)
    assert line("Table 3", "Mean", "auc")["reproduced"] == pytest.approx(0.95)
    assert line("By content type", "photos", "acc")["difference"] == pytest.approx(0.9 - 0.9643)
    assert line("Table 7", "GAN", "acc")["reproduced"] == pytest.approx(0.9)                 # perturbed, not clean
    assert line("Table 2", "faces/real/FFHQ", "images", "")["difference"] == -500
    assert line("Table 2", "total/real", "images", "")["difference"] == 0
    assert line("Table 3", "GAN", "acc", "Wu2023")["status"] == "not run: weights not supplied"
    assert line("Table 4", "YiJian", "auc")["status"] == "not run: set not supplied"
    assert line("Table 3", "SD", "acc")["status"] == "not run: no such row in our table"
    assert line("Table 5", "ADM", "acc")["status"].startswith("not run: tables/corvi.csv is missing")


def test_items_name_every_result_of_the_pipeline():
    "What the Snakefile says is written must be shown by the index (points of maps are shown as further results)."
    text = (Path(__file__).parents[1]/"Snakefile").read_text(encoding="utf-8")
    for kind in ("tables", "figures"):
        calls = re.findall(rf"(?<!\w){kind}\(((?:\"\w+\"(?:,\s*)?)+)\)", text)
        written = {stem for call in calls for stem in re.findall(r"\"(\w+)\"", call)} - {"umap_points", "relational_autoencoder_points"}
        assert written and written == {stem for item in PAPER_ITEMS for stem in getattr(item, kind)}, kind
    notebooks = set(re.findall(r"^rule (p\w+):", text, re.MULTILINE))
    assert {item.notebook for item in PAPER_ITEMS} - {""} <= notebooks


@pytest.fixture
def report(tmp_path, table):
    folder = tmp_path/"demo"
    save_table(table, folder/"tables"/"detection_by_family", "Detection <made up>.")
    save_figure(new_figure()[0], folder/"figures"/"umap_family", caption="UMAP, made up.")
    (folder/"notebooks").mkdir()
    (folder/"notebooks"/"p50_detection.ipynb").write_text("{}", encoding="utf-8")
    return folder, [p.read_text(encoding="utf-8") for p in report_index(folder, load_profile("demo"))]


def test_index_needs_nothing_from_elsewhere_and_its_links_lead_somewhere(report):
    folder, (page, _) = report
    targets = re.findall(r"(?:src|href)=\"([^\"]+)\"", page)
    assert not re.search(r"https?:|//|<script|@import|url\(", page)
    for target in targets:
        if target.startswith("#"): assert f'id="{target[1:]}"' in page, target
        else: assert (folder/target).is_file(), target
    assert {"tables/detection_by_family.csv", "tables/detection_by_family.provenance.json", "figures/umap_family.png",
            "notebooks/p50_detection.ipynb"} <= set(targets)
    assert "&lt;made up&gt;" in page and "<made up>" not in page


def test_index_shows_missing_results_and_keeps_published_numbers_apart(report):
    folder, (page, readme) = report
    for text in (page, readme):
        assert "tables/corvi.csv is missing" in text and "figures/umap_origin.png is missing" in text
        assert "stand-in" in text and "nothing to compute" in text
        for item in PAPER_ITEMS: assert item.item in text
    outside = re.sub(r"<details class=\"published\">.*?</details>", "", page, flags=re.DOTALL)
    assert "0.9589 / 0.9930" in page and "0.9589" not in outside and "0.9589" not in readme
    assert "<details open" not in page
    for target in re.findall(r"\]\((\.\./published/[^)]+)\)", readme): assert (Path(__file__).parents[1]/"reports"/target[3:]).is_file()


def test_index_is_the_same_when_written_again(report):
    folder, first = report
    assert [p.read_text(encoding="utf-8") for p in report_index(folder, load_profile("demo"))] == first


@pytest.mark.parametrize(("plot", "column"), [("plot_embedding", "x"), ("plot_detection", "acc"), ("plot_content_ablation", "group"),
                                              ("plot_robustness", "value"), ("plot_confusion", "predicted_family")])
def test_plots_name_the_column_that_is_lacking(plot, column):
    frame = pd.DataFrame([dict(x=0, y=0, generator_family="GAN", origin="synthetic", detector=OURS, model="m", group="photos", acc=1, auc=1,
                               track="detection", perturbation="jpeg", value=40, predicted_family="GAN")])
    assert getattr(figures, plot)(frame).axes
    with pytest.raises((ValueError, KeyError), match=column): getattr(figures, plot)(frame.drop(columns=column))
