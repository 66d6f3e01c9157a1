"use strict";
// One tooltip for tokens, by pointer, tap and arrow keys. The page reads the same without it.
(() => {
  const tip = document.getElementById("tip");
  let marked = null;
  const hide = () => {
    tip.hidden = true;
    if (marked) marked.classList.remove("on");
    marked = null;
  };
  const show = (token) => {
    hide();
    marked = token;
    token.classList.add("on");
    const [entropy, logprob] = token.dataset.e.split(" ");
    tip.textContent = `teacher entropy ${entropy} · student log-prob ${logprob}`;
    tip.hidden = false;
    const at = token.getClientRects()[0] || token.getBoundingClientRect();
    const room = document.documentElement.clientWidth - tip.offsetWidth - 8;
    tip.style.left = `${Math.max(8, Math.min(at.left + at.width / 2 - tip.offsetWidth / 2, room))}px`;
    tip.style.top = `${at.top > tip.offsetHeight + 14 ? at.top - tip.offsetHeight - 8 : at.bottom + 8}px`;
  };
  const token = (event) => event.target.closest?.("[data-e]");
  document.addEventListener("pointerover", (event) => (token(event) ? show(token(event)) : hide()));
  document.addEventListener("click", (event) => token(event) && show(token(event)));
  for (const moved of ["scroll", "wheel", "touchmove"]) document.addEventListener(moved, hide, { passive: true });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") return hide();
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    const box = document.activeElement;
    if (!step || !box?.classList.contains("tokens")) return;
    event.preventDefault();
    const inside = marked?.parentElement === box;
    const next = !inside ? box.firstElementChild : step > 0 ? marked.nextElementSibling : marked.previousElementSibling;
    if (!next) return;
    box.scrollTop += next.getBoundingClientRect().top - box.getBoundingClientRect().top - box.clientHeight / 2;
    show(next);
  });
})();
