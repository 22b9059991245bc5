// Curves: one small chart for each panel, with one cursor for all of them.

const HEIGHT = 190;
const EDGE = { left: 48, right: 12, top: 14, bottom: 24 };
const panels = [];
let cursor = null;
let onCursor = () => {};

/** The cursor of all charts at a step (null: none). */
function setCursor(step) {
  cursor = step;
  for (const panel of panels) panel.point(step);
  onCursor(step);
}

/** The value of a run between its points; null before the first and after the last. */
function between(points, x) {
  let low = 0, high = points.length - 1;
  if (high < 0 || x < points[0][0] || x > points[high][0]) return null;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (points[middle][0] <= x) low = middle; else high = middle;
  }
  const [a, b] = [points[low], points[high]];
  if (x === a[0] || a[0] === b[0]) return a[1];
  return a[1] + (b[1] - a[1]) * (x - a[0]) / (b[0] - a[0]);
}

/**
 * A metric over runs. `all`: [step, mean, lowest, highest] where all of them have come; `alone`: the parts of single
 * runs beyond, since a mean of those that are left would jump where one ends.
 */
function gathered(ofRuns, exact) {
  const runs = ofRuns.filter((points) => points.length);
  if (runs.length < 2) return { all: (runs[0] || []).map(([x, y]) => [x, y, y, y]), alone: [] };
  const all = [];
  for (const x of [...new Set(runs.flatMap((points) => points.map((p) => p[0])))].sort((a, b) => a - b)) {
    const ys = runs.map((points) => (exact ? (points.find((p) => p[0] === x) || [x, null])[1] : between(points, x)));
    if (ys.every((y) => y !== null)) all.push([x, mean(ys), Math.min(...ys), Math.max(...ys)]);
  }
  if (exact) {
    const shared = new Set(all.map(([x]) => x));
    return { all, alone: runs.map((points) => points.filter(([x]) => !shared.has(x))).filter((points) => points.length) };
  }
  const [first, last] = all.length ? [all[0][0], all[all.length - 1][0]] : [Infinity, -Infinity];
  const parts = runs.flatMap((points) => (all.length ? [points.filter(([x]) => x <= first), points.filter(([x]) => x >= last)] : [points]));
  return { all, alone: parts.filter((points) => points.length > 1) };
}

/** The mean over so many points around each; fewer at the ends. */
function smoothed(points, width) {
  if (width <= 1) return points;
  const half = Math.floor(width / 2);
  return points.map(([x], i) => {
    const reach = Math.min(half, i, points.length - 1 - i);
    let sum = 0;
    for (let j = i - reach; j <= i + reach; j++) sum += points[j][1];
    return [x, sum / (2 * reach + 1)];
  });
}

function pointsOf(run, key, evaluated) {
  if (evaluated.includes(key)) {
    return run.evaluations.filter((e) => e.name.startsWith("student") && Number.isFinite(e[key])).map((e) => [e.step, e[key], ...(e[`${key}_ci`] || [])]);
  }
  const values = run.series[key] || [];
  return run.steps.map((step, i) => [step, values[i]]).filter(([, y]) => y !== null && y !== undefined);
}

/** The lines of a panel: for each group and metric its points of each run, and what is still to come. */
function linesOf(spec, data) {
  const several = data.groups.length > 1;
  const there = spec.keys.filter((key) => data.groups.some((group) => group.runs.some((run) => {
    const points = pointsOf(run, key, data.evaluated);
    // A coefficient that is 0, and stays so, belongs to a term that is not there.
    return key.endsWith("/coef") ? [...points.map(([, y]) => y), ...(run.ahead.series[key] || [])].some((y) => y !== 0) : points.length > 0;
  })));
  const common = there.length === 1 ? there[0] : null;
  const lines = [];
  data.groups.forEach((group, g) => there.forEach((key, k) => {
    const runs = group.runs.map((run) => pointsOf(run, key, data.evaluated));
    if (!runs.some((points) => points.length)) return;
    const short = spec.is_stacked ? key.split("/")[1] : key;
    // Seeds have one schedule; what the longest of them has done is drawn already.
    const last = Math.max(...runs.flat().map(([x]) => x));
    const coming = new Map(group.runs.flatMap((run) => run.ahead.steps.map((step, i) => [step, (run.ahead.series[key] || [])[i]])));
    const ahead = [...coming].filter(([x, y]) => y !== undefined && x > last).sort((a, b) => a[0] - b[0]);
    const label = !several ? short : common ? group.label : `${group.label}: ${short}`;
    lines.push({ key, label, runs, ahead, colour: several ? g % 6 : k % 6, dash: several ? k % 4 : 0, dots: data.evaluated.includes(key), on: true, group: g });
  }));
  return lines;
}

