// One chart each, drawn by Bokeh. What the charts show comes from series.js.
"use strict";

Esper.COLORS = ["#3b7ddd", "#e0702d", "#2f9e5b", "#c04dd0", "#d9363e", "#9a7d0a", "#1a9ba1", "#7a6ff0", "#b5577f", "#5f8f1f", "#8c6d5a", "#5b7083"];
Esper.PHASE_COLORS = {
  ...{ "input wait": "#e0702d", forward: "#2f9e5f", backward: "#8a6d1d", optimizer: "#b8336a" },
  ...{ hook: "#c04dd0", finalize: "#1a9ba1", rest: "#3b7ddd" },
};
Esper.STAGE_COLORS = ["#c7d0d9", "#6e7079", "#8ab8ff", "#3274d9", "#ff9830", "#b877d9", "#e0c52a", "#37872d", "#c4162a", "#8f3bb8", "#96d98d", "#7d7d82"];
Esper.AXES = { step: "step", epoch: "epoch", wall: "local time", since: "time since the start" };

// Of values that have no place on the axis: where the mark is, the mark, and what it says.
const ODD = {
  nan: [0.5, "x", "✕ NaN"], up: [0.95, "triangle", "▲ +Inf"], down: [0.05, "inverted_triangle", "▼ -Inf"],
  large: [0.95, "triangle", "▲ above 1e300"], small: [0.05, "inverted_triangle", "▼ below -1e300"],
};
const FEW = 60; // a curve with fewer points shows them
const MANY_EVENTS = 20; // more are marked at the bottom only
const MOST_ODD = 500; // marks of values that are not finite, for each run
const LEFT = 62; // the same for all charts, so that equal steps stand below each other

const fileName = (title) => title.replace(/[^\w.-]+/g, "_");

class Chart {
  // board: the board it belongs to; kind: lines, stack, bars or heat.
  constructor(board, { id, title, unit = "", isOwn = false, about = "", height = 230, isLinear = false, isFromZero = false, draw }) {
    Object.assign(this, { board, id, title, unit, isOwn, about, height, isLinear, isFromZero, draw, isDirty: true, isSeen: false });
    this.element = Esper.element("figure", { className: "chart", tabIndex: 0 });
    this.element.setAttribute("aria-label", `${title}: ${about}`);
    this.caption = Esper.element("figcaption", {}, Esper.element("b", { textContent: title }), " ", Esper.element("small", { textContent: about, title: about }));
    this.place = Esper.element("div", { className: "place" });
    this.place.style.height = `${height}px`;
    this.cursor = Esper.element("i", { className: "cursor", hidden: true });
    this.note = Esper.element("small", { className: "note" });
    this.place.append(this.cursor);
    this.acts = Esper.element("span", { className: "acts" });
    this.act("⤢", `make ${title} larger or smaller`, () => this.enlarge());
    this.act("pin", `move ${title} to the top, or back`, () => board.pin(this));
    this.act("PNG", `save ${title} as a picture`, () => this.save());
    if (draw.metric) this.act("CSV", `save ${title} as a table`, () => Esper.save(`${fileName(title)}.csv`, new Blob([Esper.csv(draw.metric, board)], { type: "text/csv" })));
    this.element.append(this.caption, this.acts, this.place, this.note);
    this.element.addEventListener("keydown", (event) => this.key(event));
    // A finger leaves when it is lifted: what it has pointed at stays until it touches something else.
    this.element.addEventListener("pointerleave", (event) => { if (event.pointerType !== "touch") board.point(null); });
    this.element.addEventListener("blur", () => { if (!board.isTouch) board.point(null); });
  }

  act(text, title, work) {
    const button = Esper.element("button", { type: "button", textContent: text, title });
    button.setAttribute("aria-label", title);
    button.addEventListener("click", work);
    this.acts.append(button);
  }

  // Makes the chart as wide as the page, and higher; and back.
  enlarge() {
    const isLarge = this.element.classList.toggle("large");
    this.place.style.height = `${isLarge ? Math.max(this.height, Math.min(520, innerHeight - 140)) : this.height}px`;
    this.names = undefined; // the bars of seeds set their height themselves
    this.board.rebuild(this);
    if (isLarge) this.element.scrollIntoView({ block: "nearest" });
  }

