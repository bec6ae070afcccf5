"""What leaves the repository as a table, figure or page: checked from outside, by reading the files back."""
import json
import re
import subprocess
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from skimage.color import deltaE_ciede2000, rgb2lab

from imaginet_nb.core import file_sha256, git_state, load_profile, repo_root
from imaginet_nb.data.labels import CONTENT_TYPES, FAMILIES
from imaginet_nb.reporting.figures import SAME_IMAGES, SPARE, STYLES, plot_detection, save_figure
from imaginet_nb.reporting.pages import report_index
from imaginet_nb.reporting.published import PAPER_ITEMS, ledger, published
from imaginet_nb.reporting.tables import read_table, save_table

GROUPS = [*FAMILIES, "Mean"]
NOTE = "not run: weights, 50 % of them & more, not supplied"


@pytest.fixture
def table() -> pd.DataFrame:
    "Two detectors with numbers, one without, as the pipeline makes them."
    draw, rows = np.random.default_rng(0), []
    for detector in ("SelfCon (ours)", "Cross-entropy (baseline)"):
        for group in GROUPS:
            acc, auc = draw.uniform(0.6, 0.95, 2)
            rows.append(dict(detector=detector, group=group, acc=acc, acc_low=acc - 0.04, acc_high=acc + 0.03, auc=auc, auc_low=auc - 0.04,
                             auc_high=auc + 0.03, n_real=150, n_synthetic=150, note=""))
    return pd.DataFrame([*rows, *(dict(detector="Corvi2022*", group=group, note=NOTE) for group in GROUPS)])


def markdown_rows(text: str) -> list[list[str]]:
    "Cells of the first Markdown table, escapes undone. Independent of how it was written."
    lines = [line for line in text.splitlines() if line.startswith("|")]
    split = [[c.strip() for c in re.split(r"(?<!\\)\|", line.strip("|"))] for line in lines]
    return [[re.sub(r"\\([\\|*<])", r"\1", c) for c in row] for row in (split[0], *split[2:])]


def latex_rows(text: str) -> list[list[str]]:
    "Cells of a booktabs table, escapes undone."
    body = re.search(r"\\toprule\n(.*)\\bottomrule", text, flags=re.DOTALL)[1].replace("\\midrule\n", "")
    rows = [re.split(r"(?<!\\)&", line.removesuffix(r"\\").strip()) for line in body.splitlines()]
    return [[re.sub(r"\\([&%_#$])", r"\1", c.strip()).replace("--", "–") for c in row] for row in rows]


# tables

def test_a_second_save_gives_the_same_bytes(table, tmp_path):
    "Catches times, random names or set order in any of the four files."
    files = save_table(table, tmp_path/"a", "A caption.", {"seed": 1, "inputs": {"x": "y"}})
    before = [f.read_bytes() for f in files]
    assert [f.read_bytes() for f in save_table(table.copy(), tmp_path/"a", "A caption.", {"inputs": {"x": "y"}, "seed": 1})] == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.csv", "a.md", "a.provenance.json", "a.tex"], "temporary files were left behind"
    assert not any(b"\r" in content for content in before)


def test_csv_has_the_columns_and_decimals(table, tmp_path):
    save_table(table, tmp_path/"t", "A caption.")
    lines = (tmp_path/"t.csv").read_text().splitlines()
    assert lines[0] == "detector,group,acc,acc_low,acc_high,auc,auc_low,auc_high,n_real,n_synthetic,note"
    assert re.fullmatch(r"SelfCon \(ours\),GAN(,0\.\d{4}){6},150,150,", lines[1])
    assert lines[-1].startswith("Corvi2022*,Mean,,,,,,,,,")
    back = read_table(tmp_path/"t")
    pd.testing.assert_frame_equal(back.head(10), table.head(10).round(4), check_dtype=False)
    assert back["acc"].tail(5).isna().all() and (back["note"].tail(5) == NOTE).all()


def test_markdown_and_latex_say_what_the_csv_says(table, tmp_path):
    "Catches a format that rounds, drops or reorders by itself."
    save_table(table, tmp_path/"t", "A caption.")
    csv = read_table(tmp_path/"t")
    markdown, latex = markdown_rows((tmp_path/"t.md").read_text()), latex_rows((tmp_path/"t.tex").read_text())
    assert markdown == latex
    assert markdown[0] == ["Detector", "Group", "ACC", "AUC", "Real", "Synthetic", "Note"]
    for row, shown in zip(csv.head(10).itertuples(), markdown[1:11], strict=True):
        assert shown[:2] == [row.detector, row.group] and shown[4:] == ["150", "150", ""]
        for cell, numbers in ((shown[2], (row.acc, row.acc_low, row.acc_high)), (shown[3], (row.auc, row.auc_low, row.auc_high))):
            np.testing.assert_allclose([float(x) for x in re.findall(r"[\d.]+", cell)], numbers, atol=5.01e-4)
    assert markdown[11:] == [["Corvi2022*", "all", "not run", "not run", "–", "–", NOTE]], "one row for a detector that was not run"


