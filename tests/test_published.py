"The published numbers: complete, unchanged, and consistent with themselves."
import hashlib

import pandas as pd
import pytest

from imaginet_nb.core import repo_root

FOLDER = repo_root()/"reports"/"published"
COLUMNS = ["paper_version", "table", "track", "test_set", "subset", "method", "metric", "value", "source"]
ROWS = dict(table1_dataset_features=40, table2_dataset_structure=23, dataset_splits=3, table3_detection_by_family=50, table4_practical=28,
            table5_corvi=78, table6_inference_time=4, table7_identification=6, detection_by_content=50, detection_by_generator=90,
            repository_detection_by_family=40, repository_practical=70, repository_corvi=130, repository_inference_time=4, superseded=142)
TYPO = ("table5_corvi", "Corvi2022*", "auc") # Latent Diffusion is printed as 0.9989; 0.9889 gives the printed mean


def load(name: str) -> pd.DataFrame:
    return pd.read_csv(FOLDER/f"{name}.csv", dtype=str, keep_default_na=False)


def scores() -> pd.DataFrame:
    "All fractions of all tables, with the name of their file."
    df = pd.concat([load(name).assign(file=name) for name in ROWS], ignore_index=True)
    df = df[df["metric"].isin(["balanced_accuracy", "auc", "accuracy"])]
    return df.assign(value=df["value"].astype(float))


def test_files_and_rows() -> None:
    assert {p.stem for p in FOLDER.glob("*.csv")} == set(ROWS)
    readme = (FOLDER/"README.md").read_text(encoding="utf-8")
    for name, n in ROWS.items():
        df = load(name)
        assert list(df.columns) == COLUMNS and len(df) == n, name
        assert f"| `{name}.csv` | {n} |" in readme
        assert not df.duplicated(["table", "test_set", "subset", "method", "metric"]).any(), name
        assert (df["value"] != "").all(), name


def test_no_row_was_lost_or_changed() -> None:
    "The rows of all files together are those of the collection they were taken from."
    lines = sorted("|".join(row) for name in ROWS for row in load(name).itertuples(index=False))
    assert len(lines) == 758
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    assert digest == "57d62ba8f3e8d8fca3d4b336955aad6bdb323c22fb07d32df9794f4fa3e2c11c"


def test_values_are_possible() -> None:
    df = scores()
    assert df["value"].between(0, 1).all()
    times = pd.concat([load("table6_inference_time"), load("repository_inference_time")])
    assert set(times["metric"]) == {"time_ms"} and (times["value"].astype(float) > 1).all() # times, not accuracies


def test_means_agree_with_their_rows() -> None:
    "Half a unit of the fourth decimal for the mean, and as much for the rounding of the rows."
    compared, wrong = 0, []
    for key, part in scores().groupby(["file", "table", "method", "metric"]):
        mean, rows = part[part["subset"] == "Mean"], part[~part["subset"].isin(["Mean", "all"])]
        if mean.empty: continue
        assert len(mean) == 1 and len(rows) in (4, 6, 8, 12), key
        compared += 1
        if abs(rows["value"].mean() - mean["value"].item()) > 1.0001e-4: wrong.append((key[0], key[2], key[3]))
    assert wrong == [TYPO]
    assert compared == 86


def test_the_known_typo() -> None:
    df = scores().query("subset == 'Latent Diffusion' and method == 'Corvi2022*' and metric == 'auc'").set_index("file")["value"]
    assert df["table5_corvi"] == 0.9989 and df["repository_corvi"] == 0.9889
    rows = load("table5_corvi").query("method == 'Corvi2022*' and metric == 'auc'").set_index("subset")["value"].astype(float)
    mean = rows.pop("Mean")
    assert abs(rows.mean() - mean) > 5e-4
    rows["Latent Diffusion"] = 0.9889
    assert abs(rows.mean() - mean) < 1e-4


@pytest.mark.parametrize(("printed", "repository"), [("table3_detection_by_family", "repository_detection_by_family"),
                                                     ("table4_practical", "repository_practical"), ("table5_corvi", "repository_corvi")])
def test_paper_and_repository_agree(printed: str, repository: str) -> None:
    key = ["subset", "method", "metric"]
    both = load(printed).merge(load(repository), on=key, suffixes=("", "_repository"))
    expected = 40 if printed.startswith("table3") else len(load(printed))
    assert len(both) == expected
    different = both[both["value"] != both["value_repository"]]
    assert [tuple(r) for r in different[key].itertuples(index=False)] == (
        [("Latent Diffusion", "Corvi2022*", "auc")] if printed == "table5_corvi" else [])


def test_table2_adds_up() -> None:
    df = load("table2_dataset_structure").query("metric == 'images'")
    parts = df[~df["subset"].str.startswith("total")].assign(images=lambda d: d["value"].astype(int))
    parts[["content", "origin", "source"]] = parts["subset"].str.split("/", expand=True)
    totals = df.set_index("subset")["value"].astype(int)
    assert dict(parts.groupby("origin")["images"].sum()) == {o: totals[f"total/{o}"] for o in ("real", "synthetic")}
    balance = parts.groupby(["content", "origin"])["images"].sum().unstack()
    assert (balance["real"] == balance["synthetic"]).all()
    share = load("table2_dataset_structure").query("metric == 'share_percent'").set_index("subset")["value"].astype(float)
    assert dict(balance.sum(axis=1)/2000) == dict(share)