  // Saves the chart as a picture, on the color of its card.
  async save() {
    if (!this.plot) return;
    const drawn = this.plot.export("png", true).canvas;
    const picture = Object.assign(document.createElement("canvas"), { width: drawn.width, height: drawn.height });
    const context = picture.getContext("2d");
    context.fillStyle = getComputedStyle(this.element).backgroundColor;
    context.fillRect(0, 0, drawn.width, drawn.height);
    context.drawImage(drawn, 0, 0);
    Esper.save(`${fileName(this.title)}.png`, await new Promise((done) => picture.toBlob(done)));
  }

  // Builds the figure; the sources of its curves are filled by `draw`.
  async build() {
    const { view, colors } = this.board;
    const axis = { step: "linear", epoch: "linear", wall: "datetime", since: "timedelta" }[view.x];
    const Models = Bokeh.Models;
    const [start, end] = this.board.range();
    this.range = new Bokeh.Range1d({ start, end });
    this.tools = { zoom: new (Models.get("BoxZoomTool"))({ dimensions: "width" }), pan: new (Models.get("PanTool"))({ dimensions: "width" }) };
    const wheel = new (Models.get("WheelZoomTool"))({ dimensions: "width", modifiers: { ctrl: true } });
    this.figure = Bokeh.Plotting.figure({
      x_range: this.range, x_axis_type: axis, y_axis_type: view.log && !this.isLinear ? "log" : "linear",
      tools: [this.tools.zoom, this.tools.pan, wheel], toolbar_location: null, window_axis: "x",
      sizing_mode: "stretch_both", min_border_left: LEFT, min_border_right: 12, min_border_top: 6,
      background_fill_color: null, border_fill_color: null, outline_line_color: null,
    });
    if (this.isFromZero) this.figure.y_range = new Bokeh.Range1d({ start: 0, end: 1 });
    this.figure.toolbar.active_drag = this.board.isTouch ? null : this.tools[view.drag];
    this.figure.toolbar.active_scroll = wheel;
    for (const each of this.figure.axes) {
      Object.assign(each, { axis_label_text_color: colors.dim, major_label_text_color: colors.ink, axis_line_color: colors.line, major_tick_line_color: colors.line, minor_tick_line_color: null, axis_label_text_font_style: "normal", axis_label_text_font_size: "11px", major_label_text_font_size: "11px", axis_label_standoff: 4 });
    }
    for (const grid of this.figure.grids) grid.grid_line_color = colors.grid;
    this.figure.xaxes[0].axis_label = Esper.AXES[view.x];
    if (!view.log || this.isLinear) this.figure.yaxes[0].formatter = new (Models.get("BasicTickFormatter"))({ power_limit_high: 7, power_limit_low: -4 });
    const label = Esper.UNITS[this.unit] || (this.isOwn && this.unit); // of the others, some units only repeat the name
    if (label) this.figure.yaxes[0].axis_label = label;
    if (view.x === "step") this.figure.xaxes[0].ticker = new (Models.get("BasicTicker"))({ min_interval: 1 }); // no two ticks for one step
    if (view.x === "step") this.figure.xaxes[0].formatter = new (Models.get("NumeralTickFormatter"))({ format: "0,0" });
    if (view.x === "wall") this.figure.xaxes[0].formatter = new (Models.get("DatetimeTickFormatter"))({ seconds: "%H:%M:%S", minsec: "%H:%M:%S", minutes: "%H:%M", hourmin: "%H:%M", hours: "%H:%M", days: "%d %b", months: "%b %Y", years: "%Y" });
    this.edge = new Bokeh.Range1d({ start: 0, end: 1 });
    this.figure.extra_y_ranges = new Map([["edge", this.edge]]);
    this.sources = new Map();
    this.spans = [];
    this.renderers = [];
    this.draw(this);
    this.figure.on_event("mousemove", (event) => this.board.point(event.x, this));
    this.figure.on_event("tap", (event) => this.board.point(event.x, this));
    this.figure.on_event("mouseleave", () => { if (!this.board.isTouch) this.board.point(null); });
    this.figure.on_event("doubletap", () => this.board.zoom(null));
    this.document = new Bokeh.Document();
    this.document.add_root(this.figure);
    this.views = await Bokeh.embed.add_document_standalone(this.document, this.place);
    this.range.change.connect(() => this.board.zoomed(this));
    this.plot = [...this.views][0];
  }