def test_a_single_row_that_was_not_run_keeps_its_group(tmp_path):
    frame = pd.DataFrame({"detector": "Wu2023", "group": ["GAN", "SD"], "acc": [0.5, None], "note": ["", "not run: no such images"]})
    save_table(frame, tmp_path/"t", "A caption.")
    assert markdown_rows((tmp_path/"t.md").read_text())[2] == ["Wu2023", "SD", "not run", "not run: no such images"]


def test_an_undefined_number_is_not_called_not_run(tmp_path):
    save_table(pd.DataFrame({"group": ["faces", "all"], "auc": [None, 0.5], "note": ["one class only", ""]}), tmp_path/"t", "A caption.")
    assert markdown_rows((tmp_path/"t.md").read_text())[1] == ["faces", "–", "one class only"]


def test_characters_of_latex_and_markdown_are_escaped(tmp_path):
    frame = pd.DataFrame({"group": ["DALL-E 3", "Corvi2022*", "a_b & 50 % | #1 $ {x} ~ ^ \\ <b>"], "acc": [0.1, 0.2, 0.3]})
    save_table(frame, tmp_path/"t_x", "Half, 50 %, of `a_b` & more.")
    tex, markdown = (tmp_path/"t_x.tex").read_text(), (tmp_path/"t_x.md").read_text()
    assert r"a\_b \& 50 \% | \#1 \$ \{x\} \textasciitilde{} \textasciicircum{} \textbackslash{} \textless{}b\textgreater{}" in tex
    assert r"\caption{Half, 50 \%, of a\_b \& more.}" in tex and r"\label{tab:t_x}" in tex
    assert not re.search(r"(?<!\\)%", tex), "an unescaped per cent sign comments out the rest of its line"
    assert tex.count(r"\begin{tabular}{lr}") == 1
    assert r"Corvi2022\*" in markdown and r"50 % \| #1" in markdown and r"\<b>" in markdown


def test_provenance_has_the_record_and_checksums(table, tmp_path):
    csv, md, tex, record = save_table(table, tmp_path/"t", "A caption.", {"seed": 7})
    content = json.loads(record.read_text())
    assert content["seed"] == 7 and content["caption"].startswith("A caption.")
    assert content["outputs"] == {f.name: file_sha256(f) for f in (csv, md, tex)}


def test_the_same_bytes_from_the_same_inputs_keep_their_record(table, tmp_path):
    "Another machine, other versions and a later commit leave the file alone; another input, setting or value does not."
    def saved(frame=table, **record) -> bytes: return save_table(frame, tmp_path/"t", "A caption.", record)[-1].read_bytes()
    first = saved(git_commit="a", versions={"torch": "1"}, threads=1, device="cpu", inputs={"x": "1"}, settings={"seed": 0})
    assert saved(git_commit="b", versions={"torch": "2"}, threads=8, device="cuda", inputs={"x": "1"}, settings={"seed": 0}) == first
    changed = [saved(inputs={"x": "2"}, settings={"seed": 0}), saved(inputs={"x": "2"}, settings={"seed": 1}),
               saved(table.head(1), inputs={"x": "2"}, settings={"seed": 1})]
    assert len({first, *changed}) == 4


def test_a_commit_of_reports_leaves_the_recorded_commit(tmp_path, monkeypatch):
    "Otherwise committing a report would make the report out of date."
    def git(*words):
        command = ["git", "-c", "user.name=n", "-c", "user.email=n@example.org", *words]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()
    def commit(name: str) -> str:
        (tmp_path/name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/name).write_text(f"lib_name = imaginet_nb\n{name}")
        git("add", "-A")
        git("commit", "-q", "-m", name)
        return git("rev-parse", "HEAD")
    git("init", "-q")
    commit("settings.ini")
    code = commit("profiles/demo.yaml")
    commit("reports/demo/README.md")
    monkeypatch.chdir(tmp_path)
    assert git_state() == {"git_commit": code, "git_dirty": False}
    (tmp_path/"profiles"/"demo.yaml").write_text("changed")
    assert git_state() == {"git_commit": code, "git_dirty": True}