function niceStep(span, count) {
  const raw = span / count;
  const unit = 10 ** Math.floor(Math.log10(raw));
  return unit * [1, 2, 5, 10].find((m) => m * unit >= raw);
}

function ticks(low, high, log) {
  if (log) {
    const first = Math.ceil(Math.log10(low) - 1e-9), last = Math.floor(Math.log10(high) + 1e-9);
    const every = Math.max(Math.ceil((last - first) / 4), 1);
    const decades = [];
    for (let e = first; e <= last; e += every) decades.push(10 ** e);
    return decades.length > 1 ? decades : [low, Math.sqrt(low * high), high].map((v) => Number(v.toPrecision(2)));
  }
  const step = niceStep(high - low, 4);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(Number((i * step).toPrecision(12)));
  return found;
}

class Chart {
  constructor(spec, data) {
    this.spec = spec;
    this.lines = linesOf(spec, data);
    this.log = false;
    this.smooth = 1;
    this.stacked = spec.is_stacked;
    this.of = spec.is_stacked && spec.of ? spec.of : "";
    const runs = data.groups.flatMap((group) => group.runs);
    this.marks = runs.flatMap((run) => run.marks).filter((mark) => !mark.alarm || spec.alarms.includes(mark.alarm));
    this.teachers = spec.keys.some((key) => data.evaluated.includes(key)) ? this.teacherLines(runs[0]) : [];
    this.steps = [...new Set(this.lines.flatMap((line) => line.runs.flat().map(([x]) => x)))].sort((a, b) => a - b);
    this.lastStep = Math.max(...runs.map((run) => run.of - 1), ...this.steps);
    this.build();
  }

  teacherLines(run) {
    return run.evaluations.filter((e) => e.name.startsWith("teacher")).flatMap((e) =>
      this.lines.filter((line) => line.group === 0 && typeof e[line.key] === "number")
        .map((line) => ({ y: e[line.key], colour: line.colour, key: line.key, name: e.name })));
  }

  build() {
    const about = [this.spec.unit, this.of && `of ${this.of}`].filter(Boolean).join(", ");
    const title = h("h3", {}, this.spec.title, about ? h("small", { class: "muted" }, ` ${about}`) : null);
    this.logButton = h("button", { type: "button", class: "quiet", "aria-pressed": "false", "aria-label": `Logarithmic axis: ${this.spec.title}`, onclick: () => this.setLog(!this.log) }, "log");
    if (this.stacked) this.logButton.hidden = true;
    this.legend = h("div", { class: "legend" });
    for (const line of this.lines) {
      line.readout = h("span", { class: "readout" });
      line.button = h("button", { type: "button", class: "key", "aria-pressed": "true", onclick: () => this.toggle(line) },
        h("i", { class: `swatch c${line.colour} d${line.dash}` }), h("span", {}, line.label), line.readout);
      this.legend.append(line.button);
    }
    this.svg = svg("svg", { class: "chart", role: "img", tabindex: 0, height: HEIGHT });
    this.svg.addEventListener("pointermove", (event) => this.seek(event));
    this.svg.addEventListener("pointerdown", (event) => this.seek(event));
    this.svg.addEventListener("pointerleave", () => setCursor(null));
    this.svg.addEventListener("blur", () => setCursor(null));
    this.svg.addEventListener("keydown", (event) => this.key(event));
    this.element = h("figure", { class: "panel" }, h("div", { class: "panel-head" }, title, this.logButton), this.svg, this.legend);
    new ResizeObserver(() => this.draw()).observe(this.element);
    this.point(null);
  }

