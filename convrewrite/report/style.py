"""The look of the HTML pages: one style sheet with the colours of light, dark and print."""

from __future__ import annotations

from convrewrite.sites import ROLES

# Role: (light, dark). Tints, so that only a change is a full colour.
_COLOURS = {
    "stem": ("#c9d6e4", "#3d5166"),
    "bottleneck_spatial": ("#9fc5ee", "#2b5c93"),
    "basic_spatial": ("#9ed8cf", "#216b63"),
    "pointwise": ("#e4e8ed", "#3a434e"),
    "depthwise": ("#b5dda6", "#37672c"),
    "shortcut": ("#f2dfa4", "#6e5a1c"),
    "downsample": ("#e3c690", "#6d4e20"),
    "se": ("#d9c8ec", "#574178"),
    "transition": ("#f0c6d3", "#733b4f"),
    "head": ("#cfc8bc", "#5a5346"),
    "other": ("#f6f7f8", "#2a3038"),
}
_LIGHT = """color-scheme:light;--bg:#fff;--ink:#1b232c;--soft:#5b6774;--line:#d5dbe2;--faint:#f5f7f9;--panel:#fff;
--accent:#c2410c;--accent-ink:#fff;--accent-soft:#fdeee4;--plus:#0f766e;--plus-soft:#e3f4f1;--minus:#b91c1c;
--minus-soft:#fdeaea;--old:#aab4bf;--good:#15803d;--good-soft:#e7f5eb;--kernel:#2b3641"""
_DARK = """color-scheme:dark;--bg:#12171d;--ink:#e6ebf0;--soft:#9aa7b4;--line:#323c47;--faint:#181f27;--panel:#1c242d;
--accent:#ea6a2c;--accent-ink:#160a03;--accent-soft:#3a2216;--plus:#2bb5a5;--plus-soft:#12302d;--minus:#f26d6d;
--minus-soft:#3a1a1c;--old:#66727f;--good:#4cc472;--good-soft:#15301f;--kernel:#dfe6ec"""


def _roles(which: int) -> str:
    colours = {role: _COLOURS.get(role, _COLOURS["other"])[which] for role in ROLES}
    return ";".join(f"--r-{role}:{colour}" for role, colour in colours.items())


