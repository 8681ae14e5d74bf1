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
  const filter = () => {
    for (const picture of pictures) {
      picture.hidden = choices.some(choice => choice.value && picture.dataset[choice.dataset.filter] !== choice.value);
    }
    wall.querySelector("output").textContent = `${pictures.filter(picture => !picture.hidden).length} pictures`;
  };
  for (const choice of choices) choice.addEventListener("change", filter);
  filter();
}
// What is folded is printed all the same.
addEventListener("beforeprint", () => { for (const details of document.querySelectorAll("details")) details.open = true; });
