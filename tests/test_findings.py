"""Main findings at the top of a report: other numbers in its tables must turn the sentences round."""
import pandas as pd
import pytest

from imaginet_nb.apps.cards import findings
from imaginet_nb.core import load_profile
from imaginet_nb.detectors.protocol import DETECTORS
from imaginet_nb.evaluation.detection import difference_name
from imaginet_nb.reporting.tables import save_table

OURS, BASELINE = DETECTORS
KINDS = ("perturbed", "clean")


def answers(folder, gap=(-0.03, 0.04), rule=(0.9, 0.95), fpr=(0.08, 0.15), seeds=None, groups=None) -> dict[str, str]:
    "Question -> answer, for a report with these intervals of the difference, of the best baseline and of the false-positive rate."
    def row(name, low, high):
        return dict(detector=name, group="Mean", note="") | {m + end: x for m in ("acc", "auc")
                                                             for end, x in (("", (low + high)/2), ("_low", low), ("_high", high))}
    rows = [row(OURS, 0.7, 0.8), row(BASELINE, 0.68, 0.78), row(difference_name(), *gap), row("Metadata: format", *rule),
            row("Metadata: content", 0.45, 0.55)]
    save_table(pd.DataFrame(rows), folder/"tables"/"detection_by_family", "Made up.")
    for by, gaps in (groups or {}).items(): # group -> interval of the difference
        table = pd.DataFrame([row(difference_name(), *ends) | dict(group=group) for group, ends in gaps.items()])
        if by == "family": table = pd.concat([pd.DataFrame(rows), table])
        save_table(table, folder/"tables"/f"detection_by_{by}", "Made up.")
    rates = dict(empirical_fpr=sum(fpr)/2, empirical_fpr_low=fpr[0], empirical_fpr_high=fpr[1],
                 empirical_tpr=0.5, empirical_tpr_low=0.4, empirical_tpr_high=0.6)
    points = [dict(detector=name, setting=kind, rate="5.0%", threshold=0.7, **rates, n_real=200, n_synthetic=200)
              for kind in KINDS for name in DETECTORS]
    save_table(pd.DataFrame(points), folder/"tables"/"operating_points", "Made up.")
    if seeds is not None:
        runs = [dict(detector=difference_name(), seed=str(i), group="Mean", acc=gap, auc=gap) for i, gap in enumerate(seeds)]
        save_table(pd.DataFrame(runs), folder/"tables"/"seeds", "Made up.")
    return dict(findings(folder, load_profile("demo")))


@pytest.mark.parametrize(("gap", "told"), [
    ((0.01, 0.04), f"{OURS} is better than {BASELINE}"), ((-0.04, -0.01), f"{OURS} is worse than {BASELINE}"),
    ((-0.03, 0.04), "are not distinguishable at this sample size")])
def test_the_paired_interval_decides_which_detector_is_better(tmp_path, gap, told):
    "Not the two estimates: those of the detectors are the same in all three cases."
    answer = answers(tmp_path, gap=gap)["Which detector is better?"]
    assert answer.count(told) == 2 and f"{gap[0]:+.3f} to {gap[1]:+.3f}" in answer # ACC and AUC


def test_single_rows_that_tell_the_detectors_apart_stand_beside_the_mean(tmp_path):
    question = "Which detector is better?"
    groups = {"family": {"GAN": (-0.08, -0.02), "SD": (-0.01, 0.02)}, "generator": {"SDXL": (0.02, 0.04), "Mean": (-0.05, -0.01)}}
    told = answers(tmp_path, groups=groups)[question]
    assert "4 of 6 intervals exclude 0" in told and "by family: ACC GAN -0.050, AUC GAN -0.050;" in told
    assert "by generator: ACC SDXL +0.030, AUC SDXL" in told and "SD " not in told and "by content" not in told
    assert "ACC by generator -0.030 [-0.050, -0.010]" in told # means stand with the means of the other tables
    assert "Single groups" not in answers(tmp_path/"other", gap=(0.01, 0.04))[question]


@pytest.mark.parametrize(("rule", "told"), [
    ((0.9, 0.95), "more accurate than any of our detectors"), ((0.5, 0.6), "Our best detector is more accurate"),
    ((0.72, 0.82), "are not distinguishable")])
def test_metadata_are_compared_with_the_best_detector(tmp_path, rule, told):
    answer = answers(tmp_path, rule=rule)["What does metadata alone achieve?"]
    assert told in answer and f"{sum(rule)/2:.3f} from the file's format, 0.500 from the type of content" in answer


@pytest.mark.parametrize(("fpr", "told"), [
    ((0.08, 0.15), "more than 5 %"), ((0.0, 0.03), "fewer than 5 %"), ((0.03, 0.08), "agrees with 5 %")])
def test_measured_false_positives_stand_beside_the_nominal_rate(tmp_path, fpr, told):
    found = answers(tmp_path, fpr=fpr)
    answer = found["How often is a real image flagged?"]
    assert answer.count(told) == 4 and f"{50*sum(fpr):.1f} %" in answer
    assert "200 real and 200 synthetic" in answer and answer.count("50.0 % [40.0, 60.0] of the synthetic images") == 4
    assert "at probability 0.5" in answer and "stage 1 of the training had seen" in answer
    rate = sum(fpr)/2
    for share in (0.5, 0.01):
        assert f"{100*share*0.5/(share*0.5 + (1 - share)*rate):.0f} % " in found["What does a flag mean?"]


def test_randomness_of_training_is_told_where_it_was_measured(tmp_path):
    question = "What do the intervals contain?"
    assert "was not measured" in answers(tmp_path)[question]
    assert "over 3 seeds" in (few := answers(tmp_path, seeds=(0.1, 0.11, 0.12))[question]) and f"{OURS} is better" in few
    assert "not distinguishable" in answers(tmp_path, seeds=(-0.1, 0.11, 0.02))[question]


def test_the_rule_for_all_families_of_the_data_card_stands_beside_the_rules_per_family(tmp_path):
    rules = [dict(track="detection", group="all", rule=rule, fit="in_sample", balanced_accuracy=x)
             for rule, x in {"format": 0.788, "content": 0.5, "format+content": 0.844}.items()]
    save_table(pd.DataFrame(rules), tmp_path/"tables"/"metadata_baseline", "Made up.")
    assert "has 0.788 from the file's format, 0.500" in answers(tmp_path)["What does metadata alone achieve?"]


@pytest.mark.parametrize(("profile", "told"), [("demo", "small autoencoders"), ("paper", "The images are those of ImagiNet.")])
def test_the_origin_of_the_images_is_that_of_the_profile(tmp_path, profile, told):
    assert told in dict(findings(tmp_path, load_profile(profile)))["Where does each picture come from?"]


def test_missing_tables_leave_their_findings_out(tmp_path):
    left = [question for question, _ in findings(tmp_path, load_profile("demo"))]
    assert left == ["What do the intervals contain?", "Where does each picture come from?"]
