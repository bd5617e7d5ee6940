// The server's API, and its events. Every address is the page's own host.

export class ApiError extends Error {
  constructor(status, body) {
    const error = body?.error ?? {};
    super(error.message ?? body?.detail ?? `the server answered ${status}`);
    Object.assign(this, { status, code: error.code, plan: error.plan ?? null });
  }
}

/** Fetch JSON; `body` is an object or FormData. Throws ApiError for an answer that is an error. */
export async function call(path, { method = "GET", body, signal } = {}) {
  const isForm = body instanceof FormData;
  const init = { method, signal, headers: { Accept: "application/json" } };
  if (body !== undefined) {
    init.body = isForm ? body : JSON.stringify(body);
    if (!isForm) init.headers["Content-Type"] = "application/json";
  }
  const answer = await fetch(path, init);
  const said = await answer.json().catch(() => null);
  if (!answer.ok) throw new ApiError(answer.status, said);
  return said;
}

export const video = {
  list: (after) => call(`v1/videos?limit=100&order=desc${after ? `&after=${encodeURIComponent(after)}` : ""}`),
  create: (body) => call("v1/videos", { method: "POST", body }),
  plan: (body, signal) => call("v1/videos/plan", { method: "POST", body, signal }),
  remove: (id) => call(`v1/videos/${id}`, { method: "DELETE" }),
  does: (id, what) => call(`v1/videos/${id}/${what}`, { method: "POST" }),
  move: (id, position) => call(`v1/videos/${id}/move?position=${position}`, { method: "POST" }),
};

export const queue = {
  get: () => call("v1/queue"),
  hold: () => call("v1/queue/pause", { method: "POST" }),
  release: () => call("v1/queue/resume", { method: "POST" }),
};

export const models = () => call("v1/models");
export const loras = () => call("v1/loras");

/** A file of the server's as a File, to be sent again. */
export async function fileOf(path, name) {
  const answer = await fetch(path);
  if (!answer.ok) throw new ApiError(answer.status, null);
  const blob = await answer.blob();
  return new File([blob], name, { type: blob.type });
}

/**
 * Follow the server's events until the page goes away. `opened` is called at every connection, the
 * first and those after a restart of the server: whatever happened between is to be asked for then.
 */
export function follow(handlers, opened, lost) {
  const source = new EventSource("v1/events");
  source.addEventListener("open", opened);
  for (const [name, handle] of Object.entries(handlers)) {
    source.addEventListener(name, (event) => handle(JSON.parse(event.data)));
  }
  source.addEventListener("error", () => {
    lost();
    if (source.readyState !== EventSource.CLOSED) return; // the browser tries again by itself
    setTimeout(() => follow(handlers, opened, lost), 2000);
  });
}
