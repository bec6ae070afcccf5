"""The perturbed test set and its groupings: plain second readings of the authors' lists, and small lists of our own."""
import hashlib
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from imaginet_nb.core import repo_root, rng
from imaginet_nb.data import perturbed as T
from imaginet_nb.data.corruptions import Perturb
from imaginet_nb.data.images import ImageError
from imaginet_nb.data.labels import AnnotationError
from imaginet_nb.data.manifest import validate_manifest
from imaginet_nb.data.splits import read_annotations

LISTS = Path(os.environ.get("IMAGINET_ANNOTATIONS") or repo_root().parent/"shared"/"annotations")
needs_lists = pytest.mark.skipif(not (LISTS/"test_annotations.txt").is_file(),
    reason=f"the authors' annotation lists are not there ({LISTS})")
NAMES = ("gan", "sd", "midjourney", "dalle3") # in the order in which images are numbered
FAMILIES = ("GAN", "SD", "Midjourney", "DALL-E 3")
CONTENTS = ("photos", "paintings", "faces", "uncategorized")


def lines(path: Path) -> list[tuple[str, ...]]:
    "Path and codes of each line, by plain string handling."
    return [tuple(line.rsplit(",", 4)) for line in path.read_text().splitlines()]


def digests(root: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in (root/"testset").rglob("*.webp")}


# A little release of our own: (raw path, codes, folder in the perturbed layout) for each line of each group list.
FOOD = ("photozilla/dataset/food/7.jpg", "0,3,4,8", "uncategorized/real") # stands in three lines
RELEASE = {
    "gan": [("progan_val/cat/1_fake/0.png", "1,0,0,0", "photos/synthetic/gan"),
            ("wikiart_stylegan/1.png", "1,1,0,2", "paintings/synthetic/gan"), FOOD, FOOD],
    "sd": [("sd_photos_fake/2.webp", "1,0,1,3", "photos/synthetic/sd"), ("val2017/0.jpg", "0,0,4,8", "photos/real")],
    "midjourney": [("journeydb/3.jpg", "1,3,2,6", "uncategorized/synthetic/midjourney"), FOOD],
    "dalle3": [("dalle3/4.png", "1,3,3,7", "uncategorized/synthetic/dalle3"), ("val2017/1.jpg", "0,0,4,8", "photos/real")]}
NEVER = ("photozilla/dataset/food/8.jpg", "0,3,4,8")


@pytest.fixture
def release(tmp_path: Path) -> Path:
    "Images of 70x90 pixels, the raw test list, and the eight group lists in the folder `lists`."
    (tmp_path/"lists").mkdir()
    number, seen = 0, {NEVER[0]: NEVER[1]}
    for name in NAMES:
        raw, perturbed = [], []
        for path, codes, folder in RELEASE[name]:
            raw.append(f"./{path},{codes}\n")
            perturbed.append(f"./testset/{folder}/{number:05d}.webp,{codes}\n")
            seen[path], number = codes, number + 1
        (tmp_path/"lists"/f"test_annotations_{name}.txt").write_text("".join(raw))
        (tmp_path/"lists"/f"test_{name}.txt").write_text("".join(perturbed))
    for i, path in enumerate(seen):
        (tmp_path/path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (70, 90, 3), dtype=np.uint8)).save(tmp_path/path)
    (tmp_path/"lists"/"test_annotations.txt").write_text("".join(f"./{p},{c}\n" for p, c in seen.items()))
    return tmp_path


def split_of(release: Path) -> pd.DataFrame: return read_annotations(release/"lists"/"test_annotations.txt", "test")


# --- the authors' lists, followed ----------------------------------------------------------------------------------------

