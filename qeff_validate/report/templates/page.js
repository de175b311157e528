"use strict";
(function () {
  const form = document.getElementById("filters");
  const results = Array.from(document.querySelectorAll("details.result"));
  const links = new Map();
  for (const link of document.querySelectorAll("a[data-result]")) links.set("r" + link.dataset.result, link);
  const rows = Array.from(document.querySelectorAll("#overview tbody tr"));

  function checked(name) {
    return new Set(Array.from(form.querySelectorAll(`input[name=${name}]:checked`), (box) => box.value));
  }

  function filter() {
    const words = checked("word"), runtimes = checked("runtime");
    const parts = form.elements.text.value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    for (const result of results) {
      const { word, runtime, text } = result.dataset;
      const shown = (!words.size || words.has(word)) && (!runtimes.size || runtimes.has(runtime)) &&
        parts.every((part) => text.includes(part));
      count += shown;
      result.hidden = !shown;
      const link = links.get(result.id);
      if (link) link.hidden = !shown;
    }
    for (const row of rows) row.hidden = !row.querySelector("a[data-result]:not([hidden])");
    document.getElementById("shown").textContent = `${count} of ${results.length} results`;
    document.getElementById("none").hidden = count > 0;
  }

  function openTarget() {
    const target = /^#r\d+$/.test(location.hash) ? document.getElementById(location.hash.slice(1)) : null;
    if (!target) return;
    target.open = true;
    target.querySelector("summary").focus({ preventScroll: true });
    target.scrollIntoView();
  }

  function move(step) {
    const shown = results.filter((result) => !result.hidden);
    const at = shown.findIndex((result) => result.contains(document.activeElement));
    const next = shown[at < 0 ? (step > 0 ? 0 : shown.length - 1) : Math.min(Math.max(at + step, 0), shown.length - 1)];
    if (!next) return;
    next.querySelector("summary").focus({ preventScroll: true });
    next.scrollIntoView({ block: "nearest" });
  }

  function toggleAll() {
    const shown = results.filter((result) => !result.hidden);
    const open = !shown.every((result) => result.open);
    for (const result of shown) result.open = open;
  }

  if (form) {
    form.addEventListener("input", filter);
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("reset", () => setTimeout(filter));
    window.addEventListener("hashchange", openTarget);
    for (const link of links.values()) {
      link.addEventListener("click", () => { if (link.hash === location.hash) openTarget(); });
    }
    document.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      if (event.key === "Escape") { form.reset(); return; }
      if (event.target.matches("input[type=search]")) return;
      const action = { "/": () => form.elements.text.focus(), j: () => move(1), k: () => move(-1), o: toggleAll }[event.key];
      if (action) { event.preventDefault(); action(); }
    });
    filter();  // a browser may keep what was ticked before a reload
    openTarget();
  }

  // what did not pass is printed with its details, and so is what is open
  let opened = [];
  window.addEventListener("beforeprint", () => {
    opened = results.filter((result) => !result.hidden && !result.open && !result.classList.contains("good") && !result.classList.contains("none"));
    for (const result of opened) result.open = true;
  });
  window.addEventListener("afterprint", () => { for (const result of opened) result.open = false; });

  function textOf(texts, row) {
    let start = 0;
    for (const [text, count] of texts) {
      if (row < start + count) return count === 1 ? text : `${text} +${row - start}`;
      start += count;
    }
    return "";
  }

  function show(strip, place) {
    const values = JSON.parse(strip.dataset.values), each = Number(strip.dataset.each), bound = Number(strip.dataset.bound);
    const at = Math.min(Math.max(place, 0), values.length - 1), value = values[at];
    const texts = JSON.parse(strip.closest(".strips").dataset.texts);
    const text = each === 1 ? textOf(texts, at) : "";
    const name = each === 1 ? `row ${at}` : `rows ${at * each}–${at * each + each - 1}`;
    const error = value === null ? "no error: not finite, or without a token" :
      value.toExponential(2) + (bound > 0 ? `, ${(value / bound).toPrecision(2)} × bound` : "");
    const said = `${name}: ${error}${text ? ` \u2068“${text}”\u2069` : ""}`;
    strip.setAttribute("aria-valuenow", at);
    strip.setAttribute("aria-valuetext", said);
    strip.querySelector(".cursor").setAttribute("x", at);
    strip.closest(".strips").querySelector(".readout").textContent = said;
  }

  for (const strip of document.querySelectorAll(".strip")) {
    const count = Number(strip.getAttribute("aria-valuemax")) + 1;
    strip.addEventListener("pointermove", (event) => {
      const box = strip.getBoundingClientRect();
      show(strip, Math.floor((event.clientX - box.left) / box.width * count));
    });
    strip.addEventListener("focus", () => show(strip, Number(strip.getAttribute("aria-valuenow"))));
    strip.addEventListener("keydown", (event) => {
      const at = Number(strip.getAttribute("aria-valuenow"));
      const next = { ArrowLeft: at - 1, ArrowDown: at - 1, ArrowRight: at + 1, ArrowUp: at + 1, Home: 0, End: count - 1, PageUp: at + 10, PageDown: at - 10 }[event.key];
      if (next === undefined) return;
      event.preventDefault();
      show(strip, next);
    });
  }
})();
