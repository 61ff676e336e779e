// The table of runs: search, sort, choose, hide, pin; and what of it stands in the page's address.
"use strict";

const DATE = new Intl.DateTimeFormat(undefined, { dateStyle: "short", timeStyle: "medium" });
const MOST_CHOSEN = 40; // at once, by a button
const AT_FIRST = 40; // rows shown at first, and more with each press of the button
const TONES = { live: "good", completed: "good", waiting: "", "no steps": "warn", silent: "warn", ended: "", failed: "bad", killed: "bad" };
const COLUMNS = [
  // name, its value for sorting, its text, whether it is a number
  ["run", (run) => run.run_id],
  ["state", (run) => run.state, (run) => stateOf(run)],
  ["start", (run) => run.start_ms ?? run.received_ms ?? 0, (run) => (run.start_ms ? DATE.format(run.start_ms) : "–")],
  ["duration", durationOf, (run) => Esper.duration(durationOf(run)), true],
  ["last step", (run) => run.last_step ?? -1, (run) => (run.last_step === null ? "–" : run.last_step.toLocaleString("en")), true],
  ["last loss", (run) => run.last_loss ?? Infinity, (run) => run.last_loss_is || Esper.number(run.last_loss), true],
  ["validation loss", (run) => run.validation_loss ?? Infinity, (run) => run.validation_loss_is || Esper.number(run.validation_loss), true],
  ["experiment", (run) => run.experiment || ""],
  ["host", (run) => run.host || ""],
  ["device", (run) => run.device || "", (run) => (run.device || "–").split(", ")[0]],
  ["revision", (run) => run.revision || "", (run) => (run.revision || "–").slice(0, 10)],
  ["ranks", (run) => Math.max(run.rank_count, run.world_size || 0), undefined, true],
  ["attempts", (run) => run.attempt_count, undefined, true],
];

// The columns that some run has a value for.
function columns() {
  const all = [...runs.infos.values()];
  const isValidated = all.some((run) => (run.validation_loss ?? null) !== null || run.validation_loss_is);
  const isDescribed = all.some((run) => run.device);
  return COLUMNS.filter(([name]) => (isValidated || name !== "validation loss") && (isDescribed || name !== "device"));
}

// What is said of a run that has ended, or fallen silent, without a step.
function earlyOf(run) {
  return run.start_ms === null && (run.outcome || run.state === "silent") ? " before its first step" : "";
}

function stateOf(run) {
  const early = earlyOf(run);
  return (run.outcome && !["completed", run.state].includes(run.outcome) ? `${run.state} (${run.outcome})` : run.state) + early;
}

function durationOf(run) {
  if (run.start_ms === null) return NaN;
  return (["live", "no steps"].includes(run.state) ? Date.now() + runs.clockMs : lastOf(run) ?? run.start_ms) - run.start_ms;
}

// When the last step was. Steps that are quicker than 1 ms have times 1 ms apart, which run ahead of the clock.
function lastOf(run) {
  const isQuick = run.last_ms - run.start_ms <= 1.2 * run.steps_stored;
  return isQuick && run.received_ms ? Math.min(run.last_ms, run.received_ms) : run.last_ms;
}

// What is chosen. `slots` keeps the color of a run, whether or not it is shown at the moment.
const runs = {
  infos: new Map(), chosen: [], slots: new Map(), hidden: new Set(), isExplicit: false, focus: "", rank: 0, clockMs: 0,
  sort: "start", isUp: false, search: "", most: AT_FIRST, rows: new Map(),
};

function slotOf(name) {
  if (!runs.slots.has(name)) {
    const taken = new Set(runs.slots.values());
    let slot = 0;
    while (taken.has(slot)) slot++;
    runs.slots.set(name, slot);
  }
  return runs.slots.get(name);
}

function colorOf(name) {
  return Esper.COLORS[slotOf(name) % Esper.COLORS.length];
}

function newestRun() {
  let best = null;
  for (const run of runs.infos.values()) {
    if (!best || (run.start_ms ?? run.received_ms ?? 0) > (best.start_ms ?? best.received_ms ?? 0)) best = run;
  }
  return best;
}

function choose(names) {
  runs.chosen = names;
  runs.isExplicit = true;
  if (!names.includes(runs.focus)) runs.focus = names.at(-1) || "";
  changedChoice();
}

// -- the address -------------------------------------------------------------------------------------------