  // Draws what is new. While a figure is being built, drawing waits for it.
  async update() {
    this.isDirty = true;
    if (!this.isSeen || this.isBusy) return;
    this.isBusy = true;
    try {
      while (this.isDirty && this.isSeen) {
        this.isDirty = false;
        if (this.figure) {
          this.draw(this);
          this.follow();
        } else {
          await this.build();
        }
      }
      this.board.faults.delete(this.title);
    } catch (error) {
      this.drop();
      this.isSeen = false; // until it is scrolled to again, or there is something new
      this.board.failed(this.title, error);
    } finally {
      this.isBusy = false;
    }
  }

  // Shows the stretch of the axis that all charts show.
  follow() {
    if (!this.figure) return;
    const [start, end] = this.board.range();
    if (this.range.start !== start || this.range.end !== end) this.range.setv({ start, end });
  }

  // Takes the figure away, to be built anew.
  drop() {
    if (this.document) {
      this.views?.clear();
      this.document.clear();
    }
    this.figure = this.document = this.plot = this.names = this.mapper = undefined;
    this.place.replaceChildren(this.cursor);
    this.isDirty = true;
  }

  // The source of a curve, filled with its columns; the curve itself is made the first time by `make`.
  fill(key, data, make) {
    let source = this.sources.get(key);
    if (source) {
      source.data = data;
      return;
    }
    source = new Bokeh.ColumnDataSource({ data });
    this.sources.set(key, source);
    const made = make(source);
    if (made && made.y_range_name !== "edge") this.renderers.push(made);
    if (made && !this.isFromZero && this.figure.y_range.properties?.renderers) this.figure.y_range.renderers = [...this.renderers];
  }

  // Removes the curves of runs that are no longer shown: the figure is built anew without them.
  keepOnly(keys) {
    return [...this.sources.keys()].every((key) => keys.has(key));
  }

  seams(places, color) {
    for (const place of places) {
      const key = `${place}\0${color}`;
      if (this.spans.includes(key)) continue;
      this.spans.push(key);
      this.figure.add_layout(new (Bokeh.Models.get("Span"))({ location: place, dimension: "height", line_color: color, line_dash: "dotted", line_width: 1.2, line_alpha: 0.8 }));
    }
  }

  // Where a place on the axis is, in pixels of the chart; NaN when it cannot be seen.
  pixel(x) {
    if (!this.plot?.frame) return NaN;
    const { left, width } = this.plot.frame.bbox;
    const share = (x - this.range.start) / (this.range.end - this.range.start);
    return share >= 0 && share <= 1 ? left + share * width : NaN;
  }

