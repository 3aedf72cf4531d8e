"use strict";
// What a reader may do with the maps of explorer.py. The scores are those of evaluation/metrics:
// percentile_iou, and threshold_sweep of min_max, set_wide and region_min_max over tiles.
(() => {
  const STEPS = 65535, SIDES = 2, BLINK = 600;
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
      maps: data.maps.map(({ levels, low, high }) => {
        const raw = bytes(levels), view = new DataView(raw.buffer);
        return { low, high, levels: Uint16Array.from({ length: count }, (_, k) => view.getUint16(2 * k, true)) };
      }),
      generated: await Promise.all(data.generated.map((pair) => pair && Promise.all(pair.map(picture)))),
    };
  };

  // ---- threshold
  const places = (image, side) => { // pixels of each tile; of the whole image without a side
    if (!side) return [Array.from({ length: image.count }, (_, k) => k)];
    const across = Math.ceil(image.width / side), tiles = [];
    for (let k = 0; k < image.count; k++) {
      const row = Math.floor(k / image.width), tile = Math.floor(row / side) * across + Math.floor((k % image.width) / side);
      (tiles[tile] ??= []).push(k);
    }
    return tiles;
  };
  const region = (image, map, bounds, scale, threshold, side) => {
    const kept = new Uint8Array(image.count), { levels, low, high } = map;
    for (const tile of places(image, side)) {
      const values = Uint16Array.from(tile, (k) => levels[k]).sort();
      const least = values[0], most = values[values.length - 1];
      let keep;
      if (scale === "percentile") { // ties at the threshold stay in
        const limit = values[Math.ceil((threshold / 100) * (values.length - 1) - 1e-9)];
        keep = (level) => level >= limit;
      } else if (side || scale === "own") {
        keep = (level) => (most > least ? (level - least) / (most - least) : 0) >= threshold / 100;
      } else {
        const [first, last] = bounds;
        const scaled = (level) => (last > first ? (low + (level / STEPS) * (high - low) - first) / (last - first) : 0);
        keep = (level) => Math.min(1, Math.max(0, scaled(level))) >= threshold / 100;
      }
      for (const k of tile) kept[k] = keep(levels[k]) ? 1 : 0;
    }
    return kept;
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
    for (let k = 0; k < image.count; k++) {
      if (map && (at("whole").checked || kept[k]))
        for (let c = 0; c < 3; c++)
          picture.data[4 * k + c] = (1 - opacity) * source[4 * k + c] + opacity * table[3 * (map.levels[k] >> 8) + c];
      if (kept && at("whole").checked && border(kept, k, image.width, image.height)) picture.data.set([255, 255, 255], 4 * k);
      if (image.mask && at("outline").checked && border(image.mask, k, image.width, image.height)) picture.data.set([51, 255, 77], 4 * k);
    }
    canvas.getContext("2d").putImageData(picture, 0, 0);
  };
  const draw = () => {
    const scale = at("scale").value, threshold = Number(at("threshold").value);
    at("shown").value = scale === "percentile" ? threshold + " %" : (threshold / 100).toFixed(3);
    if (!shown) return;
    const side = at("local").checked ? Math.max(2, Math.floor(Number(at("tile").value)) || 2) : 0;
    for (const panel of panels) {
      const method = panel.select.selectedIndex, map = shown.maps[method];
      const kept = region(shown, map, index.ranges[method], scale, threshold, side);
      paint(panel.canvas, shown, shown.image, map, kept);
      panel.told.textContent = Object.entries(scores(kept, shown.mask)).map(([k, v]) => k + " " + v.toFixed(3)).join(", ");
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
    if (wanted === undefined) return;
    const { name, facts } = index.cases[wanted];
    const image = await unpacked(packed[wanted].textContent);
    if (wanted !== listed[at("cases").selectedIndex]) return; // the reader has gone on meanwhile
    tell(name, facts, image);
  };
  const tell = (name, facts, image) => {
    shown = image;
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
  for (const [method, found] of Object.entries(index.cases[0]?.scores ?? {}))
    for (const metric of Object.keys(found))
      for (const [way, word] of [[-1, "highest"], [1, "lowest"]])
        option(at("order"), `${word} ${metric}, ${method}`, JSON.stringify([metric, method, way]));
  Object.keys(colours).forEach((name) => option(at("colours"), name));
  for (let k = 0; k < Math.min(SIDES, index.methods.length); k++) {
    const figure = made("figure", at("panels")), select = made("select", figure);
    index.methods.forEach((name) => option(select, name));
    select.selectedIndex = k;
    select.setAttribute("aria-label", "explainer " + (k + 1));
    const canvas = made("canvas", figure), told = made("output", figure), pair = made("div", figure);
    pair.className = "pair";
    panels.push({ select, canvas, told, pair, first: made("canvas", pair), second: made("canvas", pair), named: made("figcaption", figure) });
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
  document.addEventListener("keydown", (event) => {
    const typed = event.target.closest?.("input:not([type=checkbox]), select, textarea");
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
