"use strict";
// Theme switch, run switches, and one tooltip for tokens and points. The page reads the same without any of it.
(() => {
  const root = document.documentElement;
  const tip = document.getElementById("tip");
  const store = (write) => {
    try {
      if (write) localStorage.setItem("eopd-theme", write);
      return localStorage.getItem("eopd-theme");
    } catch {
      return null; // a page opened from a file may have no storage
    }
  };

  const saved = store();
  if (saved === "light" || saved === "dark") root.dataset.theme = saved;
  document.getElementById("theme").addEventListener("click", () => {
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
    store(root.dataset.theme);
  });

  for (const button of document.querySelectorAll(".key button")) {
    button.addEventListener("click", () => {
      const shown = button.getAttribute("aria-pressed") === "true";
      button.setAttribute("aria-pressed", String(!shown));
      for (const part of document.querySelectorAll(`.plots .r${button.dataset.run}, .card.r${button.dataset.run}`))
        part.classList.toggle("off", shown);
    });
  }

  const figure = (text) => (text === "-" ? "not measured" : text === "?" ? "not finite" : text.replace("-", "−"));
  const said = (target) => {
    if (target.dataset.t) return target.dataset.t;
    const [entropy, logprob] = target.dataset.e.split(" ");
    return `teacher entropy ${figure(entropy)} · student log-prob ${figure(logprob)}`;
  };
  let marked = null;
  const hide = () => {
    tip.hidden = true;
    if (marked) marked.classList.remove("on");
    marked = null;
  };
  const show = (target) => {
    hide();
    marked = target;
    target.classList.add("on");
    tip.textContent = said(target);
    tip.hidden = false;
    const at = target.getClientRects()[0] || target.getBoundingClientRect();
    const room = root.clientWidth - tip.offsetWidth - 8;
    tip.style.left = `${Math.max(8, Math.min(at.left + at.width / 2 - tip.offsetWidth / 2, room))}px`;
    tip.style.top = `${at.top > tip.offsetHeight + 14 ? at.top - tip.offsetHeight - 8 : at.bottom + 8}px`;
  };
  const target = (event) => (event.target.closest ? event.target.closest("[data-e], [data-t]") : null);
  document.addEventListener("pointerover", (event) => (target(event) ? show(target(event)) : hide()));
  document.addEventListener("click", (event) => target(event) && show(target(event)));
  for (const moved of ["scroll", "wheel", "touchmove"]) document.addEventListener(moved, hide, { passive: true });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") return hide();
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    const box = document.activeElement;
    if (!step || !box || !box.classList.contains("tokens")) return;
    event.preventDefault();
    const inside = marked && marked.parentElement === box;
    const next = !inside
      ? box.firstElementChild
      : step > 0 ? marked.nextElementSibling : marked.previousElementSibling;
    if (!next) return;
    if (box.scrollHeight > box.clientHeight) box.scrollTop += next.getBoundingClientRect().top - box.getBoundingClientRect().top - box.clientHeight / 2;
    show(next);
  });
})();
