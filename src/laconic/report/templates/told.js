// What a mark says, beside the pointer; without a script nothing is lost but this.
const told = document.createElement("div");
told.className = "tip";
told.hidden = true;
document.body.append(told);
let teller = null;
const show = (mark) => {
  teller = mark;
  told.textContent = mark.dataset.told;
  told.hidden = false;
  const box = mark.getBoundingClientRect(), width = told.offsetWidth;
  told.style.left = Math.max(8, Math.min(innerWidth - width - 8, box.left + box.width / 2 - width / 2)) + "px";
  told.style.top = Math.max(8, box.top - told.offsetHeight - 8) + "px";
};
const hide = (mark) => {
  if (mark === teller) told.hidden = true;
};
for (const mark of document.querySelectorAll(".told")) {
  mark.addEventListener("pointerenter", () => show(mark));
  mark.addEventListener("focus", () => show(mark));
  mark.addEventListener("pointerleave", () => hide(mark));
  mark.addEventListener("blur", () => hide(mark));
}
// Focus brings a mark into view, and that scrolls: its tip goes along as long as it can be seen.
addEventListener("scroll", () => {
  if (told.hidden) return;
  const { top, bottom } = teller.getBoundingClientRect();
  if (teller === document.activeElement && bottom > 0 && top < innerHeight) show(teller);
  else told.hidden = true;
}, true);
// Paper has no way to open what is closed.
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((d) => (d.open = true)));
