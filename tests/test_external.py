"""The test sets of others: preparation against plain Pillow and plain numpy, faults, and Tables 4 and 5 on look-alikes of both sets."""
import hashlib
import os
import shutil
from io import BytesIO
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from external_sets import make_corvi, make_practical
from forks import imaginet
from PIL import Image
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from imaginet_nb.core import load_profile, repo_root
from imaginet_nb.data import benchmarks as E
from imaginet_nb.data.images import ImageError, decode
from imaginet_nb.data.labels import AnnotationError
from imaginet_nb.data.perturbed import clean_groups
from imaginet_nb.evaluation.detection import detection_table
from imaginet_nb.evaluation.protocols import calibrated_on, detection_on_lists, grouping_effect

ROOT = repo_root()
LISTS = Path(os.environ.get("IMAGINET_ANNOTATIONS") or ROOT.parent/"shared"/"annotations")
needs_lists = pytest.mark.skipif(not (LISTS/"annotations_corvi.txt").is_file(), reason=f"the authors' lists are not there ({LISTS})")


def digests(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*.*") if p.is_file()}


def png(path: Path, pixels: np.ndarray, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


# --- crop, resize, JPEG ------------------------------------------------------------------------------------------------

def test_every_corvi_file_equals_what_plain_pillow_makes(tmp_path):
    images, lists, crops = make_corvi(tmp_path/"original")
    made = E.prepare_corvi(lists, crops, images, tmp_path/"out", size=48)
    kinds = set()
    for line in crops.read_text().splitlines()[1:]:
        name, side, x, y, quality = line.rsplit(",", 4)
        name, side, x, y = name.strip('"'), int(side), int(x), int(y)
        if name not in set(made["path"]): continue
        square = Image.open(images/name).convert("RGB").crop((x, y, x + side, y + side))
        buffer = BytesIO()
        square.resize((48, 48), Image.LANCZOS if side > 48 else Image.BICUBIC).save(buffer, "JPEG", quality=int(quality))
        assert (tmp_path/"out"/name).read_bytes() == buffer.getvalue(), line
        kinds.add(side > 48)
    assert kinds == {True, False} and len(made) == 37 and not (tmp_path/"out"/"biggan_512").exists()


def lanczos(x): return np.where(np.abs(x) < 3, np.sinc(x)*np.sinc(x/3), 0)
def cubic(x): # Catmull-Rom's family, a = -1/2
    x = np.abs(x)
    return np.where(x < 1, 1.5*x**3 - 2.5*x**2 + 1, np.where(x < 2, -0.5*x**3 + 2.5*x**2 - 4*x + 2, 0))


def weights(old: int, new: int, kernel) -> np.ndarray: # `(new, old)`
    "Each new pixel as a weighted mean of old ones; the kernel is stretched when the picture shrinks."
    scale = old/new
    distance = (np.arange(old) + 0.5)[None] - ((np.arange(new) + 0.5)*scale)[:, None]
    found = kernel(distance/max(scale, 1))
    return found/found.sum(1, keepdims=True)


@pytest.mark.parametrize("side, kernel, wrong", [(90, lanczos, cubic), (64, lanczos, cubic), (32, cubic, lanczos), (20, cubic, lanczos)])
def test_resizing_is_the_arithmetic_of_the_textbook(tmp_path, side, kernel, wrong):
    "Grey noise at quality 100, where JPEG costs two levels at most; the other filter, or none before shrinking, is far off."
    grey = np.random.default_rng(side).integers(60, 196, (100, 120), dtype=np.uint8)
    source = png(tmp_path/"a.png", np.repeat(grey[..., None], 3, 2))
    got = decode(E.crop_resize_jpeg(source, E.Crop(side, 7, 5, 100), size=32))[..., 0].astype(float)
    square = grey[5:5 + side, 7:7 + side].astype(float)
    expected = weights(side, 32, kernel) @ square @ weights(side, 32, kernel).T
    assert np.abs(got - expected).max() <= 2.5
    if side != 32: # at the same size both kernels copy
        assert np.abs(got - weights(side, 32, wrong) @ square @ weights(side, 32, wrong).T).max() > 4


def test_a_fine_checkerboard_is_smoothed_before_it_is_shrunk(tmp_path):
    "Without anti-aliasing (OpenCV's Lanczos) a board of single pixels would turn into stripes."
    board = ((np.indices((128, 128)).sum(0) % 2)*255).astype(np.uint8)
    got = decode(E.crop_resize_jpeg(png(tmp_path/"a.png", np.repeat(board[..., None], 3, 2)), E.Crop(125, 1, 1, 95), size=50))
    inner = got[4:-4, 4:-4].astype(int)
    assert np.abs(inner - 127).max() < 12


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_refer_to_pixels_as_stored(tmp_path, orientation):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 70, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = png(tmp_path/"turned.jpg", pixels, quality=95, exif=exif.tobytes())
    plain = png(tmp_path/"plain.jpg", pixels, quality=95)
    assert decode(turned).shape[:2] == ((70, 40) if orientation > 4 else (40, 70))
    crop = E.Crop(24, 45, 3, 90)
    assert E.crop_resize_jpeg(turned, crop, 24) == E.crop_resize_jpeg(plain, crop, 24)


def test_sizes_of_the_paper(tmp_path):
    source = png(tmp_path/"a.png", np.random.default_rng(0).integers(0, 256, (300, 500, 3), dtype=np.uint8))
    assert decode(E.crop_resize_jpeg(source, E.Crop(290, 0, 0, 80))).shape == (256, 256, 3)
    assert decode(E.pad_or_crop(source)).shape == (448, 448, 3)


# --- pad or crop --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("height, width", [(100, 100), (101, 99), (64, 64), (63, 200), (200, 63), (33, 17), (65, 64), (64, 65)])
def test_padding_and_cropping_against_numpy(tmp_path, height, width):
    pixels = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    down, right = max(64 - height, 0), max(64 - width, 0)
    padded = np.pad(pixels, ((down//2, down - down//2), (right//2, right - right//2), (0, 0)), mode="reflect")
    top, left = (padded.shape[0] - 64)//2, (padded.shape[1] - 64)//2
    content = E.pad_or_crop(png(tmp_path/"a.png", pixels), 64)
    assert content[8:16] == b"WEBPVP8L" # lossless
    assert np.array_equal(np.asarray(Image.open(BytesIO(content)).convert("RGB")), padded[top:top + 64, left:left + 64])


# --- lists --------------------------------------------------------------------------------------------------------------

@needs_lists
def test_the_authors_lists():
    corvi, practical = E.CORVI.manifest(LISTS), E.PRACTICAL.manifest(LISTS)
    assert len(corvi) == corvi["path"].nunique() == 21_000 and (corvi["group"] == "").sum() == 5_000
    sizes = corvi["group"].value_counts()
    expected = {"Taming Transformers": 2_000, "Latent Diffusion": 3_000, "ADM": 2_000}
    assert {g: sizes[g] for g in E.CORVI.groups} == {g: expected.get(g, 1_000) for g in E.CORVI.groups} and len(E.CORVI.groups) == 12
    assert practical["group"].value_counts().to_dict() == {
        "DreamBooth": 1052, "MidjourneyV4": 1354, "MidjourneyV5": 2000, "NightCafe": 1300, "StableAI": 1290, "YiJian": 796}
    assert set(practical["group"]) == set(E.PRACTICAL.groups)
    assert practical.groupby("group")["origin"].apply(lambda o: o.eq("real").mean()).eq(0.5).all()
    real = practical[practical["origin"] == "real"]
    assert len(real) == 3_896 and real["path"].nunique() == 1_958
    for chosen, n in ((E.CORVI, 48), (E.PRACTICAL, 24)):
        listed = chosen.read(LISTS/chosen.calibration)["path"]
        assert len(listed) == n and set(listed) <= set(chosen.manifest(LISTS)["path"])   # 48/48, 24/24
        anchors = chosen.read(LISTS/chosen.anchors)["path"]
        assert len(anchors) == 100 and set(anchors) <= set(chosen.manifest(LISTS)["path"])


@needs_lists
@pytest.mark.parametrize("commas", ["quoted", "bare"])
def test_a_crop_list_for_all_authors_paths(tmp_path, commas):
    "21,000 lines, six of them with commas in the path, quoted or not."
    paths = E.CORVI.manifest(LISTS)["path"]
    quote = '"' if commas == "quoted" else ""
    text = "".join(f"{quote}{p}{quote},{160 + i % 900},{i % 7},{i % 5},{65 + i % 36}\n" for i, p in enumerate(paths))
    (tmp_path/"crops.csv").write_text("filename,cropsize,x,y,qf\n" + text, encoding="utf-8")
    crops = E.read_crops(tmp_path/"crops.csv")
    assert list(crops) == list(paths) and crops[paths[37]] == E.Crop(197, 2, 2, 66)


@pytest.mark.parametrize("content, why", [
    (b"", "no crops"), (b"filename,cropsize,x,y,qf\n", "no crops"), (b"\xff\xfe\x00", "not a readable crop list"),
    (b"f,c,x,y,q\na.png,20,0,0\n", "line 2: expected file"), (b"f,c,x,y,q\na.png,20,0,0,80.5\n", "line 2: expected"),
    (b"f,c,x,y,q\na.png,20,-1,0,80\n", "line 2: expected"), (b"f,c,x,y,q\na.png,0,0,0,80\n", "line 2: .*impossible"),
    (b"f,c,x,y,q\na.png,5,0,0,0\n", "line 2: .*impossible"),
    (b"f,c,x,y,q\na.png,5,0,0,80\nb.png,5,0,0,80\na.png,6,0,0,80\n", "line 4: a.png occurs"),
    (b"f,c,x,y,q\n\na.png,5,0,0,80\n", "line 2: expected"),
])
def test_crop_lists_that_are_none(tmp_path, content, why):
    (tmp_path/"crops.csv").write_bytes(content)
    with pytest.raises(AnnotationError, match=f"crops.csv.*{why}"): E.read_crops(tmp_path/"crops.csv")


def test_no_crop_list_at_all(tmp_path):
    with pytest.raises(AnnotationError, match="none.csv: not a readable crop list"): E.read_crops(tmp_path/"none.csv")


@pytest.mark.parametrize("line, why", [("../../etc/passwd,1,3", "leaves the image folder"), ("/etc/passwd,1,3", "absolute"),
                                       ("biggan_256/a.png,1,12", "unknown generator code"), ("biggan_256/a.png,2,3", "unknown Origin")])
def test_lists_that_lead_elsewhere_are_refused(tmp_path, line, why):
    images, lists, crops = make_corvi(tmp_path/"original", each=1)
    with open(lists/"annotations_corvi.txt", "a") as file: file.write(line + "\n")
    with pytest.raises(AnnotationError, match=why): E.prepare_corvi(lists, crops, images, tmp_path/"out")
    assert not (tmp_path/"out").exists()


def test_folders_that_are_called_otherwise_in_the_crop_list(tmp_path):
    images, lists, crops = make_corvi(tmp_path/"original", each=1)
    crops.write_text(crops.read_text().replace("real_imagenet_val/", "real_imagenet_valid/"))
    with pytest.raises(AnnotationError, match=r"no crop for real_imagenet_val/00000.JPEG \(2 of 19 images\).*use the same folder names"):
        E.prepare_corvi(lists, crops, images, tmp_path/"out")


# --- whole sets ---------------------------------------------------------------------------------------------------------

def test_processes_and_interruptions_change_nothing(tmp_path):
    images, lists = make_practical(tmp_path/"original", each=16)
    E.prepare_practical(lists, images, tmp_path/"one", size=64, jobs=1)
    E.prepare_practical(lists, images, tmp_path/"two", size=64, jobs=2)
    before = digests(tmp_path/"one")
    assert before == digests(tmp_path/"two") and len(before) > 150
    pictures = sorted((tmp_path/"two").rglob("AIDraw_1122/**/*.*"))
    for path in pictures[::2]: path.unlink()
    kept = {p: p.stat().st_mtime_ns for p in pictures[1::2]}
    E.prepare_practical(lists, images, tmp_path/"two", size=64)
    assert digests(tmp_path/"two") == before and all(p.stat().st_mtime_ns == t for p, t in kept.items())
    E.prepare_practical(lists, images, tmp_path/"two", size=72, jobs=1)
    assert {Image.open(p).size for p in pictures} == {(72, 72)} # another size: nothing of the old set is left
    assert not list((tmp_path/"two").rglob(".*"))


def test_nothing_of_others_is_touched(tmp_path):
    images, lists = make_practical(tmp_path/"original", each=1)
    with pytest.raises(FileExistsError, match="not made here"): E.prepare_practical(lists, images, images)
    with pytest.raises(ValueError, match="folder of the lists"): E.prepare_practical(lists, images, lists)
    assert len(list(lists.iterdir())) == 8


def damaged(images: Path, names: list[str]) -> dict[str, str]:
    "Spoil pictures, each in another way; path -> what must be said of it."
    whole = (images/names[0]).read_bytes()
    (images/names[0]).write_bytes(whole[:len(whole)//2])
    (images/names[1]).write_bytes(b"")
    (images/names[2]).unlink()
    (images/names[3]).write_text("<html>404</html>")
    (images/names[4]).write_bytes(b"P5 30000 30000 255\n" + bytes(9))
    return dict(zip(names, ("damaged image", "empty file", "no such file", "a web page", "30000x30000 pixels are more than"), strict=True))


def test_damaged_images_are_named_all_of_them_and_count_only_when_allowed(tmp_path):
    images, lists, crops = make_corvi(tmp_path/"original")
    out = tmp_path/"external"/"corvi"
    names = E.CORVI.manifest(lists)["path"].tolist()[:10:2]
    whole = {name: (images/name).read_bytes() for name in names}
    expected = damaged(images, names)
    with pytest.raises(E.PreparationError, match=r"5 of 37 images could not be prepared, the first: .*faults\.csv"):
        E.prepare_corvi(lists, crops, images, out, size=32)
    assert E.CORVI.why_not_run(out.parent).startswith("not run: images not complete; imaginet data external corvi")
    faults = pd.read_csv(out/"faults.csv").set_index("path")["problem"]
    assert set(faults.index) == set(names)
    for name, why in expected.items(): assert why in faults[name], (name, faults[name])
    assert len([p for p in out.rglob("*.*") if p.parent != out]) == 32 # the others are done
    made = E.prepare_corvi(lists, crops, images, out, size=32, allow_faults=True)
    assert len(made) == 37 and E.CORVI.why_not_run(out.parent) == ""
    for name, content in whole.items(): (images/name).write_bytes(content)
    E.prepare_corvi(lists, crops, images, out, size=32)
    assert pd.read_csv(out/"faults.csv").empty and all((out/name).is_file() for name in names)


def test_a_set_without_any_image_is_no_set(tmp_path):
    images, lists = make_practical(tmp_path/"original", each=1)
    with pytest.raises(E.PreparationError, match="9 of 9 images"):
        E.prepare_practical(lists, tmp_path/"elsewhere", tmp_path/"practical", allow_faults=True)
    assert E.PRACTICAL.why_not_run(tmp_path)


def test_odd_but_whole_pictures(tmp_path):
    "CMYK, 16 bits, several frames, transparency: what `decode` makes of them is what is prepared."
    images, lists = make_practical(tmp_path/"original", each=2)
    names = sorted(E.PRACTICAL.manifest(lists)["path"].unique())[:4]
    noise = np.random.default_rng(0).integers(0, 256, (50, 60, 4), dtype=np.uint8)
    Image.fromarray(noise, "CMYK").save(images/names[0], "JPEG")
    Image.fromarray(noise[..., 0].astype(np.uint16)*257).save(images/names[1], "PNG")
    Image.fromarray(noise[..., :3]).save(images/names[2], "WEBP", save_all=True, append_images=[Image.new("RGB", (60, 50))], lossless=True)
    Image.fromarray(noise, "RGBA").save(images/names[3], "PNG")
    E.prepare_practical(lists, images, tmp_path/"out", size=40)
    inside = {name: decode(tmp_path/"out"/name) for name in names}
    assert np.array_equal(inside[names[1]][..., 0], noise[5:45, 10:50, 0])
    assert np.array_equal(inside[names[2]], noise[5:45, 10:50, :3]) # the first frame
    for name in names: assert np.array_equal(inside[name], decode(images/name)[5:45, 10:50])


def test_a_box_over_the_border_is_a_fault(tmp_path):
    source = png(tmp_path/"a.png", np.zeros((50, 60, 3), np.uint8))
    E.crop_resize_jpeg(source, E.Crop(50, 10, 0, 80), 16)
    for crop in (E.Crop(50, 11, 0, 80), E.Crop(50, 0, 1, 80), E.Crop(51, 0, 0, 80)):
        with pytest.raises(ImageError, match="a.png: .*reaches outside 60x50"): E.crop_resize_jpeg(source, crop, 16)


# --- tables -------------------------------------------------------------------------------------------------------------

def scored(manifest: pd.DataFrame, seed: int = 0, name: str = "Any") -> pd.DataFrame:
    "Predictions of a detector that is right more often than not."
    images = manifest.drop_duplicates("path").drop(columns="group").reset_index(drop=True)
    logit = np.random.default_rng(seed).normal(size=len(images)) + images["origin"].eq("synthetic")
    return images.assign(detector=name, logit=logit, probability=expit(logit - 0.5), error=None)


def by_hand(frame: pd.DataFrame) -> tuple[float, float]:
    truth = frame["origin"] == "synthetic"
    return balanced_accuracy_score(truth, frame["probability"] > 0.5), roc_auc_score(truth, frame["logit"])


@needs_lists
def test_table_5_sets_each_generator_against_all_reals():
    manifest = E.CORVI.manifest(LISTS)
    predictions = scored(manifest)
    table = detection_on_lists(predictions, manifest, E.CORVI.groups, resamples=20, seed=0).set_index("group")
    for group in E.CORVI.groups:
        mine = predictions[predictions["generator"].isin([group, "real"])]
        assert np.allclose(table.loc[group, ["acc", "auc"]].astype(float), by_hand(mine)) and table.loc[group, "n_real"] == 5_000
    assert np.isclose(table.loc["Mean", "acc"], table["acc"][:-1].mean()) and len(table) == 13


@needs_lists
def test_table_4_takes_each_list_as_given():
    manifest = E.PRACTICAL.manifest(LISTS)
    predictions = scored(manifest, 1)
    table = detection_on_lists(predictions, manifest, E.PRACTICAL.groups, resamples=20, seed=0).set_index("group")
    for group in E.PRACTICAL.groups:
        mine = predictions[predictions["path"].isin(manifest["path"][manifest["group"] == group])]
        assert len(mine) == (manifest["group"] == group).sum()
        assert np.allclose(table.loc[group, ["acc", "auc"]].astype(float), by_hand(mine))
    assert list(table.index) == [*E.PRACTICAL.groups, "Mean"] and table.loc["Mean", "n_real"] == 1_958


@needs_lists
def test_the_published_calibration_is_a_logistic_regression_on_the_listed_images():
    manifest = E.CORVI.manifest(LISTS)
    predictions = scored(manifest, 2)
    paths = E.CORVI.read(LISTS/E.CORVI.calibration)["path"]
    part = predictions[predictions["path"].isin(paths)]
    theirs = LogisticRegression(C=1e10, solver="saga", max_iter=100_000, tol=1e-9)
    theirs.fit(part[["logit"]].to_numpy(), part["origin"] == "synthetic")
    expected = expit(theirs.decision_function(predictions[["logit"]].to_numpy()))
    assert np.allclose(calibrated_on(predictions, paths.tolist())["probability"], expected, atol=1e-4)
    with pytest.raises(ValueError, match="needed for the calibration, but not predicted"): calibrated_on(predictions[:100], paths.tolist())


def test_reals_of_two_lists_are_redrawn_together():
    "Two lists with the same reals and the same fakes: whatever is drawn, the two rows agree, and so do their intervals."
    rows = pd.DataFrame(dict(path=[f"{i}.png" for i in range(60)], origin=["real", "synthetic"]*30, content_type="unknown"))
    rows["generator_family"] = rows["generator"] = np.where(rows["origin"] == "real", "real", "unknown")
    manifest = pd.concat([rows.assign(group="a"), rows.assign(group="b")], ignore_index=True)
    table = detection_on_lists(scored(manifest), manifest, ["a", "b"], resamples=100, seed=0)
    numbers = table[["acc", "acc_low", "acc_high", "auc", "auc_low", "auc_high"]].to_numpy(float)
    assert (numbers[0] == numbers[1]).all() and (numbers[0] == numbers[2]).all() and numbers[0, 1] < numbers[0, 0] < numbers[0, 2]


def test_matched_reals_take_the_subject_out():
    "A detector that only knows the content type scores high against random reals, and chance against matched ones."
    rows = []
    for family, generator, content in (("GAN", "ProGAN", "photos"), ("SD", "SDXL v1.0", "photos"), ("Midjourney",)*2 + ("uncategorized",),
                                       ("DALL-E 3",)*2 + ("uncategorized",)):
        rows += [(f"{family}/{i}.png", "synthetic", content, family, generator) for i in range(50)]
        rows += [(f"{content}/{family}/{i}.jpg", "real", content, "real", "real") for i in range(50)]
    frame = pd.DataFrame(rows, columns=["path", "origin", "content_type", "generator_family", "generator"]).assign(split="test", group="")
    predictions = scored(frame, name="Content").assign(logit=lambda f: np.where(f["content_type"] == "photos", -1.0, 1.0))
    predictions = predictions.assign(probability=expit(predictions["logit"]))
    groups = clean_groups(predictions, 0)
    matched = predictions.assign(group=groups)[groups.notna()]
    clean = detection_table(matched, "family", resamples=50, seed=0).set_index("group")
    assert np.allclose(clean["acc"].astype(float), 0.5) and np.allclose(clean["auc"].astype(float), 0.5)
    effect = grouping_effect(predictions, resamples=50, seed=0).set_index("group")
    assert effect.loc["Midjourney", "acc"] > 0.65 and effect.loc["Midjourney", "change_high"] < 0
    assert np.allclose(effect["acc_content_matched"], 0.5)


# --- the notebook -------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def workshop(tmp_path_factory) -> Path:
    "A repository of its own: smoke-sized networks of seeded numbers, predictions on a few training pictures, no external sets."
    import torch

    from imaginet_nb.data.manifest import write_manifest_csv
    from imaginet_nb.data.splits import read_annotations
    from imaginet_nb.detectors.predictions import predict, save_predictions
    from imaginet_nb.detectors.protocol import DETECTORS
    from imaginet_nb.models.checkpoints import load_detector, save_checkpoint
    from imaginet_nb.models.resnet import create_backbone
    from imaginet_nb.models.selfcon import ImagiNetClassifier
    root = tmp_path_factory.mktemp("workshop")
    shutil.copy(ROOT/"settings.ini", root)
    (root/"profiles").mkdir()
    text = (ROOT/"profiles"/"smoke.yaml").read_text().replace("root: data/smoke", "root: data/tiny")
    (root/"profiles"/"smoke.yaml").write_text(text)
    draw, rows = np.random.default_rng(0), []
    for i in range(24):
        path, codes = (f"sd_photos_fake/{i}.png", "1,0,1,3") if i % 2 else (f"val2017/{i}.png", "0,0,4,8")
        png(root/"data"/"tiny"/path, draw.integers(0, 256, (64, 64, 3), dtype=np.uint8))
        rows.append(f"./{path},{codes}\n")
    (root/"list.txt").write_text("".join(rows))
    report = root/"reports"/"smoke"
    train = read_annotations(root/"list.txt", "train")
    write_manifest_csv(train, report/"manifests"/"train.csv")
    answers, chosen = [], train.head(16) # the anchors of Wu2023 come from the others
    for k, (stem, name) in enumerate(zip(("selfcon", "baseline"), DETECTORS, strict=True)):
        torch.manual_seed(k)
        save_checkpoint(ImagiNetClassifier(create_backbone("resnet18", width=0.125), name=name), report/"checkpoints"/f"{stem}.safetensors")
        answers.append(predict(load_detector(report/"checkpoints"/f"{stem}.safetensors"), chosen, root/"data"/"tiny", num_workers=0))
    save_predictions(pd.concat(answers, ignore_index=True), report/"predictions"/"calibration.csv")
    return root


def run_p51(root: Path) -> dict[str, pd.DataFrame]:
    "Execute the notebook there; its tables."
    result = imaginet("notebook", ROOT/"nbs"/"pipelines"/"p51_external.ipynb", "--profile", root/"profiles"/"smoke.yaml", cwd=root)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    tables = root/"reports"/"smoke"/"tables"
    return {name: pd.read_csv(tables/f"{name}.csv").fillna({"note": ""}) for name in ("practical", "corvi", "external_calibration")}


def test_p51_says_what_is_missing_then_fills_the_tables(workshop):
    from imaginet_nb.detectors.prior_work import PRIOR_METHODS, create_prior_method, import_weights
    from imaginet_nb.evaluation.detection import DETECTION_COLUMNS
    tables = run_p51(workshop)
    for name, chosen in E.EXTERNAL_SETS.items():
        table = tables[name]
        assert list(table) == list(DETECTION_COLUMNS) and set(table["group"]) == {*chosen.groups, "Mean"}
        assert {"SelfCon (ours)", "Cross-entropy (baseline)", *PRIOR_METHODS} == set(table["detector"])
        assert table["note"].str.startswith(f"not run: images not supplied; imaginet data external {name} ").all()
        assert table[["acc", "auc", "n_real"]].isna().all(axis=None)
    assert tables["external_calibration"]["note"].str.startswith("not run").all()

    settings = load_profile(workshop/"profiles"/"smoke.yaml").data
    images, lists, crops = make_corvi(workshop/"original", each=1)
    E.prepare_corvi(lists, crops, images, workshop/settings.external/"corvi", size=32)
    images, lists = make_practical(workshop/"original"/"p", each=2)
    spoilt = E.PRACTICAL.manifest(lists)["path"][0]
    (images/spoilt).write_bytes(b"")
    E.prepare_practical(lists, images, workshop/settings.external/"practical", size=32, allow_faults=True)
    import torch
    peer = create_prior_method("Grag2021")
    state = {k.removeprefix("backbone."): v for k, v in peer.backbone.state_dict().items()}
    state |= {"fc.weight": peer.detection.weight.data, "fc.bias": peer.detection.bias.data}
    torch.save({"model": state}, workshop/"grag.pth")
    import_weights("grag2021", workshop/"grag.pth", workshop/settings.weights, accept_licence=True)

    tables = run_p51(workshop)
    ran = {"SelfCon (ours)", "Cross-entropy (baseline)", "Grag2021"}
    for name, chosen in E.EXTERNAL_SETS.items():
        table = tables[name]
        assert list(table["detector"].unique()[:3]) == ["SelfCon (ours)", "Cross-entropy (baseline)", "Grag2021"]
        filled = table[table["detector"].isin(ran)]
        assert filled[["acc", "acc_low", "acc_high", "auc"]].notna().all(axis=None) and len(filled) == 3*(len(chosen.groups) + 1)
        rest = table[~table["detector"].isin(ran)]
        assert set(rest["detector"]) == set(PRIOR_METHODS) - ran and rest["note"].str.contains("imaginet weights import").all()
        assert (filled[filled["group"] != "Mean"]["n_real"] == (6 if name == "corvi" else 2)).all()
    first = tables["practical"].query("detector == 'SelfCon (ours)' and group == 'DreamBooth'").iloc[0]
    assert first["n_synthetic"] == 1 and "1 image could not be scored" in first["note"]
    both = tables["external_calibration"]
    both = both[both["detector"].isin(ran)]
    assert set(both["test_set"]) == {"Corvi test set", "Practical test set"} and both["acc_as_published"].notna().all()
    assert np.allclose(both["acc_as_published"] - both["acc"], both["change"], atol=2e-4)
    predictions = pd.read_csv(workshop/"reports"/"smoke"/"predictions"/"practical.csv")
    assert len(predictions) == 3*19 and predictions["error"].notna().sum() == 3
