"What the bootstrap draws, what its intervals cover, and how much memory it takes."
import tracemalloc

import numpy as np
import pytest
from scipy.stats import norm
from sklearn.metrics import recall_score, roc_auc_score

from imaginet_nb.evaluation import bootstrap, metrics


def test_counts_are_those_of_drawing_with_replacement():
    """Each class is drawn as often as it has images; counts have the mean and the covariance of multinomial counts.

    Catches unstratified draws, permutations (variance 0) and Poisson weights (variance 1, sums that vary).
    """
    strata = np.repeat([0, 1, 7], [4, 10, 30])
    np.random.default_rng(0).shuffle(strata)
    counts = np.concatenate(list(bootstrap.resample_counts(strata, 40_000, np.random.default_rng(1))))
    assert counts.shape == (40_000, 44)
    for code, m in ((0, 4), (1, 10), (7, 30)):
        mine = counts[:, strata == code]
        assert (mine.sum(1) == m).all()
        assert mine.mean(0) == pytest.approx(1, abs=0.03) and mine.var(0) == pytest.approx(1 - 1/m, abs=0.05)
        assert np.cov(mine.T)[~np.eye(m, dtype=bool)] == pytest.approx(-1/m, abs=0.04)


def test_values_are_right_when_class_sizes_change_from_resample_to_resample():
    "One stratum for all: catches metrics that divide by the number of images in place of the weights drawn."
    draw = np.random.default_rng(2)
    labels = np.arange(60) % 2 > 0
    scores = np.round(draw.normal(labels), 1)
    statistics = [metrics.auc_statistic(labels, scores), metrics.recall_statistic((scores > 0.5) == labels, labels)]
    fast = bootstrap.bootstrap(np.zeros(60), statistics, 100, np.random.default_rng(5))
    counts = np.concatenate(list(bootstrap.resample_counts(np.zeros(60), 100, np.random.default_rng(5))))
    assert len(set(counts[:, labels].sum(1))) > 5
    for row, auc, recall in zip(counts, *fast, strict=True):
        i = np.repeat(np.arange(60), row.astype(int))
        assert auc == pytest.approx(roc_auc_score(labels[i], scores[i]), abs=1e-12)
        assert recall == pytest.approx(recall_score(labels[i], scores[i] > 0.5), abs=1e-12)


def test_intervals_cover_the_truth():
    """Of 400 simulated test sets, about 95 % have the true value inside their interval, and as many miss it on either side.

    Catches intervals of another level (90 %, 99 %), one-sided ones, and resamples of too few images.
    """
    gap, labels = 1.2, np.arange(240) % 3 > 0
    truth = norm.cdf(gap/np.sqrt(2)), norm.cdf(gap/2)
    below, above = np.zeros(2), np.zeros(2)
    for seed in range(400):
        draw = np.random.default_rng(seed)
        scores = draw.normal(gap*labels) - gap/2
        statistics = [metrics.auc_statistic(labels, scores), metrics.balanced_accuracy_statistic(labels, scores > 0)]
        for k, values in enumerate(bootstrap.bootstrap(labels, statistics, 400, draw)):
            low, high = bootstrap.interval(values)
            below[k] += high < truth[k]
            above[k] += low > truth[k]
    covered = 1 - (below + above)/400
    assert ((0.92 < covered) & (covered < 0.98)).all(), covered
    assert (below > 0).all() and (above > 0).all()


def test_interval_ends_are_the_percentiles():
    assert bootstrap.interval(np.arange(1001)) == pytest.approx((25, 975))
    assert bootstrap.interval(np.arange(1001), level=0.9) == pytest.approx((50, 950))


def test_one_class_stays_undefined_after_resampling():
    "Catches 0, 0.5 or 1 as the value of a metric that has none."
    for labels in (np.ones(5), np.zeros(5)):
        statistics = [metrics.auc_statistic(labels, np.arange(5)), metrics.balanced_accuracy_statistic(labels, labels)]
        values = bootstrap.bootstrap(labels, statistics, 10, np.random.default_rng(0))
        assert np.isnan(values).all() and np.isnan(bootstrap.interval(values[0])).all()


def test_memory_stays_small():
    "40,000 predictions and 1,000 resamples: all weights at once would take 320 MB, and as much again for each step."
    draw, labels = np.random.default_rng(0), np.arange(40_000) % 2
    statistic = metrics.auc_statistic(labels, draw.normal(2.0*labels))
    tracemalloc.start()
    values = bootstrap.bootstrap(labels, [statistic], 1000, draw)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert values.shape == (1, 1000) and peak < 50e6
