"""What ``detloss advise`` says of data sets whose labels are made up, and of a study that is."""

import json
import shlex
import sys

import click.testing
import numpy as np
import pytest
from PIL import Image

from detloss_plugins import advice, cli, study
from detloss_plugins.ablation import grid
from detloss_plugins.ablation.compare import table
from detloss_plugins.advice import LabelsError, advise, describe, read_labels
from detloss_plugins.advice.labels import Labels

SIZE = (200, 100)  # of every image


def write_yolo(root, labels, names=("a", "b", "c"), extra=""):
    """A data YAML of Ultralytics: an image for each list of lines; None is an image without a label file."""
    for folder in ("images", "labels"):
        (root / folder / "train").mkdir(parents=True)
    for number, lines in enumerate(labels):
        Image.new("L", SIZE).save(root / "images" / "train" / f"{number}.png")
        if lines is not None:
            (root / "labels" / "train" / f"{number}.txt").write_text("\n".join(lines), encoding="utf-8")
    path = root / "data.yaml"
    path.write_text(f"path: .\ntrain: images/train\nnames: {list(names)}\n{extra}", encoding="utf-8")
    return path


def write_coco(root, images):
    """An annotation file with the boxes ``(category, x, y, w, h)`` of each image."""
    annotations = [
        {"id": 10 * i + j, "image_id": i + 7, "category_id": category, "bbox": box, "iscrowd": int(category < 0)}
        for i, boxes in enumerate(images)
        for j, (category, *box) in enumerate(boxes)
    ]
    content = {
        "images": [{"id": i + 7, "file_name": f"{i}.png", "width": 200, "height": 100} for i in range(len(images))],
        "annotations": [{**one, "category_id": abs(one["category_id"])} for one in annotations],
        "categories": [{"id": 3, "name": "a"}, {"id": 5, "name": "b"}],
    }
    path = root / "train.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


BOXES = [(3, 10, 10, 20, 40), (3, 15, 10, 20, 40), (5, 100, 50, 100, 50)]


def test_both_forms_are_read_alike(tmp_path):
    lines = ["0 0.1 0.3 0.1 0.4", "0 0.125 0.3 0.1 0.4", "1 0.75 0.75 0.5 0.5"]
    yolo = read_labels(write_yolo(tmp_path / "yolo", [lines, []], names="ab"))
    coco = read_labels(write_coco(tmp_path, [BOXES, []]))
    for ours in (yolo, coco):
        np.testing.assert_allclose(ours.boxes, [[10, 10, 30, 50], [15, 10, 35, 50], [100, 50, 200, 100]])
        assert (ours.names, ours.cls.tolist(), ours.image.tolist()) == (["a", "b"], [0, 0, 1], [0, 0, 0])
        assert ours.sizes.tolist() == [[200, 100], [200, 100]]
    assert describe(yolo) == describe(coco)


def test_labels_of_other_tasks_have_the_box_around_them(tmp_path):
    outline = ["2 0.1 0.2 0.3 0.2 0.2 0.6"]
    corners = ["2 0.1 0.4 0.2 0.2 0.3 0.4 0.2 0.6"]
    box = [20, 20, 60, 60]
    for name, lines in (("segment", outline), ("obb", corners)):
        assert read_labels(write_yolo(tmp_path / name, [lines])).boxes.tolist() == [pytest.approx(box)]
    pose = ["2 0.2 0.4 0.2 0.4 0.15 0.3 2 0.25 0.3 0"]
    path = write_yolo(tmp_path / "pose", [pose], extra="kpt_shape: [2, 3]\n")
    assert read_labels(path).boxes.tolist() == [pytest.approx(box)]


def test_images_are_found_by_list_and_by_pattern(tmp_path):
    path = write_yolo(tmp_path, [["0 0.5 0.5 0.1 0.1"], None])
    text = path.read_text(encoding="utf-8")
    (tmp_path / "list.txt").write_text("./images/train/0.png\n", encoding="utf-8")
    for written, images in (("list.txt", 1), ("images/*/*.png", 2), ("[images/train, list.txt]", 3)):
        path.write_text(text.replace("images/train", written), encoding="utf-8")
        assert describe(read_labels(path)).images == images


