"""The report of `imaginet predict` in a browser: what a reader sees, clicks and types."""
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from browser import browser, needs_browser
from forks import imaginet
from PIL import Image
from typer.testing import CliRunner

from imaginet_nb.apps.cli import app
from imaginet_nb.apps.predict import Scorer, find_files, score_files, score_frame
from imaginet_nb.core import seed_everything
from imaginet_nb.evaluation.calibration import fit_calibration
from imaginet_nb.models.checkpoints import save_checkpoint
from imaginet_nb.models.resnet import create_backbone
from imaginet_nb.models.selfcon import ImagiNetClassifier

pytestmark = needs_browser
HOSTILE = "<img src=x onerror=alert(1)> & 'quotes'.png"
VISIBLE = "[...document.querySelectorAll('.card')].filter(c => !c.hidden)"
ROWS = f"{VISIBLE}.map(c => JSON.parse(c.dataset.row))"


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> tuple[Path, pd.DataFrame]:
    "A report on 12 pictures and 2 broken files, by the real command, with every verdict in it."
    folder = tmp_path_factory.mktemp("report")
    seed_everything(0)
    draw, pictures = np.random.default_rng(0), folder/"pictures"
    pictures.mkdir()
    for i in range(12):
        side = (40, 24, 100)[i % 3] # as large as the detector's images, smaller, so large that there are five crops
        picture = Image.fromarray(draw.integers(0, 20*(i + 1), (side, side + i, 3), dtype=np.uint8))
        picture.save(pictures/(HOSTILE if i == 3 else f"{i:02d}.png"))
    (pictures/"broken.png").write_bytes(b"no picture")
    (pictures/"empty.jpg").touch()
    model = ImagiNetClassifier(create_backbone("resnet18", width=0.125), input_size=32).eval()
    synthetic = np.arange(80) % 2 == 1 # a calibration under which the random logits spread over all verdicts
    model.detection[-1].weight.data *= 40
    logit = score_frame(score_files(find_files([pictures]), Scorer(model)))["logit"]
    scaled = np.random.default_rng(0).normal(size=80) + 2.5*synthetic - 1.25
    calibration = fit_calibration(logit.median() + logit.std()*scaled, synthetic)
    save_checkpoint(model, folder/"net.safetensors", profile="demo", probability=calibration.header())
    done = imaginet("predict", pictures, "--checkpoint", folder/"net.safetensors", "--out", folder/"preds.csv",
                    "--html", folder/"report.html", "--demo")
    assert done.returncode == 0, done.stderr
    return folder/"report.html", pd.read_csv(folder/"preds.csv")


@pytest.fixture
def page(report):
    "The report in a window; afterwards: nothing went wrong in it, and nothing was asked for outside it."
    with browser() as window:
        window.open(report[0].as_uri())
        yield window
        window.ask("1") # events that came last
        assert window.errors == []
        assert {address.split(":")[0] for address in window.requests} <= {"file", "data"}


def key(window, name: str, code: int) -> None:
    for kind in ("rawKeyDown", "keyUp"):
        window.call("Input.dispatchKeyEvent", type=kind, key=name, code=name, windowsVirtualKeyCode=code)
    if name == "Enter": window.call("Input.dispatchKeyEvent", type="char", key=name, text="\r")


def test_every_file_has_its_card_the_most_synthetic_first(page, report):
    shown = page.ask(ROWS)
    assert sorted(row["path"] for row in shown) == sorted(report[1]["path"])
    scores = [row["probability"] for row in shown if "probability" in row]
    assert scores == sorted(scores, reverse=True) and [row["verdict"] for row in shown][-2:] == ["error"]*2
    assert page.ask("document.getElementById('count').textContent") == "14 of 14 shown"
    assert "stand-ins" in page.ask("document.querySelector('.about').textContent")
    loaded = "Promise.all([...document.images].map(i => {i.loading = 'eager'; return i.decode()})).then(() => document.images.length)"
    assert page.ask(loaded) == 12


def test_filters_agree_with_the_table(page, report):
    table, said = report[1], set(report[1]["verdict"].dropna())
    assert said == {"real", "synthetic", "unsure"} # else this test would show little
    for word in ("real", "synthetic", "error"): page.ask(f"document.querySelector('input[value={word}]').click()")
    assert {row["path"] for row in page.ask(ROWS)} == set(table["path"][table["verdict"] == "unsure"])
    page.ask("document.querySelector('button[type=reset]').click()")
    page.until("document.getElementById('count').textContent === '14 of 14 shown'")
    page.ask("document.querySelector('[name=text]').focus()")
    page.call("Input.insertText", text="ONERROR")
    assert [Path(row["path"]).name for row in page.ask(ROWS)] == [HOSTILE]
    page.ask("document.querySelector('button[type=reset]').click()")
    family = table["family"].dropna().iloc[0]
    page.ask(f"""const s = document.querySelector('[name=family]'); s.value = '{family}';
                 s.dispatchEvent(new Event('input', {{bubbles: true}}))""")
    assert {row["path"] for row in page.ask(ROWS)} == set(table["path"][table["family"] == family])


