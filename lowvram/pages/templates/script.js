"use strict";
// The slider over sample grids. Without this script they stand beside each other and scroll.
document.documentElement.classList.add("script");
for (const box of document.querySelectorAll(".samples")) {
  const player = box.querySelector(".player"), slider = box.querySelector("input"), said = box.querySelector("output");
  const frames = [...box.querySelectorAll(".frame")];
  if (frames.length < 2) continue;
  const show = () => {
    frames.forEach((frame, n) => { frame.hidden = n !== Number(slider.value); });
    said.textContent = frames[Number(slider.value)].dataset.said;
    slider.setAttribute("aria-valuetext", said.textContent);
  };
  box.classList.add("one");
  player.hidden = false;
  slider.addEventListener("input", show);
  addEventListener("pageshow", show); // browsers restore a slider's place after going back
  show();
}
