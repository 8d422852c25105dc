"The pages of the reports in a real browser: nothing wider than the window, no picture missing."
import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest

from spectralmoe.reporting.tables import cells_of

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(ROOT.glob("reports/**/index.html"))
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--virtual-time-budget=10000", "--dump-dom")
MEASURE = """<script>addEventListener("load", () => { document.title = JSON.stringify({
  page: document.documentElement.scrollWidth, window: innerWidth,
  broken: [...document.images].filter(i => !i.naturalWidth).map(i => i.src),
  silent: [...document.images].filter(i => !i.alt.trim()).length, pictures: document.images.length}) })</script></head>"""


def measured(page, width, folder):
    "What a browser says of a page in a frame of this width; a window of its own cannot be narrower than 500 pixels."
    copy = page.with_name(f".{page.stem}-measured.html")
    html = page.read_text(encoding="utf-8").replace("</head>", MEASURE, 1)
    frame = folder / "frame.html"
    report = ('<script>addEventListener("load", () => setTimeout(() => { document.title = '
              'document.querySelector("iframe").contentDocument.title }, 500))</script>')
    frame.write_text(f'<title></title>{report}<iframe src="{copy.as_uri()}" style="width:{width}px;height:900px;border:0"></iframe>', encoding="utf-8")
    copy.write_text(html, encoding="utf-8")
    try:
        said = subprocess.run([BROWSER, *FLAGS, "--allow-file-access-from-files", f"--user-data-dir={folder / 'profile'}",
                               f"--window-size={width + 100},1000", frame.as_uri()], capture_output=True, text=True, timeout=120).stdout
    finally: copy.unlink()
    title = re.search("<title>(.*?)</title>", said, re.S)
    assert title and title[1], f"the browser said nothing of {page.name}"
    return json.loads(unescape(title[1]))


@pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome here to look at the pages with")
@pytest.mark.parametrize("width", [400, 1280])
@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.parent.relative_to(ROOT).as_posix())
def test_a_page_fits_the_window_and_shows_its_pictures(page, width, tmp_path):
    found = measured(page, width, tmp_path)
    assert found["window"] == width and found["page"] <= width
    assert found["broken"] == [] and found["silent"] == 0
    assert found["pictures"] == page.read_text(encoding="utf-8").count("<img")


@pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome here to look at the pages with")
def test_the_browser_would_notice(tmp_path):
    page = tmp_path / "index.html"
    page.write_text('<!doctype html><html><head><title>a</title></head><body><img src="none.png"><div style="width:700px">wide</div></body></html>', encoding="utf-8")
    found = measured(page, 400, tmp_path)
    assert found["page"] >= 700 and len(found["broken"]) == found["silent"] == 1


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.parent.relative_to(ROOT).as_posix())
def test_every_link_of_a_page_leads_somewhere(page):
    text = page.read_text(encoding="utf-8")
    links = {unescape(link) for link in re.findall('(?:href|src)="([^"]+)"', text)}
    assert links and not [x for x in links if x.startswith("http")]
    at = {x: (page.parent / path if path else page, anchor) for x in links for path, _, anchor in [x.partition("#")]}
    assert not [x for x, (there, _) in at.items() if not there.exists()]
    assert not [x for x, (there, anchor) in at.items() if anchor and f'id="{anchor}"' not in there.read_text(encoding="utf-8")]


def test_reports_readme_leads_to_every_page_and_notebook():
    text = (ROOT / "reports" / "README.md").read_text(encoding="utf-8")
    links = set(re.findall(r"\]\(([^)]+)\)", text))
    assert links == {p.relative_to(ROOT / "reports").as_posix() for p in [*ROOT.glob("reports/*/index.html"), *ROOT.glob("reports/**/[!.]*.ipynb")]}


@pytest.mark.parametrize("page", ["README.md", "reports/README.md", "nbs/troubleshooting.ipynb", "nbs/index.ipynb"])
def test_every_link_for_readers_leads_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    links = {link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith("http")}
    assert not [x for x in links if not (ROOT / page).parent.joinpath(x).exists()]
    assert page != "README.md" or len(text.splitlines()) <= 120


def test_what_pages_quote_is_in_the_reports():
    "An interval in the text of a page is one that the tables of claims have now."
    said = {f"{c.mean:+.1f} ± {c.half_width:.1f}" for table in ROOT.glob("reports/*/claims/tables/*.csv")
            for cells in cells_of(table).values() for c in cells.values() if c.seeds}
    pages = {p.name: json.loads(p.read_text(encoding="utf-8"))["cells"] for p in ROOT.glob("nbs/*.ipynb")}
    quoted = {(name, x) for name, cells in pages.items() for c in cells if c["cell_type"] == "markdown"
              for x in re.findall(r"[+-]\d+\.\d ± \d+\.\d", "".join(c["source"]))}
    assert len(quoted) >= 4 and [q for q in quoted if q[1] not in said] == []