def test_a_picture_opens_by_keyboard_and_closes_again(page):
    page.ask(f"{VISIBLE}[1].firstElementChild.focus()")
    second, third = (row["path"] for row in page.ask(ROWS)[1:3])
    title = "document.querySelector('#detail h2')?.textContent"
    key(page, "Enter", 13)
    page.until(f"!document.getElementById('detail').hidden && {title} === {Path(second).name!r}")
    assert page.ask("document.activeElement.tagName") == "H2" and page.ask("document.getElementById('overview').hidden")
    key(page, "ArrowRight", 39)
    page.until(f"{title} === {Path(third).name!r}")
    key(page, "ArrowLeft", 37)
    page.until(f"{title} === {Path(second).name!r}")
    key(page, "Escape", 27)
    page.until("document.getElementById('detail').hidden")
    assert page.ask("JSON.parse(document.activeElement.closest('.card').dataset.row).path") == second # where the reader was


def test_the_page_of_a_picture_shows_views_and_a_map_that_adds_up(page, report):
    for number, row in enumerate(page.ask(ROWS)):
        page.ask(f"location.hash = '#{row['number']}'")
        page.until(f"document.querySelector('#detail h2')?.textContent === {Path(row['path']).name!r}")
        own = report[1].set_index("path").loc[row["path"]]
        if row["verdict"] == "error":
            assert own["error"] in page.ask("document.getElementById('detail').textContent"), number
            continue
        meters = page.ask("[...document.querySelectorAll('#detail meter')].map(m => m.value)")
        assert meters == pytest.approx([own["probability"], own["p_resaved"], own["p_resized"]], abs=1e-4)
        assert float(row["mean"]) == pytest.approx(own["logit"], abs=2e-3*max(1, abs(own["logit"])))
        over, picture = (f"document.querySelector('#detail .frame {image}')" for image in (".over", "img"))
        assert page.ask(f"{over}.decode().then(() => {over}.naturalWidth)") > 0
        box = "(r => [r.x, r.y, r.width, r.height].map(Math.round).join())({}.getBoundingClientRect())"
        assert page.ask(box.format(over)) == page.ask(box.format(picture)) # map and picture lie on each other
    page.ask("location.hash = '#0'")
    page.until("!!document.getElementById('map')")
    page.ask("document.getElementById('map').click()")
    assert page.ask("document.querySelector('#detail .over').hidden")