def test_a_data_yaml_means_what_it_does_in_ultralytics(tmp_path):
    """Names by their numbers, and a folder above that is not there, as Roboflow writes it."""
    path = write_yolo(tmp_path, [["0 0.5 0.5 0.1 0.1"]])
    for text in (
        "names: {1: car, 0: person}\ntrain: ../images/train",
        "names: [person, car]\ntrain: images/train\npath: .",
    ):
        path.write_text(text, encoding="utf-8")
        found = read_labels(path)
        assert (found.names, found.cls.tolist()) == (["person", "car"], [0])


def test_a_path_that_ultralytics_takes_from_the_working_directory_is_told(tmp_path, monkeypatch):
    path = write_yolo(tmp_path / "own", [["0 0.5 0.5 0.1 0.1"]])
    for here, told in (tmp_path, True), (tmp_path / "own", False):
        monkeypatch.chdir(here)
        output = command(path, monkeypatch=monkeypatch).output
        assert ("does not look for path: . beside data.yaml" in output) == told


def test_files_of_windows_and_of_phones(tmp_path):
    """A mark at the beginning of a label file, and a photograph that is stored on its side."""
    path = write_yolo(tmp_path, [["0 0.5 0.5 0.5 0.5"]])
    label, image = tmp_path / "labels" / "train" / "0.txt", tmp_path / "images" / "train" / "0.png"
    label.write_text("0 0.5 0.5 0.5 0.5\n", encoding="utf-8-sig")
    assert read_labels(path).sizes.tolist() == [[200, 100]]
    with Image.open(image) as picture:
        exif = picture.getexif()
        exif[274] = 6
        picture.save(image, exif=exif)
    found = read_labels(path)
    assert found.sizes.tolist() == [[100, 200]]
    assert found.boxes.tolist() == [[25, 50, 75, 150]]


def test_a_relative_folder_is_looked_up_where_ultralytics_keeps_its_own(tmp_path, monkeypatch):
    utils = pytest.importorskip("ultralytics.utils")
    monkeypatch.setattr(utils, "DATASETS_DIR", tmp_path)
    path = write_yolo(tmp_path / "own", [["0 0.5 0.5 0.1 0.1"]])
    elsewhere = tmp_path / "yamls" / "own.yaml"
    elsewhere.parent.mkdir()
    elsewhere.write_text(path.read_text(encoding="utf-8").replace("path: .", "path: own"), encoding="utf-8")
    assert len(read_labels(elsewhere).sizes) == 1


def test_the_figures_of_a_data_set(tmp_path):
    boxes = [*BOXES, (5, 100, 50, 100, 50), (3, 190, 10, 20, 20), (3, 50, 50, 0, 10), (-3, 0, 0, 9, 9)]
    found = describe(read_labels(write_coco(tmp_path, [boxes, [(3, 0, 0, 10, 10)], []])), size=400)
    assert (found.images, found.empty, found.objects, found.crowds) == (3, 1, 7, 1)
    assert (found.counts, found.imbalance) == ({"a": 5, "b": 2}, 2.5)
    assert (found.outside, found.degenerate, found.duplicate) == (1, 1, 1)
    assert found.faulty == pytest.approx(3 / 7)
    assert found.crowded == pytest.approx(4 / 7), "IoU 0.6 of the first two, 1 of those that are there twice"
    assert found.per_image == (3.5, 6)
    # At twice the size the areas are 3200 twice, 20000 twice, 1600 and 400; that without a width has none.
    assert (found.tiny, found.small, found.medium, found.large) == pytest.approx((0, 1 / 6, 3 / 6, 2 / 6))
    assert describe(read_labels(tmp_path / "train.json")).size == 200, "no image is larger"
    assert describe(read_labels(tmp_path / "train.json"), 100).tiny == pytest.approx(4 / 6), "200 twice, 100 and 25"


def upright(boxes, image=0, cls=0):
    """Labels in two images of 100 x 200 pixels, which stand."""
    image, cls = (np.broadcast_to(given, len(boxes)) for given in (image, cls))
    return Labels(["a", "b"], np.array([[100, 200]] * 2), image, cls, np.array(boxes, dtype=float))


def test_an_image_that_stands_has_its_height_for_a_longer_side():
    sides = [(2, 8), (18, 2), (8, 8), (25, 4)]  # areas of 16, 36, 64 and 100
    found = describe(upright([(10, 10, 10 + width, 10 + height) for width, height in sides]), size=400)
    assert found.thirds == pytest.approx((12, 16)), "twice the roots of 36 and 64"
    assert (found.tiny, found.small) == (0.5, 1)
    # Width over height is 0.25, 1, 6.25 and 9; 5 % of three steps is 0.15 of the first, 95 % is 0.85 of the last.
    assert found.shapes == pytest.approx((0.25 + 0.15 * 0.75, 3.625, 6.25 + 0.85 * 2.75))