function readAddress() {
  const asked = new URLSearchParams(location.search);
  const slots = (asked.get("colors") || "").split(",");
  asked.getAll("run").forEach((name, place) => {
    if (runs.chosen.includes(name)) return;
    const slot = /^\d{1,4}$/.test(slots[place]) ? Number(slots[place]) : -1;
    if (slot >= 0 && ![...runs.slots.values()].includes(slot)) runs.slots.set(name, slot);
    runs.chosen.push(name);
  });
  runs.isExplicit = runs.chosen.length > 0;
  for (const name of asked.getAll("hide")) runs.hidden.add(name);
  runs.focus = asked.get("focus") || runs.chosen[0] || "";
  runs.rank = Number(asked.get("rank")) || 0;
  if (COLUMNS.some(([name]) => name === asked.get("sort"))) runs.sort = asked.get("sort");
  runs.isUp = asked.get("order") === "up";
  runs.search = asked.get("search") || "";
  const range = ["from", "to"].map((name) => Number.parseFloat(asked.get(name)));
  const view = { filter: asked.get("filter") || "", log: asked.get("log") === "1", base: asked.get("base") || "", folded: new Set(asked.getAll("fold")), pins: new Set(asked.getAll("pin")) };
  if (Object.hasOwn(Esper.AXES, asked.get("x"))) view.x = asked.get("x");
  if (asked.get("drag") === "pan") view.drag = "pan";
  const smooth = Number(asked.get("smooth"));
  if (smooth > 0 && smooth < 1) view.smooth = smooth;
  if (range.every(Number.isFinite) && range[0] < range[1]) view.range = range;
  return view;
}

function writeAddress(view) {
  const said = new URLSearchParams();
  if (runs.isExplicit) {
    for (const name of runs.chosen) said.append("run", name);
    const slots = runs.chosen.map(slotOf);
    if (slots.some((slot, place) => slot !== place)) said.set("colors", slots.join());
  }
  for (const name of runs.hidden) if (runs.chosen.includes(name)) said.append("hide", name);
  const put = (name, value, otherwise) => { if (value !== otherwise && value !== "") said.set(name, value); };
  put("focus", runs.isExplicit ? runs.focus : "", runs.chosen[0] || "");
  put("rank", runs.rank, 0);
  put("base", view.base, "");
  put("x", view.x, "step");
  put("log", view.log ? "1" : "", "");
  put("smooth", view.smooth, 0);
  put("filter", view.filter, "");
  put("drag", view.drag, "zoom");
  for (const group of view.folded) said.append("fold", group);
  for (const chart of view.pins) said.append("pin", chart);
  if (view.range) {
    said.set("from", Number(view.range[0].toPrecision(14)));
    said.set("to", Number(view.range[1].toPrecision(14)));
  }
  put("sort", runs.sort, "start");
  put("order", runs.isUp ? "up" : "", "");
  put("search", runs.search, "");
  const text = said.toString();
  clearTimeout(writeAddress.timer); // browsers limit how often the address may change
  writeAddress.timer = setTimeout(() => history.replaceState(null, "", text ? `?${text}` : location.pathname), 150);
}

// -- the table ---------------------------------------------------------------------------------------------

function head() {
  head.columns = columns().length;
  const cells = columns().map(([name, , , isNumber]) => {
    const isSorted = runs.sort === name;
    const button = Esper.element("button", { type: "button", textContent: `${name}${isSorted ? (runs.isUp ? " ▲" : " ▼") : ""}` });
    button.addEventListener("click", () => {
      runs.isUp = isSorted ? !runs.isUp : ["run", "last loss", "validation loss"].includes(name);
      runs.sort = name;
      head();
      drawTable(true);
      changedChoice();
    });
    const cell = Esper.element("th", { className: isNumber ? "number" : "" }, button);
    cell.setAttribute("aria-sort", isSorted ? (runs.isUp ? "ascending" : "descending") : "none");
    return cell;
  });
  document.querySelector("#table thead").replaceChildren(Esper.element("tr", {}, Esper.element("th"), ...cells, Esper.element("th")));
}

function found() {
  const wanted = runs.search.toLowerCase().split(/\s+/).filter(Boolean);
  const texts = (run) => [run.run_id, run.state, run.experiment, run.host, run.device, run.revision].join(" ").toLowerCase();
  const all = [...runs.infos.values()].filter((run) => wanted.every((word) => texts(run).includes(word)));
  const [, value] = COLUMNS.find(([name]) => name === runs.sort);
  const way = runs.isUp ? 1 : -1;
  return all.sort((one, other) => {
    const [a, b] = [value(one), value(other)];
    return way * (typeof a === "string" ? a.localeCompare(b, "en", { numeric: true }) : (Number.isNaN(a) ? -Infinity : a) - (Number.isNaN(b) ? -Infinity : b)) || 0;
  });
}

