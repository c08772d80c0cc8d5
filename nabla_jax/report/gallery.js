// Sorts and filters the gallery; without scripts it is simply a list.
(() => {
  const gallery = document.getElementById("pairs");
  const zoom = document.getElementById("zoom");
  document.addEventListener("click", (event) => {
    if (event.target.matches(".strip img")) {
      const caption = event.target.closest("figure").querySelector("figcaption").innerText.replace(/\n+/g, " · ");
      zoom.querySelector("img").src = event.target.src;
      zoom.querySelector("p").textContent = caption;
      zoom.showModal();
    } else if (zoom.open) zoom.close();
  });
  if (!gallery) return;
  const pick = (id) => document.getElementById(id);
  const pairs = [...gallery.children].map((element, place) => ({
    element, place, scores: JSON.parse(element.dataset.scores), words: element.querySelector("h4").innerText.toLowerCase(),
  }));
  const update = () => {
    const benchmark = pick("benchmark").value, metric = pick("metric").value, model = pick("model").value;
    const words = pick("search").value.trim().toLowerCase(), sign = pick("order").value === "down" ? -1 : 1;
    const score = (pair) => pair.scores[model]?.[metric];
    let shown = 0;
    for (const pair of pairs) {
      const visible = pair.element.dataset.benchmark === benchmark && pair.words.includes(words);
      pair.element.hidden = !visible;
      shown += visible;
    }
    pairs.sort((a, b) => {
      if (metric === "") return a.place - b.place;
      const x = score(a), y = score(b);
      // Pairs without this number go last, whatever the order.
      if (x === undefined || y === undefined) return (x === undefined) - (y === undefined) || a.place - b.place;
      return sign * (x - y) || a.place - b.place;
    });
    gallery.append(...pairs.map((pair) => pair.element));
    pick("count").textContent = `${shown} pairs`;
  };
  for (const id of ["benchmark", "metric", "model", "order", "search"]) pick(id).addEventListener("input", update);
  update();
})();