def test_boxes_that_reach_out_of_the_image():
    out = [(-1, 5, 20, 20), (5, -1, 20, 20), (80, 5, 101, 20), (5, 180, 20, 201)]
    for box in out:
        assert describe(upright([box])).outside == 1, box
    assert describe(upright([(-0.4, -0.4, 100.4, 200.4), (5, 110, 20, 190)])).outside == 0
    assert describe(upright([(-1, -1, 101, 201)])).outside == 1, "once"


def test_what_has_been_labelled_before():
    """In the same image and class, but for less than a hundredth of a pixel."""
    box, near = (5, 5, 20, 20), (5.001, 5, 20, 20)
    assert describe(upright([box, near, box])).duplicate == 2
    assert describe(upright([box, box], image=[0, 1])).duplicate == 0
    assert describe(upright([box, box], cls=[0, 1])).duplicate == 0
    assert describe(upright([box, (5, 5, 20, 20.1)])).duplicate == 0


def test_what_is_no_data_set_is_refused_in_a_sentence(tmp_path):
    broken = {
        "0 0.5 0.5 x 0.1": "line 1 is no label",
        "0 0.5 0.5 nan 0.1": "line 1 is no label",
        "3 0.5 0.5 0.1 0.1": "has the class 3",
        "0 0.5 0.5": "2 numbers",
    }
    for number, (line, message) in enumerate(broken.items()):
        with pytest.raises(LabelsError, match=message):
            read_labels(write_yolo(tmp_path / str(number), [[line]]))
    path = write_yolo(tmp_path / "good", [[]])
    with pytest.raises(LabelsError, match="no data YAML with a key val"):
        read_labels(path, "val")
    path.write_text("train: nowhere\nnames: [a]\n", encoding="utf-8")
    with pytest.raises(LabelsError, match=r"nowhere, train of .* is not there"):
        read_labels(path)
    for text, says in (("names:", "nc"), ("names: 3", "nc"), ("nc: two", "nc"), ("names: [a]\ntrain: 5", "train is a")):
        path.write_text(f"train: images/train\n{text}\n", encoding="utf-8")
        with pytest.raises(LabelsError, match=says):
            read_labels(path)
    with pytest.raises(LabelsError, match="bbox is"):
        read_labels(write_coco(tmp_path, [[(3, 10, 10, float("nan"), 5)]]))
    (tmp_path / "x.json").write_text("{}", encoding="utf-8")
    with pytest.raises(LabelsError, match="is no annotation file of COCO"):
        read_labels(tmp_path / "x.json")
    with pytest.raises(LabelsError, match="has no images"):
        read_labels(write_coco(tmp_path, []))


def description(**figures):
    """A data set that is like nothing but plain ones, and what makes it like another."""
    plain = {"counts": {"a": 100, "b": 100}, "tiny": 0.1, "per_image": (4.0, 9)}
    return advice.Description(size=640, images=50, empty=0, **{**plain, **figures})


@pytest.mark.parametrize(
    ("scenario", "yes", "no"),
    [
        ("long-tail", {"counts": {"a": 100, "b": 5}}, {"counts": {"a": 100, "b": 6, "c": 0}}),
        ("small", {"tiny": 0.5}, {"tiny": 0.49}),
        ("crowded", {"per_image": (10.0, 12)}, {"per_image": (9.9, 300)}),
        ("crowded", {"crowded": 0.1}, {"crowded": 0.09}),
        ("noisy", {"duplicate": 2}, {"duplicate": 1}),
        ("trees", {"counts": {"a": 100}}, {"counts": {"a": 100, "b": 100}}),
    ],
)
def test_rules(scenario, yes, no):
    assert [*advice.scenarios(description(**yes))] == [scenario, "plain"]
    assert [*advice.scenarios(description(**no))] == ["plain"]


def trained(label, data, aps, slot="cls", weight=2.0):
    """Runs of a loss, a seed each, with these AP."""
    losses = {} if label == "stock" else {slot: {"type": label, "loss_weight": weight}}
    same = {"label": label, "slot": slot, "losses": losses, "model": "yolov8n.yaml", "data": data, "epochs": 3}
    return [
        {**same, "seed": seed, "metrics": {"AP50": ap + 0.2, "AP": ap}, "per_class": {}, "curve": {}}
        for seed, ap in enumerate(aps)
    ]


