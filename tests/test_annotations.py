"""Annotation lists: the authors' own files against the published counts, and random lists of our own.

The first half needs the authors' lists (folder `shared/annotations` beside the checkout, or `IMAGINET_ANNOTATIONS`)."""
import os
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from imaginet_nb.core import repo_root
from imaginet_nb.data import labels, manifest, splits

LISTS = Path(os.environ.get("IMAGINET_ANNOTATIONS") or repo_root().parent/"shared"/"annotations")
needs_lists = pytest.mark.skipif(not (LISTS/"test_annotations.txt").is_file(),
    reason=f"the authors' annotation lists are not there ({LISTS}); set IMAGINET_ANNOTATIONS to their folder")
GROUPS = {"gan": "GAN", "sd": "SD", "midjourney": "Midjourney", "dalle3": "DALL-E 3"}
SIZES = {"gan": 15_000, "sd": 15_000, "midjourney": 5_000, "dalle3": 5_000}
LABELS = ["origin", "content_type", "generator_family", "generator"]
COUNTS = pd.read_csv(repo_root()/"data"/"test_split_counts.csv", dtype=str, keep_default_na=False)


@pytest.fixture(scope="module")
def lists() -> dict[str, pd.DataFrame]:
    "The raw test list, the four group lists in both layouts, their concatenation."
    frames = {"test": splits.read_annotations(LISTS/"test_annotations.txt", "test")}
    for group in GROUPS:
        frames[f"raw_{group}"] = splits.read_annotations(LISTS/f"test_annotations_{group}.txt", "test", allow_duplicates=True)
        frames[f"perturbed_{group}"] = splits.read_annotations(LISTS/f"test_{group}.txt", "test")
    frames["all"] = splits.read_annotations(LISTS/"test_all.txt", "test")
    return frames


def select(df: pd.DataFrame, row: pd.Series) -> pd.DataFrame:
    "Rows of a manifest that one line of the count file speaks of."
    for column, name in dict(origin="origin", content_type="content_type", generator_family="generator_family",
                             generator="specific_generator").items():
        if row[name] not in ("(all)", ""): df = df[df[column] == row[name].strip("()")]
    if row["source_folder"]: df = df[df["path"].str.split("/").str[0] == row["source_folder"]]
    return df


@needs_lists
def test_counts_equal_the_count_file(lists: dict[str, pd.DataFrame]) -> None:
    groups = pd.concat([lists[f"raw_{g}"] for g in GROUPS], ignore_index=True)
    frames = {"test_images": lists["test"], "group_list_total": groups, "group_list_unique_raw": groups.drop_duplicates("path"),
              **{f"group_list_{g}": lists[f"raw_{g}"] for g in GROUPS}}
    table = COUNTS[COUNTS["level"] != "score_calibration_subset_of_test"]
    assert len(table) > 60 and set(table["level"]) >= {"source_folder", "family", "specific_generator", "total"}
    wrong = []
    for _, row in table.iterrows():
        for column, df in frames.items():
            if len(select(df, row)) != int(row[column]): wrong.append((list(row[:6]), column, len(select(df, row)), row[column]))
    assert wrong == []