def test_counts_stay_whole_and_group_na_stays_text(tmp_path):
    frame = pd.DataFrame({"group": ["NA", "None"], "n_real": [3, None], "acc": [-0.00001, 1]})
    save_table(frame, tmp_path/"t", "A caption.")
    assert (tmp_path/"t.csv").read_text() == "group,n_real,acc\nNA,3,0.0000\nNone,,1.0000\n"
    assert read_table(tmp_path/"t")["group"].tolist() == ["NA", "None"]


def test_long_tables_are_whole_in_the_csv_only(tmp_path):
    save_table(pd.DataFrame({"x": np.arange(30)/10}), tmp_path/"t", "A caption.", readable_rows=25)
    assert len(read_table(tmp_path/"t")) == 30 and len(markdown_rows((tmp_path/"t.md").read_text())) == 21
    assert "first 20 of 30 rows" in (tmp_path/"t.md").read_text()


def test_tables_that_hide_something_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no rows"): save_table(pd.DataFrame({"a": []}), tmp_path/"t", "")
    with pytest.raises(ValueError, match="repeated columns: a"): save_table(pd.DataFrame([[1, 2]], columns=["a", "a"]), tmp_path/"t", "")
    assert not list(tmp_path.iterdir())


# figures

def test_figures_are_the_same_bytes_and_hold_no_date(table, tmp_path):
    files = save_figure(plot_detection(table), tmp_path/"f", "A caption.", {"seed": 1})
    before = [f.read_bytes() for f in files]
    assert [f.read_bytes() for f in save_figure(plot_detection(table), tmp_path/"f", "A caption.", {"seed": 1})] == before
    assert [f.name for f in files] == ["f.png", "f.pdf", "f.provenance.json"]
    assert b"CreationDate" not in before[1] and b"Matplotlib" not in before[0]


def test_a_detector_that_was_not_run_is_named_in_the_figure(table):
    figure = plot_detection(table)
    assert figure.legends[0].get_title().get_text() == "not run: Corvi2022*"
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["chance", "SelfCon (ours)", "Cross-entropy (baseline)"]
    plot_detection(table.tail(5))        # a table without a single number is drawn all the same


def test_every_label_of_the_annotations_has_a_fixed_look():
    "Catches a family or content type that is renamed in one room only."
    assert list(STYLES["generator_family"]) == [*FAMILIES, "real"]
    assert list(STYLES["content_type"]) == list(CONTENT_TYPES)
    for looks in STYLES.values():
        assert len({c for c, _ in looks.values()}) == len({m for _, m in looks.values()}) == len(looks), "two labels look alike"


# appearance to readers without red or green cones: Machado, Oliveira and Fernandes (2009), Table 1; on linear RGB
DEUTERANOPIA = ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881))
PROTANOPIA = ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998))


def lab(colours, seen=np.eye(3)):
    linear = np.where((rgb := np.array([to_rgb(colour) for colour in colours])) <= 0.04045, rgb/12.92, ((rgb + 0.055)/1.055)**2.4)
    linear = (linear @ np.transpose(seen)).clip(0, 1)
    return rgb2lab(np.where(linear <= 0.0031308, 12.92*linear, 1.055*linear**(1/2.4) - 0.055))


def nearest(points):
    "Smallest CIEDE2000 difference; about 2 is just noticeable."
    return min(deltaE_ciede2000(a, b) for a, b in combinations(points, 2))


def test_colours_are_told_apart_within_a_legend_and_between_legends():
    "Catches a colour that stands for two things, such as a file format and a detector, and a legend that colour-blind readers cannot read."
    pairs = {label: colour for looks in STYLES.values() for label, (colour, _) in looks.items() if not label.startswith("except ")}
    assert nearest(lab([*pairs.values(), *(colour for colour, _ in SPARE)])) > 8
    for column, looks in (STYLES | {"other": dict(enumerate(SPARE))}).items():
        colours = [colour for label, (colour, _) in looks.items() if label != SAME_IMAGES] # a lighter shade of its detector's
        for seen, least in ((np.eye(3), 20), (DEUTERANOPIA, 8), (PROTANOPIA, 8)):
            assert nearest(lab(colours, seen)) > least, (column, least)


# ledger

