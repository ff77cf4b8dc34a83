"""The optimisation check: its cases are the published ones, its steps are those of gradient descent."""

import json
import math

import numpy as np
import pytest
import simulate
import torch
from support import only


def config(word):
    (cfg,) = simulate.parse_loss(word)
    return cfg


def curve(word, count=3, seed=0, **kwargs):
    return simulate.simulate(config(word), simulate.anchor_centers(count, seed), **kwargs)


def distinct(values):
    return sorted(set(np.round(values.numpy(), 9)))


def test_the_full_set_up():
    centers = simulate.anchor_centers(simulate.CENTERS, 0)
    count = math.prod(simulate.grid(centers))
    assert count == 1_715_000
    anchors, targets = simulate.cases(centers, 0, count)
    assert anchors.shape == targets.shape == (4, count)
    ratios = [1 / 4, 1 / 3, 1 / 2, 1, 2, 3, 4]
    assert distinct(targets[2] * targets[3]) == [1]
    assert distinct(targets[2] / targets[3]) == pytest.approx(ratios)
    assert distinct(targets[:2].flatten()) == [0]
    assert distinct(anchors[2] * anchors[3]) == pytest.approx([0.5, 0.67, 0.75, 1, 1.33, 1.5, 2])
    assert distinct(anchors[2] / anchors[3]) == pytest.approx(ratios)


def test_every_case_is_there_once():
    centers = simulate.anchor_centers(3, 0)
    whole = torch.cat(simulate.cases(centers, 0, 7 * 3 * 7 * 7))
    assert len(np.unique(whole.numpy().T, axis=0)) == 7 * 3 * 7 * 7
    parts = [torch.cat(simulate.cases(centers, *span)) for span in ((0, 500), (500, 1029))]
    assert torch.equal(torch.cat(parts, 1), whole)


def test_centers_are_uniform_in_the_disc():
    x, y = simulate.anchor_centers(20_000, 0).T
    radius = np.hypot(x, y)
    assert radius.max() <= 3
    assert np.mean(radius < 3 / math.sqrt(2)) == pytest.approx(0.5, abs=0.02), "half of the area, half of the centres"
    for values in (x, y):
        assert values.mean() == pytest.approx(0, abs=0.05)
        assert values.std() == pytest.approx(1.5, abs=0.03)


def test_steps():
    assert [simulate.step_size(i) for i in range(1, 201)] == [0.1] * 160 + [0.01] * 20 + [0.001] * 20


def iou_by_hand(box, target):
    low = [max(b[i] - b[i + 2] / 2 for b in (box, target)) for i in range(2)]
    high = [min(b[i] + b[i + 2] / 2 for b in (box, target)) for i in range(2)]
    overlap = max(high[0] - low[0], 0) * max(high[1] - low[1], 0)
    return overlap / (box[2] * box[3] + target[2] * target[3] - overlap)


@pytest.mark.parametrize("word", ["GIoULoss", "DIoULoss", "EIoULoss", "{type: DIoULoss, loss_weight: 3}"])
def test_a_step_goes_down_the_gradient(word):
    """By finite differences, with several boxes at once: none takes part of another's gradient."""
    loss = simulate.build(config(word))
    target = [0.0, 0.0, 2.0, 0.5]
    boxes = torch.tensor([[0.3, -0.17, 1.1, 0.9], [2.5, -1.7, 0.8, 1.3], [-0.1, 0.05, 0.4, 0.2]], dtype=torch.float64)
    goal = simulate.corners(torch.tensor([target] * 3, dtype=torch.float64).T)
    moved = simulate.step(loss, boxes.T, goal, 0.1).T

    def value(box):
        cx, cy, w, h = box
        corners = torch.tensor([[cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]], dtype=torch.float64)
        return loss(corners, goal[:1]).item()

    for box, after in zip(boxes.tolist(), moved.tolist(), strict=True):
        for i in range(4):
            ahead, behind = ([x + d * (i == j) for j, x in enumerate(box)] for d in (1e-6, -1e-6))
            slope = (value(ahead) - value(behind)) / 2e-6
            assert after[i] == pytest.approx(box[i] - 0.1 * (2 - iou_by_hand(box, target)) * slope, abs=1e-8)


