// One finished video: it plays where it is, and its settings can be taken again.

import { button, duration, make } from "./dom.js";

const NAMES = { num_inference_steps: "steps", guidance_scale: "guidance", flow_shift: "shift", seed: "seed" };

export class GalleryCard {
  constructor(one, acts) {
    this.player = make("video", {
      controls: true, loop: true, muted: true, playsInline: true, preload: "metadata",
      poster: `v1/videos/${one.id}/content?variant=thumbnail`,
      src: `v1/videos/${one.id}/content`,
      ariaLabel: one.prompt || one.id,
    });
    const [width, height] = (one.size ?? "16x9").split("x").map(Number);
    this.player.style.aspectRatio = `${width} / ${height}`;
    this.title = make("p", { className: "title" });
    this.facts = make("p", { className: "quiet facts" });
    const act = (name, text, title) => button(text, () => acts[name](one.id), { title });
    this.element = make("article", { className: "film", data: { id: one.id } },
      this.player, this.title, this.facts,
      make("div", { className: "buttons" },
        act("settings", "Use settings", "Prompt, picture, size and seed into the form"),
        act("last", "Use as start", "A new video that starts from this one's last frame"),
        act("goOn", "Continue", "Go on from the last frame, in one file with this one"),
        make("a", { className: "plain", href: `v1/videos/${one.id}/content`, download: `${one.id}.mp4` }, "Download"),
        act("remove", "Delete", "The video and its settings")));
  }

  show(one) {
    this.title.textContent = one.prompt || one.id;
    this.title.title = one.prompt ?? "";
    const words = [one.model, one.size?.replace("x", " × "), one.seconds && duration(Number(one.seconds))];
    if (one.report?.seconds) words.push(`took ${duration(one.report.seconds)}`);
    for (const [field, name] of Object.entries(NAMES)) {
      const value = one.settings?.[field];
      if (value !== null && value !== undefined) words.push(`${name} ${value}`);
    }
    this.facts.textContent = words.filter(Boolean).join(" · ");
  }
}
