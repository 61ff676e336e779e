// Where the hours of the run in focus went. The gateway makes the HTML; names in it are escaped.
"use strict";

const HOURS_EVERY_MS = 3000;
const hours = { run: "", html: "", isAsking: false };

async function lookAtHours() {
  if (document.hidden || hours.isAsking || !runs.infos.has(runs.focus)) return;
  const run = runs.focus;
  hours.isAsking = true;
  let html = "";
  try {
    html = (await ask("hours", { run })).html;
  } catch (error) {
    if (error.status !== 404) return;
  } finally {
    hours.isAsking = false;
  }
  if (run !== runs.focus || (hours.run === run && hours.html === html)) return;
  const isOpen = hours.run === run && $("hours").querySelector("details")?.open;
  Object.assign(hours, { run, html });
  $("hours").innerHTML = html;
  $("hours").hidden = !html;
  if (isOpen && $("hours").querySelector("details")) $("hours").querySelector("details").open = true;
}

setInterval(lookAtHours, HOURS_EVERY_MS);
setTimeout(lookAtHours, 300); // once the first list of runs is here
