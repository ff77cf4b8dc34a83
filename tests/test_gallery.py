"""The gallery: every registered loss has a page with a picture, and the formulas are of ours."""

import re
import xml.etree.ElementTree as ElementTree

import gallery
import pytest
import torch

from detloss_plugins import build_loss
from detloss_plugins.cli import _facts, _plot
from detloss_plugins.cli._plot import numbers
from detloss_plugins.loss import Loss
from detloss_plugins.registry import registered_losses

A_FEW = ("DiceLoss", "L1Loss", "APLoss", "MultiBoxLoss")
LIMIT = 40_000  # bytes of a picture


def check_picture(path):
    """A small SVG in which something is drawn in colour, over some width and height."""
    assert path.stat().st_size < LIMIT, path
    drawn, tree = [], ElementTree.parse(path)
    if tree.find(".//{http://www.w3.org/2000/svg}image") is not None:
        return
    for element in tree.iter("{http://www.w3.org/2000/svg}path"):
        if any(colour in element.get("style", "") for colour in _plot.COLOURS):
            numbers = [float(number) for number in re.findall(r"-?[\d.]+", element.get("d", ""))]
            drawn += zip(numbers[::2], numbers[1::2], strict=True)
    for values, least in zip(zip(*drawn, strict=True), (20, 1), strict=True):  # points; a loss may hardly converge
        assert max(values) - min(values) > least, path
    assert drawn, path


def check_page(folder, name, cls):
    page = (folder / f"{name}.md").read_text(encoding="utf-8")
    assert page.startswith(f"# {name}\n")
    pictures = re.findall(r"\(img/(.+)\)", page)
    assert pictures == [f"{name}.{i + 1}.svg" for i in range(len(pictures))]
    assert len(pictures) > 1
    assert all(f"`{setting.name}`" in page for setting in _facts.settings(cls))
    assert all(upstream.differs in page for upstream in cls.facts.upstream)
    assert page.count("**Differs**") == sum(bool(upstream.differs) for upstream in cls.facts.upstream)
    assert f"({cls.facts.paper})" in page or not cls.facts.paper
    for picture in (*pictures, f"{name}.thumb.svg"):
        check_picture(folder / "img" / picture)


def test_the_formulas_are_those_of_all_registered_losses():
    assert list(gallery.formulas()) == list(dict.fromkeys(gallery.formulas()))
    assert gallery.formulas().keys() == registered_losses().keys()


@pytest.mark.parametrize("name", registered_losses())
def test_a_formula_is_drawn(name):
    latex = gallery.formulas()[name]
    assert latex.count("{") == latex.count("}")
    assert latex.count(r"\left") == latex.count(r"\right")
    assert latex.count("|") % 2 == 0
    assert all(line.strip() for line in latex.splitlines())
    converter = pytest.importorskip("latex2mathml.converter", reason="latex2mathml is of the group docs")
    for line in latex.splitlines():
        assert "\\" not in converter.convert(gallery.as_drawn(line))  # no command that it does not know


def test_pages_of_a_few(tmp_path, monkeypatch):
    monkeypatch.setattr(gallery.playground, "write", lambda path: None)
    gallery.write(tmp_path, A_FEW)
    for name in A_FEW:
        check_page(tmp_path / "gallery", name, registered_losses()[name])
    index = (tmp_path / "gallery" / "index.md").read_text(encoding="utf-8")
    assert all(f"]({name}.md)" in index for name in registered_losses())


def test_a_name_that_there_is_not(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        gallery.main(["CIoULos", "--docs", str(tmp_path)])
    assert (stop.value.code, "no loss named CIoULos" in capsys.readouterr().err) == (2, True)
    assert not list(tmp_path.iterdir())


def test_an_own_loss_is_drawn_by_its_family_or_refused():
    class Own(Loss, fn=lambda pred, target: (pred - target).abs(), family="regression", one_per_row=False):
        pass

    assert len(_plot.figure(Own(), "mine").axes) == 2
    Own.facts = Own.facts.but(family="mine")
    with pytest.raises(ValueError, match="no picture of a Own, as its family is 'mine'"):
        _plot.figure(Own())


@pytest.mark.parametrize(
    "name", ["FocalLoss", "SmoothL1Loss", "GaussianFocalLoss", "BinaryCrossEntropyLoss", "KLDivLoss"]
)
def test_the_slope_of_a_curve_is_that_of_its_values(name):
    curves = {
        "soft label": numbers.soft_label_curves,
        "heatmap": numbers.heatmap_curves,
        "regression": numbers.regression_curves,
    }
    cls = registered_losses()[name]
    for label, x, value, slope in curves.get(cls.facts.family, numbers.class_curves)(cls.make()):
        middle = (value[2:] - value[:-2]) / (x[2:] - x[:-2])
        torch.testing.assert_close(middle, slope[1:-1], rtol=0.05, atol=0.05 * float(slope.abs().max()), msg=label)


def test_a_loss_around_one_of_probabilities_is_drawn_over_logits_too():
    parts = [{"type": "FocalLoss", "activated": True}, {"type": "BinaryCrossEntropyLoss", "activated": True}]
    joint = numbers.class_curves(build_loss({"type": "JointLoss", "losses": parts}))
    each = [numbers.class_curves(build_loss(part)) for part in parts]
    for (_, _, value, _), *others in zip(joint, *each, strict=True):
        torch.testing.assert_close(value, sum(other[2] for other in others))


def test_a_loss_of_the_batch_is_one_sample_among_others():
    """GHM-C weighs by density: alone in a call, a sample would have the weight 1 everywhere."""
    curves = numbers.class_curves(registered_losses()["GHMC"].make())
    _, x, value, _ = curves[-1]  # target 0: few of the many negatives score high
    bce = torch.nn.functional.softplus(x)
    assert value[0] / bce[0] < 1 < value[-1] / bce[-1]


@pytest.mark.slow
def test_pages_and_pictures_of_all(tmp_path):
    gallery.write(tmp_path)
    for name, cls in registered_losses().items():
        check_page(tmp_path / "gallery", name, cls)
    assert len(list((tmp_path / "gallery").glob("*.md"))) == len(registered_losses()) + 1
    assert (tmp_path / "playground" / "losses.js").exists()


def test_a_loss_as_a_dict():
    """It can be built, and has the word that MMDetection's heads count their channels by."""
    for name, cls in registered_losses().items():
        assert type(build_loss(eval(_facts.as_dict(cls)))) is cls
        written = eval(_facts.as_dict(cls, "detloss_plugins."))
        assert written["type"] == f"detloss_plugins.{name}"
        if cls.facts.family in ("classification", "ranking"):
            assert written.get("use_sigmoid", False) == build_loss(written).use_sigmoid, name
