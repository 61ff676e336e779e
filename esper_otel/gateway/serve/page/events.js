// What happened in the run in focus: marks in the charts, and a list. The gateway makes the HTML; texts in it are escaped.
"use strict";

const EVENTS_EVERY_MS = 2000;
const happened = { key: "", cursor: "", isAsking: false };

async function lookAtEvents() {
  if (document.hidden || happened.isAsking || !runs.infos.has(runs.focus)) return;
  const given = { run: runs.focus, rank: runs.rank };
  const key = JSON.stringify(given);
  if (happened.key !== key) showEvents({ key, cursor: "" }, { html: "", marks: [] });
  happened.isAsking = true;
  let answer = null;
  try {
    answer = await ask("events", { ...given, since: happened.cursor });
  } catch (error) {
    if (error.status !== 404) return;
    answer = { cursor: "", html: "", marks: [] };
  } finally {
    happened.isAsking = false;
  }
  if (happened.key !== key || answer.is_same) return;
  showEvents({ key, cursor: answer.cursor }, answer);
}

function showEvents(change, { html, marks }) {
  const isOpen = happened.key === change.key && $("events").querySelector("details")?.open;
  Object.assign(happened, change);
  $("events").innerHTML = html;
  $("events").hidden = !html;
  if (isOpen && html) $("events").querySelector("details").open = true;
  board.setEvents(runs.focus, marks);
  show();
}

setInterval(lookAtEvents, EVENTS_EVERY_MS);
setTimeout(lookAtEvents, 400); // once the first list of runs is here
