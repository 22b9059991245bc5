// Samples: a step, a prompt, its group side by side, and every token by what the teacher thinks of it.

// How strong they are is said by the page's data, `scales`.
const COLOURS = {
  reverse_kl: { name: "KL to the teacher", unit: "nats", label: "exact KL(student ‖ teacher)" },
  advantage: { name: "advantage", unit: "", label: "advantage of the completion" },
  logprobs: { name: "log-probability", unit: "nats", label: "log-probability when it was drawn" },
};
const OUTCOMES = { correct: "correct", wrong: "wrong", truncated: "cut off", high: "high KL" };

/** The mean KL of a completion over tokens that have one; null if none has. */
function kl(row) {
  const values = ((row.tokens && row.tokens.reverse_kl) || []).filter(Number.isFinite);
  return values.length ? mean(values) : null;
}

const isCorrect = (row) => row.correct === true;

/** The place of a drawn token among the teacher's likeliest; null if it is none of them. */
const rank = (tokens, i) => tokens.teacher_rank[i];

/** How strong the colour of a value is, from 0 to 1. */
function strength({ top, power }, value) {
  return Number.isFinite(value) ? clamp(Math.abs(value) / top, 0, 1) ** power : 0;
}

class Viewer {
  constructor(runs, scales) {
    this.runs = runs;
    this.scales = scales;
    this.run = runs[0];
    this.loaded = new Map();
    this.colour = "reverse_kl";
    this.picked = false; // whether somebody has chosen the colour
    this.filters = new Set();
    this.words = "";
    this.at = this.run.steps.length - 1;
    this.prompt = 0;
    this.build();
    this.opened = this.open(this.at);
  }

  build() {
    const button = (text, label, onclick) => h("button", { type: "button", "aria-label": label, onclick }, text);
    this.runSelect = h("select", { "aria-label": "run", onchange: () => this.choose(Number(this.runSelect.value)) },
      this.runs.map((run, i) => h("option", { value: i }, run.run)));
    this.stepSelect = h("select", { id: "viewer-step", "aria-label": "step", onchange: () => this.open(Number(this.stepSelect.value)) });
    this.colourButtons = Object.entries(COLOURS).map(([key, { name }]) => h("button", {
      type: "button", role: "radio", "data-colour": key, onclick: () => this.pick(key), onkeydown: (event) => this.turn(event, key),
    }, name));
    this.filterButtons = Object.entries(OUTCOMES).map(([key, name]) => h("button", {
      type: "button", "data-filter": key, "aria-pressed": "false", onclick: () => this.filter(key),
    }, name));
    this.search = h("input", { type: "search", placeholder: "Search texts", "aria-label": "Search questions and completions", oninput: () => {
      this.words = this.search.value.toLowerCase();
      this.list();
    } });
    this.note = h("p", { class: "muted", role: "status" });
    this.scale = h("div", { class: "scale" });
    this.prompts = h("div", { class: "prompts", role: "listbox", "aria-label": "Prompts", tabindex: 0, onkeydown: (event) => this.walk(event) });
    this.group = h("div", { class: "group" });
    this.element = h("div", { class: "viewer", "data-colour": this.colour },
      h("div", { class: "bar" },
        h("div", { class: "field" }, this.runs.length > 1 ? this.runSelect : null, button("‹", "earlier step", () => this.open(this.at - 1)), this.stepSelect, button("›", "later step", () => this.open(this.at + 1))),
        h("div", { class: "segments", role: "radiogroup", "aria-label": "Colour tokens by" }, this.colourButtons),
        h("div", { class: "chips", role: "group", "aria-label": "Show only" }, this.filterButtons),
        this.search),
      this.scale, this.note,
      h("div", { class: "columns" }, this.prompts, this.group));
    this.tip = byId("tip");
    document.addEventListener("keydown", (event) => { if (event.key === "Escape") this.hide(); });
    // Of the page, and of what scrolls within it: a token that is reached by keys takes its tip along.
    document.addEventListener("scroll", () => {
      if (this.marked && this.marked === document.activeElement && !this.tip.hidden) this.place();
      else this.hide();
    }, { passive: true, capture: true });
    this.fillSteps();
    this.paint(this.colour);
  }

  fillSteps() {
    this.stepSelect.replaceChildren(...this.run.steps.map((step, i) => h("option", { value: i }, `step ${step.step}`)));
  }