@needs_lists
def test_count_table_equals_a_fifth_of_table_2(lists: dict[str, pd.DataFrame]) -> None:
    published = pd.read_csv(repo_root()/"reports"/"published"/"table2_dataset_structure.csv").query("metric == 'images'")
    expected = {subset: int(value)//5 for subset, value in zip(published["subset"], published["value"], strict=True)}
    table = splits.count_table(lists["test"])
    ours = {"/".join(r[:3]).removesuffix("/all"): r[3] for r in
            table[["content_type", "origin", "source", "images"]].itertuples(index=False)}
    assert ours == expected
    shares = dict(zip(table["content_type"], table["share"], strict=True))
    assert shares == {"photos": 0.3, "paintings": 0.225, "faces": 0.225, "uncategorized": 0.25, "total": 1}


@needs_lists
def test_file_types_give_the_family_away(lists: dict[str, pd.DataFrame]) -> None:
    table = COUNTS[COUNTS["level"] == "source_folder"]
    for _, row in table.iterrows():
        assert set(select(lists["test"], row)["path"].str.rpartition(".")[2]) == {row["file_ext"]}, row["source_folder"]


@needs_lists
@pytest.mark.parametrize("group", GROUPS)
def test_group_lists(lists: dict[str, pd.DataFrame], group: str) -> None:
    raw, perturbed = lists[f"raw_{group}"], lists[f"perturbed_{group}"]
    assert len(raw) == len(perturbed) == SIZES[group]
    assert raw[LABELS].equals(perturbed[LABELS])                                   # line i is image i
    synthetic = raw["origin"].eq("synthetic")
    half = SIZES[group]//2
    assert synthetic[:half].all() and not synthetic[half:].any()                   # synthetic first
    assert set(raw.loc[synthetic, "generator_family"]) == {GROUPS[group]}
    start = sum(n for g, n in SIZES.items() if list(SIZES).index(g) < list(SIZES).index(group))
    numbers = perturbed["path"].str.extract(r"/(\d{5})\.webp$", expand=False).astype(int)
    assert list(numbers) == list(range(start, start + SIZES[group]))
    if raw["path"].is_unique: return
    with pytest.raises(labels.AnnotationError, match="line .*second time"):
        splits.read_annotations(LISTS/f"test_annotations_{group}.txt", "test")


@needs_lists
def test_the_group_lists_are_no_partition(lists: dict[str, pd.DataFrame]) -> None:
    groups = pd.concat([lists[f"raw_{g}"] for g in GROUPS])["path"]
    assert len(lists["test"]) - lists["test"]["path"].isin(groups).sum() == 1_678
    assert (groups.value_counts() > 1).sum() == 1_147 and groups.value_counts().max() == 7


@needs_lists
def test_the_whole_perturbed_list_is_the_four_in_their_order(lists: dict[str, pd.DataFrame]) -> None:
    parts = pd.concat([lists[f"perturbed_{g}"] for g in ("dalle3", "midjourney", "gan", "sd")], ignore_index=True)
    assert lists["all"].equals(parts)


@needs_lists
def test_calibration_and_anchors_are_test_images(lists: dict[str, pd.DataFrame]) -> None:
    "Paths and labels of all 80 calibration images and all 100 anchors occur in the lists they are evaluated on."
    calibration = splits.read_annotations(LISTS/"test_calibration.txt", "calibration")
    anchors = splits.read_annotations(LISTS/"lasted_anchor.txt", "anchor")
    assert len(calibration) == len(splits.overlap(calibration, lists["all"])) == 80
    assert len(anchors) == len(splits.overlap(anchors, lists["perturbed_gan"])) == 100
    assert set(anchors["origin"]) == {"real"} and len(splits.overlap(anchors, calibration)) == 1
    for part in (calibration, anchors):
        assert len(part.merge(lists["all"], on=["path", *LABELS])) == len(part)
    table = COUNTS[COUNTS["level"] == "score_calibration_subset_of_test"]
    for _, row in table.iterrows(): assert len(select(calibration, row)) == int(row["test_images"])
    assert table["test_images"].astype(int).sum() == 80


@needs_lists
def test_corvi_lists() -> None:
    corvi = splits.read_corvi(LISTS/"annotations_corvi.txt")
    expected = dict.fromkeys(splits.CORVI_GENERATORS, 1_000) | {"Taming Transformers": 2_000, "Latent Diffusion": 3_000, "ADM": 2_000}
    assert dict(corvi["generator"].value_counts()) == expected | {"real": 5_000}
    folders = corvi[corvi["origin"] == "real"]["path"].str.split("/").str[0].value_counts()
    assert dict(folders) == {"real_coco_valid": 2_000, "real_imagenet_val": 2_000, "real_ucid": 1_000}
    assert corvi["path"].str.contains(",").sum() == 6
    calibration, anchors = splits.read_corvi(LISTS/"annotations_calib_corvi.txt"), splits.read_corvi(LISTS/"anchor_lasted_corvi.txt")
    assert len(calibration) == len(calibration.merge(corvi, on=["path", "origin"])) == 48
    assert dict(calibration["origin"].value_counts()) == {"real": 24, "synthetic": 24}
    assert set(corvi[corvi["path"].isin(calibration["path"])]["generator"].value_counts()) == {24, 2}   # two of each generator
    assert len(anchors) == len(anchors.merge(corvi, on=["path", "origin"])) == 100 and set(anchors["origin"]) == {"real"}


@needs_lists
def test_practical_lists() -> None:
    sizes = dict(DreamBooth=1052, MidjourneyV4=1354, MidjourneyV5=2000, NightCafe=1300, StableAI=1290, YiJian=796)
    frames = {name: splits.read_practical(LISTS/f"Test_{name}_num{n}.txt") for name, n in sizes.items()}
    for name, n in sizes.items(): assert dict(frames[name]["generator"].value_counts()) == {name: n//2, "real": n//2}
    practical = pd.concat(frames.values(), ignore_index=True)
    reals = practical[practical["origin"] == "real"]["path"]
    assert len(reals) == 3_896 and reals.nunique() == 1_958
    calibration = splits.read_practical(LISTS/"annotations_calib_practical.txt")
    assert dict(calibration["generator"].value_counts()) == {"real": 12} | dict.fromkeys(sizes, 2)
    assert len(calibration) == len(splits.overlap(calibration, practical)) == 24
    anchors = splits.read_practical(LISTS/"anchor_lasted_practical.txt")
    assert len(anchors) == len(splits.overlap(anchors, practical)) == 100 and set(anchors["origin"]) == {"real"}


@needs_lists
@pytest.mark.parametrize("name", ["test_annotations.txt", "test_all.txt", "test_calibration.txt", "lasted_anchor.txt",
                                  *(f"test_{g}.txt" for g in GROUPS), *(f"test_annotations_{g}.txt" for g in GROUPS)])
def test_reading_and_writing_keeps_every_byte(name: str, tmp_path: Path) -> None:
    splits.write_annotations(splits.read_annotations(LISTS/name, "test", allow_duplicates=True), tmp_path/"again.txt")
    assert (tmp_path/"again.txt").read_bytes() == (LISTS/name).read_bytes()


@needs_lists
def test_every_list_is_looked_at() -> None:
    "A list that nobody reads here would be a list that nobody checked."
    known = {"test_annotations.txt", "test_all.txt", "test_calibration.txt", "lasted_anchor.txt", "annotations_corvi.txt",
             "annotations_calib_corvi.txt", "anchor_lasted_corvi.txt", "annotations_calib_practical.txt", "anchor_lasted_practical.txt",
             *(f"test_{g}.txt" for g in GROUPS), *(f"test_annotations_{g}.txt" for g in GROUPS),
             "Test_DreamBooth_num1052.txt", "Test_MidjourneyV4_num1354.txt", "Test_MidjourneyV5_num2000.txt",
             "Test_NightCafe_num1300.txt", "Test_StableAI_num1290.txt", "Test_YiJian_num796.txt"}
    assert {p.name for p in LISTS.glob("*.txt")} <= known


@needs_lists
def test_our_layout_has_the_sizes_of_theirs(lists: dict[str, pd.DataFrame]) -> None:
    layout = splits.perturbed_layout(lists["test"], seed=0)
    assert set(layout["path"]) == set(lists["test"]["path"])                       # nothing lost, nothing twice
    theirs = pd.concat([lists[f"perturbed_{g}"] for g in GROUPS], ignore_index=True)
    assert list(layout["origin"]) == list(theirs["origin"])
    folder, number = (layout["perturbed_path"].str.rpartition("/")[i] for i in (0, 2))
    assert list(number) == list(theirs["path"].str.rpartition("/")[2])
    synthetic = layout["origin"].eq("synthetic")
    assert sorted(folder[synthetic]) == sorted(theirs.loc[synthetic, "path"].str.rpartition("/")[0])
    # the reals of a group are drawn from all content types, about in proportion
    reals = pd.crosstab(layout.loc[~synthetic, "group"], layout.loc[~synthetic, "content_type"], normalize="index")
    shares = pd.Series(dict(photos=0.3, paintings=0.225, faces=0.225, uncategorized=0.25))
    assert (reals.sub(shares, axis=1).abs() < 0.04).all().all()                    # four standard deviations of the smallest group


# ---------------------------------------------------------------- lists of our own

def test_the_count_file_agrees_with_table_2() -> None:
    published = pd.read_csv(repo_root()/"reports"/"published"/"table2_dataset_structure.csv").set_index("subset")["value"].astype(float)
    total = COUNTS[COUNTS["level"] == "content_x_origin"]
    for content, part in total.groupby("content_type"):
        assert part["test_images"].astype(int).sum()*5/2000 == published[content]


def random_manifest(n: int, seed: int) -> pd.DataFrame:
    "A valid manifest with awkward but legal paths."
    random = np.random.default_rng(seed)
    names = np.array(["a", "b c", "d, e", "f,1,0,0,0", "ö", "日本", "..x", "x..", "%20", "'q'", '"q"', "DALL·E", "\u2028", "\x85", "#"])
    rows = []
    for i in range(n):
        generator = list(labels.Generator)[random.integers(9)]
        origin = "real" if generator is labels.Generator.REAL else "synthetic"
        path = "/".join([*random.choice(names, random.integers(0, 3)), f"{random.choice(names)}{i}.png"])
        rows.append((path, origin, labels.CONTENT_TYPES[random.integers(4)], generator.family.label, generator.label, "train"))
    return pd.DataFrame(rows, columns=list(manifest.MANIFEST_COLUMNS))


@pytest.mark.parametrize("seed", range(5))
def test_random_manifests_survive_both_formats(seed: int, tmp_path: Path) -> None:
    df = manifest.validate_manifest(random_manifest(200, seed))
    splits.write_annotations(df, tmp_path/"list.txt")
    assert splits.read_annotations(tmp_path/"list.txt", "train").equals(df)
    manifest.write_manifest_csv(df, tmp_path/"list.csv")
    assert manifest.read_manifest_csv(tmp_path/"list.csv").equals(df)


def test_reading_against_a_plain_loop(tmp_path: Path) -> None:
    "An independent reader, one line at a time."
    splits.write_annotations(random_manifest(300, 7), tmp_path/"list.txt")
    families, generators = ["GAN", "SD", "Midjourney", "DALL-E 3", "real"], ["ProGAN", "StyleGAN-XL", "StyleGAN3", "SD v2.1", "SDXL v1.0",
        "Animagine XL", "Midjourney", "DALL-E 3", "real"]
    expected = []
    with open(tmp_path/"list.txt", encoding="utf-8", newline="\n") as file:
        for line in file:
            path, o, c, f, g = line[:-1].rsplit(",", 4)
            expected.append((path[2:], ["real", "synthetic"][int(o)], ["photos", "paintings", "faces", "uncategorized"][int(c)],
                             families[int(f)], generators[int(g)], "test"))
    assert list(splits.read_annotations(tmp_path/"list.txt", "test").itertuples(index=False, name=None)) == expected


@pytest.mark.parametrize("line", [1, 2, 499, 500])
@pytest.mark.parametrize(("bad", "says"), [
    ("./x.png,0,0,4", "codes instead of 4"), ("./x.png,2,0,4,8", "Origin code '2'"), ("./x.png,0,4,4,8", "ContentType code '4'"),
    ("./x.png,1,0,5,0", "Family code '5'"), ("./x.png,1,0,0,10", "Generator code '10'"), ("./x.png,0,0,0,8", "real image"),
    ("./x.png,1,0,4,8", "synthetic image"), ("./x.png,1,0,2,7", "does not belong"),
    (",0,0,4,8", "empty path"), ("./,0,0,4,8", "empty path"),
    ("/x.png,0,0,4,8", "absolute"), ("./../x.png,0,0,4,8", "leaves"), ("./x\0.png,0,0,4,8", "control"), ("", "blank line"),
    ("./x.png,0,0,4,8\r", ""), (" ./x.png , 0, 0, 4, 8", "code ' 0'")])
def test_a_fault_is_found_on_its_line(line: int, bad: str, says: str, tmp_path: Path) -> None:
    lines = [f"./ok{i}.png,0,0,4,8" for i in range(500)] + ["./last.png,1,0,0,0"]
    lines[line - 1] = bad
    (tmp_path/"list.txt").write_bytes("\n".join(lines).encode())
    if not says:                                                                   # a Windows line end is no fault
        assert splits.read_annotations(tmp_path/"list.txt", "train").loc[line - 1, "path"] == "x.png"
        return
    with pytest.raises(labels.AnnotationError) as error: splits.read_annotations(tmp_path/"list.txt", "train")
    message = str(error.value)
    assert message.startswith(f"{tmp_path/'list.txt'}, line {line}: ") and says in message and ";" in message


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path/"list.txt").write_text("old")
    bad = random_manifest(3, 0).assign(generator_family="StyleGAN2")
    for write in (splits.write_annotations, manifest.write_manifest_csv):
        with pytest.raises(labels.AnnotationError): write(bad, tmp_path/"list.txt")
    assert [p.name for p in tmp_path.iterdir()] == ["list.txt"] and (tmp_path/"list.txt").read_text() == "old"


def test_forty_thousand_lines_in_well_under_a_second(tmp_path: Path) -> None:
    "A reader that builds a row at a time with pandas takes tens of seconds; the limit leaves room for a busy machine."
    (tmp_path/"list.txt").write_text("".join(f"./folder/{i}.png,0,0,4,8\n" for i in range(40_000)))
    best = 9.0
    for _ in range(3):
        start = time.perf_counter()
        assert len(splits.read_annotations(tmp_path/"list.txt", "test")) == 40_000
        best = min(best, time.perf_counter() - start)
    assert best < 2


@pytest.mark.parametrize("seed", range(3))
def test_draws_do_not_depend_on_the_order_of_rows(seed: int) -> None:
    df = manifest.validate_manifest(random_manifest(400, seed))
    mixed = df.sample(frac=1, random_state=seed)
    by_path = dict(zip(df["path"], splits.family_groups(df, 3), strict=True))
    assert by_path == dict(zip(mixed["path"], splits.family_groups(mixed, 3), strict=True))
    a, b = splits.split_manifest(df, 0.3, 3), splits.split_manifest(mixed, 0.3, 3)
    assert dict(zip(a["path"], a["split"], strict=True)) == dict(zip(b["path"], b["split"], strict=True))
    assert set(splits.balanced_calibration(df, 5, 3)["path"]) == set(splits.balanced_calibration(mixed, 5, 3)["path"])
    assert set(splits.draw_real_images(df, 9, 3, "x")["path"]) == set(splits.draw_real_images(mixed, 9, 3, "x")["path"])
    assert splits.perturbed_layout(df, 3).equals(splits.perturbed_layout(mixed, 3))


def test_a_split_is_a_fifth_of_every_stratum() -> None:
    df = splits.split_manifest(manifest.validate_manifest(random_manifest(3_000, 0)), 0.2, 0)
    strata = df.groupby(["origin", "content_type", "generator"])["split"].agg(["size", lambda s: s.eq("test").sum()]).to_numpy()
    assert (np.abs(strata[:, 1] - strata[:, 0]/5) <= 0.5).all() and len(strata) == 36
    assert set(df["split"]) == {"train", "test"}


def test_reals_are_drawn_evenly() -> None:
    "Over many seeds each real is chosen about equally often: nothing is favoured by its path."
    df = pd.DataFrame(dict(path=[f"{i:02d}.png" for i in range(20)], origin="real"))
    counts = np.zeros(20)
    for seed in range(600): counts[splits.draw_real_images(df, 5, seed).index] += 1
    assert counts.sum() == 3_000 and (np.abs(counts - 150) < 55).all()             # five standard deviations
