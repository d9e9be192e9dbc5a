"use strict";
// Filters of galleries and tables. Without this script everything is shown and the buttons stay hidden.
(() => {
  const buttons = [...document.querySelectorAll("button[data-filter]")];
  const chosen = {};
  const fits = (name, value) => !chosen[name] || chosen[name] === value;
  const status = document.querySelector(".filters [role=status]");
  const apply = () => {
    let shown = 0;
    for (const group of document.querySelectorAll(".group")) {
      let any = false;
      for (const sample of group.querySelectorAll(".sample")) {
        const items = [...sample.querySelectorAll(".output .item")];
        const wanted = items.filter((item) => fits("to", item.dataset.modality));
        for (const item of sample.querySelectorAll(".output .item, .truth .item")) {
          item.hidden = !fits("to", item.dataset.modality);
        }
        sample.hidden = !fits("rule", sample.dataset.rule) || (items.length > 0 && wanted.length === 0);
        if (!sample.hidden) any = true;
      }
      group.hidden = !any || !fits("from", group.dataset.from);
      if (!group.hidden) shown += group.querySelectorAll(".sample:not([hidden])").length;
    }
    let rows = 0;
    for (const body of document.querySelectorAll("tbody[data-target]")) {
      body.hidden = !fits("from", body.dataset.source) || !fits("to", body.dataset.target) || !fits("probe", body.dataset.probe);
      if (!body.hidden) rows += body.rows.length;
    }
    for (const button of buttons) {
      button.setAttribute("aria-pressed", String((chosen[button.dataset.filter] || "") === button.dataset.value));
    }
    if (status) {
      const count = rows || shown;
      const what = rows ? "figure" : "sample";
      status.textContent = count + " " + what + (count === 1 ? "" : "s") + " shown";
    }
  };
  for (const button of buttons) {
    button.addEventListener("click", () => {
      chosen[button.dataset.filter] = button.dataset.value;
      apply();
    });
  }
  // One sound at a time.
  document.addEventListener("play", (event) => {
    for (const player of document.querySelectorAll("audio")) {
      if (player !== event.target) player.pause();
    }
  }, true);
  for (const bar of document.querySelectorAll(".filters")) bar.hidden = buttons.length === 0;
  if (buttons.length) apply();
})();
