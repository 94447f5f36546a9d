"use strict";
// Sorts a table by the column whose heading is pressed, and hides the rows that lack the words of its filter.
for (const section of document.querySelectorAll("section.table")) {
  const body = section.querySelector("tbody");
  const headings = [...section.querySelectorAll("th")];
  const rows = [...body.rows];

  const key = (row, column) => {
    const cell = row.cells[column];
    return cell === undefined ? "" : "value" in cell.dataset ? Number(cell.dataset.value) : cell.textContent;
  };
  const compare = (a, b) => {
    const numbers = (typeof a === "number") + (typeof b === "number");
    // Cells without a number come before those that have one.
    return numbers === 2 ? a - b : numbers === 1 ? (typeof a === "number" ? 1 : -1) : a.localeCompare(b, "en", { numeric: true });
  };

  headings.forEach((heading, column) => {
    heading.querySelector("button").addEventListener("click", () => {
      const descending = heading.getAttribute("aria-sort") === "ascending";
      for (const other of headings) other.setAttribute("aria-sort", "none");
      heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
      const keyed = rows.map((row) => [key(row, column), row]);
      keyed.sort((a, b) => (descending ? compare(b[0], a[0]) : compare(a[0], b[0])));
      body.append(...keyed.map((pair) => pair[1]));
    });
  });

  const filter = section.querySelector(".filter");
  if (filter) {
    filter.hidden = false;
    const texts = rows.map((row) => row.textContent.toLowerCase());
    filter.querySelector("input").addEventListener("input", (event) => {
      const words = event.target.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      rows.forEach((row, number) => {
        row.hidden = !words.every((word) => texts[number].includes(word));
        shown += !row.hidden;
      });
      const all = rows.length === shown ? "" : ` of ${rows.length.toLocaleString("en")}`;
      filter.querySelector("output").textContent = `${shown.toLocaleString("en")}${all} rows`;
    });
  }
}
