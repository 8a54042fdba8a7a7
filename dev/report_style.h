/* report_style.h - how report.c's page looks: light or dark as the reader's system is, in one column on a phone. */
#ifndef REPORT_STYLE_H
#define REPORT_STYLE_H

static const char REPORT_STYLE[] =
    ":root { color-scheme: light dark; --page: #fff; --ink: #1d2329; --soft: #5b6670; --line: #dfe3e8; --tint: #dbe7f6;\n"
    "  --c0: #2563ab; --c1: #c2571a; --c2: #26804f; --c3: #8a4fa8 }\n"
    "@media (prefers-color-scheme: dark) { :root { --page: #14171a; --ink: #e3e7ea; --soft: #98a3ad; --line: #2e353b;\n"
    "  --tint: #23384f; --c0: #6fa8e8; --c1: #ec9a5f; --c2: #65c08d; --c3: #c294dc } }\n"
    "* { box-sizing: border-box }\n"
    "body { margin: 0 auto; max-width: 1160px; padding: 1.5rem 1rem 3rem; background: var(--page); color: var(--ink);\n"
    "  font: 15px/1.5 system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif }\n"
    "h1, p, figcaption, tbody th, .settings b { overflow-wrap: anywhere }\n"
    "h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .75rem }\n"
    "h2 { font-size: 1.15rem; margin: 2.2rem 0 .4rem }\n"
    "h3 { font-size: 1rem; margin: 0 }\n"
    "p { margin: .3rem 0 }\n"
    "b { font-weight: 600 }\n"
    "figure { margin: 0; min-width: 0 }\n"
    ".note, figcaption, .three span { color: var(--soft); font-size: .85rem }\n"

    ".numbers { display: flex; flex-wrap: wrap; gap: .5rem 2rem; padding: .6rem 0; margin: 0;\n"
    "  border: solid var(--line); border-width: 1px 0 }\n"
    ".numbers div { display: flex; flex-direction: column-reverse }\n"
    ".numbers dd { margin: 0; font-size: 1.35rem; font-weight: 600; font-variant-numeric: tabular-nums }\n"
    ".numbers dt { color: var(--soft); font-size: .8rem }\n"

    ".charts, .examples { display: grid; gap: 1.3rem 2rem; margin-top: .8rem;\n"
    "  grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)) }\n"
    ".legend span { display: inline-block; margin-right: 1rem }\n"
    "i { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .35em }\n"
    "i.red { background: #f00 } i.green { background: #0d0 } i.yellow { background: #ee0 }\n"
    "i.c0 { background: var(--c0) } i.c1 { background: var(--c1) } i.c2 { background: var(--c2) }\n"
    "i.c3 { background: var(--c3) }\n"
    "svg { display: block; width: 100%; height: auto }\n"
    "svg svg { width: auto }\n"
    "text { font-size: 13px; fill: var(--soft) }\n"
    ".grid { stroke: var(--line) } .axis { stroke: var(--soft) }\n"
    ".band { fill: var(--c0); opacity: .14 }\n"
    ".curve { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round }\n"
    "path.c0 { stroke: var(--c0) } path.c1 { stroke: var(--c1) } path.c2 { stroke: var(--c2) }\n"
    "path.c3 { stroke: var(--c3) }\n"

    ".scroll { overflow: auto; max-height: 40rem; border: solid var(--line); border-width: 1px 0 }\n"
    "table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }\n"
    "th, td { padding: .25rem .6rem; text-align: right; border-top: 1px solid var(--line); font-weight: 400 }\n"
    "td, thead th { white-space: nowrap }\n"
    "th:first-child { text-align: left; padding-left: 0 }\n"
    "thead th { position: sticky; top: 0; background: var(--page); color: var(--soft); border: 0 }\n"
    ".all th, .all td { font-weight: 600 }\n"
    ".bar { background: linear-gradient(90deg, var(--tint) var(--part), transparent 0) }\n"

    ".three { display: grid; grid-template-columns: repeat(3, 1fr); gap: .4rem }\n"
    ".three div { text-align: center }\n"
    "img { display: block; width: 100%; height: auto; border-radius: 2px }\n"

    ".settings { columns: 17rem; column-gap: 2rem; margin: 0; padding: 0; list-style: none; font-size: .9rem }\n"
    ".settings li { display: flex; justify-content: space-between; gap: 1rem; break-inside: avoid;\n"
    "  border-bottom: 1px solid var(--line) }\n"
    ".settings span { color: var(--soft) }\n"
    "@media (max-width: 40rem) {\n"
    "  body { font-size: 14px }\n"
    "  th, td { padding: .25rem .3rem; font-size: 12px }\n"
    "  .numbers { gap: .5rem 1.3rem }\n"
    "  .numbers dd { font-size: 1.15rem } }\n";

#endif
