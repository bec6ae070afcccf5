"""The audit: given figures on the authors' lists, hostile files, duplicates against a plain loop, rows beside detectors.

The first part needs the authors' lists (folder `shared/annotations` beside the checkout, or `IMAGINET_ANNOTATIONS`)."""
import os
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image, PngImagePlugin
from sklearn.metrics import balanced_accuracy_score, roc_auc_score
from sklearn.tree import DecisionTreeClassifier

from imaginet_nb.audit import duplicates as copies
from imaginet_nb.audit import files as au
from imaginet_nb.audit import report as audit_page
from imaginet_nb.audit import shortcuts
from imaginet_nb.core import repo_root
from imaginet_nb.data.labels import FAMILIES, AnnotationError
from imaginet_nb.data.splits import read_annotations, write_annotations
from imaginet_nb.evaluation.calibration import calibrated
from imaginet_nb.evaluation.detection import GROUPINGS, detection_table, metadata_rows
from imaginet_nb.evaluation.identification import identification_table, metadata_identification_rows
from imaginet_nb.evaluation.protocols import format_matched_rows, format_matched_table

LISTS = Path(os.environ.get("IMAGINET_ANNOTATIONS") or repo_root().parent/"shared"/"annotations")
needs_lists = pytest.mark.skipif(not (LISTS/"test_annotations.txt").is_file(),
    reason=f"the authors' annotation lists are not there ({LISTS}); set IMAGINET_ANNOTATIONS to their folder")
GROUPS = dict(zip(FAMILIES, ("gan", "sd", "midjourney", "dalle3")))

# section C of the audit: balanced accuracy / AUC of format, content, both, to three digits
GIVEN = {"all": (0.788, 0.844, 0.500, 0.500, 0.844, 0.920), "GAN": (0.854, 0.854, 0.623, 0.629, 0.854, 0.929),
         "SD": (1.000, 1.000, 0.624, 0.628, 1.000, 1.000), "Midjourney": (0.650, 0.650, 0.866, 0.866, 0.866, 0.866),
         "DALL-E 3": (0.849, 0.849, 0.875, 0.875, 1.000, 1.000)}


# --- the authors' lists -------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def published(tmp_path_factory) -> tuple[list[str], Path]:
    "The audit of the authors' folder, once."
    if not (LISTS/"test_annotations.txt").is_file(): pytest.skip("no lists")
    out = tmp_path_factory.mktemp("audit")
    return audit_page.audit(LISTS, out), out


@needs_lists
def test_figures_on_the_published_lists(published):
    table = pd.read_csv(published[1]/"metadata_baseline.csv")
    assert table.columns.tolist() == ["track", "group", "rule", "fit", "balanced_accuracy", "balanced_accuracy_low",
                                      "balanced_accuracy_high", "auc", "n"]
    for fit in ("in_sample", "cross_validated"):
        rows = table[table["fit"] == fit].set_index(["track", "group", "rule"])
        for group, numbers in GIVEN.items():
            got = rows.loc["detection"].loc[group].loc[list(shortcuts.RULES), ["balanced_accuracy", "auc"]].to_numpy().ravel()
            assert np.abs(got - numbers).max() < (0.0006 if fit == "in_sample" else 0.002), (fit, group)
        got = rows.loc["identification"].loc["all"].loc[["format", "format+content"], "balanced_accuracy"]
        assert got.tolist() == pytest.approx([0.75, 1.0], abs=1e-9)
    n = table.query("track == 'detection' and rule == 'format' and fit == 'in_sample'").set_index("group")["n"]
    assert n.to_dict() == {"all": 40_000, "GAN": 15_000, "SD": 15_000, "Midjourney": 5_000, "DALL-E 3": 5_000}


@needs_lists
def test_a_single_list_gives_the_same_figures(published):
    table = audit_page.list_tables(audit_page.audit_source(LISTS/"test_annotations.txt"))["metadata_baseline"][0]
    pd.testing.assert_frame_equal(table.round(4), pd.read_csv(published[1]/"metadata_baseline.csv"), check_dtype=False, atol=1e-4)


