"use strict";
// What a reader may do with the maps of explorer.py. The scores are those of evaluation/metrics:
// percentile_iou, and threshold_sweep of min_max, set_wide and region_min_max over tiles.
(() => {
  const SIDES = 2, BLINK = 600;
  const at = (id) => document.getElementById("x-" + id);
  const index = JSON.parse(at("index").textContent);
  const packed = document.querySelectorAll(".x-packed");
  const bytes = (text) => Uint8Array.from(atob(text), (one) => one.charCodeAt(0));
  const colours = Object.fromEntries(Object.entries(index.colours).map(([k, v]) => [k, bytes(v)]));
  let shown = null, listed = [], panels = [], phase = 0;

  const made = (kind, parent, text = "") => {
    const one = document.createElement(kind);
    one.textContent = text;
    parent.append(one);
    return one;
  };
  const option = (select, text, value = text) => (made("option", select, text).value = value);

  // ---- data
  const unpacked = async (text) => {
    const stream = new Blob([bytes(text)]).stream().pipeThrough(new DecompressionStream("deflate"));
    return opened(JSON.parse(await new Response(stream).text()));
  };
  const pixels = async (png, width, height) => {
    const canvas = Object.assign(document.createElement("canvas"), { width, height });
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.drawImage(await createImageBitmap(new Blob([bytes(png)])), 0, 0);
    return context.getImageData(0, 0, width, height).data;
  };
  const opened = async (data) => {
    const { width, height } = data, count = width * height;
    const picture = (png) => pixels(png, width, height);
    const bits = data.mask && bytes(data.mask);
    return {
      width, height, count,
      image: await picture(data.image),
      mask: bits && Uint8Array.from({ length: count }, (_, k) => (bits[k >> 3] >> (7 - (k & 7))) & 1),
      maps: data.maps.map((text) => {
        const view = new DataView(bytes(text).buffer);
        const values = Float32Array.from({ length: count }, (_, k) => view.getFloat32(4 * k, true));
        const [low, high] = range(values);
        return { values, low, high };
      }),
      generated: await Promise.all(data.generated.map((pair) => pair && Promise.all(pair.map(picture)))),
    };
  };

  // ---- threshold
  const places = (image, side) => { // pixels of each tile
    const across = Math.ceil(image.width / side), tiles = [];
    for (let k = 0; k < image.count; k++) {
      const row = Math.floor(k / image.width), tile = Math.floor(row / side) * across + Math.floor((k % image.width) / side);
      (tiles[tile] ??= []).push(k);
    }
    return tiles;
  };
  const limit = (values, bounds, scale, threshold) => { // ties at the threshold stay in
    if (scale === "percentile") {
      const sorted = values.slice().sort();
      return sorted[Math.ceil((threshold / 100) * (sorted.length - 1) - 1e-9)];
    }
    const [low, high] = bounds, share = threshold / 100;
    // all of a constant map is 0 of its range; what lies below a set's range is 0 of it too
    return share === 0 ? -Infinity : high > low ? low * (1 - share) + high * share : Infinity;
  };
  const range = (values) => values.reduce(([a, b], one) => [Math.min(a, one), Math.max(b, one)], [Infinity, -Infinity]);
  const region = (image, map, bounds, scale, threshold, side) => {
    const kept = new Uint8Array(image.count);
    if (!side) {
      const least = limit(map.values, scale === "set" ? bounds : [map.low, map.high], scale, threshold);
      map.values.forEach((one, k) => { kept[k] = one >= least ? 1 : 0; });
      return { kept, least };
    }
    for (const tile of places(image, side)) {
      const values = Float32Array.from(tile, (k) => map.values[k]);
      const least = limit(values, range(values), scale, threshold);
      for (const k of tile) kept[k] = map.values[k] >= least ? 1 : 0;
    }
    return { kept };
  };
  const scores = (kept, mask) => {
    let area = 0, truth = 0, both = 0;
    kept.forEach((one, k) => { area += one; if (mask) { truth += mask[k]; both += one & mask[k]; } });
    const told = { "share of the image": area / kept.length };
    if (truth) Object.assign(told, { Jaccard: both / (area + truth - both), covered: both / truth, inside: both / Math.max(area, 1) });
    return told;
  };

  // ---- pictures
  const border = (mask, k, width, height) => {
    const x = k % width, y = (k - x) / width;
    return mask[k] && ((x > 0 && !mask[k - 1]) || (x < width - 1 && !mask[k + 1]) ||
      (y > 0 && !mask[k - width]) || (y < height - 1 && !mask[k + width]));
  };
  const paint = (canvas, image, source, map, kept) => {
    Object.assign(canvas, { width: image.width, height: image.height });
    const picture = new ImageData(new Uint8ClampedArray(source), image.width, image.height);
    const table = colours[at("colours").value], opacity = Number(at("opacity").value);
    const whole = at("whole").checked, outline = image.mask && at("outline").checked;
    const { values, low, high } = map ?? {}, step = high > low ? 255 / (high - low) : 0;
    for (let k = 0; k < image.count; k++) {
      if (map && (whole || kept[k])) {
        const colour = 3 * Math.floor((values[k] - low) * step);
        for (let c = 0; c < 3; c++)
          picture.data[4 * k + c] = (1 - opacity) * source[4 * k + c] + opacity * table[colour + c];
      }
      if (kept && whole && border(kept, k, image.width, image.height)) picture.data.set([255, 255, 255], 4 * k);
      if (outline && border(image.mask, k, image.width, image.height)) picture.data.set([51, 255, 77], 4 * k);
    }
    canvas.getContext("2d").putImageData(picture, 0, 0);
  };
  const draw = () => {
    const ofSet = at("scale").querySelector("[value=set]"); // a tile has a range of its own alone
    if (ofSet) ofSet.disabled = at("local").checked;
    if (ofSet?.disabled && at("scale").value === "set") at("scale").value = "own";
    const scale = at("scale").value, threshold = Number(at("threshold").value);
    at("shown").value = scale === "percentile" ? threshold + " %" : (threshold / 100).toFixed(3);
    if (!shown) return;
    const side = at("local").checked ? Math.max(2, Math.floor(Number(at("tile").value)) || 2) : 0;
    for (const panel of panels) {
      const method = panel.select.selectedIndex, map = shown.maps[method];
      const { kept, least } = region(shown, map, index.ranges[method], scale, threshold, side);
      paint(panel.canvas, shown, shown.image, map, kept);
      panel.told.textContent = Object.entries(scores(kept, shown.mask)).map(([k, v]) => k + " " + v.toFixed(3)).join(", ");
      panel.value.textContent = Number.isFinite(least) ? "map at or above " + least.toPrecision(4) : "";
    }
    drawPairs();
  };
  const drawPairs = () => {
    for (const { select, pair, first, second, named } of panels) {
      const images = shown?.generated[select.selectedIndex], mode = images ? at("generated").value : "off";
      pair.hidden = mode === "off";
      second.hidden = mode !== "beside";
      named.textContent = mode === "beside" ? "similar, adversarial" : "";
      if (mode === "beside") images.forEach((one, k) => paint([first, second][k], shown, one));
      if (mode === "blink") {
        paint(first, shown, [shown.image, ...images][phase % 3]);
        named.textContent = ["image", "similar", "adversarial"][phase % 3];
      }
    }
  };

  // ---- which image
  const list = () => {
    const wanted = [...document.querySelectorAll("#x-filters select")].filter((one) => one.value);
    const [metric, method, way] = JSON.parse(at("order").value);
    const score = (k) => index.cases[k].scores[method]?.[metric] ?? null;
    listed = index.cases.map((_, k) => k).filter((k) => wanted.every((one) => index.cases[k].facts[one.name] === one.value));
    if (metric) listed.sort((a, b) => (score(a) === null) - (score(b) === null) || way * (score(a) - score(b)) || a - b);
    at("cases").replaceChildren();
    for (const k of listed) option(at("cases"), index.cases[k].name + (metric && score(k) !== null ? " " + score(k).toFixed(3) : ""), k);
    at("count").textContent = listed.length + " of " + index.cases.length + " images";
    choose(0);
  };
  const choose = async (place) => {
    at("cases").selectedIndex = Math.min(Math.max(place, 0), listed.length - 1);
    const wanted = listed[at("cases").selectedIndex];
    if (wanted === undefined) {
      at("facts").textContent = "no image";
      at("panels").hidden = true;
      return;
    }
    const { name, facts } = index.cases[wanted];
    const image = await unpacked(packed[wanted].textContent);
    if (wanted !== listed[at("cases").selectedIndex]) return; // the reader has gone on meanwhile
    tell(name, facts, image);
  };
  const tell = (name, facts, image) => {
    shown = image;
    at("panels").hidden = false;
    at("facts").textContent = [name, ...Object.entries(facts).map(([k, v]) => k + ": " + v)].join(" · ");
    draw();
  };

  // ---- controls
  for (const [name, values] of Object.entries(index.filters ?? {})) {
    const select = made("select", made("label", at("filters"), name + " "));
    select.name = name;
    option(select, "any", "");
    values.forEach((value) => option(select, value));
    select.onchange = list;
  }
  option(at("order"), "of the data", '["", "", 1]');
  for (const method of index.methods)
    for (const metric of new Set(index.cases.flatMap((one) => Object.keys(one.scores[method] ?? {}))))
      for (const [way, word] of [[-1, "highest"], [1, "lowest"]])
        option(at("order"), `${word} ${metric}, ${method}`, JSON.stringify([metric, method, way]));
  Object.keys(colours).forEach((name) => option(at("colours"), name));
  for (let k = 0; k < Math.min(SIDES, index.methods.length); k++) {
    const figure = made("figure", at("panels")), select = made("select", figure);
    index.methods.forEach((name) => option(select, name));
    select.selectedIndex = k;
    select.setAttribute("aria-label", "explainer " + (k + 1));
    const canvas = made("canvas", figure), told = made("output", figure), value = made("figcaption", figure), pair = made("div", figure);
    pair.className = "pair";
    panels.push({ select, canvas, told, value, pair, first: made("canvas", pair), second: made("canvas", pair), named: made("figcaption", figure) });
    select.onchange = draw;
  }
  for (const id of ["scale", "threshold", "local", "tile", "opacity", "colours", "whole", "outline", "generated"]) at(id).oninput = draw;
  at("order").onchange = list;
  at("cases").onchange = () => choose(at("cases").selectedIndex);
  const step = (by) => {
    at("threshold").value = Number(at("threshold").value) + by;
    draw();
  };
  const toggle = (id) => {
    at(id).checked = !at(id).checked;
    draw();
  };
  const keys = {
    ArrowRight: () => choose(at("cases").selectedIndex + 1),
    ArrowLeft: () => choose(at("cases").selectedIndex - 1),
    ArrowUp: () => step(0.5),
    ArrowDown: () => step(-0.5),
    w: () => toggle("whole"),
    o: () => toggle("outline"),
    l: () => toggle("local"),
    b: () => {
      at("generated").value = at("generated").value === "blink" ? "beside" : "blink";
      draw();
    },
  };
  const root = document.getElementById("explorer");
  root.addEventListener("pointerdown", (event) => event.target.closest("input, select, label") ?? root.focus({ preventScroll: true }));
  root.addEventListener("keydown", (event) => {
    const typed = event.target.closest?.("input[type=number], select, textarea");
    if (typed || event.ctrlKey || event.altKey || event.metaKey || !keys[event.key]) return;
    event.preventDefault();
    keys[event.key]();
  });
  setInterval(() => {
    phase += 1;
    if (at("generated").value === "blink" && !document.hidden) drawPairs();
  }, BLINK);
  window.explore = async (name, facts, data, ranges) => {
    index.ranges = ranges ?? index.ranges;
    tell(name, facts, await opened(data));
  };
  if (packed.length) list();
  else draw();
})();
