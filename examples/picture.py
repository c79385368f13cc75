"""Draw a model before and after a plan as one SVG: ``python examples/picture.py resnet50 acmix picture.svg``."""

from __future__ import annotations

import sys
from pathlib import Path

import convrewrite as cr
from convrewrite.report.layout import bands_of_edits
from convrewrite.report.picture import draw
from convrewrite.report.style import style_sheet
from convrewrite.sources import resolve


def picture(name: str, rules: str) -> str:
    """The drawing of the HTML report as a file of its own, light or dark as the reader's system is."""
    source = resolve(name, meta=True)
    plan = cr.plan(source.model, rules, example=source.example, name=source.name)
    sites = cr.inspect(source.model, example=source.example)
    label = f"{source.name} before and after {rules}: {len(plan.edits)} edits"
    drawing = draw(bands_of_edits(sites, plan.edits), width=1120, compare=True, label=label)
    font = "svg{font-family:system-ui,-apple-system,'Segoe UI',Roboto,'DejaVu Sans',sans-serif}"
    head = '<svg xmlns="http://www.w3.org/2000/svg" '
    style = f"<style>{font}{style_sheet()}</style>"
    start, rest = drawing.removeprefix("<svg ").split(">", 1)
    return f"{head}{start}>{style}{rest}\n"


def main() -> None:
    if len(sys.argv) != 4:
        raise SystemExit("usage: python examples/picture.py MODEL RULES FILE.svg")
    name, rules, target = sys.argv[1:]
    Path(target).write_text(picture(name, rules), encoding="utf-8")
    print(f"wrote {target}")


if __name__ == "__main__":
    main()
