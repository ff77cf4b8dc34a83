/* Two boxes to drag, and what every box loss says of them. The losses are those of losses.js, {name: [variants]}. */
(() => {
  "use strict";
  const root = document.getElementById("two-boxes");
  if (!root) return;
  if (!globalThis.DETLOSS) {
    root.textContent = "There are no losses here: tools/gallery.py writes them.";
    return;
  }

  const WIDTH = 320, HEIGHT = 240, LEAST = 1; // of the stage and the shortest side, in pixels
  const START = { pred: [70, 60, 150, 150], target: [120, 90, 220, 160] };
  const boxes = structuredClone(START); // corners x1, y1, x2, y2
  const chosen = {}; // of each loss: the variant, and the values of its sliders
  for (const [name, variants] of Object.entries(DETLOSS)) choose(name, variants[0]);
  let selected = "CIoULoss" in DETLOSS ? "CIoULoss" : Object.keys(DETLOSS)[0];
  let running = false;

  function choose(name, variant) {
    chosen[name] = { variant, settings: Object.fromEntries(variant.sliders.map((s) => [s.name, s.value])) };
  }

  function make(tag, attributes = {}, parent = null, text = "") {
    const svg = ["svg", "g", "rect", "circle", "path"].includes(tag);
    const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (text) element.textContent = text;
    if (parent) parent.append(element);
    return element;
  }

  // What a loss says.

  function evaluate(name) {
    const { variant, settings } = chosen[name];
    const [value, g] = variant.f(boxes.pred, boxes.target, settings);
    // The gradient on the center and the sides, from that on the corners.
    return { value, center: [g[0] + g[2], g[1] + g[3]], sides: [(g[2] - g[0]) / 2, (g[3] - g[1]) / 2] };
  }

  function size() {
    const [x1, y1, x2, y2] = boxes.target;
    return Math.sqrt((x2 - x1) * (y2 - y1));
  }

  /** Where a gradient pulls, as an arrow that is longer where it is larger, and shorter than `longest`. */
  function pull(gradient, longest) {
    const length = Math.hypot(...gradient), relative = length * size();
    const shown = length > 0 && isFinite(length) ? (longest * Math.sqrt(relative / (1 + relative))) / length : 0;
    return gradient.map((g) => -g * shown);
  }

  function arrow(x, y, [dx, dy], head = 5) {
    const length = Math.hypot(dx, dy);
    if (length < 0.3) return "";
    const h = Math.min(head, 0.6 * length) / length, tip = [x + dx, y + dy];
    const barb = (side) => [tip[0] - h * (dx + (side * dy) / 2), tip[1] - h * (dy - (side * dx) / 2)].join(" ");
    return `M${x} ${y}L${tip.join(" ")}M${barb(1)}L${tip.join(" ")}L${barb(-1)}`;
  }

  // The page.

  const left = make("div", {}, root);
  const stage = make("svg", { class: "stage", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, "aria-label": "two boxes" }, left);
  const faint = make("path", { class: "arrow faint" }, stage);
  const drawn = {};
  for (const which of ["target", "pred"]) {
    const words = which === "pred" ? "predicted box" : "target";
    const label = `${words}: arrow keys move it, Shift with them changes its size`;
    const group = make("g", { class: `box ${which}`, tabindex: 0, role: "group", "aria-label": label }, stage);
    drawn[which] = { group, rect: make("rect", {}, group), dots: [], handles: [] };
    for (let corner = 0; corner < 4; corner++) {
      drawn[which].dots.push(make("circle", { class: "dot", r: 3 }, group));
      const other = corner === 1 || corner === 2 ? " other" : "";
      drawn[which].handles.push(make("circle", { class: `handle${other}`, r: 11 }, group));
    }
  }
  const bold = make("path", { class: "arrow" }, stage);

  const controls = make("div", { class: "controls" }, left);
  const title = make("a", { title: "its page" }, make("strong", {}, controls));
  const select = make("select", { "aria-label": "variant" }, controls);
  const sliders = make("span", { class: "controls" }, controls);
  const buttons = make("div", { class: "controls" }, left);
  const descend = make("button", { type: "button" }, buttons, "Descend");
  const reset = make("button", { type: "button" }, buttons, "Reset");
  const allLabel = make("label", {}, buttons);
  const all = make("input", { type: "checkbox" }, allLabel);
  allLabel.append("arrows of all losses");
  const where = make("span", { class: "where" }, buttons);

  const list = make("div", { class: "list" }, root);
  const rows = {};
  for (const name of Object.keys(DETLOSS)) {
    const row = make("button", { type: "button", class: "row", "data-loss": name }, list);
    make("span", {}, row, name);
    const value = make("span", { class: "value" }, row);
    const small = make("svg", { viewBox: "-12 -12 24 24", "aria-hidden": "true" }, row);
    rows[name] = { row, value, path: make("path", { class: "arrow" }, small) };
    row.addEventListener("click", () => { selected = name; showSettings(); draw(); });
  }

  function showSettings() {
    const { variant, settings } = chosen[selected];
    title.textContent = selected;
    title.href = location.pathname.endsWith(".html") ? `../gallery/${selected}.html` : `../gallery/${selected}/`;
    select.replaceChildren();
    for (const each of DETLOSS[selected]) {
      const words = Object.entries(each.settings).map(([key, value]) => `${key}=${value}`).join(", ");
      const option = make("option", {}, select, words || "as by default");
      option.selected = each === variant;
    }
    select.hidden = DETLOSS[selected].length < 2;
    sliders.replaceChildren();
    for (const s of variant.sliders) {
      const label = make("label", {}, sliders, s.name);
      const step = 10 ** Math.floor(Math.log10((s.max - s.min) / 50));
      const attributes = { type: "range", min: s.min, max: s.max, step: "any", "data-setting": s.name };
      const range = make("input", attributes, label);
      range.value = settings[s.name];
      const shown = make("span", {}, label, String(settings[s.name]));
      range.addEventListener("input", () => {
        const rounded = Number((Math.round(range.value / step) * step).toPrecision(6));
        settings[s.name] = Math.min(s.max, Math.max(s.min, rounded));
        shown.textContent = settings[s.name];
        draw();
      });
    }
  }

  function draw() {
    for (const [which, { rect, dots, handles }] of Object.entries(drawn)) {
      const [x1, y1, x2, y2] = boxes[which];
      const place = { x: x1, y: y1, width: x2 - x1, height: y2 - y1 };
      for (const [key, value] of Object.entries(place)) rect.setAttribute(key, value);
      [...dots.entries(), ...handles.entries()].forEach(([corner, circle]) => {
        circle.setAttribute("cx", corner % 2 ? x2 : x1);
        circle.setAttribute("cy", corner > 1 ? y2 : y1);
      });
    }
    const [x1, y1, x2, y2] = boxes.pred, x = (x1 + x2) / 2, y = (y1 + y2) / 2;
    let others = "";
    for (const [name, { row, value, path }] of Object.entries(rows)) {
      const found = evaluate(name);
      value.textContent = found.value.toFixed(4);
      value.dataset.value = found.value;
      path.setAttribute("d", arrow(0, 0, pull(found.center, 11), 4));
      row.setAttribute("aria-pressed", name === selected);
      if (name !== selected) { others += arrow(x, y, pull(found.center, 60)); continue; }
      const [w, h] = [[found.sides[0], 0], [0, found.sides[1]]].map((g) => pull(g, 40));
      bold.setAttribute("d", arrow(x, y, pull(found.center, 60)) + arrow(x2, y, w) + arrow(x1, y, [-w[0], 0])
        + arrow(x, y2, h) + arrow(x, y1, [0, -h[1]]));
    }
    faint.setAttribute("d", all.checked ? others : "");
    where.textContent = `box ${boxes.pred.map((v) => v.toFixed(0)).join(", ")}`;
  }

  // Moving boxes.

  function move(box, dx, dy) {
    dx = Math.min(Math.max(dx, -box[0]), WIDTH - box[2]);
    dy = Math.min(Math.max(dy, -box[1]), HEIGHT - box[3]);
    return [box[0] + dx, box[1] + dy, box[2] + dx, box[3] + dy];
  }

  function resize([x1, y1, x2, y2], corner, x, y) {
    if (corner % 2) x2 = Math.min(Math.max(x, x1 + LEAST), WIDTH); else x1 = Math.max(Math.min(x, x2 - LEAST), 0);
    if (corner > 1) y2 = Math.min(Math.max(y, y1 + LEAST), HEIGHT); else y1 = Math.max(Math.min(y, y2 - LEAST), 0);
    return [x1, y1, x2, y2];
  }

  function place(event) {
    const area = stage.getBoundingClientRect();
    return [((event.clientX - area.left) * WIDTH) / area.width, ((event.clientY - area.top) * HEIGHT) / area.height];
  }

  function drag(element, which, change) {
    // A finger on a box drags it; touch-action alone does not keep every browser from scrolling.
    element.addEventListener("touchstart", (event) => event.preventDefault(), { passive: false });
    element.addEventListener("pointerdown", (event) => {
      event.preventDefault();
      stop();
      element.setPointerCapture(event.pointerId);
      drawn[which].group.focus({ preventScroll: true });
      const from = place(event), box = [...boxes[which]];
      const onMove = (moved) => { boxes[which] = change(box, from, place(moved)); draw(); };
      element.addEventListener("pointermove", onMove);
      for (const end of ["pointerup", "pointercancel"]) {
        element.addEventListener(end, () => element.removeEventListener("pointermove", onMove), { once: true });
      }
    });
  }

  for (const [which, { group, rect, handles }] of Object.entries(drawn)) {
    drag(rect, which, (box, from, to) => move(box, to[0] - from[0], to[1] - from[1]));
    handles.forEach((handle, corner) => drag(handle, which, (box, _, to) => resize(box, corner, ...to)));
    group.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
      if (!step) return;
      event.preventDefault();
      stop();
      const box = boxes[which];
      boxes[which] = event.shiftKey ? resize(box, 3, box[2] + step[0], box[3] + step[1]) : move(box, ...step);
      draw();
    });
  }

  // Gradient descent on center and sides.

  function stop() {
    running = false;
    descend.textContent = "Descend";
  }

  function step() {
    if (!running) return;
    const { center, sides } = evaluate(selected), rate = 0.02 * size() ** 2;
    const [x1, y1, x2, y2] = boxes.pred;
    const x = (x1 + x2) / 2 - rate * center[0], y = (y1 + y2) / 2 - rate * center[1];
    const w = Math.max(x2 - x1 - rate * sides[0], LEAST) / 2, h = Math.max(y2 - y1 - rate * sides[1], LEAST) / 2;
    boxes.pred = [x - w, y - h, x + w, y + h];
    draw();
    requestAnimationFrame(step);
  }

  descend.addEventListener("click", () => {
    if (running) return stop();
    running = true;
    descend.textContent = "Stop";
    requestAnimationFrame(step);
  });
  reset.addEventListener("click", () => { stop(); Object.assign(boxes, structuredClone(START)); draw(); });
  all.addEventListener("change", draw);
  select.addEventListener("change", () => {
    choose(selected, DETLOSS[selected][select.selectedIndex]);
    showSettings();
    draw();
  });

  showSettings();
  draw();
})();
