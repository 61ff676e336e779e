// The live page: asks the gateway for what is new, and shows it. It loads nothing else.
"use strict";

const EVERY_MS = 1000;
const SLOW_MS = 3000; // when an answer takes longer, the page says so
const GIVE_UP_MS = 15000; // when an answer takes longer, the page repeats the request
const MOST_ROWS_IN_ALL = 20000; // of the curves of one metric, over all runs
const MOST_SEEDS = 30;
const STATES = { waiting: "waiting for its first step", live: "live", "no steps": "no step for a while, but its process lives", silent: "silent", completed: "completed", ended: "ended", failed: "failed", killed: "killed" };
const GOING = ["waiting", "live", "no steps", "silent"]; // the states of a run that may have further steps

const $ = (id) => document.getElementById(id);
const gateway = { heardMs: performance.now(), askedMs: Infinity, hasAnswered: false, fault: "", cursor: "" };
const faults = new Map(); // what could not be shown -> why
const data = new Map(); // run -> {key, cursor, series, isBehind, isStale, metrics}
const side = { signals: {}, seeds: {}, ranks: {}, most: MOST_SEEDS, version: 0 }; // of the run in focus

const board = new Esper.Board($("board"), { view: readAddress(), changed: changedView, isNaming: true });
board.hasDetail = true;

// -- asking ------------------------------------------------------------------------------------------------

async function ask(path, given) {
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries(given)) if (value !== "" && value !== undefined && value !== null) query.set(name, value);
  let response;
  let answer;
  gateway.askedMs = Math.min(gateway.askedMs, performance.now());
  try {
    response = await fetch(`/page/${path}?${query}`, { cache: "no-store", signal: AbortSignal.timeout(GIVE_UP_MS) });
    answer = await response.text();
  } catch (error) {
    gateway.fault = error.message;
    throw error;
  } finally {
    gateway.askedMs = Infinity;
  }
  gateway.heardMs = performance.now();
  gateway.hasAnswered = true;
  gateway.fault = "";
  if (!response.ok) throw Object.assign(new Error(`${response.status} ${answer}`), { status: response.status });
  return JSON.parse(answer);
}

// One round. Returns whether there is more to ask for at once.
async function look() {
  const answer = await ask("runs", { since: gateway.cursor });
  gateway.cursor = answer.cursor;
  runs.clockMs = answer.now_ms - Date.now();
  if (answer.is_all) runs.infos.clear();
  const changed = new Set();
  for (const run of answer.runs) {
    runs.infos.set(run.run_id, run);
    changed.add(run.run_id);
  }
  for (const name of answer.gone || []) runs.infos.delete(name);
  if (!runs.isExplicit) {
    const newest = newestRun();
    runs.chosen = newest ? [newest.run_id] : [];
    runs.focus = runs.chosen[0] || "";
  }
  for (const name of data.keys()) if (!runs.infos.has(name)) data.delete(name);
  let failure = null; // a failure for one run; the others are still asked for
  const waiting = shownNames().filter((name) => runs.infos.has(name)).map((name) => [name, entry(name)])
    .filter(([name, found]) => changed.has(name) || found.isStale || found.isBehind);
  await Promise.all([0, 1, 2].map(async () => {
    for (let next = waiting.shift(); next; next = waiting.shift()) {
      next[1].isStale = true;
      try {
        await follow(...next);
      } catch (error) {
        failure ??= error;
      }
    }
  }));
  try {
    await lookAside(changed);
  } catch (error) {
    failure ??= error;
  }
  if (failure) throw failure;
  return answer.more || [...data].some(([name, found]) => found.isBehind && shownNames().includes(name));
}

function shownNames() {
  return runs.chosen.filter((name) => !runs.hidden.has(name));
}

function entry(name) {
  if (!data.has(name)) data.set(name, { key: "", cursor: "", series: null, isBehind: false, isStale: true, metrics: [] });
  return data.get(name);
}

function rankOf(name) {
  return name === runs.focus ? runs.rank : 0;
}

// Asks for what is new of a run's curves.
async function follow(name, found) {
  const buckets = Math.min(1000, Math.max(150, Math.floor(MOST_ROWS_IN_ALL / Math.max(shownNames().length, 1))));
  const given = { run: name, rank: rankOf(name), buckets };
  const key = JSON.stringify(given);
  if (found.key !== key) Object.assign(found, { key, cursor: "", metricsCursor: "", detail: null });
  let answer;
  try {
    answer = await ask("series", { ...given, since: found.cursor });
  } catch (error) {
    if (error.status !== 404) throw error; // nothing of it is stored yet, or not any more: the list of runs shows which
    Object.assign(found, { isBehind: false, isStale: false });
    return;
  }
  if (found.key !== key) return; // chosen anew in the meantime
  found.series = Esper.merge(found.cursor ? found.series : null, answer);
  found.cursor = answer.cursor;
  found.isBehind = answer.read < answer.stored;
  if (Object.keys(found.series.metrics).some((metric) => !found.metrics.some((each) => each.name === metric))) {
    const list = await ask("metrics", { run: name, rank: rankOf(name) });
    if (list.metrics) found.metrics = list.metrics;
  }
  found.isStale = false;
}