  toggle(line) {
    line.on = !line.on;
    line.button.setAttribute("aria-pressed", String(line.on));
    this.draw();
  }

  setLog(on) {
    this.log = on;
    this.logButton.setAttribute("aria-pressed", String(on));
    this.draw();
  }

  seek(event) {
    const box = this.svg.getBoundingClientRect();
    const share = clamp((event.clientX - box.left - EDGE.left) / (box.width - EDGE.left - EDGE.right), 0, 1);
    setCursor(this.nearest(share * this.lastStep));
  }

  key(event) {
    const move = { ArrowLeft: -1, ArrowRight: 1, PageUp: 10, PageDown: -10, Home: -Infinity, End: Infinity }[event.key];
    if (move === undefined || !this.steps.length) return;
    event.preventDefault();
    const at = cursor === null ? this.steps.length : this.steps.indexOf(this.nearest(cursor));
    setCursor(this.steps[clamp(at + move, 0, this.steps.length - 1)]);
  }

  nearest(step) {
    return this.steps.reduce((best, x) => (Math.abs(x - step) < Math.abs(best - step) ? x : best), this.steps[0]);
  }

  /** Lines as they are drawn: smoothed run by run, then gathered; stacked ones upon one another. */
  prepare() {
    let below = new Map();
    for (const line of this.lines) {
      line.raw = gathered(line.runs, line.dots).all;
      const { all, alone } = gathered(line.runs.map((points) => (line.dots ? points : smoothed(points, this.smooth))), line.dots);
      line.drawn = all;
      line.alone = this.stacked ? [] : alone;
      if (!this.stacked) continue;
      const next = new Map(below);
      line.area = line.drawn.map(([x, y]) => {
        const bottom = below.get(x) || 0;
        const top = bottom + (line.on ? y : 0);
        next.set(x, top);
        return [x, bottom, top];
      });
      below = next;
    }
  }

  range() {
    const shown = this.lines.filter((line) => line.on);
    let values = this.stacked ? shown.flatMap((line) => line.area.map(([, , top]) => top)).concat(0)
      : shown.flatMap((line) => [...line.drawn.flatMap(([, , low, high]) => [low, high]), ...line.alone.flat().map(([, y]) => y), ...line.ahead.map(([, y]) => y), ...(line.dots ? line.runs.flat().flatMap((p) => p.slice(2)) : [])]);
    values = values.concat(this.teachers.map((t) => t.y)).filter(Number.isFinite);
    if (this.log) values = values.filter((v) => v > 0);
    if (!values.length) return this.log ? [0.1, 1] : [0, 1];
    let low = Math.min(...values), high = Math.max(...values);
    if (this.stacked) {
      // Steps that compile take a hundred times as long as the others, which are to be seen.
      const usual = [...values].sort((a, b) => a - b)[Math.floor(0.97 * (values.length - 1))];
      if (values.length > 20 && high > 3 * usual) return [0, 1.3 * usual];
    }
    if (this.log) return high > low * 1.0001 ? [low, high] : [low / 2, high * 2];
    if (this.lines.every((line) => isShare(line.key))) return [Math.min(low, 0), Math.max(high * 1.05, 0.01)];
    if (low > 0 && low < high * 0.5) low = 0;
    if (high === low) { const pad = Math.abs(high) * 0.1 || 1; low -= low === 0 ? 0 : pad; high += pad; }
    const pad = (high - low) * 0.06;
    return [low === 0 ? 0 : low - pad, high + pad];
  }

