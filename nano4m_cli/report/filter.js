"use strict";
// The gallery's filter. Without this script every row is shown and the buttons stay hidden.
(() => {
  const bar = document.querySelector(".filters");
  if (!bar) return;
  const groups = [...document.querySelectorAll(".group")];
  const buttons = [...bar.querySelectorAll("button")];
  const status = bar.querySelector("[role=status]");
  const choose = (wanted) => {
    let shown = 0;
    for (const group of groups) {
      group.hidden = wanted !== "" && group.dataset.title !== wanted;
      if (!group.hidden) shown += group.querySelectorAll(".sample").length;
    }
    for (const button of buttons) {
      button.setAttribute("aria-pressed", String(button.dataset.title === wanted));
    }
    status.textContent = shown === 1 ? "1 sample" : shown + " samples";
  };
  for (const button of buttons) {
    button.addEventListener("click", () => choose(button.dataset.title));
  }
  // One sound at a time.
  document.addEventListener("play", (event) => {
    for (const player of document.querySelectorAll("audio")) {
      if (player !== event.target) player.pause();
    }
  }, true);
  bar.hidden = false;
  choose("");
})();
