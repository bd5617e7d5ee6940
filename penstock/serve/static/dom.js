// Elements, text and times. Nothing here ever parses text as HTML.

export const $ = (id) => document.getElementById(id);

/** An element with properties, `on` handlers, `data` and `aria` attributes, and children. */
export function make(tag, { on = {}, data = {}, attrs = {}, ...props } = {}, ...children) {
  const element = Object.assign(document.createElement(tag), props);
  for (const [name, handler] of Object.entries(on)) element.addEventListener(name, handler);
  for (const [name, value] of Object.entries(attrs)) element.setAttribute(name, value);
  Object.assign(element.dataset, data);
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

export const button = (text, does, props = {}) =>
  make("button", { type: "button", className: "plain", ...props, on: { click: does } }, text);

/** Put `children` into `parent` in this order; those that are there already stay as they are. */
export function arrange(parent, children) {
  const wanted = new Set(children);
  for (const child of [...parent.children]) if (!wanted.has(child)) child.remove();
  children.forEach((child, place) => {
    if (parent.children[place] !== child) parent.insertBefore(child, parent.children[place] ?? null);
  });
}

export function duration(seconds) {
  if (!Number.isFinite(seconds)) return "";
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  if (seconds < 90) return `${Math.round(seconds)} s`;
  const minutes = Math.round(seconds / 60);
  if (minutes < 90) return `${minutes} min`;
  return `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

export function bytes(count) {
  const gib = count / 2 ** 30;
  return gib >= 0.1 ? `${gib.toFixed(gib < 10 ? 2 : 1)} GiB` : `${Math.max(1, Math.round(count / 2 ** 20))} MiB`;
}

export const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;

let hiding = 0;

/** Say something for a few seconds, to eyes and to screen readers. */
export function toast(text) {
  const place = $("toast");
  place.textContent = text;
  place.hidden = false;
  clearTimeout(hiding);
  hiding = setTimeout(() => { place.hidden = true; }, 8000);
}

export function recall(name, otherwise) {
  try {
    return JSON.parse(localStorage.getItem(`penstock.${name}`)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

export function remember(name, value) {
  try {
    localStorage.setItem(`penstock.${name}`, JSON.stringify(value));
  } catch {
    // a browser that keeps nothing: the page works, and forgets
  }
}
