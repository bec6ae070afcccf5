# Which notebook reads and writes what. `make reproduce` runs it; by hand:
#   snakemake --cores all --config profile=demo --rerun-incomplete --nolock
#
# A notebook runs again when a file that it reads is newer, when a section of the profile that it uses has
# changed, or when its own text or that of a library module that it imports has changed (compared by content,
# so exporting or cleaning notebooks does not count). A changed colour reruns no model.
import ast
import hashlib
import json
from glob import glob
from pathlib import Path

import yaml

NAME = config.get("profile", "demo")                    # a name in profiles/ or a path to a YAML file
FILE = Path(NAME if str(NAME).endswith((".yaml", ".yml")) else f"profiles/{NAME}.yaml")
SETTINGS = yaml.safe_load(FILE.read_text())
REPORT = f"reports/{SETTINGS['name']}"


def modules_of(source):
    "Library modules that a piece of Python imports."
    nodes = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.ImportFrom) and n.module]
    return {n.module.split(".")[-1] for n in nodes if n.level == 1 or n.module.startswith("imaginet_nb.")}


def code_of(notebook):
    "Hash of a pipeline notebook and of every library module that it imports, directly or not."
    cells = json.loads(Path(f"nbs/pipelines/{notebook}.ipynb").read_text())["cells"]
    text = "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
    todo, seen = modules_of(text), {}
    while todo:
        name = todo.pop()
        seen[name] = Path(f"imaginet_nb/{name}.py").read_text()
        todo |= modules_of(seen[name]) - seen.keys()
    return hashlib.sha256("\n".join([text, *(seen[name] for name in sorted(seen))]).encode()).hexdigest()


def settings(*keys):
    "The part of the profile that a notebook uses, as text: whole sections, or single values such as embedding.images."
    def value(key):
        section, _, name = key.partition(".")
        return SETTINGS[section][name] if name else SETTINGS[section]
    return json.dumps({key: value(key) for key in ("name", "seed", "device", *keys)}, sort_keys=True)


def tables(*names): return [f"{REPORT}/tables/{name}.csv" for name in names]
def figures(*names): return [f"{REPORT}/figures/{name}.png" for name in names]


TRAINING = workflow.cores if SETTINGS["exclusive"] else 1 # cores of a notebook that trains or predicts
RUN = f"imaginet notebook {{rule}} --profile {FILE}"
NOTEBOOK = f"{REPORT}/notebooks/{{}}.ipynb"
IMPORTED = glob(f"{SETTINGS['data']['weights']}/*.safetensors") # weights of other detectors, supplied by the user
MANIFESTS, CHECKPOINTS, PREDICTIONS = (f"{REPORT}/{folder}" for folder in ("manifests", "checkpoints", "predictions"))


rule all:
    input: f"{REPORT}/index.html"


rule p05_data:
    output: NOTEBOOK.format("p05_data"), expand(MANIFESTS + "/{split}.csv", split=["train", "calibration", "test"])
    params: settings=settings("data", "sandbox"), code=code_of("p05_data")
    threads: TRAINING
    shell: RUN


rule p10_dataset:
    input: rules.p05_data.output
    output:
        NOTEBOOK.format("p10_dataset"), figures("zero_pixel", "composition", "file_properties"),
        tables("dataset_features", "dataset_structure", "zero_pixel", "learned_null", "file_properties", "duplicates", "overlap"),
    params: settings=settings("data"), code=code_of("p10_dataset")
    shell: RUN


rule p20_testset:
    input: MANIFESTS + "/test.csv"
    output: NOTEBOOK.format("p20_testset"), MANIFESTS + "/perturbed.csv", tables("grouping_difference")
    params: settings=settings("data"), code=code_of("p20_testset")
    shell: RUN


rule p30_pretrain:
    input: MANIFESTS + "/train.csv"
    output: NOTEBOOK.format("p30_pretrain"), CHECKPOINTS + "/pretrain.safetensors"
    priority: 1 # on the longest way
    params: settings=settings("data", "model", "pretrain"), code=code_of("p30_pretrain")
    threads: TRAINING
    shell: RUN


rule p40_calibrate:
    input: MANIFESTS + "/calibration.csv", CHECKPOINTS + "/pretrain.safetensors"
    output: NOTEBOOK.format("p40_calibrate"), CHECKPOINTS + "/selfcon.safetensors"
    priority: 1 # on the longest way
    params: settings=settings("data", "calibrate"), code=code_of("p40_calibrate")
    threads: TRAINING
    shell: RUN


rule p45_baseline:
    input: MANIFESTS + "/train.csv", MANIFESTS + "/calibration.csv"
    output: NOTEBOOK.format("p45_baseline"), CHECKPOINTS + "/baseline.safetensors"
    priority: 1 # on the longest way
    params: settings=settings("data", "model", "pretrain", "calibrate"), code=code_of("p45_baseline")
    threads: TRAINING
    shell: RUN


