"""`imaginet predict`, `evaluate` and `audit` on bad lists, odd folders and detectors that fail: one message, no lost row."""
import csv
import importlib
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import Result
from typer.testing import CliRunner

from imaginet_nb.apps.cli import app
from imaginet_nb.apps.predict import read_list
from imaginet_nb.core import only_run, text_path, write_csv
from imaginet_nb.data.folders import read_labelled_folder
from imaginet_nb.data.images import save
from imaginet_nb.data.labels import AnnotationError
from imaginet_nb.data.manifest import image_file, read_manifest_csv, read_table, table_rows
from imaginet_nb.data.splits import read_annotations
from imaginet_nb.detectors.predictions import predict

DETECTORS = """
class Meter:
    name, input_size, tracks = "Brightness meter", 32, ("detection",)
    def score(self, images): return (images.float().mean((1, 2, 3)) - 100)/10

class Picky(Meter):
    def score(self, images):
        if (images.float().mean((1, 2, 3)) > 250).any(): raise KeyError("too bright")
        return super().score(images)

class Odd(Meter):
    def score(self, images):
        scores = super().score(images)
        if scores.max() < 12: return scores
        raise {255: SystemExit(3), 254: ValueError("half \\ud800\\n")}[int(images.max())] if images.max() > 253 else Mute()

class Mute(Exception):
    def __str__(self): raise TypeError("no words")

class Whole(Meter):
    def score(self, images):
        scores = super().score(images)
        return scores.long() if scores.max() > 12 else scores

class Never(Meter):
    def score(self, images):
        if images.float().std() < 60: raise RuntimeError("no memory") # not on the noise that a detector is tried on
        return super().score(images)
"""


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    "Twelve labelled pictures, a list of them, detectors."
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "lists_detectors", raising=False)
    (tmp_path/"lists_detectors.py").write_text(DETECTORS)
    draw = np.random.default_rng(0)
    for k in range(12):
        bright = 90 + 20*(k % 2)
        picture = (bright + draw.normal(0, 9, (40, 48, 3))).clip(0, 255).astype(np.uint8)
        save(picture, tmp_path/"set"/("fake/Flux" if k % 2 else "real")/f"{k}.png")
    rows = [(f"fake/Flux/{k}.png" if k % 2 else f"real/{k}.png", ["real", "synthetic"][k % 2]) for k in range(12)]
    pd.DataFrame(rows, columns=["path", "label"]).to_csv(tmp_path/"list.csv", index=False)
    return tmp_path