@needs_lists
def test_published_groups_are_the_authors_lists_line_by_line():
    groups = T.published_groups(LISTS)
    raw = [line for name in NAMES for line in lines(LISTS/f"test_annotations_{name}.txt")]
    perturbed = [line for name in NAMES for line in lines(LISTS/f"test_{name}.txt")]
    assert [f"./{p}" for p in groups["path"]] == [line[0] for line in raw]
    assert [f"./{p}" for p in groups["perturbed_path"]] == [line[0] for line in perturbed]
    assert list(groups["perturbed_path"].str[-10:-5].astype(int)) == list(range(40_000))
    assert groups["path"].nunique() == 38_322 and (groups["path"].value_counts() > 1).sum() == 1_147
    listed = {line[0] for line in lines(LISTS/"test_annotations.txt")}
    assert len(listed - {line[0] for line in raw}) == 1_678


@needs_lists
def test_the_difference_of_the_groupings_on_the_authors_lists():
    test = read_annotations(LISTS/"test_annotations.txt", "test")
    clean = test.assign(group=T.clean_groups(test, 42))
    table = T.grouping_difference({"published": T.published_groups(LISTS), "clean": clean}, test).set_index(["grouping", "group"])
    total = table.xs("all", level="group")
    assert list(total["images"]) == [38_322, 40_000] and list(total["repeats"]) == [1_678, 0] and list(total["never_used"]) == [1_678, 0]
    fact_sheet = {"GAN": (2301, 1740, 1611, 1848), "SD": (2213, 1679, 1754, 1854), "Midjourney": (757, 519, 552, 672),
                  "DALL-E 3": (729, 562, 583, 626)}
    for family, counts in fact_sheet.items():
        assert tuple(table.loc[("published", family), [f"real_{c}" for c in CONTENTS]]) == counts
    assert table.loc[("published", "Midjourney"), "unmatched"] == 757 + 519 + 552 # photos, paintings, faces against uncategorized
    assert table.loc[("published", "GAN"), "unmatched"] == 1848                   # the only content type of which the GANs made too little
    assert (table.loc["clean", "unmatched"] == 0).all() and clean["group"].notna().all()
    counted = Counter(zip(clean["group"], clean["content_type"], clean["origin"], strict=True))
    shown = {"GAN": (3000, 2250, 2250, 0), "SD": (3000, 2250, 2250, 0), "Midjourney": (0, 0, 0, 2500), "DALL-E 3": (0, 0, 0, 2500)}
    for family, sizes in shown.items(): # as many reals as synthetics in every cell
        for content, n in zip(CONTENTS, sizes, strict=True):
            assert counted[family, content, "real"] == counted[family, content, "synthetic"] == n, (family, content)


def test_a_set_made_after_the_authors_lists(release):
    made = T.make_testset(split_of(release), release, Perturb(size=48), seed=3, lists=release/"lists")
    for name in NAMES: assert (release/"testset"/f"test_{name}.txt").read_text() == (release/"lists"/f"test_{name}.txt").read_text()
    order = ("dalle3", "midjourney", "gan", "sd") # of the authors' test_all.txt
    assert (release/"testset"/"test_all.txt").read_text() == "".join((release/"lists"/f"test_{n}.txt").read_text() for n in order)
    assert list(made["source"]) == [path for name in NAMES for path, _, _ in RELEASE[name]]
    for path in made["path"]: assert Image.open(release/path).size == (48, 48) and Image.open(release/path).format == "WEBP"
    copies = made[made["source"] == FOOD[0]]["path"]
    assert len(copies) == 3 and len({(release/p).read_bytes() for p in copies}) == 3 # each line has a crop of its own
    assert NEVER[0] not in set(made["source"])


@needs_lists
def test_the_published_lists_come_out_again(tmp_path, monkeypatch):
    "All 40,000 lines, without pictures: the lists that are written equal the authors', test_all.txt included."
    monkeypatch.setattr(T, "_perturb_file", lambda *arguments: None)
    made = T.make_testset(read_annotations(LISTS/"test_annotations.txt", "test"), tmp_path, Perturb(), seed=42, jobs=1, lists=LISTS)
    assert len(made) == 40_000
    for name in (*(f"test_{n}.txt" for n in NAMES), "test_all.txt"):
        assert (tmp_path/"testset"/name).read_text().splitlines() == (LISTS/name).read_text().splitlines(), name


