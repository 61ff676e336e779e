// The live page: requests new steps from the gateway, keeps the newest of each run, and draws them. It loads nothing else.
"use strict";

const MOST = 4000; // steps kept of a run
const EVERY_MS = 1000;
const SLOW_MS = 3000; // when an answer takes longer, the page says so
const GIVE_UP_MS = 15000; // when an answer takes longer, the page repeats the request
const COLORS = ["#3274d9", "#e0752d", "#37872d", "#b877d9", "#c4162a", "#8a6d00", "#1f9e9e", "#6e7079"];
const STAGES = ["UNKNOWN", "DORMANT", "GERMINATED", "TRAINING", "BLENDING", "SHADOWING", "PROBATIONARY", "FOSSILIZED", "CULLED", "EMBARGOED", "RESETTING", "TERMINATED"];
const STAGE_COLORS = ["#c7d0d9", "#6e7079", "#8ab8ff", "#3274d9", "#ff9830", "#b877d9", "#fade2a", "#37872d", "#c4162a", "#8f3bb8", "#96d98d", "#3d3d42"];
const PARTS = [["input_wait_ms", "input wait"], ["hook_latency_ms", "hook"], ["kasmina.apply_ms", "apply"], ["kasmina.finalize_ms", "finalize"], ["rest", "rest"]];

const $ = (id) => document.getElementById(id);
const runs = new Map(); // name -> { cursor, steps, infos, isBehind }
const faults = new Map(); // what the page itself failed to do -> why
const gateway = { heardMs: performance.now(), askedMs: Infinity, hasAnswered: false, fault: "" };
let chosen = "";
let rank = "0";
let isStale = true; // whether there is something that was not drawn yet

async function ask(path) {
  let response;
  let answer;
  gateway.askedMs = performance.now();
  try {
    response = await fetch(path, { cache: "no-store", signal: AbortSignal.timeout(GIVE_UP_MS) });
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

async function look() {
  const infos = (await ask("/page/runs")).runs;
  for (const run of runs.values()) run.infos = [];
  for (const info of infos) {
    if (!runs.has(info.run_id)) runs.set(info.run_id, { cursor: "", steps: [], infos: [], isBehind: true });
    runs.get(info.run_id).infos.push(info);
  }
  for (const [name, run] of runs) {
    if (run.infos.length) continue;
    runs.delete(name); // the gateway has dropped it
    isStale = true;
  }
  if (!runs.has(chosen)) chosen = newest(infos);
  let failure = null; // a failure for one run; the other runs are still updated
  for (const name of new Set([chosen, ...runs.keys()])) {
    try {
      if (runs.has(name)) await follow(name, runs.get(name));
    } catch (error) {
      if (gateway.fault) throw error;
      failure ??= error;
    }
  }
  if (failure) throw failure;
}

function newest(infos) {
  let best = { run_id: "", last_received_unix_ns: -1 };
  for (const info of infos) if (info.last_received_unix_ns > best.last_received_unix_ns) best = info;
  return best.run_id;
}

async function follow(name, run) {
  for (let page = 0; page < 20; page++) {
    const path = `/page/steps?run=${encodeURIComponent(name)}&cursor=${encodeURIComponent(run.cursor)}`;
    let answer;
    try {
      answer = await ask(path);
    } catch (error) {
      if (error.status === 404) { // nothing of the run is stored yet, or it was dropped; the next list of runs shows which
        run.isBehind = false;
        return;
      }
      if (error.status !== 409 || !run.cursor) throw error;
      run.cursor = ""; // the gateway has a new store
      run.steps = [];
      continue;
    }
    run.cursor = answer.cursor;
    run.isBehind = answer.more;
    for (const step of answer.steps) keep(run.steps, step);
    if (run.steps.length > MOST) run.steps.splice(0, run.steps.length - MOST);
    if (answer.steps.length) isStale = true;
    if (!answer.more) return;
  }
}

// Sorts steps by time, since a step may arrive late; a correction replaces the step that it corrects.
function keep(steps, step) {
  let place = steps.length;
  while (place > 0 && later(steps[place - 1], step)) place--;
  for (let same = place - 1; same >= 0 && steps[same].attempt === step.attempt && steps[same].time_ms === step.time_ms; same--) {
    if (steps[same].rank === step.rank && steps[same].step === step.step) { steps[same] = step; return; }
  }
  steps.splice(place, 0, step);
}

function later(one, other) {
  return one.attempt - other.attempt > 0 || (one.attempt === other.attempt && one.time_ms > other.time_ms);
}

// -- drawing -------------------------------------------------------------------------------------------

function fill(element, children) {
  element.replaceChildren();
  for (const child of children) element.append(child);
}

function choose(select, values, value) {
  if ([...select.options].map((option) => option.value).join("\0") !== values.join("\0")) {
    fill(select, values.map((each) => new Option(each, each)));
  }
  select.value = value;
}

// The smallest and the largest of the finite numbers; null when there are none. Math.min(...) fails for long arrays.
function extent(numbers) {
  let [low, high] = [Infinity, -Infinity];
  for (const number of numbers) {
    if (!Number.isFinite(number)) continue;
    if (number < low) low = number;
    if (number > high) high = number;
  }
  return low <= high ? [low, high] : null;
}

// Runs one part of the page's work. When it fails, the page says so, and the other parts continue.
function guard(what, work) {
  try {
    work();
    faults.delete(what);
  } catch (error) {
    faults.set(what, error.message);
  }
}

function draw() {
  const has = runs.size > 0;
  $("nothing").hidden = has || !gateway.hasAnswered;
  document.querySelector("main").hidden = !has;
  if (!has) return;
  choose($("run"), [...runs.keys()], chosen);
  const run = runs.get(chosen);
  const ranks = [...new Set(run.infos.map((info) => String(info.rank)))].sort((a, b) => a - b);
  if (!ranks.includes(rank)) rank = ranks[0] || "0";
  choose($("rank"), ranks, rank);
  const ofRank = run.steps.filter((step) => String(step.rank) === rank);
  const attempt = ofRank.reduce((newest, step) => Math.max(newest, step.attempt), 0);
  const steps = ofRank.filter((step) => step.attempt === attempt);
  guard("the numbers", () => tiles(run, steps));
  if (!isStale) return;
  isStale = false;
  guard("the loss", () => loss(steps));
  guard("the times", () => time(steps));
  guard("the throughput", () => lines($("throughput"), [{ color: COLORS[2], points: steps.map((s) => [s.step, s.values.samples_per_s]) }]));
  guard("the seeds", () => seeds(steps));
  guard("the comparison", compare);
  guard("the signals", () => signals(steps));
}

// Why the gateway does not answer; empty when it does.
function lost() {
  const now = performance.now();
  const since = `for ${Math.round((now - gateway.heardMs) / 1000)} s`;
  if (gateway.fault) return `the gateway does not answer (${since}): ${gateway.fault}`;
  return now - gateway.askedMs > SLOW_MS ? `the gateway does not answer (${since})` : "";
}

function status() {
  const said = [lost(), ...[...faults].map(([what, why]) => `${what} cannot be shown: ${why}`)];
  const behind = [...runs].filter(([, run]) => run.isBehind).map(([name]) => name);
  if (behind.length) said.push(`catching up with ${behind.slice(0, 3).join(", ")}${behind.length > 3 ? ` and ${behind.length - 3} more` : ""}`);
  $("connection").textContent = said.filter(Boolean).join("; ");
}

function shown(value) {
  if (value === undefined) return "none";
  if (value === null) return "NaN";
  return Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(4)));
}

