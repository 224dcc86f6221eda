// The page can be read without this. It adds: numbers of a chart's marks on hovering and by arrow keys, tables sorted
// by a click on their head, and conversions that are switched off in the overview.
"use strict";
(() => {
  const charts = JSON.parse(document.getElementById("data").textContent);
  const tip = document.getElementById("tip");
  const off = new Set(); // run ids of conversions that are switched off

  const hide = () => {
    tip.hidden = true;
    document.querySelectorAll(".ring").forEach((ring) => ring.remove());
  };

  const show = (svg, mark) => {
    hide();
    const ring = document.createElementNS("http://www.w3.org/2000/svg", "circle");
    for (const [name, value] of [["class", "ring"], ["cx", mark.x], ["cy", mark.y], ["r", 8]]) ring.setAttribute(name, value);
    svg.append(ring);
    tip.textContent = mark.text;
    tip.hidden = false;
    const box = ring.getBoundingClientRect();
    const left = box.left + box.width / 2 - tip.offsetWidth / 2;
    const above = box.top - tip.offsetHeight - 4;
    tip.style.left = `${Math.max(4, Math.min(left, document.documentElement.clientWidth - tip.offsetWidth - 4))}px`;
    tip.style.top = `${above >= 4 ? above : box.bottom + 4}px`;
  };

  // "{}" in a text stands for a value: foreign names are values, and all of it becomes text, never markup.
  const fill = (text, values) => text.split("{}").map((part, i) => part + (values[i] ?? "")).join("");

  const chart = (figure) => {
    const svg = figure.querySelector("svg");
    let all; // made at the first use: a page may have hundreds of charts
    const marks = () => {
      all ??= charts[figure.dataset.chart].flatMap(({ t, r, m }) =>
        m.map(([x, y, ...values]) => ({ x, y, run: r, text: fill(t, values) })));
      return all.filter((mark) => !off.has(mark.run));
    };
    const nearest = (found, distance) =>
      found.reduce((best, mark) => (best && distance(best) <= distance(mark) ? best : mark), undefined);
    let current;
    const choose = (mark) => { current = mark; show(svg, mark); };
    svg.tabIndex = 0;
    const point = (event) => {
      const box = svg.getBoundingClientRect();
      const scale = svg.viewBox.baseVal.width / box.width;
      const [x, y] = [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
      const distance = (mark) => Math.hypot(mark.x - x, mark.y - y);
      const mark = nearest(marks(), distance);
      if (mark && distance(mark) < 40) choose(mark); else hide();
    };
    svg.addEventListener("pointermove", point);
    svg.addEventListener("pointerdown", point);
    svg.addEventListener("pointerleave", hide);
    svg.addEventListener("blur", hide);
    svg.addEventListener("focus", () => {
      const found = marks();
      if (svg.matches(":focus-visible") && found.length) choose(found.includes(current) ? current : found[0]);
    });
    svg.addEventListener("keydown", (event) => {
      const found = marks();
      const [dx, dy] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key] ?? [0, 0];
      if ((!dx && !dy) || !found.length) return;
      event.preventDefault();
      const place = found.indexOf(current);
      // Left and right go through all marks one by one, up and down to the nearest one in that direction.
      const next = dx ? found[(place + dx + found.length) % found.length] : nearest(
        found.filter((mark) => (mark.y - current.y) * dy > 0.5),
        (mark) => Math.abs(mark.y - current.y) + 3 * Math.abs(mark.x - current.x));
      if (next) choose(next);
    });
  };

  const sortable = (table) => {
    const heads = [...table.tHead.rows[0].cells];
    const key = (row, column) => row.cells[column].dataset.sort ?? row.cells[column].textContent.trim();
    const compare = (a, b) => (a === "" || b === "" || isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b);
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const order = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", order > 0 ? "ascending" : "descending");
        const rows = [...table.tBodies[0].rows].map((row) => [key(row, column), row]);
        // What is missing stays at the end in both directions.
        rows.sort(([a], [b]) => (a === "") - (b === "") || order * compare(a, b));
        table.tBodies[0].append(...rows.map(([, row]) => row));
      });
    });
  };

  // Switching conversions off: their marks and names go, and the front is drawn anew through those that are left.
  const redraw = () => {
    document.querySelectorAll("#overview [data-run]").forEach((part) => part.classList.toggle("off", off.has(part.dataset.run)));
    const path = document.querySelector(".front");
    if (!path) return;
    const marks = charts[path.closest("[data-chart]").dataset.chart].filter(({ r }) => !off.has(r)).map(({ m }) => m[0]);
    let best = -Infinity, line = ""; // downwards is better
    for (const [x, y] of marks.sort((a, b) => a[0] - b[0] || b[1] - a[1])) {
      if (y > best) [best, line] = [y, line ? `${line}H${x}V${y}` : `M${x} ${y}`];
    }
    path.setAttribute("d", line);
  };

  const checkbox = (label, onchange) => {
    const box = document.createElement("input");
    Object.assign(box, { type: "checkbox", checked: true, onchange });
    box.setAttribute("aria-label", label);
    return box;
  };

  document.querySelectorAll("[data-chart]").forEach(chart);
  document.querySelectorAll("table.sortable").forEach(sortable);
  const rows = [...document.querySelectorAll("#overview tr[data-run]")];
  const boxes = rows.map((row) => {
    const box = checkbox(`Show ${row.dataset.name} in the charts`, () => {
      off[box.checked ? "delete" : "add"](row.dataset.run);
      redraw();
    });
    row.cells[0].prepend(box);
    return box;
  });
  if (rows.length > 1) {
    const all = checkbox("Show all conversions in the charts", () => {
      boxes.forEach((box) => { box.checked = all.checked; });
      rows.forEach((row) => off[all.checked ? "delete" : "add"](row.dataset.run));
      redraw();
    });
    rows[0].closest("table").tHead.rows[0].cells[0].prepend(all);
  }
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });
  document.addEventListener("scroll", hide, { passive: true, capture: true });
})();
