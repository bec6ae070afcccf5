"""From an empty folder to the paper's tables: a look-alike of ImagiNet goes the way of the real one; only the address differs.

Its images are those of a sandbox, its archive has volumes, its server is on the loopback. Two prior methods and both external benchmarks
are there as well, so that every row of the tables that can be filled here is filled.
"""
import hashlib
import re
import shutil
from pathlib import Path

import forks
import pandas as pd
import pytest
import torch
from external_sets import make_corvi, make_practical
from hub import serve
from multivolumefile import MultiVolume
from py7zr import SevenZipFile
from torchvision.models import resnet50

from imaginet_nb.core import load_profile, repo_root
from imaginet_nb.data.images import decode
from imaginet_nb.data.labels import FAMILIES
from imaginet_nb.data.perturbed import LIST_NAMES, RAW_LIST_NAMES
from imaginet_nb.data.sandbox import make_sandbox
from imaginet_nb.data.splits import draw_real_images, perturbed_layout, read_annotations, write_annotations

ROOT = repo_root()
PROFILE = load_profile("paper-look-alike")
DATA = ROOT/PROFILE.data.root
OURS = {"SelfCon (ours)", "Cross-entropy (baseline)"}
PEERS = {"Grag2021", "Corvi2022*"}
AUTHORS_COUNTS = {"DreamBooth": 1052, "MidjourneyV4": 1354, "MidjourneyV5": 2000, "NightCafe": 1300, "StableAI": 1290, "YiJian": 796}


def imaginet(*words: object, **environment: str) -> str:
    "Run a command that must succeed."
    result = forks.imaginet(*words, cwd=ROOT, **environment)
    assert result.returncode == 0, f"imaginet {' '.join(map(str, words))}\n{result.stdout[-3000:]}{result.stderr[-3000:]}"
    return result.stdout


def authors_lists(original: Path) -> Path:
    "The group lists and the rest, beside the three of the sandbox."
    lists = original/"annotations"
    layout = perturbed_layout(read_annotations(lists/"test_annotations.txt", "test"), seed=7)
    for family, rows in layout.groupby("group"):
        write_annotations(rows, lists/RAW_LIST_NAMES[family])
        write_annotations(rows, lists/LIST_NAMES[family], column="perturbed_path")
    perturbed = layout.assign(path=layout["perturbed_path"])
    chosen = pd.concat([perturbed[perturbed["generator_family"] == f].head(2) for f in FAMILIES] + [draw_real_images(perturbed, 8, seed=0)])
    for name, rows in {"test_all.txt": perturbed, "test_calibration.txt": chosen, "lasted_anchor.txt": chosen.tail(8)}.items():
        write_annotations(rows, lists/name)
    hashes = [f"id{n},{path.name},{hashlib.md5(decode(path)).hexdigest()}\n" for n, path in enumerate(sorted((original/"ffhq").iterdir()))]
    (lists/"ffhq_filenames.txt").write_text("".join(hashes))
    return lists


