"use strict";
// What the page does without its plots: sorting, choosing methods, copying.
const page = {
  data: JSON.parse(document.getElementById("data").textContent),
  shown: [],
  draw: () => {},
};
page.shown = page.data.methods.map(() => true);

function sortTable(table, column, direction) {
  const rows = [...table.tBodies[0].rows];
  const key = (row) => {
    const cell = row.cells[column];
    if (cell.tagName === "TH") return cell.textContent.trim();
    return cell.dataset.value === "" ? null : Number(cell.dataset.value);
  };
  const order = (a, b) => {
    const [left, right] = [key(a), key(b)];
    // What was not measured stands last in either direction.
    if (left === null || right === null) return (left === null) - (right === null);
    const rising = typeof left === "string" ? left.localeCompare(right) : left - right;
    return direction === "ascending" ? rising : -rising;
  };
  rows.sort(order).forEach((row) => table.tBodies[0].append(row));
}

for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[table.tHead.rows.length - 1].cells];
  heads.forEach((head, column) => {
    const button = head.querySelector("button");
    button.addEventListener("click", () => {
      const first = button.dataset.sort === "falling" ? "descending" : "ascending";
      const other = first === "ascending" ? "descending" : "ascending";
      const direction = head.getAttribute("aria-sort") === first ? other : first;
      heads.forEach((each) => each.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", direction);
      sortTable(table, column, direction);
    });
  });
}

function show(shown) {
  page.shown = shown;
  for (const button of document.querySelectorAll("[data-toggle]")) {
    button.setAttribute("aria-pressed", String(shown[button.dataset.toggle]));
  }
  for (const row of document.querySelectorAll("tr[data-method]")) {
    row.classList.toggle("off", !shown[row.dataset.method]);
  }
  page.draw();
}

document.addEventListener("click", (event) => {
  const toggle = event.target.closest("[data-toggle]");
  if (toggle) {
    show(page.shown.map((on, index) => (index === Number(toggle.dataset.toggle) ? !on : on)));
  }
  const all = event.target.closest("[data-all]");
  if (all) show(page.shown.map(() => all.dataset.all === "show"));
  const copy = event.target.closest(".copy");
  if (copy) copyText(copy);
});

function copyText(button) {
  const code = button.parentElement.querySelector("code");
  const done = () => {
    button.textContent = "Copied";
    setTimeout(() => (button.textContent = "Copy"), 1500);
  };
  // A page opened from a file has no clipboard in some browsers; then the text is selected.
  const select = () => getSelection().selectAllChildren(code);
  if (navigator.clipboard) navigator.clipboard.writeText(code.textContent).then(done, select);
  else select();
}

// Sections that print closed would be lost on paper.
let opened = [];
addEventListener("beforeprint", () => {
  opened = [...document.querySelectorAll("details:not([open])")];
  opened.forEach((each) => (each.open = true));
});
addEventListener("afterprint", () => opened.forEach((each) => (each.open = false)));

performance.mark("sortable");

// The plotting library is large. The page is shown, and its tables sort, before it is read.
const scripts = [...document.querySelectorAll('script[type="text/plain"]')];
requestAnimationFrame(() =>
  setTimeout(() => {
    for (const source of scripts) {
      const script = document.createElement("script");
      script.textContent = source.textContent;
      source.replaceWith(script);
    }
  })
);
