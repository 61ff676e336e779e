// From columns, as the gateway and the report give them, to what a chart draws: points, bands, marks. No drawing here.
"use strict";

const Esper = {};

// Units as people write them on an axis; the rest of the catalogue's units are not units that a reader knows.
Esper.UNITS = { ms: "ms", "%": "%", GB: "GiB", rate: "per second", ratio: "share", count: "count", s: "s", bytes: "bytes" };

// A mean and the width of its band: the metric it is drawn with, and the width in terms of another metric.
Esper.MEANS = {
  loss: ["loss_ewma", "loss_volatility", (width) => width],
  gradient_norm: ["grad_norm_ewma", "grad_var", Math.sqrt],
};

// What the time of a step is made up of, from below, with the metrics; as ``phases`` of the report's findings has it.
const INSIDE = { forward: "esper.forward_ms", backward: "esper.backward_ms", optimizer: "esper.optimizer_ms" };
const PHASE_METRICS = { "input wait": "input_wait_ms", ...INSIDE, hook: "hook_latency_ms", finalize: "kasmina.finalize_ms" };
Esper.PHASES = [...Object.keys(PHASE_METRICS), "rest"];

// A name as it can be shown: characters that are invisible, or that turn the direction of a text, as their numbers.
Esper.printable = (text) => String(text).replace(/[\p{Cc}\p{Cf}\p{Co}\p{Cs}\p{Zl}\p{Zp}]/gu, (each) => `\\u${each.codePointAt(0).toString(16).padStart(4, "0")}`);

Esper.number = (value) => {
  if (value === undefined || value === null) return "–";
  if (Number.isNaN(value)) return "NaN";
  if (!Number.isFinite(value)) return value > 0 ? "+Inf" : "−Inf";
  const size = Math.abs(value);
  if (size >= 1e15 || (size > 0 && size < 1e-4)) return value.toExponential(3);
  return size >= 1000 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(5)));
};

Esper.duration = (ms) => {
  if (!Number.isFinite(ms)) return "–";
  const s = Math.max(ms, 0) / 1000;
  if (s < 60) return `${s.toFixed(s < 10 ? 1 : 0)} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min ${Math.floor(s % 60)} s`;
  return s < 86400 ? `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min` : `${Math.floor(s / 86400)} d ${Math.floor((s % 86400) / 3600)} h`;
};

// -- the axis of x -----------------------------------------------------------------------------------------

// Where each row stands on the axis; kept with the series until it has other rows.
Esper.xs = (series, mode) => {
  const columns = series.columns;
  const rows = columns.step.length;
  series.cache ??= {};
  const known = series.cache[mode];
  if (known && known.version === series.version && known.xs.length === rows) return known.xs;
  let xs;
  if (mode === "epoch") xs = epochs(columns);
  else if (mode === "wall") xs = columns.time_ms.map((ms) => ms - new Date(ms).getTimezoneOffset() * 60_000); // Bokeh's axis has no time zone
  else if (mode === "since") xs = columns.elapsed_s.map((s) => s * 1000);
  else xs = columns.step;
  series.cache[mode] = { version: series.version, xs };
  return xs;
};

// Steps of one epoch are spread over it; the last epoch is taken to be as long as the one before.
function epochs(columns) {
  const { epoch, step } = columns;
  const xs = new Array(step.length);
  let long = 0;
  for (let from = 0; from < step.length;) {
    let to = from;
    while (to < step.length && epoch[to] === epoch[from] && columns.segment[to] === columns.segment[from]) to++;
    const isLast = to === step.length;
    const steps = isLast ? Math.max(long, step[to - 1] - step[from] + 1) : Math.max(step[to] - step[from], step[to - 1] - step[from] + 1);
    for (let row = from; row < to; row++) xs[row] = epoch[row] + (step[row] - step[from]) / (steps || 1);
    long = steps;
    from = to;
  }
  return xs;
}

// The row nearest to a place on the axis; -1 when there is none. Rows done again later do not count.
Esper.rowAt = (series, mode, x) => {
  const xs = Esper.xs(series, mode);
  let best = -1;
  if (!series.columns.is_again.includes(1)) { // xs rise
    let [low, high] = [0, xs.length - 1];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (xs[middle] < x) low = middle + 1;
      else high = middle;
    }
    if (!xs.length) return -1;
    return low > 0 && Math.abs(xs[low - 1] - x) <= Math.abs(xs[low] - x) ? low - 1 : low;
  }
  xs.forEach((each, row) => {
    if (!series.columns.is_again[row] && (best < 0 || Math.abs(each - x) < Math.abs(xs[best] - x))) best = row;
  });
  return best;
};

