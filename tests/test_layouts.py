"""Layouts of public data sets: every one is read as its authors mean it, by one reader for `evaluate` and `audit`."""
import io
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from imaginet_nb.apps.cli import app
from imaginet_nb.apps.evaluate import judge
from imaginet_nb.apps.predict import SCORE_COLUMNS
from imaginet_nb.audit.files import PROPERTY_COLUMNS, read_properties
from imaginet_nb.audit.report import audit_source
from imaginet_nb.data.folders import RESULT_COLUMNS, read_custom_dataset
from imaginet_nb.data.images import decode
from imaginet_nb.data.labels import LABEL_RULE, AnnotationError
from imaginet_nb.data.parquet import picture_source
from imaginet_nb.detectors.predictions import PREDICTION_COLUMNS


def content(value: int, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((16, 16, 3), value, np.uint8)).save(buffer, form)
    return buffer.getvalue()


def put(path: Path, value: int = 99) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content(value, "PNG" if path.suffix == ".png" else "JPEG"))


def genimage(folder: Path) -> None:
    for place in (folder/maker/split for maker in ("Midjourney", "ADM") for split in ("train", "val")):
        for i in range(4):
            put(place/"ai"/f"{i}.png", 180)
            put(place/"nature"/f"{i}.JPEG", 90)


def forensynths(folder: Path) -> None:
    for place in (folder/maker/kind for maker in ("progan", "stylegan") for kind in ("cat", "car")):
        for i in range(3):
            put(place/"1_fake"/f"{i}.png")
            put(place/"0_real"/f"{i}.png")


def cifake(folder: Path) -> None:
    for place in (folder/split/label for split in ("train", "test") for label in ("FAKE", "REAL")):
        for i in range(4): put(place/f"{i}.jpg")


def raid(folder: Path) -> None:
    for place in ("real", "gen_0", "gen_1"):
        for i in range(4): put(folder/"val"/place/f"{i}.png")


def synthetic_generators(folder: Path) -> None:
    for place in ("real", "synthetic/Flux", "synthetic/SDXL v1.0"):
        for i in range(4): put(folder/place/f"{i}.png")


def lists(folder: Path) -> None:
    (folder/"annotations").mkdir(parents=True)
    for name, paths in dict(train="./imagenet/1.png,0,0,4,8\n./stylegan_xl/2.png,1,0,0,1\n", test="./ffhq/3.png,0,2,4,8\n").items():
        (folder/"annotations"/f"{name}_annotations.txt").write_text(paths)
    for name in ("imagenet/1.png", "stylegan_xl/2.png", "ffhq/3.png"): put(folder/name)