STUDY = [
    {
        "name": "made up",
        "runs": [
            *trained("stock", "digits", (0.40, 0.42, 0.41)),
            *trained("FocalLoss", "digits", (0.44, 0.47, 0.45)),  # better
            *trained("CIoULoss", "digits", (0.30, 0.31, 0.31), "box"),  # worse
            *trained("GIoULoss", "digits", (0.45, 0.40, 0.43), "box"),  # not distinguishable
            *trained("stock", "digits:small", (0.20, 0.22, 0.21)),
            *trained("NWDLoss", "digits:small", (0.25, 0.28, 0.26), "box"),  # better
            *trained("FocalLoss", "digits:small", (0.19, 0.21, 0.19)),
            *trained("stock", "digits:crowded", (0.20, 0.22, 0.21)),
            *trained("SIoULoss", "digits:crowded", (0.19, 0.21, 0.20), "box"),
        ],
    }
]


def labels_of(found):
    return [choice.row.label for choice in found.choices]


def test_the_losses_that_were_better_on_such_data_come_first():
    found = advise(description(), STUDY)
    assert labels_of(found) == ["FocalLoss", "GIoULoss"]
    assert [choice.better for choice in found.choices] == [True, False]
    assert found.tried == 3
    small = advise(description(tiny=0.8), STUDY)
    assert labels_of(small) == ["NWDLoss", "GIoULoss"], "focal loss has a row on small objects, below stock"
    assert [choice.data for choice in small.choices] == ["digits:small", "digits"]
    assert small.choices[0].mean() == pytest.approx(0.0533, abs=1e-4)
    assert small.choices[0].noise == pytest.approx(0.01)


def test_a_loss_that_is_worse_on_any_data_like_it_is_not_advised():
    more = trained("CIoULoss", "digits:small", (0.25, 0.28, 0.26), "box")  # better, but worse on plain data
    found = advise(description(tiny=0.8), [{"runs": [*STUDY[0]["runs"], *more]}])
    assert labels_of(found) == ["NWDLoss", "GIoULoss"]


def test_a_loss_is_shown_with_all_its_models(monkeypatch, tmp_path):
    """Of several, the best alone would be there because it was lucky."""
    other = [dict(run, model="yolo11n.yaml") for run in STUDY[0]["runs"][:3]]
    other += [dict(run, model="yolo11n.yaml") for run in trained("FocalLoss", "digits", (0.39, 0.40, 0.41))]
    runs = [*STUDY[0]["runs"], *other]
    first = advise(description(), [{"runs": runs}]).choices[0]
    assert (first.row.label, first.model, [one.model for one in first.others]) == (
        "FocalLoss",
        "yolov8n.yaml",
        ["yolo11n.yaml"],
    )
    assert first.mean() == pytest.approx((0.13 / 3 - 0.01) / 2)
    path = write_yolo(tmp_path, [["0 0.5 0.5 0.5 0.5"]])
    output = command(path, monkeypatch=monkeypatch, studied=[{"runs": runs}]).output
    assert "FocalLoss on digits, yolov8n.yaml, 3 epochs, seeds 0, 1, 2; AP of the stock losses there ± 0.010:" in output
    assert "FocalLoss on digits, yolo11n.yaml" in output


def test_what_is_better_by_itself_and_not_beside_all_others_says_so(monkeypatch, tmp_path):
    noisy = trained("EIoULoss", "digits", (0.2, 0.6, 0.4), "box")
    path = write_yolo(tmp_path, [["0 0.5 0.5 0.5 0.5"]])
    for more, says in (([], "better\n"), (noisy, "better; beside all losses tried there: not distinguishable\n")):
        runs = [run for run in STUDY[0]["runs"] if run["label"] != "GIoULoss"]
        output = command(path, monkeypatch=monkeypatch, studied=[{"runs": [*runs, *more]}]).output
        assert f"AP50  +0.043, 95 % interval +0.029 to +0.058: {says}" in output


