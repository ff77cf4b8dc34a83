"""The report: statistics whose numbers are worked by hand, and the page."""

import base64
import math
import re

import pytest
from click.testing import CliRunner

from detloss_plugins.ablation.compare import (
    bootstrap_interval,
    difference,
    groups,
    mean_curve,
    merged,
    pooled,
    spread,
    t_interval,
    table,
)
from detloss_plugins.ablation.files import write_json
from detloss_plugins.ablation.page import Page
from detloss_plugins.ablation.report import read_results, write_report
from detloss_plugins.cli import main


def run(label, seed, ap50, **more):
    """A run of results.json."""
    metrics = {"AP50": ap50, "AP": ap50 / 2, "AP_large": None, "seconds_per_epoch": 2.0}
    losses = {} if label == "stock" else {"cls": {"type": label}}
    own = {"label": label, "slot": "+".join(losses), "losses": losses, "model": "yolov8n.yaml", "data": "digits"}
    own |= {"epochs": 2, "seed": seed, "metrics": metrics, "per_class": {"0": ap50, "1": None}}
    return {**own, "curve": {"AP50": [0.0, ap50]}, **more}


STOCK = [run("stock", seed, ap50) for seed, ap50 in enumerate([0.50, 0.52, 0.51])]
GOOD = [run("GoodLoss", seed, ap50) for seed, ap50 in enumerate([0.60, 0.62, 0.62])]  # +0.10, +0.10, +0.11
SAME = [run("SameLoss", seed, ap50) for seed, ap50 in enumerate([0.51, 0.52, 0.49])]  # +0.01, 0, -0.02
BAD = [run("BadLoss", seed, ap50) for seed, ap50 in enumerate([0.40, 0.42, 0.40])]  # -0.10, -0.10, -0.11
RESULTS = {"name": "study", "data": "digits", "epochs": 2, "versions": {"torch": "2.5.1"}, "machine": "2 cores"}


def test_students_interval():
    """Of 1, 2, 3: 2 -+ 4.30265 x 1 / sqrt(3); of 0, 4 at 90 %: 2 -+ 6.31375 x sqrt(8) / sqrt(2)."""
    assert t_interval([1, 2, 3]) == pytest.approx((2 - 4.30265 / math.sqrt(3), 2 + 4.30265 / math.sqrt(3)), abs=1e-4)
    assert t_interval([0, 4], 0.9) == pytest.approx((2 - 12.6275, 2 + 12.6275), abs=1e-3)


def test_bootstrap_of_three():
    """The sums 0 to 6 of 27 resamples of 0, 1, 2 come 1, 3, 6, 7, 6, 3, 1 times: 1/27 is 3.7 %."""
    assert bootstrap_interval([0, 1, 2], 0.95) == (0, 2)
    assert bootstrap_interval([0, 1, 2], 0.90) == pytest.approx((1 / 3, 5 / 3))
    assert bootstrap_interval([0, 1, 2], 0.50) == pytest.approx((2 / 3, 4 / 3)), "10/27 and 17/27 are the first above"


def test_bootstrap_of_many_is_drawn_and_the_same_each_time():
    values = [0.0, 1.0] * 20
    low, high = bootstrap_interval(values)
    assert (low, high) == bootstrap_interval(values)
    assert (low, high) == pytest.approx((0.5 - 1.96 * 0.5 / math.sqrt(40), 0.5 + 1.96 * 0.5 / math.sqrt(40)), abs=0.01)


def test_all_losses_at_once():
    """Variances of 1, 4/3, 4/3 and 7/3 in units of 0.01²: pooled 1.5, and t(1 - 0.05 / 6, 8) is 3.0158."""
    found = pooled(table([*STOCK, *GOOD, *SAME, *BAD]), "AP50")
    assert (found.deviation, found.freedom) == (pytest.approx(0.01 * math.sqrt(1.5)), 8)
    assert found.least == pytest.approx(3.0158 * 0.01 * math.sqrt(1.5) * math.sqrt(2 / 3), abs=1e-5)
    assert found.verdicts == {"GoodLoss": "better", "SameLoss": "not distinguishable", "BadLoss": "worse"}


def test_all_losses_at_once_find_what_three_pairs_cannot():
    """0.03 above stock, with a deviation of 0.01 each: 2.7764 x 0.01 x sqrt(2 / 3) is 0.023."""
    some = [run("SomeLoss", seed, ap50) for seed, ap50 in enumerate([0.55, 0.53, 0.54])]
    rows = table([*STOCK, *some])
    (row,) = (row for row in rows if row.label == "SomeLoss")
    assert row.differences["AP50"].verdict == "not distinguishable"
    assert pooled(rows, "AP50").least == pytest.approx(2.7764 * 0.01 * math.sqrt(2 / 3), abs=1e-5)
    assert pooled(rows, "AP50").verdicts == {"SomeLoss": "better"}


