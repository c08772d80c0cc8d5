// Pairs one at a time, a key for each verdict. Verdicts stay in the browser's storage and leave it as a CSV file. What
// comes from the data enters the page as text nodes and property values, never as markup.
"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  const UNDOABLE = 200;
  const AHEAD = 4; // pairs whose pictures are read before they are asked for
  const WORDS = ["accept", "reject", "skip"];
  const COLUMNS = ["class_id", "image_1", "image_2", "reviewer", "verdict"];
  const FILTERS = [
    ["all", "all pairs"], ["open", "not judged"], ["varied", "of classes that vary much"],
    ["accept", "accepted"], ["reject", "rejected"], ["skip", "skipped"],
  ];

  let data = null;
  const said = {}; // "image_1\nimage_2" -> verdict
  let history = []; // [key, verdict before it or null], newest last
  let list = []; // numbers of the pairs that are shown, in order
  let place = 0;
  let kept = true; // whether the browser's storage works
  let unsaved = false;
  const images = new Map(); // read ahead

  const stored = (key, value) => {
    try {
      if (value === undefined) return localStorage.getItem(key);
      localStorage.setItem(key, value);
    } catch {
      kept = false;
    }
    return null;
  };
  // One item a verdict: writing one then costs the same however many there are.
  const slot = (name) => `nabla-review ${data.key} ${name}`;
  const image = (side, number) => data.pictures[data.pairs[number][side]];
  const keys = () => keys.all ??= data.pairs.map((_, i) => `${image(1, i).image}\n${image(2, i).image}`);
  const verdict = (number) => said[keys()[number]] ?? null;
  const plural = (n, word) => `${n.toLocaleString("en")} ${word}${n === 1 ? "" : "s"}`;

  const notify = (text) => {
    $("notice").textContent = text;
    $("notice").hidden = !text;
  };

  const say = (key, word) => {
    if (word) said[key] = word;
    else delete said[key];
    stored(slot(key), word ?? "");
  };

  const save = () => {
    history = history.slice(-UNDOABLE);
    stored(slot("history"), JSON.stringify(history));
    stored(slot("reviewer"), $("reviewer").value);
    unsaved = !kept;
    if (!kept) notify("This browser keeps nothing for pages from disk: download your verdicts before you close it.");
  };

  const load = () => {
    for (const key of keys()) {
      const word = stored(slot(key));
      if (WORDS.includes(word)) said[key] = word;
    }
    history = JSON.parse(stored(slot("history")) ?? "[]");
    $("reviewer").value = stored(slot("reviewer")) ?? "";
  };

  const fits = (number, filter, only) => {
    if (only !== "" && data.pairs[number][0] !== Number(only)) return false;
    if (filter === "open") return verdict(number) === null;
    if (filter === "varied") return data.classes[data.pairs[number][0]].varied;
    return filter === "all" || verdict(number) === filter;
  };

  // The list is made anew when a filter changes, not at each verdict: pairs do not jump away under a reviewer's hand.
  const select = (wanted = null) => {
    const [filter, only] = [$("show").value, $("class").value];
    list = data.pairs.map((_, i) => i).filter((i) => fits(i, filter, only));
    const at = wanted === null ? list.findIndex((i) => verdict(i) === null) : list.indexOf(wanted);
    place = Math.max(at, 0);
    show();
  };

  const fetchAhead = () => {
    for (const i of list.slice(place, place + AHEAD)) {
      for (const side of [1, 2]) {
        const { file } = image(side, i);
        if (!images.has(file)) {
          const ahead = new Image();
          ahead.src = `${data.folder}/${file}`;
          images.set(file, ahead);
        }
      }
    }
    while (images.size > 8 * AHEAD) images.delete(images.keys().next().value);
  };

  const figure = (id, shown) => {
    const src = `${data.folder}/${shown.file}`;
    if ($(id).getAttribute("src") !== src) $(id).src = src;
    const caption = [shown.image, shown.individual && `individual ${shown.individual}`, shown.credit];
    $(id).nextElementSibling.textContent = caption.filter(Boolean).join(" · ");
  };

  const show = () => {
    const counts = Object.fromEntries(WORDS.map((w) => [w, 0]));
    for (const key of keys()) if (said[key]) counts[said[key]] += 1;
    const judged = WORDS.reduce((sum, w) => sum + counts[w], 0);
    $("count").textContent = `${judged.toLocaleString("en")} of ${plural(data.pairs.length, "pair")} judged`;
    $("tally").textContent = `${counts.accept} accepted · ${counts.reject} rejected · ${counts.skip} skipped`;
    $("progress").max = data.pairs.length;
    $("progress").value = judged;
    $("undo").disabled = history.length === 0;
    $("download").disabled = judged === 0;
    $("pair").hidden = list.length === 0;
    $("empty").hidden = list.length > 0;
    if (!list.length) return;
    const number = list[place];
    const [c, , , distance] = data.pairs[number];
    const group = data.classes[c];
    $("name").textContent = group.name;
    $("varied").hidden = !group.varied;
    $("said").textContent = verdict(number) ? { accept: "accepted", reject: "rejected", skip: "skipped" }[verdict(number)] : "";
    $("said").dataset.said = verdict(number) ?? "";
    $("where").textContent = [
      group.path, `pair ${number - group.start + 1} of ${group.pairs} of this class`, `${place + 1} of ${list.length} shown`,
      `distance ${distance.toFixed(2)}, on average ${group.spread.toFixed(2)} in this class`,
    ].filter(Boolean).join(" · ");
    figure("left", image(1, number));
    figure("right", image(2, number));
    $("previous").disabled = place === 0;
    $("next").disabled = place === list.length - 1;
    fetchAhead();
  };

  const step = (by) => {
    place = Math.min(Math.max(place + by, 0), list.length - 1);
    show();
  };

  const judge = (word) => {
    if (!list.length) return;
    const key = keys()[list[place]];
    history.push([key, said[key] ?? null]);
    say(key, word);
    notify("");
    save();
    const after = list.findIndex((i, at) => at > place && verdict(i) === null);
    const open = after < 0 ? list.findIndex((i) => verdict(i) === null) : after;
    if (open < 0) {
      const all = keys().every((k) => said[k]);
      if (kept) notify(all ? "All pairs are judged: download your verdicts." : "All pairs shown here are judged.");
      place = Math.min(place + 1, list.length - 1);
    } else place = open;
    show();
  };

  const undo = () => {
    if (!history.length) return;
    const [key, before] = history.pop();
    say(key, before);
    notify("");
    save();
    const number = keys().indexOf(key);
    if (list.includes(number)) {
      place = list.indexOf(number);
      show();
    } else if (number >= 0) {
      $("show").value = "all";
      $("class").value = "";
      select(number);
    } else show();
  };

  const quoted = (text) => (/[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
  const csv = (rows) => rows.map((row) => `${row.map(quoted).join(",")}\n`).join("");

  const parsed = (text) => {
    const rows = [[""]];
    let open = false;
    for (let i = 0; i < text.length; i += 1) {
      const row = rows.at(-1);
      if (open && text[i] === '"' && text[i + 1] === '"') row[row.length - 1] += text[i += 1];
      else if (text[i] === '"') open = !open;
      else if (!open && text[i] === ",") row.push("");
      else if (!open && text[i] === "\n") rows.push([""]);
      else if (open || text[i] !== "\r") row[row.length - 1] += text[i];
    }
    return rows.filter((row) => row.length > 1 || row[0]);
  };

  const download = () => {
    const reviewer = $("reviewer").value.trim();
    if (!reviewer) {
      notify("Say who you are first: your name stands beside each of your verdicts.");
      $("reviewer").focus();
      return;
    }
    const rows = [];
    data.pairs.forEach(([c], i) => {
      if (verdict(i)) rows.push([data.classes[c].id, image(1, i).image, image(2, i).image, reviewer, verdict(i)]);
    });
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([csv([COLUMNS, ...rows])], { type: "text/csv" }));
    link.download = `verdicts-${data.dataset}-${reviewer}.csv`.replace(/[^\p{L}\p{N}._-]+/gu, "_");
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
    unsaved = false;
  };

  const restore = async (file) => {
    const [head, ...rows] = parsed((await file.text()).replace(/^\uFEFF/, ""));
    const column = Object.fromEntries(COLUMNS.map((name) => [name, (head ?? []).indexOf(name)]));
    if (COLUMNS.some((name) => column[name] < 0)) {
      notify(`${file.name}: found no columns ${COLUMNS.join(", ")}: not a file of verdicts.`);
      return;
    }
    const known = new Set(keys());
    let read = 0;
    for (const row of rows) {
      const [key, word] = [`${row[column.image_1]}\n${row[column.image_2]}`, row[column.verdict]];
      if (known.has(key) && WORDS.includes(word)) {
        if (said[key] !== word) history.push([key, said[key] ?? null]);
        say(key, word);
        read += 1;
      }
    }
    if (!$("reviewer").value && rows.length) $("reviewer").value = rows[0][column.reviewer];
    save();
    select();
    notify(`${file.name}: ${read} of ${plural(rows.length, "row")} are verdicts on these pairs.`);
  };

  const option = (value, label) => {
    const node = document.createElement("option");
    node.value = value;
    node.textContent = label;
    return node;
  };

  const start = () => {
    const root = document.documentElement;
    const theme = stored("nabla-theme");
    if (theme) root.dataset.theme = theme;
    $("theme").onclick = () => {
      const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
      root.dataset.theme = dark ? "light" : "dark";
      stored("nabla-theme", root.dataset.theme);
    };
    $("show").append(...FILTERS.map(([value, label]) => option(value, label)));
    $("class").append(option("", `all ${data.classes.length.toLocaleString("en")}`));
    $("class").append(...data.classes.map((c, i) => option(i, `${c.name}${c.varied ? " (varies much)" : ""}`)));
    load();
    for (const id of ["show", "class"]) $(id).onchange = () => { notify(""); select(); };
    $("reviewer").oninput = save;
    $("accept").onclick = () => judge("accept");
    $("reject").onclick = () => judge("reject");
    $("pass").onclick = () => judge("skip");
    $("undo").onclick = undo;
    $("previous").onclick = () => step(-1);
    $("next").onclick = () => step(1);
    $("download").onclick = download;
    $("restore").onchange = ({ target }) => { if (target.files.length) restore(target.files[0]); target.value = ""; };
    for (const id of ["left", "right"]) $(id).onerror = () => notify(`${$(id).getAttribute("src")} cannot be read: is it beside the page?`);
    const actions = {
      a: () => judge("accept"), r: () => judge("reject"), s: () => judge("skip"), u: undo,
      ArrowLeft: () => step(-1), ArrowRight: () => step(1),
    };
    document.addEventListener("keydown", (event) => {
      const typing = event.target.closest?.("input, select");
      if (typing || event.altKey || event.shiftKey || event.repeat) return;
      const back = (event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "z";
      if (!back && (event.ctrlKey || event.metaKey)) return;
      const action = back ? undo : actions[event.key.length === 1 ? event.key.toLowerCase() : event.key];
      if (action) {
        event.preventDefault();
        action();
      }
    });
    addEventListener("beforeunload", (event) => { if (unsaved) event.preventDefault(); });
    select();
    if (!kept) notify("This browser keeps nothing for pages from disk: download your verdicts before you close it.");
  };

  window.nablaReview = (found) => {
    data = found;
    start();
  };
})();