rule p46_ablation:
    input: MANIFESTS + "/train.csv", MANIFESTS + "/perturbed.csv"
    output: NOTEBOOK.format("p46_ablation"), PREDICTIONS + "/ablation.csv"
    params: settings=settings("data", "pretrain", "evaluation", "ablation"), code=code_of("p46_ablation")
    threads: TRAINING
    shell: RUN


rule p47_predict:
    input:
        CHECKPOINTS + "/selfcon.safetensors", CHECKPOINTS + "/baseline.safetensors",
        expand(MANIFESTS + "/{split}.csv", split=["train", "test", "perturbed"]), IMPORTED,
    output:
        NOTEBOOK.format("p47_predict"), PREDICTIONS + "/features.npy", PREDICTIONS + "/not_run.json", tables("calibration_overlap"),
        expand(PREDICTIONS + "/{name}.csv", name=["perturbed", "clean", "matched", "calibration", "robustness", "features"]),
    priority: 1 # on the longest way
    params: settings=settings("data", "model.pretrained", "evaluation", "embedding.images", "robustness"), code=code_of("p47_predict")
    threads: TRAINING
    shell: RUN


rule p50_detection:
    input: expand(PREDICTIONS + "/{name}", name=["perturbed.csv", "calibration.csv", "clean.csv", "matched.csv", "not_run.json"])
    output:
        NOTEBOOK.format("p50_detection"), figures("detection_by_family"),
        tables("detection_by_family", "detection_by_content", "detection_by_generator", "score_calibration", "format_matched", "grouping_effect"),
    params: settings=settings("evaluation"), code=code_of("p50_detection")
    shell: RUN


rule p51_external:
    input:
        CHECKPOINTS + "/selfcon.safetensors", CHECKPOINTS + "/baseline.safetensors", MANIFESTS + "/train.csv", PREDICTIONS + "/calibration.csv",
        IMPORTED, glob(f"{SETTINGS['data']['external']}/*/prepared.json"),
    output: NOTEBOOK.format("p51_external"), tables("practical", "corvi", "external_calibration")
    params: settings=settings("data", "evaluation"), code=code_of("p51_external")
    threads: TRAINING
    shell: RUN


rule p52_identification:
    input: PREDICTIONS + "/perturbed.csv", PREDICTIONS + "/clean.csv"
    output: NOTEBOOK.format("p52_identification"), tables("identification"), figures("identification_confusion")
    params: settings=settings("evaluation"), code=code_of("p52_identification")
    shell: RUN


rule p60_embeddings:
    input: PREDICTIONS + "/features.npy", PREDICTIONS + "/features.csv"
    output:
        NOTEBOOK.format("p60_embeddings"), tables("embedding_quality", "umap_points", "relational_autoencoder_points"),
        figures("umap_origin", "umap_family", "umap_content", "umap_format", "relational_autoencoder_origin", "relational_autoencoder_family"),
    priority: 1 # on the longest way
    params: settings=settings("embedding"), code=code_of("p60_embeddings")
    shell: RUN


rule p61_content_ablation:
    input: PREDICTIONS + "/ablation.csv"
    output: NOTEBOOK.format("p61_content_ablation"), tables("content_ablation"), figures("content_ablation")
    params: settings=settings("evaluation"), code=code_of("p61_content_ablation")
    shell: RUN


rule p62_robustness:
    input: PREDICTIONS + "/robustness.csv", PREDICTIONS + "/calibration.csv"
    output:
        NOTEBOOK.format("p62_robustness"), tables("robustness_jpeg", "robustness_resize"),
        figures("robustness_jpeg", "robustness_resize"),
    params: settings=settings("evaluation", "robustness"), code=code_of("p62_robustness")
    shell: RUN


rule p63_speed:
    output: NOTEBOOK.format("p63_speed"), tables("inference_time")
    params: settings=settings("speed"), code=code_of("p63_speed")
    threads: TRAINING # other work beside it would spoil the times
    shell: RUN


rule p90_summary:
    input:
        CHECKPOINTS + "/selfcon.safetensors",
        rules.p10_dataset.output, rules.p50_detection.output, rules.p51_external.output, rules.p52_identification.output,
        rules.p60_embeddings.output, rules.p61_content_ablation.output, rules.p62_robustness.output, rules.p63_speed.output,
    output:
        NOTEBOOK.format("p90_summary"), tables("published_vs_reproduced"),
        expand(REPORT + "/{name}", name=["index.html", "README.md", "data_card.md", "model_card.md"]),
    params: settings=settings("data", "sandbox", "pretrain", "calibrate"), code=code_of("p90_summary")
    shell: RUN