@pytest.mark.parametrize(("mean", "verdict"), [(0.5335, "not distinguishable"), (0.5365, "better")])
def test_all_losses_at_once_with_unequal_seeds(mean, verdict):
    """Variances of 1 with 3 seeds and 2.5 with 5: pooled (2 x 1 + 4 x 2.5) / 6 = 2, and t(0.975, 6) is 2.4469; so
    2.4469 x 0.01 x sqrt(2) x sqrt(1 / 5 + 1 / 3) is 0.0253."""
    five = [run("SomeLoss", seed, mean + 0.01 * step) for seed, step in enumerate((-2, -1, 0, 1, 2))]
    found = pooled(table([*STOCK, *five]), "AP50")
    assert (found.deviation, found.freedom) == (pytest.approx(0.01 * math.sqrt(2)), 6)
    assert found.least == pytest.approx(2.4469 * 0.01 * math.sqrt(2) * math.sqrt(2 / 3), abs=1e-5)
    assert found.verdicts == {"SomeLoss": verdict}


def test_too_few_seeds_are_not_judged_at_once():
    assert pooled(table([*STOCK, *GOOD[:2]]), "AP50") is None
    assert pooled(table(GOOD), "AP50") is None
    assert pooled(table([*STOCK, *GOOD, *BAD[:1]]), "AP50").verdicts.keys() == {"GoodLoss"}


@pytest.mark.parametrize(
    ("own", "verdict", "reason"),
    [
        ([0.60, 0.62, 0.62], "better", "above 0"),
        ([0.40, 0.42, 0.40], "worse", "below 0"),
        ([0.51, 0.52, 0.50], "not distinguishable", "holds 0"),
        # +0.05, +0.01, +0.03: every seed is better, and 0.03 -+ 2.484 x 0.02 holds 0 all the same.
        ([0.55, 0.53, 0.54], "not distinguishable", "holds 0"),
        ([0.50, 0.52, 0.51], "not distinguishable", "holds 0"),
        ([0.60, 0.62], "not distinguishable", "2 of 3 seeds"),
        ([0.60], "not distinguishable", "1 of 3 seeds"),
        ([], "not distinguishable", "0 of 3 seeds"),
    ],
)
def test_verdicts(own, verdict, reason):
    found = difference(dict(enumerate(own)), {0: 0.50, 1: 0.52, 2: 0.51})
    assert found.verdict == verdict
    assert reason in found.reason
    assert found.seeds == len(own)


def test_differences_are_of_the_same_seed():
    found = difference({1: 0.5, 2: 0.7, 9: 0.0}, {2: 0.4, 1: 0.4, 0: 1.0})
    assert found.seeds == 2
    assert found.mean == pytest.approx(0.2)
    assert found.interval == pytest.approx((0.2 - 12.7062 * 0.1, 0.2 + 12.7062 * 0.1), abs=1e-4)
    assert found.bootstrap == pytest.approx((0.1, 0.3))


def test_spread_is_the_sample_deviation():
    assert spread([1.0, 2.0, 3.0, None]).deviation == 1.0
    assert spread([1.0]).deviation is None
    assert spread([None]) is None


def test_the_table():
    rows = table([*SAME, *STOCK, *BAD, *GOOD])
    assert [row.label for row in rows] == ["GoodLoss", "stock", "SameLoss", "BadLoss"]
    good, stock = rows[:2]
    assert good.spreads["AP50"].mean == pytest.approx(0.61333, abs=1e-5)
    assert good.differences["AP50"].mean == pytest.approx(0.10333, abs=1e-5)
    assert good.differences["AP"].mean == pytest.approx(0.05167, abs=1e-5)
    assert good.spreads["AP_large"] is None
    assert good.per_class == {"0": good.spreads["AP50"].mean, "1": None}
    assert stock.differences == {}
    assert stock.curve == pytest.approx([0.0, 0.51])
    assert mean_curve([]) == []


def test_other_epochs_models_and_data_are_not_compared():
    others = [
        run("stock", 0, 0.9, epochs=3),
        run("stock", 0, 0.9, model="yolo11n.yaml"),
        run("stock", 0, 0.9, data="trees"),
    ]
    assert [len(own) for own in groups([*STOCK, *others]).values()] == [1, 3, 1, 1]


def test_results_are_put_together():
    first, second = {"runs": [*STOCK, *GOOD]}, {"runs": [*STOCK, *BAD]}
    assert merged([first, second]) == [*STOCK, *GOOD, *BAD]
    with pytest.raises(ValueError, match="in one and"):
        merged([first, {"runs": [run("GoodLoss", 3, 0.5, losses={})]}])


