"""The embedded data set against the paper's counts, other readers of its files, the number of processes, and failure in the middle."""

import hashlib
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from imaginet_nb.core import rng
from imaginet_nb.data import sandbox as S

TINY = dict(images=130, seed=5, sides=(64, 72), decoder_steps=2)
LISTS = ("train_annotations", "test_annotations", "calibration")
# First part of a path, and for LSUN and ProGAN the last folder -> origin, content, family, generator (annotation codes), container format.
FOLDERS = {
    "imagenet": ("0,0,4,8", "JPEG"), "0_real": ("0,0,4,8", "PNG"), "train2017": ("0,0,4,8", "JPEG"), "val2017": ("0,0,4,8", "JPEG"),
    "1_fake": ("1,0,0,0", "PNG"), "imagenet_stylegan": ("1,0,0,1", "PNG"),
    "sd_photos_fake": ("1,0,1,3", "WEBP"), "sdxl_photos_fake": ("1,0,1,4", "WEBP"),
    "wikiart": ("0,1,4,8", "JPEG"), "danbooru2021": ("0,1,4,8", "JPEG"), "wikiart_stylegan": ("1,1,0,2", "PNG"),
    "sd_paintings_fake": ("1,1,1,3", "WEBP"), "sdxl_paintings_fake": ("1,1,1,4", "WEBP"), "animaginexl_paintings_fake": ("1,1,1,5", "WEBP"),
    "ffhq": ("0,2,4,8", "PNG"), "ffhq_stylegan": ("1,2,0,1", "PNG"),
    "sd_faces_fake": ("1,2,1,3", "WEBP"), "sdxl_faces_fake": ("1,2,1,4", "WEBP"),
    "photozilla": ("0,3,4,8", "JPEG"), "journeydb": ("1,3,2,6", "JPEG"), "dalle3": ("1,3,3,7", "PNG")}
# The paper's raw test split, counted: content type and generator -> images.
TEST_SPLIT = {
    ("photos", "real"): 6000, ("photos", "ProGAN"): 1500, ("photos", "StyleGAN-XL"): 1500, ("photos", "SD v2.1"): 1521,
    ("photos", "SDXL v1.0"): 1479, ("paintings", "real"): 4500, ("paintings", "StyleGAN3"): 2250, ("paintings", "SD v2.1"): 548,
    ("paintings", "SDXL v1.0"): 577, ("paintings", "Animagine XL"): 1125, ("faces", "real"): 4500, ("faces", "StyleGAN-XL"): 2250,
    ("faces", "SD v2.1"): 1128, ("faces", "SDXL v1.0"): 1122, ("uncategorized", "real"): 5000, ("uncategorized", "Midjourney"): 2500,
    ("uncategorized", "DALL-E 3"): 2500}


def digests(root: Path) -> dict[str, str]:
    return {p.relative_to(root).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in root.rglob("*") if p.is_file()}


def lines(root: Path, name: str) -> dict[str, str]:
    "Path -> codes, by plain string handling."
    rows = [line.rsplit(",", 4) for line in (root/"annotations"/f"{name}.txt").read_text().splitlines()]
    assert all(row[0].startswith("./") and len(row) == 5 for row in rows)
    found = {row[0][2:]: ",".join(row[1:]) for row in rows}
    assert len(found) == len(rows), f"{name} names a file twice"
    return found


def kind(path: str) -> str:
    parts = Path(path).parts
    return parts[2] if parts[0].startswith("progan_") else parts[0]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    "Made by several processes, as a large data set is."
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(S, "SMALL", 0)
        return S.make_sandbox(tmp_path_factory.mktemp("sandbox")/"tiny", **TINY)


def test_the_full_size_has_the_papers_counts():
    "Catches wrong shares, a swapped SD and SDXL, and a split that is not one fifth of each row."
    files = S.plan(200_000)
    assert len(files) == 200_000 and not files["path"].duplicated().any()
    test = files[files["split"] == "test"]
    assert test.groupby(["content_type", "generator"]).size().to_dict() == TEST_SPLIT
    assert (files["split"] == "train").groupby(files["row"]).sum().equals(4*(files["split"] == "test").groupby(files["row"]).sum())