@pytest.mark.parametrize("name, old, new, why", [
    ("test_gan.txt", "00000.webp,1,0,0,0", "00000.webp,1,0,0,1", "line 1: .*other labels"),
    ("test_annotations_sd.txt", "./val2017/0.jpg,0,0,4,8\n", "", "1 and 2 lines"),
    ("test_dalle3.txt", "./testset/photos/real/00009.webp", "./val2017/9.webp", "line 2: val2017/9.webp is not in testset/"),
    ("test_sd.txt", "real/00005", "../00005", "path leaves"),
    ("test_annotations_gan.txt", "./wikiart_stylegan/1.png", "./wikiart_stylegan/2.png", "wikiart_stylegan/2.png is not a test image"),
])
def test_lists_that_do_not_fit_are_refused(release, name, old, new, why):
    path = release/"lists"/name
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(AnnotationError, match=why):
        T.make_testset(split_of(release), release, Perturb(size=32), seed=0, lists=release/"lists")
    assert not (release/"testset").exists()


def test_a_perturbed_path_in_two_lists_is_refused(release):
    for name, old in (("test_gan.txt", "real/00003"), ("test_midjourney.txt", "real/00007")):
        path = release/"lists"/name
        path.write_text(path.read_text().replace(old, "real/00099"))
    with pytest.raises(AnnotationError, match="real/00099.webp occurs in two lists"): T.published_groups(release/"lists")


def test_a_family_in_the_list_of_another_is_refused(release):
    for name in ("test_annotations_gan.txt", "test_gan.txt"):
        path = release/"lists"/name
        text = path.read_text().replace("1,0,0,0", "1,0,1,3").replace("photos/synthetic/gan", "photos/synthetic/sd")
        path.write_text(text)
    with pytest.raises(AnnotationError, match="line 1: .*not of family GAN"): T.published_groups(release/"lists")


# --- without lists: as it was ---------------------------------------------------------------------------------------------

def test_the_bytes_depend_on_seed_and_row_alone(release):
    "The picture in row r is the transform with the generator of (seed, 'testset', 0, r), whatever the processes, order or interruption."
    test, transform = split_of(release), Perturb(size=40, crop_cap=60)
    made = T.make_testset(test, release, transform, seed=9)
    for row, image in enumerate(made.itertuples()):
        expected = transform(np.asarray(Image.open(release/image.source).convert("RGB")), rng(9, "testset", 0, row))
        assert np.array_equal(np.asarray(Image.open(release/image.path)), expected)
    before = digests(release)
    for path in made["path"][::2]: (release/path).unlink()
    again = T.make_testset(test.sample(frac=1, random_state=0), release, transform, seed=9, jobs=2)
    assert digests(release) == before and again.equals(made)


def test_crop_cap(release):
    "With a cap of the size itself nothing is ever shrunk: every result is a window of its picture, up to compression."
    made = T.make_testset(split_of(release), release, Perturb(size=60, crop_cap=60), seed=1)
    exact = 0
    for image in made.itertuples():
        whole, part = (np.asarray(Image.open(release/p).convert("RGB")) for p in (image.source, image.path))
        windows = np.lib.stride_tricks.sliding_window_view(whole, (60, 60, 3))[:, :, 0]
        exact += bool((windows == part).all(axis=(2, 3, 4)).any())
    assert 0 < exact < len(made) # a quarter is not compressed
    larger = T.make_testset(split_of(release), release, Perturb(size=60, crop_cap=None), seed=1)
    assert list(larger["path"]) == list(made["path"]) # another crop cap, other files: the set is made anew
    assert any(not (np.lib.stride_tricks.sliding_window_view(np.asarray(Image.open(release/i.source).convert("RGB")), (60, 60, 3))[:, :, 0]
                    == np.asarray(Image.open(release/i.path))).all(axis=(2, 3, 4)).any() for i in larger.itertuples())