def test_trainings_with_other_arguments_are_not_compared():
    small, large = ({"runs": [run("stock", seed, 0.5, args={"imgsz": size})]} for seed, size in ((0, 128), (1, 640)))
    unknown = {"runs": [run("stock", 2, 0.5)]}
    assert len(merged([small, unknown])) == 2
    with pytest.raises(ValueError, match=r"has \{'imgsz': 128\} in one and \{'imgsz': 640\} in another"):
        merged([small, large])


def test_a_training_with_two_results_is_not_reported(tmp_path):
    """As of two data sets whose folders have one name: one of the two would be left out without a word."""
    first, again = {**RESULTS, "runs": [*STOCK, *GOOD]}, {**RESULTS, "runs": [*STOCK]}
    write_report([first, again], tmp_path / "same")
    other = {**RESULTS, "runs": [run("stock", 0, 0.9)]}
    with pytest.raises(ValueError, match=r"stock with .* seed 0, is in two of the results with other metrics"):
        write_report([first, other], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "0.5"])
def test_a_metric_that_is_no_number_is_refused(tmp_path, value):
    write_json(tmp_path / "some.json", {**RESULTS, "runs": [{**STOCK[0], "metrics": {"AP": 0.5, "AP50": value}}]})
    with pytest.raises(ValueError, match="is no file of results: AP50 of a run is"):
        read_results(tmp_path / "some.json")


def test_figures_of_a_test_set_are_in_the_report(tmp_path):
    tested = [{**run, "metrics": {**run["metrics"], "AP50_test": 0.3125}} for run in GOOD]
    write_report([{**RESULTS, "runs": [*STOCK, *tested]}], tmp_path)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "| losses | AP50 (test) |" in text
    assert "| GoodLoss | 0.312 ± 0.000 |" in text


def test_the_page(tmp_path):
    (tmp_path / "a.png").write_bytes(b"png")
    page = Page("A & B", tmp_path)
    page.text("see `x < 1`")
    page.table(["loss", "verdict"], [["a|b", "worse"]])
    page.picture("a.png", "what")
    assert page.markdown() == (
        "# A & B\n\nsee `x < 1`\n\n| loss | verdict |\n|---|---:|\n| a\\|b | worse |\n\n![what](a.png)\n"
    )
    assert "<code>x &lt; 1</code>" in page.html()
    assert '<td class="worse">worse</td>' in page.html()
    assert base64.b64encode(b"png").decode() in page.html()
    assert "A &amp; B" in page.html()


def test_the_report(tmp_path):
    failed = [{"run": "odd-yolov8n-digits-0", "error": "RuntimeError: it broke"}]
    write_json(tmp_path / "some.json", {**RESULTS, "runs": [*STOCK, *GOOD, *SAME, *BAD], "failed": failed})
    out = tmp_path / "out"
    done = CliRunner().invoke(main, ["report", str(tmp_path / "some.json"), "--out", str(out)])
    assert done.exit_code == 0, done.output
    text = (out / "report.md").read_text(encoding="utf-8")
    assert "Of 3, 1 better than stock in AP50, 1 worse, 1 not distinguishable." in text
    line = next(line for line in text.splitlines() if line.startswith("| GoodLoss | cls |"))
    # 0.10333 -+ 4.30265 x 0.0057735 / sqrt(3)
    assert "0.613 ± 0.012 | +0.103 [+0.089, +0.118], boot. [+0.100, +0.110] | better |" in line
    assert text.index("| GoodLoss") < text.index("| stock") < text.index("| SameLoss") < text.index("| BadLoss")
    assert "RuntimeError: it broke" in text
    assert "Of 3 comparisons of pairs, about 0.2 would" in text, "3 x 5 %"
    pictures = re.findall(r"!\[.*\]\((.*)\)", text)
    assert len(pictures) == 2
    html = (out / "report.html").read_text(encoding="utf-8")
    for picture in pictures:
        content = (out / picture).read_bytes()
        assert content.startswith(b"\x89PNG")
        assert base64.b64encode(content).decode() in html
    assert 'src="pictures' not in html


