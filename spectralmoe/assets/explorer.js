// Looks inside a segmentation model: image, label, prediction, experts and entropy on a canvas; what one pixel gets.
// One module without dependencies, for anywidget and for a page on its own: `render({model, el})` reads `payload` and `state`.

const CSS = `
.smx{--ink:var(--jp-ui-font-color1,CanvasText);--soft:color-mix(in srgb,var(--ink) 66%,transparent);--line:color-mix(in srgb,var(--ink) 22%,transparent);
  --paper:var(--jp-layout-color1,Canvas);--mark:#0072b2;container-type:inline-size;color:var(--ink);background:var(--paper);
  font:13px/1.4 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;text-align:left}
.smx *{box-sizing:border-box}
.smx-bar{display:flex;flex-wrap:wrap;gap:6px 18px;align-items:center;padding:6px 0}
.smx-bar fieldset,.smx-group{display:flex;flex-wrap:wrap;gap:0;align-items:center;border:0;margin:0;padding:0;min-width:0}
.smx-bar label.smx-slide{display:flex;gap:6px;align-items:center}
.smx-slide input{width:104px;accent-color:var(--mark)}
.smx-slide output{min-width:3.6em;font-variant-numeric:tabular-nums}
.smx-pick{position:relative}
.smx-pick input{position:absolute;opacity:0;inset:0;margin:0;cursor:pointer}
.smx-pick span{display:block;padding:3px 9px;border:1px solid var(--line);margin-left:-1px}
.smx-pick:first-of-type span{border-radius:5px 0 0 5px;margin-left:0}
.smx-pick:last-of-type span{border-radius:0 5px 5px 0}
.smx-pick input:checked+span{background:var(--mark);border-color:var(--mark);color:#fff}
.smx-pick input:focus-visible+span{outline:3px solid var(--mark);outline-offset:2px;position:relative;z-index:1}
.smx button{font:inherit;color:inherit;background:none;border:1px solid var(--line);border-radius:5px;padding:2px 8px;cursor:pointer;min-height:26px}
.smx button:hover{border-color:var(--ink)}
.smx :is(button,canvas,input[type=range]):focus-visible{outline:3px solid var(--mark);outline-offset:2px}
.smx-legend{display:flex;flex-wrap:wrap;gap:5px;align-items:center;min-height:34px;padding:2px 0 8px}
.smx-legend button{display:flex;gap:6px;align-items:center}
.smx-legend button[aria-pressed=true]{border-color:var(--ink);box-shadow:inset 0 0 0 1px var(--ink);font-weight:600}
.smx-legend small,.smx-note{color:var(--soft);font-size:12px;font-variant-numeric:tabular-nums;font-weight:400}
.smx i{display:inline-block;width:12px;height:12px;border-radius:2px;border:1px solid var(--line);flex:none}
.smx-ramp{width:160px;height:12px;border:1px solid var(--line);border-radius:2px}
.smx-panes{display:grid;gap:16px;grid-template-columns:minmax(0,1fr);align-items:start}
.smx-pane{display:grid;gap:8px 18px;grid-template-columns:minmax(0,var(--widest,1fr)) minmax(300px,420px);align-items:start;align-content:start;min-width:0}
.smx-two .smx-panes{grid-template-columns:minmax(0,1fr) minmax(0,1fr)}
.smx-two .smx-pane{grid-template-columns:minmax(0,1fr)}
.smx-view{min-width:0;max-width:var(--widest,none)}
.smx-view h3,.smx-facts h4{margin:0 0 4px;font-size:13px;font-weight:600;color:inherit;overflow-wrap:anywhere}
.smx-facts h4{margin-top:9px;font-size:12px}
.smx canvas{display:block;width:100%;background:#222;border-radius:4px;cursor:crosshair;touch-action:pan-y}
.smx canvas.smx-near{touch-action:none}
.smx-facts{min-width:0;font-variant-numeric:tabular-nums}
.smx-rows{display:grid;grid-template-columns:auto minmax(0,max-content) minmax(30px,1fr) auto;gap:2px 7px;align-items:center;font-size:12px}
.smx-rows>span:nth-child(4n+2){overflow:hidden;text-overflow:ellipsis;white-space:nowrap}
.smx-rows>span:nth-child(4n){text-align:right}
.smx-meter{height:9px;background:color-mix(in srgb,var(--ink) 9%,transparent);border-radius:2px;display:flex;overflow:hidden}
.smx-gates{max-height:196px;overflow:auto;border:1px solid var(--line);border-radius:4px}
.smx-gates table{border-collapse:collapse;width:100%;font-size:12px;margin:0;border:0;table-layout:auto}
.smx-gates :is(td,th){padding:2px 6px;text-align:left;font-weight:400;border:0;background:none;white-space:nowrap}
.smx-gates th{color:var(--soft);position:sticky;top:0;background:var(--paper)}
.smx-gates tr.smx-now td{background:color-mix(in srgb,var(--mark) 16%,transparent)}
.smx-gates td:nth-child(3){width:45%}
.smx svg{display:block;width:100%;max-width:360px;height:auto;overflow:visible;margin-bottom:6px}
.smx svg text{font-size:10px;fill:var(--soft)}
.smx details{margin-top:8px;color:var(--soft);font-size:12px}
.smx-said{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}
@container (max-width:720px){
  .smx-pane,.smx-two .smx-panes{grid-template-columns:minmax(0,1fr)}
  .smx-slide input{width:88px}.smx-bar{gap:6px 12px}.smx-pick span{padding:3px 7px}}
`;