function tiles(run, steps) {
  const last = steps.at(-1);
  const info = run.infos.findLast((each) => String(each.rank) === rank) || {}; // the newest attempt comes last
  const lastMs = Math.max(info.last_time_ms || 0, last ? last.time_ms : 0);
  const age = lastMs ? (Date.now() - lastMs) / 1000 : NaN;
  const found = last ? last.values.loss : undefined;
  const recent = steps.slice(-20).flatMap((step) => step.signals);
  const worst = recent.some((signal) => signal[1] === "HIGH") ? "bad" : recent.length ? "warn" : "good";
  const state = lost() ? "not known" : info.ended ? `ended: ${info.ended}` : age > 300 ? "silent" : "running";
  const tone = info.ended && !info.is_fine ? "bad" : state === "silent" || state === "not known" ? "bad" : "good";
  const missing = (info.missing || 0) + (info.incomplete || 0);
  const all = [
    ["state", state, tone],
    ["step", run.isBehind ? `${reached(last, info)}, catching up` : reached(last, {}), run.isBehind ? "warn" : ""],
    ["age of the last step", info.ended ? "over" : Number.isFinite(age) ? `${age.toFixed(age < 10 ? 1 : 0)} s` : "none", !info.ended && age > 60 ? "warn" : ""],
    ["loss", shown(found), found === null ? "bad" : ""],
    ["samples a second", shown(last && last.values.samples_per_s), ""],
    ["live seeds", last ? last.seeds.length : 0, ""],
    ["signals, last 20 steps", recent.length ? recent.at(-1)[0] : "none", worst],
    ["steps missing or incomplete", missing, missing ? "warn" : ""],
  ];
  fill($("tiles"), all.map(([name, value, tone]) => {
    const tile = document.createElement("div");
    tile.className = `tile ${tone}`;
    const number = document.createElement("b");
    number.textContent = value;
    tile.append(name, number);
    return tile;
  }));
}