@pytest.mark.parametrize("address", ["", "#0", "#13"])
def test_nothing_is_wider_than_a_phone(page, report, address):
    page.call("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=2, mobile=True)
    page.open(report[0].as_uri() + address)
    page.until("document.getElementById('count').textContent !== ''")
    assert page.ask("document.documentElement.scrollWidth") <= 360
    if address == "#0": assert page.ask("document.querySelector('#detail .frame').getBoundingClientRect().top") < 300 # the picture first
    targets = "[...document.querySelectorAll('a, button, select, input:not([type=checkbox])')]"
    assert page.ask(f"{targets}.filter(e => e.offsetParent && e.offsetHeight < 30).length") == 0 # large enough for a finger


def test_the_share_that_is_expected_changes_the_number_and_not_the_verdict(page, report):
    "Bayes' rule on the log-odds, recomputed here; back at the share of the calibration, every card is as it was."
    cards = f"{VISIBLE}.filter(c => c.querySelector('.p')).map(c => [c.querySelector('.p').textContent, c.querySelector('b').textContent])"
    before, rows = page.ask(cards), [row for row in page.ask(ROWS) if "probability" in row]
    enter = "(f => {{f.value = '{}'; f.dispatchEvent(new Event('input', {{bubbles: true}}))}})(document.querySelector('#prior input'))"
    page.ask(enter.format(5))
    after = page.ask(cards)
    assert [verdict for _, verdict in after] == [verdict for _, verdict in before]
    for (text, _), row in zip(after, rows, strict=True):
        odds = row["probability"]/(1 - row["probability"])*0.05/0.95 # calibrated on as many real as synthetic images
        expected = odds/(1 + odds)
        if text.startswith("<"): assert expected < float(text[2:])
        elif text.startswith(">"): assert expected > float(text[2:])
        else: assert float(text) == pytest.approx(expected, abs=0.00051) and 5 <= len(text) <= 10
    above = float(re.search(r"synthetic above ([\d.]+)", page.ask("document.getElementById('meaning').innerText"))[1])
    for text, verdict in before: # the reader sees on which side of the threshold a number is
        if verdict in ("real", "synthetic"): assert (float(text.strip("<> ")) > above) == (verdict == "synthetic"), (text, above)
    assert after != before and "5 %" in page.ask("document.querySelector('#prior [role=status]').textContent")
    page.ask(f"location.hash = '#{rows[0]['number']}'")
    page.until("!!document.querySelector('#detail meter')")
    assert page.ask("document.querySelector('#detail .verdict').textContent").endswith(after[0][0])
    page.ask(enter.format(500)) # no share: nothing changes, and the page says so
    assert page.ask(cards) == after and "between" in page.ask("document.querySelector('#prior [role=status]').textContent")
    page.ask("document.querySelector('#prior button').click()")
    page.until("document.querySelector('#prior [role=status]').textContent === ''")
    assert page.ask(cards) == before


def test_a_card_says_what_its_number_is_and_what_it_is_worth(page, report):
    "A card is passed on alone, so the name of the number and the warning are on it; promises and thresholds are above all cards."
    pictures, errors = (page.ask(f"{VISIBLE}.filter(c => c.classList.contains('error') === {is_error}).map(c => c.innerText)")
                        for is_error in ("false", "true"))
    for text in pictures: assert text.count("demo only") == 1 and "stand-ins" not in text
    assert len(errors) == 2 and any("empty file" in text for text in errors) and any("not an image" in text for text in errors)
    assert not any("stand-ins" in text for text in errors)
    assert sum("padded to 32 pixels" in text for text in pictures) == 4
    assert "its verdict in the table is empty" in page.ask("document.getElementById('filter').innerText")
    table, meaning = report[1], page.ask("document.getElementById('meaning').innerText")
    assert page.ask(f"{VISIBLE}[0].innerText").count("P(synthetic)") == 1
    assert "calibrated on 80 images, half of them synthetic" in meaning and "about 5 % of the real ones are called synthetic" in meaning
    assert table["note"].dropna().str.contains("demo only").all() and table["note"].notna().sum() == 12
    assert "family" not in page.ask("document.getElementById('cards').innerText").lower()


def test_squares_lie_where_the_detector_looked_and_families_are_folded(page, report):
    row = next(row for row in page.ask(ROWS) if row.get("crops") == 5)
    page.ask(f"location.hash = '#{row['number']}'")
    page.until("document.querySelectorAll('#detail rect.above').length === 5")
    box = "(r => [r.left, r.top, r.width, r.height])({}.getBoundingClientRect())"
    left, top, width, height = page.ask(box.format("document.querySelector('#detail .frame img')"))
    for i, (x, y, w, h) in enumerate(row["squares"]):
        expected = [left + x*width/row["width"], top + y*height/row["height"], w*width/row["width"], h*height/row["height"]]
        assert page.ask(box.format(f"document.querySelectorAll('#detail rect.above')[{i}]")) == pytest.approx(expected, abs=1)
    text = page.ask("document.getElementById('detail').innerText")
    assert "5 squares, outlined" in text and f"{100*row['share']:.0f} %" in text and "Esc" in text
    assert not page.ask("[...document.querySelectorAll('#detail details')].some(d => d.open)")


def test_without_demo_there_is_no_verdict(report):
    "The table of a detector trained on stand-ins has one word for all pictures, and the terminal repeats it."
    folder = report[0].parent
    words = ["predict", folder/"pictures"/"00.png", "--checkpoint", folder/"net.safetensors", "--no-views", "--out", folder/"none.csv"]
    result = CliRunner().invoke(app, [*map(str, words), "--html", str(folder/"none.html")])
    assert result.exit_code == 0
    assert "1 scored (1 demo only); 0 with an error; demo only: the detector was trained on stand-ins" in result.output
    assert pd.read_csv(folder/"none.csv")["verdict"].tolist() == ["demo only"]
    page = (folder/"none.html").read_text()
    assert "P(synthetic) is the probability" not in page # no card shows it
    assert "so no verdict is given" in page and "<b>demo only</b>" in page and 'value="synthetic"' not in page
    for part in ('class="p"', 'id="prior"', 'name="sort"'): assert part not in page, part # no number, no prior, no order by a number


def test_the_share_is_entered_by_keyboard(page):
    page.ask("document.querySelector('#prior input').select()")
    assert "Bayes" in page.ask("document.getElementById(document.activeElement.getAttribute('aria-describedby')).textContent")
    page.call("Input.insertText", text="5")
    key(page, "Enter", 13) # must not reload the page
    assert page.ask("document.querySelector('#prior input').value") == "5"
    assert page.ask(f"{VISIBLE}[0].innerText").count("P(synthetic) at 5 %") == 1 # a card is passed on alone
    key(page, "Tab", 9)
    key(page, "Enter", 13)
    page.until("document.querySelector('#prior input').value === '50'")
