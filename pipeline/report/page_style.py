"""The style sheet of the pages of a report: light and dark screens of any width, and A4 paper."""

PAGE_STYLE = """
:root { color-scheme: light dark; --ink: #1f2933; --soft: #5c6873; --line: #dfe4e8; --paper: #ffffff; --shade: #f4f6f8;
  --bar: #b9c3cc; --hit: #0072b2; --link: #0b5cad; }
@media (prefers-color-scheme: dark) { :root { --ink: #e3e7eb; --soft: #98a4af; --line: #2e363e; --paper: #14181c;
  --shade: #1c2228; --bar: #4a5560; --hit: #3aa0e0; --link: #7cc0ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 64rem; padding: 3.5rem 1.5rem 5rem; background: var(--paper); color: var(--ink);
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { margin: 0 0 1.5rem; font-size: 1.75rem; line-height: 1.25; font-weight: 650; letter-spacing: -.01em;
  overflow-wrap: anywhere; }
h2 { margin: 3.5rem 0 1rem; padding-top: 1.25rem; border-top: 1px solid var(--line); font-size: 1.25rem; font-weight: 650; }
h3 { margin: 2rem 0 .75rem; font-size: 1rem; font-weight: 600; }
p, ul { max-width: 46rem; margin: .75rem 0; overflow-wrap: anywhere; }
ul { padding-left: 1.2rem; }
li { margin: .25rem 0; }
figure { margin: 1.75rem 0; }
figcaption { max-width: 46rem; margin-top: .6rem; color: var(--soft); font-size: .85rem; line-height: 1.5;
  overflow-wrap: anywhere; }
a { color: var(--link); }
nav { margin: 0 0 2rem; padding: .75rem 1rem; background: var(--shade); border-radius: .5rem; font-size: .9rem; }
nav ol { columns: 17rem; max-width: none; margin: 0; padding-left: 1.6rem; }
nav li { margin: 0; padding: .1rem 0; break-inside: avoid; overflow-wrap: anywhere; }
figcaption a { margin-left: .35rem; white-space: nowrap; }
.wide { overflow-x: auto; }
.wide img { display: block; width: 100%; min-width: 42rem; height: auto; }
table { border-collapse: collapse; min-width: 24rem; font-size: .875rem; font-variant-numeric: tabular-nums; }
th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
th, td { padding: .4rem 1rem .4rem 0; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:last-child, td:last-child { padding-right: 0; }
th.word, td.word { text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 7rem; }
th:first-child, td.word:first-child { overflow-wrap: break-word; }
details { margin: .5rem 0; border: 1px solid var(--line); border-radius: .4rem; padding: .55rem .9rem; }
summary { cursor: pointer; font-weight: 600; font-size: .9rem; overflow-wrap: anywhere; }
details.row { margin: 0; border: 0; padding: 0; }
details.row summary { font-weight: inherit; font-size: inherit; }
details.row[open] { max-width: 22rem; padding-bottom: .4rem; color: var(--soft); font-size: .8rem; }
.examples { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); gap: 1rem; }
.example { display: grid; grid-template-columns: 5rem minmax(0, 1fr); gap: 1rem; padding: 1rem; background: var(--shade);
  border-radius: .5rem; font-size: .8rem; line-height: 1.4; }
.example img, .blank { width: 5rem; height: 5rem; object-fit: contain; background: #fff; border-radius: .35rem; }
.blank { display: grid; place-items: center; padding: .5rem; text-align: center; background: var(--line); color: var(--soft); }
.id { display: block; margin-top: .4rem; color: var(--soft); overflow-wrap: anywhere; }
.truth { font-weight: 600; margin-bottom: .4rem; overflow-wrap: anywhere; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .4rem 1.25rem; }
.method { color: var(--soft); overflow-wrap: anywhere; }
.class { display: flex; white-space: nowrap; justify-content: space-between; gap: .5rem; }
.class span:first-child { overflow: hidden; text-overflow: ellipsis; }
.hit { font-weight: 600; }
.bar { height: .25rem; margin: .05rem 0 .35rem; background: var(--line); border-radius: .2rem; overflow: hidden; }
.bar div { height: 100%; background: var(--bar); }
.bar.right div { background: var(--hit); }
@media (max-width: 32rem) { body { padding: 1.5rem 1rem 3rem; } .examples { grid-template-columns: 1fr; }
  .example { grid-template-columns: 1fr; }
  th, td { padding-right: .5rem; white-space: normal; } th.word, td.word { min-width: 5rem; } }
.explorer { padding: .75rem; border: 1px solid var(--line); border-radius: .5rem; font-size: .85rem; }
@page { size: A4; margin: 14mm; }
@media print {
  :root { color-scheme: light; --ink: #1f2933; --soft: #48525c; --line: #c9d0d6; --paper: #ffffff; --shade: #f4f6f8;
    --bar: #b9c3cc; --hit: #0072b2; --link: #1f2933; }
  body { max-width: none; padding: 0; font-size: 10pt; line-height: 1.4; }
  h1, h2, h3 { break-after: avoid; }
  h2 { margin-top: 1.5rem; }
  figcaption a, .screen { display: none; }
  figure, .example { break-inside: avoid; }
  .wide { overflow: visible; }
  .wide img { min-width: 0; }
  table { min-width: 0; max-width: 100%; font-size: 7.5pt; }
  th, td { padding: .2rem .5rem .2rem 0; white-space: normal; }
  td.number { overflow-wrap: normal; }
  th.word, td.word { min-width: 4rem; }
  figure:has(tr:nth-child(25)) { break-inside: auto; }
  .examples { grid-template-columns: 1fr 1fr; }
}
"""
