"use strict";
// Puts the parts together: what is picked, search, views, theme and keys.
(() => {
  const { element } = Format;
  const $ = (id) => document.getElementById(id);
  const model = Model.read(JSON.parse($("data").textContent));
  let picked = null,
    view = "graph",
    found = [],
    at = -1;

  function pick(item, row) {
    picked = item;
    Panel.show(item, row);
    Graph.mark(item, found);
    Tree.mark(item);
  }

  function go(item, row) {
    if (view !== "graph" && !row) show("graph");
    if (item && item !== model.root && view === "graph") Graph.show(item);
    pick(item, row);
  }

  function show(which) {
    view = which;
    document.body.dataset.view = which;
    for (const name of ["graph", "treemap"]) {
      $(name).hidden = name !== which;
      $(`tab-${name}`).setAttribute("aria-selected", String(name === which));
    }
    $("sides").hidden = which !== "treemap";
    $("shown").hidden = which !== "graph";
    if (which === "treemap") Treemap.draw();
    else Graph.resize();
  }

  // -- search

  function search() {
    found = Model.find(model, $("search").value);
    at = found.length ? 0 : -1;
    const lines = found.slice(0, 40).map((item, i) =>
      element(
        "li",
        {
          role: "option",
          "data-i": i,
          on: {
            mousedown: (event) => {
              event.preventDefault();
              at = i;
              choose();
            },
          },
        },
        element("span", { class: "dot", css: { background: Format.bits(Model.bitsOf(item)) } }),
        element("b", {}, Model.name(item)),
        element("span", {}, item.data.path || ""),
        element("i", {}, item.isBox ? item.data.kind || "module" : item.data.role),
      ),
    );
    if (found.length > 40) lines.push(element("li", { class: "more" }, `and ${Format.count(found.length - 40)} more`));
    if (!found.length && $("search").value.trim()) lines.push(element("li", { class: "more" }, "nothing found"));
    $("results").replaceChildren(...lines);
    $("results").hidden = !lines.length;
    highlight();
    Graph.mark(picked, found);
  }

  function highlight() {
    [...$("results").children].forEach((line, i) => line.setAttribute("aria-selected", String(i === at)));
    const line = $("results").children[at];
    if (line) line.scrollIntoView({ block: "nearest" });
  }

  function choose() {
    if (at < 0) return;
    $("results").hidden = true;
    go(found[at]);
    $("search").blur();
  }

  function searchKey(event) {
    if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      at = Math.max(0, Math.min(Math.min(found.length, 40) - 1, at + (event.key === "ArrowDown" ? 1 : -1)));
      highlight();
    } else if (event.key === "Enter") choose();
    else if (event.key === "Escape") {
      $("search").value = "";
      search();
      $("search").blur();
    } else return;
    event.preventDefault();
    event.stopPropagation();
  }

  // -- keys

  const keys = {
    "/": () => $("search").select(),
    g: () => show("graph"),
    t: () => show("treemap"),
    d: theme,
    "?": help,
    f: () => Graph.fit(),
    0: () => Graph.view(),
    "+": () => Graph.zoomBy(1.25),
    "=": () => Graph.zoomBy(1.25),
    "-": () => Graph.zoomBy(0.8),
    e: () => Graph.setAll(true),
    c: () => Graph.setAll(false),
    Enter: toggle,
    " ": toggle,
    n: () => step(1),
    p: () => step(-1),
    Backspace: () => picked && picked.parent && go(picked.parent),
    Escape: () => {
      if ($("help").open) $("help").close();
      pick(null);
    },
    ArrowDown: () => along(1),
    ArrowUp: () => along(-1),
    ArrowRight: () => beside(1),
    ArrowLeft: () => beside(-1),
  };

  function toggle() {
    if (picked && picked.isBox) {
      Graph.toggle(picked);
      pick(picked);
    }
  }

  function step(by) {
    if (!found.length) return;
    at = (at + by + found.length) % found.length;
    go(found[at]);
  }

  // Follow an edge of what is shown; where there is none, go to the nearest thing in that direction.
  function along(sign) {
    const items = shownItems();
    if (!picked) {
      go(items[0]);
      return;
    }
    const here = Model.shown(picked);
    const byEdge = Graph.neighbours(here, sign);
    if (byEdge.length) {
      go(byEdge.sort((a, b) => Math.abs(a.x - here.x) - Math.abs(b.x - here.x) || sign * (a.y - b.y))[0]);
      return;
    }
    nearest(
      items.filter((each) => sign * (each.y - here.y) > 4),
      here,
    );
  }

  function beside(sign) {
    if (!picked) return;
    const here = Model.shown(picked);
    nearest(
      shownItems().filter((each) => each.parent === here.parent && sign * (each.x - here.x) > 4),
      here,
    );
  }

  function nearest(items, here) {
    const far = (each) => Math.hypot(each.x - here.x, each.y - here.y);
    const best = items.filter((each) => each !== here).sort((a, b) => far(a) - far(b))[0];
    if (best) go(best);
  }

  const shownItems = () => [...Graph.items()].sort((a, b) => a.y - b.y);

  function pressed(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("[type=search]")) return;
    if ((event.key === "Enter" || event.key === " ") && event.target.closest("button, summary, input")) return;
    if (event.key.startsWith("Arrow") && event.target.closest("[type=radio]")) return;
    const action = keys[event.key];
    if (!action) return;
    event.preventDefault();
    action();
  }

  function help() {
    if ($("help").open) $("help").close();
    else $("help").showModal();
  }

  // -- theme: the system's, until one is chosen

  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (document.documentElement.dataset.theme || (dark.matches ? "dark" : "light")) === "dark";

  function theme() {
    document.documentElement.dataset.theme = isDark() ? "light" : "dark";
    Graph.restyle();
  }

  // -- the legend says what the colours mean, and picks what has them

  function legend() {
    const counts = new Map();
    for (const row of model.data.layers) {
      const bits = row.reason == null && row.weight ? row.weight.bits : null;
      counts.set(bits, (counts.get(bits) || 0) + 1);
    }
    $("legend").hidden = !counts.size;
    const known = [...counts].sort((a, b) => (a[0] ?? 99) - (b[0] ?? 99));
    $("legend").replaceChildren(
      ...known.map(([bits, many]) =>
        element(
          "button",
          { title: `show the ${many} weights`, on: { click: () => only(bits) } },
          element("span", { class: "dot", css: { background: Format.bits(bits) } }),
          bits == null ? "float" : `${bits} bit`,
          element("small", {}, Format.count(many)),
        ),
      ),
    );
  }

  function only(bits) {
    found = model.nodes.filter(
      (node) =>
        ["site", "weight"].includes(node.data.role) &&
        (bits == null ? !(node.data.bits <= 8) : node.data.bits === bits),
    );
    at = -1;
    Graph.mark(picked, found);
  }

  // -- start

  const began = performance.now();
  Model.openSome(model, 40);
  Panel.start($("panel"), model, go);
  Tree.start($("tree"), model, go);
  Treemap.start($("treemap"), model, (item, row) => pick(item, row));
  Graph.start($("graph"), model, pick, () => Graph.mark(picked, found));
  Graph.view();
  legend();
  pick(null);
  $("search").addEventListener("input", search);
  $("search").addEventListener("focus", search);
  $("search").addEventListener("blur", () => {
    $("results").hidden = true;
  });
  $("search").addEventListener("keydown", searchKey);
  document.addEventListener("keydown", pressed);
  const on = {
    "tab-graph": () => show("graph"),
    "tab-treemap": () => show("treemap"),
    theme,
    fit: () => Graph.view(),
    "zoom-in": () => Graph.zoomBy(1.25),
    "zoom-out": () => Graph.zoomBy(0.8),
    "open-all": () => Graph.setAll(true),
    "close-all": () => Graph.setAll(false),
    "help-button": help,
    overview: () => pick(null),
  };
  for (const [id, action] of Object.entries(on)) $(id).addEventListener("click", action);
  for (const box of document.querySelectorAll("[data-roles]")) {
    const roles = box.dataset.roles.split(" ");
    box.checked = !roles.every((role) => model.hidden.has(role));
    box.addEventListener("change", () => {
      Graph.setHidden(roles, !box.checked);
      Graph.mark(picked, found);
    });
  }
  for (const box of document.querySelectorAll("[name=side]"))
    box.addEventListener("change", () => Treemap.set(box.value));
  dark.addEventListener("change", () => Graph.restyle());
  window.addEventListener("resize", () => (view === "treemap" ? Treemap.draw() : Graph.resize()));
  document.body.dataset.ready = String(Math.round(performance.now() - began));
  window.qgraphPage = {
    model,
    shown: () => Graph.items().length,
    position: (key) => Graph.position(model.byKey.get(key)),
    picked: () => picked && picked.key,
    core: Graph.core,
  };
})();