def test_the_factor_is_a_constant():
    """A loss that pulls all sides alike, so that a derivative of the factor would show."""
    boxes = torch.tensor([[0.1, 0.0, 1.5, 0.8]], dtype=torch.float64).T
    goal = simulate.corners(torch.tensor([[0.0, 0.0, 1.0, 1.0]], dtype=torch.float64).T)
    moved = simulate.step(lambda pred, target, reduction_override: pred.sum(-1), boxes, goal, 0.1)
    factor = 2 - iou_by_hand(*(b[:, 0].tolist() for b in (boxes, torch.tensor([[0.0, 0, 1, 1]]).T)))
    assert (boxes - moved)[:, 0].tolist() == pytest.approx([0.1 * factor * d for d in (2, 2, 0, 0)])


@pytest.mark.parametrize("word", ["GIoULoss", "DIoULoss", "CIoULoss", "EIoULoss"])
def test_the_error_falls(word):
    errors = curve(word)
    anchors, targets = simulate.cases(simulate.anchor_centers(3, 0), 0, 1029)
    assert len(errors) == 201
    assert errors[0] == pytest.approx((anchors - targets).abs().sum().item(), rel=1e-6)
    assert (np.diff(errors[:30]) < 0).all()
    assert errors[160] < 0.2 * errors[0]
    assert errors[200] < 0.05 * errors[0]
    assert errors[180] < errors[160], "a smaller step ends the oscillation about the target"
    assert errors[200] < errors[180]


def test_plain_iou_leaves_disjoint_boxes_alone():
    anchors, targets = simulate.cases(simulate.anchor_centers(10, 0), 0, 3430)
    apart = ((anchors[:2] - targets[:2]).abs() > (anchors[2:] + targets[2:]) / 2).any(0)
    assert 500 < apart.sum() < 3000
    loss = simulate.build(config("{type: IoULoss, mode: linear}"))
    errors = simulate.descend(loss, anchors[:, apart], targets[:, apart])
    assert (errors == errors[0]).all()
    errors = simulate.descend(loss, anchors[:, ~apart], targets[:, ~apart])
    assert errors[200] < 0.5 * errors[0]


def test_float32_is_enough():
    narrow, wide = curve("EIoULoss", 10), curve("EIoULoss", 10, dtype=torch.float64)
    assert narrow == pytest.approx(wide, rel=0.02)


def test_the_seed_decides():
    first = curve("GIoULoss")
    assert (curve("GIoULoss") == first).all()
    assert curve("GIoULoss", seed=1)[0] != first[0]


def test_chunks_change_nothing(monkeypatch):
    whole = curve("CIoULoss", dtype=torch.float64)
    monkeypatch.setattr(simulate, "CHUNK", 100)
    calls = []
    parts = curve("CIoULoss", dtype=torch.float64, advance=lambda: calls.append(1))
    # torch's atan2 differs in the last bit at the end of a tensor, and two hundred steps make more of it.
    assert parts == pytest.approx(whole, rel=1e-7)
    assert len(calls) == 11


@only(lambda facts: facts.family == "box")
def test_box_losses_run(loss_cls):
    cfg = config(loss_cls.__name__)
    assert cfg in simulate.parse_loss("all")
    assert not simulate.build(cfg).training, "a state must not make one case depend on another"
    errors = simulate.simulate(cfg, simulate.anchor_centers(1, 0))
    assert np.isfinite(errors).all()
    assert errors[1] != errors[0]


def test_all_is_the_box_family():
    assert {simulate.build(cfg).family for cfg in simulate.parse_loss("all")} == {"box"}


