"""What the playground computes is what the package computes, in Node and in a real browser."""

import json
import shutil
import subprocess
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import playground
import pytest
import torch

from detloss_plugins.registry import registered_losses
from detloss_plugins.testing.samples import boxes

BOX_LOSSES = {name: cls for name, cls in registered_losses().items() if cls.facts.family == "box"}
PAGE = Path(playground.__file__).parents[1] / "docs" / "playground"
NODE = """
require(process.argv[1]);
const cases = JSON.parse(require("fs").readFileSync(0, "utf8"));
const results = cases.map(([name, i, pred, target, settings]) => DETLOSS[name][i].f(pred, target, settings));
process.stdout.write(JSON.stringify(results, (_, v) => (typeof v === "number" && !isFinite(v) ? String(v) : v)));
"""


def pairs(count):
    """Predictions and targets in pixels, ``(count + 4, 4)``: also disjoint, nested, of no size, and the same."""
    pred, target = boxes(count, seed=3, dtype=torch.float64)
    special = [[10, 10, 20, 20, 40, 50, 70, 80], [0, 0, 90, 90, 30, 30, 50, 60]]
    special += [[5, 5, 5, 5, 3, 3, 9, 9], [10, 10, 40, 30, 10, 10, 40, 30]]
    more = torch.tensor(special, dtype=torch.float64)
    return torch.cat([pred, more[:, :4]]), torch.cat([target, more[:, 4:]])


def expected(cls, variant, settings, pred, target):
    """Value and gradient of the package's class, built with the settings where it takes them."""
    loss = playground.ready(cls, **variant["settings"], **{k: v for k, v in settings.items() if k in cls.rules})
    if "mean" in settings:  # the state of WIoU
        loss.mean.fill_(settings["mean"])
    pred = pred.clone().requires_grad_()
    value = loss(pred[None], target[None], reduction_override="none").sum()
    return value, torch.autograd.grad(value, pred)[0]


def cases_of(found, count):
    """One case for each variant and pair of boxes, with the defaults, and with the sliders elsewhere."""
    for name, variants in found.items():
        for i, variant in enumerate(variants):
            for k, (pred, target) in enumerate(zip(*pairs(count), strict=True)):
                share = (0.0, 0.3, 0.8)[k % 3]
                settings = {}
                for s in variant["sliders"]:
                    settings[s["name"]] = s["value"] if not share else s["min"] + share * (s["max"] - s["min"])
                if name == "FocalerIoULoss" and settings["d"] >= settings["u"]:
                    settings["d"] = settings["u"] / 2
                yield name, i, pred, target, settings


def check_values(found, tmp_path, count):
    node = shutil.which("node")
    if node is None:
        pytest.skip("Node is not installed: apt-get install nodejs")
    file = tmp_path / "losses.js"
    file.write_text(playground.script_of(found), encoding="utf-8")
    cases = list(cases_of(found, count))
    given = json.dumps([[name, i, p.tolist(), t.tolist(), settings] for name, i, p, t, settings in cases])
    run = subprocess.run([node, "-e", NODE, str(file)], input=given, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    for (name, i, pred, target, settings), (value, gradient) in zip(cases, json.loads(run.stdout), strict=True):
        loss, slope = expected(BOX_LOSSES[name], found[name][i], settings, pred, target)
        got = torch.tensor([float(v) for v in (value, *gradient)], dtype=torch.float64)
        message = partial("{2}: {0} {1} {3}".format, found[name][i]["settings"], settings, name)
        torch.testing.assert_close(got, torch.cat([loss.detach()[None], slope]), rtol=1e-7, atol=1e-9, msg=message)


def test_the_values_of_a_few_are_the_packages(tmp_path):
    names = ("CIoULoss", "BoundedIoULoss")
    check_values({name: playground.variants(BOX_LOSSES[name]) for name in names}, tmp_path, count=20)


def test_an_operator_without_javascript_is_refused():
    with pytest.raises(NotImplementedError, match=r"no JavaScript for aten\.sin"):
        playground.Lowering().call(torch.ops.aten.sin.default, (1.0,), {})


def test_operators_in_place_change_what_they_are_given():
    lowering, x = playground.Lowering(), playground.np.array([["a", "b"]], dtype=object)
    (row,) = lowering.call(torch.ops.aten.unbind.int, (x,), {})
    lowering.call(torch.ops.aten.neg_.default, (row,), {})
    assert lowering.code.script(x[0].tolist()) == "const v0=-a,v1=-b;"


@pytest.mark.slow
def test_the_values_of_all_are_the_packages(tmp_path):
    found = {name: playground.variants(cls) for name, cls in BOX_LOSSES.items()}
    assert all(found.values())
    check_values(found, tmp_path, count=60)


@pytest.fixture
def site(tmp_path):
    """The page's own files behind a file server, and the address."""
    for name in ("playground.js", "playground.css"):
        shutil.copy(PAGE / name, tmp_path)
    playground.write(tmp_path / "losses.js", ("CIoULoss", "IoULoss", "AlphaIoULoss"))
    page = (PAGE / "index.md").read_text(encoding="utf-8").replace('markdown="0"', "")
    (tmp_path / "index.html").write_text(f"<!doctype html><title>page</title>{page}", encoding="utf-8")
    handler = partial(type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *_: None}), directory=tmp_path)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


