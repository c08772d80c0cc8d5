// Theme, gallery, worst and best pairs, and values by group. Everything from the data enters the page as text nodes and
// property values, never as markup.
"use strict";
(() => {
  const root = document.documentElement;
  const stored = (value) => {
    try {
      if (value === undefined) return localStorage.getItem("nabla-theme");
      localStorage.setItem("nabla-theme", value);
    } catch { /* pages from disk may have no storage */ }
    return null;
  };
  if (stored()) root.dataset.theme = stored();

  // A node with properties and children; text stays text.
  const h = (tag, properties = {}, ...children) => {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(properties)) {
      if (name in node) node[name] = value;
      else node.setAttribute(name, value);
    }
    node.append(...children.filter((child) => child !== null));
    return node;
  };
  const $ = (id) => document.getElementById(id);
  const missing = (value) => value === null || value === undefined;

  let meta = null;
  const benchmarks = {}; // name -> {data, rows}
  const waiting = {};
  let groups = null;

  const load = (file) => (waiting[file] ??= new Promise((resolve, reject) => {
    const script = h("script", { src: file });
    script.onload = resolve;
    script.onerror = () => reject(new Error(`${file} cannot be read: is it beside the page?`));
    document.head.append(script);
  }));

  window.nablaReport = {
    pairs(data) {
      const { columns } = data;
      const text = columns.pair.map((pair, i) => [
        data.classes[columns.class[i]], columns.order[i] < 0 ? "" : data.orders[columns.order[i]], `pair ${pair}`,
        ...["credit_subject", "credit_target"].map((c) => (columns[c][i] < 0 ? "" : data.credits[columns[c][i]])),
      ].join("\n").toLowerCase());
      benchmarks[data.benchmark] = { data, text, sets: Object.fromEntries(data.sets.map((s) => [s.name, s])) };
    },
    groups(data) { groups = data; },
  };

  const metric = (name) => meta.metrics[name];
  const show = (value, name) => {
    if (missing(value)) return "–";
    return value.toFixed(metric(name)?.digits ?? 3).replace("-", "−");
  };
  const picture = (data, number) => `${meta.folder}/thumbnails/${data.pictures[number]}`;

  const fill = (select, options, chosen) => {
    select.replaceChildren(...options.map(([value, label]) => h("option", { value, textContent: label })));
    if (options.some(([value]) => value === chosen)) select.value = chosen;
  };
  const better = (name) => metric(name)?.better ?? "";

  // Names of what can be sorted by, in the page's order.
  const sortable = (bench) => meta.order.filter((m) => bench.data.sets.some((s) => m in s.values));
  // "a" is a set, "a\nb" the difference a minus b.
  const valueOf = (bench, of, name) => {
    const [a, b] = of.split("\n").map((set) => bench.sets[set]?.values[name]);
    if (!a) return () => null;
    if (!of.includes("\n")) return (i) => a[i];
    return (i) => (missing(a[i]) || missing(b?.[i]) ? null : a[i] - b[i]);
  };
  const setOptions = (bench) => {
    const names = bench.data.sets.map((s) => s.name);
    const between = names.slice(1).map((n) => [`${n}\n${names[0]}`, `${n} − ${names[0]}`]);
    return [...names.map((n) => [n, n]), ...between];
  };
  const favourite = (bench) => bench.data.sets.findLast((s) => meta.kinds[s.name] === "model")?.name;

  const ranked = (places, value, sign) => {
    const known = places.filter((i) => !missing(value(i)));
    const rest = places.filter((i) => missing(value(i)));
    known.sort((a, b) => sign * (value(a) - value(b)) || a - b);
    return [...known, ...rest]; // pairs without this number go last, whatever the order
  };

  // ---------------------------------------------------------------------------------------------- gallery

  const PAGE = 24;
  const state = { benchmark: "", sort: "", of: "", order: "up", group: "", class: "", words: "", page: 0, hidden: new Set() };
  let shown = [];

  const figuresOf = (bench, i, sets) => {
    const { data } = bench, { columns } = data;
    const found = [
      { kind: "subject", label: "subject", image: columns.subject[i] },
      { kind: "control", label: "control", image: columns.control[i] },
      { kind: "target", label: "target", image: columns.target[i] },
    ];
    for (const set of sets) {
      found.push({ kind: "generated", label: set.name, image: set.generated[i], set });
      found.push({ kind: "difference", label: "difference", image: set.difference[i], set });
    }
    found.push({ kind: "answer", label: "right answer", image: columns.answer[i] });
    return found.filter((figure) => figure.image >= 0);
  };
  const visibleSets = (bench) => bench.data.sets.filter((s) => !state.hidden.has(s.name));
  const headline = (set, i) => {
    const names = meta.order.filter((m) => !["pixels", "area"].includes(m) && !missing(set.values[m]?.[i]));
    const first = names.includes(state.sort) ? [state.sort] : [];
    return [...first, ...names.filter((m) => m !== state.sort)].slice(0, 4)
      .map((m) => h("span", { className: m === state.sort ? "now" : "", title: metric(m).label },
        h("i", {}, metric(m).label), show(set.values[m][i], m)));
  };
  const title = (bench, i) => bench.data.classes[bench.data.columns.class[i]];
  const credit = (bench, i) => {
    const { data } = bench;
    const [subject, target] = ["credit_subject", "credit_target"].map((c) => data.columns[c][i]);
    const words = [];
    if (subject >= 0) words.push(`Subject: ${data.credits[subject]}`);
    if (target >= 0) words.push(`Target: ${data.credits[target]}`);
    return words.join(" · ");
  };
  const thumbnail = (bench, i, figure, open) => {
    const image = h("img", {
      loading: "lazy", decoding: "async", width: 132, height: 132, src: picture(bench.data, figure.image),
      alt: `${figure.label}${figure.kind === "difference" ? ` of ${figure.set.name}` : ""}, pair ${bench.data.columns.pair[i]}`,
    });
    return h("button", { type: "button", className: "frame", onclick: open }, image);
  };

  const renderPair = (bench, i, place) => {
    const { columns, orders } = bench.data;
    const figures = figuresOf(bench, i, visibleSets(bench));
    const strip = figures.map((figure, k) => {
      const caption = h("figcaption", {}, h("b", { textContent: figure.label, title: figure.label }));
      if (figure.kind === "generated") caption.append(...headline(figure.set, i));
      return h("figure", { className: figure.kind }, thumbnail(bench, i, figure, () => openZoom(shown, place, k)), caption);
    });
    const order = columns.order[i] < 0 ? "" : `${orders[columns.order[i]]} · `;
    const words = credit(bench, i);
    return h("article", { className: "pair" },
      h("h3", {}, title(bench, i), h("small", {}, `${order}pair ${columns.pair[i]}`)),
      h("div", { className: "strip", tabIndex: -1 }, ...strip),
      words ? h("p", { className: "credit" }, words) : null);
  };

  const filtered = (bench) => {
    const { data, text } = bench, { columns } = data;
    const group = data.orders.indexOf(state.group), kind = data.classes.indexOf(state.class);
    const words = state.words.trim().toLowerCase().split(/\s+/).filter(Boolean);
    const places = [];
    for (let i = 0; i < columns.pair.length; i++) {
      if (state.group && columns.order[i] !== group) continue;
      if (state.class && columns.class[i] !== kind) continue;
      if (words.every((word) => text[i].includes(word))) places.push(i);
    }
    if (!state.sort) return state.order === "down" ? places.reverse() : places;
    return ranked(places, valueOf(bench, state.of, state.sort), state.order === "down" ? -1 : 1);
  };

  const update = () => {
    const bench = benchmarks[state.benchmark];
    if (!bench) return;
    shown = filtered(bench);
    renderPage();
  };

  const renderPage = () => {
    const bench = benchmarks[state.benchmark];
    const pages = Math.max(1, Math.ceil(shown.length / PAGE));
    state.page = Math.min(Math.max(state.page, 0), pages - 1);
    const from = state.page * PAGE;
    const rows = shown.slice(from, from + PAGE);
    $("pairs").replaceChildren(...rows.map((i, k) => renderPair(bench, i, from + k)));
    if (!rows.length) $("pairs").append(h("p", { className: "empty" }, "No pair matches."));
    const number = (n) => n.toLocaleString("en");
    $("count").textContent = rows.length
      ? `${number(from + 1)}–${number(from + rows.length)} of ${number(shown.length)} pairs` : "0 pairs";
    for (const pager of document.querySelectorAll(".pager")) {
      const turn = (label, name, page, enabled) => h("button", {
        type: "button", textContent: label, ariaLabel: name, disabled: !enabled,
        onclick: () => turnTo(page),
      });
      const field = h("input", { type: "number", min: 1, max: pages, value: state.page + 1, ariaLabel: "page" });
      field.onchange = () => turnTo(Number(field.value) - 1);
      pager.replaceChildren(
        turn("‹", "previous page", state.page - 1, state.page > 0), field, ` of ${number(pages)}`,
        turn("›", "next page", state.page + 1, state.page < pages - 1));
    }
    remember();
  };
  const turnTo = (page) => {
    state.page = Number.isFinite(page) ? page : 0;
    renderPage();
    $("controls").scrollIntoView({ block: "start" });
  };

  const KEYS = ["benchmark", "sort", "of", "order", "group", "class", "words"];
  const remember = () => {
    if (!state.touched) return;
    const words = new URLSearchParams();
    for (const key of KEYS) if (state[key]) words.set(key, state[key]);
    if (state.page) words.set("page", state.page + 1);
    if (state.hidden.size) words.set("without", [...state.hidden].join("\n"));
    try { history.replaceState(null, "", `#gallery?${words}`); } catch { /* the view is then not in the address */ }
  };
  const recall = () => {
    if (!location.hash.startsWith("#gallery?")) return false;
    const words = new URLSearchParams(location.hash.slice(9));
    for (const key of KEYS) state[key] = words.get(key) ?? state[key];
    state.page = (parseInt(words.get("page"), 10) || 1) - 1;
    state.hidden = new Set((words.get("without") ?? "").split("\n").filter(Boolean));
    return true;
  };

  const form = () => $("controls").elements;
  const orderOptions = () => {
    if (!state.sort) return [["up", "as in the list"], ["down", "reversed"]];
    const words = { lower: [" (best)", " (worst)"], higher: [" (worst)", " (best)"] }[better(state.sort)] ?? ["", ""];
    return [["up", `lowest first${words[0]}`], ["down", `highest first${words[1]}`]];
  };
  const choose = async (name) => {
    const entry = meta.benchmarks.find((b) => b.name === name) ?? meta.benchmarks[0];
    state.benchmark = entry.name;
    await load(entry.file);
    const bench = benchmarks[entry.name];
    const names = bench.data.sets.map((s) => s.name);
    if (!setOptions(bench).some(([value]) => value === state.of)) state.of = favourite(bench) ?? names[0] ?? "";
    if (!sortable(bench).includes(state.sort)) state.sort = "";
    if (!bench.data.classes.includes(state.class)) state.class = "";
    if (!bench.data.orders.includes(state.group)) state.group = "";
    const controls = form();
    fill(controls.benchmark, meta.benchmarks.map((b) => [b.name, b.name]), entry.name);
    fill(controls.sort, [["", "place in the list"], ...sortable(bench).map((m) => [m, metric(m).label])], state.sort);
    fill(controls.of, setOptions(bench), state.of);
    fill(controls.order, orderOptions(), state.order);
    const listed = (names) => [["", "all"], ...[...names].sort((a, b) => a.localeCompare(b)).map((n) => [n, n])];
    fill(controls.group, listed(bench.data.orders), state.group);
    fill(controls.class, listed(bench.data.classes), state.class);
    controls.group.parentElement.hidden = bench.data.orders.length < 2;
    controls.words.value = state.words;
    $("chips").replaceChildren(...names.map((name) => {
      const box = h("input", { type: "checkbox", checked: !state.hidden.has(name) });
      box.onchange = () => {
        state.touched = true;
        if (box.checked) state.hidden.delete(name);
        else state.hidden.add(name);
        renderPage();
      };
      return h("label", { className: "chip" }, box, name);
    }));
    update();
  };
  const startGallery = () => {
    const controls = $("controls");
    controls.onsubmit = (event) => event.preventDefault();
    controls.addEventListener("input", (event) => {
      const { name, value } = event.target;
      if (!KEYS.includes(name)) return;
      state.touched = true;
      state[name] = value;
      state.page = 0;
      if (name === "sort") {
        // The worst pairs are what one looks for first.
        state.order = better(value) === "lower" ? "down" : "up";
        fill(form().order, orderOptions(), state.order);
      }
      if (name === "benchmark") choose(value).catch(report);
      else update();
    });
    recall();
    choose(state.benchmark).then(() => {
      if (location.hash.startsWith("#gallery?")) $("gallery").scrollIntoView();
    }).catch(report);
    addEventListener("hashchange", () => { if (recall()) choose(state.benchmark).catch(report); });
  };
  const report = (error) => {
    $("count").textContent = error.message;
    console.error(error);
  };

  // ------------------------------------------------------------------------------------------------- zoom

  const zoom = { list: [], place: 0, figure: 0, benchmark: "" };
  const openZoom = (list, place, figure, benchmark = state.benchmark) => {
    Object.assign(zoom, { list, place, figure, benchmark });
    renderZoom();
    if (!$("zoom").open) $("zoom").showModal();
  };
  const renderZoom = () => {
    const bench = benchmarks[zoom.benchmark], i = zoom.list[zoom.place];
    const figures = figuresOf(bench, i, bench.data.sets);
    zoom.figure = Math.min(Math.max(zoom.figure, 0), figures.length - 1);
    const figure = figures[zoom.figure];
    const dialog = $("zoom"), image = dialog.querySelector("img");
    $("zoom-title").textContent = `${title(bench, i)} · pair ${bench.data.columns.pair[i]}`;
    image.src = picture(bench.data, figure.image);
    image.alt = figure.label;
    const tabs = figures.map((f, k) => h("button", {
      type: "button", textContent: f.kind === "difference" ? `difference of ${f.set.name}` : f.label,
      ariaPressed: String(k === zoom.figure), onclick: () => { zoom.figure = k; renderZoom(); },
    }));
    const rows = meta.order.filter((m) => bench.data.sets.some((s) => !missing(s.values[m]?.[i])));
    const table = h("table", {},
      h("thead", {}, h("tr", {}, h("td"), ...bench.data.sets.map((s) => h("th", { scope: "col" }, s.name)))),
      h("tbody", {}, ...rows.map((m) => h("tr", {}, h("th", { scope: "row" }, metric(m).label),
        ...bench.data.sets.map((s) => h("td", { className: s === figure.set ? "now" : "" }, show(s.values[m]?.[i], m)))))));
    const words = credit(bench, i);
    dialog.querySelector(".zoom-side").replaceChildren(
      h("div", { className: "tabs" }, ...tabs), h("div", { className: "scroll", tabIndex: 0 }, table),
      ...(words ? [h("p", { className: "credit" }, words)] : []));
  };
  const startZoom = () => {
    const dialog = $("zoom");
    $("zoom-close").onclick = () => dialog.close();
    dialog.onclick = (event) => { if (event.target === dialog) dialog.close(); };
    dialog.addEventListener("keydown", (event) => {
      const figure = { ArrowLeft: -1, ArrowRight: 1 }[event.key] ?? 0;
      const place = { ArrowUp: -1, ArrowDown: 1 }[event.key] ?? 0;
      if (!figure && !place) return;
      event.preventDefault();
      zoom.figure += figure;
      zoom.place = Math.min(Math.max(zoom.place + place, 0), zoom.list.length - 1);
      renderZoom();
    });
    document.addEventListener("keydown", (event) => {
      if (dialog.open || event.ctrlKey || event.metaKey || event.altKey) return;
      if (event.target.closest("input, select, textarea") || !$("controls")) return;
      if (event.key === "/") {
        event.preventDefault();
        form().words.focus();
      } else if (event.key === "[" || event.key === "]") {
        turnTo(state.page + (event.key === "[" ? -1 : 1));
      }
    });
  };

  // ----------------------------------------------------------------------------------------------- extremes

  const startExtremes = () => {
    const controls = $("extremes-controls").elements;
    const chosen = { benchmark: meta.benchmarks[0].name, sort: "", of: "" };
    const draw = async () => {
      const entry = meta.benchmarks.find((b) => b.name === chosen.benchmark);
      await load(entry.file);
      const bench = benchmarks[entry.name];
      const metrics = sortable(bench).filter((m) => better(m));
      if (!metrics.includes(chosen.sort)) chosen.sort = metrics[0] ?? "";
      if (!setOptions(bench).some(([value]) => value === chosen.of)) chosen.of = favourite(bench) ?? "";
      fill(controls.benchmark, meta.benchmarks.map((b) => [b.name, b.name]), chosen.benchmark);
      fill(controls.sort, metrics.map((m) => [m, metric(m).label]), chosen.sort);
      fill(controls.of, setOptions(bench), chosen.of);
      const value = valueOf(bench, chosen.of, chosen.sort);
      const places = bench.data.columns.pair.map((_, i) => i).filter((i) => !missing(value(i)));
      const best = ranked(places, value, better(chosen.sort) === "lower" ? 1 : -1);
      const set = bench.sets[chosen.of.split("\n")[0]];
      const tiles = (list) => list.slice(0, 8).map((i, k) => {
        const figures = figuresOf(bench, i, bench.data.sets);
        const pick = figures.findIndex((f) => f.kind === "generated" && f.set === set);
        const open = () => openZoom(list, k, pick, entry.name);
        const images = [figures.find((f) => f.kind === "target"), figures[pick]].filter(Boolean);
        return h("figure", {}, ...images.map((f) => thumbnail(bench, i, f, open)),
          h("figcaption", {}, h("b", {}, show(value(i), chosen.sort)), h("span", { title: title(bench, i) }, title(bench, i))));
      });
      $("extremes-note").textContent = `${metric(chosen.sort)?.label ?? ""}, ${better(chosen.sort)} is better.`;
      $("best").replaceChildren(...tiles(best));
      $("worst").replaceChildren(...tiles([...best].reverse()));
    };
    $("extremes-controls").onsubmit = (event) => event.preventDefault();
    $("extremes-controls").addEventListener("input", (event) => {
      chosen[event.target.name] = event.target.value;
      draw().catch(report);
    });
    draw().catch(report);
  };

  // ------------------------------------------------------------------------------------------------- groups

  const LINES = 40;
  const startGroups = () => {
    const controls = $("groups-controls").elements;
    const chosen = { benchmark: "", group: "", metric: "", by: "n", sign: -1, all: false };
    const distinct = (key, rows) => [...new Set(rows.map((r) => r[key]))];
    const draw = () => {
      let rows = groups.groups;
      const pick = (key, label) => {
        const names = distinct(key, rows);
        if (!names.includes(chosen[key])) [chosen[key]] = names;
        fill(controls[key], names.map((n) => [n, label(n)]), chosen[key]);
        rows = rows.filter((r) => r[key] === chosen[key]);
      };
      pick("benchmark", (n) => n);
      pick("group", (n) => n.replaceAll("_", " "));
      pick("metric", (n) => metric(n)?.label ?? n);
      drawForest(rows[0]);
    };
    const drawForest = (found) => {
      const used = groups.models.map((_, m) => m).filter((m) => found.cells[m].some(Boolean));
      const numbers = used.flatMap((m) => found.cells[m].filter(Boolean).flat()).filter((v) => !missing(v));
      const low = Math.min(...numbers), span = Math.max(...numbers) - low || 1;
      const at = (value) => `${(3 + 94 * (value - low) / span).toFixed(2)}%`;
      const key = (v) => chosen.by === "name" ? found.values[v] : chosen.by === "n" ? found.n[v] : found.cells[chosen.by]?.[v]?.[0];
      const order = found.values.map((_, v) => v);
      order.sort((a, b) => {
        const x = key(a), y = key(b);
        if (missing(x) || missing(y)) return missing(x) - missing(y);
        return chosen.sign * (typeof x === "string" ? x.localeCompare(y) : x - y) || a - b;
      });
      const heading = (label, by) => h("th", { scope: "col", ariaSort: chosen.by === by ? (chosen.sign > 0 ? "ascending" : "descending") : "none" },
        h("button", { type: "button", onclick: () => {
          chosen.sign = chosen.by === by ? -chosen.sign : by === "name" || better(chosen.metric) === "higher" ? 1 : -1;
          chosen.by = by;
          drawForest(found);
        } }, label));
      const mark = (metric(found.metric)?.marks ?? []).filter((v) => v >= low && v <= low + span);
      const cell = (entry, m) => {
        if (!entry) return h("td", {}, "–");
        const track = h("span", { className: "track", ariaHidden: "true" });
        for (const value of mark) track.append(h("i", { className: "chance", style: `left:${at(value)}` }));
        if (!missing(entry[1])) {
          const left = at(entry[1]), right = at(entry[2]);
          track.append(h("i", { className: "span", style: `left:${left};width:calc(${right} - ${left})` }));
        }
        track.append(h("i", { className: "dot", style: `left:${at(entry[0])}` }));
        const words = missing(entry[1]) ? "" : `[${show(entry[1], found.metric)}, ${show(entry[2], found.metric)}]`;
        return h("td", { className: meta.kinds[groups.models[m]], title: words }, h("span", { className: "value" }, show(entry[0], found.metric)), track);
      };
      const lines = chosen.all ? order : order.slice(0, LINES);
      $("forest").replaceChildren(h("table", { className: "forest" },
        h("thead", {}, h("tr", {}, heading(found.group.replaceAll("_", " "), "name"), heading("n", "n"), ...used.map((m) => heading(groups.models[m], m)))),
        h("tbody", {}, ...lines.map((v) => h("tr", {}, h("th", { scope: "row" }, found.values[v]),
          h("td", {}, found.n[v].toLocaleString("en")), ...used.map((m) => cell(found.cells[m][v], m)))))));
      const more = $("forest-more");
      more.hidden = chosen.all || order.length <= LINES;
      more.textContent = `Show all ${order.length}`;
      more.onclick = () => { chosen.all = true; drawForest(found); };
    };
    $("groups-controls").onsubmit = (event) => event.preventDefault();
    $("groups-controls").addEventListener("input", (event) => {
      chosen[event.target.name] = event.target.value;
      chosen.all = false;
      draw();
    });
    load(`${meta.folder}/groups.js`).then(draw).catch((error) => { $("forest").textContent = error.message; });
  };

  // -------------------------------------------------------------------------------------------------- start

  document.addEventListener("DOMContentLoaded", () => {
    meta = JSON.parse($("meta").textContent);
    $("theme").onclick = () => {
      const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
      root.dataset.theme = dark ? "light" : "dark";
      stored(root.dataset.theme);
    };
    startZoom();
    if ($("controls")) startGallery();
    if ($("extremes-controls")) startExtremes();
    if ($("groups-controls")) startGroups();
    const links = [...document.querySelectorAll("nav a")];
    const sections = [...document.querySelectorAll("main > section")];
    const showing = new Set();
    const seen = new IntersectionObserver((entries) => {
      for (const entry of entries) showing[entry.isIntersecting ? "add" : "delete"](entry.target);
      const current = sections.find((section) => showing.has(section));
      if (!current) return;
      for (const link of links) {
        if (link.hash === `#${current.id}`) link.setAttribute("aria-current", "true");
        else link.removeAttribute("aria-current");
      }
    }, { rootMargin: "-20% 0px -70% 0px" });
    for (const section of sections) seen.observe(section);
  });
})();