@pytest.mark.parametrize("name", simulate.PIXEL_CONSTANTS)
def test_constants_in_pixels(name):
    (key, value), *_ = simulate.PIXEL_CONSTANTS[name].items()
    assert config(name) == {"type": name, key: value}
    given = [7, 9] if key == "image_size" else 7.0
    assert config(f"{{type: {name}, {key}: {given}}}") == {"type": name, key: given}


def test_forms_of_a_loss():
    named = {"type": "CIoULoss", "alpha_gate": 0.5}
    assert config("{type: CIoULoss, alpha_gate: 0.5}") == named
    assert config("{'type': 'CIoULoss', 'alpha_gate': 0.5}") == named
    assert simulate.label(named) == "CIoULoss(alpha_gate=0.5)"
    assert config("detloss_plugins.EIoULoss") == {"type": "EfficientIoULoss"}


@pytest.mark.slow
def test_the_command(tmp_path, capsys, monkeypatch):
    """In two processes, and in chunks that both get."""
    monkeypatch.setattr(simulate, "CHUNK", 100)
    losses = ["GIoULoss", "{type: CIoULoss, alpha_gate: 0.5}"]
    found, picture = tmp_path / "new" / "curves.json", tmp_path / "new" / "curves.svg"
    words = [word for loss in losses for word in ("--loss", loss)]
    options = ["--centers", "2", "--seed", "5", "--workers", "2", "--json", str(found), "--picture", str(picture)]
    assert simulate.main([*words, *options]) == 0
    content = json.loads(found.read_text(encoding="utf-8"))
    assert (content["cases"], content["seed"]) == (686, 5)
    assert content["steps"] == {"1": 0.1, "161": 0.01, "181": 0.001}
    assert set(content["versions"]) == {"detloss_plugins", "torch", "python"}
    printed = capsys.readouterr().out
    assert "686 cases" in printed
    assert str(picture) in printed
    for row, loss in zip(content["losses"], losses, strict=True):
        assert row["config"] == config(loss)
        assert row["curve"] == pytest.approx(curve(loss, 2, seed=5), rel=1e-12), "processes change nothing"
        assert f"{row['curve'][100]:,.1f}" in printed
        assert row["seconds"] > 0
    drawing = picture.read_text(encoding="utf-8")
    assert all(row["loss"] in drawing for row in content["losses"])


def refused(capsys, *argv):
    """The last line that a refused command prints."""
    with pytest.raises(SystemExit) as stop:
        simulate.parse(list(argv))
    assert stop.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_refused_in_one_sentence(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "did you mean CIoULoss" in refused(capsys, "--loss", "CIoULos")
    assert "accepts alpha_gate, compile, eps" in refused(capsys, "--loss", "{type: CIoULoss, gate: 1}")
    assert "FocalLoss is not a loss between boxes" in refused(capsys, "--loss", "FocalLoss")
    for nonsense in ("{type: CIoULoss", "[1, 2]", "3", "{alpha_gate: 1}", ""):
        assert "takes a name, a dict" in refused(capsys, "--loss", nonsense)
    assert "--workers must be at least 1" in refused(capsys, "--workers", "0")
    assert "--centers must be at least 1" in refused(capsys, "--centers", "0")
    assert "--seed must be at least 0" in refused(capsys, "--seed", "-1")
    assert "not allowed with" in refused(capsys, "--quick", "--centers", "3")
    assert ".png" in refused(capsys, "--loss", "GIoULoss", "--picture", "curves.txt")
    (tmp_path / "file").touch()
    assert "cannot write" in refused(capsys, "--loss", "GIoULoss", "--json", "file/curves.json")


def test_defaults(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    args = simulate.parse([])
    assert args.centers == 5000
    assert [cfg["type"] for cfg in args.losses] == [
        "IoULoss",
        "GIoULoss",
        "DIoULoss",
        "CIoULoss",
        "EfficientIoULoss",
        "SIoULoss",
    ]
    assert args.losses[0]["mode"] == "linear"
    assert simulate.parse(["--quick"]).centers == 500