  key(event) {
    const [start, end] = this.board.range();
    const middle = (start + end) / 2;
    const wide = end - start;
    const at = this.board.pointed ?? middle;
    const from = Math.min(Math.max(at - wide / 4, start), end - wide / 2); // what is zoomed into is within what was shown
    const moves = {
      ArrowLeft: () => this.board.step(-1, this), ArrowRight: () => this.board.step(1, this),
      "+": () => this.board.zoom([from, from + wide / 2]), "-": () => this.board.zoom([middle - wide, middle + wide]),
      "[": () => this.board.zoom([start - wide / 4, end - wide / 4]), "]": () => this.board.zoom([start + wide / 4, end + wide / 4]),
      0: () => this.board.zoom(null), Escape: () => this.board.point(null),
    };
    const move = moves[event.key === "=" ? "+" : event.key];
    if (!move || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    move();
  }
}
Esper.Chart = Chart;

// -- what charts draw --------------------------------------------------------------------------------------

// The curves of a metric, for every run that is shown.
Esper.lines = (name) => Object.assign((chart) => lines(name, chart), { metric: name });

function lines(name, chart) {
  const { board, figure } = chart;
  const { view } = board;
  const keys = new Set();
  const runs = board.shown();
  const isFew = runs.length <= 4;
  const all = [];
  const resumed = [];
  for (const run of runs) {
    const series = board.seriesOf(run);
    if (!series?.metrics[name]) continue;
    const curve = Esper.curve(series, name, view);
    const mean = isFew && !view.smooth && Esper.meanOf(series, name, view.x);
    const isBase = run.id === view.base;
    const width = isBase ? 2.8 : 1.6;
    const faded = curve.raw || mean ? 0.35 : 1;
    const { color } = run;
    all.push([run, curve]);
    if (curve.bandX.length) {
      keys.add(`${run.id} band`);
      chart.fill(`${run.id} band`, { x: curve.bandX, low: curve.low, high: curve.high }, (source) => {
        // The area alone would hide a spike: it is as narrow as a pixel, and pale.
        for (const edge of ["low", "high"]) figure.line({ field: "x" }, { field: edge }, { source, line_color: color, line_alpha: isFew ? 0.45 : 0.3, line_width: 1 });
        return figure.varea({ field: "x" }, { field: "low" }, { field: "high" }, { source, fill_color: color, fill_alpha: isFew ? 0.18 : 0.1 });
      });
    }
    if (mean) {
      keys.add(`${run.id} spread`).add(`${run.id} mean`);
      chart.fill(`${run.id} spread`, { x: mean.x, low: mean.low, high: mean.high }, (source) =>
        figure.varea({ field: "x" }, { field: "low" }, { field: "high" }, { source, fill_color: color, fill_alpha: 0.22 }));
    }
    if (curve.raw) {
      keys.add(`${run.id} raw`);
      chart.fill(`${run.id} raw`, { x: curve.x, y: curve.raw }, (source) =>
        figure.line({ field: "x" }, { field: "y" }, { source, line_color: color, line_alpha: 0.25, line_width: 1 }));
    }
    keys.add(`${run.id} line`);
    chart.fill(`${run.id} line`, { x: curve.x, y: curve.y }, (source) =>
      figure.line({ field: "x" }, { field: "y" }, { source, line_color: color, line_width: mean ? 1 : width, line_alpha: curve.raw ? 1 : faded, line_dash: isBase ? [6, 3] : [], line_join: "round" }));
    if (mean) {
      chart.fill(`${run.id} mean`, { x: mean.x, y: mean.y }, (source) =>
        figure.line({ field: "x" }, { field: "y" }, { source, line_color: color, line_width: width + 0.4, line_join: "round" }));
    }
    if (curve.againX.length) {
      keys.add(`${run.id} again`);
      chart.fill(`${run.id} again`, { x: curve.againX, y: curve.againY }, (source) =>
        figure.line({ field: "x" }, { field: "y" }, { source, line_color: color, line_alpha: 0.3, line_dash: [2, 3] }));
    }
    const points = curve.x.length < FEW ? curve : { x: [], y: [] };
    keys.add(`${run.id} points`);
    chart.fill(`${run.id} points`, { x: points.x, y: points.y }, (source) =>
      figure.scatter({ field: "x" }, { field: "y" }, { source, size: 4, fill_color: color, line_color: null }));
    const found = seams(series, view.x);
    chart.seams(found.map((each) => each.x), color);
    if (isFew) resumed.push(...found.map((each) => `┊ ${runs.length > 1 ? `${run.name}: ` : ""}${each.text}`));
  }
  for (const mark of board.marks || []) {
    const series = runs[0] && board.seriesOf(runs[0]);
    if (series) chart.seams([Esper.placeOf(series, view.x, mark.step)], board.colors.bad);
    resumed.push(`┊ ${mark.text}`);
  }
  const events = board.happened();
  if (events.length || chart.sources.has("events")) {
    keys.add("events");
    const color = events.map((event) => board.colors[event.tone] || board.colors.dim);
    chart.fill("events", { x: events.map((event) => event.x), low: events.map(() => 0), high: events.map(() => (events.length > MANY_EVENTS ? 0.06 : 1)), color }, (source) =>
      figure.segment({ field: "x" }, { field: "low" }, { field: "x" }, { field: "high" }, { source, y_range_name: "edge", line_color: { field: "color" }, line_alpha: 0.5, line_width: 1 }));
  }
  const odd = { x: [], y: [], marker: [], color: [] };
  const counts = Object.fromEntries(Object.keys(ODD).map((kind) => [kind, 0]));
  const first = {};
  for (const [run, curve] of all) {
    for (const [, kind, step] of curve.odd) {
      counts[kind]++;
      first[kind] ??= step;
    }
    for (const [x, kind] of curve.odd.slice(0, MOST_ODD)) {
      odd.x.push(x);
      odd.y.push(ODD[kind][0]);
      odd.marker.push(ODD[kind][1]);
      odd.color.push(run.color);
    }
  }
  // Of a curve that is level, Bokeh shows a range of 2, in which a learning rate of 0.001 cannot be told from 0.
  const level = all.flatMap(([, curve]) => curve.y).find(Number.isFinite);
  if (!view.log && level) figure.y_range.default_span = Math.abs(level) * 0.5;
  keys.add("odd");
  chart.fill("odd", odd, (source) =>
    figure.scatter({ field: "x" }, { field: "y" }, { source, y_range_name: "edge", marker: { field: "marker" }, size: 9, line_width: 2, line_color: { field: "color" }, fill_color: { field: "color" } }));
  const said = Object.entries(counts).filter(([, count]) => count).map(([kind, count]) => `${ODD[kind][2]} ${count > 1 ? `at ${count} places, first ` : ""}in step ${first[kind].toLocaleString("en")}`);
  const isBlank = all.length > 0 && !all.some(([, curve]) => curve.y.some(Number.isFinite) || curve.againY.length);
  if (isBlank) said.unshift("no value that can be drawn:");
  if (isBlank || chart.sources.has("blank")) { // without any value, Bokeh has no axes
    keys.add("blank");
    chart.fill("blank", isBlank ? { x: board.range(), y: [0, 1] } : { x: [], y: [] }, (source) => figure.line({ field: "x" }, { field: "y" }, { source, line_alpha: 0 }));
    figure.yaxes[0].major_label_text_alpha = isBlank ? 0 : 1;
  }
  if (view.log && all.some(([, curve]) => curve.y.some((value) => value <= 0))) resumed.unshift("values of 0 and below have no place on a log scale");
  chart.note.textContent = [...said, ...resumed.slice(0, 3)].join("   ");
  chart.note.classList.toggle("bad", said.length > 0);
  if (!chart.keepOnly(keys)) board.rebuild(chart);
}

// Where an attempt resumed, or the numbers of the steps went back, and what to say of it.
function seams(series, mode) {
  if (series.segments.length < 2) return [];
  const xs = Esper.xs(series, mode);
  const found = [];
  const { is_again: again, segment: segments, first_step: first } = series.columns;
  let before = segments[0];
  let isFirst = true; // whether all rows before were done again
  for (let row = 0; row < xs.length; row++) {
    if (again[row]) continue;
    const segment = segments[row];
    if (segment !== before) {
      const { number, why } = series.segments[segment];
      const step = first[row].toLocaleString("en");
      const how = isFirst ? `again from step ${step} (dotted: before)` : `from step ${step}`;
      found.push({ x: xs[row], text: why === "back" ? `went back, and on ${how}` : `attempt ${number} ${how}` });
    }
    before = segment;
    isFirst = false;
  }
  return found;
}

// Where the time of a step goes, stacked, for one run.
Esper.stack = (chart) => {
  const { board, figure } = chart;
  const run = board.focused();
  const series = run && board.seriesOf(run);
  const found = series && Esper.phases(series, board.view.x);
  if (!found) return;
  chart.caption.querySelector("small").textContent = `ms, stacked${found.phases.includes("forward") ? "" : "; rest is forward, backward and optimizer"}${board.shown().length > 1 ? `; of ${run.name}` : ""}`;
  const key = found.phases.join();
  let below = found.columns.x.map(() => 0);
  const columns = { x: found.columns.x, base: below };
  found.phases.forEach((phase, place) => {
    below = below.map((value, row) => value + found.columns[phase][row]);
    columns[`top${place}`] = below;
  });
  chart.fill(key, columns, (source) => {
    found.phases.forEach((phase, place) => {
      const color = Esper.PHASE_COLORS[phase];
      chart.renderers.push(figure.varea({ field: "x" }, { field: place ? `top${place - 1}` : "base" }, { field: `top${place}` }, { source, fill_color: color, fill_alpha: 0.75 }));
    });
  });
  // One slow step must not flatten all others: what is above is cut off here; the chart of step_latency_ms has it.
  const sorted = [...below].sort((a, b) => a - b);
  const [usual, most] = [sorted[Math.floor((sorted.length - 1) * 0.97)], sorted.at(-1)];
  figure.y_range.setv({ start: 0, end: most > 2 * usual && usual > 0 ? usual * 1.5 : most * 1.05 || 1 });
  Esper.legend(chart.note, found.phases.map((phase) => [phase, Esper.PHASE_COLORS[phase]]));
  if (!chart.keepOnly(new Set([key]))) board.rebuild(chart);
};

Esper.legend = (element, entries) => {
  element.className = "legend";
  element.replaceChildren(...entries.map(([name, color]) => {
    const mark = Esper.element("i");
    mark.style.background = color;
    return Esper.element("span", { title: name }, mark, name);
  }));
};

// A map of numbers by row and step. `give` returns {xs: [[first, last]], rows: [names], values: [[...]], unit}.
Esper.heat = (give) => (chart) => {
  const { figure } = chart;
  const found = give();
  if (!found) return;
  const place = places(chart.board);
  const cells = { left: [], right: [], bottom: [], top: [], value: [] };
  found.values.forEach((list, row) => list.forEach((value, column) => {
    if (value === null) return;
    const [first, last] = found.xs[column];
    cells.left.push(place(first - 0.5));
    cells.right.push(place(last + 0.5));
    cells.bottom.push(row - 0.5);
    cells.top.push(row + 0.5);
    cells.value.push(value);
  }));
  const sorted = [...cells.value].sort((a, b) => a - b);
  const [low, high] = [sorted[0] ?? 0, sorted[Math.floor((sorted.length - 1) * 0.99)] ?? 1];
  const { LinearColorMapper } = Bokeh;
  chart.mapper ??= new LinearColorMapper({ palette: Bokeh.Palettes.Viridis256 });
  chart.mapper.setv({ low, high: high > low ? high : low + 1 });
  chart.fill("cells", cells, (source) => {
    const made = figure.quad({ left: { field: "left" }, right: { field: "right" }, bottom: { field: "bottom" }, top: { field: "top" }, source, line_color: null, fill_color: { field: "value", transform: chart.mapper } });
    figure.yaxes[0].ticker = new (Bokeh.Models.get("BasicTicker"))({ min_interval: 1, num_minor_ticks: 0 });
    figure.yaxes[0].axis_label = "rank";
    figure.add_layout(new Bokeh.ColorBar({ color_mapper: chart.mapper, width: 8, padding: 4, major_label_text_color: chart.board.colors.ink, background_fill_color: null, major_tick_line_color: null }), "right");
    return made;
  });
};

// From the number of a step to its place on the axis.
function places(board) {
  const run = board.focused();
  const series = run?.series;
  return board.view.x === "step" || !series ? (step) => step : (step) => Esper.placeOf(series, board.view.x, step);
}

// The life of each seed as bars by stage. `give` returns [{id, bars: [[first, last, stage]]}], the first at the top.
Esper.bars = (give, stages) => (chart) => {
  const { figure } = chart;
  const seeds = give();
  const at = places(chart.board);
  const cells = { left: [], right: [], y: [], color: [] };
  const used = new Set();
  seeds.forEach((seed, place) => {
    for (const [first, last, stage] of seed.bars) {
      used.add(stage);
      cells.left.push(at(first));
      cells.right.push(at(last + 1));
      cells.y.push(seeds.length - 1 - place);
      cells.color.push(Esper.STAGE_COLORS[stage] || Esper.STAGE_COLORS[0]);
    }
  });
  const names = seeds.map((seed) => (seed.id.length > 12 ? `${seed.id.slice(0, 11)}…` : seed.id)).reverse();
  const height = seeds.length * 18 + 50;
  const isOther = chart.names !== names.join("\0");
  chart.place.style.height = `${height}px`;
  chart.fill("cells", cells, (source) => figure.hbar({ y: { field: "y" }, left: { field: "left" }, right: { field: "right" }, height: 0.7, source, line_color: null, fill_color: { field: "color" } }));
  if (isOther) {
    chart.names = names.join("\0");
    figure.y_range = new Bokeh.Range1d({ start: -0.6, end: seeds.length - 0.4 });
    figure.yaxes[0].ticker = new (Bokeh.Models.get("FixedTicker"))({ ticks: names.map((_, i) => i) });
    figure.yaxes[0].major_label_overrides = new Map(names.map((name, i) => [i, name]));
    figure.ygrid.grid_line_color = null;
  }
  Esper.legend(chart.note, [...used].sort((a, b) => a - b).map((stage) => [stages[stage] || `stage ${stage}`, Esper.STAGE_COLORS[stage] || Esper.STAGE_COLORS[0]]));
};