@pytest.mark.parametrize("images", [1, 160, 240, 1000, 2500, 7777])
def test_small_sizes_keep_the_proportions(images):
    "Catches a row without test images, halves that differ, and a row whose split is not exactly one fifth."
    files = S.plan(images)
    origins = files.groupby(["content_type", "origin"]).size().unstack()
    assert (origins["real"] == origins["synthetic"]).all()
    per_row = files.groupby(["row", "split"]).size().unstack()
    assert len(per_row) == 20 and per_row.notna().all(axis=None)
    assert (per_row["train"] == 4*per_row["test"]).all()
    if images >= 1000: assert abs(len(files)/images - 1) < 0.03


def test_other_readers_see_the_same_data_set(root):
    "Catches labels that do not belong to the folder, a suffix that lies about the format, and files that no list names."
    train, test, calibration = (lines(root, name) for name in LISTS)
    assert not set(train) & set(test) and set(calibration) <= set(train)
    own = {S.MARKER, *(f"annotations/{name}.txt" for name in LISTS)}
    assert set(digests(root)) - own == set(train) | set(test)
    for path, codes in (train | test).items():
        with Image.open(root/path) as image:
            assert (codes, image.format, image.mode) == (*FOLDERS[kind(path)], "RGB"), path
            assert 0.65*TINY["sides"][0] <= min(image.size) and max(image.size) <= TINY["sides"][1], path
    assert {kind(p) for p in train} == set(FOLDERS) - {"val2017"} and {kind(p) for p in test} == set(FOLDERS) - {"train2017"}
    assert not any(p.startswith(("progan_val", "imagenet/ILSVRC/Data/CLS-LOC/val")) for p in train)


def test_calibration_is_balanced(root):
    "Catches a calibration list that is drawn at random or keeps too many reals (section 1.2: 40,000 real, 10,000 of each family)."
    families = Counter(codes.split(",")[2] for codes in lines(root, "calibration").values())
    assert len({families[k] for k in "0123"}) == 1 and families["0"] > 0 and families["4"] == 4*families["0"]


def test_no_two_images_are_alike(root):
    "Catches a seed that does not reach the single image, and a synthetic image that is the reconstruction of a real one in the set."
    small = {}
    for path in (*lines(root, "train_annotations"), *lines(root, "test_annotations")):
        with Image.open(root/path) as image: small[path] = np.asarray(image.resize((16, 16)).convert("L"), float).ravel()
    table = np.stack(list(small.values()))
    distance = np.sqrt(((table[:, None] - table[None])**2).mean(-1)) + 1e9*np.eye(len(table))
    assert distance.min() > 2, [list(small)[i] for i in np.unravel_index(distance.argmin(), distance.shape)]


def test_one_process_makes_the_same_bytes(root, tmp_path, monkeypatch):
    "Catches random numbers, results or file names that depend on how the work is shared."
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(2)
    try:
        again = S.make_sandbox(tmp_path/"again", **TINY)
        assert torch.get_num_threads() == 2, "the caller's number of threads was changed"
    finally: torch.set_num_threads(threads)
    assert digests(again) == digests(root)
    assert torch.equal(torch.get_rng_state(), state), "the caller's random stream was moved"


def test_another_seed_makes_other_images(root, tmp_path):
    "Catches a seed that is stored in the marker and used nowhere."
    other = digests(S.make_sandbox(tmp_path/"other", **(TINY | {"seed": 6})))
    assert set(other) == set(digests(root))
    same = [name for name, digest in digests(root).items() if other[name] == digest]
    assert set(same) <= {f"annotations/{name}.txt" for name in LISTS}


def test_a_photograph_serves_one_split(monkeypatch):
    "Catches tiles of one photograph on both sides, and stand-ins that see test photographs."
    scenes = {split: {Path(name).stem.split("_")[0] for name in names} for split, names in S.PHOTOGRAPHS.items()} # stereo pair: one scene
    assert not scenes["train"] & scenes["test"] and min(map(len, scenes.values())) >= 2
    read: list[str] = []
    decode = S.decode
    monkeypatch.setattr(S, "decode", lambda path: read.append(Path(path).stem.split("_")[0]) or decode(path))
    for split in S.PHOTOGRAPHS:
        read.clear()
        for i in range(60): S.picture("photos", 48, split, rng(i, split))
        assert set(read) <= scenes[split] and len(set(read)) >= 2
    read.clear()
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    S.train_stand_in("ProGAN", ["photos"], 48, 1, seed=0)
    assert read and set(read) <= scenes["train"]