// ---------------------------------------------------------------- data

const bytes = text => Uint8Array.from(atob(text), c => c.charCodeAt(0));

// Arrays of 8 bit come as base64 of a zlib stream.
async function inflate(text) {
  const stream = new Blob([bytes(text)]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

async function opened(packed) {
  const scene = {...packed, picture: new Image()};
  scene.picture.src = "data:image/png;base64," + packed.image;
  const whole = async raster => raster && {...raster, data: await inflate(raster.data)};
  [scene.prediction, scene.label, scene.probabilities, scene.spectra] = await Promise.all(
    [packed.prediction, packed.label, packed.probabilities, packed.spectra].map(whole));
  scene.gates = {};
  for (const [name, gate] of Object.entries(packed.gates)) scene.gates[name] = {...gate,
    chosen: await inflate(gate.chosen), weights: await inflate(gate.weights), entropy: await inflate(gate.entropy)};
  await scene.picture.decode();
  return scene;
}

const mix = (a, b, t) => a.map((v, i) => v + (b[i] - v) * t);
// dark blue to yellow, told apart with any colour vision
const RAMP = [[0, 32, 77], [64, 77, 107], [124, 123, 120], [188, 175, 111], [255, 234, 70]];
const ramp = t => { const x = Math.min(Math.max(t, 0), 1) * (RAMP.length - 1), i = Math.min(Math.floor(x), RAMP.length - 2);
  return mix(RAMP[i], RAMP[i + 1], x - i); };
const css = c => `rgb(${c.map(Math.round).join(",")})`;
const percent = v => v > 0 && v < 0.005 ? "<1 %" : `${Math.round(100 * v)} %`;
const clamp = (v, low, high) => Math.min(Math.max(v, low), high);

// A canvas of one pixel per cell; `colour(i)` is [r, g, b, alpha of 0..1] or null for nothing.
function raster(width, height, colour) {
  const canvas = Object.assign(document.createElement("canvas"), {width, height});
  const context = canvas.getContext("2d"), image = context.createImageData(width, height);
  for (let i = 0; i < width * height; i++) {
    const c = colour(i);
    if (c) { image.data.set(c.slice(0, 3), 4 * i); image.data[4 * i + 3] = 255 * (c[3] ?? 1); }
  }
  context.putImageData(image, 0, 0);
  return canvas;
}

const gateOf = (scene, state) => scene.gates[state.modality];
const layerOf = (gate, state) => Math.min(state.layer, gate.layers - 1);
const cell = (gate, layer, rank, at) => ((layer * gate.k) + rank) * gate.rows * gate.columns + at;

// What lies over the image: a canvas, and how many image pixels one of its cells is wide.
function overlay(scene, state) {
  const {show, highlight} = state, dim = k => highlight === null || highlight === k;
  if (show === "label" || show === "prediction") {
    const map = scene[show];
    return map && {canvas: raster(scene.width, scene.height, i => {
      const k = map.data[i];
      return k < scene.classes.length && dim(k) ? scene.palette[k] : null; }), size: 1};
  }
  if (show === "errors") return scene.label && {canvas: raster(scene.width, scene.height, i => {
    const k = scene.label.data[i], wrong = +(k !== scene.prediction.data[i]);
    return k < scene.classes.length && dim(wrong) ? ERRORS[wrong].colour : null; }), size: 1};
  const gate = gateOf(scene, state);
  if (!gate || show === "image") return null;
  const layer = layerOf(gate, state), n = gate.rows * gate.columns;
  if (show === "entropy") return {canvas: raster(gate.columns, gate.rows, i => ramp(gate.entropy[layer * n + i] / 255)), size: gate.patch};
  return {canvas: raster(gate.columns, gate.rows, i => {
    if (highlight === null) return scene.colours[gate.chosen[cell(gate, layer, 0, i)]];
    for (let rank = 0; rank < gate.k; rank++) if (gate.chosen[cell(gate, layer, rank, i)] === highlight)
      return [...scene.colours[highlight], rank ? 0.25 + 0.5 * gate.weights[cell(gate, layer, rank, i)] / 255 : 1];
    return null; }), size: gate.patch};
}

const ERRORS = [{name: "as labelled", colour: [86, 180, 233]}, {name: "not as labelled", colour: [213, 94, 0]}];

// Share of each entry of the legend in what is shown.
function shares(scene, state) {
  const count = (data, n, from = 0, to = data.length) => {
    const found = new Array(n).fill(0); let all = 0;
    for (let i = from; i < to; i++) if (data[i] < n) { found[data[i]]++; all++; }
    return found.map(v => v / Math.max(all, 1)); };
  if (state.show === "experts") {
    const gate = gateOf(scene, state); if (!gate) return null;
    const start = cell(gate, layerOf(gate, state), 0, 0);
    return count(gate.chosen, scene.colours.length, start, start + gate.rows * gate.columns);
  }
  if (state.show === "errors") {
    if (!scene.label) return null;
    let wrong = 0, all = 0;
    scene.label.data.forEach((k, i) => { if (k < scene.classes.length) { all++; wrong += k !== scene.prediction.data[i]; } });
    return [1 - wrong / Math.max(all, 1), wrong / Math.max(all, 1)];
  }
  const map = scene[state.show];
  return map ? count(map.data, scene.classes.length) : null;
}

// ---------------------------------------------------------------- document

function h(tag, given = {}, ...children) {
  const {style, ...rest} = given, node = Object.assign(document.createElement(tag), rest);
  if (style) node.style.cssText = style;
  node.append(...children.filter(c => c !== null && c !== undefined));
  return node;
}
const swatch = colour => h("i", {style: `background:${css(colour)}`, ariaHidden: "true"});
const meter = parts => h("span", {className: "smx-meter", ariaHidden: "true"},
  ...parts.map(([share, colour]) => h("b", {style: `width:${100 * share}%;background:${colour}`})));

let serial = 0;
function picks(name, title, options, chosen, act) {
  const group = `smx${serial++}`;
  const set = h("fieldset", {}, h("legend", {className: "smx-said"}, title));
  for (const option of options) {
    const input = h("input", {type: "radio", name: group, value: option, checked: option === chosen()});
    input.addEventListener("change", () => act(option));
    set.append(h("label", {className: "smx-pick"}, input, h("span", {}, option)));
  }
  return {node: set, refresh: () => set.querySelectorAll("input").forEach(i => { i.checked = i.value === chosen(); })};
}
function slider(title, min, max, value, said, act) {
  const input = h("input", {type: "range", min, max, step: 1, value: value()}), shown = h("output", {}, said());
  input.addEventListener("input", () => act(+input.value));
  return {node: h("label", {className: "smx-slide"}, title, input, shown),
    refresh: () => { input.value = value(); shown.textContent = said(); input.setAttribute("aria-valuetext", said()); }};
}

// The spectrum of a pixel against the mean of its class, +- one standard deviation.
function chart(scene, values, classes) {
  const [W, H, left, right, top, bottom] = [320, 132, 38, 8, 8, 26], x = scene.bands.positions, NS = "http://www.w3.org/2000/svg";
  const means = classes.map(k => scene.bands.means[k]), spreads = classes.map(k => scene.bands.spreads[k]);
  const known = means.map(Boolean);
  const all = [values, ...means.filter(Boolean), ...means.flatMap((m, j) => known[j] && !j ? [m.map((v, i) => v + spreads[j][i]), m.map((v, i) => v - spreads[j][i])] : [])].flat();
  let low = Math.min(...all), high = Math.max(...all); if (high - low < 1e-9) { high += 1; low -= 1; }
  const first = Math.min(...x), wide = Math.max(...x) - first || 1, order = x.map((_, i) => i).sort((a, b) => x[a] - x[b]);
  const px = i => left + (W - left - right) * (x[i] - first) / wide, py = v => H - bottom - (H - top - bottom) * (v - low) / (high - low);
  const svg = document.createElementNS(NS, "svg"), put = (tag, given, text) => {
    const node = document.createElementNS(NS, tag); Object.entries(given).forEach(([k, v]) => node.setAttribute(k, v));
    if (text !== undefined) node.textContent = text; svg.append(node); };
  svg.setAttribute("viewBox", `0 0 ${W} ${H}`); svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", `spectrum: ${scene.bands.names.map((n, i) => `${n} ${values[i].toPrecision(3)}`).join(", ")}`);
  const path = v => order.map((i, j) => `${j ? "L" : "M"}${px(i).toFixed(1)} ${py(v[i]).toFixed(1)}`).join("");
  for (const v of [low, high]) {
    put("line", {x1: left, x2: W - right, y1: py(v), y2: py(v), stroke: "var(--line)"});
    put("text", {x: left - 4, y: py(v) + 3, "text-anchor": "end"}, String(+v.toPrecision(3))); }
  classes.forEach((k, j) => { if (!known[j]) return;
    if (!j) { const up = means[j].map((v, i) => v + spreads[j][i]), down = means[j].map((v, i) => v - spreads[j][i]);
      put("path", {d: path(up) + order.slice().reverse().map(i => `L${px(i).toFixed(1)} ${py(down[i]).toFixed(1)}`).join("") + "Z", fill: css(scene.palette[k]), opacity: 0.22}); }
    put("path", {d: path(means[j]), fill: "none", stroke: "var(--ink)", "stroke-width": 3.4, opacity: 0.35});
    put("path", {d: path(means[j]), fill: "none", stroke: css(scene.palette[k]), "stroke-width": 2, "stroke-dasharray": j ? "2 3" : "6 3"}); });
  put("path", {d: path(values), fill: "none", stroke: "var(--ink)", "stroke-width": 1.6});
  order.forEach(i => put("circle", {cx: px(i), cy: py(values[i]), r: 2.4, fill: "var(--ink)"}));
  let last = -99;
  order.forEach(i => { const end = px(i); if (end - last < 30) return; last = end;
    put("text", {x: end, y: H - 12, "text-anchor": end > W - 24 ? "end" : end < left + 12 ? "start" : "middle"}, scene.bands.names[i]); });
  put("text", {x: (left + W - right) / 2, y: H, "text-anchor": "middle"}, scene.bands.axis);
  return svg;
}

// What one pixel gets: classes, gates of every layer, spectrum.
function facts(scene, state, row, column) {
  const at = row * scene.width + column, k = scene.prediction.data[at], known = scene.label && scene.label.data[at] < scene.classes.length;
  const truth = known ? scene.label.data[at] : null, nodes = [];
  const p = scene.probabilities, size = p.rows * p.columns, i = Math.floor(row / p.stride) * p.columns + Math.floor(column / p.stride);
  const found = scene.classes.map((name, c) => ({name, c, v: p.data[c * size + i] / 255})).sort((a, b) => b.v - a.v);
  const total = found.reduce((s, f) => s + f.v, 0) || 1;
  const entropy = found.reduce((s, f) => s - (f.v > 0 ? f.v / total * Math.log(f.v / total) : 0), 0) / Math.log(Math.max(scene.classes.length, 2));
  nodes.push(h("div", {className: "smx-at"}, `row ${row}, column ${column}: predicted `, h("b", {}, scene.classes[k]), scene.label ? `, labelled ${known ? scene.classes[truth] : "not"}` : ""));
  nodes.push(h("h4", {}, "Class probabilities ", h("span", {className: "smx-note"}, `${p.stride > 1 ? `mean of ${p.stride} x ${p.stride} px, ` : ""}entropy ${entropy.toFixed(2)} of 1`)));
  nodes.push(h("div", {className: "smx-rows smx-classes"}, ...found.slice(0, 6).flatMap(f => [swatch(scene.palette[f.c]), h("span", {}, f.name), meter([[f.v, css(scene.palette[f.c])]]), h("span", {}, percent(f.v))])));
  for (const [name, gate] of Object.entries(scene.gates)) {
    const n = gate.rows * gate.columns, token = Math.floor(row / gate.patch) * gate.columns + Math.floor(column / gate.patch), now = layerOf(gate, state);
    const rows = Array.from({length: gate.layers}, (_, layer) => {
      const picked = Array.from({length: gate.k}, (_, rank) => [gate.chosen[cell(gate, layer, rank, token)], gate.weights[cell(gate, layer, rank, token)] / 255]);
      const said = picked.map(([e, w]) => `expert ${e}: ${percent(w)}`).join(", ");
      return h("tr", {className: name === state.modality && layer === now ? "smx-now" : "", title: said}, h("td", {}, layer + 1),
        h("td", {}, swatch(scene.colours[picked[0][0]]), ` ${picked[0][0]}`),
        h("td", {}, meter(picked.map(([e, w]) => [w, css(scene.colours[e])])), h("span", {className: "smx-said"}, said)),
        h("td", {}, percent(picked[0][1])), h("td", {}, (gate.entropy[layer * n + token] / 255).toFixed(2)));
    });
    const head = h("tr", {}, ...["layer", "expert", "gate weights", "", "entropy"].map(t => h("th", {scope: "col"}, t)));
    nodes.push(h("h4", {}, `Experts, ${name} gate `, h("span", {className: "smx-note"}, `token of ${gate.patch} px`)), h("div", {className: "smx-gates", tabIndex: 0, ariaLabel: `gates, ${name}`}, h("table", {}, h("thead", {}, head), h("tbody", {}, ...rows))));
  }
  const s = scene.spectra, area = s.rows * s.columns, j = Math.floor(row / s.stride) * s.columns + Math.floor(column / s.stride);
  const values = scene.bands.names.map((_, c) => s.low[c] + (s.high[c] - s.low[c]) * s.data[c * area + j] / 255);
  const compared = truth !== null && truth !== k ? [k, truth] : [k];
  nodes.push(h("h4", {}, "Spectrum ", h("span", {className: "smx-note"}, scene.bands.units)), chart(scene, values, compared),
    h("div", {className: "smx-note"}, "solid: this pixel; dashed: mean of ", h("b", {}, scene.classes[k]), ` in this scene, by ${scene.bands.by}`, compared[1] === undefined ? "" : `; dotted: ${scene.classes[truth]}`));
  return nodes;
}

// ---------------------------------------------------------------- one pane

class Pane {
  constructor(scene, shared) {
    this.scene = scene; this.shared = shared;
    this.canvas = h("canvas", {tabIndex: 0, role: "application"});
    this.canvas.setAttribute("aria-label", `${scene.title}: arrow keys move the pixel, plus and minus zoom, 0 shows all, Enter holds the pixel`);
    this.facts = h("div", {className: "smx-facts"});
    this.node = h("section", {className: "smx-pane"}, h("div", {className: "smx-view"}, h("h3", {}, scene.title), this.canvas), this.facts);
    this.fingers = new Map();
    const on = (event, act, options) => this.canvas.addEventListener(event, act, options);
    on("pointerdown", e => { this.fingers.set(e.pointerId, [e.offsetX, e.offsetY]); this.moved = 0; this.canvas.setPointerCapture(e.pointerId); });
    on("pointermove", e => this.pointed(e));
    on("pointerup", e => { this.fingers.delete(e.pointerId); if (this.moved < 4) { this.shared.held = !this.shared.held; this.at(e.offsetX, e.offsetY, true); } });
    on("pointercancel", e => this.fingers.delete(e.pointerId));
    on("wheel", e => { if (document.activeElement !== this.canvas && !e.ctrlKey) return;
      e.preventDefault(); this.zoom(Math.exp(-e.deltaY / 300), e.offsetX, e.offsetY); }, {passive: false});
    on("keydown", e => this.key(e));
  }
  get fit() { return this.canvas.clientWidth / this.scene.width * this.shared.view.zoom; }  // screen pixels per image pixel
  place(x, y) { // screen -> image
    const {view} = this.shared, {width, height} = this.scene;
    return [view.x * width + (x - this.canvas.clientWidth / 2) / this.fit, view.y * height + (y - this.canvas.clientHeight / 2) / this.fit];
  }
  pointed(e) {
    const before = this.fingers.get(e.pointerId), now = [e.offsetX, e.offsetY];
    if (!before) return this.shared.held || this.at(...now);
    const others = [...this.fingers].filter(([id]) => id !== e.pointerId).map(([, p]) => p);
    const apart = p => Math.hypot(p[0] - others[0][0], p[1] - others[0][1]);
    this.moved += Math.abs(now[0] - before[0]) + Math.abs(now[1] - before[1]);
    if (others.length) this.zoom(apart(now) / Math.max(apart(before), 1), (now[0] + others[0][0]) / 2, (now[1] + others[0][1]) / 2);
    else this.pan((before[0] - now[0]) / this.fit / this.scene.width, (before[1] - now[1]) / this.fit / this.scene.height);
    this.fingers.set(e.pointerId, now);
  }
  at(x, y, force) {
    const [px, py] = this.place(x, y), {width, height} = this.scene;
    if (px >= 0 && py >= 0 && px < width && py < height) this.shared.point((Math.floor(px) + 0.5) / width, (Math.floor(py) + 0.5) / height, force);
  }
  pan(x, y) { const {view} = this.shared; view.x += x; view.y += y; this.shared.moved(); }
  zoom(factor, x = this.canvas.clientWidth / 2, y = this.canvas.clientHeight / 2) {
    const {view} = this.shared, [px, py] = this.place(x, y);
    view.zoom = clamp(view.zoom * factor, 1, 64);
    const [qx, qy] = this.place(x, y);
    this.pan((px - qx) / this.scene.width, (py - qy) / this.scene.height);
  }
  key(e) {
    if (e.metaKey || e.ctrlKey || e.altKey) return;
    const step = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]}[e.key], {width, height} = this.scene;
    if (step) {
      const [x, y] = this.shared.state.pixel || [0.5, 0.5], far = e.shiftKey ? 10 : 1;
      this.shared.point((clamp(Math.floor(x * width) + far * step[0], 0, width - 1) + 0.5) / width, (clamp(Math.floor(y * height) + far * step[1], 0, height - 1) + 0.5) / height, true, true);
    } else if (e.key === "+" || e.key === "=") this.zoom(1.5); else if (e.key === "-") this.zoom(1 / 1.5);
    else if (e.key === "0") this.shared.reset();
    else if (e.key === "Enter" || e.key === " ") { this.shared.held = !this.shared.held; this.shared.point(...(this.shared.state.pixel || [0.5, 0.5]), true, true); }
    else return;
    e.preventDefault(); e.stopPropagation();
  }
  draw() {
    const {canvas, scene} = this, {state, view} = this.shared, scale = window.devicePixelRatio || 1, width = canvas.clientWidth;
    if (!width) return;
    const height = Math.round(width * scene.height / scene.width);
    this.node.style.setProperty("--widest", `${Math.round(Math.max(window.innerHeight * 0.82, 260) * scene.width / scene.height)}px`);  // the whole scene fits the window
    canvas.style.height = `${height}px`;
    if (canvas.width !== Math.round(width * scale) || canvas.height !== Math.round(height * scale)) { canvas.width = Math.round(width * scale); canvas.height = Math.round(height * scale); }
    canvas.classList.toggle("smx-near", view.zoom > 1);
    const pen = canvas.getContext("2d"), fit = this.fit;
    pen.setTransform(1, 0, 0, 1, 0, 0); pen.clearRect(0, 0, canvas.width, canvas.height);
    pen.setTransform(scale * fit, 0, 0, scale * fit, scale * (width / 2 - view.x * scene.width * fit), scale * (height / 2 - view.y * scene.height * fit));
    pen.imageSmoothingEnabled = false;
    pen.save(); pen.beginPath(); pen.rect(0, 0, scene.width, scene.height); pen.clip();
    pen.drawImage(scene.picture, 0, 0);
    const what = [state.show, state.layer, state.modality, state.highlight].join();
    if (this.what !== what) { this.over = overlay(scene, state); this.what = what; }
    if (this.over) {
      pen.globalAlpha = state.opacity / 100;
      pen.drawImage(this.over.canvas, 0, 0, this.over.canvas.width * this.over.size, this.over.canvas.height * this.over.size);
      pen.globalAlpha = 1;
    }
    pen.restore();
    if (state.show === "experts" && this.over) this.numbers(pen, fit);
    if (state.pixel) this.cross(pen, fit);
  }
  numbers(pen, fit) { // an expert's number on each token, once there is room
    const {scene} = this, {state} = this.shared, gate = gateOf(scene, state), layer = layerOf(gate, state), size = gate.patch;
    if (size * fit < 17) return;
    const [x0, y0] = this.place(0, 0), [x1, y1] = this.place(this.canvas.clientWidth, this.canvas.clientHeight);
    Object.assign(pen, {font: `600 ${11 / fit}px system-ui,sans-serif`, textAlign: "center", textBaseline: "middle", lineWidth: 2.5 / fit, strokeStyle: "#000a", fillStyle: "#fff", lineJoin: "round"});
    for (let r = Math.max(Math.floor(y0 / size), 0); r < Math.min(y1 / size, gate.rows); r++)
      for (let c = Math.max(Math.floor(x0 / size), 0); c < Math.min(x1 / size, gate.columns); c++) {
        const e = gate.chosen[cell(gate, layer, 0, r * gate.columns + c)];
        if (state.highlight !== null && e !== state.highlight) continue;
        pen.strokeText(e, (c + 0.5) * size, (r + 0.5) * size); pen.fillText(e, (c + 0.5) * size, (r + 0.5) * size);
      }
  }
  cross(pen, fit) {
    const [column, row] = this.pixel(), gate = gateOf(this.scene, this.shared.state);
    const box = (x, y, w, dash) => { for (const [colour, line] of [["#000", 3], ["#fff", 1.2]]) {
      Object.assign(pen, {strokeStyle: colour, lineWidth: line / fit}); pen.setLineDash(dash && line < 3 ? [4 / fit, 3 / fit] : []); pen.strokeRect(x, y, w, w); } pen.setLineDash([]); };
    if (gate) box(Math.floor(column / gate.patch) * gate.patch, Math.floor(row / gate.patch) * gate.patch, gate.patch, true);
    const least = Math.max(1, 7 / fit);
    box(column + 0.5 - least / 2, row + 0.5 - least / 2, least, false);
    if (this.shared.held) { pen.fillStyle = "#fff"; pen.fillRect(column + 0.5 - 1 / fit, row + 0.5 - 1 / fit, 2 / fit, 2 / fit); }
  }
  pixel() { const [x, y] = this.shared.state.pixel, {width, height} = this.scene;
    return [clamp(Math.floor(x * width), 0, width - 1), clamp(Math.floor(y * height), 0, height - 1)]; }
  tell() {
    const {state} = this.shared;
    if (!state.pixel) return this.facts.replaceChildren(h("p", {className: "smx-note"}, "Point at the image, or focus it and use the arrow keys: class probabilities, experts and gate weights of every layer, and the spectrum of that pixel appear here."));
    const [column, row] = this.pixel(), scroll = [...this.facts.querySelectorAll(".smx-gates")].map(g => g.scrollTop);
    this.facts.replaceChildren(...facts(this.scene, state, row, column));
    this.facts.querySelectorAll(".smx-gates").forEach((g, i) => { g.scrollTop = scroll[i] || 0; });
    if (!Object.keys(this.scene.gates).length) this.facts.append(h("p", {className: "smx-note"}, this.scene.without));
  }
}