@pytest.mark.parametrize(
    ("aps", "shift", "verdicts"),
    [((0.30, 0.31, 0.31), 0.2, ["better", "worse"]), ((0.44, 0.47, 0.45), -0.2, ["worse", "better"])],
)
def test_what_is_better_in_one_metric_and_worse_in_the_other_is_not_advised(aps, shift, verdicts):
    runs = [*trained("stock", "digits", (0.40, 0.42, 0.41)), *trained("FocalLoss", "digits", aps)]
    for run in runs[3:]:
        run["metrics"]["AP50"] += shift
    (row,) = (row for row in table(runs) if row.label == "FocalLoss")
    assert [row.differences[name].verdict for name in ("AP50", "AP")] == verdicts
    found = advise(description(), [{"runs": runs}])
    assert (found.tried, labels_of(found)) == (1, [])


def test_what_the_study_does_not_say_is_not_said():
    crowded = advise(description(per_image=(15.0, 20)), STUDY, {"crowded": "it is"})
    assert not crowded.any_better
    assert labels_of(crowded) == []
    assert crowded.tried == 1
    nothing = advise(description(counts={"a": 10}), STUDY, {"trees": "they are"})
    assert (nothing.tried, nothing.unknown, labels_of(nothing)) == (0, ["trees"], [])


def test_losses_of_heads_of_mmdetection_are_none_for_a_yolo():
    runs = [dict(run, model="gfl_r18_fpn_digits") for run in STUDY[0]["runs"]]
    assert advise(description(), [{"runs": runs}]).tried == 0


def test_the_line_to_paste_is_one_that_ablate_reads():
    found = advise(description(), STUDY)
    words = shlex.split(found.command("my data.yaml"))
    assert words[:2] == ["detloss", "ablate"]
    assert words[-4:] == ["--data", "my data.yaml", "--model", "yolov8n.yaml"]
    _, losses, _ = grid.parse_words(words[2:-4])
    assert losses == {choice.row.label: choice.row.losses for choice in found.choices}


def command(*words, monkeypatch=None, studied=STUDY):
    if monkeypatch:
        monkeypatch.setattr(sys.modules["detloss_plugins.advice.advice"], "studies", lambda: studied)
    return click.testing.CliRunner().invoke(cli.main, ["advise", *map(str, words)])


def test_command(tmp_path, monkeypatch):
    path = write_yolo(tmp_path, [["0 0.5 0.5 0.5 0.5", "1 0.1 0.1 0.02 0.04"]])
    done = command(path, monkeypatch=monkeypatch)
    assert done.exit_code == 0, done.output
    for words in (
        "2 objects in 1 images",
        "50% small, 50% medium, 0% large",
        "1 without objects: c",
        "{box: {type: NWDLoss, loss_weight: 2.0}}",
        "AP50  +0.053, 95 % interval +0.039 to +0.068: better",
        f"--data {path}",
        "mean nothing",
    ):
        assert words in done.output
    worse = command(path, "--scenario", "crowded", monkeypatch=monkeypatch, studied=[{"runs": STUDY[0]["runs"][-6:]}])
    assert "None of the 1 losses that the study tried on such data is better" in worse.output
    assert "detloss ablate '" not in worse.output
    empty = command(path, monkeypatch=monkeypatch, studied=[])
    assert "The study has no trainings on such data" in empty.output
    assert command("nowhere.yaml").exit_code == 2
    assert "error: There is no data set nowhere.yaml" in command("nowhere.yaml").stderr
    assert command("digits:hard").exit_code == 2


def test_command_in_a_coco_layout(tmp_path, monkeypatch):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "train").mkdir()
    Image.new("L", SIZE).save(tmp_path / "train" / "0.png")
    write_coco(tmp_path / "annotations", [BOXES])
    for data in (tmp_path, tmp_path / "annotations" / "train.json"):
        done = command(data, monkeypatch=monkeypatch)
        assert "3 objects in 1 images" in done.output, done.output
        assert "--data data.yaml" in done.output
        assert "in MMDetection a dict goes in place of loss_cls or loss_bbox" in done.output
    write_yolo(tmp_path, [["0 0.5 0.5 0.5 0.5"]])
    done = command(tmp_path, monkeypatch=monkeypatch)
    assert "1 objects in 1 images" in done.output, "the data YAML comes first"
    assert f"--data {tmp_path}" in done.output
    assert "needs a data YAML" not in done.output


def test_the_package_has_the_study():
    """Each file of it can be read, and contradicts none of the others."""
    found = study.studies()
    assert advise(description(), found).scenarios
    for content in found:
        assert content["runs"]
        assert content["versions"]
        assert content["machine"]