  choose(run) {
    const step = this.run.steps[this.at].step;
    this.run = this.runs[run];
    this.fillSteps();
    const same = this.run.steps.findIndex((one) => one.step >= step);
    this.open(same < 0 ? this.run.steps.length - 1 : same);
  }

  async open(at) {
    this.at = clamp(at, 0, this.run.steps.length - 1);
    this.stepSelect.value = String(this.at);
    const block = this.run.steps[this.at].block;
    if (!this.loaded.has(block)) this.loaded.set(block, await unpacked(`block-${block}`));
    if (this.run.steps[this.at].block !== block) return;
    this.rows = this.loaded.get(block);
    const values = this.rows.map(kl).filter((v) => v !== null).sort((a, b) => a - b);
    this.highKl = values.length ? values[Math.min(Math.ceil(0.75 * values.length), values.length - 1)] : null;
    // Without a teacher there is no KL to see.
    if (!this.picked) this.paint(values.length ? "reverse_kl" : "advantage");
    this.groups = [];
    for (const row of this.rows) {
      const last = this.groups[this.groups.length - 1];
      // A group begins with its first sample, also where a question comes twice.
      if (last && last[0].question === row.question && row.sample > last[last.length - 1].sample) last.push(row);
      else this.groups.push([row]);
    }
    this.list();
  }

  /** Whether the filters let a sample through. */
  lets(row) {
    const has = (name) => this.filters.has(name);
    if (has("correct") && !isCorrect(row)) return false;
    if (has("wrong") && isCorrect(row)) return false;
    if (has("truncated") && row.finish !== "length") return false;
    if (has("high") && !(kl(row) !== null && kl(row) >= this.highKl)) return false;
    return !this.words || `${row.question}\n${row.completion}`.toLowerCase().includes(this.words);
  }

  filter(name) {
    if (this.filters.has(name)) this.filters.delete(name);
    else this.filters.add(name);
    const other = { correct: "wrong", wrong: "correct" }[name];
    if (this.filters.has(name)) this.filters.delete(other);
    for (const button of this.filterButtons) button.setAttribute("aria-pressed", String(this.filters.has(button.dataset.filter)));
    this.list();
  }

  list() {
    if (!this.groups) return;
    this.shown = this.groups.map((rows) => rows.filter((row) => this.lets(row))).map((rows, i) => ({ rows, i })).filter((group) => group.rows.length);
    if (!this.shown.some((group) => group.i === this.prompt)) this.prompt = this.shown.length ? this.shown[0].i : 0;
    const count = this.shown.reduce((sum, group) => sum + group.rows.length, 0);
    const step = this.run.steps[this.at];
    const facts = [`${count} of ${this.rows.length} samples`];
    if (this.filters.has("high")) facts.push(`high: a mean of ${digits(this.highKl)} nats or more, the top quarter`);
    if (step.rows < step.of) facts.push(`${step.of - step.rows} more were left out to keep the page small`);
    if (this.run.steps.length < this.run.logged) facts.push(`${this.run.steps.length} of ${this.run.logged} logged steps are shown, to keep the page small`);
    this.note.textContent = `${facts.join(" · ")}.`;
    this.prompts.replaceChildren(...this.shown.map(({ rows, i }) => h("div", {
      role: "option", id: `prompt-${i}`, class: "prompt", "aria-selected": String(i === this.prompt), onclick: () => this.select(i),
    }, h("span", { class: "question" }, rows[0].question),
    h("span", { class: "verdicts" }, this.groups[i].map((row) => h("i", { class: isCorrect(row) ? "right" : "wrong", title: isCorrect(row) ? "correct" : "wrong" }))),
    h("span", { class: "hidden" }, ` ${this.groups[i].filter(isCorrect).length} of ${this.groups[i].length} correct`))));
    this.select(this.prompt, true);
  }

  select(prompt, quiet = false) {
    this.prompt = prompt;
    for (const option of this.prompts.children) option.setAttribute("aria-selected", String(option.id === `prompt-${prompt}`));
    this.prompts.setAttribute("aria-activedescendant", `prompt-${prompt}`);
    if (!quiet) {
      const option = byId(`prompt-${prompt}`);
      if (option) option.scrollIntoView({ block: "nearest" });
    }
    const found = this.shown.find((group) => group.i === prompt);
    this.hide();
    if (!found) {
      this.group.replaceChildren(h("p", { class: "muted" }, "No sample passes these filters."));
      return;
    }
    const [first] = found.rows;
    this.group.replaceChildren(
      h("div", { class: "asked" }, h("p", { class: "question" }, first.question), h("p", { class: "muted" }, `answer ${first.answer} · ${first.source}`)),
      h("div", { class: "cards" }, found.rows.map((row) => this.card(row))));
  }

