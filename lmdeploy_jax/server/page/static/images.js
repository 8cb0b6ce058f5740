// Images that go with the next message: chosen, pasted or dropped.

import { $, button, element } from "./dom.js";

let taken = () => false;  // whether the model takes images

export function startImages(takesImages) {
  taken = takesImages;
  $("attach").addEventListener("click", () => $("files").click());
  $("files").addEventListener("change", () => { attach($("files").files); $("files").value = ""; });
  $("input").addEventListener("paste", (event) => attach(event.clipboardData.files));
  document.addEventListener("dragover", (event) => { event.preventDefault(); document.body.classList.add("dropping"); });
  document.addEventListener("dragleave", () => document.body.classList.remove("dropping"));
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    document.body.classList.remove("dropping");
    attach(event.dataTransfer.files);
  });
}

function attach(files) {
  if (!taken()) return;
  for (const file of files) {
    if (!file.type.startsWith("image/")) continue;
    const reader = new FileReader();
    reader.addEventListener("load", () => {
      const away = button($("attached"), "", () => away.remove());
      away.setAttribute("aria-label", `Take the image ${file.name} away`);
      away.title = "Take away";
      picture(away, reader.result);
    });
    reader.readAsDataURL(file);
  }
}

export function picture(parent, url) {
  const image = element(parent, "img");
  image.src = url;
  image.alt = "Image";
  return image;
}

export const attachedImages = () => [...$("attached").querySelectorAll("img")].map((image) => image.src);
export const clearAttached = () => $("attached").replaceChildren();