_RULES = """
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);
  font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif;-webkit-print-color-adjust:exact;
  print-color-adjust:exact}
main{max-width:1160px;margin:0 auto;padding:28px 20px 48px}
h1{font-size:25px;line-height:1.2;margin:0;letter-spacing:-.01em;overflow-wrap:anywhere;font-weight:650}
h2{font-size:17px;margin:38px 0 10px;font-weight:650}
h3{font-size:14px;margin:20px 0 6px}
p{margin:6px 0}
.kind{color:var(--soft);font-size:12px;letter-spacing:.08em;text-transform:uppercase;margin:0 0 4px}
.lead,.note{color:var(--soft);overflow-wrap:anywhere}
.note{font-size:13px}
code,.mono,td,svg text{font-variant-numeric:tabular-nums}
.badge{display:inline-block;border-radius:999px;padding:2px 11px;font-size:13px;font-weight:600;border:1px solid}
.good{color:var(--good);background:var(--good-soft)}
.bad{color:var(--minus);background:var(--minus-soft)}
.unsure{color:var(--soft);background:var(--faint)}
.alert{border:2px solid var(--minus);background:var(--minus-soft);border-radius:8px;padding:10px 16px;margin:18px 0;
  font-weight:600;overflow-wrap:anywhere}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(165px,1fr));gap:10px;margin:18px 0 6px}
.tile{border:1px solid var(--line);border-radius:8px;padding:10px 14px;background:var(--panel)}
.tile b{display:block;font-size:20px;line-height:1.3;font-weight:650;font-variant-numeric:tabular-nums}
.tile span{color:var(--soft);font-size:13px}
.tile .up{color:var(--accent)}
.tile .down{color:var(--good)}
.legend{display:flex;flex-wrap:wrap;gap:5px 16px;font-size:13px;color:var(--soft);margin:8px 0 12px;
  align-items:center}
.legend span{display:inline-flex;align-items:center;gap:6px;overflow-wrap:anywhere}
.legend svg{flex:none}
figure{margin:0}
.narrow{display:none}
.net{display:block;max-width:100%;height:auto;border:1px solid var(--line);border-radius:8px}
.band{fill:var(--panel)}
.band.odd{fill:var(--faint)}
svg text{font-family:inherit;font-size:10.5px;fill:var(--ink)}
svg .stage{font-size:14px;font-weight:650}
svg .fact{font-size:11.5px;fill:var(--soft);font-weight:400}
svg .row,svg .block{fill:var(--soft);font-size:10px}
.box{fill:none;stroke:var(--line);stroke-width:1}
.box.loose{stroke-dasharray:2 3}
.flow{stroke:var(--old);stroke-width:1.5;fill:none}
.cell{stroke:#0000;stroke-width:1}
.cell.r-other{stroke:var(--line)}
svg .kernel,svg .mark{text-anchor:middle}
svg .kernel{fill:var(--kernel)}
svg .mark{fill:var(--accent-ink);font-weight:650}
.cell.replaced{stroke:var(--accent);stroke-width:2}
.cell.new.replaced{fill:var(--accent)}
.cell.new.inserted{fill:var(--plus)}
.cell.new.removed{fill:var(--minus)}
.empty{fill:none;stroke:var(--line);stroke-dasharray:3 3}
.bars{display:grid;grid-template-columns:minmax(120px,max-content) 1fr 1fr;gap:0 22px;font-size:13px;
  align-items:center}
.bars>div{border-top:1px solid var(--line);padding:4px 0;align-self:stretch}
.bars>.head{border:0;color:var(--soft);font-size:12px;padding-bottom:2px}
.bars .site{overflow-wrap:anywhere;max-width:290px}
.bar{display:grid;grid-template-columns:1fr 118px;gap:10px;align-items:center;height:100%}
.bar i{display:block;height:6px;border-radius:0 3px 3px 0;background:var(--old);min-width:1px}
.bar i+i{margin-top:2px;background:var(--accent)}
.plus .bar i+i{background:var(--plus)}
.bar span{white-space:nowrap;text-align:right;font-variant-numeric:tabular-nums}
.scroll{overflow-x:auto;border:1px solid var(--line);border-radius:8px}
table{border-collapse:collapse;width:100%;font-size:13px}
th{font-weight:600;color:var(--soft);text-align:left;background:var(--faint)}
th,td{padding:5px 12px;border-top:1px solid var(--line);vertical-align:top}
thead th{border-top:0;white-space:nowrap}
td{overflow-wrap:break-word}
td.n,th.n{text-align:right;white-space:nowrap}
td.s{white-space:nowrap}
tr.replaced td{background:var(--accent-soft)}
tr.inserted td{background:var(--plus-soft)}
tr.removed td,tr.broken td{background:var(--minus-soft)}
tr.broken td{font-weight:600}
.share{display:flex;height:16px;border-radius:4px;overflow:hidden;margin:4px 0 10px;gap:2px}
.share i{min-width:3px}
.f-carried{background:var(--r-bottleneck_spatial)}
.f-absorbed{background:var(--r-basic_spatial)}
.f-new{background:var(--accent)}
.f-dropped{background:var(--minus)}
details{margin-top:30px}
summary{cursor:pointer;font-weight:650;font-size:17px;margin-bottom:10px}
.profile{display:grid;grid-template-columns:44px 1fr;gap:8px}
.scale{display:flex;flex-direction:column;justify-content:space-between;text-align:right;color:var(--soft);
  font-size:11px;line-height:1;margin:-5px 0}
.chart{width:100%;height:120px;display:block}
.chart .axis{stroke:var(--line);vector-effect:non-scaling-stroke}
.chart .was{fill:var(--old)}
.chart .more{fill:var(--accent)}
.chart .add{fill:var(--plus)}
.chart .less{fill:none;stroke:var(--old);vector-effect:non-scaling-stroke}
footer{margin-top:44px;color:var(--soft);font-size:13px;border-top:1px solid var(--line);padding-top:12px;
  overflow-wrap:anywhere}
@media (max-width:640px){
  main{padding:18px 12px 32px}
  h1{font-size:21px}
  .wide{display:none}
  .narrow{display:block}
  .tiles{grid-template-columns:1fr 1fr}
  .bars{grid-template-columns:1fr}
  .bars .head{display:none}
  .bars .site{max-width:none;font-weight:600;padding-bottom:0}
  .bars>.value{border:0;padding:1px 0}
  .bars>.value::before{content:attr(data-name);color:var(--soft);font-size:12px}
  .bars>.value{display:grid;grid-template-columns:52px 1fr;align-items:center}
}
@media print{
  main{max-width:none;padding:0}
  h2,.note,.legend{break-after:avoid}
  .tile,.bars>div,tr,.profile,.alert{break-inside:avoid}
  .tile b{font-size:15px}
  .bars{font-size:11px}
  .wide{display:block}
  .narrow{display:none}
  .scroll{overflow:visible}
  details:not([open]){display:none}
  details>summary{list-style:none}
  body{font-size:12px}
  table{font-size:10.5px}
  th,td{padding:3px 6px}
}
"""


def style_sheet() -> str:
    """All CSS. Dark follows the reader's system; paper is always light."""
    fills = "".join(f".r-{role}{{fill:var(--r-{role})}}" for role in ROLES)
    dark = f"@media screen and (prefers-color-scheme:dark){{:root{{{_DARK};{_roles(1)}}}}}"
    return f":root{{{_LIGHT};{_roles(0)}}}{dark}{fills}{_RULES}"
