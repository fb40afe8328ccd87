"use strict";

// The playground: requests one image from each chosen variant, all at once, and shows them as they arrive.

const $ = (id) => document.getElementById(id);
const KEY = "ppcl-api-key";
const FIELDS = ["prompt", "negative_prompt", "seed", "steps", "width", "height", "true_cfg_scale", "guidance_scale", "deadline", "lora", "lora_scale"];
const RUNS_KEPT = 20;

let served = null; // the answer of GET v1/models
let running = null; // the AbortController of the run under way

function headers() {
  const key = sessionStorage.getItem(KEY);
  return { "content-type": "application/json", ...(key ? { authorization: `Bearer ${key}` } : {}) };
}

/** The error of an answer as a sentence. */
async function wordsOf(response) {
  let words = `The server answered ${response.status}.`;
  try {
    words = sentence((await response.json()).error.message);
  } catch {
    // A proxy answered in a format of its own: only the status is known.
  }
  const wait = response.headers.get("retry-after");
  return wait ? `${words} Try again in ${wait} s.` : words;
}

function sentence(words) {
  // A parameter's name stays as it is written.
  const text = /^[a-z]+\b(?!_)/.test(words) ? words.charAt(0).toUpperCase() + words.slice(1) : words;
  return /[.!?]$/.test(text) ? text : `${text}.`;
}

function say(words) {
  $("live").textContent = words;
}

function show(element, words) {
  element.textContent = words || "";
  element.hidden = !words;
}

// The form ------------------------------------------------------------------------------------------------------------

const count = (n) => (n >= 1e9 ? `${(n / 1e9).toPrecision(3)} B` : n >= 1e6 ? `${(n / 1e6).toPrecision(3)} M` : `${Math.round(n / 1e3)} k`);
const seconds = (s) => (s < 0.1 ? `${Math.round(s * 1000)} ms` : `${s.toFixed(s < 10 ? 2 : 1)} s`);

/** The facts shown for a model, in lines. */
function factsOf(model) {
  if (model.variants) return [["the largest variant that meets the deadline"]];
  const measured = [];
  if (model.quality !== null) measured.push(`score ${Math.round(model.quality * 100)} %`);
  if (model.seconds_per_step !== null) measured.push(`${seconds(model.seconds_per_step)} per step`);
  return [[`${count(model.parameters)} (${Math.round(model.share * 100)} %)`, `${model.blocks} blocks`], measured];
}

function showVariants(models, chosen) {
  $("variants").replaceChildren(
    ...models.map((model) => {
      const label = document.createElement("label");
      label.className = "variant";
      const box = document.createElement("input");
      Object.assign(box, { type: "checkbox", name: "variant", value: model.id, checked: chosen.includes(model.id) });
      const name = document.createElement("strong");
      name.textContent = model.id;
      const note = document.createElement("span");
      note.className = "note";
      note.textContent = factsOf(model).map((line) => line.join(" · ")).join("\n");
      const words = document.createElement("span");
      words.append(name, note);
      label.append(box, words);
      return label;
    }),
  );
}

const chosenVariants = () => [...document.querySelectorAll("input[name=variant]:checked")].map((box) => box.value);

function newSeed() {
  $("seed").value = crypto.getRandomValues(new Uint32Array(1))[0];
}

async function loadModels() {
  $("generate").disabled = true;
  show($("problem"), "");
  let response;
  try {
    response = await fetch("v1/models", { headers: headers() });
  } catch {
    return show($("problem"), "The server cannot be reached. Is it still running? Load the page again to retry.");
  }
  if (response.status === 401) {
    $("key-field").hidden = false;
    $("variants").firstElementChild.textContent = "Enter an API key to see the variants.";
    if (sessionStorage.getItem(KEY)) show($("problem"), await wordsOf(response));
    return $("key").focus();
  }
  if (!response.ok) return show($("problem"), await wordsOf(response));
  served = await response.json();
  const settings = readLink();
  const [width, height] = served.defaults.size.split("x");
  const start = { seed: "0", steps: served.defaults.num_inference_steps, width, height, ...settings };
  showLoras(served.loras);
  for (const name of FIELDS) if (start[name] !== undefined && !$(name).value) $(name).value = start[name];
  for (const side of ["width", "height"]) Object.assign($(side), { min: served.multiple, step: served.multiple });
  $("steps").max = served.limits.steps;
  $("prompt").maxLength = $("negative_prompt").maxLength = served.limits.prompt_characters;
  for (const field of document.querySelectorAll("[data-argument]")) {
    field.hidden = !served.arguments.includes(field.dataset.argument);
  }
  const variants = served.data.filter((model) => !model.lora);
  const ids = variants.map((model) => model.id);
  const linked = (settings.variants || "").split(" ").filter((id) => ids.includes(id));
  const named = ids.filter((id) => id !== "auto");
  showVariants(variants, linked.length ? linked : [named[0], named[named.length - 1]]);
  offerDeadline();
  noteShares();
  $("generate").disabled = running !== null;
}

