// The labelling page. It talks to /api (page.py); texts of people and models become text nodes, never markup.
(() => {
  "use strict";
  const JOBS = {demonstrate: "Write answers", rank: "Rank answers"};
  const FLAGS = ["harmful", "broken", "not an answer"];
  const FLAG_KEYS = {h: "harmful", b: "broken", n: "not an answer"};
  const STARS = [1, 2, 3, 4, 5, 6, 7];
  const REASONS = ["I do not know enough about this", "The prompt makes no sense", "I would rather not read this"];
  const LOOK_AGAIN = 5000, ALIVE_EVERY = 60000, AWAY_AFTER = 10 * 60000, DRAFT_DAYS = 30; // ms, ms, ms, days

  let root, me = null, job = null, item = null;
  let behind = -1; // how many items back the labeler looks: -1 is the item at hand
  let busy = false, lastTouch = Date.now(), lookAgain = null, counting = null;
  let answer = null; // of this item: {text} or {ranks, flags, ratings}, one entry for each output as shown
  let before = []; // earlier states of it, for undo
  let cards = [], parts = {};

  // ---- small things ----

  function el(tag, attributes = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
      else if (value !== false && value != null) made.setAttribute(name, value === true ? "" : value);
    }
    made.append(...children.filter((child) => child != null));
    return made;
  }
  const button = (text, onclick, attributes = {}) => el("button", {type: "button", onclick, ...attributes}, text);
  const letter = (place) => String.fromCharCode(65 + place);
  const ordinal = (rank) => rank + (["th", "st", "nd", "rd"][rank % 100 > 10 && rank % 100 < 14 ? 0 : rank % 10] || "th");
  const plural = (count, one, many) => `${count} ${count === 1 ? one : many}`;

  function told(text, bad = false) {
    parts.notice.textContent = text;
    parts.notice.classList.toggle("bad", bad);
  }

  // ---- the server ----

  class Refused extends Error {
    constructor(status, body) { super(body.error || `The server answers ${status}.`); this.status = status; this.body = body; }
  }

  async function api(path, body) {
    const options = body === undefined ? {} : {
      method: "POST", headers: {"content-type": "application/json"}, body: JSON.stringify(body)};
    const response = await fetch(`/api/${path}`, options); // a TypeError where there is no answer
    let content = {};
    try { content = await response.json(); } catch { /* an answer that is not ours: its status tells */ }
    if (response.ok) return content;
    if (response.status === 401 && path !== "sign-in") await signIn();
    throw new Refused(response.status, content);
  }

  // until there is an answer: a server that is started again takes it then
  async function keepTrying(path, body) {
    for (let wait = 1000; ; wait = Math.min(2 * wait, 15000)) {
      try { return await api(path, body); }
      catch (error) {
        if (error instanceof Refused && error.status !== 401) throw error;
        if (!(error instanceof Refused)) {
          told("Not saved yet: the server does not answer. Trying again; what you did is kept in this browser.", true);
          await new Promise((done) => setTimeout(done, wait));
        }
      }
    }
  }

  // ---- drafts: what is not saved yet outlives a reload ----

  const draftKey = () => `rlhf-label|${me}|${item.job}|${item.item}`;
  function keepDraft() {
    try { localStorage.setItem(draftKey(), JSON.stringify({at: Date.now(), answer})); } catch { /* full or forbidden */ }
  }
  function draft() {
    try { return JSON.parse(localStorage.getItem(draftKey()))?.answer; } catch { return null; }
  }
  function dropDraft() { try { localStorage.removeItem(draftKey()); } catch { /* as above */ } }
  function dropOldDrafts() {
    try {
      for (const key of Object.keys(localStorage).filter((name) => name.startsWith("rlhf-label|"))) {
        const {at} = JSON.parse(localStorage.getItem(key));
        if (Date.now() - at > DRAFT_DAYS * 86400000) localStorage.removeItem(key);
      }
    } catch { /* as above */ }
  }

  // ---- signing in ----

  let door = null; // the promise of the dialog that is open
  function signIn() {
    door ||= new Promise((done) => {
      const fragment = new URLSearchParams(location.hash.slice(1)).get("token");
      if (fragment) history.replaceState(null, "", location.pathname);
      const name = el("input", {id: "name", autocomplete: "username", maxlength: 100, required: true});
      const token = el("input", {id: "token", type: "password", autocomplete: "current-password", required: true});
      name.value = me || "";
      token.value = fragment || "";
      const problem = el("p", {class: "bad-text", role: "alert", id: "problem"});
      const go = el("button", {class: "primary", id: "sign-in"}, "Sign in");
      const form = el("form", {onsubmit: async (event) => {
        event.preventDefault();
        go.disabled = true;
        try {
          const other = me;
          me = (await api("sign-in", {name: name.value, token: token.value})).name;
          dialog.close();
          dialog.remove();
          door = null;
          if (other && other !== me) location.reload(); // what stands there is somebody else's
          else done();
        } catch (error) {
          problem.textContent = error instanceof Refused ? error.message : "The server does not answer.";
          await new Promise((over) => setTimeout(over, 1000 * (error.body?.retry_after || 0)));
          go.disabled = false;
          go.focus();
        }
      }},
        el("h1", {}, "Sign in to label"),
        el("label", {for: "name"}, "Your name"), name,
        el("label", {for: "token"}, "Token"), token,
        el("p", {class: "quiet"}, "It stands at the end of the address that `make label` prints, or you were given one."),
        problem, go);
      const dialog = el("dialog", {class: "door", oncancel: (event) => event.preventDefault()}, form);
      root.append(dialog);
      dialog.showModal();
      name.focus();
    });
    return door;
  }

  async function signOut() {
    await api("sign-out", {});
    location.reload();
  }

  // ---- the frame ----

  function frame() {
    parts = {
      jobs: el("span", {class: "row", role: "group", "aria-label": "What to do"}),
      mine: el("span", {id: "mine"}), all: el("span", {id: "all"}),
      bar: el("progress", {max: 1, value: 0, "aria-label": "done by everybody"}),
      notice: el("div", {class: "notice", role: "status", "aria-live": "polite", id: "notice"}),
      work: el("main", {id: "work"}),
      guidelines: el("details", {class: "guidelines", id: "guidelines", open: true}),
    };
    root.replaceChildren(
      el("header", {class: "bar"},
        el("div", {class: "row spread"}, parts.jobs,
          el("span", {class: "row"}, el("span", {class: "quiet", id: "who", dir: "auto"}, me),
            button("Pause", pause, {id: "pause", title: "Put the item back, for others"}),
            button("Sign out", signOut, {id: "sign-out"}))),
        parts.bar,
        el("div", {class: "row spread quiet"}, parts.mine, parts.all)),
      el("div", {class: "columns"}, parts.work, parts.guidelines));
  }

  async function progress() {
    const {jobs, closed} = await api("queues");
    const names = Object.keys(jobs);
    if (!jobs[job] && !closed[job] && names.length) job = names.find((name) => jobs[name].missing) || names[0];
    parts.jobs.replaceChildren(...Object.keys(JOBS).filter((name) => jobs[name] || closed[name]).map((name) => button(
      `${JOBS[name]} (${jobs[name] ? jobs[name].missing : "closed"})`, () => change(name),
      {id: `job-${name}`, "aria-pressed": String(name === job),
        title: jobs[name] ? `${jobs[name].missing} labels are missing` : closed[name]})));
    const one = jobs[job];
    parts.mine.textContent = one
      ? `You: ${one.mine_today} today, ${one.mine} in all` + (one.mine_skipped ? `, ${one.mine_skipped} skipped` : "") : "";
    parts.all.textContent = one
      ? `Everybody: ${one.done} of ${plural(one.items, "item", "items")} done, ` +
        `${plural(one.missing, "label", "labels")} missing` : "";
    parts.bar.max = one ? Math.max(1, one.items) : 1;
    parts.bar.value = one ? one.done : 0;
    return names.filter((name) => name !== job && jobs[name].missing);
  }

  async function guidelines() {
    const {text} = await api("guidelines");
    parts.guidelines.replaceChildren(el("summary", {}, "Guidelines"), ...written(text));
  }

  // headings, lists and bold words of the guidelines, built from text nodes
  function written(text) {
    const found = [];
    for (const line of text.split("\n")) {
      const last = found[found.length - 1];
      const [, heading, point, rest] = line.match(/^(?:(#+) |(- ))?\s*(.*)$/);
      if (!rest) found.push(null);
      else if (heading) found.push(["h2", rest]);
      else if (point) found.push(["li", rest]);
      else if (last && last[0] !== "h2") last[1] += ` ${rest}`;
      else found.push(["p", rest]);
    }
    const made = [];
    for (const [tag, words] of found.filter(Boolean)) {
      const bold = words.split("**").map((piece, n) => (n % 2 ? el("b", {}, piece) : piece));
      const one = el(tag, {dir: "auto"}, ...bold);
      if (tag !== "li") made.push(one);
      else if (made[made.length - 1]?.tagName === "UL") made[made.length - 1].append(one);
      else made.push(el("ul", {}, one));
    }
    return made;
  }

  async function change(name) {
    if (name === job && item && behind < 0) return;
    if (item && behind < 0) await api("release", {job: item.job, item: item.item});
    job = name;
    try { sessionStorage.setItem("rlhf-label-job", job); } catch { /* forbidden: it asks again after a reload */ }
    await next();
  }

  async function pause() {
    if (item && behind < 0) await api("release", {job: item.job, item: item.item});
    item = null;
    clearTimeout(lookAgain);
    told("");
    parts.work.replaceChildren(parts.notice, el("p", {}, "You hold no item. Your unsaved work on the last one stays in this browser."),
      button("Go on", () => next(), {class: "primary", id: "go-on"}));
  }

  // ---- an item ----

  async function next(message = "") {
    clearTimeout(lookAgain);
    const [others] = await Promise.all([progress(), guidelines()]);
    const found = await api("next", {job: job || "rank"});
    behind = -1;
    if (!found.item) {
      const waiting = item === null && parts.work.dataset.idle;
      item = null;
      parts.work.dataset.idle = "yes";
      if (message || !waiting) told(message);
      parts.work.replaceChildren(parts.notice, el("p", {id: "nothing"}, found.why),
        others.length ? el("p", {id: "others"}, `Elsewhere labels are missing: ${others.map((name) => JOBS[name]).join(", ")}, above.`) : "",
        button("Back", back, {id: "back", disabled: !job}));
      lookAgain = setTimeout(again, LOOK_AGAIN);
      return;
    }
    show(found, message);
  }

  // nothing to do: look whether something has come
  function again() {
    if (document.visibilityState === "visible" && item === null) next().catch(failed);
    else lookAgain = setTimeout(again, LOOK_AGAIN);
  }

  function show(found, message = "") {
    clearTimeout(lookAgain);
    item = found;
    delete parts.work.dataset.idle;
    before = [];
    const fresh = item.job === "demonstrate" ? {text: ""}
      : {ranks: item.outputs.map(() => null), flags: item.outputs.map(() => []), ratings: item.outputs.map(() => null)};
    const said = item.said && item.said.skipped === null
      ? (item.job === "demonstrate" ? {text: item.said.response}
        : {ranks: item.said.ranks, flags: item.said.flags, ratings: item.said.ratings}) : null;
    answer = draft() || said || fresh;
    const earlier = item.said && (item.said.skipped === null ? "You have judged this one. Saving changes what you said."
      : `You skipped this one: ${item.said.skipped}`);
    parts.work.replaceChildren(
      question(),
      ...(item.job === "demonstrate" ? writing() : ranking()),
      actions());
    told([message, earlier].filter(Boolean).join(" "));
    if (item.job === "demonstrate") { count(); document.getElementById("answer").focus({preventScroll: true}); }
    else { arrange(); cards[0]?.focus({preventScroll: true}); }
    window.scrollTo({top: 0});
  }

  // it stays in sight, and scrolls within where it is long; of a conversation the last turn is shown first
  function question() {
    const prompt = el("div", {id: "prompt", "aria-label": "Prompt"}, ...item.prompt.map((turn) => el("div", {class: `turn ${turn.role}`},
      item.prompt.length > 1 || turn.role !== "user" ? el("small", {}, turn.role) : null,
      el("div", {class: "text", dir: "auto"}, turn.content))));
    const whole = button("Show all", () => {
      const open = made.classList.toggle("whole");
      whole.textContent = open ? "Show less" : "Show all";
      whole.setAttribute("aria-expanded", String(open));
    }, {id: "whole", "aria-expanded": "false", hidden: true});
    const made = el("div", {class: "question"},
      el("div", {class: "row spread"}, el("h2", {}, item.prompt.length > 1 ? "Conversation" : "Prompt"), whole), prompt);
    new ResizeObserver(() => {
      const cut = prompt.scrollHeight > prompt.clientHeight + 1;
      prompt.tabIndex = cut ? 0 : -1;
      whole.hidden = !cut && !made.classList.contains("whole");
      document.documentElement.style.setProperty("--question", `${made.offsetHeight}px`);
    }).observe(made);
    if (item.prompt.length > 1) requestAnimationFrame(() => { prompt.scrollTop = prompt.scrollHeight; });
    return made;
  }

  // scrolled by the keyboard where it is too long
  function text(content) {
    const made = el("div", {class: "text", dir: "auto"}, content);
    requestAnimationFrame(() => { if (made.scrollHeight > made.clientHeight + 1) made.tabIndex = 0; });
    return made;
  }

  function actions() {
    return el("div", {class: "actions"}, parts.notice, el("div", {class: "row spread"},
      el("span", {class: "row"},
        button("Save", save, {class: "primary", id: "save", title: "Ctrl+Enter"}),
        button("Skip", skip, {id: "skip"}),
        item.job === "rank" ? button("Undo", undo, {id: "undo"}) : null),
      el("span", {class: "row"},
        button("Back", back, {id: "back", title: "to what you did before"}),
        behind >= 0 ? button("Forward", forward, {id: "forward"}) : null,
        button("Keys", keys, {id: "keys", class: "by-key"}))));
  }

  async function save() {
    if (busy || !item) return;
    const body = {job: item.job, item: item.item, started_at: item.started_at, guidelines: item.guidelines};
    if (item.job === "demonstrate") {
      if (!answer.text.trim()) return told("Write an answer, or skip.", true);
      body.response = answer.text;
    } else {
      const open = answer.ranks.flatMap((rank, place) => (rank === null ? [letter(place)] : []));
      if (open.length) return told(`Not placed yet: ${open.join(", ")}.`, true);
      Object.assign(body, answer);
    }
    await send("save", body, "Saved.");
  }

  async function send(path, body, message) {
    busy = true;
    for (const one of parts.work.querySelectorAll(".actions button")) one.disabled = true;
    try {
      await keepTrying(path, body);
      dropDraft();
      busy = false;
      await next(message);
    } catch (error) {
      failed(error);
      busy = false;
      for (const one of parts.work.querySelectorAll(".actions button")) one.disabled = one.id === "undo" && !before.length;
    }
  }

  function failed(error) {
    told(error instanceof Refused ? error.message : "The server does not answer. What you did is kept in this browser.", true);
    if (item === null) { clearTimeout(lookAgain); lookAgain = setTimeout(again, LOOK_AGAIN); }
  }

  function skip() {
    if (busy || !item) return;
    const reason = el("input", {id: "reason", maxlength: 500, required: true});
    const dialog = el("dialog", {onclose: () => dialog.remove()}, el("form", {onsubmit: (event) => {
      event.preventDefault();
      if (!reason.value.trim()) return;
      dialog.close();
      send("skip", {job: item.job, item: item.item, started_at: item.started_at, guidelines: item.guidelines,
        reason: reason.value}, "Skipped.");
    }},
      el("h1", {}, "Why do you skip it?"),
      el("div", {class: "row"}, ...REASONS.map((one) => button(one, () => { reason.value = one; reason.focus(); }))),
      el("label", {for: "reason"}, "Reason"), reason,
      el("div", {class: "row"}, el("button", {class: "primary", id: "skip-it"}, "Skip it"),
        button("Cancel", () => dialog.close()))));
    root.append(dialog);
    dialog.showModal();
    reason.focus();
  }

  async function back() {
    if (busy) return;
    const {items} = await api("mine", {job});
    if (behind + 1 >= items.length) return told(items.length ? "This is the first one." : "You have done none yet.");
    behind += 1;
    show(await api("again", {job, item: items[behind]}));
  }

  async function forward() {
    if (busy) return;
    if (behind <= 0) return next();
    const {items} = await api("mine", {job});
    behind -= 1;
    show(await api("again", {job, item: items[behind]}));
  }

  // ---- writing ----

  function writing() {
    const area = el("textarea", {id: "answer", dir: "auto", oninput: () => {
      answer.text = area.value;
      keepDraft();
      clearTimeout(counting);
      counting = setTimeout(count, 200);
    }});
    area.value = answer.text;
    parts.count = el("span", {id: "count", class: "quiet", role: "status"});
    return [el("h2", {}, el("label", {for: "answer", style: "display: inline"}, "Your answer")), area, parts.count];
  }

  async function count() {
    const at = item, written = answer.text;
    const limit = item.max_tokens === null ? "" : ` of at most ${item.max_tokens}`;
    let found = null;
    try { found = (await api("count", {item: item.item, text: written})).tokens; }
    catch (error) { if (item === at) parts.count.textContent = "The tokens cannot be counted just now."; return; }
    if (item !== at || answer.text !== written) return; // there is newer text
    parts.count.textContent = found === null
      ? `Tokens cannot be counted: data/models/base is not here yet.${limit && ` The limit is ${item.max_tokens}.`}`
      : `${found}${limit} tokens`;
    parts.count.classList.toggle("bad-text", item.max_tokens !== null && found > item.max_tokens);
  }

  // ---- ranking ----

  function ranking() {
    cards = item.outputs.map((output, place) => {
      const ranks = item.outputs.map((_, n) => button(ordinal(n + 1), () => put(place, n + 1),
        {id: `rank-${place}-${n + 1}`, "aria-label": `${letter(place)} in ${ordinal(n + 1)} place`}));
      const flags = FLAGS.map((flag) => button(flag, () => toggle(place, flag),
        {class: "flag", id: `flag-${place}-${flag.replaceAll(" ", "-")}`}));
      const ratings = STARS.map((rating) => button("\u2605", () => rate(place, rating),
        {id: `rating-${place}-${rating}`, class: "star", "aria-label": `${plural(rating, "star", "stars")} of 7 for ${letter(place)}`,
          title: plural(rating, "star", "stars")}));
      const handle = el("span", {class: "handle", "aria-hidden": "true", title: "Drag"},
        "\u2630", el("span", {class: "letter"}, letter(place)));
      const card = el("section", {class: "card", id: `card-${place}`, tabindex: "0", "aria-label": `Answer ${letter(place)}`},
        el("div", {class: "row spread head"}, handle,
          el("span", {class: "group", role: "group", "aria-label": "Place"}, el("small", {}, "Place"), ...ranks)),
        output.text ? text(output.text) : el("p", {class: "quiet"}, "(empty)"),
        output.ended ? null : el("small", {class: "bad-text"}, "Cut off here: it was too long."),
        el("div", {class: "row foot"},
          el("span", {class: "group stars", role: "group", "aria-label": "Rating, 7 stars are best"},
            el("small", {}, "bad"), el("span", {}, ...ratings), el("small", {}, "excellent")),
          el("span", {class: "group", role: "group", "aria-label": "Flags"}, ...flags)));
      handle.addEventListener("pointerdown", (event) => drag(event, place));
      return card;
    });
    parts.board = el("div", {id: "board"});
    return [el("h2", {}, "Answers, best first"), el("small", {}, "Drag them into order or give each a place; the same place is a tie. ",
      "Stars rate an answer by itself. ",
      el("span", {class: "by-key"}, el("kbd", {}, "1"), "–", el("kbd", {}, "9"), " place the answer in focus, ",
        el("kbd", {}, "?"), " shows all keys.")), parts.board];
  }

  // [[places of rank 1], [places of the next rank] ...]
  function levels() {
    const used = [...new Set(answer.ranks.filter((rank) => rank !== null))].sort((a, b) => a - b);
    return used.map((rank) => answer.ranks.flatMap((one, place) => (one === rank ? [place] : [])));
  }

  function setLevels(found) {
    let rank = 1;
    for (const level of found.filter((one) => one.length)) {
      for (const place of level) answer.ranks[place] = rank;
      rank += level.length; // 1, 2, 2, 4
    }
  }

  function edit(work) {
    if (busy) return;
    const was = JSON.stringify(answer);
    work();
    if (JSON.stringify(answer) === was) return;
    before.push(was);
    keepDraft();
    told("");
    arrange();
  }
  const put = (place, rank) => edit(() => { answer.ranks[place] = rank; });
  const rate = (place, rating) => edit(() => { answer.ratings[place] = answer.ratings[place] === rating ? null : rating; });
  const toggle = (place, flag) => edit(() => {
    const flags = answer.flags[place];
    answer.flags[place] = flags.includes(flag) ? flags.filter((one) => one !== flag) : [...flags, flag];
  });

  function undo() {
    if (busy || !before.length) return;
    answer = JSON.parse(before.pop());
    keepDraft();
    arrange();
  }

  // half a step at a time: out of a tie, or level with the next one
  function step(place, by) {
    edit(() => {
      const found = levels();
      const at = found.findIndex((level) => level.includes(place));
      if (at < 0) { found.push([place]); return setLevels(found); }
      const rest = found[at].filter((one) => one !== place);
      if (rest.length) found.splice(at, 1, ...(by < 0 ? [[place], rest] : [rest, [place]]));
      else if (found[at + by]) { found[at + by].push(place); found.splice(at, 1); }
      setLevels(found);
    });
  }

  function arrange() {
    const focused = document.activeElement?.id;
    const found = levels();
    const loose = answer.ranks.flatMap((rank, place) => (rank === null ? [place] : []));
    const board = [];
    found.forEach((level, at) => {
      const last = at > 0 && at === found.length - 1 && !loose.length;
      const name = ordinal(answer.ranks[level[0]]) + (at === 0 ? ", best" : last ? ", worst" : "") + (level.length > 1 ? " (tie)" : "");
      board.push(el("div", {class: "gap"}),
        el("div", {class: "level"}, el("div", {class: "name"}, name), ...level.map((place) => cards[place])));
    });
    board.push(el("div", {class: "gap"}));
    if (loose.length) board.push(el("div", {class: "level loose"},
      el("div", {class: "name"}, found.length ? "Not placed yet" : "Not placed yet: drag the best to the top, or press its place"),
      ...loose.map((place) => cards[place])));
    parts.board.replaceChildren(...board);
    for (const [place, card] of cards.entries()) {
      const press = (id, on) => card.querySelector(`#${id}`).setAttribute("aria-pressed", String(on));
      item.outputs.forEach((_, n) => press(`rank-${place}-${n + 1}`, answer.ranks[place] === n + 1));
      FLAGS.forEach((flag) => press(`flag-${place}-${flag.replaceAll(" ", "-")}`, answer.flags[place].includes(flag)));
      for (const rating of STARS) {
        press(`rating-${place}-${rating}`, answer.ratings[place] === rating);
        card.querySelector(`#rating-${place}-${rating}`).classList.toggle("lit", rating <= answer.ratings[place]);
      }
    }
    document.getElementById("undo").disabled = !before.length;
    const held = focused && document.getElementById(focused);
    if (held && held !== document.activeElement) {
      held.focus({preventScroll: true});
      held.closest(".card")?.scrollIntoView({block: "nearest"});
    }
  }

  // with a mouse, a pen or a finger: onto a card is a tie, between two an own rank
  function drag(event, place) {
    if (busy || event.button) return;
    event.preventDefault();
    const card = cards[place], startY = event.clientY + window.scrollY;
    let goal = null, y = event.clientY, ticking = null;
    card.setPointerCapture(event.pointerId);
    card.focus({preventScroll: true});
    card.classList.add("dragged");
    const follow = () => {
      card.style.transform = `translateY(${y + window.scrollY - startY}px)`;
      goal = goalAt(y, place);
      for (const one of parts.board.children) one.classList.toggle("into", one === goal?.mark);
    };
    const scroll = () => { // near the edge the page goes along
      const top = Math.max(0, document.querySelector(".question").getBoundingClientRect().bottom);
      const by = y < top + 30 ? -14 : y > window.innerHeight - 110 ? 14 : 0;
      if (by) { window.scrollBy(0, by); follow(); }
      ticking = requestAnimationFrame(scroll);
    };
    const move = (moved) => { y = moved.clientY; follow(); };
    const end = (ended) => {
      cancelAnimationFrame(ticking);
      for (const name of ["pointermove", "pointerup", "pointercancel"]) card.removeEventListener(name, name === "pointermove" ? move : end);
      card.classList.remove("dragged");
      card.style.transform = "";
      for (const one of parts.board.children) one.classList.remove("into");
      if (ended.type === "pointerup" && goal) edit(() => goal.apply());
    };
    card.addEventListener("pointermove", move);
    card.addEventListener("pointerup", end);
    card.addEventListener("pointercancel", end);
    ticking = requestAnimationFrame(scroll);
  }

  function goalAt(y, place) {
    const found = levels(), boxes = [...parts.board.querySelectorAll(".level:not(.loose)")];
    const gaps = [...parts.board.querySelectorAll(".gap")];
    const looseBox = parts.board.querySelector(".level.loose");
    const into = (level) => () => {
      const rest = found.map((one) => one.filter((other) => other !== place));
      rest[level].push(place);
      setLevels(rest);
    };
    const between = (level) => () => {
      const rest = found.map((one) => one.filter((other) => other !== place));
      rest.splice(level, 0, [place]);
      setLevels(rest);
    };
    for (const [level, box] of boxes.entries()) {
      const {top, bottom, height} = box.getBoundingClientRect();
      const edge = Math.min(height / 4, 60);
      if (y < top + edge) return {mark: gaps[level], apply: between(level)};
      if (y < bottom - edge) return {mark: box, apply: into(level)};
    }
    const top = looseBox?.getBoundingClientRect().top;
    if (looseBox && found.length && y > top + 24) {
      return {mark: looseBox, apply: () => { answer.ranks[place] = null; setLevels(levels()); }};
    }
    return {mark: gaps[gaps.length - 1], apply: between(found.length)};
  }

  // ---- keys ----

  const KEYS = {
    rank: [["1 – 9", "place of the answer in focus; 1 is best, the same place is a tie"], ["0", "take its place away"],
      ["↑ ↓", "move it half a step: level with the next one, then past it"], ["J K", "go to the next or the last answer"],
      ["H B N", "flag it: harmful, broken, not an answer"], ["Shift+1 – 7", "give it so many stars; 7 are best"], ["U, Ctrl+Z", "undo"],
      ["Ctrl+Enter", "save"], ["S", "skip"], ["P", "back to the item before"]],
    demonstrate: [["Ctrl+Enter", "save"], ["Tab", "go on to the buttons"]],
  };

  function keys() {
    const dialog = el("dialog", {onclose: () => dialog.remove()}, el("h1", {}, "Keys"),
      el("dl", {class: "keys"}, ...KEYS[item?.job || "rank"].flatMap(([key, what]) => [el("dt", {}, el("kbd", {}, key)), el("dd", {}, what)])),
      button("Close", () => dialog.close(), {class: "primary"}));
    root.append(dialog);
    dialog.showModal();
  }

  function pressed(event) {
    if (!item || event.isComposing || document.querySelector("dialog[open]")) return;
    const act = (work) => { event.preventDefault(); Promise.resolve(work()).catch(failed); };
    if ((event.ctrlKey || event.metaKey) && event.key === "Enter") return act(save);
    if (event.target.closest("input, textarea") || item.job !== "rank") return;
    if ((event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "z" && !event.shiftKey) return act(undo);
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const key = event.key.toLowerCase();
    const place = cards.indexOf(document.activeElement?.closest(".card"));
    const digit = /^(?:Digit|Numpad)([0-9])$/.exec(event.code)?.[1] ?? (/^[0-9]$/.test(key) ? key : null);
    if (key === "?") return act(keys);
    if (key === "u") return act(undo);
    if (key === "s") return act(skip);
    if (key === "p") return act(back);
    if (key === "j" || key === "k") {
      const shown = [...parts.board.querySelectorAll(".card")];
      const at = shown.indexOf(cards[place]);
      return act(() => shown[at < 0 ? 0 : (at + (key === "j" ? 1 : shown.length - 1)) % shown.length].focus());
    }
    if (place < 0) return;
    if (digit !== null && event.shiftKey) { if (digit >= 1 && digit <= 7) act(() => rate(place, Number(digit))); }
    else if (digit === "0") act(() => put(place, null));
    else if (digit !== null) { if (Number(digit) <= cards.length) act(() => put(place, Number(digit))); }
    else if (FLAG_KEYS[key]) act(() => toggle(place, FLAG_KEYS[key]));
    else if (event.target === cards[place] && key === "arrowup") act(() => step(place, -1));
    else if (event.target === cards[place] && key === "arrowdown") act(() => step(place, 1));
  }

  // ---- signs of life ----

  async function alive() {
    if (!item || behind >= 0 || document.visibilityState !== "visible" || Date.now() - lastTouch > AWAY_AFTER) return;
    const at = item;
    const {held, closed} = await api("alive", {job: item.job, item: item.item});
    if (held || item !== at) return;
    told(`${closed || "This item has gone to somebody else meanwhile."} You can still save what you did.`);
  }

  function leave() {
    if (!item || behind >= 0) return;
    const body = new Blob([JSON.stringify({job: item.job, item: item.item, leaving: true})], {type: "application/json"});
    navigator.sendBeacon("/api/release", body);
  }

  async function start() {
    dropOldDrafts();
    try { job = sessionStorage.getItem("rlhf-label-job"); } catch { /* forbidden */ }
    while (!me) {
      try { me = (await api("queues")).name; }
      catch (error) {
        if (!(error instanceof Refused) || error.status !== 401) {
          root.replaceChildren(el("p", {role: "alert"}, error instanceof Refused ? error.message : "The server does not answer."));
          await new Promise((done) => setTimeout(done, LOOK_AGAIN));
        }
      }
    }
    frame();
    addEventListener("keydown", pressed);
    addEventListener("pagehide", leave);
    addEventListener("pageshow", (event) => { if (event.persisted) alive().catch(failed); });
    for (const name of ["keydown", "pointerdown", "scroll"]) addEventListener(name, () => { lastTouch = Date.now(); }, {passive: true});
    addEventListener("unhandledrejection", (event) => { if (event.reason instanceof Refused || event.reason instanceof TypeError) failed(event.reason); });
    setInterval(() => alive().catch(() => {}), ALIVE_EVERY);
    await next();
  }

  const found = setInterval(() => { // Gradio puts its page together after the load
    root = document.getElementById("label");
    if (!root) return;
    clearInterval(found);
    start().catch(failed);
  }, 30);
})();
