"""The site builds strictly, its formulas need no script, its pages are small, and nothing in them is elsewhere."""

import functools
import http.server
import os
import re
import shutil
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BIG = {"playground"}  # pages and folders that may be larger


def test_a_formula_becomes_mathml():
    pytest.importorskip("latex2mathml", reason="the dependency group docs is not installed")
    import site_hooks

    line = r'<p>as <span class="arithmatex">\(1 - \frac{|B \cap T|}{|B \cup T|}\)</span> has it, 1 &lt; 2</p>'
    drawn = site_hooks.on_page_content(line)
    assert re.search(r'as <math [^>]*display="inline">.*<mfrac>.*</math> has it, 1 &lt; 2</p>', drawn)
    assert "arithmatex" not in drawn
    drawn = site_hooks.on_page_content(r'<div class="arithmatex">\[a &lt; b\]</div>')
    formula = "<mi>a</mi><mo>&[^;]*;</mo><mi>b</mi>"
    assert re.fullmatch(rf'<div .*<math [^>]*display="block">.*{formula}.*</math></div>', drawn)


def test_the_gallery_joins_the_navigation(tmp_path):
    pytest.importorskip("latex2mathml", reason="the dependency group docs is not installed")
    import site_hooks

    assert site_hooks.generated_pages(tmp_path) == []
    for page in ("gallery/index.md", "gallery/GIoULoss.md", "gallery/CIoULoss.md", "playground/index.md"):
        (tmp_path / page).parent.mkdir(exist_ok=True)
        (tmp_path / page).touch()
    config = types.SimpleNamespace(docs_dir=tmp_path, nav=[{"Choose": [{"Losses": "a.md"}, {"Experiments": "b.md"}]}])
    (section,) = site_hooks.on_config(config).nav
    gallery = {"Gallery": ["gallery/index.md", "gallery/CIoULoss.md", "gallery/GIoULoss.md"]}
    assert section["Choose"][1:3] == [gallery, {"Playground": ["playground/index.md"]}]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs", reason="the dependency group docs is not installed")
    pytest.importorskip("material", reason="the dependency group docs is not installed")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.slow
def test_it_builds_strictly(site):
    assert (site / "index.html").exists()
    assert (site / "api" / "box-losses.html").exists()


@pytest.mark.slow
def test_the_reference_is_markdown(site):
    """Examples of docstrings are code, not quotations, and no markup of Sphinx is left."""
    for page in (site / "api").glob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert "<blockquote" not in text, page
        assert not re.search(r":(func|class|mod|meth):", text), page
    assert "&gt;&gt;&gt; </span>" in (site / "api" / "box-losses.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_pages_are_small(site):
    """With their pictures, styles and scripts."""
    for page in set(site.rglob("*.html")) - {site / "404.html"}:  # whose links begin at the root
        if BIG.isdisjoint({page.stem, *page.relative_to(site).parts}):
            parts = re.findall(r'(?:src|href)="([^"#:]+\.(?:css|js|svg|png))"', page.read_text(encoding="utf-8"))
            files = [page, *{(page.parent / part).resolve() for part in parts}]
            assert sum(file.stat().st_size for file in files) < 1e6, page


@pytest.mark.slow
def test_nothing_is_fetched_from_elsewhere(site):
    """Neither by a page nor by a style."""
    host = r"[\"']?(?:https?:)?//"
    fetched = rf"<(?:script|img|iframe|source)[^>]*\bsrc={host}|<link(?![^>]*rel=.?canonical)[^>]*href={host}"
    for page in site.rglob("*.html"):
        assert not re.search(fetched, page.read_text(encoding="utf-8")), page
    for style in site.rglob("*.css"):
        assert not re.search(rf"url\({host}|@import", style.read_text(encoding="utf-8")), style


class Quiet(http.server.SimpleHTTPRequestHandler):
    """A file server that logs nothing."""

    def log_message(self, *_):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_in_a_browser(site, width):
    """No request leaves the site, no script fails, and no page is wider than the window."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("there is no chromium")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    home = f"http://127.0.0.1:{server.server_port}/"
    requests, errors = [], []
    try:
        with playwright.sync_playwright() as running:
            browser = running.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": width, "height": 900})
            page.on("request", lambda request: requests.append(request.url))
            page.on("pageerror", lambda error: errors.append(str(error)))
            drawn = [name for name in ("gallery/index", "gallery/CIoULoss") if (site / f"{name}.html").exists()]
            for name in ("index", "differences", "losses", "faq", "api/box-losses", *drawn):
                page.goto(f"{home}{name}.html")
                assert page.evaluate("document.documentElement.scrollWidth") <= width, name
            browser.close()
    finally:
        server.shutdown()
    assert requests
    assert not [url for url in requests if not url.startswith((home, "data:", "blob:"))]
    assert not errors