def test_weights_that_were_found_are_in_the_report(tmp_path):
    losses = {"cls": {"type": "GoodLoss", "loss_weight": "auto"}}
    found = [{**run, "losses": losses, "weights": {"cls": 4.0 + run["seed"] / 3}} for run in GOOD]
    write_report([{**RESULTS, "runs": [*STOCK, *found]}], tmp_path)
    assert "weights found, by seed: cls: 4, 4.33, 4.67 |" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_results_without_ap(tmp_path):
    """As somebody's own results may be."""
    runs = [{**run, "metrics": {"AP50": run["metrics"]["AP50"]}} for run in [*STOCK, *GOOD]]
    write_report([{**RESULTS, "runs": runs}], tmp_path)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "| better | - | - | not distinguishable (0 of 3 seeds) |" in text
    assert "pooled over the table" in text
    assert "Seeds change AP by" not in text


def test_a_seed_without_a_metric_does_not_count_in_it():
    """Two values of three seeds are too few to be judged, and none has more degrees of freedom than its values."""
    gone = {**GOOD[2], "metrics": {"AP50": 0.62, "AP": None}}
    rows = table([*STOCK, *GOOD[:2], gone, *BAD])
    assert pooled(rows, "AP50").freedom == 6
    found = pooled(rows, "AP")
    assert found.freedom == 4
    assert found.verdicts.keys() == {"BadLoss"}, "of the other there are two values"


def test_labels_of_any_kind(tmp_path, monkeypatch):
    """They are neither formulas nor left out of a legend."""
    from matplotlib.figure import Figure

    saved, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **more: saved.append(self) or save(self, *args, **more))
    runs = [{**run, "label": label} for label in ("_mine", "cost_$a_$") for run in GOOD]
    write_report([{**RESULTS, "runs": [*STOCK, *runs]}], tmp_path)
    differences, curves = saved
    assert [text.get_text() for text in differences.axes[0].get_yticklabels()] == ["_mine", "cost_$a_$"]
    names = [text.get_text().strip() for text in curves.legends[0].get_texts()]
    assert names == ["_mine", "cost_$a_$", "stock"]


def test_runs_of_somebody_else_are_no_study(tmp_path):
    """Such as Ultralytics' own runs/detect beside a file of results; nothing is written over."""
    (tmp_path / "runs" / "detect" / "train").mkdir(parents=True)
    with pytest.raises(ValueError, match="no results in"):
        read_results(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    write_json(tmp_path / "results.json", {**RESULTS, "runs": STOCK})
    write_report([read_results(tmp_path)], tmp_path)
    assert read_results(tmp_path)["runs"] == STOCK
    before = (tmp_path / "results.json").read_bytes()
    with pytest.raises(ValueError, match="in one and"):
        write_report([{**RESULTS, "runs": [*GOOD, run("GoodLoss", 4, 0.1, losses={})]}], tmp_path)
    with pytest.raises(ValueError, match="no results"):
        write_report([], tmp_path / "new")
    assert (tmp_path / "results.json").read_bytes() == before
    assert not (tmp_path / "new").exists()


def test_what_is_no_result(tmp_path):
    (tmp_path / "x.json").write_text("[1]", encoding="utf-8")
    for arguments, says in ((["x.json"], "--out DIR"), (["x.json", "--out", "out"], "no results in")):
        words = [str(tmp_path / word) if word[0] != "-" else word for word in arguments]
        done = CliRunner().invoke(main, ["report", *words])
        assert (done.exit_code, says in done.output) == (2, True), done.output
    for runs, says in (([{"label": "stock"}], "a run has no curve, data"), (["stock"], "a run is 'stock'")):
        write_json(tmp_path / "x.json", {"runs": runs})
        with pytest.raises(ValueError, match=says):
            read_results(tmp_path / "x.json")
    write_json(tmp_path / "x.json", {"runs": [run("stock", "0", 0.5)]})
    with pytest.raises(ValueError, match="seed of a run is '0'"):
        read_results(tmp_path / "x.json")
    write_json(tmp_path / "x.json", {"runs": []})
    write_report([read_results(tmp_path / "x.json")], tmp_path / "none")
    assert "0 trainings on a machine not named.\n" in (tmp_path / "none" / "report.md").read_text(encoding="utf-8")
    nothing = {**RESULTS, "versions": {}, "machine": "", "runs": [], "unfinished": ["a", "b"]}
    write_report([nothing], tmp_path / "none")
    assert "\n0 trainings. 2 not finished.\n" in (tmp_path / "none" / "report.md").read_text(encoding="utf-8")
    (tmp_path / "study" / "runs" / "a").mkdir(parents=True)
    for text, says in (("{", "run.json is no JSON"), ('{"of": "another"}', "another version")):
        (tmp_path / "study" / "runs" / "a" / "run.json").write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=says):
            read_results(tmp_path / "study")
    with pytest.raises(ValueError, match="in one and"):
        write_report([{**RESULTS, "runs": GOOD}, {**RESULTS, "runs": [run("GoodLoss", 4, 0.1, losses={})]}], tmp_path)