@needs_lists
def test_overlaps_of_the_published_lists(published):
    table = pd.read_csv(published[1]/"overlap.csv").set_index("a")
    calibration = {"test_calibration.txt": 80, "annotations_calib_corvi.txt": 48, "annotations_calib_practical.txt": 24,
                   "lasted_anchor.txt": 100}
    for name, n in calibration.items(): assert table.loc[name, ["n_a", "shared", "by"]].tolist() == [n, n, "path"]
    assert table.loc["test_annotations.txt", "shared"] == 38_322
    assert "All 80 images of `test_calibration.txt` are among the 40,000 of `test_all.txt` (compared by path)." in published[0]
    assert any(s.startswith("1,678 of the 40,000 images of `test_annotations.txt`") for s in published[0])


@needs_lists
def test_page_stands_alone_and_repeats_itself(published, tmp_path):
    audit_page.audit(LISTS, tmp_path)
    files = [file.relative_to(published[1]) for file in published[1].rglob("*") if file.is_file()]
    assert len(files) > 20 and Path("figures/metadata_baseline.png") in files
    for file in files: assert (published[1]/file).read_bytes() == (tmp_path/file).read_bytes(), file
    text = (tmp_path/"index.html").read_text()
    assert "0.788 / 0.844" in text and "https:" not in text and str(LISTS) not in text and str(tmp_path) not in text
    assert "Not measured, because the images are not available" in text                      # no images, and the page says so
    for name in ("metadata_baseline.csv", "overlap.csv", "index.html"):
        stored = (repo_root()/"reports"/"audit"/name).read_bytes()
        assert stored == (tmp_path/name).read_bytes(), f"{name} is out of date: imaginet audit LISTS --out reports/audit"


# --- the rules ----------------------------------------------------------------------------------------------------------------------

