// What all parts of the page use: elements, numbers, data, and the theme.

const SVG = "http://www.w3.org/2000/svg";

/** An element. Children that are texts become text nodes: nothing is ever parsed as markup. */
function h(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name.startsWith("--")) element.style.setProperty(name, value);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

const byId = (id) => document.getElementById(id);
const mean = (values) => values.reduce((a, b) => a + b, 0) / values.length;
const clamp = (x, low, high) => Math.min(Math.max(x, low), high);

/** A number with three digits. */
function digits(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size >= 1e5 || (size > 0 && size < 1e-3)) return value.toExponential(1).replace("e+", "e").replace("-", "−").replace("e-", "e−");
  const text = size >= 1000 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(3)));
  return text.replace("-", "−");
}

const percent = (value) => `${(100 * value).toFixed(1)} %`;
const isShare = (key) => /(_frac|accuracy|agreement|pass@\d+|maj@\d+)$/.test(key);
const show = (key, value) => (value !== null && value !== undefined && isShare(key) ? percent(value) : digits(value));

/** The JSON of a compressed block of the page. */
async function unpacked(id) {
  const bytes = Uint8Array.from(atob(byId(id).textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

/** Light, dark, or as the system has it; kept where the browser lets pages keep something. */
function startTheme() {
  const names = { auto: "Theme: system", light: "Theme: light", dark: "Theme: dark" };
  const button = byId("theme");
  let now = "auto";
  try { now = localStorage.getItem("kdrl-theme") || "auto"; } catch { /* a page in a frame may not */ }
  function set(theme) {
    now = theme in names ? theme : "auto";
    if (now === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = now;
    button.textContent = names[now];
    try { localStorage.setItem("kdrl-theme", now); } catch { /* as above */ }
  }
  button.addEventListener("click", () => set({ auto: "light", light: "dark", dark: "auto" }[now]));
  set(now);
}

/** A section with a heading. */
function section(id, title, ...children) {
  return h("section", { id, "aria-labelledby": `${id}-title` }, h("h2", { id: `${id}-title` }, title), ...children);
}
