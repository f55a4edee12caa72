// Shows the nearest point of a chart beside the pointer.
const tip = document.getElementById("tip");
for (const svg of document.querySelectorAll("svg")) {
  const points = [...svg.querySelectorAll("g[data-points]")].flatMap((group) =>
    group.dataset.points
      .split(";")
      .filter(Boolean)
      .map((text) => {
        const [x, y, step, value] = text.split(",");
        return { x: +x, y: +y, text: `${group.dataset.label} ${step}: ${value}`.trim() };
      }),
  );
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const scale = svg.viewBox.baseVal.width / box.width;
    const x = (event.clientX - box.left) * scale;
    const y = (event.clientY - box.top) * scale;
    const far = (point) => (point.x - x) ** 2 + 0.2 * (point.y - y) ** 2;
    const near = points.reduce((best, point) => (best && far(best) <= far(point) ? best : point), null);
    if (!near) return;
    tip.textContent = near.text;
    tip.hidden = false;
    tip.style.left = `${Math.min(event.clientX + 12, innerWidth - tip.offsetWidth - 8)}px`;
    tip.style.top = `${event.clientY + 12}px`;
  });
  svg.addEventListener("pointerleave", () => {
    tip.hidden = true;
  });
}
