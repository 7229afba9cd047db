"use strict";
// The module hierarchy as a tree of rows; a row's children are made when it is opened first.
const Tree = (() => {
  const { element } = Format;
  let model, pick, rows;

  function start(container, theModel, onPick) {
    model = theModel;
    pick = onPick;
    rows = new Map();
    container.replaceChildren(row(model.root, 0));
    open(model.root, true);
    for (const box of model.root.children) if (box.isBox && model.root.children.length < 12) open(box, true);
    container.addEventListener("keydown", move);
  }

  function row(item, depth) {
    const bits = Model.bitsOf(item);
    const size = item.isBox ? item.total.after : 0;
    const share = model.root.total.after ? size / model.root.total.after : 0;
    const line = element(
      "div",
      {
        class: `row ${item.isBox ? "box" : item.data.role}`,
        role: "treeitem",
        tabindex: item === model.root ? "0" : "-1",
        "data-key": item.key,
        "aria-expanded": item.isBox && item.children.length ? "false" : null,
        css: { "--depth": depth },
        on: { click: (event) => clicked(event, item), dblclick: () => item.isBox && open(item, !isOpen(item)) },
      },
      element("span", { class: "arrow", "aria-hidden": "true" }, item.isBox && item.children.length ? "▸" : ""),
      element("span", {
        class: "dot",
        css: { background: bits == null ? "transparent" : Format.bits(bits) },
        title: Format.bitsText(bits),
      }),
      element("span", { class: "name" }, Model.name(item) || "model"),
      element("span", { class: "kind" }, item.isBox ? item.data.kind || "" : (item.data.shape || []).join("×")),
      size
        ? element(
            "span",
            { class: "size" },
            Format.bytes(size),
            element("i", { css: { width: `${Math.max(2, 100 * share)}%` } }),
          )
        : null,
    );
    const made = element(
      "div",
      { class: "branch", role: "none" },
      line,
      element("div", { class: "leaves", role: "group", hidden: true }),
    );
    rows.set(item.key, { line, leaves: made.lastChild, depth });
    return made;
  }

  const isOpen = (item) => rows.has(item.key) && !rows.get(item.key).leaves.hidden;

  function open(item, yes) {
    const own = rows.get(item.key);
    if (!own || !item.children.length) return;
    if (yes && !own.leaves.childElementCount) {
      own.leaves.append(
        ...item.children
          .filter((child) => child.isBox || !Model.isHidden(model, child))
          .map((child) => row(child, own.depth + 1)),
      );
    }
    own.leaves.hidden = !yes;
    own.line.setAttribute("aria-expanded", String(yes));
  }

  function clicked(event, item) {
    if (event.target.classList.contains("arrow")) open(item, !isOpen(item));
    else pick(item);
  }

  function mark(item) {
    for (const { line } of rows.values()) line.classList.remove("picked");
    if (!item) return;
    const above = [];
    for (let box = item.parent; box; box = box.parent) above.unshift(box);
    above.forEach((box) => open(box, true));
    const own = rows.get(item.key);
    if (!own) return;
    own.line.classList.add("picked");
    own.line.scrollIntoView({ block: "nearest" });
  }

  // Arrow keys as in any tree: up and down over rows, right opens, left closes or goes to the row above.
  function move(event) {
    const line = document.activeElement;
    if (!line || !line.dataset.key) return;
    const item = model.byKey.get(line.dataset.key);
    const shown = () => [...rows.values()].map((each) => each.line).filter((each) => each.offsetParent);
    const lines = shown().sort((a, b) => (a.compareDocumentPosition(b) & Node.DOCUMENT_POSITION_FOLLOWING ? -1 : 1));
    const at = lines.indexOf(line);
    let next = null;
    if (event.key === "ArrowDown") next = lines[at + 1];
    else if (event.key === "ArrowUp") next = lines[at - 1];
    else if (event.key === "ArrowRight" && !isOpen(item)) open(item, true);
    else if (event.key === "ArrowRight") next = lines[at + 1];
    else if (event.key === "ArrowLeft" && isOpen(item)) open(item, false);
    else if (event.key === "ArrowLeft") next = item.parent && rows.get(item.parent.key).line;
    else if (event.key === "Enter" || event.key === " ") pick(item);
    else return;
    event.preventDefault();
    event.stopPropagation();
    if (next) next.focus();
  }

  return { start, mark };
})();
