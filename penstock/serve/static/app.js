// The page: what the server has, kept up to date by its events, drawn in place.

import { ApiError, call, follow, queue, video } from "./api.js";
import * as composer from "./composer.js";
import { $, arrange, toast } from "./dom.js";
import { GalleryCard } from "./gallery.js";
import { QueueCard } from "./queue.js";

const videos = new Map(); // by id, as the server tells them
const live = new Map(); // by id: the last progress
const queueCards = new Map();
const galleryCards = new Map();
let held = false;
let more = null; // the id after which older videos are
let drawing = 0;

const isDone = (one) => one.status === "completed";
const isRunning = (one) => one.status === "in_progress";
const isWaiting = (one) => one.status === "queued";

/** Everything anew: at the start, and whenever the connection was lost. */
async function refresh() {
  const [first, line] = await Promise.all([video.list(), queue.get()]);
  videos.clear();
  live.clear();
  for (const one of first.data) videos.set(one.id, one);
  more = first.has_more ? first.last_id : null;
  held = Boolean(line.paused);
  draw();
}

async function showOlder() {
  const next = await video.list(more);
  for (const one of next.data) videos.set(one.id, one);
  more = next.has_more ? next.last_id : null;
  draw();
}

const handlers = {
  video(one) {
    const before = videos.get(one.id);
    if (before?.status !== one.status) announce(one);
    if (!isRunning(one)) live.delete(one.id);
    videos.set(one.id, one);
    draw();
  },
  progress(told) {
    const last = live.get(told.id);
    live.set(told.id, { ...last, ...told, preview: told.preview ?? last?.preview ?? null });
    draw();
  },
  notice(told) {
    live.set(told.id, { ...live.get(told.id), notice: told.message });
    draw();
  },
  deleted(told) {
    videos.delete(told.id);
    live.delete(told.id);
    draw();
  },
  queue(told) {
    held = Boolean(told.paused);
    for (const [place, id] of (told.waiting ?? []).entries()) {
      const one = videos.get(id);
      if (one) videos.set(id, { ...one, position: place });
    }
    draw();
  },
};

function announce(one) {
  const words = { queued: "waits", in_progress: "is being made", completed: "is finished", failed: "has ended" };
  $("announce").textContent = `${one.prompt || one.id} ${words[one.status] ?? one.status}`;
}

function draw() {
  if (!drawing) drawing = requestAnimationFrame(drawNow);
}

function drawNow() {
  drawing = 0;
  const all = [...videos.values()];
  const waiting = all.filter(isWaiting).sort((a, b) => (a.position ?? 1e9) - (b.position ?? 1e9));
  const running = all.filter(isRunning);
  const ended = all.filter((one) => !isDone(one) && !isWaiting(one) && !isRunning(one));
  const cards = (list) => list.map((one) => card(queueCards, one, QueueCard));
  const total = waiting.length;
  waiting.forEach((one, place) => { one.position = place; });
  arrange($("running"), cards(running).map((each) => each.element));
  arrange($("waiting"), cards(waiting).map((each) => each.element));
  arrange($("ended"), cards(ended).map((each) => each.element));
  for (const one of [...running, ...waiting, ...ended]) {
    queueCards.get(one.id).show(one, live.get(one.id), total);
  }
  const done = all.filter(isDone).sort((a, b) => b.created_at - a.created_at || (a.id < b.id ? 1 : -1));
  arrange($("gallery"), done.map((one) => card(galleryCards, one, GalleryCard).element));
  for (const one of done) galleryCards.get(one.id).show(one);
  $("queue-empty").hidden = running.length + total + ended.length > 0;
  $("gallery-empty").hidden = done.length > 0;
  $("older").hidden = more === null;
  $("hold").hidden = !held && running.length + total === 0;
  $("hold").textContent = held ? "Go on with the queue" : "Pause the queue";
  $("hold").setAttribute("aria-pressed", String(held));
  for (const [cache, list] of [[queueCards, all], [galleryCards, done]]) {
    const there = new Set(list.map((one) => one.id));
    for (const id of cache.keys()) if (!there.has(id)) cache.delete(id);
  }
}

function card(cache, one, Kind) {
  if (!cache.has(one.id)) cache.set(one.id, new Kind(one, acts));
  return cache.get(one.id);
}

/** Do something, and tell what the server says against it. */
async function attempt(does) {
  try {
    return await does();
  } catch (error) {
    toast(error instanceof ApiError ? error.message : "The server does not answer.");
    return null;
  }
}

const acts = {
  cancel: (id) => attempt(() => video.does(id, "cancel")),
  pause: (id) => attempt(() => video.does(id, "pause")),
  resume: (id) => attempt(() => video.does(id, "resume")),
  move: (id, position) => attempt(() => video.move(id, position)),
  remove: (id) => attempt(() => video.remove(id)),
  settings: (id) => attempt(() => composer.useSettings(videos.get(id))),
  last: (id) => attempt(() => composer.useLastFrame(videos.get(id))),
  goOn: (id) => attempt(() => composer.goOn(videos.get(id))),
};

function linked(text, state) {
  $("link").textContent = text;
  $("link").dataset.state = state;
}

function themes() {
  const order = ["auto", "light", "dark"];
  const set = (name) => {
    if (name === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = name;
    const words = { auto: "Auto", light: "Light", dark: "Dark" };
    $("theme").textContent = words[name];
    $("theme").setAttribute("aria-label", `Colours: ${name === "auto" ? "as the system" : name}`);
  };
  let now = document.documentElement.dataset.theme ?? "auto";
  set(now);
  $("theme").addEventListener("click", () => {
    now = order[(order.indexOf(now) + 1) % order.length];
    set(now);
    try {
      localStorage.setItem("penstock.theme", now);
    } catch {
      // a browser that keeps nothing
    }
  });
}

/** Ask for the server's key until it is the right one. */
function askForKey() {
  return new Promise((resolve) => {
    $("key-form").addEventListener("submit", async () => {
      await attempt(() => call("page/key", { method: "POST", body: { key: $("key").value } }));
      resolve();
    }, { once: true });
    $("ask-key").showModal();
  });
}

async function admitted() {
  for (;;) {
    try {
      return await queue.get();
    } catch (error) {
      if (!(error instanceof ApiError) || error.status !== 401) throw error;
      await askForKey();
    }
  }
}

async function begin() {
  themes();
  $("older").addEventListener("click", () => attempt(showOlder));
  $("hold").addEventListener("click", () => attempt(held ? queue.release : queue.hold));
  try {
    await admitted();
    await composer.start();
  } catch (error) {
    linked("no answer", "lost");
    setTimeout(() => location.reload(), 3000);
    return;
  }
  let was = false;
  follow(handlers, () => {
    linked("connected", "on");
    attempt(refresh);
    if (was) composer.planAgain();
    was = true;
  }, () => linked("reconnecting", "lost"));
}

begin();
