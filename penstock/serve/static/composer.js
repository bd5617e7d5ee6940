// The form: what is asked for, its plan while it is being typed, and sending it.

import { ApiError, fileOf, loras, models, video } from "./api.js";
import { $, bytes, duration, make, plural, recall, remember, toast } from "./dom.js";

const WAIT_MS = 250; // after the last keystroke, before a plan is asked for
const SIZES = ["1280x720", "720x1280", "832x480", "480x832", "960x544", "544x960", "640x640"];
const NUMBERS = {
  steps: "num_inference_steps", guidance: "guidance_scale", seed: "seed", shift: "flow_shift", fps: "fps",
};
const KEPT = ["prompt", "negative", "size", "width", "height", "seconds", "steps", "guidance", "seed", "shift",
  "fps", "sampler", "cache", "lora", "strength", "model"];

let known = []; // the models
let picture = null; // a File
let pictureSize = null; // {width, height}, once it is decoded
let source = null; // the video that this one goes on from
let frames = null; // of settings that were taken again: exactly so many, until the length is changed
let asked = ""; // what the plan on the screen is for
let asking = null;
let timer = 0;

export async function start() {
  await Promise.all([loadModels(), loadLoras()]);
  restore();
  for (const name of KEPT) $(name).addEventListener("input", changed);
  $("seconds").addEventListener("input", () => setSeconds($("seconds").value, $("seconds")));
  $("length").addEventListener("input", () => setSeconds($("length").value, $("length")));
  $("size").addEventListener("input", showOwnSize);
  $("model").addEventListener("input", () => { showDefaults(); changed(); });
  $("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("form").requestSubmit();
  });
  $("distilled").addEventListener("change", changed);
  $("form").addEventListener("submit", (event) => { event.preventDefault(); send(); });
  $("picture").addEventListener("change", () => usePicture($("picture").files[0]));
  $("thumb").addEventListener("load", () => {
    pictureSize = { width: $("thumb").naturalWidth, height: $("thumb").naturalHeight };
    changed();
  });
  $("picture-clear").addEventListener("click", () => usePicture(null));
  $("source-clear").addEventListener("click", () => goOnFrom(null));
  takeDrops();
  showDefaults();
  planNow();
}

async function loadModels() {
  known = (await models()).data;
  $("model").replaceChildren(...known.map((each) => make("option", { value: each.id }, each.id)));
}

async function loadLoras() {
  const found = (await loras()).data;
  $("loras").hidden = found.length === 0;
  $("lora").append(...found.map((each) => make("option", { value: each.id }, each.id)));
}

const model = () => known.find((each) => each.id === $("model").value) ?? known[0] ?? {};
const defaults = () => model().defaults ?? {};

/** What the model takes where nothing is said. */
function showDefaults() {
  const own = defaults();
  const chosen = $("size").value;
  const usual = own.size ?? null;
  const text = picture ? "as the picture" : usual ? `${usual.replace("x", " × ")}, usual` : "the model's own";
  const others = SIZES.filter((each) => each !== usual);
  const sizes = picture && usual ? [usual, ...others] : others;
  $("size").replaceChildren(
    make("option", { value: "" }, text),
    ...sizes.map((each) => make("option", { value: each }, each.replace("x", " × "))),
    make("option", { value: "own" }, "another…"),
  );
  $("size").value = chosen;
  if (!$("size").value) $("size").value = "";
  for (const name of ["steps", "guidance", "shift", "fps"]) {
    $(name).placeholder = own[NUMBERS[name]] ?? "the model's own";
  }
  $("negative").placeholder = own.negative_prompt || "nothing";
  if (!$("seconds").value) setSeconds(own.num_frames && own.fps ? round(own.num_frames / own.fps) : 5, null);
  $("drop").hidden = model().image === "none" || source !== null;
  $("last-field").hidden = (model().last_image ?? "none") === "none" || source !== null;
  $("drop-title").textContent = picture ? picture.name : model().image === "must" ? "This model starts from a picture" : "Start from a picture";
  $("ceilings").textContent = own.size
    ? `${model().device} · VRAM ${bytes(model().vram_bytes)} · RAM ${bytes(model().ram_bytes)}` : "";
  showOwnSize();
}

const round = (number) => Math.round(number * 100) / 100;

function showOwnSize() {
  $("own-size").hidden = $("size").value !== "own";
}

function setSeconds(value, from) {
  frames = null;
  if (from !== $("seconds")) $("seconds").value = value;
  if (from !== $("length")) $("length").value = value;
  changed();
}

function restore() {
  const kept = recall("draft", {});
  for (const name of KEPT) if (kept[name]) $(name).value = kept[name];
  if (kept.seconds) $("length").value = kept.seconds;
  if ($("model").value === "") $("model").selectedIndex = 0;
}

function changed() {
  remember("draft", Object.fromEntries(KEPT.map((name) => [name, $(name).value])));
  clearTimeout(timer);
  timer = setTimeout(planNow, WAIT_MS);
}