// Asks for what is shown of the run in focus only.
async function lookAside(changed) {
  const run = runs.infos.get(runs.focus);
  if (!run) return;
  const given = { run: run.run_id, rank: runs.rank };
  const key = JSON.stringify(given);
  if (side.key !== key) Object.assign(side, { key, signals: {}, seeds: {}, ranks: {}, isBehind: true });
  if (!changed.has(run.run_id) && !side.isBehind) return;
  side.isBehind = false;
  const quiet = async (path, query) => {
    try {
      return await ask(path, query);
    } catch (error) {
      if (error.status !== 404) throw error;
      return null;
    }
  };
  const signals = await quiet("signals", { ...given, since: side.signals.cursor });
  if (side.key !== key) return;
  if (signals && !signals.is_same) side.signals = signals;
  else if (signals) side.signals.cursor = signals.cursor;
  if (entry(run.run_id).metrics.some((metric) => metric.level === "seed") || side.seeds.count) {
    const seeds = await quiet("seeds", { ...given, since: side.seeds.cursor });
    if (side.key !== key) return;
    if (seeds) takeSeeds(seeds);
    side.version++;
  }
  if (run.rank_count > 1) {
    const ranks = await quiet("ranks", { run: run.run_id });
    if (side.key === key && ranks) side.ranks = ranks;
    side.version++;
  }
  side.isBehind = Boolean((signals && signals.read < signals.stored) || (side.seeds.read < side.seeds.stored));
}

function takeSeeds(answer) {
  const before = answer.is_all ? new Map() : side.seeds.byId || new Map();
  for (const seed of answer.seeds) before.set(`${seed.segment}\0${seed.id}`, seed);
  side.seeds = { ...answer, byId: before };
}

// Every step of what is zoomed into.
async function loadDetail() {
  const { range } = board.view;
  if (!range) return;
  let isNew = false;
  for (const name of shownNames()) {
    const found = data.get(name);
    if (!found?.series || found.series.width <= 1) continue;
    const steps = Esper.stepsWithin(found.series, board.view.x, range);
    const [from, to] = steps || [];
    const all = found.series.last_step - found.series.first_step + 1;
    if (!steps || (to - from + 1) * 1.5 > all) continue;
    const key = `${found.key} ${from} ${to}`;
    if (found.detail?.key === key) continue;
    const answer = await ask("series", { run: name, rank: rankOf(name), from, to, buckets: 4000 });
    if (board.view.range !== range) return;
    if (answer.width >= found.series.width) continue;
    found.detail = { ...answer, key, version: 1 };
    isNew = true;
  }
  if (isNew) show();
}

// -- showing -----------------------------------------------------------------------------------------------

function changedView(view) {
  writeAddress(view);
  drawTable();
  clearTimeout(changedView.timer);
  changedView.timer = setTimeout(() => loadDetail().catch((error) => faults.set("the full detail", error.message)), 250);
}

function changedChoice() {
  writeAddress(board.view);
  show();
  soon();
}

// Runs one part of the page's work. When it fails, the page says so, and the other parts continue.
function guard(what, work) {
  try {
    work();
    faults.delete(what);
  } catch (error) {
    faults.set(what, error.message);
    console.error(error);
  }
}

function show() {
  const isNothing = !runs.infos.size;
  $("nothing").hidden = !isNothing || !gateway.hasAnswered;
  document.querySelector("main").hidden = isNothing;
  if (!isNothing) {
    guard("the table of runs", drawTable);
    guard("the state", drawNow);
    guard("the signals", drawSignals);
    guard("the charts", drawBoard);
  }
  status();
}

// Why the gateway does not answer; empty when it does.
function lost() {
  const now = performance.now();
  const since = `for ${Math.round((now - gateway.heardMs) / 1000)} s`;
  if (gateway.fault) return `the gateway does not answer (${since}): ${gateway.fault}; the page goes on trying`;
  return now - gateway.askedMs > SLOW_MS ? `the gateway does not answer (${since})` : "";
}