// Where a step is on the axis, or would be.
Esper.placeOf = (series, mode, step) => {
  if (mode === "step") return step;
  const xs = Esper.xs(series, mode);
  const { step: steps, is_again: again } = series.columns;
  let [low, high] = [-1, -1]; // the rows before and after
  for (let row = 0; row < xs.length && high < 0; row++) {
    if (again[row]) continue;
    if (steps[row] <= step) low = row;
    else high = row;
  }
  if (low < 0 || high < 0) return xs[Math.max(low, high)] ?? step;
  return xs[low] + ((step - steps[low]) / (steps[high] - steps[low])) * (xs[high] - xs[low]);
};

// The rows within a stretch of the axis, as the first and last step; with the rows at its edges.
Esper.stepsWithin = (series, mode, [start, end]) => {
  const xs = Esper.xs(series, mode);
  let [first, last] = [Infinity, -Infinity];
  xs.forEach((x, row) => {
    if ((xs[row + 1] ?? x) < start || (xs[row - 1] ?? x) > end) return;
    first = Math.min(first, series.columns.first_step[row]);
    last = Math.max(last, series.columns.step[row]);
  });
  return first <= last ? [first, last] : null;
};

Esper.extent = (lists) => {
  let [low, high] = [Infinity, -Infinity];
  for (const list of lists) {
    for (const value of list) {
      if (value < low) low = value;
      if (value > high) high = value;
    }
  }
  return low <= high ? [low, high] : null;
};

// The largest value that is drawn: with larger ones an axis has no ends that a number can express.
const MOST = 1e300;

// -- curves ------------------------------------------------------------------------------------------------

// What is drawn of one metric of one run. A missing value is left out and the curve goes on; NaN interrupts it.
Esper.curve = (series, name, { x: mode, smooth }) => {
  const values = series.metrics[name];
  const found = { x: [], y: [], raw: null, bandX: [], low: [], high: [], againX: [], againY: [], odd: [], isThinned: false };
  if (!values) return found;
  const xs = Esper.xs(series, mode);
  const again = series.columns.is_again;
  const odd = new Map(values.odd.map((each) => [each[0], each]));
  const main = values.mean || values.last;
  for (let row = 0; row < xs.length; row++) {
    const strange = odd.get(row);
    if (strange) {
      const [, nan, up, down, first] = strange;
      const at = mode === "step" && first !== undefined && series.width > 1 ? first : xs[row];
      if (nan) found.odd.push([at, "nan", first ?? series.columns.step[row]]);
      if (up) found.odd.push([at, "up", first ?? series.columns.step[row]]);
      if (down) found.odd.push([at, "down", first ?? series.columns.step[row]]);
    }
    const value = main[row];
    if (Math.abs(value) > MOST) found.odd.push([xs[row], value > 0 ? "large" : "small", series.columns.step[row]]);
    if (value === null || value === undefined || Math.abs(value) > MOST) {
      if (!strange && (value === null || value === undefined)) continue;
      if (!again[row]) { found.x.push(xs[row]); found.y.push(NaN); }
    } else if (again[row]) {
      found.againX.push(xs[row]);
      found.againY.push(value);
    } else {
      found.x.push(xs[row]);
      found.y.push(value);
      if (values.min && (values.min[row] !== value || values.max[row] !== value)) found.isThinned = true;
    }
    if (values.min && value !== null && value !== undefined && !again[row]) {
      found.bandX.push(xs[row]);
      found.low.push(drawn(values.min[row]));
      found.high.push(drawn(values.max[row]));
    }
  }
  if (!found.isThinned) found.bandX = found.low = found.high = [];
  if (smooth > 0) {
    found.raw = found.y;
    found.y = smoothed(found.y, smooth);
  }
  return found;
};

// Whether a value has a place on an axis. A missing one is null, which Math.abs makes a zero.
const isDrawn = (value) => Number.isFinite(value) && Math.abs(value) <= MOST;
const drawn = (value) => (isDrawn(value) ? value : NaN);

// An exponential moving average without the bias of its start. Values that are not finite stay where they are.
function smoothed(values, weight) {
  let [mean, sum] = [0, 0];
  return values.map((value) => {
    if (!Number.isFinite(value)) return value;
    mean = weight * mean + (1 - weight) * value;
    sum = weight * sum + (1 - weight);
    const made = mean / sum;
    return Math.abs(made - value) < 1e-12 * Math.abs(value) ? value : made; // a level curve stays level
  });
}