  draw() {
    const width = this.svg.clientWidth || this.element.clientWidth || 360;
    if (!width) return;
    this.prepare();
    const [low, high] = this.range();
    const inner = { w: width - EDGE.left - EDGE.right, h: HEIGHT - EDGE.top - EDGE.bottom };
    const x = (step) => EDGE.left + (this.lastStep ? step / this.lastStep : 0) * inner.w;
    const scale = this.log ? (v) => Math.log(Math.max(v, low * 1e-3) / low) / Math.log(high / low) : (v) => (v - low) / (high - low);
    const y = (v) => EDGE.top + (1 - Math.min(scale(v), 1 + 8 / inner.h)) * inner.h;
    this.x = x;
    this.y = y;
    const parts = [];
    for (const tick of ticks(low, high, this.log)) {
      const share = this.lines.every((line) => isShare(line.key));
      parts.push(svg("line", { class: "grid", x1: EDGE.left, x2: width - EDGE.right, y1: y(tick), y2: y(tick) }),
        svg("text", { class: "tick", x: EDGE.left - 6, y: y(tick) + 3.5, "text-anchor": "end" }, share ? `${digits(tick * 100)} %` : digits(tick)));
    }
    for (const tick of ticks(0, Math.max(this.lastStep, 1), false)) {
      if (Number.isInteger(tick)) parts.push(svg("text", { class: "tick", x: x(tick), y: HEIGHT - 6, "text-anchor": tick === 0 ? "start" : "middle" }, digits(tick)));
    }
    for (const mark of this.marks) {
      const kind = mark.alarm ? "alarm" : "change";
      parts.push(svg("g", { class: `mark ${kind}` }, svg("title", {}, `step ${mark.step}: ${mark.text}`),
        svg("line", { x1: x(mark.step), x2: x(mark.step), y1: EDGE.top, y2: HEIGHT - EDGE.bottom }),
        svg("path", { d: `M${x(mark.step) - 5} ${EDGE.top - 9}h10l-5 9z` })));
    }
    for (const teacher of this.teachers) {
      if (this.lines.some((line) => line.on && line.key === teacher.key)) {
        parts.push(svg("line", { class: `teacher s${teacher.colour}`, x1: EDGE.left, x2: width - EDGE.right, y1: y(teacher.y), y2: y(teacher.y) }, svg("title", {}, `${teacher.name}: ${show(teacher.key, teacher.y)}`)));
      }
    }
    for (const line of this.lines.filter((one) => one.on)) parts.push(...this.lineParts(line, x, y));
    this.cursorLine = svg("line", { class: "cursor", y1: EDGE.top, y2: HEIGHT - EDGE.bottom, visibility: "hidden" });
    parts.push(this.cursorLine);
    this.svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    this.svg.replaceChildren(...parts);
    const last = this.lines.map((line) => (line.raw.length ? `${line.label} ${show(line.key, line.raw[line.raw.length - 1][1])}` : "")).filter(Boolean);
    this.svg.setAttribute("aria-label", `${this.spec.title} by step; at the end ${last.join(", ")}. Arrow keys move the cursor.`);
    this.point(cursor);
  }

  lineParts(line, x, y) {
    const path = (points) => points.map(([a, b], i) => `${i ? "L" : "M"}${x(a).toFixed(1)} ${y(b).toFixed(1)}`).join("");
    const back = (points) => [...points].reverse();
    if (this.stacked) {
      const edge = [...line.area.map(([a, , top]) => [a, top]), ...back(line.area).map(([a, bottom]) => [a, bottom])];
      return edge.length ? [svg("path", { class: `area f${line.colour}`, d: `${path(edge)}Z` })] : [];
    }
    const parts = [];
    if (line.runs.filter((points) => points.length).length > 1 && line.drawn.length) {
      const edge = [...line.drawn.map(([a, , , top]) => [a, top]), ...back(line.drawn).map(([a, , bottom]) => [a, bottom])];
      parts.push(svg("path", { class: `band f${line.colour}`, d: `${path(edge)}Z` }));
    } else if (line.dots) {
      for (const [a, , low, high] of line.runs.flat()) {
        if (Number.isFinite(low) && Number.isFinite(high)) parts.push(svg("line", { class: `whisker s${line.colour}`, x1: x(a), x2: x(a), y1: y(low), y2: y(high) }));
      }
    }
    if (this.smooth > 1 && !line.dots) parts.push(svg("path", { class: `line raw s${line.colour}`, d: path(line.raw) }));
    for (const points of line.alone) {
      parts.push(svg("path", { class: `line alone s${line.colour} d${line.dash}`, d: path(points) }, svg("title", {}, "one seed; others have not come here")));
      if (line.dots) for (const [a, b] of points) parts.push(svg("circle", { class: `alone f${line.colour}`, cx: x(a), cy: y(b), r: 3 }));
    }
    parts.push(svg("path", { class: `line s${line.colour} d${line.dash}`, d: path(line.drawn) }));
    if (line.dots || line.drawn.length < 2) {
      for (const [a, b] of line.drawn) parts.push(svg("circle", { class: `f${line.colour}`, cx: x(a), cy: y(b), r: 3 }));
    }
    if (line.ahead.length) {
      const ends = line.runs.filter((points) => points.length).map((points) => points[points.length - 1]);
      const start = ends.length ? [ends.reduce((a, b) => (b[0] > a[0] ? b : a))] : [];
      parts.push(svg("path", { class: `line ahead s${line.colour}`, d: path([...start, ...line.ahead]) }, svg("title", {}, "the schedule ahead")));
    }
    return parts;
  }