@pytest.fixture
def page(site):
    """The page in a headless browser; all that it asks for is in ``page.asked``, its errors in ``page.errors``."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: it is of the group docs")
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no browser is installed: apt-get install chromium")
    with sync_api.sync_playwright() as tool:
        opened = tool.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        shown = opened.new_context(viewport={"width": 390, "height": 844}, has_touch=True).new_page()
        shown.asked, shown.errors = [], []
        shown.on("request", lambda request: shown.asked.append(request.url))
        shown.on("pageerror", lambda error: shown.errors.append(str(error)))
        shown.goto(site)
        yield shown
        opened.close()


def shown_box(page, which):
    """The corners of a box on the page, and the scale from its units to the screen's."""
    rect = page.locator(f".{which} rect")
    x, y, w, h = (float(rect.get_attribute(name)) for name in ("x", "y", "width", "height"))
    return torch.tensor([x, y, x + w, y + h], dtype=torch.float64)


def check_shown(page, name, settings=None):
    """The number on the page is the package's for the boxes on the page."""
    shown = float(page.locator(f'[data-loss="{name}"] .value').get_attribute("data-value"))
    loss, _ = expected(
        BOX_LOSSES[name], {"settings": {}}, settings or {}, shown_box(page, "pred"), shown_box(page, "target")
    )
    assert shown == pytest.approx(loss.item(), rel=1e-9)


@pytest.mark.slow
def test_the_page_in_a_browser(page, site):
    for name in ("CIoULoss", "IoULoss", "AlphaIoULoss"):
        check_shown(page, name)
    before = shown_box(page, "pred")
    area = page.locator(".pred rect").bounding_box()
    middle = area["x"] + area["width"] / 2, area["y"] + area["height"] / 2
    page.mouse.move(*middle)
    page.mouse.down()
    page.mouse.move(middle[0] + 30, middle[1] + 10, steps=3)
    page.mouse.up()
    moved = shown_box(page, "pred") - before
    assert moved[0] == pytest.approx(moved[2].item())
    assert 0 < moved[1] < moved[0]
    check_shown(page, "CIoULoss")
    handle = page.locator(".target .handle").last.bounding_box()  # the lower right corner
    target = shown_box(page, "target")
    page.mouse.move(handle["x"] + handle["width"] / 2, handle["y"] + handle["height"] / 2)
    page.mouse.down()
    page.mouse.move(handle["x"] - 20, handle["y"] + 20)
    page.mouse.up()
    resized = shown_box(page, "target") - target
    assert resized[:2].tolist() == [0, 0]
    assert resized[2] < 0 < resized[3]
    page.locator(".pred").focus()
    before = shown_box(page, "pred")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Shift+ArrowDown")
    assert (shown_box(page, "pred") - before).tolist() == [-1, 0, -1, 1]
    page.locator('[data-loss="AlphaIoULoss"]').click()
    slider = page.locator('[data-setting="alpha"]')
    slider.fill("2")
    check_shown(page, "AlphaIoULoss", {"alpha": 2.0})
    page.locator('[data-loss="CIoULoss"]').click()
    before = float(page.locator('[data-loss="CIoULoss"] .value').get_attribute("data-value"))
    page.get_by_role("button", name="Descend").click()
    page.wait_for_timeout(500)
    page.get_by_role("button", name="Stop").click()
    assert float(page.locator('[data-loss="CIoULoss"] .value').get_attribute("data-value")) < before
    check_shown(page, "CIoULoss")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert not page.errors
    assert all(url.startswith(site) for url in page.asked)


@pytest.mark.slow
def test_a_finger_drags_a_box(page):
    """Touch events of the browser's own, by its protocol, on a page that could scroll."""
    page.set_viewport_size({"width": 390, "height": 500})
    page.evaluate("scrollTo(0, 0)")
    before, area = shown_box(page, "pred"), page.locator(".pred rect").bounding_box()
    x, y = area["x"] + area["width"] / 3, area["y"] + area["height"] / 3
    session = page.context.new_cdp_session(page)
    for kind, points in (
        ("touchStart", [{"x": x, "y": y}]),
        ("touchMove", [{"x": x + 10, "y": y + 30}]),
        ("touchMove", [{"x": x + 20, "y": y + 60}]),
        ("touchEnd", []),
    ):
        session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
        page.wait_for_timeout(100)  # as a finger takes its time; moves in one frame are one
    moved, scale = shown_box(page, "pred") - before, (before[2] - before[0]).item() / area["width"]
    assert moved.tolist() == pytest.approx([20 * scale, 60 * scale] * 2, abs=1)  # and the page has not scrolled
    assert page.evaluate("scrollY") == 0
