"The explorer in a real browser: what a person points at is what the model computed, and the page asks nobody for anything."
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from chromium import Chromium, needs_browser
from typer.testing import CliRunner

from spectralmoe.cli import app
from spectralmoe.explorer import averaged, explore, look_inside, routing_report
from spectralmoe.routing import expert_colours
from spectralmoe.segmentor import Segmentor

SIZE = dict(dim=32, n_layers=3, n_heads=2, patch_size=8)
PARTS = dict(vfm={"name": "dinov3-vits16", **SIZE}, dfm={"name": "depth-anything-v2-small", "image_size": 64, **SIZE}, head="pixel_shuffle",
             statistics=dict(bands=["red", "green", "blue", "nir", "swir22"], mean=[0.1] * 5, std=[0.05] * 5))
BUTTON = "document.querySelectorAll('.smx-legend button')"
SETTLED = "new Promise(done => setTimeout(() => requestAnimationFrame(done), 60))"


@pytest.fixture(scope="module")
def models():
    found = {m: Segmentor.build("made_tiles", **PARTS, method=m, **more) for m, more in (("spectralmoe", dict(n_experts=5, top_k=2)), ("frozen", {}))}
    found["spectralmoe"].initialise(scene()["image"][None])
    return found


def scene(height=60, width=92, seed=0):
    "Patches of a few surfaces, so that experts and classes differ from place to place."
    rng = np.random.default_rng(seed)
    kinds = np.kron(rng.integers(4, size=(8, 12)), np.ones((8, 8), int))[:height, :width]
    image = rng.normal(size=(4, 5, 1)).astype("float32")[kinds, :, 0].transpose(2, 0, 1) + rng.normal(size=(5, height, width)).astype("float32") / 9
    label = torch.tensor(kinds)
    label[:8] = 255
    return dict(image=torch.tensor(image), label=label, name=f"scene {seed}")


@pytest.fixture(scope="module")
def browser():
    with Chromium() as page: yield page


def opened(browser, path, width=1280):
    "The page, ready; the place of its first canvas."
    browser.complaints.clear(); browser.asked.clear()
    browser.size(width)
    browser.open(path)
    browser.wait(lambda: browser("document.querySelector('.smx')?.dataset.ready === 'yes'"))
    browser(SETTLED)
    return browser("(() => { const b = document.querySelector('canvas').getBoundingClientRect(); return [b.x, b.y, b.width, b.height] })()")


def point(browser, box, inside, row, column):
    "The mouse over the middle of a pixel."
    height, width = inside.prediction.shape
    browser.mouse(box[0] + (column + 0.5) * box[2] / width, box[1] + (row + 0.5) * box[3] / height)
    browser(SETTLED)


def colour(browser, inside, row, column, pane=0):
    "What a canvas shows at a pixel."
    height, width = inside.prediction.shape
    return browser(f"(() => {{ const c = document.querySelectorAll('canvas')[{pane}], pen = new OffscreenCanvas(1, 1).getContext('2d');"
                   f"pen.drawImage(c, ({column} + 0.5) * c.width / {width}, ({row} + 0.5) * c.height / {height}, 1, 1, 0, 0, 1, 1);"
                   "return [...pen.getImageData(0, 0, 1, 1).data].slice(0, 3) })()")


def press(browser, value): browser(f"document.querySelector('input[value={value}]').click()"); browser(SETTLED)


def slide(browser, title, value):
    browser(f"(() => {{ const i = [...document.querySelectorAll('.smx-slide')].find(s => s.textContent.startsWith('{title}')).querySelector('input');"
            f"i.value = {value}; i.dispatchEvent(new Event('input')) }})()")
    browser(SETTLED)


