// Headline numbers, held-out evaluations, what happened, and settings.

const HEADLINES = [
  ["sampled/accuracy", "Held-out accuracy, sampled"],
  ["greedy/accuracy", "Held-out accuracy, greedy"],
  ["reward/mean", "Reward"],
  ["kd/reverse_kl", "KL to the teacher, nats"],
  ["completion/length_mean", "Tokens per answer"],
  ["tokens_per_second", "Tokens per second"],
];

/** [first, last] of a metric until some step: the evaluations themselves, or means over a tenth of the steps. */
function firstAndLast(run, key, until) {
  if (key.includes("accuracy")) {
    const found = run.evaluations.filter((e) => e.name.startsWith("student") && e.step <= until && Number.isFinite(e[key]));
    return found.length ? [found[0][key], found[found.length - 1][key]] : null;
  }
  const values = (run.series[key] || []).filter((v, i) => v !== null && run.steps[i] <= until);
  if (!values.length) return null;
  const part = Math.max(Math.floor(values.length / 10), 1);
  return [mean(values.slice(0, part)), mean(values.slice(-part))];
}

function ofGroup(group, key) {
  // As far as all seeds have come, or their mean would be of different steps.
  const until = Math.min(...group.runs.map((run) => run.done));
  const found = group.runs.map((run) => firstAndLast(run, key, until)).filter(Boolean);
  return found.length ? [mean(found.map((x) => x[0])), mean(found.map((x) => x[1]))] : null;
}

function summarySection(data) {
  const shown = HEADLINES.filter(([key]) => data.groups.some((g) => ofGroup(g, key)))
    .filter(([key], _, all) => !(key === "greedy/accuracy" && all.some(([k]) => k === "sampled/accuracy")));
  if (data.groups.length === 1) {
    const [group] = data.groups;
    const tiles = shown.map(([key, label]) => {
      const [first, last] = ofGroup(group, key);
      const change = key === "tokens_per_second" ? null : h("span", { class: "muted" }, `from ${show(key, first)}`);
      return h("div", { class: "tile" }, h("dt", {}, label), h("dd", {}, h("strong", {}, show(key, last)), change));
    });
    return h("section", { class: "tiles", "aria-label": "At a glance" }, h("dl", {}, tiles));
  }
  const head = h("tr", {}, h("th", { scope: "col" }, "run"), h("th", { scope: "col" }, "differs in"),
    shown.map(([, label]) => h("th", { scope: "col", class: "number" }, label)));
  const rows = data.groups.map((group, g) => h("tr", {},
    h("th", { scope: "row" }, h("i", { class: `dot c${g % 6}` }), group.label),
    h("td", { class: "muted" }, group.differs.join(", ") || "–"),
    shown.map(([key]) => {
      const found = ofGroup(group, key);
      return h("td", { class: "number" }, found ? `${show(key, found[0])} → ${show(key, found[1])}` : "");
    })));
  const about = "Mean over seeds, first to last: evaluations, or means over the first and the last tenth of the steps.";
  return section("summary", "Runs", tableOf("Runs and what came of them", head, rows), h("p", { class: "muted" }, about));
}

function tableOf(caption, head, rows) {
  return h("div", { class: "wide", tabindex: 0, role: "region", "aria-label": caption },
    h("table", {}, h("caption", { class: "hidden" }, caption), h("thead", {}, head), h("tbody", {}, rows)));
}

const NAMES = {
  "length_mean": "tokens", "truncated_frac": "cut off", "repeated_4gram_frac": "repeats",
  "teacher_reverse_kl": "reverse KL", "teacher_forward_kl": "forward KL", "teacher_top_agreement": "same top token",
};
// What a reader looks for first stands first.
const ORDER = [/accuracy$/, /pass@/, /maj@/, /^teacher_/, /length_mean$/, /truncated_frac$/, /./];
const LEFT_OUT = /_ci$|^(name|step|num_prompts|by_source|change|evaluations|.*\/num_samples|.*\/pass@1|.*\/verifier_errors)$/;

function evaluationSection(data) {
  const runs = data.groups.flatMap((group) => group.runs).filter((run) => run.evaluations.length);
  if (!runs.length) return null;
  const all = runs.flatMap((run) => run.evaluations);
  const keys = [...new Set(all.flatMap(Object.keys))].filter((key) => !LEFT_OUT.test(key));
  const place = (key) => ORDER.findIndex((pattern) => pattern.test(key));
  const used = keys.filter((key) => all.some((e) => typeof e[key] === "number")).sort((a, b) => place(a) - place(b));
  const head = h("tr", {}, h("th", { scope: "col" }, "model"), used.map((key) => {
    const [of, name] = key.includes("/") ? key.split("/") : ["", key];
    return h("th", { scope: "col", class: "number" }, h("small", { class: "muted" }, of), " ", NAMES[name] || name);
  }));
  const cells = (e) => used.map((key) => {
    const interval = e[`${key}_ci`];
    const text = typeof e[key] === "number" ? show(key, e[key]) : e[key] === null ? "not finite" : "";
    const range = interval && interval.every(Number.isFinite) ? h("small", { class: "muted" }, ` ${show(key, interval[0]).replace(" %", "")}–${show(key, interval[1]).replace(" %", "")}`) : null;
    return h("td", { class: "number" }, text, range);
  });
  const rows = [];
  const parts = [];
  for (const run of runs) {
    if (runs.length > 1) rows.push(h("tr", {}, h("th", { scope: "rowgroup", colspan: used.length + 1, class: "run" }, run.name)));
    for (const e of run.evaluations) {
      rows.push(h("tr", {}, h("th", { scope: "row" }, e.name), cells(e)));
      for (const [source, results] of Object.entries(e.by_source || {})) {
        const row = h("tr", { class: "source", hidden: true }, h("th", { scope: "row" }, source), cells(results));
        parts.push(row);
        rows.push(row);
      }
    }
  }
  const button = parts.length ? h("button", { type: "button", class: "quiet", "aria-pressed": "false", onclick: () => {
    const on = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", String(on));
    for (const row of parts) row.hidden = !on;
  } }, "by source") : null;
  const questions = [...new Set(all.map((e) => e.num_prompts))].filter(Boolean).join(", ");
  const intervals = all.some((e) => Object.keys(e).some((k) => k.endsWith("_ci"))) ? " Ranges are 95 % intervals." : "";
  return section("evaluations", "Held-out questions",
    h("p", { class: "muted" }, `${questions} questions.${intervals} `, button),
    tableOf("Evaluations on held-out questions", head, rows));
}

function notesSection(data) {
  const notes = data.groups.flatMap((group) => group.runs).flatMap((run) => run.marks.map((mark) => ({ ...mark, run: run.name })));
  if (!notes.length) return null;
  const several = data.groups.flatMap((group) => group.runs).length > 1;
  return section("notes", "What happened", h("ul", { class: "notes" }, notes.map((note) => h("li", { class: note.alarm ? "alarm" : "change" },
    h("button", { type: "button", class: "quiet", onclick: () => setCursor(note.step) }, `step ${note.step}`),
    h("strong", {}, note.alarm ? `alarm ${note.alarm}` : "changed"), ` ${note.text}`,
    several ? h("span", { class: "muted" }, ` (${note.run})`) : null))));
}

function settingsSection(data) {
  const runs = data.groups.flatMap((group) => group.runs);
  return section("settings", "Settings", runs.map((run) => h("details", {},
    h("summary", {}, `${run.name}, seed ${run.seed}`), h("pre", { tabindex: 0 }, run.settings))));
}
