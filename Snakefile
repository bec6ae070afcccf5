# Which notebook reads and writes what. `make reproduce` runs it; by hand:
#   snakemake --cores all --config profile=demo --rerun-incomplete --nolock
# Several profiles, separated by commas, are one plan: the points of a sweep run side by side, on this machine or
# on a cluster (cluster/slurm).
#
# A notebook runs again when a file that it reads is newer, when a section of the profile that it uses has
# changed, or when its own text or that of a library module that it imports has changed (compared by content,
# so exporting or cleaning notebooks does not count). A changed colour reruns no model.
import ast
import hashlib
import json
from functools import cache
from glob import glob
from pathlib import Path

from imaginet_nb.core import read_yaml

NAMES = str(config.get("profile", "demo")).split(",")   # each a name in profiles/ or a path to a YAML file
FILES = [Path(name if name.endswith((".yaml", ".yml")) else f"profiles/{name}.yaml") for name in NAMES]
SETTINGS = {path.stem: read_yaml(path) for path in FILES}
SEEDS = int(config.get("seeds", 0))                     # further trainings of both methods, with seeds 1, 2, ...
REPORT = "reports/{profile}"                            # everywhere below, {profile} is the name of one of them


wildcard_constraints:
    profile="|".join(SETTINGS),
    seed=r"\d+",


def imports_of(source, package=()):
    "Files of the library that a piece of Python imports; `package` is the folder that relative imports start from."
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.ImportFrom): continue
        stem = Path(*package[:len(package) + 1 - node.level] if node.level else (), *(node.module or "").split("."))
        for path in (stem.with_suffix(".py"), *((stem/name.name).with_suffix(".py") for name in node.names)):
            if path.parts[0] == "imaginet_nb" and path.is_file(): yield path


@cache # each is imported by most notebooks
def module(path):
    "Text of a file of the library, and the files that it imports."
    text = path.read_text()
    return text, set(imports_of(text, path.parent.parts))


def code_of(notebook):
    "Hash of a pipeline notebook, of every library module that it imports, directly or not, and of the templates of pages."
    cells = json.loads(Path(f"nbs/pipelines/{notebook}.ipynb").read_text())["cells"]
    text = "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
    todo, seen = set(imports_of(text)), {}
    while todo:
        path = todo.pop()
        seen[path], imported = module(path)
        if path.match("reporting/pages.py"): seen |= {file: file.read_text() for file in path.parent.glob("templates/*")}
        todo |= imported - seen.keys()
    return hashlib.sha256("\n".join([text, *(seen[path] for path in sorted(seen))]).encode()).hexdigest()


def settings(*keys):
    "The part of the profile that a notebook uses, as text: whole sections, or single values such as embedding.images."
    def value(profile, key):
        section, _, name = key.partition(".")
        return SETTINGS[profile][section][name] if name else SETTINGS[profile].get(section)
    always = ("name", "seed", "device", "deterministic", "compile") # the last two may be left out of a profile
    return lambda wildcards: json.dumps({key: value(wildcards.profile, key) for key in (*always, *keys)}, sort_keys=True)


def training_threads(wildcards):
    "Cores of a notebook that trains or predicts: all; with a GPU just over half, so that others run beside it, but no second one of these."
    profile = SETTINGS[wildcards.profile]
    if not profile["exclusive"]: return 1
    return workflow.cores//2 + 1 if profile["device"].startswith("cuda") else workflow.cores


def imported(wildcards):
    "Weights of other detectors, supplied by the user."
    return glob(f"{SETTINGS[wildcards.profile]['data']['weights']}/*.safetensors")


def external_sets(wildcards): return glob(f"{SETTINGS[wildcards.profile]['data']['external']}/*/prepared.json")


def tables(*names): return [f"{REPORT}/tables/{name}.csv" for name in names]
def figures(*names): return [f"{REPORT}/figures/{name}.png" for name in names]
def notebook(name): return f"{REPORT}/notebooks/{name}.ipynb"
def every(pattern, **values): return expand(pattern, **values, allow_missing=True) # leaves {profile} alone


# the shell looks up the profile's file: as a parameter of the rules, another spelling of it would run everything again
FILE_OF = " ".join(f"({name}) echo '{path}';;" for name, path in zip(SETTINGS, FILES))
RUN = f"imaginet notebook {{rule}} --profile $(case {{wildcards.profile}} in {FILE_OF} esac)"
TRAIN = f"{RUN} --processes {config.get('processes', 1)}" # of a notebook that several processes can train
MANIFESTS, CHECKPOINTS, PREDICTIONS = (f"{REPORT}/{folder}" for folder in ("manifests", "checkpoints", "predictions"))
SURE = every(PREDICTIONS + "/probability_{name}.csv", name=["selfcon", "baseline"]) # what the probabilities are fitted on
OPEN_SET = every(PREDICTIONS + "/{name}", name=["known.csv", "known.npy", "held_out.npy"]) # of stage 2, and of the images set aside
FITTED = ["evaluation.calibration_images", "evaluation.batch_size", "evaluation.precision"]