function some(names) {
  return `${names.slice(0, 3).map(Esper.printable).join(", ")}${names.length > 3 ? ` and ${names.length - 3} more` : ""}`;
}

function status() {
  const said = [lost(), ...[...faults].map(([what, why]) => `${what} cannot be shown: ${why}`)];
  const unknown = gateway.hasAnswered && runs.infos.size ? runs.chosen.filter((name) => !runs.infos.has(name)) : [];
  if (unknown.length) said.push(`this gateway does not have ${unknown.length > 1 ? "the runs" : "the run"} ${some(unknown)}`);
  const behind = shownNames().filter((name) => data.get(name)?.isBehind);
  if (behind.length) said.push(`catching up with ${some(behind)}`);
  $("connection").textContent = said.filter(Boolean).join("; ");
  const live = [...runs.infos.values()].filter((run) => ["live", "no steps"].includes(run.state)).length;
  $("count").textContent = runs.infos.size ? `${runs.infos.size.toLocaleString("en")} ${runs.infos.size === 1 ? "run" : "runs"}, ${live} live` : "";
  document.title = runs.chosen.length === 1 && runs.infos.has(runs.chosen[0]) ? `${Esper.printable(runs.chosen[0])} · ${runs.infos.get(runs.chosen[0]).state} · Esper` : "Esper";
}

function pick(select, values, value) {
  if ([...select.options].map((option) => option.value).join("\0") !== values.join("\0")) select.replaceChildren(...values.map((each) => new Option(Esper.printable(each), each)));
  select.value = value;
}

function drawNow() {
  pick($("focus"), runs.chosen, runs.focus);
  const run = runs.infos.get(runs.focus);
  $("now").hidden = !run;
  if (!run) return;
  $("rank-label").hidden = run.rank_count < 2;
  drawAbout(run);
  drawRanks(run);
  pick($("rank"), run.ranks.map((each) => String(each.rank)), String(runs.rank));
  const found = data.get(run.run_id);
  const series = found?.series;
  const age = run.last_ms === null ? NaN : Date.now() + runs.clockMs - lastOf(run);
  const last = (name) => {
    const values = series?.metrics[name];
    if (!values) return undefined;
    return (values.last || []).findLast((value) => value !== null);
  };
  const open = (side.signals.episodes || []).filter((episode) => episode.is_open);
  const missing = (run.missing || 0) + (run.incomplete || 0);
  const isOver = !GOING.includes(run.state);
  const step = run.last_step === null ? "none" : run.last_step.toLocaleString("en");
  const state = lost() ? "not known" : STATES[run.state] || run.state;
  const tiles = [
    ["state", run.outcome && ["failed", "killed", "ended"].includes(run.state) ? `${state}${earlyOf(run)}: ${run.outcome}` : lost() ? state : state + earlyOf(run), lost() ? "bad" : TONES[run.state]],
    ["step", found?.isBehind ? `${series.read.toLocaleString("en")} of ${series.stored.toLocaleString("en")}, catching up` : step, found?.isBehind ? "warn" : ""],
    [isOver ? "duration" : "age of the last step", isOver ? Esper.duration(durationOf(run)) : Esper.duration(age), !isOver && age > 60_000 ? "warn" : ""],
    ["loss", run.last_loss_is || Esper.number(run.last_loss), run.last_loss_is ? "bad" : ""],
  ];
  if (run.validation_loss_is || (run.validation_loss ?? null) !== null) tiles.push(["validation loss", run.validation_loss_is || Esper.number(run.validation_loss), run.validation_loss_is ? "bad" : ""]);
  if (last("samples_per_s") !== undefined) tiles.push(["samples a second", Esper.number(last("samples_per_s")), ""]);
  if (side.seeds.byId) tiles.push(["live seeds", [...side.seeds.byId.values()].filter((seed) => seed.retired_step === null).length.toLocaleString("en"), ""]);
  tiles.push([isOver ? "signals at the end" : "signals now", open.length ? open.at(-1).name : "none", open.some((episode) => episode.level === "HIGH") ? "bad" : open.some((episode) => episode.level === "WARN") ? "warn" : "good"]);
  tiles.push(["steps missing or incomplete", missing.toLocaleString("en"), missing ? "warn" : ""]);
  if (side.ranks.slowest !== null && side.ranks.slowest !== undefined && run.rank_count > 1) tiles.push(["slowest rank", `${side.ranks.slowest}, by ${Esper.number(side.ranks.slowest_ms)} ms`, ""]);
  const text = JSON.stringify(tiles);
  if (drawNow.text === text) return;
  drawNow.text = text;
  $("tiles").replaceChildren(...tiles.map(([name, value, tone]) => Esper.element("div", { className: `tile ${tone || ""}` }, name, Esper.element("b", { textContent: value }))));
}

