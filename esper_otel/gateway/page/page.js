// The live page: asks the gateway for new steps, keeps the newest of each run, and draws them. Nothing comes from elsewhere.
"use strict";

const MOST = 4000; // steps kept of a run
const EVERY_MS = 1000;
const COLORS = ["#3274d9", "#e0752d", "#37872d", "#b877d9", "#c4162a", "#8a6d00", "#1f9e9e", "#6e7079"];
const STAGES = ["UNKNOWN", "DORMANT", "GERMINATED", "TRAINING", "BLENDING", "SHADOWING", "PROBATIONARY", "FOSSILIZED", "CULLED", "EMBARGOED", "RESETTING", "TERMINATED"];
const STAGE_COLORS = ["#c7d0d9", "#6e7079", "#8ab8ff", "#3274d9", "#ff9830", "#b877d9", "#fade2a", "#37872d", "#c4162a", "#8f3bb8", "#96d98d", "#3d3d42"];
const PARTS = [["input_wait_ms", "input wait"], ["hook_latency_ms", "hook"], ["kasmina.apply_ms", "apply"], ["kasmina.finalize_ms", "finalize"], ["rest", "rest"]];

const $ = (id) => document.getElementById(id);
const runs = new Map(); // name -> { cursor, steps, infos }
let chosen = "";
let rank = "0";

async function ask(path) {
  const response = await fetch(path, { cache: "no-store" });
  if (!response.ok) throw new Error(`${response.status} ${await response.text()}`);
  return response.json();
}

async function look() {
  try {
    const infos = (await ask("/page/runs")).runs;
    for (const run of runs.values()) run.infos = [];
    for (const info of infos) {
      if (!runs.has(info.run_id)) runs.set(info.run_id, { cursor: "", steps: [], infos: [] });
      runs.get(info.run_id).infos.push(info);
    }
    if (!runs.has(chosen)) chosen = newest(infos);
    for (const [name, run] of runs) if (run.infos.length) await follow(name, run);
    $("connection").textContent = "";
  } catch (error) {
    $("connection").textContent = `the gateway does not answer: ${error.message}`;
  }
  draw();
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
      if (!run.cursor) throw error;
      run.cursor = ""; // the gateway has begun anew
      run.steps = [];
      continue;
    }
    run.cursor = answer.cursor;
    for (const step of answer.steps) {
      if (step.revision > 1) { // a correction takes the place of what it corrects
        const place = run.steps.findLastIndex((old) => old.time_ms === step.time_ms && old.rank === step.rank);
        if (place >= 0) { run.steps[place] = step; continue; }
      }
      run.steps.push(step);
    }
    if (run.steps.length > MOST) run.steps.splice(0, run.steps.length - MOST);
    if (!answer.steps.length) return;
  }
}

// -- drawing -------------------------------------------------------------------------------------------

function choose(select, values, value) {
  if ([...select.options].map((option) => option.value).join("\0") !== values.join("\0")) {
    select.replaceChildren(...values.map((each) => new Option(each, each)));
  }
  select.value = value;
}

function draw() {
  const has = runs.size > 0;
  $("nothing").hidden = has;
  document.querySelector("main").hidden = !has;
  if (!has) return;
  choose($("run"), [...runs.keys()], chosen);
  const run = runs.get(chosen);
  const ranks = [...new Set(run.infos.map((info) => String(info.rank)))].sort((a, b) => a - b);
  if (!ranks.includes(rank)) rank = ranks[0] || "0";
  choose($("rank"), ranks, rank);
  const attempt = Math.max(...run.steps.map((step) => step.attempt), 0);
  const steps = run.steps.filter((step) => String(step.rank) === rank && step.attempt === attempt);
  tiles(run, steps);
  loss(steps);
  time(steps);
  lines($("throughput"), [{ color: COLORS[2], points: steps.map((s) => [s.step, s.values.samples_per_s]) }]);
  seeds(steps);
  compare();
  signals(steps);
}