def openfake(folder: Path) -> None:
    folder.mkdir()
    rows = [dict(image=dict(bytes=content(100 + 60*(i % 2)), path=f"{i}.png"), label=("real", "fake")[i % 2],
                 model=("real", ("flux.1-dev", "gpt-image-1")[i//2 % 2])[i % 2], prompt="") for i in range(24)]
    pd.DataFrame(rows).to_parquet(folder/"test-00000-of-00001.parquet", row_group_size=7)


CASES = { # layout -> images by split, label and generator
    genimage: {("train", "real", "real"): 8, ("train", "synthetic", "ADM"): 4, ("train", "synthetic", "Midjourney"): 4,
               ("val", "real", "real"): 8, ("val", "synthetic", "ADM"): 4, ("val", "synthetic", "Midjourney"): 4},
    forensynths: {("test", "real", "real"): 12, ("test", "synthetic", "progan"): 6, ("test", "synthetic", "stylegan"): 6},
    cifake: {("test", "real", "real"): 4, ("test", "synthetic", "unknown"): 4,
             ("train", "real", "real"): 4, ("train", "synthetic", "unknown"): 4},
    raid: {("val", "real", "real"): 4, ("val", "synthetic", "gen_0"): 4, ("val", "synthetic", "gen_1"): 4},
    synthetic_generators: {("test", "real", "real"): 4, ("test", "synthetic", "Flux"): 4, ("test", "synthetic", "SDXL v1.0"): 4},
    lists: {("test", "real", "real"): 1, ("train", "real", "real"): 1, ("train", "synthetic", "StyleGAN-XL"): 1},
    openfake: {("test", "real", "real"): 12, ("test", "synthetic", "flux.1-dev"): 6, ("test", "synthetic", "gpt-image-1"): 6},
}


@pytest.mark.parametrize("write", CASES, ids=lambda write: write.__name__)
def test_layouts_are_read_alike_by_evaluate_and_audit(write, tmp_path):
    "A lost generator, train pictures as test pictures, a label the wrong way round; a second reader in one of the commands."
    folder = tmp_path/"set"
    write(folder)
    found, audited = read_custom_dataset(folder), audit_source(folder)
    assert found.manifest.groupby(["split", "origin", "generator"]).size().to_dict() == CASES[write]
    assert audited.manifest.equals(found.manifest) and audited.root == found.root == folder
    assert decode(picture_source(found.root, found.manifest["path"].iloc[-1])).shape == (16, 16, 3)
    assert audited.understood[1:] == found.understood[1:] and found.understood[0] == f"set: {len(found.manifest)} images"


def test_forensynths_names_the_content(tmp_path):
    forensynths(tmp_path)
    found = read_custom_dataset(tmp_path).manifest
    assert found.groupby(["content_type", "origin"]).size().to_dict() == {
        ("car", "real"): 6, ("car", "synthetic"): 6, ("cat", "real"): 6, ("cat", "synthetic"): 6}


@pytest.mark.parametrize("synthetic, real", [("artificial", "human"), ("ai", "nature"), ("ai-generated", "natural"), ("fake", "real"),
                                             ("synthetic", "authentic"), ("generated", "Real"), ("1_fake", "0_real"),
                                             ("AI Generated", "human")])
def test_label_words_of_folders(synthetic, real, tmp_path):
    put(tmp_path/synthetic/"1.png")
    put(tmp_path/real/"2.png")
    assert read_custom_dataset(tmp_path).manifest.set_index("path")["origin"].to_dict() == {
        f"{synthetic}/1.png": "synthetic", f"{real}/2.png": "real"}


def test_contradicting_words_follow_one_rule_and_are_a_warning(tmp_path):
    "The rule is in the help of both commands."
    for name in ("synthetic/nature/1.png", "real/ai/1.png"): put(tmp_path/"set"/name)
    found = read_custom_dataset(tmp_path/"set")
    assert dict(zip(found.manifest["path"], found.manifest["origin"], strict=True)) == {
        "real/ai/1.png": "real", "synthetic/nature/1.png": "synthetic"}
    assert "contradict each other: 2" in found.remarks[-1] and found.remarks[-1].endswith(LABEL_RULE)
    result = CliRunner().invoke(app, ["evaluate", "--root", str(tmp_path/"set"), "--detector", "none:None", "--out", str(tmp_path/"out")])
    assert "Warning: Paths with label words that contradict each other: 2" in result.output and result.exit_code == 1
    for command in ("evaluate", "audit"):
        told = " ".join(CliRunner().invoke(app, [command, "--help"]).output.split())
        assert LABEL_RULE in told, told


class Meter:
    name, input_size, tracks = "Meter", 16, ("detection",)
    def score(self, images): return (images.float().mean((1, 2, 3)) - 130)/10


@pytest.mark.parametrize("write, judged", [(genimage, 16), (openfake, 24)], ids=["genimage", "openfake"])
def test_what_is_judged_is_what_the_audit_opens(write, judged, tmp_path):
    "GenImage: the split val alone, and that is said. Parquet: the scores and the properties are those of the pictures inside."
    write(tmp_path/"set")
    dataset = read_custom_dataset(tmp_path/"set")
    found = judge(Meter(), dataset, resamples=20, num_workers=0)
    rows = found.predictions
    assert len(rows) == judged and rows["error"].isna().all()
    assert rows["logit"].gt(0).eq(rows["origin"].eq("synthetic")).all()
    left = [sentence for sentence in found.sentences if sentence.startswith("Not evaluated")]
    assert left == (["Not evaluated: 16 pictures of the split train; --split chooses another split."] if write is genimage else [])
    source = audit_source(tmp_path/"set")
    seen = read_properties(source.manifest, source.root, jobs=1).set_index("path").loc[rows["path"]]
    assert seen["error"].isna().all() and seen["origin"].tolist() == rows["origin"].tolist() and set(seen["width"]) == {16}


# --- tables -------------------------------------------------------------------------------------------------------------------------

def table(path: Path, frame: pd.DataFrame) -> Path:
    if path.suffix == ".parquet": frame.to_parquet(path)
    else: frame.to_csv(path, index=False, sep="\t" if path.suffix == ".tsv" else ",")
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet"])
@pytest.mark.parametrize("column", ["generator", "model", "source"])
def test_tables_name_the_generator_in_any_of_three_columns(suffix, column, tmp_path):
    frame = pd.DataFrame({"path": ["a, b.png", "c.png"], "label": [0, 1], column: ["", "Flux"], "prompt": ["", "a cat"]})
    found = read_custom_dataset(table(tmp_path/f"mine{suffix}", frame))
    assert found.manifest[["path", "origin", "generator"]].values.tolist() == [["a, b.png", "real", "real"], ["c.png", "synthetic", "Flux"]]
    told = [] if column == "generator" else [f"The column {column} names the generator."]
    assert list(found.columns) == [*told, "Columns that were not used: prompt."]
    assert audit_source(tmp_path/f"mine{suffix}").manifest.equals(found.manifest)


@pytest.mark.parametrize("columns, told", [
    ("generator model", ["The column generator names the generator.", "Columns that were not used: model."]),
    ("model source prompt", ["The column model names the generator.", "The column source says where an image is from.",
                             "Columns that were not used: prompt."]),
    ("generator source", ["The column generator names the generator.",
                          "The column source says where an image is from."]),
    ("generator image_source", ["The column image_source says where an image is from."])])
def test_which_of_several_columns_were_used_is_said(columns, told, tmp_path):
    "A column `model` beside `generator` was ignored without a word."
    frame = pd.DataFrame({"path": ["a.png", "b.png"], "label": [0, 1]})
    frame = frame.assign(**{column: ["", f"the {column}"] for column in columns.split()})
    found = read_custom_dataset(table(tmp_path/"mine.csv", frame))
    assert found.manifest["generator"].tolist() == ["real", f"the {columns.split()[0]}"]
    assert list(found.columns) == told
    assert audit_source(tmp_path/"mine.csv").understood[1:] == found.understood[1:]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet"])
def test_columns_of_a_list_that_results_have_too_are_retained_under_another_name(suffix, tmp_path):
    "They were replaced by the results, or ended the second run of `evaluate`, or were not read from Parquet."
    own = {name: [f"{name} 0", f"{name} 1"] for name in (*RESULT_COLUMNS, "prompt")}
    frame = pd.DataFrame({"path": ["a.png", "b.png"], "label": ["real", "fake"], **own})
    found = read_custom_dataset(table(tmp_path/f"mine{suffix}", frame))
    kept = {name: found.manifest[f"list_{name}"].tolist() for name in RESULT_COLUMNS}
    assert kept | {"prompt": found.manifest["prompt"].tolist()} == own and not {*RESULT_COLUMNS} & {*found.manifest}
    assert found.columns[-1].endswith(f"retained under another: {', '.join(f'{name} is list_{name}' for name in RESULT_COLUMNS)}.")
    frame.assign(list_note="").to_csv(tmp_path/"both.csv", index=False)
    with pytest.raises(AnnotationError, match="both.csv: the column note would be called list_note, but there is one"):
        read_custom_dataset(tmp_path/"both.csv")


def test_the_names_that_lists_give_up_are_those_of_all_results():
    "Catches a new column of a command that would replace one of the list."
    assert {*RESULT_COLUMNS, "path"} == {*PREDICTION_COLUMNS, *PROPERTY_COLUMNS, *SCORE_COLUMNS}


@pytest.mark.parametrize("names, origin", [(["FAKE", "REAL"], "synthetic"), (["real", "fake"], "real"), (None, "real")])
def test_class_numbers_of_parquet_mean_what_the_file_says(names, origin, tmp_path):
    "Number 0 is FAKE in CIFAKE on the hub; without names 0 is real."
    stored = pa.table({"image": [content(1), content(2)], "label": [0, 1]})
    if names:
        info = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        stored = stored.replace_schema_metadata({"huggingface": json.dumps(info)})
    pq.write_table(stored, tmp_path/"a.parquet")
    assert read_custom_dataset(tmp_path/"a.parquet").manifest["origin"][0] == origin


def test_parts_have_the_split_of_their_name_or_folder(tmp_path):
    frame = pd.DataFrame({"image": [content(1), content(2)], "label": ["human", "ai"]})
    for name in ("data/train-00000-of-00002.parquet", "data/validation-00000-of-00001.parquet", "test/0.parquet"):
        (tmp_path/name).parent.mkdir(exist_ok=True)
        frame.to_parquet(tmp_path/name)
    found = read_custom_dataset(tmp_path).manifest
    assert dict(zip(found["path"].str.partition(".parquet")[0], found["split"], strict=True)) == {
        "data/train-00000-of-00002": "train", "data/validation-00000-of-00001": "val", "test/0": "test"}


@pytest.mark.parametrize("read", [read_custom_dataset, audit_source])
def test_pictures_beside_the_parts_of_a_hub_data_set_are_left_out(read, tmp_path):
    "It was refused, with `teaser.png: real or synthetic?`; beside labelled pictures the parts were left out."
    frame = pd.DataFrame({"image": [content(1), content(2)], "label": ["human", "ai"]})
    (tmp_path/"data").mkdir()
    frame.to_parquet(tmp_path/"data/train-00000-of-00001.parquet")
    for name in ("teaser.png", "assets/x.png"): put(tmp_path/name)
    (tmp_path/"README.md").write_text("about")
    found = read(tmp_path)
    assert found.manifest["path"].tolist() == [f"data/train-00000-of-00001.parquet/0/{k}" for k in range(2)]
    assert found.left_out == 3 and found.understood[-2:] == [
        "Files left out, because by name and content they are not images: 1. The first: `README.md`.",
        "Files left out, because they have no label, and the Parquet files hold labelled images: 2. The first: "
        "`assets/x.png`."]
    put(tmp_path/"extra/fake/Flux/1.png")
    both = (r"the labelled images \(1, the first extra/fake/Flux/1.png\) or the Parquet files \(1, the first "
            r"data/train-00000-of-00001.parquet\)\? name a folder or a Parquet file")
    with pytest.raises(AnnotationError, match=both): read(tmp_path)
    assert len(read(tmp_path/"data").manifest) == 2


@pytest.mark.parametrize("read", [read_custom_dataset, audit_source])
def test_only_parquet_files_with_pictures_take_precedence_over_unlabelled_pictures(read, tmp_path):
    "A table of scores beside labelled pictures is no data set; Git LFS pointers in place of the parts are the error."
    for name in ("real/1.png", "fake/Flux/2.png"): put(tmp_path/"set"/name)
    pd.DataFrame({"path": ["real/1.png"], "logit": [0.5]}).to_parquet(tmp_path/"set/preds.parquet")
    found = read(tmp_path/"set")
    assert found.manifest["path"].tolist() == ["fake/Flux/2.png", "real/1.png"] and found.left_out == 1
    put(tmp_path/"hub/teaser.png")
    (tmp_path/"hub/test.parquet").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(AnnotationError, match="test.parquet: not a readable Parquet file .* fetch or write it again"):
        read(tmp_path/"hub")


def test_a_picture_inside_that_is_none_and_a_file_that_is_none(tmp_path):
    frame = pd.DataFrame({"image": [content(1), b"no picture", None], "label": ["real", "fake", "fake"]})
    frame.to_parquet(tmp_path/"a.parquet")
    found = read_custom_dataset(tmp_path/"a.parquet")
    errors = read_properties(found.manifest, found.root, jobs=1)["error"]
    assert pd.isna(errors[0]) and "not an image" in errors[1] and errors[2] == "empty file"
    (tmp_path/"b.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(AnnotationError, match=r"b.parquet: not a readable Parquet file .* fetch or write it again"):
        read_custom_dataset(tmp_path/"b.parquet")
    frame.rename(columns={"label": "verdict"}).to_parquet(tmp_path/"c.parquet")
    with pytest.raises(AnnotationError, match="the columns path and label are needed; it has path"):
        read_custom_dataset(tmp_path/"c.parquet")
    frame.assign(label=["real", "fake", "perhaps"]).to_parquet(tmp_path/"d.parquet")
    with pytest.raises(AnnotationError, match="d.parquet, row 2: unknown label 'perhaps'"): read_custom_dataset(tmp_path/"d.parquet")


@pytest.mark.parametrize("kind", [pa.binary(), pa.null()])
def test_a_parquet_file_of_paths_alone_is_refused(kind, tmp_path):
    "Every row was an `empty file`, with no word about the pictures."
    stored = pa.struct({"bytes": kind, "path": pa.string()})
    records = pa.array([dict(bytes=None, path="1.png")]*2, stored)
    pq.write_table(pa.table({"image": records, "label": ["real", "fake"]}), tmp_path/"a.parquet")
    with pytest.raises(AnnotationError, match="a.parquet: the column image holds paths alone, no pictures"):
        read_custom_dataset(tmp_path/"a.parquet")


def test_the_column_of_the_pictures_is_not_another_one(tmp_path):
    "A mask or a hash before the image was scored in its place, and the sentence named the wrong columns."
    rows = [dict(mask=dict(bytes=content(255), path="m.png"), md5=b"\1\2", image=dict(bytes=content(10*k), path=f"{k}.png"),
                 label=("real", "fake")[k]) for k in range(2)]
    pd.DataFrame(rows).to_parquet(tmp_path/"a.parquet")
    found = read_custom_dataset(tmp_path/"a.parquet")
    assert [decode(picture_source(found.root, path)).max() for path in found.manifest["path"]] == [0, 10]
    assert found.columns == ["Columns that were not used: mask, md5."]
    pd.DataFrame(rows).rename(columns={"image": "scan"}).drop(columns="md5").to_parquet(tmp_path/"b.parquet")
    with pytest.raises(AnnotationError, match=r"b.parquet: which column holds the pictures, mask or scan\? Call one of them image"):
        read_custom_dataset(tmp_path/"b.parquet")
    pd.DataFrame(rows).rename(columns={"image": "scan"})[["scan", "label"]].to_parquet(tmp_path/"c.parquet")
    assert read_custom_dataset(tmp_path/"c.parquet").columns == []                 # chosen, so it was used


def test_a_damaged_page_costs_its_rows_and_not_the_others(tmp_path):
    "An evaluation or audit that ends, an error that names no file, `empty file` for rows that are damaged."
    draw = np.random.default_rng(0)
    def noise(dark: int) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(draw.integers(dark, dark + 100, (40, 40, 3), np.uint8)).save(buffer, "PNG")
        return buffer.getvalue()
    stored = pa.table({"image": [noise(100*(k % 2)) for k in range(40)], "label": [k % 2 for k in range(40)]})
    for name in ("a", "b"):
        pq.write_table(stored, tmp_path/f"{name}.parquet", use_dictionary=False, write_batch_size=1, data_page_size=1)
    place = pq.ParquetFile(tmp_path/"b.parquet").metadata.row_group(0).column(0).data_page_offset
    with open(tmp_path/"b.parquet", "r+b") as file:
        file.seek(place)
        file.write(b"\xff"*20)                                                     # the header of the first page
    found = read_custom_dataset(tmp_path)
    predictions = judge(Light(), found, resamples=20, num_workers=0).predictions
    for _ in range(2): # the second time in the same process
        errors = read_properties(found.manifest, found.root, jobs=1)["error"]
        assert errors[:40].isna().all() and errors[40:].str.contains(r"b.parquet/0/\d+: the Parquet file is damaged", regex=True).all()
    assert predictions["error"].notna().sum() == 40 and predictions["error"][79] == errors[79]


class Light:
    name, input_size, tracks = "light", 32, ("detection",)
    def score(self, images): return (images.float().mean((1, 2, 3)) - 100)/10


def test_a_parquet_file_in_capitals_is_read(tmp_path):
    pd.DataFrame({"image": [content(1), content(2)], "label": ["real", "fake"]}).to_parquet(tmp_path/"DATA.PARQUET")
    found = read_custom_dataset(tmp_path/"DATA.PARQUET")
    assert [decode(picture_source(found.root, path)).max() for path in found.manifest["path"]] == [1, 2]


@pytest.mark.parametrize("name", ["LIST.CSV", "LIST.TSV", "SET"])
def test_names_in_capitals_are_read(tmp_path, name):
    "A list or a folder from a camera or from Windows."
    for path in ("SET/REAL/1.JPG", "SET/FAKE/FLUX/2.JPG"): put(tmp_path/path)
    comma = "\t" if name.endswith("TSV") else ","
    (tmp_path/"LIST.CSV").with_name(name if "." in name else "x").write_text("\n".join(comma.join(cells) for cells in (
        ("path", "label", "generator"), ("SET/REAL/1.JPG", "REAL", ""), ("SET/FAKE/FLUX/2.JPG", "FAKE", "FLUX"))))
    for found in (read_custom_dataset(tmp_path/name), audit_source(tmp_path/name)):
        assert sorted(zip(found.manifest["origin"], found.manifest["generator"])) == [("real", "real"), ("synthetic", "FLUX")]
        assert decode(picture_source(found.root, found.manifest["path"][0])).shape[2] == 3


@pytest.mark.parametrize("read", [read_custom_dataset, audit_source])
@pytest.mark.parametrize("name, text, message", [
    ("twice.CSV", "path,label,label\na.png,real,fake\n", "twice.CSV, line 1: a column name occurs twice in .*; rename one"),
    ("caps.csv", "Path,Label\na.png,real\n", "it has Path, Label; rename 'Path' to path; rename 'Label' to label"),
    ("both.csv", "path,label,origin\na.png,real,real\nb.png,fake,real\n", "line 3: label and origin contradict each other, path 'b.png'"),
    ("list.XLSX", "PK", "list.XLSX: a list ends in .csv, .tsv or .parquet")])
def test_a_table_that_can_be_read_in_two_ways_is_refused(tmp_path, read, name, text, message):
    (tmp_path/name).write_text(text)
    with pytest.raises(AnnotationError, match=message): read(tmp_path/name)


def test_parts_of_which_only_some_have_a_column(tmp_path):
    frame = pd.DataFrame({"image": [content(1), content(2)], "label": ["real", "fake"], "model": ["", "Flux"]})
    frame.assign(source=["flickr", "laion"]).to_parquet(tmp_path/"a.parquet")
    frame.to_parquet(tmp_path/"b.parquet")
    assert read_custom_dataset(tmp_path).manifest["image_source"].tolist() == ["flickr", "laion", "", ""]


def test_pictures_inside_need_little_memory(tmp_path):
    "Several row groups, read from the first row to the last: never more than a small part of the file."
    draw = np.random.default_rng(0)
    stored = pa.table({"image": [draw.bytes(10_000) for _ in range(900)], "label": [k % 2 for k in range(900)]})
    pq.write_table(stored, tmp_path/"a.parquet", row_group_size=300, compression="none", use_dictionary=False, write_batch_size=10,
                   data_page_size=50_000)
    first = stored["image"][305].as_py()
    del stored
    before, most = pa.total_allocated_bytes(), []
    found = read_custom_dataset(tmp_path/"a.parquet")
    for path in found.manifest["path"]:
        content = picture_source(tmp_path, path)
        most.append(pa.total_allocated_bytes() - before)
        if path == "a.parquet/1/5": assert content == first
    assert len(most) == 900 and max(most) < (tmp_path/"a.parquet").stat().st_size/4
