"use strict";
// The page's data as a tree of items: boxes (modules) and nodes, the edges between nodes, and sums over boxes.
const Model = (() => {
  const FLOAT = 32;

  function read(data) {
    const boxes = data.boxes.map((box, i) => item(`b${i}`, box, true));
    const nodes = data.nodes.map((node, i) => item(`n${i}`, node, false));
    boxes.forEach((box) => attach(box, box.data.parent == null ? null : boxes[box.data.parent]));
    nodes.forEach((node) => attach(node, boxes[node.data.box]));
    const model = {
      data,
      boxes,
      nodes,
      root: boxes[0],
      edges: data.edges.map(([a, b]) => [nodes[a], nodes[b]]),
      hidden: new Set(["number", "constant"]),
      byKey: new Map([...boxes, ...nodes].map((each) => [each.key, each])),
    };
    inOrder(nodes, boxes);
    for (const [a, b] of model.edges) {
      a.outputs.push(b);
      b.inputs.push(a);
    }
    sum(model);
    return model;
  }

  function item(key, data, isBox) {
    return {
      key,
      data,
      isBox,
      parent: null,
      children: [],
      expanded: false,
      inputs: [],
      outputs: [],
      rows: [],
      floats: [],
    };
  }

  function attach(child, parent) {
    child.parent = parent;
    child.depth = parent ? parent.depth + 1 : 0;
    if (parent) parent.children.push(child);
  }

  // Nodes come in the order in which they run; a box goes by its first.
  function inOrder(nodes, boxes) {
    nodes.forEach((node, i) => {
      node.order = i;
      for (let box = node.parent; box && box.order == null; box = box.parent) box.order = i;
    });
    for (const box of boxes)
      box.children.sort((a, b) => (a.order ?? Infinity) - (b.order ?? Infinity) || a.depth - b.depth);
  }

  function sum(model) {
    for (const layer of model.data.layers) model.boxes[layer.box].rows.push(layer);
    for (const float of model.data.floats) model.boxes[float.box].floats.push(float);
    for (const node of model.nodes) node.rows = (node.data.layers || []).map((i) => model.data.layers[i]);
    for (let i = model.boxes.length - 1; i >= 0; i--) model.boxes[i].total = total(model.boxes[i]);
  }

  function total(box) {
    const sums = {
      before: 0,
      after: 0,
      weights: 0,
      quantized: 0,
      bits: 0,
      nominal: 0,
      error: null,
      layers: 0,
      nodes: 0,
    };
    for (const row of box.rows) {
      const numel = row.shape.reduce((a, b) => a * b, 1);
      sums.before += row.bytes_before;
      sums.after += row.bytes_after;
      sums.layers += 1;
      if (row.tied_to) continue;
      sums.weights += numel;
      sums.bits += row.bits_per_weight * numel;
      if (row.reason == null) {
        sums.quantized += numel;
        sums.nominal += (row.weight ? row.weight.bits : FLOAT) * numel;
      }
      if (row.error_db != null) sums.error = Math.min(sums.error ?? Infinity, row.error_db);
    }
    for (const float of box.floats) {
      sums.before += float.bytes;
      sums.after += float.bytes;
    }
    for (const child of box.children) {
      if (!child.isBox) {
        sums.nodes += 1;
        continue;
      }
      for (const name of ["before", "after", "weights", "quantized", "bits", "nominal", "layers", "nodes"])
        sums[name] += child.total[name];
      if (child.total.error != null) sums.error = Math.min(sums.error ?? Infinity, child.total.error);
    }
    return sums;
  }

  const bitsOf = (item) => {
    if (!item.isBox) return item.data.bits ?? null;
    return item.total.quantized ? item.total.nominal / item.total.quantized : item.total.weights ? FLOAT : null;
  };

  const isHidden = (model, item) => !item.isBox && model.hidden.has(item.data.role);
  const shownChildren = (model, box) => box.children.filter((child) => !isHidden(model, child));

  function name(item) {
    if (!item.isBox) return item.data.label;
    let above = item.parent;
    while (above && above.data.group) above = above.parent;
    const own = item.data.name || item.data.path;
    return /^\d+(#|$)/.test(own) && above && above.data.path ? `${above.data.name}.${own}` : own;
  }

  // What stands for an item when some of the boxes around it are closed.
  function shown(item) {
    let found = item;
    for (let box = item.parent; box; box = box.parent) if (!box.expanded) found = box;
    return found;
  }

  function reveal(item) {
    let changed = false;
    for (let box = item.parent; box; box = box.parent) {
      changed = changed || !box.expanded;
      box.expanded = true;
    }
    return changed;
  }

  // Open boxes level by level while the page stays readable.
  function openSome(model, most) {
    model.root.expanded = true;
    let count = shownChildren(model, model.root).length;
    let level = model.root.children.filter((child) => child.isBox);
    while (level.length) {
      const more = level.reduce((all, box) => all + shownChildren(model, box).length, 0);
      if (count + more > most) return;
      level.forEach((box) => {
        box.expanded = box.children.length > 0;
      });
      count += more;
      level = level.flatMap((box) => box.children.filter((child) => child.isBox));
    }
  }

  function find(model, text, most) {
    const words = text.toLowerCase().split(/\s+/).filter(Boolean);
    const found = [];
    if (!words.length) return found;
    for (const each of [...model.boxes, ...model.nodes]) {
      if (each === model.root || isHidden(model, each)) continue;
      each.text = each.text ?? words_of(each);
      if (words.every((word) => each.text.includes(word))) found.push(each);
    }
    const rank = (each) =>
      name(each).toLowerCase() === words[0] ? 0 : name(each).toLowerCase().startsWith(words[0]) ? 1 : 2;
    found.sort((a, b) => rank(a) - rank(b));
    return most ? found.slice(0, most) : found;
  }

  function words_of(item) {
    const data = item.data;
    const specs = item.rows.flatMap((row) => [row.spec, row.site, row.weight ? `${row.weight.bits}-bit` : "float"]);
    return [
      data.id,
      data.label,
      data.name,
      data.path,
      data.kind,
      data.spec,
      data.role,
      data.target,
      (data.shape || []).join("x"),
      ...specs,
    ]
      .filter(Boolean)
      .join(" ")
      .toLowerCase();
  }

  return { read, bitsOf, isHidden, shownChildren, name, shown, reveal, openSome, find };
})();
