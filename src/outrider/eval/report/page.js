"use strict";
// The token view: the text of a trace, shaded by how many of the chosen lists kept each token in the chosen round.
(() => {
  const source = document.getElementById("traces");
  if (!source) return;
  const traces = JSON.parse(source.textContent);
  const el = (id) => document.getElementById(id);
  const LEVELS = 8, BINS = 300;
  let trace, spans, counts, total, at = -1;

  const count = (n) => n.toLocaleString("en-US");
  const option = (value, text) => Object.assign(document.createElement("option"), { value, textContent: text });

  function bits(text) {
    const raw = atob(text), bytes = new Uint8Array(raw.length);
    for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
    return bytes;
  }

  // what became of every token behind the prompt, round by round
  function origins(trace) {
    const found = [];
    for (const round of trace.rounds) {
      for (let i = 0; i < round.accepted; i++) found.push("accepted");
      found.push(round.accepted < round.drafted.length ? "recovered" : "bonus");
    }
    return found;
  }

  function span(piece, kind) {
    const made = document.createElement("span");
    made.className = kind;
    made.textContent = piece;
    if (piece === "") made.classList.add("part");
    return made;
  }

  function choose(number) {
    trace = traces[number];
    const origin = origins(trace);
    spans = trace.pieces.map((piece, i) => {
      const made = span(piece, "t");
      made.place = i;
      made.origin = i < trace.prompt ? "" : origin[i - trace.prompt];
      return made;
    });
    el("now").remove();
    el("tokens").replaceChildren(...spans, nowBox());
    const heads = Math.max(0, ...trace.rounds.map((r) => (r.lists ? r.lists[0].length : 0)));
    el("layer").replaceChildren(option("all", "all"), ...trace.layers.map((layer, i) => option(i, layer)));
    el("head").replaceChildren(option("all", heads === 1 ? "all share one" : "all"));
    if (heads > 1) for (let i = 0; i < heads; i++) el("head").append(option(i, i));
    el("round").max = trace.rounds.length;
    el("round").value = trace.rounds.length;
    at = -1;
    show();
    jump(trace.rounds[trace.rounds.length - 1].cached);
  }

  function nowBox() {
    const box = document.createElement("span");
    box.id = "now";
    box.className = "now";
    return box;
  }

  // how many of the chosen lists hold each cached token
  function counted(round) {
    counts = new Uint16Array(round.cached);
    total = 0;
    if (!round.lists) return;
    const layer = el("layer").value, head = el("head").value;
    round.lists.forEach((heads, l) => heads.forEach((text, h) => {
      if ((layer !== "all" && +layer !== l) || (head !== "all" && +head !== h)) return;
      total++;
      const bytes = bits(text);
      for (let i = 0; i < counts.length; i++) counts[i] += (bytes[i >> 3] >> (i & 7)) & 1;
    }));
  }

  const level = (n) => (total ? Math.ceil((LEVELS * n) / total) : 0);

  function show() {
    const number = +el("round").value, round = trace.rounds[number - 1];
    counted(round);
    spans.forEach((one, i) => {
      const shade = i < round.cached && counts[i] ? " k" + level(counts[i]) : "";
      one.className = `t ${one.origin}${shade}` + (i === round.cached ? " pending" : "") + (trace.pieces[i] === "" ? " part" : "");
      one.hidden = i > round.cached;
    });
    const bonus = round.accepted === round.drafted.length;
    const now = el("now");
    now.replaceChildren(
      ...round.drafted.map((piece, i) => {
        const made = span(piece, "d " + (i < round.accepted ? "accepted" : "rejected"));
        made.said = `drafted token ${i + 1} of ${round.drafted.length}: ${i < round.accepted ? "accepted" : "rejected"}`;
        return made;
      }),
      Object.assign(span(round.next, "d " + (bonus ? "bonus" : "recovered")), {
        said: bonus ? "bonus token: all drafted ones were accepted" : "recovered token: the target's own, in place of the first rejected one",
      })
    );
    el("which").textContent = `${number} of ${trace.rounds.length}`;
    el("most").textContent = count(total);
    strip(round);
    if (at > round.cached) at = -1;
    if (at >= 0) spans[at].classList.add("at");
    say(number, round, bonus);
  }

  function say(number, round, bonus) {
    let kept = 0, any = 0;
    counts.forEach((n) => { kept += n; any += n > 0; });
    const lists = total
      ? `The ${total === 1 ? "list keeps" : `${count(total)} lists keep, on average,`} ${((100 * kept) / total / round.cached).toFixed(1)}% of the tokens` +
        (total === 1 ? "." : `; ${((100 * any) / round.cached).toFixed(1)}% are kept by at least one.`)
      : "A dense round: it has no lists.";
    const recorded = trace.all > trace.rounds.length ? ` (the first ${trace.rounds.length} of ${trace.all} rounds were recorded)` : "";
    el("said").textContent =
      `Round ${number}${recorded}: ${count(round.cached)} tokens cached, ${round.drafted.length} drafted, ${round.accepted} accepted, ` +
      `then a ${bonus ? "bonus" : "recovered"} token. ${lists}`;
  }

  function strip(round) {
    const sums = new Float64Array(BINS), sizes = new Float64Array(BINS);
    counts.forEach((n, i) => { const bin = Math.floor((i * BINS) / round.cached); sums[bin] += n; sizes[bin]++; });
    const shares = sums.map((sum, i) => (sizes[i] ? sum / sizes[i] : 0)), most = Math.max(...shares) || 1;
    let path = "M0 1";
    shares.forEach((share, i) => { if (sizes[i]) path += `L${i} ${1 - share / most}L${i + 1} ${1 - share / most}`; });
    el("density").setAttribute("d", path + `L${BINS} 1Z`);
    el("last").textContent = `token ${count(round.cached)}`;
    el("strip").setAttribute("aria-valuemax", round.cached);
    view();
  }

  // the first token at or below a height inside the text
  function below(height) {
    let low = 0, high = trace.rounds[+el("round").value - 1].cached;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (spans[middle].offsetTop < height) low = middle + 1; else high = middle;
    }
    return low;
  }

  function view() {
    const box = el("tokens"), cached = trace.rounds[+el("round").value - 1].cached;
    const first = below(box.scrollTop), end = below(box.scrollTop + box.clientHeight);
    const shown = document.querySelector("#strip .view");
    shown.style.left = `${(100 * first) / cached}%`;
    shown.style.width = `${(100 * Math.max(end - first, 1)) / cached}%`;
    el("strip").setAttribute("aria-valuenow", first);
    el("strip").setAttribute("aria-valuetext", `text from token ${count(first)}`);
  }

  function jump(place) {
    const box = el("tokens");
    box.scrollTop = spans[place].offsetTop - box.clientHeight / 2;
    view();
  }

  function describe(place) {
    const kept = place < counts.length
      ? (total ? `kept by ${counts[place]} of ${total} ${total === 1 ? "list" : "lists"}` : "dense round: read by all")
      : "pending: emitted, not cached yet";
    const origin = spans[place].origin ? `, ${spans[place].origin} in an earlier round` : "";
    return `token ${count(place)}${origin}: ${kept}`;
  }

  function tip(target, text) {
    const box = el("tip"), where = target.getBoundingClientRect();
    box.textContent = text;
    box.hidden = false;
    const left = Math.min(Math.max(4, where.left), document.documentElement.clientWidth - box.offsetWidth - 4);
    const above = where.top - box.offsetHeight - 6;
    box.style.left = `${left}px`;
    box.style.top = `${above > 4 ? above : where.bottom + 6}px`;
  }

  function go(place) {
    const last = trace.rounds[+el("round").value - 1].cached;
    if (at >= 0) spans[at].classList.remove("at");
    at = Math.min(Math.max(place, 0), last);
    spans[at].classList.add("at");
    const box = el("tokens"), top = spans[at].offsetTop;
    if (top < box.scrollTop + 30 || top > box.scrollTop + box.clientHeight - 60) jump(at);
    tip(spans[at], describe(at));
  }

  // the next token, in a direction, that at least half of the chosen lists keep and its neighbour before it is not one
  function peak(step) {
    const enough = (i) => counts[i] > 0 && 2 * counts[i] >= total;
    let i = (at < 0 ? below(el("tokens").scrollTop + el("tokens").clientHeight / 2) : at) + step;
    while (i > 0 && i < counts.length && !(enough(i) && !enough(i - 1))) i += step;
    if (i >= 0 && i < counts.length && enough(i)) go(i);
  }

  function described(event) {
    const target = event.target.closest(".t, .d");
    if (!target) el("tip").hidden = true;
    else tip(target, target.said ?? describe(target.place));
  }

  function seek(event) {
    const where = el("strip").getBoundingClientRect(), cached = trace.rounds[+el("round").value - 1].cached;
    jump(Math.min(cached, Math.max(0, Math.round((cached * (event.clientX - where.left)) / where.width))));
  }

  const step = (by) => { el("round").value = +el("round").value + by; show(); };
  el("trace").append(...traces.map((one, i) => option(i, `${one.name}: ${one.method}, ${one.budget}`)));
  el("trace").parentElement.hidden = traces.length === 1;
  el("trace").addEventListener("change", () => choose(+el("trace").value));
  for (const id of ["layer", "head"]) el(id).addEventListener("change", show);
  el("round").addEventListener("input", show);
  el("before").addEventListener("click", () => step(-1));
  el("after").addEventListener("click", () => step(1));
  el("back").addEventListener("click", () => peak(-1));
  el("on").addEventListener("click", () => peak(1));
  el("here").addEventListener("click", () => jump(trace.rounds[+el("round").value - 1].cached));
  el("tokens").addEventListener("mouseover", described);
  el("tokens").addEventListener("mouseleave", () => { el("tip").hidden = true; });
  el("tokens").addEventListener("blur", () => { el("tip").hidden = true; });
  el("tokens").addEventListener("click", (event) => {
    const target = event.target.closest(".t, .d");
    if (target && target.place !== undefined) go(target.place); else described(event);
  });
  el("tokens").addEventListener("scroll", () => { el("tip").hidden = true; view(); }, { passive: true });
  el("tokens").addEventListener("keydown", (event) => {
    const from = at < 0 ? below(el("tokens").scrollTop) : at;
    const moves = { ArrowRight: () => go(from + 1), ArrowLeft: () => go(from - 1), n: () => peak(1), p: () => peak(-1) };
    if (moves[event.key] && !event.ctrlKey && !event.metaKey && !event.altKey) { event.preventDefault(); moves[event.key](); }
  });
  el("strip").addEventListener("pointerdown", (event) => { el("strip").setPointerCapture(event.pointerId); seek(event); });
  el("strip").addEventListener("pointermove", (event) => { if (event.buttons) seek(event); });
  el("strip").addEventListener("keydown", (event) => {
    const box = el("tokens"), moves = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, PageUp: -10, PageDown: 10 };
    const cached = trace.rounds[+el("round").value - 1].cached;
    if (event.key === "Home") jump(0);
    else if (event.key === "End") jump(cached);
    else if (moves[event.key]) { box.scrollTop += moves[event.key] * box.clientHeight; view(); }
    else return;
    event.preventDefault();
  });
  window.addEventListener("resize", view);
  choose(0);
})();