def test_stand_ins_learn_and_leave_a_trace(monkeypatch):
    "Catches decoders that are never trained, that only blur, and reconstructions that hand the picture through."
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    monkeypatch.setattr(S, "STRONG", (1.0, 1.0))
    monkeypatch.setattr(S, "STRONG_IMAGES", 1.0)
    pictures = [S.picture("faces", 64, "test", rng(i, "picture")) for i in range(6)]

    def error(steps: int) -> float:
        model = S.StandIn("Midjourney")
        model.load_state_dict(S.train_stand_in("Midjourney", ["faces"], 64, steps, seed=1))
        made = [S.reconstruct(model, image, rng(i, "made")) for i, image in enumerate(pictures)]
        return float(np.mean([np.square(a.astype(float) - b).mean() for a, b in zip(made, pictures)])**0.5)
    early, late = error(2), error(120)
    assert late < 0.5*early and 1 < late < 25, (early, late) # the camera's noise, which is not reconstructed, is in it


def test_failure_in_the_middle_keeps_what_was_there(root, tmp_path, monkeypatch):
    "Catches a build in place: after an error the old sandbox must be whole and nothing else be left."
    root = shutil.copytree(root, tmp_path/"data")
    before = digests(root)

    def fail(*_): raise RuntimeError("disk full")
    monkeypatch.setattr(S, "_calibration", fail) # late: images and two lists are written by then
    with pytest.raises(RuntimeError, match="disk full"): S.make_sandbox(root, **(TINY | {"seed": 6}))
    assert digests(root) == before and [p.name for p in tmp_path.iterdir()] == ["data"]


@pytest.mark.parametrize("name", ["annotations/calibration.txt", "ffhq"])
def test_a_damaged_sandbox_is_made_anew(name, root, tmp_path):
    "Catches a marker that is believed although a list or an image is gone."
    damaged = shutil.copytree(root, tmp_path/"data")
    victim = damaged/name if name.endswith(".txt") else min((damaged/name).iterdir())
    victim.unlink()
    assert digests(S.make_sandbox(damaged, **TINY)) == digests(root)


def test_an_unreadable_marker_is_named(tmp_path):
    "Catches a bare JSON error, and the removal of a folder whose marker cannot be understood."
    (tmp_path/"data").mkdir(); (tmp_path/"data"/S.MARKER).write_text("{half a mark")
    with pytest.raises(ValueError, match=rf"{S.MARKER}.*delete"): S.make_sandbox(tmp_path/"data", **TINY)
    assert (tmp_path/"data"/S.MARKER).read_text() == "{half a mark"


def test_a_foreign_folder_or_file_is_left_alone(tmp_path):
    "Catches a rebuild that deletes what somebody else put there."
    (tmp_path/"photos").mkdir(); (tmp_path/"photos"/"holiday.jpg").write_bytes(b"x")
    (tmp_path/"notes").write_text("x")
    for name in ("photos", "notes"):
        with pytest.raises(FileExistsError, match=name): S.make_sandbox(tmp_path/name, **TINY)
    assert (tmp_path/"photos"/"holiday.jpg").read_bytes() == b"x" and (tmp_path/"notes").read_text() == "x"


@pytest.mark.parametrize("steps, pictures", [(1, 8), (5, 40), (7, 48)])
def test_a_short_training_draws_no_more_pictures_than_it_crops(monkeypatch, steps, pictures):
    "Catches sandboxes of the tests that draw hundreds of scenes for stand-ins that see few."
    drawn = []
    monkeypatch.setattr(S, "picture", lambda content, side, *rest: drawn.append(content) or np.zeros((side, side, 3), np.uint8))
    S.train_stand_in("ProGAN", ["photos", "faces"], 64, steps, 0)
    assert len(drawn) == pictures
