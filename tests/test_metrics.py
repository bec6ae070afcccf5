"""Metrics, intervals and score calibration against scikit-learn and plain loops; predictions whatever the batch size and the workers."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import expit
from scipy.stats import norm
from sklearn import metrics as sk
from sklearn.linear_model import LogisticRegression

from imaginet_nb.core import rng
from imaginet_nb.data.corruptions import Perturb
from imaginet_nb.data.images import ImageError, decode, save
from imaginet_nb.data.labels import FAMILIES
from imaginet_nb.detectors.predictions import FAMILY_COLUMNS, embed, load_predictions, predict, save_predictions
from imaginet_nb.detectors.protocol import BASELINE, OURS, Detector
from imaginet_nb.evaluation.bootstrap import bootstrap, interval, resample_counts
from imaginet_nb.evaluation.calibration import calibrated, fit_detector
from imaginet_nb.evaluation.detection import detection_table
from imaginet_nb.evaluation.identification import identification_table
from imaginet_nb.evaluation.metrics import (
    auc_statistic,
    balanced_accuracy_statistic,
    macro_auc_statistic,
    mean_statistic,
    plain_value,
    recall_statistic,
)
from imaginet_nb.evaluation.protocols import as_published, calibration_difference
from imaginet_nb.evaluation.robustness import robustness_table
from imaginet_nb.models.resnet import create_backbone
from imaginet_nb.models.selfcon import ImagiNetClassifier

# --- metrics --------------------------------------------------------------------------------------------------------


def sample(seed: int, digits: int):
    "Labels of both kinds and scores; few digits make many ties."
    draw = np.random.default_rng(seed)
    labels = np.r_[0, 1, draw.random(draw.integers(5, 400)) < draw.uniform(0.05, 0.95)].astype(int)
    return labels, np.round(draw.normal(labels*draw.normal()), digits)


@pytest.mark.parametrize("digits", [0, 1, 15])
@pytest.mark.parametrize("seed", range(15))
def test_auc_and_balanced_accuracy_equal_sklearn(seed, digits):
    labels, scores = sample(seed, digits)
    n = len(labels)
    assert plain_value(auc_statistic(labels, scores), n) == pytest.approx(sk.roc_auc_score(labels, scores), abs=1e-12)
    expected = sk.balanced_accuracy_score(labels, scores > 0.3)
    assert plain_value(balanced_accuracy_statistic(labels, scores > 0.3), n) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("digits", [1, 15])
@pytest.mark.parametrize("seed", range(8))
def test_identification_metrics_equal_sklearn(seed, digits):
    draw = np.random.default_rng(seed)
    families = np.r_[np.arange(4), draw.choice(4, 200, p=[0.5, 0.3, 0.15, 0.05])]
    shares = np.round(draw.dirichlet(np.ones(4), len(families)) + 0.3*np.eye(4)[families], digits)
    shares /= shares.sum(1, keepdims=True)
    by_class = [sk.roc_auc_score(families == k, shares[:, k]) for k in range(4)]
    macro = plain_value(macro_auc_statistic(families, shares), len(families))
    assert macro == pytest.approx(np.mean(by_class), abs=1e-12)
    assert macro == pytest.approx(sk.roc_auc_score(families, shares, multi_class="ovr"), abs=1e-12)
    guess = shares.argmax(1)
    recalls = [plain_value(recall_statistic(guess == families, families == k), len(families)) for k in range(4)]
    np.testing.assert_allclose(recalls, sk.recall_score(families, shares.argmax(1), average=None))


def test_bootstrap_equals_a_plain_loop():
    draw = np.random.default_rng(0)
    family = draw.choice(5, 120)                                            # 4 is real
    labels, scores = (family < 4).astype(int), np.round(draw.normal(family < 4), 1)
    shares = draw.dirichlet(np.ones(4), 120)
    fake = np.flatnonzero(labels)
    statistics = [auc_statistic(labels, scores), balanced_accuracy_statistic(labels, scores > 0.4),
                  mean_statistic([recall_statistic(shares.argmax(1) == family, family == k) for k in range(4)]),
                  lambda w: macro_auc_statistic(family[fake], shares[fake])(w[:, fake])]
    counts = np.concatenate(list(resample_counts(family, 60, np.random.default_rng(7))))
    assert len(np.unique(counts, axis=0)) == 60
    for k in range(5): assert (counts[:, family == k].sum(1) == (family == k).sum()).all()
    expected = []
    for row in counts.astype(int):
        i = np.repeat(np.arange(120), row)
        f = i[labels[i] == 1]
        expected.append([sk.roc_auc_score(labels[i], scores[i]), sk.balanced_accuracy_score(labels[i], scores[i] > 0.4),
                         sk.recall_score(family[f], shares[f].argmax(1), average="macro"),
                         sk.roc_auc_score(family[f], shares[f], multi_class="ovr")])
    np.testing.assert_allclose(bootstrap(family, statistics, 60, np.random.default_rng(7)).T, expected, atol=1e-12)


def test_resampling_is_random_within_a_class():
    "Counts of one image are nearly Poisson: mean 1, variance 1 - 1/m."
    counts = np.concatenate(list(resample_counts(np.repeat([0, 1], [10, 50]), 20_000, np.random.default_rng(0))))
    np.testing.assert_allclose(counts.mean(0), 1, atol=0.04)
    np.testing.assert_allclose(counts[:, :10].var(0), 0.9, atol=0.06)
    np.testing.assert_allclose(counts[:, 10:].var(0), 0.98, atol=0.06)


def test_intervals_cover_the_truth_about_95_times_in_100():
    truth = norm.cdf(0.5), norm.cdf(1/np.sqrt(2))                          # ACC at threshold 0.5, AUC
    inside = np.zeros(2)
    for seed in range(200):
        draw = np.random.default_rng(seed)
        labels = np.repeat([0, 1], [100, 200])
        scores = draw.normal(labels)
        values = bootstrap(labels, [balanced_accuracy_statistic(labels, scores > 0.5), auc_statistic(labels, scores)], 300, draw)
        for i in range(2):
            low, high = interval(values[i])
            inside[i] += low <= truth[i] <= high
    assert ((inside >= 178) & (inside <= 199)).all(), inside


# --- tables ---------------------------------------------------------------------------------------------------------


def table_of_predictions(n: int = 800, seed: int = 0, split: str = "test", slope: float = 1.0) -> pd.DataFrame:
    draw = np.random.default_rng(seed)
    kinds = {"photos": [("GAN", "ProGAN"), ("SD", "SDXL v1.0")], "paintings": [("GAN", "StyleGAN3"), ("SD", "Animagine XL")],
             "faces": [("GAN", "StyleGAN-XL"), ("SD", "SD v2.1")], "uncategorized": [("Midjourney",)*2, ("DALL-E 3",)*2]}
    flat = [(c, f, g) for c, pairs in kinds.items() for f, g in pairs]
    rows = []
    for i in range(n):
        content, family, generator = flat[i//2 % len(flat)]
        if i % 2: family = generator = "real"
        rows.append(dict(path=f"{split}/{i}.png", origin="real" if i % 2 else "synthetic", content_type=content,
                         generator_family=family, generator=generator, split=split))
    frames = []
    for name in (OURS, BASELINE):
        frame = pd.DataFrame(rows).assign(detector=name)
        frame["logit"] = slope*(1.2 + 1.5*frame["origin"].eq("synthetic") + draw.normal(size=n))
        frame["probability"] = expit(frame["logit"])
        shares = draw.dirichlet(np.ones(4), n)
        frame["predicted_family"] = np.array(FAMILIES)[shares.argmax(1)]
        frame[list(FAMILY_COLUMNS)] = shares
        frames.append(frame.assign(error=None))
    return pd.concat(frames, ignore_index=True)


PREDICTIONS, TRAINING = table_of_predictions(), table_of_predictions(400, 1, "train")


def by_sklearn(frame: pd.DataFrame):
    synthetic = frame["origin"] == "synthetic"
    return sk.balanced_accuracy_score(synthetic, frame["probability"] > 0.5), sk.roc_auc_score(synthetic, frame["logit"])


def test_detection_by_content_equals_sklearn():
    table = detection_table(PREDICTIONS, "content", 20, 0).set_index(["detector", "group"])
    for (detector, content), frame in PREDICTIONS.groupby(["detector", "content_type"]):
        assert tuple(table.loc[(detector, content), ["acc", "auc"]]) == pytest.approx(by_sklearn(frame), abs=1e-12)
    rows = table.loc[OURS]
    assert rows.loc["Mean", "acc"] == pytest.approx(rows["acc"][:-1].mean()) and rows.loc["Mean", "n_real"] == 400


def test_the_group_column_decides_which_reals_a_family_is_measured_against():
    one = PREDICTIONS[PREDICTIONS["detector"] == OURS].reset_index(drop=True)
    group = one["generator_family"].where(one["origin"] == "synthetic", "GAN")
    group[one.index[one["origin"] == "real"][:30]] = "SD"
    table = detection_table(one.assign(group=group), "family", 20, 0).set_index(["detector", "group"]).loc[OURS]
    assert tuple(table.loc["SD", ["acc", "auc"]]) == pytest.approx(by_sklearn(one[group == "SD"]), abs=1e-12)
    assert table.loc["SD", "n_real"] == 30
    assert table.loc["Midjourney", "note"] == "no real images" and np.isnan(table.loc["Midjourney", "acc"])
    assert table.loc["Mean", "note"] == "mean of 2 of 4 groups"


def test_tables_do_not_depend_on_the_order_of_rows_and_have_rows_for_what_is_missing():
    shuffled, missing = PREDICTIONS.sample(frac=1, random_state=0), {"Wu2023": "not run: no weights", "Grag2021": "not run", OURS: "ran"}
    for by in ("family", "generator"):
        tables = [detection_table(frame, by, 10, 3, missing=missing) for frame in (PREDICTIONS, shuffled)]
        a, b = (table.set_index(["detector", "group"]).sort_index() for table in tables)
        shown = ["acc", "auc", "n_real", "n_synthetic", "note"]
        pd.testing.assert_frame_equal(a[shown], b[shown])
        assert set(a.index.get_level_values("detector")) == {OURS, BASELINE, "Wu2023", "Grag2021"}
        assert a["acc"].notna()[OURS].all() and set(a.loc[OURS].index) == set(a.loc["Wu2023"].index)
        for name in ("Wu2023", "Grag2021"): assert a.loc[name, "acc"].isna().all() and (a.loc[name, "note"] == missing[name]).all()


def test_all_detectors_are_measured_on_the_same_reals():
    "A damaged file for one detector must not change which reals the other is measured against, nor its own draw."
    same = PREDICTIONS.copy()
    same.loc[same["detector"] == BASELINE, "logit"] = same.loc[same["detector"] == OURS, "logit"].to_numpy()
    same["probability"] = expit(same["logit"])
    victim = same.index[(same["detector"] == BASELINE) & (same["generator"] == "ProGAN")][0]
    same.loc[victim, ["logit", "probability"]], same.loc[victim, "error"] = np.nan, "damaged"
    table = detection_table(same, "generator", 10, 0).set_index(["detector", "group"])
    ours, other = table.loc[OURS], table.loc[BASELINE]
    assert other.loc["ProGAN", "note"] == "1 image could not be scored" and other.loc["ProGAN", "n_synthetic"] == 49
    for column in ("acc", "auc"): assert (ours[column] == other[column]).drop(["ProGAN", "Mean"]).all()
    assert ours["n_real"].drop("Mean").equals(other["n_real"].drop("Mean"))


def test_a_steep_calibration_does_not_tie_the_scores():
    steep = PREDICTIONS.assign(probability=expit(1e4*PREDICTIONS["logit"]))
    normal = detection_table(PREDICTIONS, "content", 5, 0)["auc"]
    pd.testing.assert_series_equal(detection_table(steep, "content", 5, 0)["auc"], normal)
    falling = PREDICTIONS.assign(probability=expit(-PREDICTIONS["logit"]))
    pd.testing.assert_series_equal(detection_table(falling, "content", 5, 0)["auc"], 1 - normal)


def test_identification_and_robustness_equal_sklearn():
    clean = identification_table(PREDICTIONS, "clean", 10, 0).set_index(["detector", "group"])
    fakes = PREDICTIONS[(PREDICTIONS["detector"] == BASELINE) & (PREDICTIONS["origin"] == "synthetic")]
    recall = sk.recall_score(fakes["generator_family"], fakes["predicted_family"], labels=list(FAMILIES), average=None)
    auc = np.mean([sk.roc_auc_score(fakes["generator_family"] == f, fakes[f"p_{f}"]) for f in FAMILIES])
    np.testing.assert_allclose(clean.loc[BASELINE, "acc"], [*recall, recall.mean()])
    assert clean.loc[(BASELINE, "Mean"), "auc"] == pytest.approx(auc)
    point = robustness_table(PREDICTIONS.assign(perturbation="jpeg", value=40), 10, 0).set_index(["detector", "track"])
    assert tuple(point.loc[(BASELINE, "identification"), ["acc", "auc"]]) == pytest.approx((recall.mean(), auc))
    whole = PREDICTIONS[PREDICTIONS["detector"] == BASELINE]
    assert tuple(point.loc[(BASELINE, "detection"), ["acc", "auc"]]) == pytest.approx(by_sklearn(whole))


# --- score calibration ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_calibration_equals_saga(seed):
    frame = table_of_predictions(300, seed)
    frame = frame[frame["detector"] == OURS]
    saga = LogisticRegression(C=1e10, solver="saga", max_iter=100_000, tol=1e-8)
    saga.fit(frame[["logit"]].to_numpy(), frame["origin"] == "synthetic")
    fit = fit_detector(frame)
    assert (fit.slope, fit.intercept) == pytest.approx((saga.coef_[0, 0], saga.intercept_[0]), rel=1e-3)


@pytest.mark.parametrize("factor, shift", [(1e-4, 0), (1e4, 0), (-1, 0), (1, 1e4)])
def test_calibration_is_the_same_in_any_unit(factor, shift):
    plain = calibrated(PREDICTIONS, TRAINING)["probability"]
    other = calibrated(*(f.assign(logit=factor*f["logit"] + shift) for f in (PREDICTIONS, TRAINING)))["probability"]
    np.testing.assert_allclose(other, plain, atol=1e-5)


def test_default_calibration_never_sees_the_test_images():
    with pytest.raises(ValueError, match="both scored and used for the fit"): calibrated(PREDICTIONS, PREDICTIONS)
    wrong = PREDICTIONS.assign(origin=np.where(PREDICTIONS["origin"] == "real", "synthetic", "real"))
    pd.testing.assert_series_equal(calibrated(wrong, TRAINING)["probability"], calibrated(PREDICTIONS, TRAINING)["probability"])
    assert not np.allclose(as_published(PREDICTIONS, 0)["probability"], calibrated(PREDICTIONS, TRAINING)["probability"])


def test_the_difference_table_reports_separable_and_reversed_scores():
    far = [f.assign(logit=-f["origin"].eq("synthetic").astype(float)*10 + 0.1*f["logit"]) for f in (PREDICTIONS, TRAINING)]
    table = calibration_difference(*far, seed=0)
    assert np.isfinite(table[["slope", "intercept"]].to_numpy()).all() and (table["slope"] < 0).all()
    assert table["note"].str.contains("separable").all() and table["note"].str.contains("negative slope").all()
    assert table["images_fitted"].tolist() == [400, 80]*2 and table["auc"].tolist() == [1.0]*4
    with pytest.raises(ValueError, match="needs real and synthetic"):
        fit_detector(TRAINING[(TRAINING["detector"] == OURS) & (TRAINING["origin"] == "real")])


# --- predictions ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    "A dozen images of three sizes and formats, one of them damaged, and their manifest."
    root, draw, rows = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0), []
    for i in range(12):
        path, size = f"folder {i % 2}/{i}.{('png', 'jpg', 'webp')[i % 3]}", [(40, 40), (48, 56), (24, 40)][i % 3 if i != 5 else 0]
        save(draw.integers(0, 256, (*size, 3), dtype=np.uint8), root/path)
        rows.append(dict(path=path, origin="synthetic", content_type="faces", generator_family="GAN", generator="ProGAN", split="test"))
    (root/rows[7]["path"]).write_bytes((root/rows[7]["path"]).read_bytes()[:60])
    return pd.DataFrame(rows), root


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return ImagiNetClassifier(create_backbone("resnet18", width=0.125))


@pytest.mark.parametrize("transform", [None, Perturb(32, None)])
def test_predictions_do_not_depend_on_batches_and_workers(files, network, transform):
    manifest, root = files
    reference = predict(network, manifest, root, transform, batch_size=1, num_workers=0)
    assert reference["path"].tolist() == manifest["path"].tolist()
    assert reference["error"].notna().tolist() == [i == 7 for i in range(12)]
    assert "folder 1/7.jpg" in reference["error"][7] and str(root) not in reference["error"][7]
    assert reference["logit"].drop(7).nunique() == 11 and np.isnan(reference["logit"][7])
    for batch_size, workers in ((5, 0), (64, 0), (4, 2)):
        other = predict(network, manifest, root, transform, batch_size=batch_size, num_workers=workers)
        pd.testing.assert_frame_equal(other, reference, rtol=1e-5, atol=1e-5)


def test_a_prediction_is_what_the_network_says_about_the_transformed_image(files, network):
    manifest, root = files
    transform, row = Perturb(32, None), 4
    image = transform(decode(root/manifest["path"][row]), rng(9, "somewhere", 0, row))
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
    got = predict(network, manifest, root, transform, seed=9, stage="somewhere").loc[row]
    assert got["logit"] == pytest.approx(network.score(pixels).item(), abs=1e-5)
    shares = network.identify(pixels).softmax(1)[0].numpy()
    np.testing.assert_allclose(got[list(FAMILY_COLUMNS)].to_numpy(float), shares, atol=1e-5)
    assert got["predicted_family"] == FAMILIES[shares.argmax()]


def test_features_in_the_order_of_the_manifest(files, network):
    manifest, root = files
    good = manifest.drop(index=7)
    features = embed(network, good, root, Perturb(32, None), batch_size=4, num_workers=2)
    np.testing.assert_allclose(features, embed(network, good, root, Perturb(32, None), batch_size=1, num_workers=0), atol=1e-5)
    assert features.shape == (11, network.backbone.num_features)
    with pytest.raises(ImageError, match="folder 1/7.jpg"): embed(network, manifest, root)


def test_predictions_survive_the_file_exactly(files, network, tmp_path):
    frame = predict(network, *files).assign(value=1/3, group="GAN")
    frame.loc[0, "path"] = "NA"
    save_predictions(frame, tmp_path/"a/b.csv")
    back = load_predictions(tmp_path/"a/b.csv")
    back, frame = (f.astype(object).where(f.notna(), None) for f in (back, frame))
    pd.testing.assert_frame_equal(back, frame, check_exact=True)
    assert [p.name for p in (tmp_path/"a").iterdir()] == ["b.csv"]


def test_networks_keep_the_protocol(network):
    assert isinstance(network, Detector)
    assert not isinstance(torch.nn.Linear(1, 1), Detector)
