"use strict";
// A weight's values before (above the line) and after (below it), and where the levels lie.
const Histogram = (() => {
  const { element, number } = Format;
  const W = 300,
    H = 150,
    MID = 78,
    TOP = 6,
    LOW = H - 18;

  function draw(data, row) {
    const { low, high, before, after, levels } = data;
    const x = (value) => ((value - low) / (high - low)) * W;
    const shapes = [];
    if (before) shapes.push(bars(before, "before", MID, -(MID - TOP)));
    if (after) shapes.push(bars(after, "after", MID, LOW - MID));
    for (const level of levels) {
      const wide = Math.max(1, x(level.high) - x(level.low));
      shapes.push(element("svg:rect", { class: "spread", x: x(level.low), y: MID - 4, width: wide, height: 8, rx: 2 }));
      shapes.push(element("svg:line", { class: "level", x1: x(level.middle), x2: x(level.middle), y1: TOP, y2: LOW }));
    }
    const zero = low < 0 && high > 0 ? [element("svg:text", { x: x(0), y: H - 4, "text-anchor": "middle" }, "0")] : [];
    const text = [
      before && "above: before",
      after && "below: after",
      levels.length && `${levels.length} levels, their spread over groups`,
    ]
      .filter(Boolean)
      .join(" · ");
    return element(
      "figure",
      { class: "histogram" },
      element(
        "svg:svg",
        { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": `values of ${row.site}` },
        shapes,
        element("svg:line", { class: "axis", x1: 0, x2: W, y1: MID, y2: MID }),
        element("svg:text", { x: 0, y: H - 4 }, number(low)),
        element("svg:text", { x: W, y: H - 4, "text-anchor": "end" }, number(high)),
        zero,
      ),
      element("figcaption", {}, text),
    );
  }

  // Few levels hold many values each: a square root keeps the small counts visible.
  function bars(counts, kind, base, reach) {
    const most = Math.sqrt(Math.max(...counts, 1));
    const wide = W / counts.length;
    const path = counts.map((count, i) => {
      const tall = (Math.sqrt(count) / most) * reach;
      return count
        ? `M${(i * wide).toFixed(2)} ${base}v${tall.toFixed(2)}h${(wide - 0.6).toFixed(2)}v${(-tall).toFixed(2)}z`
        : "";
    });
    return element("svg:path", { class: kind, d: path.join("") });
  }

  return { draw };
})();
