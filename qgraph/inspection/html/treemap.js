"use strict";
// Where the bytes are: one rectangle a weight, coloured by bits, inside those of its modules.
const Treemap = (() => {
  const { element } = Format;
  let model,
    pick,
    container,
    side = "after";

  function start(theContainer, theModel, onPick) {
    [container, model, pick] = [theContainer, theModel, onPick];
  }

  function tree(box) {
    const children = box.children.filter((child) => child.isBox).map(tree);
    const rows = box.rows.map((row) => ({
      row,
      name: row.name.split(".").pop(),
      size: row[`bytes_${side}`],
      bits: row.reason == null ? (row.weight ? row.weight.bits : 32) : 32,
    }));
    const floats = box.floats.map((row) => ({ row, name: row.name.split(".").pop(), size: row.bytes, bits: null }));
    return {
      item: box,
      name: Model.name(box),
      children: [...children, ...rows, ...floats].filter((each) => each.children || each.size),
    };
  }

  function draw() {
    const { width, height } = container.getBoundingClientRect();
    const root = d3
      .hierarchy(tree(model.root))
      .sum((each) => each.size || 0)
      .sort((a, b) => b.value - a.value);
    d3
      .treemap()
      .size([width, height])
      .paddingOuter(3)
      .paddingTop((node) => (node.x1 - node.x0 > 64 && node.y1 - node.y0 > 30 ? 17 : 3))
      .paddingInner(1)(root);
    const shown = root.descendants().filter((node) => node.x1 - node.x0 >= 2 && node.y1 - node.y0 >= 2);
    container.replaceChildren(...shown.map(cell));
  }

  function cell(node) {
    const leaf = !node.children;
    const { data } = node;
    const item = data.item || owner(node);
    const w = node.x1 - node.x0,
      h = node.y1 - node.y0;
    const color = leaf ? Format.bits(data.bits) : null;
    const title =
      leaf && data.row
        ? `${data.row.name}\n${Format.bytes(node.value)} · ${data.row.spec || data.row.reason}`
        : `${item.data.path || data.name}\n${Format.bytes(node.value)}`;
    const text =
      w > (leaf ? 34 : 64) && h > 14
        ? [
            element("b", {}, data.name),
            leaf && h > 30
              ? element("small", {}, Format.bytes(node.value))
              : !leaf
                ? element("small", {}, ` ${Format.bytes(node.value)}`)
                : null,
          ]
        : [];
    return element(
      "button",
      {
        class: leaf ? "cell" : "cell frame",
        title,
        tabindex: w > 24 && h > 14 ? "0" : "-1",
        css: {
          left: `${node.x0}px`,
          top: `${node.y0}px`,
          width: `${w}px`,
          height: `${h}px`,
          ...(color && { background: color }),
          ...(leaf && data.bits >= 1.8 && data.bits <= 3.5 && { color: "#1b1b12" }),
        },
        on: { click: () => pick(item, data.row) },
      },
      ...text,
    );
  }

  function owner(node) {
    return node.parent.data.item;
  }

  return {
    start,
    draw,
    set: (which) => {
      side = which;
      draw();
    },
  };
})();