  /** Shows the values at a step, or the last ones. */
  point(step) {
    if (this.cursorLine) {
      this.cursorLine.setAttribute("visibility", step === null ? "hidden" : "visible");
      if (step !== null) for (const end of ["x1", "x2"]) this.cursorLine.setAttribute(end, this.x(step));
    }
    for (const line of this.lines) {
      const points = line.drawn || [];
      const at = step === null ? points[points.length - 1] : this.at(line, step);
      line.readout.textContent = at ? show(line.key, at[1]) : "–";
    }
  }

  at(line, step) {
    const all = [...line.drawn, ...line.alone.flat(), ...line.ahead];
    if (!all.length) return null;
    if (line.dots) return all.find(([x]) => x === step) || null;
    const best = all.reduce((a, b) => (Math.abs(b[0] - step) < Math.abs(a[0] - step) ? b : a));
    const apart = Math.max(this.lastStep / 50, 1);
    return Math.abs(best[0] - step) <= apart ? best : null;
  }
}

function curvesSection(data) {
  for (const spec of data.panels) {
    // Parts of a whole hide one another: a chart for each group.
    const shown = spec.is_stacked && data.groups.length > 1 ? data.groups.map((group) => [{ ...spec, of: group.label }, { ...data, groups: [group] }]) : [[spec, data]];
    for (const [one, groups] of shown) if (linesOf(one, groups).length) panels.push(new Chart(one, groups));
  }
  const value = h("output", { for: "smoothing" }, "off");
  const slider = h("input", { id: "smoothing", type: "range", min: 0, max: 20, step: 1, value: 0, oninput: () => {
    const width = Number(slider.value) ? 2 * Number(slider.value) + 1 : 1;
    value.textContent = width > 1 ? `${width} points` : "off";
    for (const panel of panels) {
      panel.smooth = width;
      panel.draw();
    }
  } });
  const where = h("output", { class: "muted", id: "cursor-step" });
  const seeds = Math.max(...data.groups.map((group) => group.runs.length));
  const hints = [];
  if (seeds > 1) hints.push(`Lines are means over seeds, bands reach from the lowest to the highest of up to ${seeds}. Where not all of them have come, each is a thin line.`);
  if (panels.some((panel) => panel.lines.some((line) => line.ahead.length))) hints.push("Dashed: the schedule ahead.");
  if (panels.some((panel) => panel.teachers.length)) hints.push("Dotted: the teacher.");
  if (panels.some((panel) => panel.stacked)) hints.push("Seconds of steps that compile may reach beyond their axis.");
  const thinned = Math.max(...data.groups.map((group) => group.mean_of));
  if (thinned > 1) hints.push(`Each point is the mean of ${thinned} steps.`);
  const bar = h("div", { class: "bar" }, h("label", { for: "smoothing" }, "Smoothing "), slider, value, where);
  onCursor = (step) => { where.textContent = step === null ? "" : `step ${step}`; };
  return section("curves", "Curves", bar, hints.length ? h("p", { class: "muted" }, hints.join(" ")) : null,
    h("div", { class: "panels" }, panels.map((panel) => panel.element)));
}