def test_nothing_is_compared_outside_the_papers_profile(table, tmp_path):
    "Catches sandbox numbers beside the paper's, even when a table with numbers is there."
    save_table(table, tmp_path/"detection_by_family", "A caption.")
    lines = ledger(tmp_path, "demo")
    assert list(lines) == ["paper_item", "test_set", "group", "detector", "metric", "published", "reproduced", "difference", "status"]
    assert lines["reproduced"].isna().all() and lines["difference"].isna().all()
    assert set(lines["status"]) == {"not run (profile demo measures the embedded sandbox)"}


def test_every_number_of_the_papers_tables_is_in_the_ledger(tmp_path):
    "Counts come from the files of published numbers, not from the list of items."
    lines = ledger(tmp_path, "demo")
    counts = lines["paper_item"].value_counts()
    for item, stem in (("Table 2", "table2_dataset_structure"), ("Table 3", "table3_detection_by_family"), ("Table 4", "table4_practical"),
                       ("Table 5", "table5_corvi"), ("Table 6", "table6_inference_time"), ("Table 7", "table7_identification"),
                       ("By content type (repository)", "detection_by_content"), ("By generator (repository)", "detection_by_generator")):
        assert counts[item] == len(published(stem)), item
    assert not lines["published"].isna().any()
    superseded = set(published("superseded")["method"]) - set(published("table3_detection_by_family")["method"])
    assert superseded and not superseded & set(lines["detector"]), "numbers of an earlier system are no target"


def test_differences_appear_under_the_papers_profile(table, tmp_path):
    table.loc[0, ["acc", "acc_low", "acc_high"]] = [0.9400, 0.93, 0.95]      # SelfCon (ours), GAN; the paper says 0.9372
    table.loc[1, ["acc", "acc_low", "acc_high"]] = [0.9000, 0.89, 0.91]      # SelfCon (ours), SD; the paper says 0.9608
    save_table(table, tmp_path/"detection_by_family", "A caption.")
    lines = ledger(tmp_path, "paper").query("metric == 'acc' and paper_item != 'Table 7'").set_index(["paper_item", "detector", "group"])
    gan, sd = lines.loc[("Table 3", "SelfCon (ours)", "GAN")], lines.loc[("Table 3", "SelfCon (ours)", "SD")]
    assert (gan["published"], gan["reproduced"]) == (0.9372, 0.94) and gan["difference"] == pytest.approx(0.0028)
    assert "inside" in gan["status"] and "outside" in sd["status"] and sd["difference"] == pytest.approx(-0.0608)
    assert lines.loc[("Table 3", "Corvi2022*", "GAN")]["status"] == NOTE, "our baseline is not the authors' Corvi2022*"
    assert lines.loc[("Table 3", "Wu2023", "GAN")]["status"] == "not run: no such row in our table"
    assert "tables/corvi.csv is missing" in lines.loc[("Table 5", "SelfCon (ours)", "GLIDE")]["status"]


def test_identification_times_and_counts_find_their_partners(tmp_path):
    """Each with a trap: clean images must not stand in for perturbed ones, the pooled AUC is in the row Mean,
    a time is not a share, and the totals of the data set are written in another form than in the paper."""
    rows = [dict(detector="SelfCon (ours)", setting=s, group=g, acc=acc + shift, auc=auc + shift, note="")
            for s, shift in (("clean", 0.04), ("perturbed", 0)) for g, acc, auc in (("GAN", 0.9, np.nan), ("Mean", 0.8, 0.95))]
    save_table(pd.DataFrame(rows), tmp_path/"identification", "")
    times = pd.DataFrame({"detector": ["Grag2021", "SelfCon (ours)"], "median_ms": [20.0, 26.0], "note": "random weights"})
    save_table(times, tmp_path/"inference_time", "")
    save_table(pd.DataFrame(dict(content_type=["faces", "total"], share=[0.225, 1.0], origin="real", source=["FFHQ", "all"],
                                 images=[22500, 99999])), tmp_path/"dataset_structure", "")
    lines = ledger(tmp_path, "paper").set_index(["paper_item", "group", "detector", "metric"])
    assert lines.loc[("Table 7", "GAN", "SelfCon (ours)", "acc"), "reproduced"] == 0.9
    assert lines.loc[("Table 7", "all", "SelfCon (ours)", "auc"), "reproduced"] == 0.95
    assert lines.loc[("Table 6", "all", "SelfCon (ours)", "time_ms"), "difference"] == pytest.approx(0.9)
    assert lines.loc[("Table 6", "all", "Grag2021", "time_ms"), "status"] == "measured on another machine"
    counts = lines.loc["Table 2"].droplevel(["detector"])
    assert counts.loc[("faces/real/FFHQ", "images"), "status"] == "equal" and counts.loc[("total/real", "images"), "status"] == "different"
    assert counts.loc[("faces", "share_percent"), "reproduced"] == 22.5