def test_a_damaged_image_is_named_and_the_rest_is_kept(release):
    test = split_of(release)
    whole = (release/"dalle3/4.png").read_bytes()
    (release/"dalle3/4.png").write_bytes(whole[:len(whole)//2])
    with pytest.raises(ImageError, match="dalle3/4.png: damaged"): T.make_testset(test, release, Perturb(size=32), seed=0)
    kept = {p: p.stat().st_mtime_ns for p in (release/"testset").rglob("*.webp")}
    (release/"dalle3/4.png").write_bytes(whole)
    T.make_testset(test, release, Perturb(size=32), seed=0)
    assert kept and all(p.stat().st_mtime_ns == t for p, t in kept.items())
    assert not [p for p in (release/"testset").rglob(".*")] # no temporary file is left


# --- groupings ------------------------------------------------------------------------------------------------------------

def crowd(seed: int) -> pd.DataFrame:
    "A random test split in which each content type has one to four families."
    draw, rows = np.random.default_rng(seed), []
    generator = {"GAN": "ProGAN", "SD": "SDXL v1.0", "Midjourney": "Midjourney", "DALL-E 3": "DALL-E 3"}
    for content in CONTENTS:
        families = draw.choice(FAMILIES, size=draw.integers(1, 5), replace=False)
        for family in families:
            labels = ("synthetic", content, family, generator[family])
            rows += [(f"{content}/{family}/{i}.png", *labels) for i in range(draw.integers(1, 30))]
        rows += [(f"{content}/real/{i}.jpg", "real", content, "real", "real") for i in range(draw.integers(1, 60))]
    frame = pd.DataFrame(rows, columns=["path", "origin", "content_type", "generator_family", "generator"])
    return validate_manifest(frame.assign(split="test"))


@pytest.mark.parametrize("seed", range(5))
def test_clean_groups_share_out_each_content_type(seed):
    "In every content type a family gets its share of the reals, to less than one image; order of rows does not matter."
    manifest = crowd(seed)
    groups = T.clean_groups(manifest, 7)
    assert groups.notna().all()
    synthetic = manifest["origin"].eq("synthetic")
    assert (groups[synthetic] == manifest["generator_family"][synthetic]).all()
    for content in CONTENTS:
        mine = manifest["content_type"].eq(content)
        fakes, reals = groups[mine & synthetic].value_counts(), groups[mine & ~synthetic].value_counts()
        for family in FAMILIES:
            assert abs(reals.get(family, 0) - (mine & ~synthetic).sum()*fakes.get(family, 0)/fakes.sum()) < 1, (content, family)
    mixed = manifest.sample(frac=1, random_state=seed)
    assert dict(zip(mixed["path"], T.clean_groups(mixed, 7), strict=True)) == dict(zip(manifest["path"], groups, strict=True))


def test_clean_groups_know_an_image_again():
    manifest = crowd(1)
    perturbed = pd.concat([manifest, manifest.iloc[[0, 3, 3]]], ignore_index=True).rename(columns={"path": "source"})
    perturbed["path"] = [f"{i}.webp" for i in perturbed.index]
    groups = T.clean_groups(perturbed, 0)
    assert list(np.flatnonzero(groups.isna())) == [len(manifest), len(manifest) + 1, len(manifest) + 2]
    hashed = manifest.assign(pixels=[f"hash{i//2}" for i in manifest.index]) # neighbours show the same picture
    kept = T.clean_groups(hashed, 0, identity="pixels").notna()
    assert list(np.flatnonzero(kept)) == list(range(0, len(manifest), 2))


def test_reals_without_synthetic_company_are_in_no_group():
    manifest = crowd(2)
    alone = manifest[~(manifest["content_type"].eq("faces") & manifest["origin"].eq("synthetic"))]
    groups = T.clean_groups(alone, 0)
    assert (groups.isna() == alone["content_type"].eq("faces")).all()
    difference = T.grouping_difference({"clean": alone.assign(group=groups)}, alone)
    assert difference.iloc[-1]["never_used"] == alone["content_type"].eq("faces").sum()
    with pytest.raises(AnnotationError, match="no synthetic image"): T.clean_groups(manifest[manifest["origin"] == "real"], 0)
