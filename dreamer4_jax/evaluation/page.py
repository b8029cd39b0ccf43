"""The style sheet of the report page: system fonts, light and dark, from a phone's width up."""

STYLE = """
:root { --paper:#ffffff; --ink:#1b1f24; --soft:#5a6370; --line:#d9dee4; --card:#f4f6f8; --link:#1f6fc2;
  --good:#177a4c; --bad:#c02a50; }
@media (prefers-color-scheme: dark) {
  :root { --paper:#14171b; --ink:#e7eaee; --soft:#9aa4b0; --line:#323941; --card:#1e2329; --link:#6fb1f0;
    --good:#4cc38a; --bad:#ff7b98; } }
* { box-sizing:border-box; }
html { -webkit-text-size-adjust:100%; }
body { margin:0; background:var(--paper); color:var(--ink); overflow-wrap:break-word;
  font:16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
header, main { max-width:64rem; margin:0 auto; padding:0 1rem; }
header { padding-top:1.5rem; }
h1 { font-size:1.7rem; line-height:1.2; margin:0 0 .6rem; }
h2 { font-size:1.25rem; margin:0 0 .8rem; padding-top:1.2rem; border-top:1px solid var(--line); }
h3 { font-size:1rem; margin:1.4rem 0 .5rem; }
nav { display:flex; flex-wrap:wrap; gap:.2rem 1rem; font-size:.9rem; margin-bottom:1.5rem; }
a { color:var(--link); text-decoration:none; }
a:hover { text-decoration:underline; }
section { margin-bottom:2.2rem; }
.lead { max-width:46rem; margin:.4rem 0; }
.absent { color:var(--soft); font-style:italic; }
.cards { display:grid; grid-template-columns:repeat(auto-fit, minmax(10rem, 1fr)); gap:.7rem; margin:1rem 0; }
.card { background:var(--card); border-radius:.6rem; padding:.7rem .9rem; }
.card .label, .card .note { font-size:.82rem; color:var(--soft); line-height:1.35; }
.card .value { font-size:1.5rem; font-weight:650; line-height:1.4; font-variant-numeric:tabular-nums; }
.scroll { overflow-x:auto; margin:.6rem 0 1rem; }
table { border-collapse:collapse; font-size:.88rem; font-variant-numeric:tabular-nums; }
.remark { color:var(--soft); font-size:.82rem; margin:-.5rem 0 1rem; max-width:46rem; }
th, td { padding:.35rem .6rem; vertical-align:top; text-align:right; white-space:nowrap;
  border-bottom:1px solid var(--line); }
th { white-space:normal; }
th:first-child { text-align:left; padding-left:0; }
tbody th { font-weight:400; }
thead th { color:var(--soft); font-weight:600; vertical-align:bottom; }
td small { display:block; color:var(--soft); font-size:.76rem; line-height:1.2; }
.words td, .words th { white-space:normal; text-align:left; }
.pass { color:var(--good); } .fail { color:var(--bad); } .open { color:var(--soft); font-weight:400; }
figure { margin:0; }
figcaption { font-size:.85rem; color:var(--soft); padding:.25rem 0 0; }
.charts { display:grid; grid-template-columns:repeat(auto-fit, minmax(min(22rem, 100%), 1fr)); gap:1rem; }
.chart { max-width:28rem; margin:.4rem 0 .8rem; }
.chart svg { display:block; width:100%; height:auto; }
.clips { display:grid; grid-template-columns:repeat(auto-fill, minmax(min(22rem, 100%), 1fr)); gap:1rem; }
img { display:block; max-width:100%; height:auto; border-radius:.4rem; }
.clips img { width:100%; }
.wide { margin-top:1rem; overflow-x:auto; } .wide img { width:100%; min-width:42rem; max-width:none; }
details { margin:.6rem 0; } summary { cursor:pointer; color:var(--link); }
pre { background:var(--card); border-radius:.6rem; padding:.8rem; overflow-x:auto; font-size:.8rem; line-height:1.4; }
@media (max-width: 30rem) { th, td { padding:.35rem .45rem; } table { font-size:.84rem; } }
@media print { nav { display:none; } section { break-inside:avoid; } }
"""
