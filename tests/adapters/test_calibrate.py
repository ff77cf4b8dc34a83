"""What a calibration makes of gradients, and what of trainings that verify it."""

import pytest
import torch
from click.testing import CliRunner

from detloss_plugins import build_loss
from detloss_plugins.adapters.calibrate import STOCK, Candidate, Gradients, Suggestion, Verified
from detloss_plugins.cli import main
from detloss_plugins.cli.calibrate import read_words, show, without_overrides

CANDIDATE = Candidate("FocalLoss", "cls", {"type": "FocalLoss", "gamma": 1.5, "loss_weight": 1.0}, 16.0)


def found(stock, own):
    """Of some steps the norms of two losses, and what of each falls on positives."""
    gradients = Gradients()
    for label, steps in ((STOCK, stock), ("FocalLoss", own)):
        for step, amounts in steps.items():
            gradients.add(step, "cls", label, torch.tensor(amounts))
    return gradients


def test_the_weight_is_the_median_of_the_ratios():
    gradients = found(
        {1: [60.0, 30.0], 2: [40.0, 30.0], 3: [20.0, 30.0]}, {1: [2.0, 1.0], 2: [4.0, 4.0], 3: [1.0, 1.0]}
    )
    suggestion = gradients.suggestion(CANDIDATE)
    assert suggestion.ratios == {1: 30.0, 2: 10.0, 3: 20.0}
    assert suggestion.weight == 20.0
    assert suggestion.range == (10.0, 30.0)
    assert suggestion.positives == pytest.approx(6 / 7)
    assert suggestion.stock_positives == pytest.approx(90 / 120)
    assert suggestion.losses == {"cls": {"type": "FocalLoss", "gamma": 1.5, "loss_weight": 20.0}}
    stored = suggestion.as_dict()
    assert (stored["default"], stored["ratios"]) == (16.0, {"1": 30.0, "2": 10.0, "3": 20.0})


def test_batches_without_objects_are_no_measure():
    stock, own = {1: [60.0, 0.0], 2: [40.0, 30.0]}, {1: [0.01, 0.0], 2: [4.0, 4.0]}
    assert found(stock, own).suggestion(CANDIDATE).ratios == {2: 10.0}
    suggestion = found({1: [60.0, 0.0]}, {1: [0.01, 0.0]}).suggestion(CANDIDATE)
    assert (suggestion.weight, suggestion.losses["cls"]["loss_weight"]) == (None, 16.0)


def test_branches_and_levels_are_added_up():
    gradients = found({1: [60.0, 30.0]}, {1: [2.0, 1.0]})
    gradients.add(1, "cls", "FocalLoss", torch.tensor([4.0, 1.0]))
    assert gradients.suggestion(CANDIDATE).weight == 10.0


@pytest.mark.parametrize("own", [{}, {1: [0.0, 0.0]}, {1: [float("nan"), 0.0]}])
def test_no_gradient_no_weight(own):
    suggestion = found({1: [60.0, 30.0]}, own).suggestion(CANDIDATE)
    assert (suggestion.weight, suggestion.range) == (None, None)
    assert suggestion.losses["cls"]["loss_weight"] == 16.0, "the default"
    assert suggestion.as_dict()["range"] is None


@pytest.mark.parametrize(
    ("map50", "best", "gain", "beside", "clear"),
    [
        ([[0.1, 0.3], [0.70, 0.72], [0.80, 0.82]], 2.0, 0.10, "the calibrated weight", False),
        ([[0.59, 0.6], [0.70, 0.71], [0.80, 0.81]], 2.0, 0.10, "the calibrated weight", True),
        ([[0.59, 0.6], [0.70, 0.71], [0.69, 0.70]], 1.0, 0.01, "the next best", False),
        (
            [[0.69, 0.7], [0.70, 0.71], [0.72, 0.73]],
            2.0,
            0.02,
            "the calibrated weight",
            False,
        ),  # twice the error: 0.014
        ([[0.69, 0.7], [0.70, 0.71], [0.74, 0.75]], 2.0, 0.04, "the calibrated weight", True),  # 4.177 errors: 0.0295
        ([[0.7, 0.7], [0.7, 0.7], [0.7, 0.7]], 1.0, 0.0, "the next best", False),
    ],
)
def test_more_than_the_noise_of_seeds(map50, best, gain, beside, clear):
    verified = Verified(suggestion(25.0), 6, dict(zip((0.5, 1.0, 2.0), map50, strict=True)))
    assert (verified.best, verified.gain) == (best, pytest.approx(gain))
    assert verified.as_dict()["more_than_noise"] is clear
    verdict = "more than" if clear else "no more than"
    assert f"{gain:.3f} above {beside}: {verdict} the noise of seeds" in verified.in_words()


def suggestion(*ratios):
    return Suggestion("FocalLoss", "cls", 16.0, {}, 15.0, dict(enumerate(ratios)), 1.0, 0.8)


