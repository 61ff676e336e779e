// A file with its data in it: the report, and the figure in a notebook, to which new data comes in messages.
"use strict";

{
  let known = JSON.parse(document.getElementById("data").textContent);
  const board = new Esper.Board(document.getElementById("board"), { view: { base: known.base || "", folded: new Set() }, isNaming: true });
  board.isEager = !known.isLive;

  const show = () => {
    const runs = known.runs.map((run, place) => ({ ...run, color: Esper.COLORS[place % Esper.COLORS.length], isHidden: false, series: { ...run.series, version: known.version || 0 } }));
    board.extraVersion = known.version || 0;
    board.marks = known.marks || [];
    board.setEvents(known.runs[0]?.id || "", known.events || []);
    board.runs = runs;
    const [first] = runs;
    if (first && Esper.phases(first.series, "step")) board.extra("time", { id: "where the time goes", title: "Where a step's time goes", about: "ms, stacked", unit: "ms", isLinear: true, isFromZero: true, draw: Esper.stack });
    if (known.seeds?.length) {
      const chart = board.extra("seeds", { id: "stages", title: "Stages of the seeds", about: known.seedsSaid || "by step", isLinear: true, draw: Esper.bars(() => known.seeds, known.stages) });
      chart.element.classList.add("wide");
    }
    board.show(runs, known.metrics);
    if (known.said) document.getElementById("said").textContent = known.said;
  };

  show();
  if (known.isLive) {
    // From the notebook's own page, which made this frame.
    addEventListener("message", (event) => {
      if (event.source !== parent || event.data?.esper !== known.id) return;
      known = { ...known, ...JSON.parse(event.data.text) };
      show();
    });
  }
}
