"use strict";
// Numbers and elements for people. Text goes into the page as text, never as markup.
const Format = (() => {
  const COLORS = [
    [1, "#e5484d"],
    [1.58, "#f0763a"],
    [2, "#f2a31b"],
    [3, "#b3b324"],
    [4, "#46a758"],
    [5, "#2aa198"],
    [6, "#2196b4"],
    [7, "#3a83e0"],
    [8, "#5b66e8"],
  ];
  const FLOAT = "#8b95a5";

  function bits(value) {
    if (value == null || value > 8) return FLOAT;
    return COLORS.reduce((best, each) => (Math.abs(each[0] - value) < Math.abs(best[0] - value) ? each : best))[1];
  }

  function bytes(count) {
    if (count == null) return "";
    if (count < 1024) return `${count} B`;
    const units = ["KB", "MB", "GB", "TB"];
    let value = count / 1024,
      unit = 0;
    while (value >= 1000 && unit < units.length - 1) {
      value /= 1024;
      unit += 1;
    }
    return `${value < 10 ? value.toFixed(1) : Math.round(value).toLocaleString("en")} ${units[unit]}`;
  }

  function element(tag, attributes = {}, ...children) {
    const made = tag.startsWith("svg:")
      ? document.createElementNS("http://www.w3.org/2000/svg", tag.slice(4))
      : document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (value == null || value === false) continue;
      if (name === "on") for (const [event, handler] of Object.entries(value)) made.addEventListener(event, handler);
      else if (name === "css")
        for (const [property, text] of Object.entries(value)) made.style.setProperty(property, text);
      else made.setAttribute(name, value === true ? "" : value);
    }
    made.append(...children.flat().filter((child) => child != null && child !== false));
    return made;
  }

  const count = (value) => value.toLocaleString("en");
  const decibels = (row) =>
    row.exact ? "exact" : row.error_db == null ? "not measured" : `${row.error_db.toFixed(1)} dB`;
  const bitsText = (value) => (value == null ? "" : value > 8 ? "float" : `${+value.toFixed(2)} bit`);
  const number = (value) =>
    Math.abs(value) >= 1000 || (Math.abs(value) < 0.001 && value !== 0)
      ? value.toExponential(1)
      : `${+value.toPrecision(3)}`;

  return { bits, bytes, element, count, decibels, bitsText, number, COLORS, FLOAT };
})();