/** The size of a video in the shape of its picture, within the area that is the model's own. */
function shaped() {
  const [width, height] = (defaults().size ?? "0x0").split("x").map(Number);
  if (!pictureSize || !width) return null;
  const side = model().side ?? 16;
  const ratio = pictureSize.height / pictureSize.width;
  const near = (length) => Math.max(side, Math.round(length / side) * side);
  return `${near(Math.sqrt((width * height) / ratio))}x${near(Math.sqrt(width * height * ratio))}`;
}

/** What is asked for, as the server takes it. */
function fields() {
  const found = { model: $("model").value, prompt: $("prompt").value.trim() };
  if (source) {
    found.size = source.size;
  } else if ($("size").value === "own") {
    if ($("width").value) found.width = Number($("width").value);
    if ($("height").value) found.height = Number($("height").value);
  } else if ($("size").value || shaped()) {
    found.size = $("size").value || shaped();
  }
  if (frames !== null) found.num_frames = frames;
  else if ($("seconds").value) found.seconds = $("seconds").value;
  for (const [name, field] of Object.entries(NUMBERS)) {
    if ($(name).value !== "") found[field] = Number($(name).value);
  }
  for (const name of ["sampler", "cache"]) if ($(name).value) found[name] = $(name).value;
  if ($("distilled").checked) found.distilled = true;
  if ($("negative").value.trim()) found.negative_prompt = $("negative").value.trim();
  if ($("lora").value) found.lora = `${$("lora").value}:${$("strength").value || 1}`;
  return found;
}

/** The request itself: as `fields`, with its picture or the video that it goes on from. */
function request() {
  const { size, ...others } = fields();
  if (source) return { ...others, continue_from: source.id };
  const found = size ? { ...others, size } : others;
  const last = $("last-field").hidden ? null : $("last").files[0] ?? null;
  if (picture === null && last === null) return found;
  const form = new FormData();
  for (const [name, value] of Object.entries(found)) form.append(name, value);
  if (picture !== null) form.append("input_reference", picture, picture.name);
  if (last !== null) form.append("last_image", last, last.name);
  return form;
}

async function planNow() {
  const found = { ...fields(), prompt: "" }; // what it shows costs nothing
  const key = JSON.stringify(found);
  if (key === asked) return;
  asked = key;
  asking?.abort();
  asking = new AbortController();
  $("plan").classList.add("waits");
  try {
    showPlan(await video.plan(found, asking.signal));
  } catch (error) {
    if (error.name === "AbortError") return;
    if (!(error instanceof ApiError)) asked = ""; // nobody answered: ask again when somebody does
    showProblem(error.message, null);
  }
  $("plan").classList.remove("waits");
}

/** Ask for the plan again: the server is another one by now. */
export function planAgain() {
  asked = "";
  planNow();
}

function showPlan(plan) {
  const made = plan.settings;
  const told = [made.size.replace("x", " × "), plural(made.frames, "frame"), plural(made.steps, "step")];
  $("frames-told").textContent = `${plural(made.frames, "frame")} at ${round(made.fps)} a second`;
  if (!plan.fits) {
    showProblem(`${told.join(" · ")} takes more than there is.`, plan);
    return;
  }
  $("plan").replaceChildren(
    make("p", { className: "verdict" },
      make("span", { className: "badge good" }, "fits"),
      make("strong", {}, `about ${duration(plan.seconds)}`),
      make("span", { className: "quiet" }, told.join(" · "))),
    gauge("VRAM", plan.vram_bytes, plan.vram_limit_bytes),
    gauge("RAM", plan.ram_bytes, plan.ram_limit_bytes),
    phases(plan),
  );
  $("generate").disabled = false;
}

function gauge(name, value, limit) {
  const over = value > limit;
  return make("div", { className: over ? "gauge over" : "gauge" },
    make("span", {}, name),
    make("progress", { max: limit, value: Math.min(value, limit), attrs: { "aria-label": `${name} of its ceiling` } }),
    make("span", { className: "quiet" }, `${bytes(value)} of ${bytes(limit)}`));
}

function phases(plan) {
  if (!plan.phases?.length) return null;
  const rows = plan.phases.map((each) => make("tr", {},
    make("th", { scope: "row" }, each.name), make("td", {}, duration(each.seconds)),
    make("td", {}, bytes(each.vram_bytes)), make("td", {}, bytes(each.ram_bytes))));
  const head = make("tr", {}, ...["Phase", "Time", "VRAM", "RAM"].map((text) => make("th", { scope: "col" }, text)));
  const wasOpen = $("plan").querySelector("details")?.open ?? false;
  return make("details", { open: wasOpen }, make("summary", {}, "Phase by phase"),
    make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows)));
}