// The newest step on the page, and the gateway's newest step of the same attempt if that is later.
function reached(last, info) {
  const here = last ? last.step.toLocaleString("en") : "none";
  const isOnTheWay = last ? info.attempt === last.attempt && info.last_step > last.step : info.last_step > 0;
  return isOnTheWay ? `${here} of ${info.last_step.toLocaleString("en")}` : here;
}

function canvas(element, height) {
  if (height) element.style.height = `${height}px`;
  const scale = devicePixelRatio || 1;
  const width = element.clientWidth;
  element.width = width * scale;
  element.height = element.clientHeight * scale;
  const context = element.getContext("2d");
  context.scale(scale, scale);
  context.font = "11px system-ui, sans-serif";
  context.fillStyle = context.strokeStyle = getComputedStyle(element).color;
  return [context, width, element.clientHeight];
}

function axes(element, xs, ys, height) {
  const [context, width, tall] = canvas(element, height);
  let [low, high] = extent(ys) || [0, 1];
  if (low === high) [low, high] = [low - (Math.abs(low) || 1) / 2, high + (Math.abs(high) || 1) / 2];
  const [first, last] = extent(xs) || [0, 1];
  const x = (value) => 56 + ((value - first) / (last - first || 1)) * (width - 66);
  const y = (value) => tall - 20 - ((value - low) / (high - low)) * (tall - 30);
  context.globalAlpha = 0.6;
  for (let tick = 0; tick <= 4; tick++) {
    const value = low + ((high - low) * tick) / 4;
    context.textAlign = "right";
    context.fillText(shown(value), 50, y(value) + 4);
    context.globalAlpha = 0.15;
    context.fillRect(56, y(value), width - 66, 1);
    context.globalAlpha = 0.6;
  }
  context.textAlign = "left";
  context.fillText(first, 56, tall - 4);
  context.textAlign = "right";
  context.fillText(last, width - 10, tall - 4);
  context.globalAlpha = 1;
  return [context, x, y, tall];
}

function path(context, x, y, points) {
  context.beginPath();
  let isDown = false;
  for (const [at, value] of points) {
    if (!Number.isFinite(value)) { isDown = false; continue; }
    if (isDown) context.lineTo(x(at), y(value));
    else context.moveTo(x(at), y(value));
    isDown = true;
  }
  context.stroke();
}

function lines(element, series) {
  const points = series.flatMap((each) => each.points);
  const [context, x, y] = axes(element, points.map((p) => p[0]), points.map((p) => p[1]));
  context.lineWidth = 1.5;
  for (const each of series) {
    context.strokeStyle = each.color;
    path(context, x, y, each.points);
  }
}

function loss(steps) {
  const has = (step) => Number.isFinite(step.values.loss_ewma);
  const band = steps.filter(has).map((s) => [s.step, s.values.loss_ewma, s.values.loss_volatility || 0]);
  const ys = [...steps.map((s) => s.values.loss), ...band.flatMap(([, mean, width]) => [mean - width, mean + width])];
  const [context, x, y, tall] = axes($("loss"), steps.map((s) => s.step), ys);
  context.fillStyle = COLORS[0] + "33";
  context.beginPath();
  band.forEach(([at, mean, width], i) => (i ? context.lineTo(x(at), y(mean + width)) : context.moveTo(x(at), y(mean + width))));
  [...band].reverse().forEach(([at, mean, width]) => context.lineTo(x(at), y(mean - width)));
  context.fill();
  context.fillStyle = COLORS[1];
  for (const step of steps) {
    if (Number.isFinite(step.values.loss)) context.fillRect(x(step.step) - 1, y(step.values.loss) - 1, 3, 3);
  }
  context.fillStyle = "#d33";
  for (const step of steps) if (step.values.loss === null) context.fillRect(x(step.step) - 1, 4, 2, tall - 24);
  context.strokeStyle = COLORS[0];
  context.lineWidth = 2;
  path(context, x, y, band);
}

function legend(element, entries) {
  fill(element, entries.map(([name, color]) => {
    const entry = document.createElement("span");
    const mark = document.createElement("i");
    mark.style.background = color;
    entry.append(mark, name);
    return entry;
  }));
}