def test_a_ratio_that_goes_on_moving_is_no_weight():
    assert not suggestion(10.0, 12.0, 25.0).moves
    assert suggestion(79.0, 30.0, 20.0, 11.0).moves
    assert not suggestion().moves


def test_words_of_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b.yaml").write_text("box: {type: GIoULoss}", encoding="utf-8")
    losses, args = read_words(["FocalLoss:3", "data=mine.yaml", "x=cls: {type: GHMC}", "lr0=1e-3", "a=b.yaml"])
    assert args == {"data": "mine.yaml", "lr0": 0.001}
    assert [label for label, _, _ in losses] == ["FocalLoss:3", "GHMC of x", "GIoULoss of a=b"]
    words, overrides = without_overrides(
        ["FocalLoss", "x=box: {type: GIoULoss}", "load_from=None", "model.bbox_head.loss_cls.type=GHMC", "a.b={c: 1}"]
    )
    assert words == ["FocalLoss", "x=box: {type: GIoULoss}"]
    assert overrides == {"load_from": "None", "model.bbox_head.loss_cls.type": "GHMC", "a.b": "{c: 1}"}
    labels = ["gamma1.5=cls: {type: FocalLoss, gamma: 1.5}", "v1.0={type: GHMC}", "v1.1=GHMC:2"]
    assert without_overrides([*labels, "a.b=[1, x: (2"]) == (labels, {"a.b": "[1, x: (2"})


@pytest.mark.parametrize(
    ("own", "stock", "focuses"), [(1.0, 0.8, True), (0.83, 0.8, False), (1.0, 1.0, False), (None, 0.8, False)]
)
def test_a_loss_that_leaves_the_negatives_alone_is_told_so(own, stock, focuses, capsys):
    one = Suggestion("FocalLoss", "cls", 16.0, {"cls": {"type": "FocalLoss"}}, 15.0, {1: 15.0}, own, stock)
    assert one.focuses == focuses
    show([one], [])
    assert ("3 to 4 times this weight" in capsys.readouterr().out) == focuses


@pytest.mark.parametrize(
    ("weight", "ratios", "doubt"),
    [
        (15.0, (15.0, 16.0), ""),
        (15.0, (5.0, 16.0), "  # the ratio has moved all along"),
        (59900.0, (59900.0,), "  # more than 100 times the default"),
        (59900.0, (210.0, 99000.0), "  # the ratio has moved all along, more than 100 times the default"),
    ],
)
def test_a_weight_in_doubt_is_no_line_to_copy(weight, ratios, doubt, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    losses = {"cls": {"type": "FocalLoss", "loss_weight": weight}}
    label = "EqualizedQualityFocalLoss of my_losses"
    show([Suggestion(label, "cls", 16.0, losses, weight, dict(enumerate(ratios)), 1.0, 1.0)], [])
    shown = capsys.readouterr().out
    line = f"cls: {{type: FocalLoss, loss_weight: {weight}}}"
    assert (f"# {line}{doubt}" if doubt else line) in shown.splitlines()
    assert shown.splitlines()[2].split() == ["loss", "weight", "range", "on", "positives", "default"]


def test_labels_are_no_markup(capsys):
    labels = "GHMC of a[red]b", "GHMC of c[/x]", "GHMC of d:bug:"
    show([Suggestion(label, "cls", 16.0, {}, None, {1: 15.0}, 1.0, 0.8) for label in labels], [])
    shown = capsys.readouterr().out
    assert all(label in shown for label in labels), shown


def test_auto_has_no_meaning_for_a_loss_alone():
    with pytest.raises(ValueError, match=r'loss_weight="auto" of FocalLoss has no meaning here.*detloss calibrate'):
        build_loss({"type": "FocalLoss", "loss_weight": "auto"})


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "give at least one loss, such as VarifocalLoss, or --slot cls"),
        (["VarifocaLoss"], "did you mean VarifocalLoss"),
        (["vfl_eiou_dlf"], "is no loss and no file of losses"),
        (["none.yaml"], "there is no none.yaml"),
        (["mine={cls: 3}"], "mine must hold a dict of losses"),
        (["seeds=3", "grid.yaml"], "a YAML file of a whole grid is for detloss ablate"),
        (["none.py"], "there is no none.py"),
        (["FocalLoss", "--json", "."], "cannot write .: Is a directory"),
        (["FocalLos", "--json", "new.json"], "did you mean FocalLoss"),
        (["FocalLoss", "--json", f"{__file__}/found.json"], "cannot write "),
    ],
)
def test_mistakes_are_one_sentence(words, says, tmp_path, monkeypatch):
    pytest.importorskip("ultralytics")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "grid.yaml").write_text("losses: {a: {type: GIoULoss}}", encoding="utf-8")
    done = CliRunner().invoke(main, ["calibrate", *words])
    assert done.exit_code == 2, done.output
    assert says in done.output
    assert len(done.output.strip().splitlines()) == 1
    assert not (tmp_path / "new.json").exists()