def some_list(n: int = 600, seed: int = 0) -> pd.DataFrame:
    "A random list in which format and content depend on the family."
    draw = np.random.default_rng(seed)
    family = draw.choice(["real", *FAMILIES], n, p=[0.5, 0.2, 0.15, 0.1, 0.05])
    code = np.array([["real", *FAMILIES].index(f) for f in family])
    suffix = np.array(["jpg", "png", "webp"])[(code + draw.integers(0, 2, n)) % 3]
    content = np.array(["photos", "paintings", "faces", "uncategorized"])[(code//2 + draw.integers(0, 3, n)) % 4]
    generator = pd.Series(family).replace({"GAN": "ProGAN", "SD": "SD v2.1"})
    return pd.DataFrame(dict(path=[f"f/{i}.{s}" for i, s in enumerate(suffix)], origin=np.where(family == "real", "real", "synthetic"),
                             content_type=content, generator_family=family, generator=generator, split="test"))


@pytest.mark.parametrize("seed", range(4))
def test_in_sample_equals_a_full_decision_tree(seed):
    "A tree that may split one-hot cells without limit, with balanced classes, is the best rule on those cells."
    manifest = some_list(seed=seed)
    table = shortcuts.metadata_baseline(manifest, {}).set_index(["track", "rule", "fit", "group"])
    features = {"format": ["format"], "content": ["content_type"], "format+content": ["both"]}
    frame = manifest.assign(format=au.container_format(manifest["path"])).assign(both=lambda f: f["format"] + f["content_type"])
    for rule, columns in features.items():
        fakes = frame[frame["origin"] == "synthetic"]
        for track, rows, label in (("detection", frame, "origin"), ("identification", fakes, "generator_family")):
            x = pd.get_dummies(rows[columns])
            tree = DecisionTreeClassifier(class_weight="balanced").fit(x, rows[label])
            row = table.loc[track, rule, "in_sample", "all"]
            assert row["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(rows[label], tree.predict(x)), abs=1e-9)
            if track == "detection":
                assert row["auc"] == pytest.approx(roc_auc_score(rows[label] == "synthetic", tree.predict_proba(x)[:, 1]), abs=1e-9)
            assert table.loc[track, rule, "cross_validated", "all"]["balanced_accuracy"] <= row["balanced_accuracy"] + 1e-9


def test_cross_validation_does_not_see_the_image_itself():
    "Every image is alone in its format: in-sample that is perfect, cross-validated it is worth nothing."
    manifest = some_list(60).assign(path=[f"x/{i}.f{i}" for i in range(60)])
    table = shortcuts.metadata_baseline(manifest, {}).query("track == 'detection' and rule == 'format'")
    table = table.set_index("fit")["balanced_accuracy"]
    assert table.to_dict() == {"in_sample": 1.0, "cross_validated": 0.5}
    repeated = pd.concat([manifest]*3, ignore_index=True)                               # nor a copy of it
    table = shortcuts.metadata_baseline(repeated, {}).query("track == 'detection' and rule == 'format'")
    table = table.set_index("fit")["balanced_accuracy"]
    assert table.to_dict() == {"in_sample": 1.0, "cross_validated": 0.5}


def test_groups_as_masks_positions_and_lists_agree():
    manifest = some_list()
    mask = manifest["generator_family"].isin(["SD", "real"]).to_numpy()
    parts = (mask, np.flatnonzero(mask), manifest[mask].reset_index(drop=True))
    tables = [shortcuts.metadata_baseline(manifest, {"SD": part}) for part in parts]
    for table in tables[1:]: pd.testing.assert_frame_equal(tables[0], table)


# --- files --------------------------------------------------------------------------------------------------------------------------

def picture(seed: int = 0, size: tuple[int, int] = (64, 48)) -> Image.Image:
    "Coarse blocks, so that a perceptual hash has something to hold on to."
    blocks = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize(size, Image.Resampling.BICUBIC)


def chunk(name: bytes, data: bytes) -> bytes:
    "A chunk of a PNG file."
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_header(width: int, height: int) -> bytes:
    "A PNG that claims to be large."
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"x") + chunk(b"IEND", b"")


@pytest.fixture
def odd_files(tmp_path) -> Path:
    picture().save(tmp_path/"good.png")
    picture().convert("CMYK").save(tmp_path/"cmyk.jpg", quality=90)
    Image.fromarray(np.linspace(0, 65535, 48*64).astype(np.uint16).reshape(48, 64)).save(tmp_path/"deep.png")
    picture().save(tmp_path/"moving.webp", save_all=True, append_images=[picture(1)], lossless=True)
    (tmp_path/"cut.png").write_bytes((tmp_path/"good.png").read_bytes()[:400])
    (tmp_path/"empty.jpg").touch()
    (tmp_path/"huge.png").write_bytes(png_header(30_000, 30_000))
    (tmp_path/"large.png").write_bytes(png_header(16_000, 16_000))
    (tmp_path/"text.webp").write_text("RIFF????WEBPVP8 nonsense")
    (tmp_path/"folder.png").mkdir()
    return tmp_path


def test_hostile_and_odd_files_give_rows(odd_files):
    names = [p.name for p in sorted(odd_files.iterdir())] + ["absent.png"]
    began = time.perf_counter()
    files = au.read_properties(pd.DataFrame({"path": names}), odd_files, jobs=1).set_index("path")
    assert time.perf_counter() - began < 20 and len(files) == len(names)
    assert set(files.index[files["error"].isna()]) == {"good.png", "cmyk.jpg", "deep.png", "moving.webp"}
    assert files.loc["cmyk.jpg", ["mode", "format", "jpeg_quality"]].tolist() == ["CMYK", "JPEG", 90]
    assert files.loc["deep.png", "bit_depth"] == 16
    assert files.loc["moving.webp", ["frames", "lossless"]].tolist() == [2, True]
    assert files.loc["cut.png", ["format", "width", "height"]].tolist() == ["PNG", 64, 48]
    assert "30000x30000" in files.loc["huge.png", "error"] or "exceeds limit" in files.loc["huge.png", "error"]
    assert "more than max_pixels" in files.loc["large.png", "error"]
    assert files.loc["empty.jpg", "error"] == "empty file" and files.loc["absent.png", "error"] == "no such file"
    assert files.loc["folder.png", "error"] == "not a file"
    assert not files["error"].fillna("").str.contains(str(odd_files), regex=False).any()
    assert files.loc[files["error"].notna(), ["pixel_hash", "perceptual_hash"]].isna().all().all()


@pytest.mark.parametrize("subsampling, name", [("4:4:4", "4:4:4"), ("4:2:2", "4:2:2"), ("4:2:0", "4:2:0")])
@pytest.mark.parametrize("quality", [1, 20, 49, 50, 77, 95, 100])
def test_jpeg_properties(tmp_path, quality, subsampling, name):
    picture().save(tmp_path/"x.jpg", quality=quality, subsampling=subsampling)
    found = au.image_properties(tmp_path/"x.jpg")
    assert (found["jpeg_quality"], found["jpeg_standard"], found["chroma"], found["lossless"]) == (quality, True, name, False)
    picture().convert("L").save(tmp_path/"grey.jpg", quality=quality)
    found = au.image_properties(tmp_path/"grey.jpg")
    assert (found["jpeg_quality"], found["chroma"]) == (quality, "grey")


def test_content_credentials_and_generator_names(tmp_path):
    picture().save(tmp_path/"plain.png")
    data = (tmp_path/"plain.png").read_bytes()
    store = struct.pack(">I4sI4s", 40, b"jumb", 32, b"jumd") + bytes.fromhex("6332706100110010800000aa00389b71") + b"\3c2pa\0"
    (tmp_path/"signed.png").write_bytes(data[:33] + chunk(b"caBX", store) + data[33:])
    (tmp_path/"not_signed.png").write_bytes(data[:33] + chunk(b"caBX", b"hello") + data[33:])
    picture().save(tmp_path/"plain.webp", lossless=True)
    data = (tmp_path/"plain.webp").read_bytes() + b"C2PA" + struct.pack("<I", len(store)) + store
    (tmp_path/"signed.webp").write_bytes(data[:4] + struct.pack("<I", len(data) - 8) + data[8:])
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", "a castle\nSteps: 20, Sampler: Euler a")
    picture().save(tmp_path/"prompt.png", pnginfo=info)
    picture().save(tmp_path/"xmp.jpg", xmp=b"<x:xmpmeta DigitalSourceType='trainedAlgorithmicMedia'/>")
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "resized from ImageNet with influx")                  # holds imagen and flux, names neither
    picture().save(tmp_path/"innocent.png", pnginfo=info)
    names = ["plain.png", "signed.png", "not_signed.png", "plain.webp", "signed.webp", "prompt.png", "xmp.jpg", "innocent.png"]
    found = {n: au.image_properties(tmp_path/n) for n in names}
    assert all(f["error"] is None for f in found.values())
    assert {n for n in names if found[n]["c2pa"]} == {"signed.png", "signed.webp"}
    assert {n for n in names if found[n]["names_generator"]} == {"prompt.png", "xmp.jpg"}


def test_near_pairs_equal_a_double_loop_and_scale():
    draw = np.random.default_rng(3)
    codes = draw.integers(0, 2**64, 120, dtype=np.uint64)
    flips = np.array([sum(1 << int(b) for b in draw.choice(64, k, replace=False)) for k in range(1, 9) for _ in range(12)], np.uint64)
    codes = np.unique(np.concatenate([codes, codes[:96] ^ flips]))
    for d in (0, 2, 4, 7, 15):
        n, values = len(codes), codes.tolist()
        by_hand = [(i, j) for i in range(n) for j in range(i + 1, n) if (values[i] ^ values[j]).bit_count() <= d]
        assert list(map(tuple, copies.near_pairs(codes, d).tolist())) == by_hand
    with pytest.raises(ValueError, match="0..15"): copies.near_pairs(codes, 16)
    crowded = np.unique(draw.integers(0, 2**64, 200_000, dtype=np.uint64) & np.uint64(0xFFFFFFFFFFFFF000))
    began = time.perf_counter()
    copies.near_pairs(crowded[:20_000], 4)
    assert time.perf_counter() - began < 60


def test_duplicates_within_and_across_splits(tmp_path):
    rows = []
    def add(name, image, split, origin="real", **options):
        image.save(tmp_path/name, **options)
        rows.append(dict(path=name, split=split, origin=origin, content_type="photos", generator_family="real", generator="real"))
    add("a.png", picture(1), "train"); add("a.webp", picture(1), "test", lossless=True)          # same pixels across splits
    add("b.png", picture(2), "train"); add("b.jpg", picture(2), "train", quality=92)             # near, within train
    add("c.png", picture(3), "test"); add("c2.png", picture(3), "test", "synthetic")             # same pixels, both origins
    for k in range(20): add(f"o{k}.png", picture(10 + k), "test")
    found = copies.duplicates(au.read_properties(pd.DataFrame(rows), tmp_path, jobs=1))
    assert found.query("kind == 'exact'")["path"].tolist() == ["a.png", "a.webp", "c.png", "c2.png"]
    assert found.query("kind == 'near'")["path"].tolist() == ["b.jpg", "b.png"]
    table = copies.duplicate_table(found).set_index(["kind", "splits"])
    assert table.loc[("exact", "test + train")].tolist() == [1, 2, 1, 0] and table.loc[("exact", "test")].tolist() == [1, 2, 1, 1]
    assert table.loc[("near", "train"), "groups"] == 1


# --- where a path enters ------------------------------------------------------------------------------------------------------------

def test_audit_of_a_folder_with_a_broken_file(odd_files, tmp_path_factory):
    root, out = tmp_path_factory.mktemp("set"), tmp_path_factory.mktemp("out")
    for kind in ("0_real", "1_fake"):
        (root/"train"/kind).mkdir(parents=True)
        for k in range(6): picture(k + 10*(kind == "1_fake")).save(root/"train"/kind/f"{k}.{'jpg' if kind == '0_real' else 'png'}")
    for name in ("cut.png", "huge.png", "empty.jpg", "deep.png"): (root/"train"/"1_fake"/name).write_bytes((odd_files/name).read_bytes())
    (root/"licence.txt").touch()
    sentences = audit_page.audit(root, out, jobs=1)
    assert any(s.startswith("13 of 16 files could be decoded") for s in sentences)
    assert pd.read_csv(out/"unreadable.csv")["path"].str.contains("cut|huge|empty").sum() == 3
    assert len(pd.read_csv(out/"properties.csv")) == 16 and "they are not images: 1." in (out/"index.html").read_text()
    assert pd.read_csv(out/"metadata_baseline.csv").query("rule == 'format' and track == 'detection'")["balanced_accuracy"].gt(0.9).all()


@pytest.mark.parametrize("line, says", [("./a.png,2,0,4,8", "line 2"), ("./../a.png,0,0,4,8", "leaves the image folder"),
                                        ("/etc/a.png,0,0,4,8", "absolute path"), ("./a.png,0,0,4", "line 2")])
def test_bad_lists_are_refused_by_line(tmp_path, line, says):
    (tmp_path/"test_annotations.txt").write_text(f"./ok.png,0,0,4,8\n{line}\n")
    with pytest.raises(AnnotationError, match=says): audit_page.audit(tmp_path/"test_annotations.txt", tmp_path/"out")
    assert not (tmp_path/"out"/"index.html").exists()


def test_overlap_by_content_sees_through_names(tmp_path):
    for name in ("a.png", "b.png", "c.png"): picture(ord(name[0])).save(tmp_path/name)
    picture(ord("a")).save(tmp_path/"renamed.webp", lossless=True)
    lists = {"train": pd.DataFrame({"path": ["a.png", "b.png"]}), "test": pd.DataFrame({"path": ["renamed.webp", "c.png"]})}
    assert copies.overlap_table(lists)[["shared", "by"]].values.tolist() == [[0, "path"]]
    assert copies.overlap_table(lists, tmp_path)[["shared", "by"]].values.tolist() == [[1, "content"]]


def test_manifest_with_splits_compares_them_by_content(tmp_path, without_figures):
    (tmp_path/"images").mkdir()
    manifest = some_list(40)
    manifest["split"] = np.where(np.arange(40) % 2, "test", "train")
    for k, path in enumerate(manifest["path"]):
        (tmp_path/"images"/path).parent.mkdir(exist_ok=True)
        picture(0 if k < 2 else k).save(tmp_path/"images"/path, **({"lossless": True} if path.endswith("webp") else {}))
    manifest.assign(path=manifest["path"]).to_csv(tmp_path/"m.csv", index=False)
    sentences = audit_page.audit(tmp_path/"m.csv", tmp_path/"out", root=tmp_path/"images", jobs=1)
    assert {"metadata_baseline.csv", "metadata_baseline_train.csv", "overlap.csv"} <= {p.name for p in (tmp_path/"out").iterdir()}
    assert pd.read_csv(tmp_path/"out"/"overlap.csv")["by"].tolist() == ["content"]
    assert any("40 of 40 files" in s for s in sentences)
    with pytest.raises(FileNotFoundError, match="no such folder"): audit_page.audit(tmp_path/"m.csv", tmp_path/"out", root=tmp_path/"none")


def test_the_list_that_evaluate_takes_is_audited(tmp_path, without_figures):
    for i in range(8): picture(i).save(tmp_path/f"{i}.{'jpg' if i % 2 else 'png'}")
    rows = [f"{i}.{'jpg' if i % 2 else 'png'},{1 - i % 2},{'' if i % 2 else 'Flux'},birds\n" for i in range(8)]
    (tmp_path/"mine.csv").write_text("path,label,generator,content_type\n" + "".join(rows))
    sentences = audit_page.audit(tmp_path/"mine.csv", tmp_path/"out", jobs=1)
    assert sentences[0].startswith("8 images, 4 real and 4 synthetic")
    assert pd.read_csv(tmp_path/"out"/"properties.csv")["generator"].value_counts().to_dict() == {"real": 4, "Flux": 4}
    (tmp_path/"bad.csv").write_text("path,label\n0.png,maybe\n")
    with pytest.raises(AnnotationError, match="line 2: unknown label 'maybe'"): audit_page.audit(tmp_path/"bad.csv", tmp_path/"out", jobs=1)


def test_written_list_is_read_back(tmp_path):
    manifest = some_list(80)
    write_annotations(manifest, tmp_path/"annotations"/"test_annotations.txt")
    source = audit_page.audit_source(tmp_path)
    assert source.manifest["path"].tolist() == manifest["path"].tolist() and source.root is None and source.groups is None
    assert read_annotations(tmp_path/"annotations"/"test_annotations.txt", "test").equals(source.manifest)


# --- beside the detectors -----------------------------------------------------------------------------------------------------------

def predictions(manifest: pd.DataFrame, shift: float, seed: int) -> pd.DataFrame:
    draw, synthetic = np.random.default_rng(seed), manifest["origin"].eq("synthetic").to_numpy()
    frame = manifest.assign(detector="d", logit=draw.normal(size=len(manifest)) + shift*synthetic - shift/2, probability=np.nan, error=None)
    return frame.assign(predicted_family=draw.choice(FAMILIES, len(manifest)), **{f"p_{f}": draw.random(len(manifest)) for f in FAMILIES})


@pytest.mark.parametrize("by", GROUPINGS)
def test_rows_fit_their_table(by):
    manifest = some_list(800)
    raw, matched = predictions(manifest, 3, 1), predictions(manifest, 1, 2)
    calibration = predictions(manifest.assign(path="train/" + manifest["path"]), 3, 3)
    options = dict(resamples=30, seed=5)
    main = detection_table(calibrated(raw, calibration), by, **options)
    added = [metadata_rows(raw, by, **options), format_matched_rows(matched, calibration, by, **options)]
    whole = pd.concat([main, *added], ignore_index=True)
    assert whole.columns.tolist() == main.columns.tolist()
    sizes = whole[whole["acc"].notna()].groupby("group")[["n_real", "n_synthetic"]].nunique()
    assert (sizes == 1).all().all()                                                     # the same images in every row of a group
    names = ["Metadata: format", "Metadata: content", "Metadata: format+content", "d, format-matched, unperturbed"]
    assert whole["detector"][len(main):].unique().tolist() == names
    direct = detection_table(calibrated(matched, calibration), by, **options)
    assert added[1]["acc"].tolist() == pytest.approx(direct[direct["detector"] == "d"]["acc"].tolist(), nan_ok=True)


def test_metadata_rows_equal_the_table_of_the_audit():
    manifest = some_list(800)
    rows = metadata_rows(predictions(manifest, 3, 1), "family", resamples=20, seed=7)
    table = shortcuts.metadata_baseline(manifest, seed=7).query("track == 'detection' and group != 'all'")
    for rule in shortcuts.RULES:
        mine = rows[rows["detector"] == f"Metadata: {rule}"].set_index("group")
        for fit, tolerance in (("cross_validated", 0.03), ("in_sample", 0.1)):        # other folds; the bound above
            theirs = table[(table["rule"] == rule) & (table["fit"] == fit)].set_index("group")
            assert np.abs(mine["acc"][list(FAMILIES)] - theirs["balanced_accuracy"]).max() < tolerance
    identified = metadata_identification_rows(predictions(manifest, 3, 1), "perturbed", resamples=20, seed=7)
    assert identified.columns.tolist() == identification_table(predictions(manifest, 3, 1), "clean", 5, 0).columns.tolist()


def test_format_of_a_perturbed_image_is_that_of_its_source():
    manifest = some_list(400)
    raw = predictions(manifest, 3, 1)
    perturbed = raw.assign(source=raw["path"], path=[f"testset/{k:05}.webp" for k in range(len(raw))])
    rows = metadata_rows(perturbed, "content", resamples=5, seed=0)
    blind = metadata_rows(perturbed.drop(columns="source"), "content", resamples=5, seed=0)
    assert rows.query("detector == 'Metadata: format'")["acc"].max() > 0.55
    assert blind.query("detector == 'Metadata: format'")["acc"].dropna().eq(0.5).all()


def test_paired_drop_is_narrower_than_two_separate_intervals():
    manifest = some_list(800)
    raw = predictions(manifest, 2, 1)
    matched = raw.assign(logit=raw["logit"] - 0.1)
    calibration = predictions(manifest.assign(path="train/" + manifest["path"]), 2, 3)
    drop = format_matched_table(matched, raw, calibration, resamples=200, seed=0).set_index("group").loc["Mean"]
    alone = detection_table(calibrated(raw, calibration), "family", resamples=200, seed=0)
    alone = alone.set_index(["detector", "group"]).loc[("d", "Mean")]
    assert drop["drop_high"] - drop["drop_low"] < 0.7*(alone["acc_high"] - alone["acc_low"])
    assert drop[["auc_drop", "auc_drop_low"]].tolist() == pytest.approx([0, 0], abs=1e-12)                # a shift keeps the order