def run(*words, code: int | None = None) -> Result:
    result = CliRunner().invoke(app, [*map(str, words)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    assert code is None or result.exit_code == code, result.output
    return result


def score(detector: str = "Meter") -> pd.DataFrame:
    "Predictions for the list, as `evaluate` and the pipeline make them."
    meter = getattr(importlib.import_module("lists_detectors"), detector)()
    return predict(meter, read_table("list.csv")[0], "set", num_workers=0)


def judge(*words, detector: str = "Meter", code: int | None = 0) -> Result:
    return run("predict", "list.csv", "--root", "set", "--detector", f"lists_detectors:{detector}", "--no-views", *words, code=code)


# --- detectors that fail ------------------------------------------------------------------------------------------------------------

def test_a_detector_that_fails_on_one_picture_costs_one_row(here):
    "Its batch is asked again one by one: the other rows have the very scores they would have had."
    whole = score().set_index("path")
    save(np.full((40, 48, 3), 255, np.uint8), here/"set/real/4.png")
    rows = score("Picky").set_index("path")
    assert rows["error"].dropna().to_dict() == {"real/4.png": "Brightness meter: KeyError: 'too bright'"}
    kept = rows.index != "real/4.png"
    assert rows.loc[kept, "logit"].tolist() == pytest.approx(whole.loc[kept, "logit"].tolist(), rel=1e-6)


def test_whatever_a_detector_raises_or_gives_is_a_row_with_the_error(here):
    "It ends the program, says what no file can hold, or cannot say anything; gives whole numbers, which would round scores of a batch."
    for k, value in enumerate((255, 254, 253)): save(np.full((40, 48, 3), value, np.uint8), here/f"set/real/{2*k}.png")
    errors = score("Odd").set_index("path")["error"].dropna()
    assert list(errors) == [f"Brightness meter: {said}" for said in ("SystemExit: 3", r"ValueError: half \ud800\n", "Mute: Mute")]
    run("predict", "set", "--detector", "lists_detectors:Odd", "--no-views", "--out", "all.csv", code=0)
    assert pd.read_csv("all.csv").set_index("path")["error"].dropna().to_dict() == {
        "set/real/0.png": "Brightness meter: 3", "set/real/2.png": r"Brightness meter: half \ud800\n",
        "set/real/4.png": "Brightness meter: Mute"}
    rows = score("Whole")
    assert rows["error"].str.contains("score gave torch.int64, floats are needed").sum() == 3
    assert (rows["logit"].dropna() % 1 != 0).all()


def test_a_detector_that_fails_on_every_picture_is_one_message(here):
    assert "none of 12 files could be scored; see the column error of preds.csv" in judge(detector="Never", code=1).output
    assert pd.read_csv("preds.csv")["error"].str.contains("no memory").sum() == 12
    result = run("evaluate", "--root", "set", "--detector", "lists_detectors:Never", "--out", "out", "--workers", 0, code=1)
    assert "failed on all 12 images" in result.output and "RuntimeError: no memory" in result.output
    assert not (here/"out").exists()


def test_rows_of_two_detectors_or_of_a_changed_one_are_not_mixed(here):
    judge()
    before = (here/"preds.csv").read_bytes()
    assert "(detector changed)" in judge("--resume", detector="Picky", code=1).output
    (here/"lists_detectors.py").write_text(DETECTORS + "# another version\n")
    assert "(detector changed)" in judge("--resume", code=1).output
    assert (here/"preds.csv").read_bytes() == before
    (here/"lists_detectors.py").write_text(DETECTORS)
    assert "; 12 rows kept" in judge("--resume").output


def test_a_second_run_for_one_table_is_refused_before_it_begins(here):
    with only_run("preds.csv"): assert "another run is writing to" in judge(detector="NoSuch", code=1).output
    assert not list(here.glob("*preds*"))


# --- lists --------------------------------------------------------------------------------------------------------------------------

BAD = {b"path,path\na.png,b.png\n": "line 1: a column name occurs twice",
       b"path,label\nreal/0.png,real\n\xff.png,real\n": "line 3: byte 0xff",
       b"path,label\nreal/0.png,real\n" + 200_000*b"a" + b",real\n": "line 3: a cell of more than 131,072 characters",
       b"path,label\nreal/0.png\n": "line 2: 1 fields instead of 2"}


@pytest.mark.parametrize("content, message", BAD.items(), ids=("doubled column", "not UTF-8", "long cell", "missing cell"))
def test_a_bad_list_is_one_message_with_file_and_line_in_every_command(content, message, here):
    (here/"list.csv").write_bytes(content)
    evaluated = run("evaluate", "--manifest", "list.csv", "--root", "set", "--detector", "lists_detectors:Meter", "--out", "out", code=1)
    for result in (judge(code=1), run("audit", "list.csv", "--out", "out", code=1), evaluated):
        assert f"list.csv, {message}" in result.output and len(result.output) < 500, result.output
    assert not (here/"preds.csv").exists() and not (here/"out").exists()


ODD = (b"\r", b"\0", b'"', b"\n", b",", b"\\", "\u2028".encode(), "\x85".encode())


def damaged(content: bytes, draw: np.random.Generator) -> bytes:
    "Bytes flipped, cut out, doubled, a long cell, a carriage return, a quotation mark."
    made = bytearray(content)
    for _ in range(draw.integers(1, 4)):
        at = int(draw.integers(len(made)))
        kind = draw.integers(6)
        if kind == 0: made[at] ^= 1 << int(draw.integers(8))
        elif kind == 1: del made[at:at + int(draw.integers(1, 20))]
        elif kind == 2: made[at:at] = made[max(at - 30, 0):at]
        elif kind == 3: made[at:at] = bytes([draw.integers(256)])*int(draw.choice([1, 300, 140_000]))
        elif kind == 4: made[at:at] = ODD[draw.integers(len(ODD))]
        else: made[:0] = made[:at + 1]
    return bytes(made)


def test_damaged_lists_give_rows_or_one_kind_of_error_with_the_file(here):
    "400 lists, seed 0: each is read, or refused by an `AnnotationError` that names it."
    draw, listed, outcomes = np.random.default_rng(0), here/"x.csv", []
    whole = "path,origin,note\n" + "".join(f'real/{k}.png,real,"a, ""b""\nc{k}"\n' for k in range(5))
    codes = "".join(f"./f/{k}.png,0,0,4,8\n" for k in range(5))
    readers = (lambda: list(table_rows(listed)), lambda: read_manifest_csv(listed, external=True),
               lambda: read_annotations(listed, "test"))
    for k in range(400):
        listed.write_bytes(damaged((codes if k % 3 == 2 else whole).encode(), draw))
        try: outcomes.append(len(readers[k % 3]()))
        except AnnotationError as error:
            outcomes.append(-1)
            assert str(error).startswith(str(listed)) and len(str(error)) < 2000
    assert 40 < outcomes.count(-1) < 390, "nearly all, or nearly none, were refused"


# --- folders ------------------------------------------------------------------------------------------------------------------------

def test_every_file_of_a_folder_has_a_row_or_a_reason(here, without_classifier):
    "A picture without suffix, .jfif, a link to a folder, a README, a list, a figure of an earlier report, in evaluate and in audit."
    folder = here/"set"
    (folder/"real/0.png").rename(folder/"real/zero")
    (folder/"real/2.png").rename(folder/"real/two.jfif")
    (here/"more").mkdir()
    (folder/"fake/linked").symlink_to(here/"more")
    (folder/"README.md").write_text("about")
    for command in (("evaluate", "--root", "set", "--detector", "lists_detectors:Meter", "--workers", 0), ("audit", "set")):
        for _ in range(2): # the second time, the report of the first lies in the folder
            result = run(*command, "--out", "set/report", code=0)
            page = (folder/"report/index.html").read_text()
            for words in ("by name and content they are not images: ", "each is a link to a folder: 1. The first: fake/linked"):
                assert words in result.output and words in page.replace("<code>", "").replace("</code>", ""), result.output
            table = pd.read_csv(folder/"report"/("predictions.csv" if command[0] == "evaluate" else "properties.csv"))
            assert len(table) == 12 and table["error"].isna().all() and {"real/zero", "real/two.jfif"} < set(table["path"])
        assert "because they belong to a report" in result.output


@pytest.mark.parametrize("command", ["evaluate", "audit"])
def test_label_words_are_one_rule_in_both_commands(here, command, without_figures):
    right = {"synthetic/nature/1.png": "synthetic", "real/ai/2.png": "real", "human/3.png": "real", "artificial/4.png": "synthetic",
             "AI_generated/x/5.png": "synthetic"}
    for name in right: save(np.full((40, 48, 3), 99, np.uint8), here/"set"/name)
    words = ("--detector", "lists_detectors:Meter", "--workers", 0) if command == "evaluate" else ()
    result = run(command, *(("--root",) if command == "evaluate" else ()), "set", *words, "--out", "out", code=0)
    table = pd.read_csv(here/"out"/("predictions.csv" if command == "evaluate" else "properties.csv")).set_index("path")
    assert table["origin"].loc[list(right)].to_dict() == right
    assert result.output.index("set: 17 images") < result.output.index("\n- ") # before the findings
    assert "contradict each other: 2. The first: real/ai/2.png" in result.output


def test_what_is_missing_for_an_evaluation_is_said(here):
    words = ("evaluate", "--root", "set", "--detector", "lists_detectors:Meter", "--workers", 0, "--out", "out")
    for k in range(1, 12, 2): (here/"set/fake/Flux"/f"{k}.png").write_bytes(b"no picture")
    assert "none of 6 synthetic pictures could be scored" in run(*words, code=1).output
    for k in range(1, 12, 2): (here/"set/fake/Flux"/f"{k}.png").unlink()
    assert "6 pictures to judge, real only" in run(*words, code=1).output
    for k in range(2, 12, 2): (here/"set/real"/f"{k}.png").unlink()
    assert "1 pictures to judge, real only" in run(*words, code=1).output
    save(np.full((40, 48, 3), 99, np.uint8), here/"set/fake/Flux/1.png")
    assert run(*words).exit_code == 0, "one real and one synthetic picture"
    for path in ("real/0.png", "fake/Flux/1.png"): save(np.full((40, 48, 3), 99, np.uint8), here/"set/train"/path)
    assert "Not evaluated: 2 pictures of the split train" in run(*words, code=0).output


NAMES = ["a\rb.png", "a\nb.png", "a\x85b.png", "a\u2028b.png", "a\x0bb.png", 'a"b,c.png', os.fsdecode(b"a\xff.png"),
         r"a\xff.png", "=1+1.png", "a`b.png"]


@pytest.mark.parametrize("command", ["evaluate", "audit"])
def test_any_name_is_one_row_that_leads_back_to_its_file(here, command):
    for name in NAMES:
        for place in ("real", "fake/a\rgenerator"): save(np.full((40, 48, 3), 99, np.uint8), here/"set"/place/"x.png")
        (here/"set/real/x.png").rename(here/"set/real"/name)
        (here/"set/fake/a\rgenerator/x.png").rename(here/"set/fake/a\rgenerator"/name)
    words = ("--detector", "lists_detectors:Meter", "--workers", 0) if command == "evaluate" else ()
    run(command, *(("--root",) if command == "evaluate" else ()), "set", *words, "--out", "out", code=0)
    path = here/"out"/("predictions.csv" if command == "evaluate" else "properties.csv")
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    with open(path, newline="", encoding="utf-8") as file: rows = list(csv.DictReader(file))
    assert table["path"].tolist() == [row["path"] for row in rows] and len(rows) == 12 + 2*len(NAMES) and table["error"].eq("").all()
    assert {image_file("set", path) for path in table["path"]} == {p for p in Path("set").rglob("*") if p.is_file()}
    assert len({text_path(p) for p in table["path"]}) == len(table)


def test_cells_with_line_breaks_are_joined_to_the_rows_of_predict(here):
    notes = ["a\rb", "c\nd", 'e"f', "g\u2028h", "i\x85j", "=k", "l", "m", "n", "o", "p", "q"]
    frame = pd.read_csv("list.csv").assign(note=notes)
    with open("list.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows([frame.columns.tolist(), *frame.values.tolist()])
    judge()
    write_csv(pd.read_csv("preds.csv")[["path", "logit"]].merge(read_list("list.csv", "set"), on="path"), "joined.csv")
    assert pd.read_csv("joined.csv")["note"].tolist() == notes
    with open("joined.csv", newline="", encoding="utf-8") as file: assert [row["note"] for row in csv.DictReader(file)] == notes


def test_a_name_too_long_for_the_system_is_a_row_with_its_error(here, without_figures):
    with open("list.csv", "a") as file: file.write(f"real/{'x'*300}.png,real\n")
    assert "File name too long" in score()["error"].iloc[12]
    judge()
    assert "File name too long" in pd.read_csv("preds.csv")["error"].iloc[12]
    frame = pd.read_csv("list.csv").rename(columns={"label": "origin"})
    frame.to_csv("list.csv", index=False)
    run("audit", "list.csv", "--root", "set", "--out", "out", code=0)
    assert pd.read_csv("out/properties.csv")["error"].fillna("").str.contains("File name too long").sum() == 1
    (here/"list.csv").rename(here/"set/list.csv")
    run("audit", "set/list.csv", "--out", "out", code=0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs another user")
def test_folders_that_may_be_listed_but_not_entered_and_closed_ones(here):
    "As a user without rights: pictures that cannot be reached have rows, a folder that cannot be listed is counted."
    for name in ("real/listed/l.png", "fake/closed/c.png"): save(np.full((40, 48, 3), 99, np.uint8), here/"set"/name)
    for place in (here, *here.parents):
        if place.is_relative_to(tempfile.gettempdir()) and place != Path(tempfile.gettempdir()): os.chmod(place, 0o755)
    os.chmod(here/"set/real/listed", 0o444)
    os.chmod(here/"set/fake/closed", 0o000)
    (here/"out").mkdir()
    os.chmod(here/"out", 0o777)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            if os.getuid() == 0: os.setuid(65534)
            meter = importlib.import_module("lists_detectors").Meter()
            found = read_labelled_folder("set")
            rows = predict(meter, found.manifest, "set", num_workers=0).set_index("path")
            assert len(rows) == 13 and rows["error"].dropna().index.tolist() == ["real/listed/l.png"], rows["error"]
            assert "Permission denied" in rows["error"]["real/listed/l.png"]
            (reason, paths), = found.left_out.items()
            assert reason.endswith("a folder that cannot be opened: Permission denied") and paths == ["fake/closed"]
            status = 0
        except BaseException as error: (here/"out/error").write_text(repr(error))
        finally: os._exit(status)
    _, status = os.waitpid(child, 0)
    for place in ("real/listed", "fake/closed"): os.chmod(here/"set"/place, 0o755)
    assert status == 0, (here/"out/error").read_text() if (here/"out/error").exists() else status