  walk(event) {
    const move = { ArrowDown: 1, ArrowUp: -1, Home: -Infinity, End: Infinity }[event.key];
    if (move === undefined || !this.shown || !this.shown.length) return;
    event.preventDefault();
    const at = this.shown.findIndex((group) => group.i === this.prompt);
    this.select(this.shown[clamp(at + move, 0, this.shown.length - 1)].i);
  }

  card(row) {
    const right = isCorrect(row);
    const end = { length: "cut off", end: "ended", stop: "stop text" }[row.finish] || row.finish;
    const facts = Number.isFinite(row.reward) ? [["reward", digits(row.reward)]] : [];
    if (Number.isFinite(row.advantage)) facts.push(["advantage", digits(row.advantage)]);
    if (kl(row) !== null) facts.push(["mean KL", digits(kl(row))]);
    const length = row.tokens ? row.tokens.of || row.tokens.texts.length : row.length;
    if (length) facts.push(["tokens", length.toLocaleString("en")]);
    if (row.sampler === "teacher") facts.push(["drawn by", "the teacher"]);
    const text = h("div", { class: "text", role: "group", "aria-label": `Completion ${row.sample}: arrow keys move from token to token` });
    if (row.tokens) this.tokens(text, row);
    else text.append(row.completion);
    return h("article", { class: "card", "aria-label": `sample ${row.sample}, ${right ? "correct" : "wrong"}` },
      h("header", {}, h("span", { class: `verdict ${right ? "right" : "wrong"}` }, right ? "✓ correct" : "✗ wrong"), h("span", { class: "muted" }, [row.how || `sample ${row.sample}`, end].filter(Boolean).join(" · "))),
      h("dl", { class: "facts" }, facts.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value)))),
      row.error ? h("p", { class: "error" }, `a reward function failed: ${row.error}`) : null,
      text);
  }

  tokens(text, row) {
    const spans = row.tokens.texts.map((piece, i) => {
      const name = row.tokens.names[i];
      const span = h("span", { class: piece ? "t" : "t ghost", tabindex: i ? -1 : 0, "aria-describedby": "tip" });
      if (piece.includes("\n")) span.classList.add("newline");
      span.textContent = piece || name || "·";
      if (row.tokens.teacher_top && row.tokens.teacher_top[i].length && rank(row.tokens, i) !== 0) span.classList.add("other");
      span.row = row;
      span.number = i;
      return span;
    });
    text.append(...spans);
    if (row.tokens.of > spans.length) {
      const rest = row.completion.slice(row.tokens.texts.join("").length);
      text.append(h("span", { class: "rest" }, rest), h("p", { class: "muted" }, `Only the first ${spans.length.toLocaleString("en")} tokens are coloured, to keep the page small.`));
    }
    text.addEventListener("pointerover", (event) => { if (event.target.classList.contains("t")) this.tell(event.target); });
    text.addEventListener("pointerleave", () => { if (!text.contains(document.activeElement)) this.hide(); });
    text.addEventListener("click", (event) => { if (event.target.classList.contains("t")) this.focus(event.target, spans); });
    text.addEventListener("focusin", (event) => { if (event.target.classList.contains("t")) this.tell(event.target); });
    text.addEventListener("focusout", () => this.hide());
    text.addEventListener("keydown", (event) => {
      const move = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10, Home: -Infinity, End: Infinity }[event.key];
      if (move === undefined) return;
      event.preventDefault();
      this.focus(spans[clamp(spans.indexOf(document.activeElement) + move, 0, spans.length - 1)], spans);
    });
    this.colourTokens(spans);
  }

  focus(span, spans) {
    for (const one of spans) one.tabIndex = one === span ? 0 : -1;
    span.focus({ preventScroll: false });
  }

  colourTokens(spans) {
    for (const span of spans) {
      const { row, number } = span;
      const value = this.colour === "advantage" ? row.advantage : (row.tokens[this.colour] || [])[number];
      span.style.setProperty("--x", `${(100 * strength(this.scales[this.colour], value)).toFixed(1)}%`);
      span.classList.toggle("negative", this.colour === "advantage" && value < 0);
    }
  }

  pick(colour) {
    this.picked = true;
    this.paint(colour);
  }

  paint(colour) {
    this.colour = colour;
    this.element.dataset.colour = colour;
    for (const button of this.colourButtons) {
      const on = button.dataset.colour === colour;
      button.setAttribute("aria-checked", String(on));
      button.tabIndex = on ? 0 : -1;
    }
    this.colourTokens(this.group.querySelectorAll(".t"));
    const { unit, label } = COLOURS[colour];
    const { top } = this.scales[colour];
    const ends = { reverse_kl: ["0", `${top} ${unit} or more`], advantage: [`−${top}`, `+${top}`], logprobs: ["0, certain", `−${top} ${unit} or less`] }[colour];
    this.scale.replaceChildren(h("span", {}, label), h("span", { class: "end" }, ends[0]), h("i", { class: "ramp" }), h("span", { class: "end" }, ends[1]),
      h("span", { class: "muted other-hint" }, h("span", { class: "other" }, "underlined"), ": the teacher's first choice is another"));
  }

  turn(event, colour) {
    const move = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (move === undefined) return;
    event.preventDefault();
    const keys = Object.keys(COLOURS);
    const next = (keys.indexOf(colour) + move + keys.length) % keys.length;
    this.pick(keys[next]);
    this.colourButtons[next].focus();
  }

  hide() {
    this.tip.hidden = true;
    if (this.marked) this.marked.classList.remove("marked");
  }

  /** What is known of a token, beside it. */
  tell(span) {
    const { row, number: i } = span;
    const t = row.tokens;
    const own = t.texts[i] || t.names[i] || "·";
    const seen = (text) => h("code", {}, text.replace(/ /g, "␣").replace(/\n/g, "↵").replace(/\t/g, "⇥"));
    const chance = (p) => (p === null || p === undefined ? "–" : p >= 0.9995 ? "100 %" : p >= 0.001 ? percent(p) : "< 0.1 %");
    const exp = (logprob) => (Number.isFinite(logprob) ? Math.exp(logprob) : null);
    const teacher = t.teacher_logprobs ? exp(t.teacher_logprobs[i]) : null;
    // With rollout.source=teacher the teacher has drawn it, and the student says how likely it would have been.
    const byTeacher = row.sampler === "teacher";
    const student = byTeacher ? exp((t.student_logprobs || [])[i]) : exp(t.logprobs[i]);
    const facts = [["position", `${i + 1} of ${t.of || t.texts.length}`], [byTeacher ? "the teacher's log-probability" : "log-probability", digits(t.logprobs[i])]];
    if (t.reverse_kl) facts.push(["KL to the teacher", `${digits(t.reverse_kl[i])} nats`]);
    const bar = (p, kind) => h("td", { class: "number" }, h("i", { class: `pbar ${kind}`, "--p": `${100 * clamp(p || 0, 0, 1)}%` }), h("span", {}, chance(p)));
    const line = (text, a, b, chosen) => h("tr", chosen ? { class: "chosen" } : {}, h("th", { scope: "row" }, seen(text), chosen ? h("small", {}, " chosen") : null), bar(a, "teacher"), bar(b, "student"));
    const tops = t.teacher_top ? t.teacher_top[i] : [];
    const chosen = tops.length ? rank(t, i) : null;
    const rows = tops.map(([text, a, b], k) => line(text, a, b, k === chosen));
    if (chosen === null) rows.push(line(own, teacher ?? (byTeacher ? exp(t.logprobs[i]) : null), student, true));
    this.tip.replaceChildren(
      h("dl", { class: "facts" }, facts.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value)))),
      h("table", {}, h("thead", {}, h("tr", {}, h("th", { scope: "col" }, tops.length ? "teacher's choices" : "token"), h("th", { scope: "col", class: "number" }, tops.length || byTeacher ? "teacher" : ""), h("th", { scope: "col", class: "number" }, "student"))), h("tbody", {}, rows)));
    if (this.marked) this.marked.classList.remove("marked");
    this.marked = span;
    span.classList.add("marked");
    this.tip.hidden = false;
    this.place();
  }

  /** Puts the tip beside its token. */
  place() {
    const place = this.marked.getClientRects()[0] || this.marked.getBoundingClientRect();
    const { offsetWidth: width, offsetHeight: height } = this.tip;
    const below = place.bottom + height + 12 < window.innerHeight || place.top < height + 12;
    this.tip.style.left = `${clamp(place.left - 12, 8, Math.max(document.documentElement.clientWidth - width - 8, 8))}px`;
    this.tip.style.top = `${below ? place.bottom + 8 : place.top - height - 8}px`;
  }
}
