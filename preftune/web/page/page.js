// Shows one pair at a time. A choice is kept in the browser until the server has said that it is on its disk, so neither a
// reload nor a server that went away loses it; it has a key of its own, so sending it twice stores it once.
const $ = (id) => document.getElementById(id);
const kept = "preftune-unsaved";
const tab = (sessionStorage.tab ??= crypto.randomUUID?.() ?? String(Math.random()));
let task = null;
let view = "rendered"; // rendered, raw or diff
let busy = false;
let seconds = 0;
let since = performance.now();

document.addEventListener("visibilitychange", () => {
  if (document.hidden) seconds += (performance.now() - since) / 1000;
  since = performance.now();
});

function say(text, bad = false) {
  $("said").textContent = text;
  $("said").classList.toggle("bad", bad);
}

async function ask(path, body) {
  const answer = await fetch(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });
  if (answer.status === 401) {
    location.reload();
    return new Promise(() => {});
  }
  const given = await answer.json();
  if (!answer.ok) throw Object.assign(new Error(given.error), { refused: answer.status < 500 });
  return given;
}

const wait = (ms) => new Promise((done) => setTimeout(done, ms));

// Asks until there is an answer; a refusal is an answer.
async function insist(path, body) {
  for (let pause = 500; ; pause = Math.min(2 * pause, 5000)) {
    try {
      return await ask(path, body);
    } catch (error) {
      if (error.refused) throw error;
      say("the server does not answer: trying again. What you chose is kept", true);
      await wait(pause);
    }
  }
}

function show(state, { said = "" } = {}) {
  const { done, skipped, left, pace } = state.progress;
  $("bar").max = Math.max(done + skipped + left, 1);
  $("bar").value = done + skipped;
  const minutes = Math.ceil((left * pace) / 60);
  const estimate = pace && left ? `, about ${minutes} min at ${pace < 10 ? pace.toFixed(1) : Math.round(pace)} s each` : "";
  $("counts").textContent = `${done} judged, ${skipped ? `${skipped} skipped, ` : ""}${left} left${estimate}`;
  task = state.task;
  $("task").hidden = task === null;
  for (const button of document.querySelectorAll("[data-choice]")) button.disabled = task === null;
  if (task === null) {
    say(left ? "the pairs that are left are open elsewhere: reload in a while" : "all done, thank you");
    return;
  }
  $("prompt").replaceChildren(...task.prompt.map(turn));
  const last = task.prompt.length > 1 ? $("prompt").lastElementChild : null;
  $("prompt").scrollTop = last ? last.offsetTop - $("prompt").offsetTop : 0; // of a dialogue, what is answered
  $("why").value = "";
  $("slight").checked = false;
  for (const side of ["left", "right"]) {
    const n = (task[side].text.match(/\S+/g) ?? []).length;
    $(`${side}-size`).textContent = `${n} ${n === 1 ? "word" : "words"}`;
  }
  fill().then(() => ["left", "right"].forEach((side) => ($(side).scrollTop = 0)));
  seconds = 0;
  since = performance.now();
  say(said);
  $("prompt").focus({ preventScroll: true });
  scrollTo(0, 0);
}

function turn({ role, html }) {
  const box = document.createElement("div");
  box.className = "turn";
  const title = document.createElement("h3");
  title.textContent = role;
  const text = document.createElement("div");
  text.innerHTML = html; // made by the server from text: no tag of the text's own is in it
  box.append(title, text);
  return box;
}

async function fill() {
  $("diff").setAttribute("aria-pressed", view === "diff");
  $("raw").setAttribute("aria-pressed", view === "raw");
  const shown = task;
  if (view === "diff") {
    try {
      const answer = await fetch(`/api/diff?item=${shown.item}`);
      const given = await answer.json();
      if (!answer.ok) throw new Error(given.error);
      if (shown === task && view === "diff") ["left", "right"].forEach((side) => ($(side).innerHTML = given[side]));
      return;
    } catch (error) {
      say(error.message, true);
      view = "rendered";
      $("diff").setAttribute("aria-pressed", false);
    }
  }
  for (const side of ["left", "right"]) {
    if (view === "raw") {
      const text = document.createElement("pre");
      text.textContent = shown[side].text;
      $(side).replaceChildren(text);
    } else {
      $(side).innerHTML = shown[side].html;
    }
  }
}