// What is known of the run besides its values: attempts, host, revision, settings.
function drawAbout(run) {
  const attempts = run.attempts.slice(-6).map((each) => {
    const how = each.outcome && each.outcome !== each.state ? ` (${each.outcome})` : "";
    return `${each.number} ${each.state}${how}, steps ${each.first_step ?? "–"} to ${each.last_step ?? "–"}${each.resumed ? ", resumed" : ""}`;
  });
  const said = [
    run.attempt_count > 1 ? `attempt ${run.attempt_count}: ${attempts.join("; ")}` : "",
    run.experiment && `experiment ${run.experiment}`, run.rank_count < 2 && run.host && `host ${run.host}`,
    run.rank_count < 2 && run.device && `device ${run.device}`, run.rank_count < 2 && run.ranks[0]?.location,
    run.revision && `revision ${run.revision.slice(0, 10)}`, run.settings && `settings ${run.settings}`,
  ];
  const text = Esper.printable(said.filter(Boolean).join(" · "));
  if ($("about").textContent !== text) $("about").textContent = text;
}

// Which process is where, of a run with several ranks.
function drawRanks(run) {
  $("who").hidden = run.rank_count < 2;
  if (run.rank_count < 2) return;
  const count = (of) => new Set(run.ranks.map(of).filter(Boolean)).size;
  const devices = count((each) => each.device);
  const [hosts, missing] = [count((each) => each.host), Math.max(run.world_size - run.rank_count, 0)];
  const said = [run.rank_count.toLocaleString("en") + (hosts ? ` on ${hosts} ${hosts === 1 ? "host" : "hosts"}` : ""), devices ? `${devices} ${devices === 1 ? "device" : "devices"}` : "", missing ? `${missing} of ${run.world_size} have not come` : ""];
  $("who-said").textContent = said.filter(Boolean).join(", ");
  const rows = run.ranks.map((each) => [each.rank, each.outcome && each.outcome !== each.state ? `${each.state} (${each.outcome})` : each.state, each.last_step === null ? "–" : each.last_step.toLocaleString("en"), each.host, each.device, each.location]);
  const text = JSON.stringify(rows);
  if (drawRanks.text === text || !$("who").open) return;
  drawRanks.text = text;
  $("who").querySelector("tbody").replaceChildren(...rows.map((cells, place) => {
    const made = cells.map((cell, i) => Esper.element("td", { textContent: Esper.printable(cell || (cell === 0 ? "0" : "–")), className: i === 1 ? TONES[run.ranks[place].state] || "" : i % 2 ? "" : i < 3 ? "number" : "" }));
    return Esper.element("tr", {}, ...made);
  }));
}

function drawSignals() {
  const episodes = side.signals.episodes || [];
  $("signals").hidden = !episodes.length;
  $("signals-said").textContent = `${episodes.length.toLocaleString("en")}, newest first${side.signals.left_out ? `, ${side.signals.left_out.toLocaleString("en")} older ones left out` : ""}`;
  const run = runs.infos.get(runs.focus);
  const isOver = !GOING.includes(run?.state);
  const numbers = new Map(run?.attempt_count > 1 ? run.attempts.map((each) => [each.attempt, each.number]) : []);
  const text = JSON.stringify([isOver, episodes, [...numbers]]);
  if (drawSignals.text === text) return;
  drawSignals.text = text;
  $("episodes").replaceChildren(...[...episodes].reverse().slice(0, 100).map((each) => {
    const text = isOver ? each.text.replace(/, goes on$/, ", until the end") : each.text;
    const attempt = numbers.has(each.attempt) ? `attempt ${numbers.get(each.attempt)}: ` : "";
    return Esper.element("li", {}, Esper.element("b", { className: each.level === "HIGH" ? "bad" : each.level === "WARN" ? "warn" : "", textContent: each.level }), ` ${attempt}${text} (${each.reason}) → ${each.route}`);
  }));
}

function drawBoard() {
  const shown = [];
  const metrics = new Map();
  for (const name of runs.chosen) {
    const found = data.get(name);
    if (!found?.series) continue;
    shown.push({ id: name, name: Esper.printable(name), color: colorOf(name), isHidden: runs.hidden.has(name), series: found.series, detail: found.detail });
    for (const metric of found.metrics) if (!metrics.has(metric.name)) metrics.set(metric.name, metric);
  }
  board.focus = runs.focus;
  board.extraVersion = `${side.key} ${side.version}`;
  extras();
  board.show(shown, [...metrics.values()]);
}

