// One job of the queue: running, waiting, or ended without a video.

import { bytes, button, duration, make } from "./dom.js";

export class QueueCard {
  constructor(one, acts) {
    this.id = one.id;
    this.acts = acts;
    this.preview = make("img", { className: "preview", alt: "", hidden: true });
    this.title = make("p", { className: "title" });
    this.facts = make("p", { className: "quiet facts" });
    this.state = make("span", { className: "badge" });
    this.bar = make("progress", { max: 100, value: 0 });
    this.told = make("p", { className: "quiet told" });
    this.notice = make("p", { className: "quiet told" });
    this.problem = make("p", { className: "problem", hidden: true });
    this.buttons = make("div", { className: "buttons" });
    const act = (name, text, label) => button(text, () => acts[name](this.id), { ariaLabel: label, className: `plain ${name}` });
    this.act = {
      up: button("↑", () => this.move(-1), { ariaLabel: "Move up" }),
      down: button("↓", () => this.move(1), { ariaLabel: "Move down" }),
      pause: act("pause", "Pause"),
      resume: act("resume", "Resume"),
      cancel: act("cancel", "Cancel"),
      remove: act("remove", "Remove"),
      settings: act("settings", "Use settings"),
    };
    this.element = make("li", { className: "job", data: { id: one.id }, tabIndex: -1 },
      this.preview,
      make("div", { className: "about" },
        make("div", { className: "line" }, this.state, this.title), this.facts, this.bar, this.told, this.notice, this.problem),
      this.buttons);
    this.takeKeys();
    this.takeDrags();
  }

  move(by) {
    this.to(this.place + by);
  }

  to(place) {
    const wanted = Math.max(0, Math.min(this.total - 1, place));
    if (wanted !== this.place) this.acts.move(this.id, wanted);
  }

  takeKeys() {
    this.element.addEventListener("keydown", (event) => {
      if (!event.altKey || !this.waits) return;
      const by = { ArrowUp: -1, ArrowDown: 1 }[event.key];
      if (by === undefined) return;
      event.preventDefault();
      this.move(by);
    });
  }

  takeDrags() {
    const { element } = this;
    element.addEventListener("dragstart", (event) => {
      event.dataTransfer.setData("application/x-penstock-job", this.id);
      event.dataTransfer.effectAllowed = "move";
      element.classList.add("dragged");
    });
    element.addEventListener("dragend", () => element.classList.remove("dragged"));
    element.addEventListener("dragover", (event) => {
      if (!this.waits || !event.dataTransfer.types.includes("application/x-penstock-job")) return;
      event.preventDefault();
      element.classList.add("target");
    });
    element.addEventListener("dragleave", () => element.classList.remove("target"));
    element.addEventListener("drop", (event) => {
      element.classList.remove("target");
      const id = event.dataTransfer.getData("application/x-penstock-job");
      if (!id) return;
      event.preventDefault();
      event.stopPropagation();
      if (id !== this.id) this.acts.move(id, this.place);
    });
  }

  show(one, live, total) {
    this.waits = one.status === "queued";
    this.place = one.position ?? 0;
    this.total = total;
    const runs = one.status === "in_progress";
    this.element.draggable = this.waits && total > 1;
    this.element.classList.toggle("runs", runs);
    this.title.textContent = one.prompt || one.id;
    this.title.title = one.prompt ?? "";
    const words = [one.model, one.size?.replace("x", " × "), one.seconds && duration(Number(one.seconds))];
    this.facts.textContent = words.filter(Boolean).join(" · ");
    this.showState(one, runs);
    this.showProgress(one, live, runs);
    this.showButtons(one, runs);
  }

  showState(one, runs) {
    const cancelled = one.error?.code === "cancelled";
    let [text, kind] = ["failed", "bad"];
    if (runs) [text, kind] = ["making", "on"];
    else if (one.paused) [text, kind] = ["paused", "held"];
    else if (this.waits) [text, kind] = [this.place === 0 ? "next" : `no. ${this.place + 1}`, ""];
    else if (cancelled) [text, kind] = ["cancelled", "held"];
    this.state.textContent = text;
    this.state.className = `badge ${kind}`;
    const problem = one.status === "failed" && !cancelled ? one.error?.message ?? "It failed." : "";
    this.problem.textContent = problem;
    this.problem.hidden = !problem;
  }

  showProgress(one, live, runs) {
    const progress = live?.progress ?? one.progress ?? 0;
    const partly = !runs && progress > 0;
    this.bar.hidden = !runs && !partly;
    this.bar.value = progress;
    this.bar.setAttribute("aria-label", `${progress} %`);
    const phase = live?.phase ?? one.phase;
    const step = live?.step ?? one.step;
    const steps = live?.total ?? one.steps;
    const eta = live?.eta_s ?? one.eta_s;
    const parts = [];
    if (runs) {
      parts.push(`${progress} %`);
      if (phase) parts.push(steps > 1 ? `${phase} ${step} of ${steps}` : phase);
      if (eta !== null && eta !== undefined) parts.push(`${duration(eta)} left`);
      if (live?.vram_bytes) parts.push(`VRAM ${bytes(live.vram_bytes)}`);
      if (live?.ram_bytes) parts.push(`RAM ${bytes(live.ram_bytes)}`);
    } else if (this.waits && one.plan?.seconds) {
      parts.push(`takes about ${duration(one.plan.seconds)}`);
    }
    if (partly) parts.push(`${progress} % is kept`);
    this.told.textContent = parts.join(" · ");
    this.notice.textContent = runs ? live?.notice ?? "" : "";
    const picture = live?.preview ?? one.urls?.preview ?? null;
    this.preview.hidden = picture === null;
    if (picture !== null && this.picture !== picture) {
      this.picture = picture;
      this.preview.src = picture.startsWith("data:") ? picture : picture.replace(/^\//, "");
      this.preview.alt = "What it looks like so far";
    }
  }

  showButtons(one, runs) {
    const { up, down, pause, resume, cancel, remove, settings } = this.act;
    const wanted = [];
    if (this.waits && this.total > 1) wanted.push(up, down);
    up.disabled = this.place === 0;
    down.disabled = this.place === this.total - 1;
    if (runs || (this.waits && !one.paused)) wanted.push(pause, cancel);
    else if (one.paused) wanted.push(resume, cancel);
    else wanted.push(resume, settings, remove);
    const now = [...this.buttons.children];
    if (now.length !== wanted.length || now.some((each, place) => each !== wanted[place])) {
      const focused = document.activeElement;
      const hadFocus = this.buttons.contains(focused);
      this.buttons.replaceChildren(...wanted);
      if (hadFocus) (wanted.includes(focused) ? focused : wanted[0]).focus();
    }
  }
}
