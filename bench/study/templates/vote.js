"use strict";
const $ = (id) => document.getElementById(id);
const study = JSON.parse($("study").textContent);
const STORE = "slimxl-study-" + study.study, SHORTEST_LOOK_MS = 250;
const served = location.protocol.startsWith("http");

/* FNV-1a, 32 bit: the seed of a rater's order, and the checksum of a file of votes. */
function hash(text) {
  let value = 0x811c9dc5;
  for (const byte of new TextEncoder().encode(text)) value = Math.imul(value ^ byte, 0x01000193);
  return value >>> 0;
}

/* mulberry32: numbers from 0 to 1, the same for the same text. */
function randomFrom(text) {
  let state = hash(text);
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let value = Math.imul(state ^ (state >>> 15), 1 | state);
    value = (value + Math.imul(value ^ (value >>> 7), 61 | value)) ^ value;
    return ((value ^ (value >>> 14)) >>> 0) / 4294967296;
  };
}

/* A rater's pairs: prompts in an order of the rater's own, each with another two of its pictures every time round. Then
   some of the first half come again in the last quarter, the sides changed, and pictures beside themselves come anywhere. */
function makePlan(rater) {
  const next = randomFrom(study.study + rater);
  const shuffled = (list) => {
    const copy = [...list];
    for (let i = copy.length - 1; i > 0; i--) {
      const j = Math.floor(next() * (i + 1));
      [copy[i], copy[j]] = [copy[j], copy[i]];
    }
    return copy;
  };
  const rounds = study.items.map((item) => {
    const names = item.pictures;
    return shuffled(names.flatMap((a, i) => names.slice(i + 1).map((b) => ({ prompt: item.prompt, sides: shuffled([a, b]) }))));
  });
  const plan = [];
  for (let round = 0; round < rounds[0].length; round++) plan.push(...shuffled(rounds.map((pairs) => pairs[round])));
  plan.splice(study.pairs);
  const fresh = plan.length, insert = (from, pair) => plan.splice(from + Math.floor(next() * (plan.length + 1 - from)), 0, pair);
  for (const { prompt, sides } of shuffled(plan.slice(0, Math.ceil(fresh / 2))).slice(0, study.repeats))
    insert(Math.ceil(fresh * 0.75), { prompt, sides: [...sides].reverse() });
  const alone = study.items.flatMap((item) => item.pictures.map((name) => ({ prompt: item.prompt, sides: [name, name] })));
  for (const pair of shuffled(alone).slice(0, study.same)) insert(0, pair);
  return plan;
}

function newRater() {
  return { rater: [...crypto.getRandomValues(new Uint8Array(8))].map((byte) => byte.toString(16).padStart(2, "0")).join(""), votes: [], begun: false };
}

let state = newRater(), plan, shownAt = null, ticket = 0, retry;
try { state = JSON.parse(localStorage.getItem(STORE)) || state; } catch { /* no storage, or not ours: the votes stay in this tab */ }

function keep() {
  try { localStorage.setItem(STORE, JSON.stringify(state)); } catch { say("This browser keeps nothing: stay on this page until you have saved your votes."); }
}
function say(text, bad = false) { $("message").textContent = text; $("message").classList.toggle("bad", bad); }

/* What a file and a message to the server hold alike. */
function sheet(votes) {
  const plain = votes.map(({ index, first, second, choice, ms, at }) => ({ study: study.study, rater: state.rater, index, first, second, choice, ms, at }));
  const checksum = hash(plain.map((vote) => Object.values(vote).join(" ")).join("\n"));
  return JSON.stringify({ schema_version: "slimxl.bench.votes/1", votes: plain, checksum }, null, 1);
}

function show() {
  plan = makePlan(state.rater);
  const at = state.votes.length, over = at >= plan.length;
  $("start").hidden = state.begun; $("pair").hidden = !state.begun || over; $("done").hidden = !state.begun || !over;
  $("count").textContent = plan.length;
  $("progress").value = at / plan.length;
  $("place").textContent = state.begun && !over ? `${at + 1} of ${plan.length}` : "Which picture do you prefer?";
  if (over) thank();
  else if (state.begun) showPair(plan[at], at);
}

