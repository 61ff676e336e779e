// A board of charts: grouped, filtered, all on the same stretch of one axis, with one read-out for all of them.
"use strict";

Esper.element = (name, properties = {}, ...children) => {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
};

Esper.GROUPS = { pinned: "Pinned", learning: "Learning", time: "Time", throughput: "Throughput", machine: "Machine", seeds: "Seeds", other: "Your own", ranks: "Ranks" };
const MOST_ROWS = 14; // of the read-out
const MOST_NAMES = 12; // of the legend
const MOST_EVENTS = 5; // of the read-out

class Board {
  // place: the element it fills; changed: called when the view changes, to keep it in the URL or to load detail;
  // isNaming: whether it says itself which color is which run's.
  constructor(place, { view = {}, changed = () => {}, isNaming = false } = {}) {
    this.view = { x: "step", log: false, smooth: 0, filter: "", range: null, folded: new Set(), drag: "zoom", base: "", pins: new Set(), ...view };
    this.changed = changed;
    this.isNaming = isNaming;
    this.runs = []; // {id, name, color, isHidden, series, detail}
    this.focus = "";
    this.events = []; // {step, text, tone} of the run `eventsOf`
    this.eventsOf = "";
    this.eventsVersion = 0;
    this.charts = new Map();
    this.sections = new Map();
    this.faults = new Map();
    this.metrics = new Map();
    this.isTouch = matchMedia("(pointer: coarse)").matches;
    this.bar = Esper.element("div", { className: "bar" });
    this.body = Esper.element("div", { className: "board" });
    this.readout = Esper.element("div", { className: "readout", hidden: true });
    this.readout.setAttribute("role", "status");
    place.append(this.bar, this.body, this.readout);
    this.controls();
    this.observer = new IntersectionObserver((entries) => {
      for (const entry of entries) {
        const chart = entry.target.chart;
        chart.isSeen = this.isEager || entry.isIntersecting;
        if (chart.isSeen && (chart.isDirty || !chart.figure)) chart.update();
        else if (chart.isSeen) chart.follow();
      }
    }, { rootMargin: "200px" });
    this.theme();
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { this.theme(); this.rebuildAll(); });
    addEventListener("beforeprint", () => this.showAll());
    addEventListener("pointerdown", (event) => { if (event.pointerType === "touch" && !event.target.closest(".chart")) this.point(null); });
  }

  theme() {
    const style = getComputedStyle(document.body);
    const read = (name, otherwise) => style.getPropertyValue(name).trim() || otherwise;
    this.colors = { ink: read("--chart-ink", "#333"), dim: read("--chart-dim", "#777"), line: read("--chart-line", "#999"), grid: read("--chart-grid", "#ddd"), bad: read("--bad", "#c22"), warn: read("--warn", "#a15c00") };
  }

  // -- controls --------------------------------------------------------------------------------------------

  controls() {
    const { view } = this;
    const pick = (values, value, set) => {
      const select = Esper.element("select", {}, ...Object.entries(values).map(([name, text]) => new Option(text, name)));
      select.value = value;
      select.addEventListener("change", () => set(select.value));
      return select;
    };
    const label = (text, control, className = "") => Esper.element("label", { className }, `${text} `, control);
    const filter = Esper.element("input", { type: "search", placeholder: "filter charts", value: view.filter });
    filter.setAttribute("aria-label", "filter charts by name");
    filter.addEventListener("input", () => this.set({ filter: filter.value }));
    const log = Esper.element("input", { type: "checkbox", checked: view.log });
    log.addEventListener("change", () => this.set({ log: log.checked }));
    const smooth = Esper.element("input", { type: "range", min: 0, max: 0.99, step: 0.01, value: view.smooth });
    const weight = Esper.element("output", { textContent: view.smooth || "off" });
    smooth.addEventListener("input", () => {
      weight.textContent = Number(smooth.value) || "off";
      this.set({ smooth: Number(smooth.value) });
    });
    this.whole = Esper.element("button", { type: "button", textContent: "show all steps", hidden: !view.range });
    this.whole.addEventListener("click", () => this.zoom(null));
    this.said = Esper.element("span", { className: "said" });
    this.said.setAttribute("role", "status");
    this.bar.append(
      filter,
      label("x", pick({ step: "step", epoch: "epoch", wall: "wall time", since: "time since start" }, view.x, (x) => this.set({ x, range: null }))),
      label("log scale", log),
      label("smoothing", Esper.element("span", {}, smooth, " ", weight)),
      label("drag to", pick({ zoom: "zoom", pan: "move" }, view.drag, (drag) => this.set({ drag })), "drag"),
      this.whole, this.said,
    );
  }

  set(change) {
    Object.assign(this.view, change);
    this.point(null);
    this.whole.hidden = !this.view.range;
    if ("filter" in change) this.arrange();
    else if ("x" in change || "log" in change || "drag" in change || "base" in change) this.rebuildAll();
    else this.update();
    this.changed(this.view);
  }

  // -- runs and metrics ------------------------------------------------------------------------------------

  shown() {
    return this.runs.filter((run) => !run.isHidden);
  }

  focused() {
    const shown = this.shown();
    return shown.find((run) => run.id === this.focus) || shown[0];
  }

  seriesOf(run) {
    return this.view.range && run.detail ? run.detail : run.series;
  }

  // Sets the events of a run, to be drawn when that run is in focus.
  setEvents(run, events) {
    Object.assign(this, { events, eventsOf: run });
    this.eventsVersion++;
  }

  // The events of the run in focus, each with its place on the axis.
  happened() {
    const run = this.focused();
    const series = run?.id === this.eventsOf && this.seriesOf(run);
    if (!series || !this.events.length) return [];
    const known = this.placed;
    if (known?.events === this.events && known.series === series && known.version === series.version && known.x === this.view.x) return known.found;
    const found = this.events.map((event) => ({ ...event, x: Esper.placeOf(series, this.view.x, event.step) }));
    this.placed = { events: this.events, series, version: series.version, x: this.view.x, found };
    return found;
  }

  // Shows these runs. Metrics that are new get a chart.
  show(runs, metrics) {
    const before = this.runs.map((run) => `${run.id}\0${run.color}\0${run.isHidden}`).join();
    this.runs = runs;
    let isNew = false;
    for (const metric of metrics) {
      if (this.metrics.has(metric.name)) continue;
      this.metrics.set(metric.name, metric);
      isNew = true;
    }
    if (isNew || !this.charts.size) this.arrange();
    if (before !== runs.map((run) => `${run.id}\0${run.color}\0${run.isHidden}`).join()) this.rebuildAll();
    else this.update();
  }

  // A chart that shows something else than one metric.
  extra(group, options) {
    if (this.charts.has(options.id)) return this.charts.get(options.id);
    const chart = new Esper.Chart(this, options);
    chart.group = group;
    chart.isExtra = true;
    chart.element.chart = chart;
    this.charts.set(options.id, chart);
    this.arrange();
    return chart;
  }

  section(group) {
    if (this.sections.has(group)) return this.sections.get(group);
    const grid = Esper.element("div", { className: "grid" });
    const count = Esper.element("small");
    const element = Esper.element("details", { className: `section ${group}`, open: !this.view.folded.has(group) }, Esper.element("summary", {}, Esper.element("h2", { textContent: Esper.GROUPS[group] || group }), " ", count), grid);
    element.addEventListener("toggle", () => {
      if (element.open) this.view.folded.delete(group);
      else this.view.folded.add(group);
      this.changed(this.view);
    });
    const section = { element, grid, count };
    this.sections.set(group, section);
    const order = Object.keys(Esper.GROUPS);
    const after = [...this.sections].find(([name]) => order.indexOf(name) > order.indexOf(group) && name !== group);
    this.body.insertBefore(element, after ? [...this.body.children].find((child) => order.findIndex((name) => child.classList.contains(name)) > order.indexOf(group)) || null : null);
    return section;
  }

  // Puts each chart into its section, and takes out what the filter does not name.
  arrange() {
    const wanted = this.view.filter.toLowerCase().split(/\s+/).filter(Boolean);
    const isWanted = (...texts) => wanted.every((word) => texts.join(" ").toLowerCase().includes(word));
    for (const metric of this.metrics.values()) {
      if (this.charts.has(metric.name)) continue;
      const chart = new Esper.Chart(this, { id: metric.name, title: metric.name, unit: metric.unit, isOwn: metric.source === "user", about: metric.description, draw: Esper.lines(metric.name) });
      chart.group = metric.group;
      chart.element.chart = chart;
      this.charts.set(metric.name, chart);
    }
    const byGroup = new Map();
    for (const name of this.sections.keys()) byGroup.set(name, []);
    for (const chart of this.charts.values()) {
      const group = this.view.pins.has(chart.id) ? "pinned" : chart.group;
      if (!byGroup.has(group)) byGroup.set(group, []);
      byGroup.get(group).push(chart);
    }
    for (const [group, charts] of byGroup) {
      const { element, grid, count } = this.section(group);
      const pins = [...this.view.pins];
      charts.sort((one, other) => (group === "pinned" ? pins.indexOf(one.id) - pins.indexOf(other.id) : Boolean(other.isExtra) - Boolean(one.isExtra)));
      const kept = charts.filter((chart) => isWanted(chart.id, chart.title, chart.about, group) && !chart.isNothing);
      if (kept.length !== grid.children.length || kept.some((chart, i) => grid.children[i] !== chart.element)) grid.replaceChildren(...kept.map((chart) => chart.element));
      for (const chart of charts) {
        if (kept.includes(chart)) this.observer.observe(chart.element);
        else { this.observer.unobserve(chart.element); chart.isSeen = false; }
      }
      element.hidden = !kept.length;
      count.textContent = `${kept.length} ${kept.length === 1 ? "chart" : "charts"}`;
    }
  }

  // Moves a chart to the top, or back to its section.
  pin(chart) {
    const isPinned = !this.view.pins.delete(chart.id);
    if (isPinned) this.view.pins.add(chart.id);
    this.arrange();
    this.changed(this.view);
    chart.element.focus();
  }

  // -- drawing ---------------------------------------------------------------------------------------------

  // Draws anew if anything has changed: the curves, the smoothing, or what the extra charts show (`extraVersion`).
  update() {
    this.say();
    const mark = [this.view.smooth, this.focus, this.extraVersion, this.eventsVersion, ...this.shown().map((run) => `${run.id} ${this.seriesOf(run)?.version} ${this.seriesOf(run) === run.detail && run.detail?.key}`)].join("\0");
    if (mark === this.drawn) return;
    this.drawn = mark;
    for (const chart of this.charts.values()) chart.update();
  }

  rebuild(chart) {
    setTimeout(() => { chart.drop(); chart.update(); });
  }

  rebuildAll() {
    this.say();
    this.drawn = "";
    for (const chart of this.charts.values()) {
      if (chart.isBusy) this.rebuild(chart);
      else { chart.drop(); chart.update(); }
    }
  }

  // Draws the charts that are out of sight too, for paper.
  showAll() {
    this.isEager = true;
    for (const section of this.sections.values()) section.element.open = true;
    for (const chart of this.charts.values()) {
      chart.isSeen = chart.element.isConnected;
      if (!chart.figure) chart.update();
    }
  }

  failed(what, error) {
    this.faults.set(what, error.message);
    console.error(error);
    this.say();
  }

  // What the reader should know about what is drawn.
  say() {
    const said = [...this.faults].map(([what, why]) => `${what} cannot be shown: ${why}`);
    const thinned = this.shown().map((run) => [run, this.seriesOf(run)]).filter(([, series]) => series && series.width > 1);
    if (thinned.length) {
      const width = Math.max(...thinned.map(([, series]) => series.width));
      said.push(`thinned: a point stands for up to ${width.toLocaleString("en")} steps, its band for their smallest and largest value${this.hasDetail ? "; zoom in for every step" : ""}`);
    }
    this.sayNames();
    this.said.textContent = said.join("; ");
    this.said.classList.toggle("bad", this.faults.size > 0);
  }

  // Which color is which run's, when there are several.
  sayNames() {
    const runs = this.isNaming && this.runs.length > 1 ? this.shown() : [];
    this.names ??= this.bar.appendChild(Esper.element("span"));
    const entries = runs.slice(0, MOST_NAMES).map((run) => [run.id === this.view.base ? `${run.name} (dashed)` : run.name, run.color]);
    Esper.legend(this.names, entries);
    if (runs.length > MOST_NAMES) this.names.append(`and ${runs.length - MOST_NAMES} more`);
    this.names.classList.add("names");
    this.names.hidden = !runs.length;
  }

  // -- the axis that all charts share ----------------------------------------------------------------------

  range() {
    if (this.view.range) return this.view.range;
    const lists = this.shown().filter((run) => run.series).map((run) => Esper.xs(run.series, this.view.x));
    const [first, last] = Esper.extent(lists.map((xs) => (xs.length > 2 ? [xs[0], xs[xs.length - 1], ...(lists.length > 4 ? [] : xs)] : xs))) || [0, 1];
    return first < last ? [first, last] : [first - 0.5, last + 0.5];
  }

  // Shows a stretch of the axis in all charts; null is all of it.
  zoom(range) {
    this.view.range = range;
    this.whole.hidden = !range;
    this.point(null);
    if (!range) for (const run of this.runs) run.detail = null;
    for (const chart of this.charts.values()) chart.follow();
    clearTimeout(this.settling);
    this.settling = setTimeout(() => { this.changed(this.view); this.update(); }, 150);
  }

  // A chart was dragged or zoomed by hand: the others follow.
  zoomed(chart) {
    const [start, end] = this.range();
    const { range } = chart;
    if (range.start === start && range.end === end) return;
    cancelAnimationFrame(this.frame);
    this.frame = requestAnimationFrame(() => this.zoom([range.start, range.end]));
  }

  // -- the read-out ----------------------------------------------------------------------------------------

  // Points at a place on the axis: a line in each chart, and the values of all runs there.
  point(x, chart) {
    this.pointed = x;
    const runs = this.shown().filter((run) => this.seriesOf(run));
    if (x === null || !chart || chart.isExtra || !runs.length) {
      this.readout.hidden = true;
      for (const each of this.charts.values()) each.cursor.hidden = true;
      return;
    }
    const found = [];
    for (const run of runs) {
      const series = this.seriesOf(run);
      const row = Esper.rowAt(series, this.view.x, x);
      if (row < 0 || !series.metrics[chart.id]) continue;
      found.push({ run, series, row, x: Esper.xs(series, this.view.x)[row], value: valueAt(series, chart.id, row) });
    }
    if (!found.length) return;
    const nearest = found.reduce((best, each) => (Math.abs(each.x - x) < Math.abs(best.x - x) ? each : best));
    // A run that is not there at this place has no value there.
    const [start, end] = this.range();
    const isHere = (each) => Math.abs(each.x - nearest.x) <= Math.max((end - start) / 50, (each.series.width || 1) * 1.01);
    this.pointed = nearest.x;
    for (const each of this.charts.values()) {
      const at = each.isExtra ? NaN : each.pixel(nearest.x);
      each.cursor.hidden = !Number.isFinite(at);
      if (!each.cursor.hidden) each.cursor.style.left = `${at}px`;
    }
    const events = this.happened().filter((event) => Math.abs(event.x - x) <= (end - start) / 100);
    this.fillReadout(chart, nearest, found.map((each) => (isHere(each) ? each : { ...each, value: { text: "–" } })), events);
  }

  fillReadout(chart, nearest, found, events) {
    const { columns } = nearest.series;
    const base = found.find((each) => each.run.id === this.view.base);
    const first = columns.first_step[nearest.row];
    const step = columns.step[nearest.row];
    const steps = first === step ? `step ${step.toLocaleString("en")}` : `steps ${first.toLocaleString("en")} to ${step.toLocaleString("en")}`;
    const attempt = nearest.series.segments.length > 1 ? `, attempt ${nearest.series.segments[columns.segment[nearest.row]].number}` : "";
    const head = `${steps}, epoch ${columns.epoch[nearest.row]}${attempt}, ${new Date(columns.time_ms[nearest.row]).toLocaleTimeString()} (${Esper.duration(columns.elapsed_s[nearest.row] * 1000)} after the start)`;
    found.sort((one, other) => (other.value.number ?? -Infinity) - (one.value.number ?? -Infinity));
    const rows = found.slice(0, MOST_ROWS).map(({ run, value }) => {
      const mark = Esper.element("i");
      mark.style.background = run.color;
      const apart = base && base.run !== run && Number.isFinite(value.number) && Number.isFinite(base.value.number) ? value.number - base.value.number : null;
      const cells = [Esper.element("td", {}, mark, run.name), Esper.element("td", { textContent: value.text, className: value.isOdd ? "bad" : "" })];
      if (base) cells.push(Esper.element("td", { textContent: apart === null ? "" : `${apart > 0 ? "+" : ""}${Esper.number(apart)}` }));
      return Esper.element("tr", {}, ...cells);
    });
    const more = found.length > MOST_ROWS ? [Esper.element("p", { textContent: `and ${found.length - MOST_ROWS} more runs` })] : [];
    const marks = events.slice(-MOST_EVENTS).map((event) => Esper.element("p", { className: event.tone, textContent: `┃ ${event.text}` }));
    this.readout.replaceChildren(Esper.element("p", {}, Esper.element("b", { textContent: chart.title }), ` ${head}`), ...marks, Esper.element("table", {}, Esper.element("tbody", {}, ...rows)), ...more);
    this.readout.hidden = false;
    const box = chart.element.getBoundingClientRect();
    const { width, height } = this.readout.getBoundingClientRect();
    const at = box.left + (Number.parseFloat(chart.cursor.style.left) || 0) + 20;
    this.readout.style.left = `${Math.max(4, at + width + 8 > innerWidth ? at - width - 36 : at)}px`;
    const top = box.bottom + height + 8 > innerHeight && box.top > height + 8 ? box.top - height - 4 : Math.min(box.bottom + 4, innerHeight - height - 4);
    this.readout.style.top = `${Math.max(4, top)}px`;
  }

  // Moves the read-out by one point, for those who use the keyboard.
  step(by, chart) {
    const run = this.shown().find((each) => this.seriesOf(each)?.metrics[chart.id]);
    if (!run) return;
    const series = this.seriesOf(run);
    const xs = Esper.xs(series, this.view.x);
    const [start, end] = this.range();
    const row = this.pointed === null || this.pointed === undefined ? Esper.rowAt(series, this.view.x, by > 0 ? start : end) : Esper.rowAt(series, this.view.x, this.pointed) + by;
    if (row >= 0 && row < xs.length) this.point(xs[row], chart);
  }
}
Esper.Board = Board;

// What a metric of a run is at a row, in words and as a number.
function valueAt(series, name, row) {
  const { last, min, max, mean, odd } = series.metrics[name];
  const strange = odd.find((each) => each[0] === row);
  const number = (mean || last)[row];
  const marks = strange ? [strange[1] ? "NaN" : "", strange[2] ? "+Inf" : "", strange[3] ? "−Inf" : ""].filter(Boolean) : [];
  if (number === null || number === undefined) return { text: marks.join(", ") || "–", isOdd: marks.length > 0 };
  const spread = min && min[row] !== max[row] ? ` (${Esper.number(min[row])} to ${Esper.number(max[row])})` : "";
  return { number, text: `${Esper.number(number)}${spread}${marks.length ? `, ${marks.join(", ")}` : ""}`, isOdd: marks.length > 0 };
}
