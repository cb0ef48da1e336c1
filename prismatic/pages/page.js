// Filters, and a line in the traces that follows the video. Without scripts the page shows everything.
const form = document.querySelector(".filters");
const show = () => {
  const wanted = Object.fromEntries(new FormData(form));
  for (const part of document.querySelectorAll("[data-part]")) {
    let shown = 0;
    for (const card of part.querySelectorAll("[data-unit]")) {
      card.hidden = Object.entries(wanted).some(([name, value]) => value && card.dataset[name] !== value);
      shown += !card.hidden;
    }
    part.hidden = !shown;
    part.querySelector("[data-count]").textContent = shown;
  }
};
if (form) {
  form.hidden = false;
  form.addEventListener("change", show);
  form.addEventListener("submit", (event) => event.preventDefault());
  show(); // a browser keeps what was chosen over a reload
}
for (const video of document.querySelectorAll("video")) {
  const trace = video.parentElement.querySelector("svg.trace"), now = trace && trace.querySelector(".now");
  const follow = () => {
    const x = Math.min(1, (video.currentTime * FRAMES_PER_SECOND) / trace.dataset.steps) * trace.dataset.width + +trace.dataset.left;
    now.setAttribute("x1", x), now.setAttribute("x2", x), now.removeAttribute("visibility");
    if (!video.paused) requestAnimationFrame(follow);
  };
  if (now) for (const event of ["play", "seeked", "timeupdate"]) video.addEventListener(event, follow);
}
