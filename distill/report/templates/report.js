"use strict";
// Tables sort by the column that is clicked; what is empty stays last.
for (const button of document.querySelectorAll("table.lines thead button")) {
  button.addEventListener("click", () => {
    const head = button.closest("th"), body = head.closest("table").tBodies[0];
    const down = head.getAttribute("aria-sort") ? head.getAttribute("aria-sort") === "ascending" : head.classList.contains("number");
    for (const other of head.parentNode.children) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const keyOf = row => row.children[head.cellIndex].dataset.key;
    const rows = [...body.rows].map(row => [keyOf(row), row]);
    const numbers = rows.every(([key]) => key === "" || !isNaN(key));
    rows.sort(([a], [b]) => {
      if (a === "" || b === "") return (a === "") - (b === "");
      const order = numbers ? a - b : a.localeCompare(b, undefined, { numeric: true });
      return down ? -order : order;
    });
    body.append(...rows.map(([, row]) => row));
  });
}
// The mark nearest to the pointer says what it is.
const tip = document.getElementById("tip");
for (const svg of document.querySelectorAll("figure svg")) {
  const marks = [...svg.querySelectorAll("[data-tip]")];
  if (!marks.length) continue;
  const show = event => {
    let nearest = null, least = 28;
    for (const mark of marks) {
      const box = mark.getBoundingClientRect();
      const x = Math.max(box.left - event.clientX, 0, event.clientX - box.right);
      const y = Math.max(box.top - event.clientY, 0, event.clientY - box.bottom);
      const distance = Math.hypot(x, y) + 1e-3 * Math.hypot(box.left + box.width / 2 - event.clientX, box.top + box.height / 2 - event.clientY);
      if (distance < least) [nearest, least] = [mark, distance];
    }
    tip.hidden = !nearest;
    if (!nearest) return;
    tip.textContent = nearest.dataset.tip;
    const box = nearest.getBoundingClientRect();
    tip.style.left = Math.max(4, Math.min(box.left + box.width / 2 + 10, innerWidth - tip.offsetWidth - 4)) + "px";
    tip.style.top = Math.max(4, box.top - tip.offsetHeight - 8) + "px";
  };
  svg.addEventListener("pointermove", show);
  svg.addEventListener("pointerdown", show);
  svg.addEventListener("pointerleave", () => { tip.hidden = true; });
}
addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });
// Pictures by group and class.
for (const wall of document.querySelectorAll(".wall")) {
  const choices = [...wall.querySelectorAll("select")], pictures = [...wall.querySelectorAll(".picture")];
  const more = wall.querySelector(".more");
  let all = false;
  const filter = () => {
    const fit = pictures.filter(picture => choices.every(choice => !choice.value || picture.dataset[choice.dataset.filter] === choice.value));
    const shown = all ? fit : fit.slice(0, wall.dataset.first);
    for (const picture of pictures) picture.hidden = !shown.includes(picture);
    wall.querySelector("output").textContent = shown.length < fit.length ? `${shown.length} of ${fit.length} pictures` : `${fit.length} pictures`;
    more.hidden = shown.length === fit.length;
  };
  for (const choice of choices) choice.addEventListener("change", filter);
  more.addEventListener("click", () => { all = true; filter(); });
  filter();
}
// A table that is wider than its place says so, and can be scrolled by the keyboard.
const widths = new ResizeObserver(entries => {
  for (const { target } of entries) {
    const place = target.closest(".scroll"), wide = place.scrollWidth > place.clientWidth + 1;
    place.previousElementSibling.hidden = !wide;
    if (wide) place.tabIndex = 0;
    else place.removeAttribute("tabindex");
  }
});
for (const place of document.querySelectorAll(".scroll")) {
  widths.observe(place);
  widths.observe(place.firstElementChild);
}
// A link to a section that is folded opens it.
const reveal = () => {
  const details = document.getElementById(location.hash.slice(1))?.querySelector("details.section");
  if (details) details.open = true;
};
addEventListener("hashchange", reveal);
for (const link of document.querySelectorAll("nav a")) link.addEventListener("click", () => setTimeout(reveal));
reveal();
// What is folded is printed all the same.
let folded = [];
addEventListener("beforeprint", () => {
  folded = [...document.querySelectorAll("details:not([open])")];
  for (const details of folded) details.open = true;
});
addEventListener("afterprint", () => { for (const details of folded) details.open = false; });
