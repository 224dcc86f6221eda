// The page can be read without this. It adds: tables sorted by a click on their head.
"use strict";
const key = (row, column) => row.cells[column].dataset.sort ?? row.cells[column].textContent.trim();
const compare = (a, b) => (a === "" || b === "" || isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b);

const sortable = (table) => {
  const heads = [...table.tHead.rows[0].cells];
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

document.querySelectorAll("table.sortable").forEach(sortable);
