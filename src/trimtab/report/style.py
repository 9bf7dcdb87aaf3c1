"""The one style sheet of all reports: dark on light, for reading and for print."""

from __future__ import annotations

ACCENT = "#0b6e8a"
MUTED = "#64707d"
INK = "#1b2126"
RULE = "#dfe4e8"

STYLE = f"""
:root {{ color-scheme: light; }}
* {{ box-sizing: border-box; }}
body {{ margin: 0; background: #fff; color: {INK};
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans", sans-serif; }}
main {{ max-width: 66rem; margin: 0 auto; padding: 2.5rem 1.5rem 4rem; }}
h1 {{ font-size: 1.75rem; line-height: 1.2; letter-spacing: -.01em; margin: 0 0 .4rem; }}
h2 {{ font-size: 1.15rem; margin: 2.6rem 0 .5rem; padding-top: 1.2rem; border-top: 1px solid {RULE}; }}
h3 {{ font-size: 1rem; margin: 1.6rem 0 .4rem; }}
header p {{ color: {MUTED}; margin: 0; }}
p {{ margin: .5rem 0; max-width: 48rem; }}
small {{ font-size: .8rem; color: {MUTED}; }}
.verdict {{ max-width: none; margin: 1.6rem 0 0; padding: .9rem 1.1rem; border-left: 4px solid; font-size: 1.05rem; }}
.verdict.yes {{ border-color: #1f8a4c; background: #eef8f1; }}
.verdict.no {{ border-color: #b3661a; background: #fdf5ec; }}
.scroll {{ overflow-x: auto; margin: 1rem 0; }}
table {{ border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }}
caption {{ text-align: left; color: {MUTED}; font-size: .88rem; padding: 0 0 .5rem; }}
th, td {{ padding: .36rem .55rem; border-bottom: 1px solid {RULE}; vertical-align: baseline; }}
th:first-child, td:first-child {{ padding-left: .4rem; }}
thead th {{ border-bottom: 1.5px solid {INK}; font-weight: 600; vertical-align: bottom; }}
thead small {{ display: block; font-weight: 400; }}
tbody th {{ font-weight: 500; white-space: nowrap; }}
.number {{ text-align: right; white-space: nowrap; }}
.words {{ text-align: left; }}
tr.emphasis {{ background: #eef6f9; }}
.interval {{ display: block; color: {MUTED}; font-size: .84em; }}
p .interval {{ display: inline; }}
.none {{ color: {MUTED}; }}
figure {{ margin: 1.2rem 0; }}
figure svg {{ width: 100%; height: auto; display: block; }}
figcaption {{ color: {MUTED}; font-size: .88rem; margin-top: .4rem; max-width: 48rem; }}
.facts {{ display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1.2rem; margin: 1rem 0;
  font-size: .92rem; }}
.facts dt {{ color: {MUTED}; }}
.facts dd {{ margin: 0; overflow-wrap: anywhere; }}
.texts {{ margin: 1rem 0 1.6rem; border: 1px solid {RULE}; border-radius: 6px; }}
.texts > p {{ margin: 0; padding: .55rem .9rem; max-width: none; background: #f6f8f9; border-radius: 6px 6px 0 0; }}
.texts dl {{ display: grid; grid-template-columns: 12.5rem 1fr; margin: 0; }}
.texts dt, .texts dd {{ margin: 0; padding: .5rem .9rem; border-top: 1px solid {RULE}; }}
.texts dt {{ font-size: .88rem; font-weight: 600; }}
.texts dt small {{ display: block; font-weight: 400; overflow-wrap: anywhere; }}
.tokens {{ white-space: pre-wrap; overflow-wrap: anywhere; font-family: Georgia, "Liberation Serif", serif; }}
.tokens mark {{ background: #ffe08a; color: inherit; border-radius: 2px; box-shadow: 0 0 0 1px #f0c64c inset; }}
.lens {{ font-family: ui-monospace, "Liberation Mono", monospace; font-size: .84em; }}
.lens span {{ background: #f1f4f6; border-radius: 3px; padding: 0 .25em; margin: 0 .15em .1em 0;
  display: inline-block; }}
.strip {{ display: grid; grid-template-columns: 12.5rem 1fr; gap: 0 .9rem; padding: .45rem 0;
  border-bottom: 1px solid {RULE}; }}
.strip > p {{ margin: 0; font-size: .84rem; font-weight: 600; overflow-wrap: anywhere; }}
.strip > p small {{ display: block; font-weight: 400; }}
.k {{ display: inline-block; margin: 0 1px 2px 0; padding: 0 .2em; border-radius: 3px; background: #f6f8f9;
  vertical-align: top; text-align: center; cursor: help; white-space: pre-wrap; overflow-wrap: anywhere; }}
.k small {{ display: block; font-size: .66rem; line-height: 1.1; color: #4a5560; }}
.k1 {{ background: #fff4d6; }} .k2 {{ background: #ffe08a; }} .k3 {{ background: #ffb65c; }}
.k4 {{ background: #f58a6b; }}
.branch {{ outline: 2px solid {ACCENT}; }}
.legend {{ border: 0; }} .legend .k {{ cursor: auto; }}
code {{ font-family: ui-monospace, "Liberation Mono", monospace; font-size: .9em; }}
details {{ margin: 1rem 0; }}
summary {{ cursor: pointer; color: {ACCENT}; }}
a {{ color: {ACCENT}; }}
@media (max-width: 40rem) {{
  main {{ padding: 1.2rem 1rem 3rem; }}
  .texts dl {{ grid-template-columns: 1fr; }}
  .texts dd {{ border-top: 0; padding-top: 0; }}
  .facts, .strip {{ grid-template-columns: 1fr; }}
}}
@media print {{ main {{ max-width: none; padding: 0; }} section {{ break-inside: avoid; }} }}
"""
