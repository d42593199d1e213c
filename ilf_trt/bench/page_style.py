"""The look of `report.html`: light and dark, narrow and wide, without a font or a picture from elsewhere."""

STYLE = """
:root { color-scheme: light dark;
  --paper: #fbfaf7; --card: #ffffff; --ink: #1d2327; --soft: #5d686f; --line: #e3e0d8; --track: #efece4;
  --ilf: #0b7a75; --equal: #c26a11; --base: #4a5560; --other: #8b98a3; --bad: #b3261e; --good: #2c6e49; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #14171a; --card: #1b2024; --ink: #e8e6e1; --soft: #9aa5ad; --line: #2d343a; --track: #252c31;
  --ilf: #3cc7bf; --equal: #f0a04b; --base: #b3bec8; --other: #6f7d88; --bad: #ff8a80; --good: #7ccf9c; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); overflow-wrap: anywhere;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 40px 28px 64px; }
h1 { font-size: 30px; line-height: 1.2; margin: 2px 0 6px; font-weight: 650; letter-spacing: -0.01em; }
h2 { font-size: 19px; margin: 44px 0 4px; font-weight: 650; }
h3 { font-size: 14px; margin: 22px 0 6px; font-weight: 600; color: var(--soft); }
p { margin: 0 0 12px; } .soft, figcaption, caption { color: var(--soft); font-size: 13.5px; }
.chips { display: flex; flex-wrap: wrap; gap: 8px; margin: 16px 0 22px; }
.chip { border: 1px solid; border-radius: 14px; padding: 4px 13px; font-size: 13.5px; }
.good { color: var(--good); } .bad { color: var(--bad); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(215px, 1fr)); gap: 14px; margin: 0 0 18px; }
.card { background: var(--card); border: 1px solid var(--line); border-top: 3px solid var(--tone);
  padding: 14px 18px 16px; border-radius: 6px; }
.card b { display: block; font-size: 34px; line-height: 1.15; font-weight: 650; color: var(--tone);
  font-variant-numeric: tabular-nums; }
.card span { display: block; } .card .soft { margin-top: 2px; }
.ilf { --tone: var(--ilf); } .equal { --tone: var(--equal); } .base { --tone: var(--base); }
.other { --tone: var(--other); } .failed { --tone: var(--bad); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; margin: 4px 0 10px; }
th { font-weight: 500; color: var(--soft); font-size: 13px; text-align: right; vertical-align: bottom;
  border-bottom: 1px solid var(--line); padding: 6px 0 6px 16px; line-height: 1.3; overflow-wrap: normal; }
td { text-align: right; padding: 7px 0 7px 16px; border-bottom: 1px solid var(--line); vertical-align: top; }
th:first-child, td:first-child { text-align: left; padding-left: 0; } td:first-child { width: 35%; }
td.wide { text-align: left; color: var(--bad); }
td small { display: block; color: var(--soft); font-size: 12.5px; } caption { text-align: left; padding: 4px 0; }
tr.ilf td:first-child, tr.equal td:first-child { border-left: 3px solid var(--tone); padding-left: 10px; }
tr.ilf td { font-weight: 600; } tr.ilf small { font-weight: 400; } .ratio { white-space: nowrap; }
dl { display: grid; grid-template-columns: minmax(90px, max-content) 1fr; gap: 3px 18px; margin: 8px 0; }
dt { color: var(--soft); } dd { margin: 0; }
code { font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: 10px 14px; margin: 8px 0;
  white-space: pre-wrap; }
.runs { display: grid; grid-template-columns: minmax(150px, 25%) 1fr; column-gap: 22px; align-items: center; }
.runs.seen { grid-template-columns: minmax(150px, 25%) 1fr 1fr; } .runs > * { min-width: 0; }
.runs .name { line-height: 1.25; font-size: 14px; } .runs .name small { display: block; color: var(--soft); }
.runs .head { font-size: 13px; color: var(--soft); align-self: end; padding-bottom: 4px; }
.parts { display: grid; grid-template-columns: minmax(90px, max-content) 1fr auto auto; gap: 7px 18px;
  align-items: center; font-variant-numeric: tabular-nums; } .parts .number { text-align: right; }
.plot { display: grid; grid-template-columns: 46px 1fr; column-gap: 8px; }
.legend { columns: 2; column-gap: 34px; padding-left: 26px; margin: 10px 0; } .legend li { break-inside: avoid; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 16px; }
figure { margin: 0; } figure img { width: 100%; display: block; border-radius: 4px; border-top: 3px solid var(--tone);
  background: var(--track); image-rendering: auto; } figcaption { margin-top: 6px; line-height: 1.3; }
svg { display: block; overflow: visible; } .fill, .mark { fill: var(--tone); } .track { fill: var(--track); }
.grid { stroke: var(--line); } .whisker { stroke: var(--ink); stroke-width: 1.4; } .middle { stroke: var(--ink); }
.box { fill: var(--tone); fill-opacity: 0.2; } .dot { fill: var(--tone); fill-opacity: 0.8; }
.dot.beyond { fill: none; stroke: var(--bad); } .mark { stroke: var(--paper); stroke-width: 1.5; }
.tick { fill: var(--soft); font-size: 11.5px; } .label { fill: var(--ink); font-size: 12.5px; font-weight: 600; }
details { margin-top: 8px; } summary { cursor: pointer; color: var(--soft); }
footer { margin-top: 48px; border-top: 1px solid var(--line); padding-top: 12px; color: var(--soft); font-size: 13px; }
@media (max-width: 700px) {
  main { padding: 24px 16px 48px; } h1 { font-size: 24px; } .legend { columns: 1; }
  .cards { grid-template-columns: 1fr; } .card b { font-size: 28px; }
  table, tbody, tr, td { display: block; } thead { display: none; } caption { display: block; }
  tr { display: grid; grid-template-columns: 1fr 1fr; gap: 0 18px; padding: 10px 0;
    border-bottom: 1px solid var(--line); }
  td { border: 0; padding: 1px 0; display: flex; justify-content: space-between; gap: 8px; }
  td::before { content: attr(data-label); color: var(--soft); font-weight: 400; font-size: 13px; }
  td:first-child, td.wide, td.ratio { grid-column: 1 / -1; }
  td:first-child { display: block; width: auto; font-weight: 600; }
  td:first-child::before, td.wide::before { content: none; } td:first-child small { font-weight: 400; }
  .runs, .runs.seen { grid-template-columns: 1fr; } .runs .blank { display: none; } .runs .name { margin-top: 10px; }
  .parts { column-gap: 10px; } dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: 8px; }
  .pictures { grid-template-columns: 1fr 1fr; } }
@media print { body { background: none; } h2 { break-after: avoid; } .card, figure, tr { break-inside: avoid; } }
"""
