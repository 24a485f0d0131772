// Show the text of a mark in a tooltip on hover and on keyboard focus.
const tooltip = document.createElement("div");
tooltip.className = "tip";
tooltip.hidden = true;
document.body.append(tooltip);
let current = null;
const show = (mark) => {
  current = mark;
  tooltip.textContent = mark.dataset.tooltip;
  tooltip.hidden = false;
  const box = mark.getBoundingClientRect(), width = tooltip.offsetWidth;
  tooltip.style.left = Math.max(8, Math.min(innerWidth - width - 8, box.left + box.width / 2 - width / 2)) + "px";
  tooltip.style.top = Math.max(8, box.top - tooltip.offsetHeight - 8) + "px";
};
const hide = (mark) => {
  if (mark === current) tooltip.hidden = true;
};
for (const mark of document.querySelectorAll(".hoverable")) {
  mark.addEventListener("pointerenter", () => show(mark));
  mark.addEventListener("focus", () => show(mark));
  mark.addEventListener("pointerleave", () => hide(mark));
  mark.addEventListener("blur", () => hide(mark));
}
// Focus scrolls a mark into view: its tooltip follows while the mark is visible.
addEventListener("scroll", () => {
  if (tooltip.hidden) return;
  const { top, bottom } = current.getBoundingClientRect();
  if (current === document.activeElement && bottom > 0 && top < innerHeight) show(current);
  else tooltip.hidden = true;
}, true);
// Nothing can be opened on paper, so printing opens every section.
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((d) => (d.open = true)));
