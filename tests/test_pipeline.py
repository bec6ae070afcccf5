"""The smoke pipeline, end to end: what it writes, what it does again, what a kill leaves behind."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import forks
import pandas as pd
import pytest
from forks import imaginet, server

from imaginet_nb.apps.plan import estimate
from imaginet_nb.apps.trace import training_hashes
from imaginet_nb.audit.files import read_properties
from imaginet_nb.core import fingerprint, load_profile, repo_root
from imaginet_nb.data.images import decode, save
from imaginet_nb.data.manifest import read_manifest_csv
from imaginet_nb.models.checkpoints import read_header
from imaginet_nb.training.stages import hold_out

ROOT = repo_root()
TABLES = ["dataset_features", "dataset_structure", "detection_by_family", "detection_by_content", "detection_by_generator", "practical",
          "corvi", "inference_time", "identification", "content_ablation", "robustness_jpeg", "robustness_resize",
          "training_history", "family_generalisation", "metadata_baseline", "overlap", "spectra", "corruption_spectra",
          "format_matched", "grouping_effect", "grouping_difference", "published_vs_reproduced", "probabilities", "reliability",
          "operating_points", "robustness_loss", "robustness_shift", "probabilities_perturbed", "operating_points_perturbed", "open_set"]
FIGURES = ["umap_origin", "umap_family", "umap_content", "umap_format", "relational_autoencoder_origin", "relational_autoencoder_family",
           "content_ablation", "robustness_jpeg", "robustness_resize", "reliability", "shifts_detection", "shifts_identification",
           "training_curves", "family_generalisation", "examples", "composition", "metadata_baseline", "file_properties", "spectra",
           "detection_by_family", "detection_errors", "roc", "scores", "detection_confusion", "identification_confusion", "open_set",
           "corruption_spectra"]
DETECTION_COLUMNS = ["detector", "group", "acc", "acc_low", "acc_high", "auc", "auc_low", "auc_high", "n_real", "n_synthetic", "note"]
ENVIRONMENT = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def listed(text: str) -> set[str]:
    "Notebooks in the table of jobs that a dry run prints."
    return set(re.findall(r"^(p\d\d_\w+) +\d+$", text, flags=re.M))


def edited(tmp_path: Path, old: str, new: str, name: str = "smoke") -> Path:
    "Copy of the smoke profile with one edit."
    text = (ROOT/"profiles"/"smoke.yaml").read_text()
    assert old in text
    path = tmp_path/f"{name}.yaml"
    path.write_text(text.replace(old, new))
    return path


@pytest.fixture(scope="module")
def report() -> Path:
    "Everything, once. Its programs and kernels fork: real ones are those of the run that is killed and of tests/test_gpu_run.py."
    forks.reproduce("smoke", force=True)
    return ROOT/"reports"/"smoke"


def test_every_table_has_all_its_forms(report):
    for name in TABLES:
        for suffix in (".csv", ".md", ".tex", ".provenance.json"): assert (report/"tables"/f"{name}{suffix}").stat().st_size > 0
        assert len(pd.read_csv(report/"tables"/f"{name}.csv")) > 0, name
        assert json.loads((report/"tables"/f"{name}.provenance.json").read_text())["profile"] == "smoke"


def test_every_figure_has_all_its_forms(report):
    for name in FIGURES:
        for suffix in (".png", ".pdf", ".provenance.json"): assert (report/"figures"/f"{name}{suffix}").stat().st_size > 0


def test_detection_tables_have_the_promised_columns_and_rows(report):
    for name in ("detection_by_family", "detection_by_content", "detection_by_generator"):
        table = pd.read_csv(report/"tables"/f"{name}.csv")
        assert list(table.columns) == DETECTION_COLUMNS
        run = table[table["detector"].isin(["SelfCon (ours)", "Cross-entropy (baseline)"])]
        assert set(run["detector"]) == {"SelfCon (ours)", "Cross-entropy (baseline)"} and "Mean" in set(run["group"])
        assert run[["acc", "acc_low", "acc_high", "auc"]].notna().all(axis=None)
        assert (run["acc_low"] <= run["acc"]).all() and (run["acc"] <= run["acc_high"]).all()
        nulls = table[table["detector"].str.startswith("Metadata")]
        assert set(nulls["detector"]) == {f"Metadata: {rule}" for rule in ("format", "content", "format+content")}
        assert nulls["acc"].between(0, 1).all() and (table["detector"] == "SelfCon (ours), format-matched, unperturbed").any()
        means = table.set_index(["detector", "group"])[["acc", "auc"]]
        difference = means.loc["difference: SelfCon (ours) − Cross-entropy (baseline)"]
        expected = means.loc["SelfCon (ours)"] - means.loc["Cross-entropy (baseline)"]
        pd.testing.assert_frame_equal(difference, expected.loc[difference.index], atol=2e-4, rtol=0)
        peers = table[table["note"].str.startswith("not run", na=False)]
        assert {"Grag2021", "Corvi2022", "Corvi2022*", "Wu2023", "Linear probe (DINOv2 ViT-S)"} == set(peers["detector"])
        assert peers["acc"].isna().all()


def test_tables_of_other_sets_say_what_they_need(report):
    for name in ("practical", "corvi"):
        notes = pd.read_csv(report/"tables"/f"{name}.csv")["note"]
        assert notes.str.contains(f"imaginet data external {name}").all()


def test_overlap_is_reported_and_only_calibration_lies_in_training(report):
    shared = pd.read_csv(report/"tables"/"overlap.csv").set_index(["a", "b"])["shared"]
    assert {pair for pair, n in shared.items() if n} == {("train", "calibration")}


def test_no_fit_shares_an_image_with_its_evaluation(report):
    """By content, from the outputs alone. Catches a stage 2 that is trained on the images of the score calibration, detectors that are
    calibrated on different images, and thresholds of the open set from images that are stored."""
    train, listed, test = (read_manifest_csv(report/"manifests"/f"{split}.csv") for split in ("train", "calibration", "test"))
    evaluated = ("perturbed", "clean", "matched", "robustness", "grid", "features", "open_set", "ablation", "family_ablation")
    fitted = ("calibration", "known", "probability_selfcon", "probability_baseline")
    predicted = {name: pd.read_csv(report/"predictions"/f"{name}.csv") for name in (*evaluated, *fitted)}
    root, paths = ROOT/"data"/"smoke", pd.concat([train["path"], test["path"]])
    content = read_properties(paths.to_frame(), root).set_index("path")["pixel_hash"]
    assert content.notna().all()
    def images(frame): return set(content[frame["source"] if "source" in frame else frame["path"]])

    scores = set(predicted["calibration"]["path"])
    stage2 = listed[~listed["path"].isin(scores)].reset_index(drop=True)
    assert scores <= set(listed["path"]) and len(scores) == load_profile("smoke").evaluation.calibration_images
    assert predicted["calibration"].groupby("detector")["path"].agg(set).map(scores.__eq__).all()
    for name in ("selfcon", "baseline"): assert set(predicted[f"probability_{name}"]["path"]) == scores
    headers = {name: read_header(report/"checkpoints"/f"{name}.safetensors") for name in ("pretrain", "selfcon", "baseline")}
    trained_on = {name: header["data_hash"] for name, header in headers.items()}
    stage1, _ = hold_out(train, load_profile("smoke").seed)
    assert trained_on == {"pretrain": fingerprint(stage1), "selfcon": fingerprint(stage2), "baseline": fingerprint(stage1, stage2)}
    settings = load_profile("smoke").model_dump() # `imaginet trace` compares with the same hashes
    present = training_hashes(report/"manifests", {"seed": settings["seed"], "settings": settings})
    assert present == {f"{name}.safetensors": digest for name, digest in trained_on.items()}

    fits = {"stage 1": train, "stage 2": stage2, "score calibration": predicted["calibration"], "open set": predicted["known"]}
    for name in evaluated:
        assert images(predicted[name]) <= images(test), name
        for fit, frame in fits.items(): assert not images(predicted[name]) & images(frame), (fit, name)
    small = pd.read_csv(report/"predictions"/"ablation_trained_on.csv").merge(train, on="path", validate="many_to_one")
    networks = {name: set(predicted[name]["detector"]) for name in ("ablation", "family_ablation")}
    assert set(small["detector"]) == set.union(*networks.values()) and len(networks["ablation"]) == 4
    for name, frame in small.groupby("detector"):
        left_out = re.search("(?:^except|, without) (.+)", name)
        labels = set(frame["content_type" if name.startswith("except") else "generator_family"])
        assert not images(frame) & images(test) and (left_out is None or left_out[1] not in labels), name
    assert not images(stage2) & images(predicted["calibration"])
    assert images(predicted["known"]) <= images(stage2) # thresholds come from the images set aside, which are therefore new
    overlap = pd.read_csv(report/"tables"/"calibration_overlap.csv")
    apart = overlap[overlap["a"].eq("score calibration") | overlap["b"].eq("test")]
    assert len(apart) == 5 and not apart["shared"].any() and overlap["by"].eq("content").all()


def test_identification_has_both_settings(report):
    assert set(pd.read_csv(report/"tables"/"identification.csv")["setting"]) == {"perturbed", "clean", "original"}


def test_records_name_the_files_that_results_were_made_from(report):
    "Catches a notebook that forgets them, of which `imaginet trace` can then say nothing. Table 6 is measured: it reads no file."
    records = {path.relative_to(report).as_posix(): json.loads(path.read_text()) for path in report.glob("*/*.provenance.json")}
    without = {name for name, record in records.items() if not record["inputs"]}
    assert len(records) > 50 and without == {"tables/inference_time.provenance.json"}


def test_the_estimate_counts_the_images_that_were_predicted(report):
    "Catches a part of p47 that the hours of `DRYRUN=1` leave out. The score calibration is predicted in p40 and p45."
    table = estimate(load_profile("smoke"), dict.fromkeys(("pretrain", "infer", "ablation"), 1.0)).set_index("notebook")
    names = ("perturbed", "clean", "matched", "robustness", "grid", "features", "open_set")
    assert table.loc["p47_predict", "images"] == sum(len(pd.read_csv(report/"predictions"/f"{name}.csv")) for name in names)


def test_sandbox_numbers_never_stand_under_the_papers(report):
    ledger = pd.read_csv(report/"tables"/"published_vs_reproduced.csv")
    assert ledger["reproduced"].isna().all() and ledger["status"].str.contains("not run").all()
    assert len(ledger) > 200


def test_pages_are_there(report):
    others = {"p49_seed", "p64_seeds", "p95_benchmark"} # `make reproduce SEEDS=2` and `make bench` run these
    steps = {p.stem for p in (ROOT/"nbs"/"pipelines").glob("p*.ipynb")} - others
    assert {p.stem for p in (report/"notebooks").glob("*.html")} == steps
    page = (report/"index.html").read_text()
    assert "stand-in" in page and 'href="data_card.md"' in page and 'href="model_card.md"' in page


def executed_notebooks(report: Path) -> dict[str, dict]:
    paths = [path for path in sorted((report/"notebooks").glob("p??_*.ipynb")) if ".partial" not in path.name]
    return {path.stem: json.loads(path.read_text()) for path in paths}


def outputs_of(notebook: dict) -> list[dict]:
    return [output for cell in notebook["cells"] for output in cell.get("outputs", [])]


def test_executed_notebooks_can_be_committed(report):
    "They are small, and hold no time, folder of this machine, address, warning or progress bar: those of the demo are committed."
    sizes = {path.stem: path.stat().st_size for path in (report/"notebooks").glob("*.ipynb")}
    assert max(sizes.values()) < 250_000 and sum(sizes.values()) < 3_000_000, sizes
    unwanted = (str(ROOT), str(Path.home()), "/tmp/", "site-packages", "ipykernel_", "papermill", "%|")
    for name, notebook in executed_notebooks(report).items():
        text = json.dumps(notebook)
        for part in unwanted: assert part not in text, (name, part)
        assert not re.search(r" at 0x[0-9a-f]{6}|\d{4}-\d\d-\d\d[T ]\d\d:\d\d", text), name
        assert set(notebook["metadata"]) == {"kernelspec", "language_info"} and notebook["metadata"]["language_info"] == {"name": "python"}
        for cell in notebook["cells"]:
            assert set(cell["metadata"]) <= {"tags"}, (name, cell["id"])
            streams = [output.get("name") for output in cell.get("outputs", [])]
            assert "stderr" not in streams, (name, cell["id"])
            assert not any(a == b == "stdout" for a, b in zip(streams, streams[1:], strict=False)), (name, cell["id"])


def test_executed_notebooks_show_their_tables_and_figures(report):
    "A notebook that writes tables shows at least one as HTML and text, and one that writes figures shows each of them."
    for name, notebook in executed_notebooks(report).items():
        made = [json.loads(path.read_text()) for kind in ("tables", "figures") for path in (report/kind).glob("*.provenance.json")]
        figures = [record for record in made if record["stage"] == name and any(file.endswith(".png") for file in record["outputs"])]
        kinds = [set(output.get("data", {})) for output in outputs_of(notebook)]
        assert sum(bool(kind & {"image/png", "image/jpeg"}) for kind in kinds) >= len(figures), name
        assert any({"text/html", "text/plain"} <= kind for kind in kinds), name


def test_a_notebook_that_runs_again_stores_the_same_bytes(report):
    path = report/"notebooks"/"p61_content_ablation.ipynb"
    before, times = path.read_bytes(), {file: file.stat().st_mtime_ns for file in report.rglob("*") if file.is_file()}
    result = imaginet("notebook", "p61_content_ablation", "--profile", "profiles/smoke.yaml", cwd=ROOT)
    assert result.returncode == 0, result.stderr[-2000:]
    assert path.read_bytes() == before
    for file, at in times.items(): os.utime(file, ns=(at, at)) # else what reads its results would be older now


def test_cards_are_of_this_run(report):
    "The numbers and the checkpoint of this profile, and no part left out as not run."
    model, data = (report/"model_card.md").read_text(), (report/"data_card.md").read_text()
    assert read_header(report/"checkpoints"/"selfcon.safetensors")["sha256"] in model
    mean = pd.read_csv(report/"tables"/"detection_by_family.csv").query("detector == 'SelfCon (ours)' and group == 'Mean'")["acc"].iloc[0]
    assert f"{mean:.3f} [" in model and "verdicts on real pictures mean nothing" in model
    assert "Not run" not in model + data and "which the sandbox imitates" in data


def test_probabilities_shifts_and_the_open_set_are_about_both_detectors_and_all_points(report):
    tables = {name: pd.read_csv(report/"tables"/f"{name}.csv") for name in TABLES[-8:]}
    for name in TABLES[-8:-1]: assert set(tables[name]["detector"]) == {"SelfCon (ours)", "Cross-entropy (baseline)"}, name
    assert set(tables["probabilities"]["method"]) == {"none", "temperature", "platt"}
    assert set(tables["probabilities"]["setting"]) == {"perturbed", "clean"}
    assert set(tables["operating_points"]["rate"]) == {"5.0%", "1.0%", "0.1%"}
    kinds = {"jpeg", "webp", "avif", "double_jpeg", "resize", "crop", "blur", "noise", "screenshot"}
    for name in TABLES[-5:-1]: assert set(tables[name]["perturbation"]) == kinds, name
    for name in ("robustness_loss", "robustness_shift"): assert set(tables[name]["track"]) == {"detection", "identification"}
    groups = set(tables["open_set"]["group"])
    assert set(tables["open_set"]["score"]) == {"nearest", "energy"} and {"Midjourney", "DALL-E 3", "Mean"} < groups


def test_a_test_image_under_another_name_ends_the_calibration(report, tmp_path):
    "The list of stage 2 holds copies of test images, saved as another file type: the notebook must stop before any training."
    profile = edited(tmp_path, "name: smoke", "name: smoke-leak", "smoke-leak")
    leak, images = ROOT/"reports"/"smoke-leak", ROOT/"data"/"smoke"
    for folder in ("manifests", "checkpoints"): shutil.copytree(report/folder, leak/folder, dirs_exist_ok=True)
    (leak/"checkpoints"/"selfcon.safetensors").unlink()
    listed, test = (pd.read_csv(leak/"manifests"/f"{split}.csv", keep_default_na=False) for split in ("calibration", "test"))
    copies = test.assign(path=[f"leaked/{i}.png" for i in range(len(test))], split="train")
    for source, copy in zip(test["path"], copies["path"], strict=True): save(decode(images/source), images/copy)
    pd.concat([listed, copies]).to_csv(leak/"manifests"/"calibration.csv", index=False)
    try:
        result = imaginet("notebook", "p40_calibrate", "--profile", profile, cwd=ROOT)
        assert result.returncode != 0 and "has the pixels of the test image" in result.stdout + result.stderr
        assert not (leak/"checkpoints"/"selfcon.safetensors").exists()
    finally:
        shutil.rmtree(leak)
        shutil.rmtree(images/"leaked")


@pytest.fixture
def planned(monkeypatch, capfd) -> Callable[[Path | str], set[str]]:
    "Notebooks that a run would execute: the command in this process, without its estimate of hours, which times steps for seconds."
    monkeypatch.setattr("imaginet_nb.apps.plan.plan_text", lambda profile: "")
    def notebooks(profile: Path | str) -> set[str]:
        forks.reproduce(str(profile), dry_run=True)
        return listed("".join(capfd.readouterr()))
    return notebooks


def test_a_second_run_does_nothing(report, planned):
    assert planned("smoke") == set()


@pytest.mark.parametrize("old, new, expected", [
    ("neighbors: 8", "neighbors: 9", {"p60_embeddings", "p90_summary"}),
    ("grid_images: 8", "grid_images: 12", {"p47_predict", "p50_detection", "p51_external", "p52_identification", "p60_embeddings",
                                           "p62_robustness", "p90_summary"}),
    ("repeats: 2", "repeats: 3", {"p63_speed", "p90_summary"}),
    ("batch_size: 20", "batch_size: 24", {"p40_calibrate", "p45_baseline", "p46_ablation", "p47_predict", "p48_training", "p50_detection",
                                          "p51_external", "p52_identification", "p60_embeddings", "p61_content_ablation",
                                          "p62_robustness", "p90_summary"}),
], ids=["umap", "grid", "speed", "stage 2"])
def test_a_changed_value_runs_just_what_depends_on_it(report, tmp_path, planned, old, new, expected):
    assert planned(edited(tmp_path, old, new)) == expected


def test_one_notebook_runs_by_hand_with_papermill(report, tmp_path):
    words = ["papermill", "nbs/pipelines/p52_identification.ipynb", tmp_path/"out.ipynb", "-p", "profile", "smoke", "--no-progress-bar"]
    result = subprocess.run(words, cwd=ROOT, env={**server(), **ENVIRONMENT}, capture_output=True, text=True) # its kernel forks
    assert result.returncode == 0, result.stderr[-2000:]


def descendants(pid: int) -> list[int]:
    children = [int(c) for c in subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout.split()]
    return [*children, *(d for c in children for d in descendants(c))]


SEEN = ("detection_by_family", "operating_points", "identification", "open_set")
MEASURED = ("inference_time",) # tables of times: no two runs have the same


def test_killed_and_run_again_gives_the_same_tables(report, tmp_path):
    """A run in other folders, killed with -9 while stage 1 trains, then run again, ends with the very same numbers.

    Catches results that depend on time, folder, order or a half-written file; the sandbox is made anew as well.
    """
    profile = edited(tmp_path, "name: smoke", "name: smoke-again", "smoke-again")
    profile.write_text(profile.read_text().replace("root: data/smoke", "root: data/smoke-again"))
    again = ROOT/"reports"/"smoke-again"
    for made in ("notebooks/p63_speed.ipynb", "tables/inference_time.csv"): # of no interest here, and measured alone, before the rest
        (again/made).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(report/made, again/made)
    words = ["imaginet", "reproduce", "--profile", str(profile)]
    environment = {**server(), **ENVIRONMENT} # real programs; their kernels fork, and are killed with what started them
    process = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    resume, limit = again/"checkpoints"/"pretrain.resume.pt", time.monotonic() + 600
    while not resume.exists() and process.poll() is None and time.monotonic() < limit: time.sleep(0.05)
    state, children = resume.exists(), descendants(process.pid)
    process.kill()
    for pid in children: os.kill(pid, signal.SIGKILL)
    process.wait()
    assert state, "stage 1 left no state to go on from"
    killed_in_training = resume.exists() # it is gone if the last epoch ended in between
    # as `imaginet reproduce` calls it, but only as far as the tables of both tracks: the rest reads what these read
    words = ["snakemake", "--cores", "all", "--config", f"profile={profile}", "processes=1", "--nolock", "--rerun-incomplete",
             "--rerun-triggers", "mtime", "params", "input", "--", *(f"{again.relative_to(ROOT)}/tables/{t}.csv" for t in SEEN)]
    result = subprocess.run(words, cwd=ROOT, env={**os.environ, **server()}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    if killed_in_training: assert "continuing after epoch" in (again/"notebooks"/"p30_pretrain.ipynb").read_text()
    made = [path for path in sorted((again/"tables").glob("*.csv")) if path.stem not in MEASURED]
    assert {path.stem for path in made} >= set(SEEN)
    for table in made: assert table.read_bytes() == (report/"tables"/table.name).read_bytes(), table.name
    shutil.rmtree(again)
    shutil.rmtree(ROOT/"data"/"smoke-again")
