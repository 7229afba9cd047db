"use strict";
// The data flow on cytoscape's canvas. Boxes are plain rectangles behind what they hold.
const Graph = (() => {
  const MANY = 600; // items beyond which the canvas gets those alone that are in and around the view
  const SMALL = 4; // pixels below which an item of so many is left out
  let cy, model, pick, toggled;
  let drawn = { items: [], edges: [] };
  let marked = [null, []];
  let waiting = 0;

  function start(container, theModel, onPick, onToggle) {
    model = theModel;
    pick = onPick;
    toggled = onToggle;
    cy = cytoscape({
      container,
      style: style(),
      minZoom: 0.02,
      maxZoom: 3,
      boxSelectionEnabled: false,
      autoungrabify: true,
      selectionType: "single",
      pixelRatio: "auto",
      hideEdgesOnViewport: false,
      textureOnViewport: false,
      layout: { name: "preset" },
    });
    cy.on("tap", "node", (event) => pick(model.byKey.get(event.target.id())));
    cy.on("dbltap", "node", (event) => {
      const item = model.byKey.get(event.target.id());
      if (item.isBox) toggle(item);
    });
    cy.on("tap", (event) => {
      if (event.target === cy) pick(null);
    });
    cy.on("viewport", () => {
      if (isLarge() && !waiting) waiting = setTimeout(sync, 60);
    });
    Layout.connect(model);
    draw();
  }

  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  function style() {
    const [text, dim, line, card, page, accent] = ["--text", "--dim", "--line", "--card", "--page", "--accent"].map(
      css,
    );
    const base = {
      shape: "round-rectangle",
      "corner-radius": 7,
      width: "data(w)",
      height: "data(h)",
      label: "data(label)",
      color: text,
      "font-family": Layout.FONT,
      "font-size": 12,
      "text-wrap": "wrap",
      "text-valign": "center",
      "text-halign": "center",
      "line-height": 1.25,
      "min-zoomed-font-size": 5,
      "background-color": card,
      "border-width": 1.2,
      "border-color": line,
      "overlay-opacity": 0,
      "z-index": "data(z)",
      "z-index-compare": "manual",
    };
    return [
      { selector: "node", style: base },
      {
        selector: ".parameter, .buffer, .constant",
        style: { "background-color": page, "border-style": "dashed", color: dim, "corner-radius": 14 },
      },
      { selector: ".number", style: { "background-color": page, color: dim, "border-width": 0.6 } },
      {
        selector: ".input, .output",
        style: { "background-color": text, color: page, "border-width": 0, "corner-radius": 18 },
      },
      { selector: ".python", style: { "border-style": "double", "border-width": 4, "border-color": css("--warn") } },
      {
        selector: ".weight, .activation",
        style: { "background-color": "data(tint)", "border-width": 0, color: "#fff", "font-weight": 600 },
      },
      { selector: ".activation", style: { shape: "cut-rectangle" } },
      { selector: ".dark-text", style: { color: "#1b1b12" } },
      {
        selector: ".sparsity",
        style: { "background-color": css("--sparse"), "border-width": 0, color: "#fff", "font-weight": 600 },
      },
      { selector: ".site", style: { "border-color": "data(tint)", "border-width": 2.5, "font-weight": 600 } },
      { selector: ".closed", style: stripe(card, line) },
      {
        selector: ".open",
        style: {
          "background-color": css("--box"),
          "background-opacity": 0.55,
          "border-color": line,
          "border-width": 1,
          "text-valign": "top",
          "text-margin-x": "data(mx)",
          "text-margin-y": 22,
          color: dim,
          "text-wrap": "none",
          "corner-radius": 10,
          "min-zoomed-font-size": 6,
        },
      },
      {
        selector: "edge",
        style: {
          width: "data(wide)",
          "line-color": css("--edge"),
          "curve-style": "straight",
          "target-arrow-shape": "triangle",
          "target-arrow-color": css("--edge"),
          "arrow-scale": 0.75,
          "source-endpoint": "0 50%",
          "target-endpoint": "0 -50%",
          events: "no",
          "z-index-compare": "manual",
          "z-index": 500,
          "overlay-opacity": 0,
        },
      },
      {
        selector: "edge.bent",
        style: {
          "curve-style": "round-segments",
          "segment-distances": "data(sd)",
          "segment-weights": "data(sw)",
          "segment-radii": 12,
          "edge-distances": "endpoints",
        },
      },
      { selector: "edge.side", style: { "line-style": "dotted", opacity: 0.75, width: 1.2 } },
      {
        selector: "edge.near",
        style: { "line-color": accent, "target-arrow-color": accent, width: 2.4, opacity: 1, "z-index": 501 },
      },
      { selector: "node.found", style: { "underlay-color": accent, "underlay-opacity": 0.18, "underlay-padding": 6 } },
      {
        selector: "node.picked",
        style: {
          "border-color": accent,
          "border-width": 3,
          "border-style": "solid",
          "underlay-color": accent,
          "underlay-opacity": 0.22,
          "underlay-padding": 7,
        },
      },
      { selector: "node.open", style: { "underlay-opacity": 0 } },
    ];
  }

  const stripe = (card, line) => ({
    "background-fill": "linear-gradient",
    "background-gradient-direction": "to-right",
    "background-gradient-stop-colors": (node) => {
      const c = node.data("tint");
      return `${c} ${c} ${card} ${card}`;
    },
    "background-gradient-stop-positions": (node) => {
      const cut = 700 / node.data("w");
      return `0% ${cut}% ${cut}% 100%`;
    },
    "border-color": line,
    "border-width": 1.4,
    "font-weight": 600,
  });

  function element(item) {
    const { data } = item;
    const bits = Model.bitsOf(item);
    const open = item.isBox && item.expanded;
    const label = open ? Layout.header(item) : item.label.filter(Boolean).join("\n");
    const classes = item.isBox ? [open ? "open" : "closed"] : [data.role];
    if (!item.isBox && bits != null && bits >= 1.8 && bits <= 3.5) classes.push("dark-text");
    const values = {
      id: item.key,
      label,
      w: item.w,
      h: item.h,
      tint: item.isBox && bits == null ? css("--card") : Format.bits(bits),
      z: item.depth * 10 + (open ? 0 : 1000),
    };
    if (open) values.mx = -(item.w - Layout.textWidth(label, "12px") - 28) / 2;
    return { group: "nodes", data: values, position: { x: item.x, y: item.y }, classes };
  }

  // Cytoscape takes the points of a bent edge as shares of, and distances from, the line between its ends.
  function wire(edge) {
    const from = { x: edge.source.x, y: edge.source.y + edge.source.h / 2 },
      to = { x: edge.target.x, y: edge.target.y - edge.target.h / 2 };
    const dx = to.x - from.x,
      dy = to.y - from.y,
      long = Math.hypot(dx, dy) || 1;
    const data = {
      id: edge.id,
      source: edge.source.key,
      target: edge.target.key,
      wide: Math.min(4, 1.3 + Math.log2(edge.count) * 0.5),
    };
    const classes = ["parameter", "buffer", "constant", "number"].includes(edge.source.data.role) ? ["side"] : [];
    if (edge.points.length && long > 1) {
      data.sw = edge.points.map((p) => ((p.x - from.x) * dx + (p.y - from.y) * dy) / (long * long));
      data.sd = edge.points.map((p) => ((p.y - from.y) * dx - (p.x - from.x) * dy) / long);
      classes.push("bent");
    }
    return { group: "edges", data, classes };
  }

  const isLarge = () => drawn.items.length > MANY;

  function draw() {
    drawn = Layout.run(model);
    cy.batch(() => {
      cy.elements().remove();
      if (!isLarge()) cy.add([...drawn.items.map(element), ...drawn.edges.map(wire)]);
    });
    sync();
  }

  // Of a large graph, keep on the canvas what can be seen now.
  function sync() {
    waiting = 0;
    if (!isLarge()) return;
    const wanted = inView();
    cy.batch(() => {
      cy.elements()
        .filter((each) => !wanted.has(each.id()))
        .remove();
      for (const make of wanted.values()) make();
    });
    mark(...marked);
  }

  function inView() {
    const { x1, x2, y1, y2 } = cy.extent();
    const dx = (x2 - x1) / 2,
      dy = (y2 - y1) / 2,
      zoom = cy.zoom();
    const isNear = (left, right, top, bottom) => right > x1 - dx && left < x2 + dx && bottom > y1 - dy && top < y2 + dy;
    const wanted = new Map(),
      wires = new Map();
    const add = (key, make) =>
      wanted.has(key) || wanted.set(key, () => cy.getElementById(key).empty() && cy.add(make()));
    const isLegible = (item) => item.h * zoom > SMALL;
    for (const item of drawn.items) {
      const w = item.w / 2,
        h = item.h / 2;
      if (isLegible(item) && isNear(item.x - w, item.x + w, item.y - h, item.y + h)) add(item.key, () => element(item));
    }
    for (const edge of drawn.edges) {
      const { source, target } = edge;
      if (!isLegible(source) || !isLegible(target)) continue;
      const xs = [source.x, target.x, ...edge.points.map((p) => p.x)];
      if (!isNear(Math.min(...xs), Math.max(...xs), Math.min(source.y, target.y), Math.max(source.y, target.y)))
        continue;
      for (const end of [source, target]) add(end.key, () => element(end));
      wires.set(edge.id, () => cy.getElementById(edge.id).empty() && cy.add(wire(edge)));
    }
    return new Map([...wanted, ...wires]);
  }

  // Draw again; `anchor` stays where it is on the screen.
  function redraw(anchor) {
    const before = anchor && anchor.x != null ? { x: anchor.x, y: anchor.y - anchor.h / 2 } : null;
    draw();
    if (!before) return;
    cy.panBy({ x: (before.x - anchor.x) * cy.zoom(), y: (before.y - anchor.y + anchor.h / 2) * cy.zoom() });
    sync();
  }

  function toggle(box) {
    if (box === model.root || !box.children.length) return;
    box.expanded = !box.expanded;
    redraw(box);
    toggled(box);
  }

  function setAll(open) {
    for (const box of model.boxes) box.expanded = (open && box.children.length > 0) || box === model.root;
    redraw(null);
    view();
    toggled(null);
  }

  function setHidden(roles, hidden) {
    for (const role of roles)
      if (hidden) model.hidden.add(role);
      else model.hidden.delete(role);
    Layout.connect(model);
    redraw(null);
  }

  function mark(item, found) {
    marked = [item, found];
    cy.batch(() => {
      cy.elements(".picked, .near, .found").removeClass("picked near found");
      for (const each of found || []) cy.getElementById(Model.shown(each).key).addClass("found");
      if (!item) return;
      const node = cy.getElementById(Model.shown(item).key);
      node.addClass("picked");
      node.connectedEdges().addClass("near");
    });
  }

  function show(item) {
    if (Model.isHidden(model, item)) setHidden([item.data.role], false);
    if (Model.reveal(item)) redraw(null);
    let zoom = Math.min(1.4, Math.max(cy.zoom(), 0.75));
    if (item.isBox && item.expanded) {
      const whole = Math.min((cy.width() - 60) / item.w, (cy.height() - 60) / item.h);
      zoom = Math.min(zoom, Math.max(whole, 0.5));
    }
    cy.viewport({ zoom, pan: { x: cy.width() / 2 - zoom * item.x, y: cy.height() / 2 - zoom * item.y } });
    sync();
  }

  // All of it; the layout knows its size, which the library would have to measure.
  function fit(least = 0) {
    cy.resize();
    const { w, h } = model.root.made,
      top = 30,
      edge = 24,
      below = 40; // the legend stands below
    const wide = cy.width() - 2 * edge,
      high = cy.height() - 2 * edge - below;
    const whole = Math.min(wide / w, high / (h - top), 1.2);
    const zoom = Math.max(whole, Math.min(least, 1));
    const y = zoom > whole ? edge - zoom * top : edge + (high - zoom * (h + top)) / 2;
    cy.viewport({ zoom, pan: { x: cy.width() / 2 - (zoom * w) / 2, y } });
    sync();
  }

  // All of it where that is legible, else its beginning.
  const view = () => fit(0.8);

  // What edges lead to from an item, or with a sign of -1 come from.
  const neighbours = (item, sign) =>
    sign > 0
      ? drawn.edges.filter((edge) => edge.source === item).map((edge) => edge.target)
      : drawn.edges.filter((edge) => edge.target === item).map((edge) => edge.source);

  const zoomBy = (factor) =>
    cy.zoom({ level: cy.zoom() * factor, renderedPosition: { x: cy.width() / 2, y: cy.height() / 2 } });

  return {
    start,
    toggle,
    setAll,
    setHidden,
    mark,
    show,
    view,
    zoomBy,
    fit: () => fit(),
    restyle: () => cy.style(style()),
    resize: () => cy.resize(),
    items: () => drawn.items,
    position: (item) => ({ x: item.x * cy.zoom() + cy.pan().x, y: item.y * cy.zoom() + cy.pan().y }),
    neighbours,
    core: () => cy,
  };
})();