def pack(original: Path, archive: Path) -> Path:
    "The images in volumes, as the authors have them."
    archive.mkdir()
    with MultiVolume(str(archive/"imaginet.7z"), "wb", volume=300_000, ext_digits=3) as target, SevenZipFile(target, "w") as file:
        for path in sorted(p for p in original.rglob("*") if p.suffix in (".png", ".jpg", ".JPEG", ".webp")):
            file.write(path, path.relative_to(original).as_posix())
    return archive


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    "Everything, once."
    folder, smoke = tmp_path_factory.mktemp("look-alike"), load_profile("smoke").sandbox
    shutil.rmtree(DATA, ignore_errors=True)
    make_sandbox(folder/"original", images=smoke.images, seed=1, sides=tuple(smoke.sides), decoder_steps=smoke.decoder_steps)
    (corvi, corvi_lists, crops), (practical, practical_lists) = make_corvi(folder/"corvi"), make_practical(folder/"practical")
    lists = authors_lists(folder/"original")
    for path in [*corvi_lists.iterdir(), *practical_lists.iterdir()]: shutil.copy(path, lists)
    for title, n in AUTHORS_COUNTS.items(): (lists/f"Test_{title}_num6.txt").rename(lists/f"Test_{title}_num{n}.txt")
    with serve(pack(folder/"original", folder/"volumes"), lists) as hub:
        hub.cut_at["imaginet.7z.002"] = [1000]
        imaginet("data", "download", "--out", DATA, **hub.environment())
    imaginet("data", "unpack", DATA/"archive", "--out", DATA)
    assert "there and right" in imaginet("data", "verify", DATA)

    torch.manual_seed(0)
    for name in ("grag2021", "corvi2022_imaginet"):
        torch.save({"model": resnet50(num_classes=1).state_dict()}, folder/f"{name}.pth")
        imaginet("weights", "import", name, folder/f"{name}.pth", "--accept-licence", "--out", ROOT/PROFILE.data.weights)
    options = ("--lists", DATA/"annotations", "--size", 32, "--out", ROOT/PROFILE.data.external)
    imaginet("data", "external", "corvi", "--images", corvi, "--crops", crops, *options)
    imaginet("data", "external", "practical", "--images", practical, *options)

    forks.reproduce("paper-look-alike", force=True)
    yield ROOT/"reports"/"paper-look-alike"
    for made in (DATA, ROOT/"reports"/"paper-look-alike"): shutil.rmtree(made)


def table(report: Path, name: str) -> pd.DataFrame:
    return pd.read_csv(report/"tables"/f"{name}.csv", keep_default_na=False, na_values=[""]).fillna({"note": ""})


@pytest.mark.parametrize("name", ["detection_by_family", "detection_by_content", "detection_by_generator", "practical", "corvi"])
def test_rows_of_detectors_that_are_there_are_filled(report, name):
    rows = table(report, name)
    filled = rows[rows["acc"].notna()]
    assert OURS | PEERS <= set(filled["detector"]) and filled[["acc", "acc_low", "acc_high", "auc"]].notna().all(axis=None)
    absent = rows[rows["acc"].isna()]
    assert set(absent["detector"]) >= {"Corvi2022", "Wu2023"} and absent["note"].str.startswith("not run: ").all()
    assert absent.loc[absent["detector"] == "Wu2023", "note"].str.contains("imaginet weights import wu2023").all()


def test_corvi_and_practical_have_their_groups(report):
    assert table(report, "corvi").query("detector == 'Grag2021'")["group"].nunique() == 13
    assert table(report, "practical").query("detector == 'Grag2021'")["group"].nunique() == 7


def test_no_number_passes_for_the_papers(report):
    ledger = pd.read_csv(report/"tables"/"published_vs_reproduced.csv")
    assert ledger["reproduced"].isna().all() and ledger["status"].str.contains("not run").all()
    for path in (report/"tables").glob("*.md"):
        assert "Profile `paper-look-alike`: measured on the embedded sandbox" in path.read_text(encoding="utf-8"), path.name
    assert "measured on the embedded sandbox" in (report/"index.html").read_text(encoding="utf-8")


def test_lists_followed_line_by_line_give_the_authors_test_set(report, tmp_path):
    "The perturbed layout that comes out is that of the served lists."
    copy = tmp_path/"data"
    shutil.copytree(DATA, copy, ignore=shutil.ignore_patterns("testset", "archive"))
    imaginet("data", "perturb", copy, "--size", 32, "--authors-lists", copy/"annotations")
    for name in LIST_NAMES.values(): assert (copy/"testset"/name).read_bytes() == (copy/"annotations"/name).read_bytes()


def test_the_papers_dry_run_names_stages_disk_and_hours():
    text = imaginet("reproduce", "--profile", "paper", "--dry-run")
    for word in ("p30_pretrain", "p51_external", "64,000,000", "hours of computing", "144 GB"): assert word in text, word
    assert re.search(r"p30_pretrain +pretrain +64,000,000 +\d", text)
