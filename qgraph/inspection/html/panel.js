"use strict";
// What is known of the thing picked: the model, a box, or a node with its weights.
const Panel = (() => {
  const { element, bytes, count } = Format;
  let container, model, pick;

  function start(theContainer, theModel, onPick) {
    [container, model, pick] = [theContainer, theModel, onPick];
  }

  function show(item, row) {
    const parts = row
      ? [...ofBox(item, false), card(row)]
      : !item || item === model.root
        ? ofModel()
        : item.isBox
          ? ofBox(item, true)
          : ofNode(item);
    container.replaceChildren(...parts.filter(Boolean));
    container.scrollTop = 0;
  }

  const heading = (text, sub) =>
    element("header", {}, element("h2", {}, text), sub && element("p", { class: "sub" }, sub));
  const facts = (pairs) =>
    element(
      "dl",
      {},
      pairs
        .filter((pair) => pair && pair[1] != null && pair[1] !== "")
        .flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)]),
    );
  const go = (item, text) =>
    element("button", { class: "link", on: { click: () => pick(item) } }, text || Model.name(item));

  function ofModel() {
    const { totals, coverage, kind, title, remarks, file_bytes } = model.data;
    const worst = model.data.layers
      .filter((row) => row.error_db != null)
      .sort((a, b) => a.error_db - b.error_db)
      .slice(0, 6);
    const heavy = model.data.layers
      .filter((row) => row.bytes_after)
      .sort((a, b) => b.bytes_after - a.bytes_after)
      .slice(0, 6);
    return [
      heading(Model.name(model.root), title),
      compare(totals.model_bytes_before, totals.model_bytes_after, "the whole model"),
      facts(
        [
          ["layers", `${count(totals.layers_quantized)} of ${count(totals.layers)} quantized`],
          ["weights", `${count(totals.weights)}, ${count(totals.weights_quantized)} quantized`],
          ["bits a weight", totals.bits_per_weight == null ? null : totals.bits_per_weight.toFixed(2)],
          ["left float", bytes(totals.float_bytes)],
          ["file", file_bytes == null ? null : bytes(file_bytes)],
          kind === "prepared" && ["modules", `${count(coverage.captured)} of ${count(coverage.modules)} captured`],
        ].filter(Boolean),
      ),
      ...remarks.map((text) => element("p", { class: "note" }, text)),
      model.data.flow
        ? null
        : element(
            "p",
            { class: "note" },
            "No data flow: nothing of this model is captured. Prepare it with example inputs to see it.",
          ),
      coverage.opaque.length ? section("Stays Python", opaque(coverage.opaque)) : null,
      worst.length
        ? section(
            "Largest error",
            worst.map((row) => layerLine(row, Format.decibels(row))),
          )
        : null,
      heavy.length
        ? section(
            "Most bytes",
            heavy.map((row) => layerLine(row, bytes(row.bytes_after))),
          )
        : null,
    ];
  }

  // Once for eval and train.
  const opaque = (modules) =>
    [...new Set(modules.map((each) => `${each.path || "the model"}: ${each.reason}`))].map((text) =>
      element("p", { class: "note warn" }, text),
    );

  const section = (title, children) => element("section", {}, element("h3", {}, title), ...children);

  function layerLine(row, value) {
    const swatch = element("span", {
      class: "dot",
      css: { background: Format.bits(row.weight ? row.weight.bits : null) },
    });
    const target = nodeOf(row) || model.boxes[row.box];
    return element(
      "button",
      { class: "line", on: { click: () => pick(target, target.isBox ? row : null) } },
      swatch,
      element("span", { class: "name" }, row.site),
      element("b", {}, value),
    );
  }

  const nodeOf = (row) =>
    model.nodes.find((node) => node.data.role === "site" && node.rows.includes(row)) ||
    model.nodes.find((node) => node.rows.includes(row) && !Model.isHidden(model, node));

  function ofBox(box, open) {
    const { total, data } = box;
    const rows = [];
    const collect = (each) => {
      if (rows.length < 60) {
        rows.push(...each.rows);
        each.children.filter((child) => child.isBox).forEach(collect);
      }
    };
    if (open) collect(box);
    const text = data.code == null ? null : model.data.code[data.code];
    return [
      heading(Model.name(box), data.kind),
      element("p", { class: "path" }, data.path),
      open && box.children.length
        ? element(
            "button",
            { class: "action", on: { click: () => Graph.toggle(box) } },
            box.expanded ? "Close (Enter)" : "Open (Enter)",
          )
        : null,
      total.before ? compare(total.before, total.after, "this module") : null,
      facts([
        ["weights", total.weights ? count(total.weights) : null],
        ["bits a weight", total.weights ? (total.bits / total.weights).toFixed(2) : null],
        ["worst error", total.error == null ? null : `${total.error.toFixed(1)} dB`],
        ["operations", total.nodes ? count(total.nodes) : null],
      ]),
      data.opaque ? element("p", { class: "note warn" }, `Stays Python: ${data.opaque}`) : null,
      data.where ? source(data.where) : null,
      open && rows.length === 1 ? card(rows[0]) : null,
      open && rows.length > 1
        ? section(
            "Weights",
            rows.slice(0, 60).map((row) => layerLine(row, row.reason == null ? row.spec : "float")),
          )
        : null,
      text
        ? element("details", { open: text.length < 1500 }, element("summary", {}, "Rewritten code"), code(text))
        : null,
    ];
  }

  // Lines that qgraph put in stand out.
  const code = (text) =>
    element(
      "pre",
      {},
      text
        .split("\n")
        .map((line) =>
          element(
            "span",
            { class: line.includes("self.qgraph.") ? "ours" : line.trim().startsWith("#") ? "comment" : "" },
            `${line}\n`,
          ),
        ),
    );

  function ofNode(node) {
    const { data } = node;
    const roles = {
      site: "operation with a weight",
      op: "operation",
      weight: "weight quantizer",
      activation: "activation quantizer",
      sparsity: "sparsifier",
      parameter: "parameter",
      buffer: "buffer",
      number: "number",
      input: "input",
      output: "output",
      python: "module that stays Python",
      constant: "constant",
    };
    const visible = (items) => items.filter((each) => !Model.isHidden(model, each));
    return [
      heading(data.label, roles[data.role]),
      element("p", { class: "path" }, data.id),
      facts([
        ["module", go(node.parent, node.parent.data.path || Model.name(node.parent))],
        ["calls", data.target === data.label ? null : data.target],
        ["shape", data.shape ? data.shape.join(" × ") || "scalar" : null],
        ["spec", data.spec],
        ["reads", list(visible(node.inputs))],
        ["read by", list(visible(node.outputs))],
      ]),
      data.where ? source(data.where) : null,
      ...(data.role === "activation" ? [] : node.rows.map((row) => card(row, data.where))),
    ];
  }

  const list = (items) =>
    items.length
      ? element(
          "span",
          { class: "list" },
          items.slice(0, 12).map((each) => go(each, each.data.label || Model.name(each))),
          items.length > 12 ? ` and ${items.length - 12} more` : "",
        )
      : null;

  function source(where) {
    const text = model.data.lines[where];
    return element(
      "figure",
      { class: "source" },
      element("figcaption", {}, where),
      text ? element("code", {}, text) : null,
    );
  }

  function card(row, shown) {
    const pruned = row.sparsity ? `, ${row.sparsity}` : "";
    return element(
      "article",
      { class: "card", css: { "--tint": Format.bits(row.reason == null && row.weight ? row.weight.bits : null) } },
      element("h3", {}, row.site, element("span", { class: "chip" }, row.reason == null ? row.spec : "float")),
      row.tied_to
        ? element("p", { class: "note" }, `stored with ${row.tied_to}`)
        : compare(row.bytes_before, row.bytes_after, null),
      facts([
        ["operation", row.op],
        ["shape", `${row.shape.join(" × ")} ${row.dtype}`],
        ["weight", row.weight ? describe(row.weight) + pruned : pruned.slice(2) || null],
        ["activation", row.activation ? describe(row.activation, row.op) : null],
        ["groups", row.groups],
        ["bits a weight", row.tied_to ? null : row.bits_per_weight.toFixed(2)],
        ["in the file", row.form],
        ["why float", row.reason],
      ]),
      row.error_db != null || row.exact ? gauge(row) : null,
      row.histogram ? Histogram.draw(row.histogram, row) : null,
      row.where && row.where !== shown ? source(row.where) : null,
    );
  }

  function describe(spec, op = "") {
    const token = /^conv/i.test(op) ? "sample" : "token";
    const per = { block: `block of ${spec.group_size}`, token }[spec.granularity] || spec.granularity;
    const scale = `${spec.range === "static" ? "static" : "a"} ${spec.scale === "minmax" ? "" : `${spec.scale} `}scale`;
    return `${spec.bits} bit ${spec.scheme}, ${spec.method}, ${scale} per ${per}`;
  }

  function compare(before, after, what) {
    const ratio = after ? before / after : null;
    const bar = (value, kind) =>
      element(
        "div",
        { class: `bar ${kind}` },
        element("i", { css: { width: `${(100 * value) / Math.max(before, after, 1)}%` } }),
        element("span", {}, bytes(value)),
      );
    return element(
      "div",
      { class: "compare", title: what },
      bar(before, "before"),
      bar(after, "after"),
      ratio && ratio > 1.05 ? element("b", {}, `${ratio.toFixed(1)}× smaller`) : null,
    );
  }

  function gauge(row) {
    const share = row.exact ? 1 : Math.max(0.02, Math.min(1, row.error_db / 50));
    return element(
      "div",
      { class: "gauge", title: "signal to quantization noise of the weight: more is better" },
      element("span", {}, "signal to noise"),
      element("div", {}, element("i", { css: { width: `${100 * share}%` } })),
      element("b", {}, Format.decibels(row)),
    );
  }

  return { start, show };
})();