function shown(value) {
  if (value === undefined) return "none";
  if (value === null) return "NaN";
  return Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(4)));
}

function tiles(run, steps) {
  const last = steps.at(-1);
  const info = run.infos.find((each) => String(each.rank) === rank) || {};
  const age = last ? (Date.now() - last.time_ms) / 1000 : NaN;
  const found = last ? last.values.loss : undefined;
  const recent = steps.slice(-20).flatMap((step) => step.signals);
  const worst = recent.some((signal) => signal[1] === "HIGH") ? "bad" : recent.length ? "warn" : "good";
  const state = info.ended ? `ended: ${info.ended}` : age > 300 ? "silent" : "running";
  const tone = info.ended && info.ended !== "completed" ? "bad" : state === "silent" ? "bad" : "good";
  const missing = (info.missing || 0) + (info.incomplete || 0);
  const all = [
    ["state", state, tone],
    ["step", last ? last.step : "none", ""],
    ["age of the last step", info.ended ? "over" : `${age.toFixed(age < 10 ? 1 : 0)} s`, !info.ended && age > 60 ? "warn" : ""],
    ["loss", shown(found), found === null ? "bad" : ""],
    ["samples a second", shown(last && last.values.samples_per_s), ""],
    ["live seeds", last ? last.seeds.length : 0, ""],
    ["signals, last 20 steps", recent.length ? recent.at(-1)[0] : "none", worst],
    ["steps missing or incomplete", missing, missing ? "warn" : ""],
  ];
  $("tiles").replaceChildren(...all.map(([name, value, tone]) => {
    const tile = document.createElement("div");
    tile.className = `tile ${tone}`;
    const number = document.createElement("b");
    number.textContent = value;
    tile.append(name, number);
    return tile;
  }));
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
  const numbers = ys.filter(Number.isFinite);
  let [low, high] = [Math.min(...numbers), Math.max(...numbers)];
  if (!numbers.length) [low, high] = [0, 1];
  if (low === high) [low, high] = [low - (Math.abs(low) || 1) / 2, high + (Math.abs(high) || 1) / 2];
  const [first, last] = xs.length ? [Math.min(...xs), Math.max(...xs)] : [0, 1];
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
  element.replaceChildren(...entries.map(([name, color]) => {
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
  // One step that hangs must not make all others invisible: what is far above the rest is cut off.
  const usual = [...sums].sort((a, b) => a - b)[Math.floor(sums.length * 0.97)] || 0;
  const [context, x, y] = axes($("time"), shares.map((s) => s[0]), [0, Math.min(Math.max(...sums, 0), usual * 1.5) || 1]);
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
    const attempt = Math.max(...run.steps.map((step) => step.attempt), 0);
    const mine = run.steps.filter((step) => step.rank === 0 && step.attempt === attempt);
    const value = (step) => (Number.isFinite(step.values.loss_ewma) ? step.values.loss_ewma : step.values.loss);
    series.push({ name, color: COLORS[series.length % COLORS.length], points: mine.map((s) => [s.step, value(s)]) });
  }
  lines($("compare"), series);
  legend($("compare-legend"), series.map((each) => [each.name, each.color]));
}

function signals(steps) {
  const newestFirst = steps.slice(-500).reverse().flatMap((step) => step.signals.map((signal) => [step.step, ...signal]));
  $("signals").replaceChildren(...newestFirst.slice(0, 50).map(([step, name, level, reason, route]) => {
    const item = document.createElement("li");
    item.className = level.toLowerCase();
    item.textContent = `step ${step}: ${name} (${reason}) → ${route}`;
    return item;
  }));
}

$("run").addEventListener("change", (event) => { chosen = event.target.value; draw(); });
$("rank").addEventListener("change", (event) => { rank = event.target.value; draw(); });
addEventListener("resize", draw);

async function forever() {
  await look();
  setTimeout(forever, EVERY_MS);
}
forever();