// ---------------------------------------------------------------- everything

async function render({model, el}) {
  const root = h("div", {className: "smx"}, h("style", {}, CSS), h("p", {className: "smx-note"}, "opening ..."));
  el.append(root);
  let scenes;
  try { scenes = await Promise.all(model.get("payload").scenes.map(opened)); }
  catch (problem) { root.replaceChildren(h("style", {}, CSS), h("p", {}, `This browser cannot open the data (${problem}); expected one from 2023 or later.`)); throw problem; }
  const gates = scenes.flatMap(s => Object.entries(s.gates)), modalities = [...new Set(gates.map(([name]) => name))];
  const layers = Math.max(0, ...gates.map(([, g]) => g.layers)), labelled = scenes.some(s => s.label);
  const shows = ["image", ...(labelled ? ["label"] : []), "prediction", ...(labelled ? ["errors"] : []), ...(layers ? ["experts", "entropy"] : [])];
  const state = {show: layers ? "experts" : "prediction", opacity: 60, layer: Math.max(layers - 1, 0), modality: modalities[0] || null, highlight: null, pixel: null};
  const accept = given => { for (const key of Object.keys(state)) if (given && key in given) state[key] = given[key];
    if (!shows.includes(state.show)) state.show = shows[0];
    if (modalities.length && !modalities.includes(state.modality)) state.modality = modalities[0];
    state.layer = clamp(state.layer, 0, Math.max(layers - 1, 0)); };
  accept(model.get("state"));

  const said = h("div", {className: "smx-said", role: "status"}), legend = h("div", {className: "smx-legend", role: "group", ariaLabel: "legend: press an entry to highlight it"});
  let waiting = 0, frame = 0, sending = 0;
  const shared = {state, held: false, view: {x: 0.5, y: 0.5, zoom: 1},
    point(x, y, force, aloud) { state.pixel = [x, y]; change(["pixel"]); if (aloud) announce(); },
    reset() { Object.assign(shared.view, {x: 0.5, y: 0.5, zoom: 1}); paint(); },
    moved() { const {view} = shared, half = 0.5 / view.zoom; view.x = clamp(view.x, half, 1 - half); view.y = clamp(view.y, half, 1 - half); paint(); }};
  const panes = scenes.map(s => new Pane(s, shared));
  const paint = () => { if (!frame) frame = requestAnimationFrame(() => { frame = 0; panes.forEach(p => p.draw()); }); };
  const announce = () => { clearTimeout(waiting); waiting = setTimeout(() => { said.textContent = panes.map(p => {
    const [column, row] = p.pixel(), gate = gateOf(p.scene, state);
    const expert = gate ? `, expert ${gate.chosen[cell(gate, layerOf(gate, state), 0, Math.floor(row / gate.patch) * gate.columns + Math.floor(column / gate.patch))]}` : "";
    return `row ${row}, column ${column}, ${p.scene.classes[p.scene.prediction.data[row * p.scene.width + column]]}${expert}`; }).join("; "); }, 250); };
  const change = keys => {
    if (keys.some(k => k !== "pixel" && k !== "opacity")) entries();
    controls.forEach(c => c.refresh());
    panes.forEach(p => p.tell()); paint();
    clearTimeout(sending); sending = setTimeout(() => { model.set("state", {...state}); model.save_changes(); }, 200);
  };
  const set = (key, value) => { state[key] = value; if (key === "show") state.highlight = null; change([key]); };

  function entries() {
    if (state.show === "image") return legend.replaceChildren(h("span", {className: "smx-note"}, scenes.map(s => s.shown).filter((v, i, a) => a.indexOf(v) === i).join("; ")));
    if (state.show === "entropy") return legend.replaceChildren(h("span", {className: "smx-note"}, "one expert fits"),
      h("div", {className: "smx-ramp", style: `background:linear-gradient(90deg,${[0, .25, .5, .75, 1].map(t => css(ramp(t))).join(",")})`}), h("span", {className: "smx-note"}, "all fit alike (entropy of the scores / log E)"));
    const first = scenes.reduce((a, b) => b.colours.length > a.colours.length ? b : a), names = state.show === "experts" ? first.colours.map((_, e) => `expert ${e}`) : state.show === "errors" ? ERRORS.map(e => e.name) : scenes[0].classes;
    const colours = state.show === "experts" ? first.colours : state.show === "errors" ? ERRORS.map(e => e.colour) : scenes[0].palette, parts = scenes.map(s => shares(s, state));
    const focused = [...legend.children].indexOf(document.activeElement);
    legend.replaceChildren(...names.map((name, i) => {
      const button = h("button", {type: "button", ariaPressed: String(state.highlight === i)}, swatch(colours[i]), name, h("small", {}, parts.map(p => p && p[i] !== undefined ? percent(p[i]) : "-").join(" | ")));
      button.addEventListener("click", () => set("highlight", state.highlight === i ? null : i));
      return button; }));
    if (focused >= 0 && legend.children[focused]) legend.children[focused].focus();
  }

  const controls = [picks("show", "what lies over the image", shows, () => state.show, v => set("show", v)),
    slider("Opacity", 0, 100, () => state.opacity, () => `${state.opacity} %`, v => set("opacity", v))];
  if (layers > 1) controls.push(slider("Layer", 0, layers - 1, () => state.layer, () => `${state.layer + 1} of ${layers}`, v => set("layer", v)));
  if (modalities.length > 1) controls.push(picks("gate", "whose gate", modalities, () => state.modality, v => set("modality", v)));
  const zooms = h("div", {className: "smx-group", style: "gap:4px"}, ...[["−", "zoom out", () => panes[0].zoom(1 / 1.5)], ["+", "zoom in", () => panes[0].zoom(1.5)], ["all", "show the whole scene", () => shared.reset()]]
    .map(([text, title, act]) => { const b = h("button", {type: "button", title, ariaLabel: title}, text); b.addEventListener("click", act); return b; }));
  const help = h("details", {}, h("summary", {}, "Keys and mouse"), "Drag to pan; click to hold a pixel, click again to let go. Once the image has the focus: wheel or + and − zoom, 0 shows all, arrow keys move the pixel (with Shift by ten), Enter holds it. Press an entry of the legend to highlight it.");
  root.classList.toggle("smx-two", scenes.length > 1);
  root.replaceChildren(h("style", {}, CSS), h("div", {className: "smx-bar"}, ...controls.map(c => c.node), zooms), legend, h("div", {className: "smx-panes"}, ...panes.map(p => p.node)), help, said);
  entries(); controls.forEach(c => c.refresh()); panes.forEach(p => p.tell());

  const watch = new ResizeObserver(paint);
  panes.forEach(p => watch.observe(p.canvas));
  const told = () => { accept(model.get("state")); entries(); controls.forEach(c => c.refresh()); panes.forEach(p => p.tell()); paint(); };
  model.on("change:state", told);
  panes.forEach(p => p.draw());
  root.dataset.ready = "yes";
  return () => { watch.disconnect(); model.off?.("change:state", told); clearTimeout(waiting); clearTimeout(sending); cancelAnimationFrame(frame); };
}

export default { render };
