"use strict";
// Positions and routes: dagre lays out each open box by itself, from the inside out, so that opening one costs what
// that one holds. An edge that leaves a box runs through a port on its border. Boxes of equal content share a layout.
const Layout = (() => {
  const HEAD = 30,
    PAD = 16,
    GAP = 18,
    RANK = 26;
  const cache = new Map();
  const pen = document.createElement("canvas").getContext("2d");
  const FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif';
  const widths = new Map();

  function textWidth(text, font) {
    const key = font + text;
    if (!widths.has(key)) {
      pen.font = `${font} ${FONT}`;
      widths.set(key, pen.measureText(text).width);
    }
    return widths.get(key);
  }

  // For each box: the edges between what it holds, those of other boxes ending at ports "i" (in) and "o" (out).
  function connect(model) {
    for (const box of model.boxes) box.links = new Map();
    for (const [from, to] of model.edges) {
      if (Model.isHidden(model, from) || Model.isHidden(model, to)) continue;
      let a = from,
        b = to;
      while (a.parent !== b.parent) {
        if (a.parent.depth >= b.parent.depth) {
          link(a.parent, a.key, `o${from.key}`);
          a = a.parent;
        } else {
          link(b.parent, `i${from.key}`, b.key);
          b = b.parent;
        }
      }
      if (a !== b) link(a.parent, a.key, b.key);
    }
  }

  const link = (box, a, b) => box.links.set(`${a}>${b}`, [a, b]);

  function labels(item) {
    if (item.isBox) return [Model.name(item), boxLine(item)];
    const { data } = item;
    if (data.role === "weight" || data.role === "activation" || data.role === "sparsity")
      return [data.label, data.spec ? short(data.spec) : ""];
    return [data.label, data.shape && data.shape.length ? data.shape.join(" × ") : ""];
  }

  // The line at the top of an open box.
  const header = (box) => [Model.name(box), box.data.kind].filter(Boolean).join("   ");

  const short = (spec) => spec.replace("-bit", " bit").replace(" ddt", "").replace(" per ", " / ");

  function boxLine(item) {
    const parts = [];
    if (item.data.kind) parts.push(item.data.kind);
    if (item.total.weights) parts.push(`${(item.total.bits / item.total.weights).toFixed(1)} b/w`);
    if (item.total.after) parts.push(Format.bytes(item.total.after));
    return parts.join(" · ");
  }

  function size(model, item) {
    if (item.isBox && item.expanded) return inside(model, item);
    const [first, second] = (item.label = item.label || labels(item));
    const wide = Math.max(
      textWidth(first, "600 12px"),
      textWidth(second, item.isBox || item.rows.length ? "600 12px" : "12px"),
    );
    return { w: Math.ceil(Math.max(54, wide + 26)), h: second ? 40 : 26 };
  }

  function inside(model, box) {
    const children = Model.shownChildren(model, box);
    const sizes = children.map((child) => size(model, child));
    const number = new Map(children.map((child, i) => [child.key, i]));
    const links = [...box.links.values()].map(([a, b]) => [
      number.has(a) ? number.get(a) : port(number, a),
      number.has(b) ? number.get(b) : port(number, b),
    ]);
    const ports = [...number.keys()].slice(children.length);
    const kinds = ports.map((key) => key[0]).join("");
    const signature = `${kinds}|${sizes.map((s) => `${s.w},${s.h}`).join(";")}|${links.join(";")}`;
    let made = cache.get(signature);
    if (!made) cache.set(signature, (made = arrange(sizes, kinds, links)));
    box.label = box.label || labels(box);
    const title = textWidth(header(box), "12px") + 40;
    const names = [...number.keys()];
    box.made = {
      w: Math.max(made.w, title),
      h: made.h,
      shift: Math.max(0, (title - made.w) / 2),
      places: made.places,
      children,
      routes: new Map(links.map(([a, b], i) => [`${names[a]}>${names[b]}`, made.routes[i]])),
    };
    return box.made;
  }

  function port(number, key) {
    number.set(key, number.size);
    return number.size - 1;
  }

  function arrange(sizes, kinds, links) {
    const count = sizes.length;
    const linked = new Set(links.flat());
    const lone = sizes.map((_, i) => i).filter((i) => !linked.has(i));
    const graph = new dagre.graphlib.Graph();
    graph.setGraph({
      nodesep: GAP,
      edgesep: 12,
      ranksep: RANK,
      ranker: links.length > 400 ? "longest-path" : "network-simplex",
    });
    graph.setDefaultEdgeLabel(() => ({}));
    sizes.forEach((s, i) => {
      if (linked.has(i)) graph.setNode(String(i), { width: s.w, height: s.h });
    });
    [...kinds].forEach((kind, i) => {
      graph.setNode(String(count + i), { width: 2, height: 1 });
      // All ports of one side are held on one rank, next to the border.
      if (kind === "i") graph.setEdge("top", String(count + i), { weight: 50 });
      else graph.setEdge(String(count + i), "bottom", { weight: 50 });
    });
    for (const end of ["top", "bottom"]) if (graph.hasNode(end)) graph.setNode(end, { width: 1, height: 1 });
    links.forEach(([a, b]) => {
      if (a !== b) graph.setEdge(String(a), String(b), { weight: a < count && b < count ? 2 : 1 });
    });
    if (linked.size) dagre.layout(graph);
    return measure(sizes, kinds, links, graph, lone);
  }

  function measure(sizes, kinds, links, graph, lone) {
    const count = sizes.length;
    const places = sizes.map((_, i) => (graph.hasNode(String(i)) ? graph.node(String(i)) : null));
    const middle = links.map(([a, b]) => {
      const edge = a === b ? null : graph.edge(String(a), String(b));
      return edge ? edge.points.slice(1, -1) : [];
    });
    let left = Infinity,
      top = Infinity,
      right = -Infinity,
      bottom = -Infinity;
    places.forEach((p, i) => {
      if (!p) return;
      left = Math.min(left, p.x - sizes[i].w / 2);
      right = Math.max(right, p.x + sizes[i].w / 2);
      top = Math.min(top, p.y - sizes[i].h / 2);
      bottom = Math.max(bottom, p.y + sizes[i].h / 2);
    });
    for (const points of middle)
      for (const p of points) {
        left = Math.min(left, p.x - 4);
        right = Math.max(right, p.x + 4);
      }
    if (left === Infinity) left = top = right = bottom = 0;
    const dx = PAD - left,
      dy = HEAD + PAD - top;
    const moved = places.map((p) => (p ? { x: p.x + dx, y: p.y + dy } : null));
    let w = right - left + 2 * PAD,
      h = bottom - top + HEAD + 2 * PAD;
    if (lone.length) [w, h] = grid(sizes, lone, moved, w, bottom > top ? h : HEAD + PAD);
    const routes = links.map(([a, b], i) => {
      const points = middle[i].map((p) => ({ x: p.x + dx, y: p.y + dy }));
      const inner = points.filter((p) => p.y > HEAD + 2 && p.y < h - 2);
      if (a >= count) inner.unshift({ x: graph.node(String(a)).x + dx, y: 0 });
      if (b >= count) inner.push({ x: graph.node(String(b)).x + dx, y: h });
      return straighten(inner);
    });
    return { w, h, places: moved, routes };
  }

  // What has no edges stands in rows below the rest.
  function grid(sizes, lone, places, width, top) {
    const area = lone.reduce((all, i) => all + (sizes[i].w + GAP) * (sizes[i].h + GAP), 0);
    const limit = Math.max(width - 2 * PAD, Math.sqrt(area * 1.7), ...lone.map((i) => sizes[i].w));
    let x = 0,
      y = top,
      row = 0,
      right = 0;
    for (const i of lone) {
      if (x && x + sizes[i].w > limit) {
        x = 0;
        y += row + GAP;
        row = 0;
      }
      places[i] = { x: PAD + x + sizes[i].w / 2, y: y + sizes[i].h / 2 };
      x += sizes[i].w + GAP;
      right = Math.max(right, x - GAP);
      row = Math.max(row, sizes[i].h);
    }
    return [Math.max(width, right + 2 * PAD), y + row + PAD];
  }

  // Points that lie on the line between their neighbours say nothing.
  function straighten(points) {
    return points.filter((p, i) => {
      if (i === 0 || i === points.length - 1) return true;
      const a = points[i - 1],
        b = points[i + 1];
      return Math.abs((b.x - a.x) * (p.y - a.y) - (b.y - a.y) * (p.x - a.x)) > 1;
    });
  }

  // Lay out the open boxes; afterwards every shown item has x, y (its centre), w and h.
  function run(model) {
    inside(model, model.root);
    const shown = [];
    place(model, model.root, 0, 0, shown);
    return { items: shown, edges: route(model) };
  }

  function place(model, box, x, y, shown) {
    box.left = x + (box.made.shift || 0);
    box.top = y;
    box.made.children.forEach((child, i) => {
      const s = size_of(model, child),
        p = box.made.places[i];
      Object.assign(child, { x: box.left + p.x, y: y + p.y, w: s.w, h: s.h });
      shown.push(child);
      if (child.isBox && child.expanded) place(model, child, child.x - s.w / 2, child.y - s.h / 2, shown);
    });
  }

  const size_of = (model, item) => (item.isBox && item.expanded ? item.made : size(model, item));

  function route(model) {
    const found = new Map();
    for (const [from, to] of model.edges) {
      if (Model.isHidden(model, from) || Model.isHidden(model, to)) continue;
      const source = Model.shown(from),
        target = Model.shown(to);
      if (source === target) continue;
      const key = `${source.key}>${target.key}`;
      const known = found.get(key);
      if (known) {
        known.count += 1;
        continue;
      }
      found.set(key, { id: key, source, target, count: 1, points: path(from, source, target) });
    }
    return [...found.values()];
  }

  function path(from, source, target) {
    const before = [],
      after = [];
    let a = source,
      b = target;
    while (a.parent !== b.parent) {
      if (a.parent.depth >= b.parent.depth) {
        before.push(...points(a.parent, `${a.key}>o${from.key}`));
        a = a.parent;
      } else {
        after.unshift(...points(b.parent, `i${from.key}>${b.key}`));
        b = b.parent;
      }
    }
    return [...before, ...points(a.parent, `${a.key}>${b.key}`), ...after];
  }

  const points = (box, key) => (box.made.routes.get(key) || []).map((p) => ({ x: box.left + p.x, y: box.top + p.y }));

  return { connect, run, header, textWidth, FONT };
})();