async function showPair({ prompt, sides }, at) {
  const mine = ++ticket, images = ["first", "second"].map((id) => $(id).firstElementChild);
  shownAt = null;
  $("pair").classList.add("waiting");
  $("prompt").textContent = prompt;
  $("back").disabled = at === 0;
  for (const id of ["first", "second", "tie"]) $(id).classList.remove("chosen");
  try {
    await Promise.all(images.map(async (image, side) => {
      image.src = `pictures/${sides[side]}.png`;
      await image.decode();
      const ratio = image.naturalWidth / image.naturalHeight;
      if (mine === ticket) image.style.setProperty("--ratio", ratio);
      if (mine === ticket) $("pictures").classList.toggle("tall", ratio < 0.65); /* larger side by side, on a phone too */
    }));
  } catch {
    if (mine === ticket) missing();
    return;
  }
  if (mine !== ticket) return;
  $("pair").classList.remove("waiting");
  shownAt = performance.now();
  for (const name of plan[at + 1]?.sides ?? []) new Image().src = `pictures/${name}.png`;
}

/* Told to the maker as a vote for neither; the rater goes on. */
function missing() {
  say("A picture of this pair is missing. ", true);
  const button = document.createElement("button");
  button.textContent = "Go on without it";
  button.onclick = () => { say(""); add("missing", 0); };
  $("message").append(button);
}

function vote(choice) {
  if ($("pair").hidden || shownAt === null) return;
  const ms = Math.round(performance.now() - shownAt);
  if (ms < SHORTEST_LOOK_MS) return; /* the second half of a double tap */
  shownAt = null;
  $(choice).classList.add("chosen");
  setTimeout(() => add(choice, ms), 110);
}

function add(choice, ms) {
  const index = state.votes.length, [first, second] = plan[index].sides;
  state.saved = false;
  state.votes.push({ index, first, second, choice, ms, at: Date.now(), sent: false });
  keep();
  show();
  send();
}

function back() {
  if (!state.votes.length || (shownAt === null && !$("pair").hidden && !$("pair").classList.contains("waiting"))) return;
  state.votes.pop();
  say("");
  keep();
  show();
}

/* A vote counts as sent once the server says that it is on its disk; until then it is sent again. */
let sending = false;
async function send() {
  const rater = state.rater, votes = state.votes.filter((vote) => !vote.sent);
  if (!served || sending || !votes.length) return;
  clearTimeout(retry);
  sending = true;
  let arrived = false;
  try {
    const reply = await fetch("votes", { method: "POST", headers: { "Content-Type": "application/json" }, body: sheet(votes) });
    if (!reply.ok) throw new Error(reply.status === 400 ? await reply.text() : "the server does not take votes");
    for (const vote of votes) vote.sent = true;
    arrived = true;
    if (state.rater === rater) keep();
    say("");
  } catch (error) {
    const why = error instanceof TypeError ? "the server does not answer" : error.message;
    say(`Your votes are kept in this browser, but not sent yet: ${why}.`, true);
    retry = setTimeout(send, 5000);
  }
  sending = false;
  if (!$("done").hidden) thank();
  if (arrived) send(); /* what was voted meanwhile */
}

function allSent() { return served && state.votes.every((vote) => vote.sent); }
function thank() {
  $("kept").textContent = allSent() ? `All ${state.votes.length} votes have arrived. You can close this page.`
    : state.saved ? "Your votes are saved as a file. Please send it to whoever asked you."
    : "Please save your votes as a file, and send it to whoever asked you.";
}

function save() {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([sheet(state.votes) + "\n"], { type: "application/json" }));
  link.download = `votes-${study.study}-${state.rater}.json`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  state.saved = true;
  keep();
  thank();
}

function another() {
  if (!allSent() && !state.saved && !confirm("These votes are not saved yet, and would be lost. Go on?")) return;
  state = newRater();
  keep();
  say("");
  show();
}

$("begin").onclick = () => { state.begun = true; keep(); show(); };
for (const choice of ["first", "second", "tie"]) $(choice).onclick = () => vote(choice);
$("back").onclick = $("review").onclick = back;
$("save").onclick = save;
$("another").onclick = another;
$("theme").onclick = () => {
  const root = document.documentElement, dark = matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = (root.dataset.theme || (dark ? "dark" : "light")) === "dark" ? "light" : "dark";
};
const KEYS = { ArrowLeft: "first", ArrowUp: "first", ArrowRight: "second", ArrowDown: "second", " ": "tie" };
for (const kind of ["keydown", "keyup"]) addEventListener(kind, (event) => {
  if ($("pair").hidden || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Backspace" && kind === "keydown") back();
  if (!(event.key in KEYS)) return;
  event.preventDefault(); /* space would press the button that has the focus, arrows would scroll */
  if (kind === "keydown" && !event.repeat) vote(KEYS[event.key]);
});
show();
send();