rule all:
    input: expand(REPORT + "/index.html", profile=SETTINGS)


rule p05_data:
    output: notebook("p05_data"), every(MANIFESTS + "/{split}.csv", split=["train", "calibration", "test"])
    params: settings=settings("data", "sandbox"), code=code_of("p05_data")
    threads: training_threads
    shell: RUN


rule p10_dataset:
    input: rules.p05_data.output
    output:
        notebook("p10_dataset"), tables("dataset_features", "dataset_structure"),
        figures("examples", "metadata_baseline", "composition", "file_properties", "spectra"),
        tables("metadata_baseline", "metadata_classifier", "file_properties", "duplicates", "overlap", "spectra"),
    params: settings=settings("data"), code=code_of("p10_dataset")
    shell: RUN


rule p20_testset:
    input: MANIFESTS + "/test.csv"
    output: notebook("p20_testset"), MANIFESTS + "/perturbed.csv", tables("grouping_difference")
    params: settings=settings("data"), code=code_of("p20_testset")
    shell: RUN


rule p30_pretrain:
    input: MANIFESTS + "/train.csv"
    output: notebook("p30_pretrain"), CHECKPOINTS + "/pretrain.safetensors"
    priority: 1 # on the longest way
    params: settings=settings("data", "model", "pretrain"), code=code_of("p30_pretrain")
    threads: training_threads
    shell: TRAIN


rule p40_calibrate:
    input: every(MANIFESTS + "/{split}.csv", split=["calibration", "test"]), CHECKPOINTS + "/pretrain.safetensors"
    output: notebook("p40_calibrate"), CHECKPOINTS + "/selfcon.safetensors", OPEN_SET, PREDICTIONS + "/probability_selfcon.csv"
    priority: 1 # on the longest way
    params: settings=settings("data", "calibrate", *FITTED), code=code_of("p40_calibrate")
    threads: training_threads
    shell: TRAIN


rule p45_baseline:
    input: every(MANIFESTS + "/{split}.csv", split=["train", "calibration", "test"])
    output: notebook("p45_baseline"), CHECKPOINTS + "/baseline.safetensors", PREDICTIONS + "/probability_baseline.csv"
    priority: 1 # on the longest way
    params: settings=settings("data", "model", "pretrain", "calibrate", *FITTED), code=code_of("p45_baseline")
    threads: training_threads
    shell: TRAIN


rule p46_ablation:
    input: MANIFESTS + "/train.csv", MANIFESTS + "/perturbed.csv"
    output: notebook("p46_ablation"), every(PREDICTIONS + "/{name}.csv", name=["ablation", "family_ablation", "ablation_trained_on"])
    priority: 1 # fourteen networks: begun late, it would end alone
    params: settings=settings("data", "model", "pretrain", "calibrate", "evaluation", "ablation", "generalisation"), code=code_of("p46_ablation")
    threads: training_threads
    shell: RUN


rule p47_predict:
    input:
        CHECKPOINTS + "/selfcon.safetensors", CHECKPOINTS + "/baseline.safetensors", SURE,
        every(MANIFESTS + "/{split}.csv", split=["train", "calibration", "test", "perturbed"]), imported,
    output:
        notebook("p47_predict"), PREDICTIONS + "/not_run.json", tables("calibration_overlap"),
        every(PREDICTIONS + "/{name}.npy", name=["features", "open_set"]),
        every(PREDICTIONS + "/{name}.csv", name=["perturbed", "clean", "matched", "calibration", "robustness", "grid", "features", "open_set"]),
    priority: 1 # on the longest way
    params: settings=settings("data", "model.pretrained", "evaluation", "embedding.images", "robustness"), code=code_of("p47_predict")
    threads: training_threads
    shell: RUN


rule p48_training:
    input: every(CHECKPOINTS + "/{name}.safetensors", name=["pretrain", "selfcon", "baseline"])
    output: notebook("p48_training"), tables("training_history"), figures("training_curves")
    params: settings=settings("pretrain", "calibrate"), code=code_of("p48_training")
    shell: RUN


rule p49_seed: # once for each of SEEDS
    input: every(MANIFESTS + "/{split}.csv", split=["train", "calibration", "perturbed"])
    output: REPORT + "/notebooks/p49_seed_{seed}.ipynb", PREDICTIONS + "/seed_{seed}.csv"
    params: settings=settings("data", "model", "pretrain", "calibrate", "evaluation"), code=code_of("p49_seed")
    threads: training_threads
    shell: RUN + " --seed {wildcards.seed}"