// Draws the rows that are shown; a row that has not changed stays as it is.
function drawTable(isWhole = false) {
  if (head.columns !== columns().length) {
    head();
    isWhole = true;
  }
  const all = found();
  const shown = all.slice(0, runs.most);
  if (isWhole) runs.rows.clear();
  const rows = shown.map((run) => {
    const isChosen = runs.chosen.includes(run.run_id);
    const mark = [COLUMNS.map(([, value, text]) => (text || value)(run)).join("\0"), isChosen, runs.hidden.has(run.run_id), board.view.base === run.run_id, isChosen && colorOf(run.run_id)].join("\0");
    const known = runs.rows.get(run.run_id);
    if (known?.mark === mark) return known.row;
    const row = rowOf(run, isChosen);
    runs.rows.set(run.run_id, { mark, row });
    return row;
  });
  const body = document.querySelector("#table tbody");
  if (rows.length !== body.children.length || rows.some((row, i) => body.children[i] !== row)) {
    const active = document.activeElement?.dataset?.act;
    body.replaceChildren(...rows);
    if (active) body.querySelector(`[data-act="${CSS.escape(active)}"]`)?.focus();
  }
  const every = document.getElementById("every");
  const few = all.slice(0, MOST_CHOSEN).map((run) => run.run_id);
  every.hidden = !runs.search || few.every((name) => runs.chosen.includes(name));
  every.textContent = all.length > MOST_CHOSEN ? `show the first ${MOST_CHOSEN} of these` : `show these ${all.length}`;
  every.onclick = () => choose(few);
  const more = document.getElementById("more");
  more.hidden = all.length <= runs.most;
  more.textContent = `show ${Math.min(all.length - runs.most, 200)} more of ${all.length.toLocaleString("en")}`;
  document.getElementById("runs-said").textContent = `${all.length === runs.infos.size ? all.length.toLocaleString("en") : `${all.length} of ${runs.infos.size}`}, ${runs.chosen.filter((name) => runs.infos.has(name)).length} shown in the charts`;
}

function rowOf(run, isChosen) {
  const name = run.run_id;
  const box = Esper.element("input", { type: "checkbox", checked: isChosen });
  box.dataset.act = `choose ${name}`;
  box.setAttribute("aria-label", `show ${Esper.printable(name)} in the charts`);
  box.addEventListener("change", () => choose(box.checked ? [...runs.chosen, name] : runs.chosen.filter((each) => each !== name)));
  const swatch = Esper.element("i", { className: "swatch" });
  if (isChosen) swatch.style.background = colorOf(name);
  const cells = columns().map(([title, value, text, isNumber]) => {
    const words = Esper.printable((text || value)(run) || "–");
    if (title === "run") {
      const button = Esper.element("button", { type: "button", textContent: words, title: `show only ${words}` });
      button.dataset.act = `only ${name}`;
      button.addEventListener("click", () => choose([name]));
      return Esper.element("td", { className: "run", title: words }, button);
    }
    const tone = title === "state" ? TONES[run.state] || "" : (title === "last loss" && run.last_loss_is) || (title === "validation loss" && run.validation_loss_is) ? "bad" : "";
    return Esper.element("td", { className: `${isNumber ? "number" : ""} ${tone}`, textContent: words, title: words });
  });
  const acts = Esper.element("td", { className: "acts" });
  if (isChosen) {
    const act = (text, isOn, title, work) => {
      const button = Esper.element("button", { type: "button", textContent: text, title });
      button.dataset.act = `${text} ${name}`;
      button.setAttribute("aria-pressed", String(isOn));
      button.addEventListener("click", work);
      acts.append(button, " ");
    };
    const isHidden = runs.hidden.has(name);
    act("hide", isHidden, isHidden ? "show it in the charts again" : "take it out of the charts, and keep it chosen", () => {
      if (!runs.hidden.delete(name)) runs.hidden.add(name);
      changedChoice();
    });
    act("baseline", board.view.base === name, "compare the others with this run", () => {
      board.set({ base: board.view.base === name ? "" : name });
      changedChoice();
    });
  }
  return Esper.element("tr", { className: isChosen ? "chosen" : "" }, Esper.element("td", {}, box, swatch), ...cells, acts);
}
