"The site: two pages of it are built and opened in a browser; every page of it has sources that fit."
import re
import sys
from pathlib import Path

import nbformat
import pytest
from chromium import Chromium, needs_browser

ROOT = Path(__file__).resolve().parent.parent
for package in ("sphinx", "myst_nb", "furo", "latex2mathml"): pytest.importorskip(package, reason="the extra `docs` is not installed")
if not (ROOT / "docs" / "make_site.py").is_file(): pytest.skip("docs/ is not beside the tests", allow_module_level=True)
sys.path.insert(0, str(ROOT / "docs"))
import make_site  # noqa: E402


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "The first page, the page of gates, the reference of two modules."
    folder = tmp_path_factory.mktemp("site")
    odd = make_site.make_site(folder / "site", only=["10_gating.ipynb"], api=["gating", "datasets"])
    assert [line for line in odd if "leads nowhere" in line] == []
    return folder / "site"


def test_two_pages_with_reference_and_search(site):
    gating = (site / "10_gating.html").read_text(encoding="utf-8")
    assert gating.count("<math") > 10 and "#| export" not in gating and "nbdev_export" not in gating
    api = (site / "api" / "gating.html").read_text(encoding="utf-8")
    assert re.search("token goes", api) and re.search('id="noisytopkgate"', api, re.I)
    methods = (site / "api" / "datasets.html").read_text(encoding="utf-8")
    assert "SegmentationTiles.label_counts" in methods and "kept decoded" not in methods  # patched in; with the comment behind the parameter:
    assert "standardise with these; None: physical units" in methods
    for page in site.rglob("*.html"):
        asked = re.findall(r"<(?:script|img|link|iframe)[^>]+(?:src|href)=\"(https?:[^\"]+)\"", page.read_text(encoding="utf-8"))
        assert asked == [], page.name


@needs_browser
def test_the_site_opens_from_the_disk(site):
    with Chromium() as browser:
        for width in (400, 1280):
            browser.size(width)
            for page in ("index.html", "10_gating.html", "api/gating.html"):
                browser.open(site / page)
                assert browser("document.documentElement.scrollWidth") <= width, page
                assert browser("document.fonts.status") and browser("[...document.querySelectorAll('.equation math')].every(m => m.getBoundingClientRect().height > 10)")
        browser.open(f"{(site / 'search.html').as_uri()}?q=balance")
        browser.wait(lambda: "Gating" in browser("document.querySelector('#search-results')?.innerText || ''"), 20)
        assert browser.complaints == [] and browser.foreign() == []


def test_every_page_leads_somewhere(tmp_path):
    assert make_site.stage(tmp_path / "source").missing == []
    staged = {p.relative_to(tmp_path / "source").as_posix() for p in (tmp_path / "source").rglob("*.ipynb")}
    assert {"index.ipynb", "troubleshooting.ipynb", "25_explorer.ipynb", "simulator/00_spectra.ipynb", "experiments/benchmark.ipynb"} <= staged
    shown = nbformat.read(tmp_path / "source" / "index.ipynb", 4).cells[-1].source.splitlines()
    assert {page[:-6] for page in staged} - {"index"} <= set(shown)  # in the navigation
    assert shown.index("02_bands") < shown.index("10_gating") < shown.index("25_explorer") < shown.index("simulator/00_spectra") < shown.index("api/index")


def test_a_card_for_everything_that_is_shipped():
    cards, package = make_site.cards(), ROOT / "spectralmoe"
    models = [f.parent.name for f in package.glob("assets/*/model.safetensors")]
    assert models and all(f"cards/models/{m}" in cards and f"cards/data/{m}" in cards for m in models)
    tasks = [p.stem for p in package.glob("tables/*.json")]
    assert len(tasks) > 10 and all("licence" in cards[f"cards/data/{t}"] for t in tasks)
    assert "| sha256 begins |" in cards["cards/models/mini_vfm"] and "laterite" in cards["cards/data/mini_vfm"]
    assert "| 0 | building | `#db0e9a` |" in cards["cards/data/flair"] and "| other_departments | target |" in cards["cards/data/flair"]


def test_a_dead_link_is_noticed(tmp_path):
    links = make_site.Links(tmp_path)
    text = links.rewritten("[a](12_fusion.ipynb) [b](../reports/README.md#x) `[c](d)` [e](https://x.y) [f](nowhere.ipynb)", "10_gating.ipynb")
    assert '<a href="12_fusion.html">a</a>' in text and '<a href="reports/index.html">b</a>' in text and "[e](https://x.y)" in text
    assert "10_gating.ipynb: nowhere.ipynb" in links.missing