function showLoras(names) {
  $("lora-field").hidden = !names.length;
  const options = ["", ...names].map((name) => new Option(name || "none", name));
  $("lora").replaceChildren(...options);
}

/** What of the LoRA falls on parts that a chosen variant replaces. */
function noteShares() {
  const lora = $("lora").value;
  $("lora_scale").disabled = !lora;
  const parts = chosenVariants().flatMap((id) => {
    const model = served?.data.find((one) => one.id === `${id}+${lora}`);
    return model && model.lora_share < 0.9995 ? [`${id} takes ${Math.round(model.lora_share * 100)} % of it`] : [];
  });
  $("lora-note").textContent = lora && parts.length ? sentence(parts.join(", ")) : "";
}

function offerDeadline() {
  $("deadline-field").hidden = !chosenVariants().includes("auto");
}

// The link: settings live behind the #, which browsers keep to themselves ----------------------------------------------

function readLink() {
  return Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
}

function linkOf() {
  const settings = new URLSearchParams();
  for (const name of FIELDS) if ($(name).value && !$(name).closest("[hidden]")) settings.set(name, $(name).value);
  settings.set("variants", chosenVariants().join(" "));
  return `${location.origin}${location.pathname}#${settings}`;
}

async function share() {
  const link = linkOf();
  history.replaceState(null, "", link);
  $("link").value = link;
  try {
    await navigator.clipboard.writeText(link);
    $("share").textContent = "Copied";
    say("The link is copied.");
    setTimeout(() => ($("share").textContent = "Copy link"), 2000);
  } catch {
    // Browsers that do not let a page write the clipboard get the link to copy by hand.
    $("link-field").hidden = false;
    $("link").select();
    $("link").focus();
  }
}

// Checking -------------------------------------------------------------------------------------------------------------

/** What is wrong with a number field, in words; empty where nothing is. */
function wrongNumber(field) {
  const name = document.querySelector(`label[for=${field.id}]`).textContent;
  const state = field.validity;
  if (state.badInput) return `${name} is not a number.`;
  if (state.rangeUnderflow) return `${name} is at least ${field.min}.`;
  if (state.rangeOverflow) return `${name} is at most ${field.max}.`;
  if (state.stepMismatch) return field.step === "1" ? `${name} is a whole number.` : `${name} is a multiple of ${field.step}.`;
  return "";
}

/** Whether the form can be sent; says what is wrong and goes to the first such field. */
function checked() {
  const problems = [];
  show($("prompt-problem"), $("prompt").value.trim() ? "" : "Describe the image.");
  $("prompt").setAttribute("aria-invalid", String(!$("prompt-problem").hidden));
  if (!$("prompt-problem").hidden) problems.push($("prompt"));
  // Shown below the field, where the user looks.
  const wrong = { "numbers-problem": [], "variants-problem": [] };
  for (const field of document.querySelectorAll("input[type=number]")) {
    const words = field.closest("[hidden]") ? "" : wrongNumber(field);
    const place = field.id === "deadline" ? "variants-problem" : "numbers-problem";
    field.setAttribute("aria-invalid", String(Boolean(words)));
    field.setAttribute("aria-describedby", place);
    if (words) {
      wrong[place].push(words);
      problems.push(field);
    }
  }
  show($("problem"), "");
  if (!chosenVariants().length) {
    wrong["variants-problem"].push("Choose at least one variant.");
    problems.push(document.querySelector("input[name=variant]"));
  }
  for (const [place, words] of Object.entries(wrong)) show($(place), words.join(" "));
  problems[0]?.focus();
  return problems.length === 0;
}

function requestFor(variant) {
  const value = (id) => ($(id).closest("[hidden]") ? "" : $(id).value.trim());
  const number = (id) => (value(id) === "" ? undefined : Number(value(id)));
  const sides = value("width") && value("height");
  return {
    model: variant,
    prompt: $("prompt").value,
    negative_prompt: value("negative_prompt") || undefined,
    seed: number("seed"),
    num_inference_steps: number("steps"),
    size: sides ? `${value("width")}x${value("height")}` : "auto",
    true_cfg_scale: number("true_cfg_scale"),
    guidance_scale: number("guidance_scale"),
    lora: value("lora") ? { name: value("lora"), scale: number("lora_scale") ?? 1 } : undefined,
    deadline_ms: variant === "auto" && number("deadline") ? Math.ceil(number("deadline") * 1000) : undefined,
    stream: true,
    partial_images: 3,
  };
}

// Running --------------------------------------------------------------------------------------------------------------

/** The events of a stream, parsed, as they come. */
async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (text + value).split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").filter((line) => line.startsWith("data: ")).map((line) => line.slice(6)).join("\n");
      if (data) yield JSON.parse(data);
    }
  }
}

class Card {
  constructor(variant, asked) {
    this.element = $("card-template").content.firstElementChild.cloneNode(true);
    this.variant = variant;
    this.asked = asked;
    this.started = performance.now();
    this.part("strong").textContent = variant;
    this.part(".waiting").textContent = "Waiting";
  }

  part(selector) {
    return this.element.querySelector(selector);
  }