function showProblem(text, plan) {
  const problem = plan?.problem;
  const parts = [make("p", { className: "verdict" }, make("span", { className: "badge bad" },
    problem?.need_bytes ? "does not fit" : "not possible"), make("span", {}, text))];
  if (problem?.need_bytes) parts.push(gauge(problem.resource ?? "needed", problem.need_bytes, problem.limit_bytes));
  const nearest = plan?.nearest ?? null;
  if (problem?.remedy && nearest === null) parts.push(make("p", { className: "quiet" }, problem.remedy));
  if (nearest !== null) {
    const words = [nearest.size?.replace("x", " × "), nearest.num_frames && plural(nearest.num_frames, "frame")];
    parts.push(make("button", { type: "button", className: "plain", on: { click: () => useNearest(nearest) } },
      `Take ${words.filter(Boolean).join(", ")}`));
  }
  $("plan").replaceChildren(...parts);
  $("generate").disabled = problem !== undefined && problem !== null;
}

function useNearest(nearest) {
  if (nearest.size) setSize(nearest.size);
  if (nearest.num_frames) setFrames(nearest.num_frames, Number($("fps").value) || defaults().fps);
  changed();
}

function setSize(size) {
  const listed = [...$("size").options].some((option) => option.value === size);
  $("size").value = listed ? size : "own";
  if (!listed) [$("width").value, $("height").value] = size.split("x");
  showOwnSize();
}

function setFrames(count, fps) {
  if (fps) setSeconds(round(count / fps), null);
  frames = count;
}

async function send() {
  const found = fields();
  if (!found.prompt && !source) {
    toast("Say what should happen.");
    $("prompt").focus();
    return;
  }
  $("generate").disabled = true;
  try {
    await video.create(request());
    if (source) goOnFrom(null);
  } catch (error) {
    toast(error.message);
  } finally {
    $("generate").disabled = false;
  }
}

function usePicture(file) {
  if (file && !file.type.startsWith("image/")) {
    toast(`${file.name || "This"} is no picture.`);
    return;
  }
  picture = file ?? null;
  pictureSize = null;
  const old = $("thumb").src;
  if (old.startsWith("blob:")) URL.revokeObjectURL(old);
  $("thumb").hidden = picture === null;
  $("picture-clear").hidden = picture === null;
  $("drop").classList.toggle("filled", picture !== null);
  $("drop-hint").textContent = picture ? "drop or paste another one" : "drop, paste or choose one";
  showDefaults();
  if (picture === null) {
    $("thumb").removeAttribute("src");
    $("picture").value = "";
  } else {
    $("thumb").src = URL.createObjectURL(picture);
    if (source) goOnFrom(null);
  }
  changed();
}

function takeDrops() {
  const zone = $("drop");
  const over = (is) => zone.classList.toggle("over", is);
  document.addEventListener("dragover", (event) => {
    if (!event.dataTransfer?.types.includes("Files")) return;
    event.preventDefault(); // else the browser leaves the page for the picture
    over(true);
  });
  document.addEventListener("dragleave", (event) => { if (event.relatedTarget === null) over(false); });
  document.addEventListener("drop", (event) => {
    over(false);
    const file = event.dataTransfer?.files[0];
    if (!file) return;
    event.preventDefault();
    usePicture(file);
  });
  document.addEventListener("paste", (event) => {
    const file = [...(event.clipboardData?.files ?? [])].find((each) => each.type.startsWith("image/"));
    if (file) usePicture(file);
  });
}

function goOnFrom(one) {
  source = one;
  $("source").hidden = one === null;
  $("source-text").textContent = one ? `Goes on from “${one.prompt}”` : "";
  $("size").disabled = one !== null;
  showDefaults();
  changed();
}

/** Take a video's settings again, its picture too. */
export async function useSettings(one) {
  const set = one.settings;
  goOnFrom(null);
  $("model").value = one.model;
  showDefaults();
  $("prompt").value = one.prompt;
  $("negative").value = set.negative_prompt === defaults().negative_prompt ? "" : set.negative_prompt ?? "";
  for (const [name, field] of Object.entries(NUMBERS)) $(name).value = set[field] ?? "";
  $("sampler").value = set.sampler ?? "";
  $("cache").value = one.cache ?? "";
  $("distilled").checked = set.distilled;
  const [lora, strength] = (one.lora[0] ?? ":1").split(":");
  $("lora").value = lora;
  $("strength").value = strength;
  usePicture(one.urls.input ? await fileOf(here(one.urls.input), "start.png") : null);
  setSize(one.size);
  setFrames(set.num_frames, set.fps);
  $("more").open = true;
  focusPrompt();
}

/** An address of the API's, seen from the page. */
const here = (path) => path.replace(/^\//, "");

/** Start a new video from the last frame of another. */
export async function useLastFrame(one) {
  goOnFrom(null);
  $("model").value = one.model;
  usePicture(await fileOf(here(one.urls.last_frame), "last-frame.png"));
  setSize(one.size);
  focusPrompt();
}

/** Go on from a video: one file, its settings, its colours. */
export function goOn(one) {
  usePicture(null);
  $("model").value = one.model;
  goOnFrom(one);
  $("prompt").value = one.prompt;
  focusPrompt();
}

function focusPrompt() {
  $("prompt").focus();
  $("form").scrollIntoView({ block: "start" });
  changed();
}