function time(steps) {
  const shares = steps.slice(-300).filter((s) => Number.isFinite(s.values.step_latency_ms)).map((step) => {
    const values = step.values;
    const known = ["hook_latency_ms", "kasmina.apply_ms", "kasmina.finalize_ms"].map((name) => values[name] || 0);
    const rest = Math.max(values.step_latency_ms - known.reduce((a, b) => a + b, 0), 0);
    return [step.step, values.input_wait_ms || 0, ...known, rest];
  });
  const sums = shares.map(([, ...parts]) => parts.reduce((a, b) => a + b, 0));
  // Values far above the rest are cut off, so that one slow step does not flatten all others.
  const usual = [...sums].sort((a, b) => a - b)[Math.floor(sums.length * 0.97)] || 0;
  const [context, x, y] = axes($("time"), shares.map((s) => s[0]), [0, Math.min((extent(sums) || [0, 0])[1], usual * 1.5) || 1]);
  context.beginPath();
  context.rect(56, 0, $("time").clientWidth, $("time").clientHeight - 20);
  context.clip();
  const width = shares.length > 1 ? Math.max(x(shares[1][0]) - x(shares[0][0]), 1) : 3;
  for (const [at, ...parts] of shares) {
    let from = 0;
    parts.forEach((part, i) => {
      context.fillStyle = COLORS[i];
      context.fillRect(x(at) - width / 2, y(from + part), width, y(from) - y(from + part));
      from += part;
    });
  }
  legend($("time-legend"), PARTS.map(([, name], i) => [name, COLORS[i]]));
}

function seeds(steps) {
  const shownSteps = steps.slice(-1000);
  const names = [...new Set(shownSteps.flatMap((step) => step.seeds.map((seed) => seed[0])))].slice(-40);
  const row = 16;
  const [context, width] = canvas($("seeds"), Math.max(names.length * row + 24, 60));
  const first = shownSteps.length ? shownSteps[0].step : 0;
  const last = shownSteps.length ? shownSteps.at(-1).step : 1;
  const x = (step) => 120 + ((step - first) / (last - first + 1)) * (width - 190);
  const rows = new Map(names.map((name, i) => [name, i * row + 4]));
  const alphas = new Map();
  for (const step of shownSteps) {
    for (const [name, stage, alpha] of step.seeds) {
      if (!rows.has(name)) continue;
      context.fillStyle = STAGE_COLORS[stage] || STAGE_COLORS[0];
      context.fillRect(x(step.step), rows.get(name), Math.max(x(step.step + 1) - x(step.step), 1) + 0.5, row - 4);
      alphas.set(name, alpha);
    }
  }
  context.fillStyle = getComputedStyle($("seeds")).color;
  const live = new Set(shownSteps.length ? shownSteps.at(-1).seeds.map((seed) => seed[0]) : []);
  for (const [name, top] of rows) {
    context.textAlign = "right";
    context.fillText(name.length > 18 ? `${name.slice(0, 17)}…` : name, 112, top + 10);
    context.textAlign = "left";
    const alpha = alphas.get(name);
    context.fillText(live.has(name) ? (Number.isFinite(alpha) ? `α ${shown(alpha)}` : "") : "retired", width - 62, top + 10);
  }
  const used = [...new Set(shownSteps.flatMap((step) => step.seeds.map((seed) => seed[1])))].sort((a, b) => a - b);
  legend($("stage-legend"), used.map((stage) => [STAGES[stage] || "UNKNOWN", STAGE_COLORS[stage] || STAGE_COLORS[0]]));
}

function compare() {
  const series = [];
  for (const [name, run] of runs) {
    const ofRank = run.steps.filter((step) => step.rank === 0);
    const attempt = ofRank.reduce((newest, step) => Math.max(newest, step.attempt), 0);
    const mine = ofRank.filter((step) => step.attempt === attempt);
    const value = (step) => (Number.isFinite(step.values.loss_ewma) ? step.values.loss_ewma : step.values.loss);
    series.push({ name, color: COLORS[series.length % COLORS.length], points: mine.map((s) => [s.step, value(s)]) });
  }
  lines($("compare"), series);
  legend($("compare-legend"), series.map((each) => [each.name, each.color]));
}

function signals(steps) {
  const newestFirst = steps.slice(-500).reverse().flatMap((step) => step.signals.map((signal) => [step.step, ...signal]));
  fill($("signals"), newestFirst.slice(0, 50).map(([step, name, level, reason, route]) => {
    const item = document.createElement("li");
    item.className = level.toLowerCase();
    item.textContent = `step ${step}: ${name} (${reason}) → ${route}`;
    return item;
  }));
}

// -- polling and redrawing -----------------------------------------------------------------------------

function show() {
  guard("the page", draw);
  status();
}

function redraw() {
  isStale = true;
  show();
}

$("run").addEventListener("change", (event) => { chosen = event.target.value; redraw(); });
$("rank").addEventListener("change", (event) => { rank = event.target.value; redraw(); });
addEventListener("resize", redraw);

// Two loops that do not wait for each other: the page keeps redrawing while it waits for the gateway.
async function forever() {
  let waitMs = EVERY_MS;
  try {
    await look();
    faults.delete("the gateway's answer");
    if ([...runs.values()].some((run) => run.isBehind)) waitMs = 0;
  } catch (error) {
    if (!gateway.fault) faults.set("the gateway's answer", error.message);
  }
  setTimeout(forever, waitMs);
  show();
}
setInterval(show, EVERY_MS);
forever();