// What a chart shows of a metric, as a table: a line for each point of each run.
Esper.csv = (name, board) => {
  const cell = (text) => (/[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
  const plain = (text) => cell(/^[=+\-@\t\uff1d\uff0b\uff0d\uff20]/.test(text) ? `'${text}` : text); // no formula
  const lines = [["run", "attempt", "first_step", "last_step", "epoch", "time", plain(name), "min", "max"].join(",")];
  for (const run of board.shown()) {
    const series = board.seriesOf(run);
    const values = series?.metrics[name];
    if (!values) continue;
    const { columns, segments } = series;
    const odd = new Map(values.odd.map(([row, nan, up]) => [row, nan ? "NaN" : up ? "Infinity" : "-Infinity"]));
    columns.step.forEach((step, row) => {
      const value = (values.mean || values.last)[row] ?? odd.get(row);
      if (value === undefined || value === null) return;
      const [low, high] = [values.min?.[row] ?? "", values.max?.[row] ?? ""];
      lines.push([plain(run.name), segments[columns.segment[row]].number, columns.first_step[row], step, columns.epoch[row], new Date(columns.time_ms[row]).toISOString(), value, low, high].join(","));
    });
  }
  return `${lines.join("\n")}\n`;
};

// Gives a text to the browser's downloads.
Esper.save = (name, content) => {
  const url = URL.createObjectURL(content);
  Esper.element("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
};

// The moving average that was recorded with a metric, and its band; null when it was not recorded.
Esper.meanOf = (series, name, mode) => {
  const [mean, width, of] = Esper.MEANS[name] || [];
  if (!mean || !series.metrics[mean]) return null;
  const xs = Esper.xs(series, mode);
  const means = series.metrics[mean].mean || series.metrics[mean].last;
  const widths = series.metrics[width] && (series.metrics[width].mean || series.metrics[width].last);
  const found = { x: [], y: [], low: [], high: [] };
  for (let row = 0; row < xs.length; row++) {
    if (!isDrawn(means[row]) || series.columns.is_again[row]) continue;
    const half = widths && Number.isFinite(widths[row]) ? of(widths[row]) : 0;
    found.x.push(xs[row]);
    found.y.push(means[row]);
    found.low.push(means[row] - half);
    found.high.push(means[row] + half);
  }
  return found.x.length ? found : null;
};

// How the time of a step is made up, one list for each phase that was recorded; null when nothing of it was.
Esper.phases = (series, mode) => {
  const all = Esper.xs(series, mode);
  const lists = Object.values(PHASE_METRICS).map((name) => series.metrics[name] && (series.metrics[name].mean || series.metrics[name].last));
  const whole = series.metrics.step_latency_ms && (series.metrics.step_latency_ms.mean || series.metrics.step_latency_ms.last);
  if (!whole && !lists.some(Boolean)) return null;
  const found = { x: [] };
  const recorded = Esper.PHASES.filter((phase, i) => (phase === "rest" ? whole : lists[i]));
  for (const phase of recorded) found[phase] = [];
  for (let row = 0; row < all.length; row++) {
    if (series.columns.is_again[row]) continue;
    const isTimed = whole && Number.isFinite(whole[row]);
    const parts = Object.fromEntries(lists.map((list, i) => [Esper.PHASES[i], list && isDrawn(list[row]) ? list[row] : 0]));
    if (whole && !isTimed && !Object.values(parts).some(Boolean)) continue;
    found.x.push(all[row]);
    parts.rest = isTimed ? Math.max(whole[row] - parts.hook - parts.finalize, 0) : 0;
    const inside = Object.keys(INSIDE).reduce((sum, part) => sum + parts[part], 0);
    if (inside <= parts.rest) parts.rest -= inside;
    else for (const part of Object.keys(INSIDE)) parts[part] = 0; // a GPU's own times, which may go on after the step
    for (const phase of recorded) found[phase].push(parts[phase]);
  }
  return found.x.length ? { columns: found, phases: recorded } : null;
};

// Adds what is new to a series: keeps the first `keep` rows and appends the others.
Esper.merge = (old, answer) => {
  if (!old || !answer.keep) return { ...answer, version: (old?.version || 0) + 1 };
  if (!Object.keys(answer.columns).length) return { ...old, ...answer, columns: old.columns, metrics: old.metrics }; // nothing new
  const join = (one, other) => (one || []).slice(0, answer.keep).concat(other);
  const columns = {};
  for (const [name, list] of Object.entries(answer.columns)) columns[name] = join(old.columns[name], list);
  const rows = columns.step.length;
  const added = rows - answer.keep;
  const metrics = {};
  for (const name of new Set([...Object.keys(old.metrics), ...Object.keys(answer.metrics)])) {
    const [before, now] = [old.metrics[name], answer.metrics[name]];
    const nothing = (count) => new Array(count).fill(null);
    metrics[name] = { odd: (before?.odd || []).filter((each) => each[0] < answer.keep).concat(now?.odd || []) };
    for (const kind of ["last", "min", "max", "mean"]) {
      if (!before?.[kind] && !now?.[kind]) continue; // of buckets with one step each, only the last value comes
      metrics[name][kind] = (before?.[kind] || before?.last || nothing(answer.keep)).slice(0, answer.keep).concat(now?.[kind] || now?.last || nothing(added));
    }
  }
  return { ...answer, columns, metrics, version: old.version + 1 };
};