  picture(event, alt) {
    const image = this.part("img");
    const [width, height] = event.size.split("x").map(Number);
    Object.assign(image, { width, height, alt, src: `data:image/${event.output_format};base64,${event.b64_json}`, hidden: false });
    image.classList.toggle("small", Math.max(width, height) <= 128);
    this.part(".waiting").hidden = true;
  }

  preview(event) {
    this.picture(event, `Preview of ${this.variant} after ${event.step} steps`);
    this.part("progress").value = event.step / (this.asked.num_inference_steps || event.step + 1);
    this.part(".facts").textContent = `step ${event.step}${this.asked.num_inference_steps ? ` of ${this.asked.num_inference_steps}` : ""}`;
  }

  completed(event) {
    this.picture(event, `${this.asked.prompt}, generated by ${event.variant}`);
    const model = served.data.find((one) => one.id === event.variant.split("+")[0]);
    const took = event.timings.denoising ?? event.timings.total;
    this.part(".name").textContent = this.variant === "auto" ? `auto: ${event.variant}` : this.variant;
    this.part(".badge").hidden = !event.degraded;
    this.part(".facts").textContent = [
      model ? `${count(model.parameters)} parameters, ${model.blocks} blocks` : "",
      `${seconds(event.timings.total)}, of which ${seconds(took)} for ${event.num_inference_steps} steps`,
      `seed ${event.seed}`,
    ].filter(Boolean).join("\n");
    const save = this.part(".save");
    Object.assign(save, { href: this.part("img").src, download: `${event.variant}-${event.seed}.${event.output_format}`, hidden: false });
    save.setAttribute("aria-label", `Save the image of ${event.variant}`);
    say(`${this.variant} is done after ${seconds(event.timings.total)}.`);
    this.done = true;
    this.end();
  }

  fail(words) {
    this.part(".waiting").textContent = "No image";
    show(this.part(".problem"), words);
    say(`${this.variant}: ${words}`);
    this.end();
  }

  end() {
    this.element.classList.add("ended");
  }

  async run(signal) {
    try {
      const response = await fetch("v1/images/generations", {
        method: "POST", headers: headers(), body: JSON.stringify(this.asked), signal,
      });
      if (!response.ok) return this.fail(await wordsOf(response));
      this.part(".waiting").textContent = "Generating";
      for await (const event of eventsOf(response)) {
        if (event.type === "image_generation.partial_image") this.preview(event);
        else if (event.type === "image_generation.completed") this.completed(event);
        else if (event.type === "error") return this.fail(sentence(event.error.message));
      }
      if (!this.done) this.fail("The answer ended before the image was done.");
    } catch (error) {
      if (signal.aborted) this.fail("Stopped.");
      else this.fail("The connection to the server was lost.");
    }
  }
}

async function generate(submitted) {
  submitted.preventDefault();
  if (running || !served || !checked()) return;
  // Only images from the same noise can be compared side by side.
  if (!$("seed").value) newSeed();
  history.replaceState(null, "", linkOf());
  running = new AbortController();
  $("generate").disabled = true;
  $("stop").hidden = false;
  const cards = chosenVariants().map((variant) => new Card(variant, requestFor(variant)));
  const run = $("run-template").content.firstElementChild.cloneNode(true);
  run.querySelector("h2").textContent = $("prompt").value;
  const { size, num_inference_steps: steps, seed, lora } = cards[0].asked;
  run.querySelector(".note").textContent = [size === "auto" ? "" : size.replace("x", " × "), steps ? `${steps} steps` : "", seed === undefined ? "" : `seed ${seed}`, lora ? `LoRA ${lora.name} × ${lora.scale}` : ""].filter(Boolean).join(", ");
  run.querySelector(".cards").append(...cards.map((card) => card.element));
  $("empty").hidden = true;
  $("results").prepend(run);
  for (const old of [...document.querySelectorAll(".run")].slice(RUNS_KEPT)) old.remove();
  // On a narrow screen the images are below the form.
  if (run.getBoundingClientRect().top > innerHeight * 0.8) run.scrollIntoView({ block: "start" });
  say(`Generating with ${cards.map((card) => card.variant).join(", ")}.`);
  await Promise.all(cards.map((card) => card.run(running.signal)));
  running = null;
  $("generate").disabled = false;
  $("stop").hidden = true;
}

$("form").addEventListener("submit", generate);
$("stop").addEventListener("click", () => {
  running?.abort();
  $("generate").focus();
});
$("new-seed").addEventListener("click", newSeed);
$("share").addEventListener("click", share);
$("variants").addEventListener("change", () => {
  offerDeadline();
  noteShares();
});
$("lora").addEventListener("change", noteShares);
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("form").requestSubmit();
});
$("use-key").addEventListener("click", () => {
  sessionStorage.setItem(KEY, $("key").value.trim());
  loadModels();
});
$("key").addEventListener("keydown", (event) => {
  if (event.key !== "Enter") return;
  event.preventDefault();
  $("use-key").click();
});
addEventListener("hashchange", () => location.reload());
if (sessionStorage.getItem(KEY)) $("key").value = sessionStorage.getItem(KEY);
loadModels();
