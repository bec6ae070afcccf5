"""Probabilities, operating points, bias against robustness, open set: against other implementations, and what must be refused."""
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import expit
from sklearn import metrics as sk
from sklearn.calibration import calibration_curve

from imaginet_nb.data.corruptions import grid_points, grid_transform
from imaginet_nb.data.images import save
from imaginet_nb.data.labels import FAMILIES
from imaginet_nb.detectors.predictions import FAMILY_COLUMNS, predict
from imaginet_nb.detectors.protocol import BASELINE, OURS
from imaginet_nb.evaluation.bootstrap import resample_counts
from imaginet_nb.evaluation.calibration import calibrated_probability, calibration_of, fit_all, fit_calibration, fit_line, threshold_at
from imaginet_nb.evaluation.metrics import ece_statistic, eer_statistic, equal_mass_bins, tpr_at_fpr_statistic
from imaginet_nb.evaluation.open_set import KNOWN, fit_nearest_known, leave_one_generator_out, open_set_header, open_set_of
from imaginet_nb.evaluation.probabilities import operating_table, probability_table, reliability_bins
from imaginet_nb.evaluation.robustness import image_shifts, loss_table, over_grid, shift_table
from imaginet_nb.models.checkpoints import CheckpointError, load_detector, save_checkpoint
from imaginet_nb.models.resnet import create_backbone
from imaginet_nb.models.selfcon import ImagiNetClassifier


