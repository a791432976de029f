// Sorting the table of prompts, which the page can do without.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button"; button.append(...head.childNodes); head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const sign = down ? -1 : 1, key = row => row.cells[column];
      const rows = [...body.rows].sort((a, b) => {
        const [x, y] = [key(a), key(b)], [p, q] = [x.dataset.order, y.dataset.order];
        if (p !== undefined && q !== undefined) return sign * (p - q);
        if (p !== undefined || q !== undefined) return p === undefined ? 1 : -1;
        return sign * x.textContent.localeCompare(y.textContent);
      });
      body.append(...rows);
    });
  });
}
// A link to a card inside a closed group opens it; printing opens all.
const reveal = () => {
  const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  for (let at = target; at; at = at.parentElement) if (at.tagName === "DETAILS") at.open = true;
  if (target) target.scrollIntoView();
};
addEventListener("hashchange", reveal);
reveal();
addEventListener("beforeprint", () => document.querySelectorAll("details.group").forEach(one => { one.open = true; }));