def test_every_item_names_a_file_that_exists():
    for item in PAPER_ITEMS:
        for stem in item.published: assert len(published(stem)) > 0
        assert item.tables or item.figures or item.remark
    snakefile = (repo_root()/"Snakefile").read_text()
    for item in PAPER_ITEMS:
        for name in (item.notebook, *item.tables): assert name in snakefile, f"{item.item}: the Snakefile does not know {name}"


# pages

class Links(HTMLParser):
    "All addresses, anchors and tags of a page."
    def __init__(self):
        super().__init__(); self.addresses, self.ids, self.tags, self.stack = [], [], set(), []

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        if tag not in ("meta", "img", "br"): self.stack.append(tag)
        for name, value in attributes:
            if name in ("href", "src"): self.addresses.append(value)
            if name == "id": self.ids.append(value)

    def handle_endtag(self, tag): assert self.stack.pop() == tag, f"</{tag}> closes something else"


@pytest.fixture
def report(table, tmp_path) -> Path:
    save_table(table, tmp_path/"tables"/"detection_by_family", "Detection <by> family.", {"seed": 1})
    save_table(pd.DataFrame({"x": [1.0]}), tmp_path/"tables"/"score_calibration", "Another table.")
    save_figure(plot_detection(table), tmp_path/"figures"/"detection_by_family", "Dots.", {"seed": 1})
    return tmp_path


def test_links_of_the_page_lead_somewhere_and_not_outside(report):
    for item in PAPER_ITEMS:
        (report/"notebooks").mkdir(exist_ok=True); (report/"notebooks"/f"{item.notebook}.ipynb").touch()
    page, _ = report_index(report, load_profile("demo"))
    links = Links(); links.feed(page.read_text())
    assert not links.stack and "script" not in links.tags and "link" not in links.tags
    assert len(links.ids) == len(set(links.ids)) >= len(PAPER_ITEMS)
    assert {"figures/detection_by_family.png", "tables/detection_by_family.tex", "tables/score_calibration.csv"} <= set(links.addresses)
    for address in links.addresses:
        assert not re.match(r"[a-z]+:|//", address), f"the page needs {address}"
        assert address[1:] in links.ids if address.startswith("#") else (report/address).is_file(), f"{address} leads nowhere"
    assert "url(" not in page.read_text() and "@import" not in page.read_text()


def test_links_of_the_readme_lead_somewhere(report):
    _, readme = report_index(report, load_profile("demo"))
    text = readme.read_text()
    for address in re.findall(r"\]\(([^)]+)\)", text):
        if address.startswith("#"): assert f'<a id="{address[1:]}"></a>' in text
        elif address.startswith("../../"): assert address.startswith("../../nbs/pipelines/")
        elif address.startswith("../published/"): assert (repo_root()/"reports"/address[3:]).is_file()
        else: assert (report/address).is_file(), f"{address} leads nowhere"


def test_missing_results_stand_with_their_reason(report):
    for page in report_index(report, load_profile("demo")):
        text = page.read_text()
        for item in PAPER_ITEMS:
            assert f"{item.item}: {item.title}" in text
            for kind, stems, suffix in (("tables", item.tables, "csv"), ("figures", item.figures, "png")):
                for stem in stems:
                    gone = f"not run: {kind}/{stem}.{suffix} is missing; {item.notebook} writes it"
                    assert (gone in text) != (report/kind/f"{stem}.{suffix}").exists(), stem


def test_page_keeps_published_and_measured_apart_and_names_the_profile(report):
    page, readme = (p.read_text() for p in report_index(report, load_profile("demo")))
    for text in (page, readme): assert "profile demo" in text and "stand-ins" in text
    measured = re.sub(r"<details class=\"published\">.*?</details>", "", page, flags=re.DOTALL)
    assert "0.9589 / 0.9930" in page and "0.9589" not in measured, "a published number stands outside its block"
    assert "Detection &lt;by&gt; family." in page
    paper, _ = report_index(report, load_profile("paper"))
    assert "stand-ins" not in paper.read_text() and "measured on ImagiNet" in paper.read_text()


def test_pages_are_the_same_bytes_again(report):
    before = [p.read_bytes() for p in report_index(report, load_profile("demo"))]
    assert [p.read_bytes() for p in report_index(report, load_profile("demo"))] == before