rule p50_detection:
    input: every(PREDICTIONS + "/{name}", name=["perturbed.csv", "calibration.csv", "clean.csv", "matched.csv", "not_run.json"])
    output:
        notebook("p50_detection"), tables("probabilities", "reliability", "operating_points"),
        figures("detection_by_family", "detection_errors", "reliability", "roc", "scores", "detection_confusion"),
        tables("detection_by_family", "detection_by_content", "detection_by_generator", "score_calibration", "format_matched", "grouping_effect"),
    params: settings=settings("data", "evaluation"), code=code_of("p50_detection")
    shell: RUN


rule p51_external:
    input:
        CHECKPOINTS + "/selfcon.safetensors", CHECKPOINTS + "/baseline.safetensors", MANIFESTS + "/train.csv", PREDICTIONS + "/calibration.csv",
        imported, external_sets,
    output: notebook("p51_external"), tables("practical", "corvi", "external_calibration")
    params: settings=settings("data", "evaluation"), code=code_of("p51_external")
    threads: lambda wildcards: training_threads(wildcards) if external_sets(wildcards) else 1 # nothing to predict
    shell: RUN


rule p52_identification:
    input:
        every(PREDICTIONS + "/{name}.csv", name=["perturbed", "clean", "features", "open_set"]), SURE, OPEN_SET,
        every(PREDICTIONS + "/{name}.npy", name=["features", "open_set"]),
    output: notebook("p52_identification"), tables("identification", "open_set"), figures("identification_confusion", "open_set")
    params: settings=settings("evaluation"), code=code_of("p52_identification")
    shell: RUN


rule p60_embeddings:
    input: PREDICTIONS + "/features.npy", PREDICTIONS + "/features.csv"
    output:
        notebook("p60_embeddings"), tables("embedding_quality", "umap_points", "relational_autoencoder_points"),
        figures("umap_origin", "umap_family", "umap_content", "umap_format", "relational_autoencoder_origin", "relational_autoencoder_family"),
    priority: 1 # on the longest way
    params: settings=settings("embedding"), code=code_of("p60_embeddings")
    shell: RUN


rule p61_content_ablation:
    input: every(PREDICTIONS + "/{name}.csv", name=["ablation", "family_ablation"])
    output:
        notebook("p61_content_ablation"), tables("content_ablation", "family_generalisation"),
        figures("content_ablation", "family_generalisation"),
    params: settings=settings("evaluation"), code=code_of("p61_content_ablation")
    shell: RUN


rule p62_robustness:
    input: every(PREDICTIONS + "/{name}.csv", name=["robustness", "grid", "clean", "calibration"])
    output:
        notebook("p62_robustness"), tables("robustness_jpeg", "robustness_resize", "robustness_loss", "robustness_shift"),
        tables("probabilities_perturbed", "operating_points_perturbed"), PREDICTIONS + "/shifts.csv",
        tables("corruption_spectra"), figures("corruption_spectra"),
        figures("robustness_jpeg", "robustness_resize", "shifts_detection", "shifts_identification"),
    params: settings=settings("data", "evaluation", "robustness"), code=code_of("p62_robustness")
    shell: RUN


rule p63_speed:
    output: notebook("p63_speed"), tables("inference_time")
    params: settings=settings("speed"), code=code_of("p63_speed")
    threads: workflow.cores # other work would spoil the times
    shell: RUN


rule p64_seeds:
    input: every(PREDICTIONS + "/seed_{seed}.csv", seed=range(1, SEEDS + 1))
    output: notebook("p64_seeds"), tables("seeds"), figures("seeds")
    params: settings=settings("evaluation"), code=code_of("p64_seeds")
    shell: f"{RUN} --seeds {SEEDS}"


rule p90_summary:
    input:
        rules.p64_seeds.output if SEEDS else [],
        CHECKPOINTS + "/selfcon.safetensors",
        rules.p10_dataset.output, rules.p48_training.output, rules.p50_detection.output, rules.p51_external.output, rules.p52_identification.output,
        rules.p60_embeddings.output, rules.p61_content_ablation.output, rules.p62_robustness.output, rules.p63_speed.output,
    output:
        notebook("p90_summary"), tables("published_vs_reproduced"),
        every(REPORT + "/{name}", name=["index.html", "README.md", "data_card.md", "model_card.md"]),
    params: settings=settings("data", "sandbox", "pretrain", "calibrate"), code=code_of("p90_summary")
    shell: RUN