function extras() {
  const series = data.get(runs.focus)?.series;
  const set = (id, isThere, group, options) => {
    if (!isThere && !board.charts.has(id)) return;
    const chart = board.extra(group, { id, ...options });
    if (chart.isNothing === !isThere) return;
    chart.isNothing = !isThere;
    board.arrange();
  };
  set("where the time goes", series && Esper.phases(series, "step"), "time", { title: "Where a step's time goes", about: "ms, stacked", unit: "ms", isLinear: true, isFromZero: true, draw: Esper.stack });
  set("ranks", side.ranks.ranks?.length > 1, "ranks", { title: "Step time by rank", about: "ms, the longest step in each stretch", height: 300, isLinear: true, draw: (chart) => {
    Esper.heat(() => ({ xs: side.ranks.steps, values: side.ranks.step_ms, unit: "ms" }))(chart);
    chart.element.classList.add("wide");
    const { slowest, slowest_by: by, slowest_ms: ms } = side.ranks;
    chart.note.textContent = slowest === null ? "no rank is slower than the others" : `rank ${slowest} is the slowest: ${Esper.number(ms)} ms longer than the mean of the others${by ? `, mostly in ${by}` : ""}`;
  } });
  set("stages", side.seeds.byId?.size, "seeds", { title: "Stages of the seeds", about: "by step, newest seed first", isLinear: true, draw: (chart) => {
    chart.element.classList.add("wide");
    const all = [...side.seeds.byId.values()].sort((one, other) => (one.retired_step === null ? 0 : 1) - (other.retired_step === null ? 0 : 1) || (other.stages[0]?.[0] ?? 0) - (one.stages[0]?.[0] ?? 0));
    const some = all.slice(0, side.most);
    chart.caption.querySelector("small").textContent = `by step; ${some.length.toLocaleString("en")} of ${(side.seeds.count || all.length).toLocaleString("en")} seeds, live ones first, newest first`;
    const last = side.seeds.last_step;
    Esper.bars(() => some.map((seed) => ({ id: seed.id, bars: seed.stages.map(([from, to, stage]) => [from, to ?? last, stage]) })), side.seeds.stages)(chart);
    if (!chart.more) {
      chart.more = Esper.element("button", { type: "button", textContent: "show more seeds" });
      chart.more.addEventListener("click", () => { side.most += 60; board.rebuild(chart); });
      chart.element.append(chart.more);
    }
    chart.more.hidden = all.length <= side.most || side.most >= 300;
  } });
}

// -- polling and redrawing ---------------------------------------------------------------------------------

$("who").addEventListener("toggle", () => guard("the ranks", () => runs.infos.has(runs.focus) && drawRanks(runs.infos.get(runs.focus))));
$("focus").addEventListener("change", (event) => { runs.focus = event.target.value; runs.rank = 0; changedChoice(); });
$("rank").addEventListener("change", (event) => { runs.rank = Number(event.target.value); entry(runs.focus).isStale = true; changedChoice(); });
$("search").value = runs.search;
$("search").addEventListener("input", (event) => { runs.search = event.target.value; runs.most = AT_FIRST; drawTable(); writeAddress(board.view); });
$("more").addEventListener("click", () => { runs.most += 200; drawTable(); });
$("only-newest").addEventListener("click", () => { runs.isExplicit = false; runs.hidden.clear(); changedChoice(); });
$("lines").textContent = `export OTEL_EXPORTER_OTLP_ENDPOINT=${location.origin} OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf\nesper-otel run train.py`;
$("copy").addEventListener("click", async () => {
  await navigator.clipboard.writeText($("lines").textContent);
  $("copy").textContent = "copied";
});
document.addEventListener("visibilitychange", () => { if (!document.hidden) soon(); });

const polling = { timer: 0, isAsking: false, isSoon: false };

function soon() {
  polling.isSoon = true;
  if (polling.isAsking) return;
  clearTimeout(polling.timer);
  forever();
}

// Two loops that do not wait for each other: the page keeps its clock while it waits for the gateway.
async function forever() {
  let waitMs = EVERY_MS;
  polling.isAsking = true;
  polling.isSoon = false;
  try {
    if (!document.hidden) {
      if (await look()) waitMs = 0;
      show();
    }
    faults.delete("the gateway's answer");
  } catch (error) {
    if (!gateway.fault) faults.set("the gateway's answer", error.message);
    show();
  }
  polling.isAsking = false;
  polling.timer = setTimeout(forever, polling.isSoon ? 0 : waitMs);
}
setInterval(() => { if (!document.hidden) { guard("the state", drawNow); status(); } }, EVERY_MS);
head();
forever();