def made_up(seed: int, split: str, n: int = 400) -> pd.DataFrame:
    "Two detectors, both tracks."
    draw = np.random.default_rng(seed)
    family = np.where(np.arange(n) % 2, np.array(FAMILIES)[np.arange(n)//2 % 4], "real")
    synthetic, frames = family != "real", []
    for name, distance in ((OURS, 2.0), (BASELINE, 1.0)):
        shares = draw.dirichlet(np.ones(4), n) + 0.6*np.stack([family == f for f in FAMILIES], 1)
        shares /= shares.sum(1, keepdims=True)
        frames.append(pd.DataFrame(dict(
            path=[f"{split}/{i}.png" for i in range(n)], origin=np.where(synthetic, "synthetic", "real"), content_type="photos",
            generator_family=family, generator=family, split=split, detector=name, logit=0.7 + draw.normal(size=n) + distance*synthetic,
            probability=0.5, predicted_family=np.array(FAMILIES)[shares.argmax(1)], error=None,
            **dict(zip(FAMILY_COLUMNS, shares.T, strict=True)))))
    return pd.concat(frames, ignore_index=True)


# --- metrics --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("digits", [0, 1, 15])
@pytest.mark.parametrize("seed", range(6))
def test_operating_points_of_resamples_equal_the_weighted_curve_of_sklearn(seed, digits):
    "Catches a threshold on the wrong side of a tie, and weights that count images instead of draws."
    draw = np.random.default_rng(seed)
    labels = np.r_[0, 1, draw.random(150) < 0.4].astype(int)
    scores = np.round(draw.normal(1.5*labels), digits)
    weights = np.concatenate(list(resample_counts(labels, 8, draw)))
    for row in weights:
        fpr, tpr, _ = sk.roc_curve(labels, scores, sample_weight=row, drop_intermediate=False)
        for rate in (0.02, 0.05, 0.3):
            found = tpr_at_fpr_statistic(labels, scores, rate)(row[None])[0]
            assert found == pytest.approx(tpr[fpr <= rate + 1e-9].max(), abs=1e-12)
        k = int((1 - tpr - fpr <= 1e-12).argmax())
        d = 1 - tpr[k - 1:k + 1] - fpr[k - 1:k + 1]
        crossing = fpr[k - 1] + (fpr[k] - fpr[k - 1])*d[0]/(d[0] - d[1])
        assert eer_statistic(labels, scores)(row[None])[0] == pytest.approx(crossing, abs=1e-9)


def test_ece_equals_a_plain_loop_for_any_weights():
    draw = np.random.default_rng(0)
    p = np.round(draw.random(300), 2)
    labels = (draw.random(300) < p**2).astype(int)
    weights = np.concatenate(list(resample_counts(labels, 5, draw)))
    codes = equal_mass_bins(p, 8)
    assert np.bincount(codes).min() > 25 and all(len(set(codes[p == value])) == 1 for value in np.unique(p))
    for row, found in zip(weights, ece_statistic(labels, p, 8)(weights), strict=True):
        i = np.repeat(np.arange(300), row.astype(int))
        gaps = [abs(labels[i][codes[i] == c].mean() - p[i][codes[i] == c].mean())*(codes[i] == c).mean() for c in np.unique(codes[i])]
        assert found == pytest.approx(sum(gaps), abs=1e-12)


# --- probabilities --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method, free", [("temperature", 1), ("platt", 2)])
def test_fits_minimise_the_likelihood_loss(method, free):
    draw = np.random.default_rng(3)
    synthetic = draw.random(300) < 0.5
    logit = 5*draw.normal(synthetic) + 3
    def loss(line): return np.logaddexp(0, np.where(synthetic, -1, 1)*(line[0]*logit + (line[1] if free == 2 else 0))).mean()
    best = minimize(loss, [0.1, 0.0][:free], method="Nelder-Mead", options=dict(xatol=1e-9, fatol=1e-13, maxiter=5000))
    found = fit_line(logit, synthetic, method)
    assert loss(found) == pytest.approx(best.fun, abs=1e-8)
    np.testing.assert_allclose(found[:free], best.x, rtol=1e-3)


@pytest.mark.parametrize("n", [19, 100, 250])
def test_a_threshold_keeps_its_rate_on_images_to_come(n):
    "On average over calibration sets never above the rate; a plain quantile of few scores is."
    draw = np.random.default_rng(n)
    kept = [np.mean(draw.standard_t(2, size=300) > threshold_at(draw.standard_t(2, size=n), 0.05)) for _ in range(600)]
    assert 0.05 - 1.5/(n + 1) < np.mean(kept) < 0.053


def test_reliability_equals_sklearn():
    test, fits = made_up(0, "test"), fit_all(made_up(1, "train"))
    bins = reliability_bins(test, fits, "clean", ("platt",), bins=8)
    for name, rows in bins.groupby("detector"):
        frame = test[test["detector"] == name]
        p = fits[name]["platt"].probability(frame["logit"])
        share, mean = calibration_curve(frame["origin"] == "synthetic", p, n_bins=8, strategy="quantile")
        np.testing.assert_allclose(rows["share_synthetic"], share, atol=0.03) # its bins are half-open on the other side
        np.testing.assert_allclose(rows["mean_probability"], mean, atol=0.01)


def test_probabilities_and_thresholds_come_from_the_other_images_only():
    "The tested images may change at will: slope, thresholds and what they accuse stay. Catches a fit on the test set."
    fits, test = fit_all(made_up(1, "train")), made_up(0, "test")
    moved = test.assign(logit=test["logit"] - 100)
    table = operating_table(moved, fits, "moved", 20, 0)
    assert (table.loc[table["rate"] != "0.1%", ["empirical_fpr", "empirical_tpr"]] == 0).all(axis=None)
    worth = probability_table(moved, fits, "moved", 20, 0, ("platt",))
    assert (worth["acc"] == 0.5).all() and worth["note"].str.startswith("0.5 is a bad threshold").all()
    np.testing.assert_allclose(worth["eer"], probability_table(test, fits, "as it is", 20, 0, ("platt",))["eer"], atol=1e-12)


def test_grid_tables_are_the_tables_of_their_points():
    fits, test = fit_all(made_up(1, "train")), made_up(0, "test")
    grid = pd.concat([test.assign(perturbation="blur", value=v, logit=test["logit"]*s) for v, s in ((3, 1.0), (7, 0.5))])
    table = over_grid(lambda p, s: probability_table(p, fits, s, 20, 0), grid)
    alone = probability_table(grid[grid["value"] == 7], fits, "", 20, 0)
    there = table[table["value"] == 7].drop(columns=["perturbation", "value"]).reset_index(drop=True)
    pd.testing.assert_frame_equal(there, alone.drop(columns="setting"))


# --- bias and robustness --------------------------------------------------------------------------------------------


def test_the_split_of_a_loss_equals_a_plain_computation():
    "Both tracks, unequal classes, a shift that differs from image to image."
    clean, fits, draw = made_up(0, "test"), fit_all(made_up(1, "train")), np.random.default_rng(5)
    shares = clean[list(FAMILY_COLUMNS)].to_numpy()*draw.gamma(2, size=(len(clean), 4))*[3, 1, 1, 0.5]
    shares /= shares.sum(1, keepdims=True)
    after = clean.assign(logit=clean["logit"] - 1 + draw.normal(size=len(clean)), perturbation="jpeg", value=40,
                         **dict(zip(FAMILY_COLUMNS, shares.T, strict=True)))
    after = after[~after["path"].isin([f"test/{i}.png" for i in range(0, 120, 2)])].sample(frac=1, random_state=0)
    table = loss_table(clean, after, fits, 20, 0).set_index(["track", "detector"])
    for name in (OURS, BASELINE):
        a = after[after["detector"] == name].set_index("path")
        b = clean[clean["detector"] == name].set_index("path").loc[a.index]
        real, fit = a["origin"].eq("real"), fits[name]["platt"]
        z0, z1 = fit.log_odds(b["logit"]), fit.log_odds(a["logit"])
        def acc(z, real=real): return ((z[real] <= 0).mean() + (z[~real] > 0).mean())/2
        common = ((z1 - z0)[real].mean() + (z1 - z0)[~real].mean())/2
        row = table.loc[("detection", name)]
        expected = [acc(z0), acc(z1), acc(z1 - common) - acc(z1), acc(z0) - acc(z1 - common)]
        np.testing.assert_allclose(row[["acc_clean", "acc", "bias", "robustness"]].to_numpy(float), expected, atol=1e-12)
        a, b = a[~real], b[~real]
        l0, l1 = (np.log(x[list(FAMILY_COLUMNS)].to_numpy()) for x in (b, a))
        truth = a["generator_family"].map(dict(zip(FAMILIES, range(4), strict=True))).to_numpy()
        common = np.mean([(l1 - l0)[truth == k].mean(0) for k in range(4)], axis=0)
        def recall(z, truth=truth): return np.mean([(z.argmax(1) == truth)[truth == k].mean() for k in range(4)])
        row = table.loc[("identification", name)]
        expected = [recall(l0), recall(l1), recall(l1 - common) - recall(l1), recall(l0) - recall(l1 - common)]
        np.testing.assert_allclose(row[["acc_clean", "acc", "bias", "robustness"]].to_numpy(float), expected, atol=1e-12)


def test_what_changes_nothing_shifts_and_loses_exactly_nothing():
    "Catches images that are not paired with themselves: rows are shuffled."
    clean, fits = made_up(0, "test"), fit_all(made_up(1, "train"))
    same = clean.sample(frac=1, random_state=1).assign(perturbation="noise", value=0)
    shifts = image_shifts(clean, same, fits)
    assert (shifts["shift"] == 0).all() and (shifts["own_shift"].dropna() == 0).all()
    assert (shift_table(shifts, 20, 0)[["shift", "shift_low", "shift_high"]] == 0).all(axis=None)
    columns = [f"{name}{end}" for name in ("loss", "bias", "robustness") for end in ("", "_low", "_high")]
    assert (loss_table(clean, same, fits, 20, 0)[columns] == 0).all(axis=None)


def test_every_point_of_the_grid_is_the_same_for_any_batch_and_order(tmp_path):
    "Noise belongs to the image; the codecs have no memory."
    draw = np.random.default_rng(0)
    for i in range(5): save(draw.integers(0, 256, (60, 70, 3)).astype(np.uint8), tmp_path/f"{i}.png")
    listed = pd.DataFrame(dict(path=[f"{i}.png" for i in range(5)], origin="real", content_type="photos", generator_family="real",
                               generator="real", split="test"))
    class Sum:
        name, input_size = "sum", None
        def score(self, images): return (images.double()*torch.arange(images[0].numel()).reshape(images.shape[1:])).mean((1, 2, 3)).float()
    for kind, value in grid_points():
        transform = grid_transform(kind, value, 32)
        one, all_ = (predict(Sum(), listed, tmp_path, transform, batch_size=b, stage=kind, num_workers=0)["logit"] for b in (1, 5))
        assert one.equals(all_) and one.nunique() == 5, (kind, value)


# --- kept in the checkpoint, and the open set -----------------------------------------------------------------------


def test_what_was_fitted_travels_with_the_checkpoint_and_is_protected_by_its_checksum(tmp_path):
    torch.manual_seed(0)
    network, draw = ImagiNetClassifier(create_backbone("resnet18", width=0.125)), np.random.default_rng(0)
    logit, synthetic = draw.normal(size=240), np.arange(240) % 2 == 1
    probability = fit_calibration(logit + synthetic, synthetic, data="f"*64)
    features = draw.normal(size=(240, 8)).astype(np.float32)
    nearest, path = fit_nearest_known(features[:120], features[120:]), tmp_path/"a.safetensors"
    header = save_checkpoint(network, path, probability=probability.header(), open_set=open_set_header(nearest, ["ProGAN"]),
                             extra={KNOWN: torch.from_numpy(nearest.known)})
    assert header["probability"]["thresholds"].keys() == {"0.05", "0.01", "0.001"} and header["probability"]["thresholds"]["0.001"] is None
    detector, new = load_detector(path), draw.normal(size=(50, 8))
    assert calibration_of(detector) == probability
    np.testing.assert_array_equal(calibrated_probability(detector, logit), expit(probability.slope*logit + probability.intercept))
    np.testing.assert_array_equal(open_set_of(detector).unknown(new), nearest.unknown(new))
    content = path.read_bytes()
    place = content.index(nearest.known.tobytes())
    damaged = bytearray(content)
    damaged[place + 40] ^= 1
    (tmp_path/"b.safetensors").write_bytes(damaged)
    with pytest.raises(CheckpointError, match="checksum"): load_detector(tmp_path/"b.safetensors")
    renamed = content.replace(b"extra.known_features", b"extra.other_features")
    (tmp_path/"c.safetensors").write_bytes(renamed)
    with pytest.raises(CheckpointError, match="checksum"): load_detector(tmp_path/"c.safetensors")


def test_a_detector_without_calibration_gives_the_plain_sigmoid(tmp_path):
    save_checkpoint(ImagiNetClassifier(create_backbone("resnet18", width=0.125)), tmp_path/"a.safetensors")
    for detector in (load_detector(tmp_path/"a.safetensors"), SimpleNamespace(name="somebody else's")):
        np.testing.assert_array_equal(calibrated_probability(detector, [-1.0, 0, 2]), expit([-1.0, 0, 2]))
        assert open_set_of(detector) is None


def test_open_set_distances_and_auroc_equal_a_plain_computation():
    "Catches a left-out generator that stays in what is known, and unknown images among those whose family counts."
    draw = np.random.default_rng(0)
    generators = ["ProGAN", "StyleGAN3", "SD v2.1", "Midjourney"]
    families = dict(zip(generators, ["GAN", "GAN", "SD", "Midjourney"], strict=True))
    centres = 2*draw.normal(size=(4, 6))
    def sample(n):
        code = np.repeat(np.arange(4), n)
        rows = pd.DataFrame(dict(generator=np.array(generators)[code])).assign(generator_family=lambda f: f["generator"].map(families))
        return (centres[code] + draw.normal(size=(4*n, 6))).astype(np.float32)*[1, 10, 1, 1, 0.1, 1], rows
    (known, train), (held_out, held), (features, test) = sample(30), sample(25), sample(20)
    table = leave_one_generator_out(known, train, held_out, held, features, test, "made up", 20, 0)
    table = table.query("score == 'nearest'").set_index("group")
    for generator in generators:
        stay = known[train["generator"] != generator].astype(np.float32).astype(float)
        a, b = ((x - stay.mean(0))/stay.std(0) for x in (stay, features.astype(float)))
        near = np.sort(np.linalg.norm(b[:, None] - a[None], axis=2), axis=1)[:, :5].mean(1)
        unknown = test["generator"] == generator
        row = table.loc[generator]
        assert row["auroc"] == pytest.approx(sk.roc_auc_score(unknown, near), abs=1e-9)
        c = (held_out[held["generator"] != generator].astype(float) - stay.mean(0))/stay.std(0)
        own = np.sort(np.linalg.norm(c[:, None] - a[None], axis=2), axis=1)[:, :5].mean(1)
        threshold = np.sort(own)[int(np.ceil(76*0.95)) - 1]
        rates = (near[~unknown] > threshold).mean(), (near[unknown] > threshold).mean()
        assert (row["false_alarm"], row["caught"]) == pytest.approx(rates)
        assert (row["n_known"], row["n_unknown"]) == (60, 20)
    assert table.loc["Midjourney", "family_known"] == "no" and table.loc["ProGAN", "family_known"] == "yes"
