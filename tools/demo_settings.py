"""Which settings of the demo fit its ten minutes? Each is trained with both methods and measured on held-out training images.

    python tools/demo_settings.py OUT.csv [SETTING ...]   # tools/demo_settings.csv: what came out on two cores, AVX2, one seed

The test set is not read. A fifth of the training images, stratified by generator, is held out: no method sees it before it is scored.
Rows of settings that OUT.csv holds already are kept.
"""
import sys
import time
from pathlib import Path

import pandas as pd
import torch
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import train_test_split

from imaginet_nb.core import Profile, load_profile, repo_root
from imaginet_nb.data.corruptions import Perturb
from imaginet_nb.data.labels import FAMILIES
from imaginet_nb.data.manifest import read_manifest_csv
from imaginet_nb.detectors.predictions import predict
from imaginet_nb.models.resnet import create_backbone
from imaginet_nb.models.selfcon import ImagiNetClassifier, SelfConNet
from imaginet_nb.training.stages import calibrate, pretrain, pretrain_cross_entropy

LARGE, SMALL = {"crop_size": 48, "image_size": 96}, {"crop_size": 32, "image_size": 64}
SETTINGS: dict[str, dict[str, dict]] = {
    "48 px, width 1/8, 8 epochs": {"data": LARGE, "model": {"width": 0.125}, "pretrain": {"learning_rate": 7e-4}},
    "32 px, width 1/4, 8 epochs": {"data": SMALL, "pretrain": {"learning_rate": 7e-4}},
    "32 px, width 1/4, 8 epochs, learning rate 1.5e-3": {"data": SMALL, "pretrain": {"learning_rate": 1.5e-3}},
    "32 px, width 1/4, 8 epochs, learning rate 3e-3": {"data": SMALL, "pretrain": {"learning_rate": 3e-3}},
}


def changed(profile: Profile, sections: dict[str, dict]) -> Profile:
    "The profile with other values in some sections."
    values = profile.model_dump()
    for name, section in sections.items(): values[name] |= section
    return Profile.model_validate(values)


def trained(method: str, profile: Profile, train: pd.DataFrame, balanced: pd.DataFrame, device: torch.device) -> ImagiNetClassifier:
    "Both stages of a method."
    torch.manual_seed(profile.seed)
    backbone, root = create_backbone(profile.model.name, width=profile.model.width), repo_root()/profile.data.root
    if method == "SelfCon":
        network = SelfConNet(backbone, exit_stage=profile.model.exit_stage, projection_size=profile.model.projection_size)
        pretrain(network, train, root, profile, device)
    else: pretrain_cross_entropy(backbone, train, root, profile, device)
    model = ImagiNetClassifier(backbone, name=method, input_size=profile.data.image_size)
    calibrate(model, balanced, root, profile, device)
    return model


def mean_auc(model: ImagiNetClassifier, images: pd.DataFrame, profile: Profile) -> float:
    "Mean over the families of the AUC against all held-out real images, perturbed like the test set."
    scores = predict(model, images, repo_root()/profile.data.root, Perturb(size=profile.data.image_size, crop_cap=profile.data.crop_cap),
                     stage="settings", batch_size=profile.evaluation.batch_size, seed=profile.seed, num_workers=profile.num_workers)
    real = scores["origin"].eq("real")
    return sum(roc_auc_score(~real[mine], scores["logit"][mine]) for family in FAMILIES
               for mine in [real | scores["generator_family"].eq(family)])/len(FAMILIES)


def main(out: Path, names: list[str]) -> None:
    "Train, measure and write one row after the other."
    demo, device = load_profile("demo"), torch.device("cpu")
    train, balanced = (read_manifest_csv(repo_root()/"reports/demo/manifests"/f"{split}.csv") for split in ("train", "calibration"))
    fit, held_out = train_test_split(train, test_size=0.2, stratify=train["generator"], random_state=demo.seed)
    fit, held_out = fit.sort_index().reset_index(drop=True), held_out.sort_index().reset_index(drop=True)
    balanced = balanced[balanced["path"].isin(fit["path"])].reset_index(drop=True)
    rows = pd.read_csv(out).to_dict("records") if out.exists() else []
    for name in names or SETTINGS:
        if name in {row["setting"] for row in rows}: continue
        profile, row = changed(demo, SETTINGS[name]), {"setting": name}
        for method in ("SelfCon", "Cross-entropy"):
            start = time.process_time()
            model = trained(method, profile, fit, balanced, device)
            row |= {f"{method} CPU s": round(time.process_time() - start), f"{method} AUC": round(mean_auc(model, held_out, profile), 4)}
        rows.append(row)
        pd.DataFrame(rows).to_csv(out, index=False)


if __name__ == "__main__": main(Path(sys.argv[1]), sys.argv[2:])