function look(other) {
  view = view === other ? "rendered" : other;
  if (task) fill();
}

async function alone(work) {
  if (busy) return;
  busy = true;
  try {
    await work();
  } catch (error) {
    say(error.message, true);
  } finally {
    busy = false;
  }
}

const names = { left: "answer 1", right: "answer 2", tie: "a tie", both_bad: "both bad", skip: "skipped" };

async function send(judgment) {
  let state;
  try {
    state = await insist("/api/judge", { ...judgment, tab });
  } catch (error) {
    localStorage.removeItem(kept); // refused for good: trying again cannot help
    throw error;
  }
  localStorage.removeItem(kept);
  const said = state.saved ? `saved: ${names[judgment.choice]}. Next pair` : "this pair was judged in another tab; that one counts";
  show(state, { said });
}

function choose(choice) {
  if (!task || busy) return;
  const judgment = {
    key: crypto.randomUUID?.() ?? `${tab}-${Date.now()}-${Math.random()}`.slice(0, 64),
    item: task.item,
    choice,
    strength: $("slight").checked ? "slight" : "clear",
    why: $("why").value,
    seconds: Math.round((seconds + (performance.now() - since) / 1000) * 10) / 10,
  };
  localStorage.setItem(kept, JSON.stringify(judgment));
  alone(() => send(judgment));
}

const undo = () =>
  alone(async () => {
    const state = await insist("/api/undo", { tab });
    show(state, { said: state.undone ? "taken back: judge it again" : "there is nothing to take back" });
  });

const keys = {
  1: () => choose("left"),
  ArrowLeft: () => choose("left"),
  2: () => choose("right"),
  ArrowRight: () => choose("right"),
  0: () => choose("tie"),
  b: () => choose("both_bad"),
  s: () => choose("skip"),
  u: undo,
  w: () => ($("slight").checked = !$("slight").checked),
  r: () => $("why").focus(),
  d: () => look("diff"),
  m: () => look("raw"),
  "?": () => $("keys").showModal(),
};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing || event.repeat) return;
  if ($("keys").open) {
    if (event.key === "?") $("keys").close();
    return;
  }
  if (event.target === $("why")) {
    if (event.key === "Escape" || event.key === "Enter") {
      event.preventDefault();
      $("prompt").focus({ preventScroll: true });
    }
    return;
  }
  const action = keys[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (action) {
    event.preventDefault();
    action();
  }
});
for (const button of document.querySelectorAll("[data-choice]")) button.addEventListener("click", () => choose(button.dataset.choice));
$("undo").addEventListener("click", undo);
$("diff").addEventListener("click", () => look("diff"));
$("raw").addEventListener("click", () => look("raw"));
$("help").addEventListener("click", () => $("keys").showModal());

// Long answers scroll side by side, each by the same share of its length.
let leader = null;
let release = 0;
for (const [side, other] of [["left", "right"], ["right", "left"]]) {
  $(side).addEventListener("scroll", () => {
    if (leader && leader !== side) return;
    leader = side;
    clearTimeout(release);
    release = setTimeout(() => (leader = null), 120);
    const [from, to] = [$(side), $(other)];
    const room = from.scrollHeight - from.clientHeight;
    if (room > 0) to.scrollTop = (from.scrollTop / room) * (to.scrollHeight - to.clientHeight);
  });
}

alone(async () => {
  const unsaved = localStorage.getItem(kept);
  if (unsaved) await send(JSON.parse(unsaved));
  else show(await insist("/api/next", { tab }));
});
