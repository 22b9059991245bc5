// Opens the data and builds the page.

async function start() {
  startTheme();
  const main = byId("main");
  if (typeof DecompressionStream === "undefined" || !CSS.supports("color", "light-dark(red, blue)")) {
    byId("loading").textContent = "This browser is too old for the page: it needs one of the middle of 2024 or later.";
    return;
  }
  const data = await unpacked("data");
  const parts = [];
  const viewer = data.samples.length ? new Viewer(data.samples, data.scales) : null;
  const samples = viewer ? section("samples", "Samples", viewer.element) : null;
  if (data.groups.length) {
    const runs = data.groups.flatMap((group) => group.runs);
    const steps = runs.map((run) => run.done < run.of ? `${run.done} of ${run.of} steps` : `${run.of} steps`);
    const many = runs.length > 1 ? `${runs.length} runs · ` : "";
    byId("subtitle").textContent = `${many}${[...new Set(steps)].join(", ")} · ${data.written}`;
    parts.push(summarySection(data), curvesSection(data), evaluationSection(data), notesSection(data), samples, settingsSection(data));
  } else {
    document.body.classList.add("alone");
    parts.push(samples);
  }
  main.replaceChildren(...parts.filter(Boolean));
  if (viewer) await viewer.opened;
  document.documentElement.dataset.ready = "true";
}

start().catch((error) => {
  byId("main").replaceChildren(h("p", { role: "alert" }, `The page could not be opened: ${error.message}`));
  throw error;
});
