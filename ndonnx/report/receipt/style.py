"""How the page looks: light and dark by the reader's setting, narrow, wide and on paper."""

from __future__ import annotations

CSS = """
:root{color-scheme:light dark;--ink:#1c2127;--dim:#5b6570;--page:#fff;--card:#f5f6f8;--line:#d8dde3;
--student:#0b7a75;--kept:#9aa2ab;--bad:#b3261e;--good:#2c6e3f;--teacher:#c9ced5}
@media (prefers-color-scheme:dark){:root{--ink:#e4e8ec;--dim:#9aa5b1;--page:#14171a;--card:#1d2226;--line:#343b42;
--student:#3fb8b1;--kept:#6d7680;--bad:#ff8a80;--good:#7fcf96;--teacher:#454d55}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:68rem;padding:1.5rem 1rem 4rem;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
h1{font-size:1.5rem;line-height:1.25;margin:0 0 .25rem;overflow-wrap:anywhere}
h2{font-size:1.1rem;margin:2.2rem 0 .6rem;border-bottom:1px solid var(--line);padding-bottom:.25rem}
h3{font-size:.95rem;margin:1.2rem 0 .4rem}
p{margin:.4rem 0}.dim{color:var(--dim)}.bad{color:var(--bad)}.good{color:var(--good)}
code,pre,.mono{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:.85em;overflow-wrap:anywhere}
pre{background:var(--card);padding:.7rem;border-radius:6px;white-space:pre-wrap}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:.3rem .9rem .3rem 0;border-bottom:1px solid var(--line);vertical-align:top}
th{font-weight:600;color:var(--dim);font-size:.85em}
td.n,th.n{text-align:right;white-space:nowrap}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(9.5rem,1fr));gap:.6rem;margin:1rem 0}
.card{background:var(--card);border-radius:8px;padding:.7rem .8rem}
.card b{display:block;font-size:1.35rem;font-variant-numeric:tabular-nums}.card span{color:var(--dim);font-size:.85em}
.gallery{display:flex;flex-wrap:wrap;gap:.8rem;margin:.6rem 0}
.gallery figure{margin:0;width:10rem;break-inside:avoid;font-size:.9em}
.gallery img{max-width:100%;border-radius:4px;image-rendering:pixelated}
.chain{list-style:none;margin:0;padding:0}
.chain li{display:grid;grid-template-columns:4.5rem minmax(8rem,1fr) minmax(10rem,1.3fr);gap:.2rem .9rem;
padding:.45rem 0;border-bottom:1px solid var(--line);break-inside:avoid}
.chain li div{min-width:0;overflow-wrap:anywhere}
.bar{height:1.1rem;border-radius:3px;background:var(--teacher);min-width:3px;margin:.15rem 0;
print-color-adjust:exact;-webkit-print-color-adjust:exact}
.bar i{display:block;height:100%;border-radius:3px;background:var(--student);min-width:2px;
print-color-adjust:exact;-webkit-print-color-adjust:exact}
.kept .bar{background:var(--kept)}
.key{display:inline-block;width:.8rem;height:.8rem;border-radius:2px;margin:0 .3rem 0 .8rem;vertical-align:-1px;
print-color-adjust:exact;-webkit-print-color-adjust:exact}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,22rem),1fr));gap:1rem}
figure{margin:0}figure svg{width:100%;height:auto;display:block}figcaption{color:var(--dim);font-size:.85em}
.sign{display:grid;grid-template-columns:2fr 1fr;gap:2rem;margin-top:3rem}
.sign div{border-top:1px solid var(--ink);padding-top:.3rem;color:var(--dim);font-size:.85em}
@media (max-width:40rem){.chain li{grid-template-columns:3.5rem minmax(0,1fr)}.chain li .told{grid-column:1/-1}
body{padding:1rem .7rem 3rem}}
@media print{:root{--ink:#000;--dim:#444;--page:#fff;--card:#f2f2f2;--line:#bbb;--student:#0b7a75;--kept:#9aa2ab;
--teacher:#c9ced5;color-scheme:light}body{max-width:none;padding:0;font-size:10pt}h2{break-after:avoid}
tr,figure,.card{break-inside:avoid}.scroll{overflow:visible}}
"""