@needs_browser
@pytest.mark.parametrize("width", [400, 1280])
def test_one_scene(models, browser, width, tmp_path):
    one, inside = scene(), look_inside(models["spectralmoe"], scene())
    box = opened(browser, routing_report(models["spectralmoe"], one, tmp_path / "inside.html"), width)
    assert browser("document.documentElement.scrollWidth") <= width == browser("innerWidth")
    assert box[2] / box[3] == pytest.approx(92 / 60, rel=0.02)

    point(browser, box, inside, 30, 50)  # hover: every number is the model's
    text = browser("document.querySelector('.smx-facts').innerText")
    classes, k = inside.task["classes"], inside.prediction[30, 50]
    assert f"row 30, column 50: predicted {classes[k]}, labelled {classes[inside.label[30, 50]]}" in text
    shown = browser("[...document.querySelectorAll('.smx-classes span:nth-child(4n)')].map(e => e.textContent)")
    assert shown[0] == f"{round(100 * round(255 * float(inside.probabilities[k, 30, 50])) / 255)} %" and len(shown) == 5
    gates = browser("[...document.querySelectorAll('.smx-gates')].map(g => [...g.querySelectorAll('tbody tr')].map(r => [r.title, r.lastChild.textContent]))")
    for rows, m in zip(gates, ("visual", "depth"), strict=True):
        at, r = (slice(None), 30 // 8, 50 // 8), inside.routing
        for layer, (title, entropy) in enumerate(rows):
            chosen, weights = r.chosen[m][layer][at], np.rint(255 * r.weights[m][layer][at]) / 255
            assert title == ", ".join(f"expert {e}: {int(100 * w + 0.5)} %" for e, w in zip(chosen, weights))
            assert float(entropy) == pytest.approx(r.relative_entropy[m][layer, 30 // 8, 50 // 8], abs=0.008)
    spectrum = browser("document.querySelector('.smx-facts svg').getAttribute('aria-label')")
    values = [float(v) for v in re.findall(r"-?\d+\.\d+(?:e-?\d+)?", spectrum)]
    span = np.nanmax(inside.image, (1, 2)) - np.nanmin(inside.image, (1, 2))
    assert np.abs(values - inside.image[:, 30, 50]).max() < span.max() / 400

    slide(browser, "Opacity", 100)  # at full opacity a corner of a token has the colour of its expert, layer by layer
    for layer in range(3):
        slide(browser, "Layer", layer)
        assert browser("document.querySelector('tr.smx-now td').textContent") == str(layer + 1)
        for row, column in ((9, 17), (41, 73)):
            expert = inside.routing.index["visual"][layer, row // 8, column // 8]
            assert colour(browser, inside, row, column) == list(expert_colours(5)[expert])
    press(browser, "depth")
    assert colour(browser, inside, 9, 17) == list(expert_colours(5)[inside.routing.index["depth"][2, 1, 2]])

    press(browser, "visual")  # highlight: another expert's tokens show the image
    won = np.bincount(inside.routing.index["visual"][2].ravel(), minlength=5)
    first = int(won.argmax())
    shares = browser(f"[...{BUTTON}].map(b => b.querySelector('small').textContent)")
    assert shares[first] == f"{int(100 * won[first] / won.sum() + 0.5)} %"
    browser(f"{BUTTON}[{first}].click()"); browser(SETTLED)
    assert browser(f"{BUTTON}[{first}].ariaPressed") == "true"
    chosen = inside.routing.chosen["visual"][2]
    yes, no = np.argwhere(chosen[0] == first)[0], np.argwhere((chosen != first).all(0))[0]
    assert colour(browser, inside, *(8 * yes + 1)) == list(expert_colours(5)[first])
    bare = colour(browser, inside, *(8 * no + 1))
    press(browser, "image")
    assert colour(browser, inside, *(8 * no + 1)) == bare != list(expert_colours(5)[first])

    press(browser, "errors")
    wrong = np.argwhere((inside.label != 255) & (inside.label != inside.prediction))[0]
    assert colour(browser, inside, *wrong) == [213, 94, 0]
    press(browser, "prediction")
    assert colour(browser, inside, 44, 76) == list(inside.task["palette"][inside.prediction[44, 76]])

    assert browser.complaints == [] and browser.foreign() == []
    refused = browser("fetch('http://127.0.0.1:9/').then(() => 'answered', () => 'refused')")  # and it could not if it wanted to
    assert refused == "refused" and browser.foreign() == [] and "Content Security Policy" in " ".join(browser.complaints)


@needs_browser
def test_keys_alone_are_enough(models, browser, tmp_path):
    one, inside = scene(), look_inside(models["spectralmoe"], scene())
    opened(browser, routing_report(models["spectralmoe"], one, tmp_path / "inside.html", layer=0))
    reached = []
    for _ in range(30):
        browser.key("Tab")
        reached.append(browser("(() => { const e = document.activeElement; return e.tagName + ':' + (e.type || '') })()"))
        if reached[-1] == "CANVAS:": break
    assert {"INPUT:radio", "INPUT:range", "BUTTON:button", "CANVAS:"} <= set(reached)
    said = lambda: browser("document.querySelector('.smx-at')?.textContent || ''")
    for key in ("ArrowRight", "ArrowDown"): browser.key(key)
    assert said().startswith("row 31, column 47:")  # from the middle, 30 and 46
    browser.wait(lambda: "row 31, column 47" in browser("document.querySelector('[role=status]').textContent"))  # spoken as well
    assert f"expert {inside.routing.index['visual'][0, 31 // 8, 47 // 8]}" in browser("document.querySelector('[role=status]').textContent")
    before = colour(browser, inside, 3, 3)
    for _ in range(3): browser.key("+")
    browser(SETTLED)
    zoomed = browser("document.querySelector('canvas').classList.contains('smx-near')")
    browser.key("0"); browser(SETTLED)
    assert zoomed and not browser("document.querySelector('canvas').classList.contains('smx-near')") and colour(browser, inside, 3, 3) == before
    assert browser.complaints == [] and browser.foreign() == []


@needs_browser
@pytest.mark.parametrize("width", [400, 1280])
def test_two_models_are_linked(models, browser, width, tmp_path):
    inside = look_inside(models["spectralmoe"], scene())
    page = explore({"ours": models["spectralmoe"], "plain": models["frozen"]}, scene()).to_html(tmp_path / "two.html")
    box = opened(browser, page, width)
    assert browser("document.documentElement.scrollWidth") <= width
    assert browser("[...document.querySelectorAll('.smx-view h3')].map(e => e.textContent)") == ["scene 0, ours", "scene 0, plain"]
    point(browser, box, inside, 20, 70)
    said = browser("[...document.querySelectorAll('.smx-at')].map(e => e.textContent.slice(0, 17))")
    assert said == ["row 20, column 70"] * 2
    assert browser("[...document.querySelectorAll('.smx-facts')].map(e => e.querySelectorAll('.smx-gates').length)") == [2, 0]
    assert "has no experts" in browser("document.querySelectorAll('.smx-facts')[1].innerText")
    places = lambda: browser("[...document.querySelectorAll('canvas')].map(c => [c.getBoundingClientRect().y, c.getBoundingClientRect().x])")
    assert (places()[0][0] == places()[1][0]) == (width == 1280)  # side by side where there is room
    press(browser, "image")
    spots = [(5, 5), (11, 60), (52, 30), (57, 88)]  # on the screen; away from the frame of the pixel
    seen = lambda: [[colour(browser, inside, *spot, pane) for spot in spots] for pane in range(2)]
    whole = seen()
    browser("document.querySelector('button[title=\"zoom in\"]').click()"); browser(SETTLED)
    near = seen()
    assert whole[0] == whole[1] and near[0] == near[1] and near[0] != whole[0]  # one zoom for both
    assert browser.complaints == [] and browser.foreign() == []


@needs_browser
def test_without_experts_and_without_scripts(models, browser, tmp_path):
    page = routing_report(models["frozen"], {k: v for k, v in scene().items() if k != "label"}, tmp_path / "plain.html")
    opened(browser, page)
    assert browser("[...document.querySelectorAll('input[type=radio]')].map(i => i.value)") == ["image", "prediction"]
    assert browser.complaints == [] and browser.foreign() == []
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.call("Page.navigate", url=page.as_uri())
        node = browser.wait(lambda: browser.call("Runtime.evaluate", expression="document.images[0]?.naturalWidth || 0", returnByValue=True)["result"].get("value"))
    finally: browser.call("Emulation.setScriptExecutionDisabled", value=False)
    assert node > 300


@needs_browser
def test_the_driver_would_notice(browser, tmp_path):
    page = tmp_path / "bad.html"
    page.write_text("<!doctype html><script>console.error('oh'); fetch('http://127.0.0.1:9/x').catch(() => 0); nothing()</script>", encoding="utf-8")
    browser.complaints.clear(); browser.asked.clear()
    browser.open(page)
    browser("new Promise(done => setTimeout(done, 200))")
    assert len(browser.complaints) >= 2 and browser.foreign() == ["http://127.0.0.1:9/x"]
    browser.complaints.clear(); browser.asked.clear()


def test_the_command_writes_a_page(models, tmp_path):
    import rasterio
    folders = [models[m].save_pretrained(tmp_path / m) for m in models]
    with rasterio.open(tmp_path / "scene.tif", "w", "GTiff", 92, 60, 5, dtype="float32", transform=(10, 0, 0, 0, -10, 0)) as file:
        file.write(scene()["image"].numpy() * 0.05 + 0.1)
        for i, band in enumerate(PARTS["statistics"]["bands"], 1): file.set_band_description(i, band)
    call = ["explore", folders[0], tmp_path / "scene.tif", "--html", tmp_path / "page.html", "-w", "4,8,40,64", "-a", folders[1]]
    result = CliRunner().invoke(app, list(map(str, call)))
    assert result.exit_code == 0 and "page.html (" in result.output
    assert "40 x 64 px, 5 bands, 5 classes, 5 experts in 3 layers" in (tmp_path / "page.html").read_text(encoding="utf-8")
    result = CliRunner().invoke(app, list(map(str, call[:6] + ["50,8,40,64"])))
    assert result.exit_code == 1 and "expected one inside it" in result.output


def test_means_leave_out_what_is_not_there():
    values = np.ones((2, 5, 7))
    values[:, 0, 0], values[:, 4] = np.nan, 3
    found, s = averaged(values, 10)
    assert s == 4 and found.shape == (2, 2, 2) and found[0, 0, 0] == 1 and found[0, 1, 1] == 3


def test_masks_are_read_with_the_codes_of_the_benchmark(models, tmp_path):
    from PIL import Image
    mask = np.full((60, 92), 2, np.uint8)
    Image.fromarray(mask).save(tmp_path / "mask.png")
    found = look_inside(models["frozen"], scene()["image"], label=tmp_path / "mask.png")
    assert (found.label == 2).all()
    with pytest.raises(ValueError, match="expected \\(60, 92\\)|same pixels|60"):
        look_inside(models["frozen"], scene()["image"][:, :40], label=np.zeros((60, 92), int))


def test_other_ways_of_tuning_have_no_experts():
    model = Segmentor.build("made_tiles", PARTS["vfm"], None, "lora", head="pixel_shuffle", statistics=PARTS["statistics"])
    found = look_inside(model, scene())
    assert found.routing is None and model.adapter is not None and found.prediction.shape == (60, 92)
