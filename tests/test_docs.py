"""What people read is true: README's code and output, the rule reference, links. ``python -m tests.test_docs`` writes
README's table of blocks."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest
import yaml
from click.testing import CliRunner
from convrewrite.cli import main as cli

from convrewrite.arithmetic import FUNCTIONS
from convrewrite.blocks.base import BLOCKS, Block, summary
from convrewrite.clauses import WORDS
from convrewrite.facts import FACTS
from convrewrite.laws import ORDER
from convrewrite.match import select
from convrewrite.rulefile import builtin_names, load_rules, parse_rules
from convrewrite.ruleschema import Budget, Expect, Pick, Rule, RuleFile
from convrewrite.selectors.base import SELECTORS
from convrewrite.sites import ROLES

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
README = (ROOT / "README.md").read_text("utf-8")
RULES = (ROOT / "docs" / "rules.md").read_text("utf-8")
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
TABLE = re.compile(r"(<!-- blocks: .*? -->\n)(.*?)(<!-- /blocks -->)", re.DOTALL)
PIECE = {"match": {"role": "stem"}, "replace": {"block": "acmix"}}


def blocks_of(text: str, language: str) -> list[str]:
    """The fenced blocks of one language."""
    return [body for found, body in FENCE.findall(text) if found == language]


def own_blocks() -> dict[str, type[Block]]:
    """The blocks that come with convrewrite, without those that tests register."""
    return {name: cls for name, cls in BLOCKS.items() if cls.__module__.startswith("convrewrite.blocks.")}


def block_table() -> str:
    """README's table of blocks."""
    used: dict[str, list[str]] = {}
    for name in builtin_names():
        for rule in load_rules(name).rules:
            if name not in used.setdefault(rule.change.block, []):
                used[rule.change.block].append(name)
    lines = ["| block | can | what it is | paper | rule files |", "|---|---|---|---|---|"]
    for name, cls in own_blocks().items():
        files = ", ".join(f"`{file}`" for file in used.get(name, []))
        lines.append(f"| `{name}` | {', '.join(cls.actions)} | {summary(cls)} | {cls.paper} | {files} |")
    return "\n".join(lines) + "\n"


def missing_lines(shown: list[str], printed: str) -> list[str]:
    """The shown lines that do not stand in the output in this order; ``...`` stands for any lines."""
    rest, missing = printed.splitlines(), []
    gap = True
    for line in shown:
        if line.strip() == "...":
            gap = True
        elif line in rest[: None if gap else 1]:
            rest = rest[rest.index(line) + 1 :]
            gap = False
        else:
            missing.append(line)
    return missing


def commands_in(text: str) -> list[list[str]]:
    """Every ``convrewrite ...`` of shell and console blocks and of inline code, as arguments."""
    lines = [
        line.removeprefix("$ ") for kind in ("sh", "console") for b in blocks_of(text, kind) for line in b.splitlines()
    ]
    lines += re.findall(r"`(convrewrite [^`]+)`", FENCE.sub("", text))
    parts = [part.strip() for line in lines for part in line.split("&&")]
    calls = [re.sub(r"^\.venv/bin/", "", part) for part in parts]
    return [shlex.split(call)[1:] for call in calls if re.match(r"convrewrite\b", call) and not call.endswith("...")]


def command_fault(arguments: list[str]) -> str | None:
    """What is wrong with the names of a command and its options, or None."""
    command: click.Command = cli.main
    context = click.Context(command)
    rest = list(arguments)
    while rest and isinstance(command, click.Group) and not rest[0].startswith("-"):
        found = command.get_command(context, rest.pop(0))
        if found is None:
            return "no such command"
        command = found
    known = {option for parameter in command.params for option in parameter.opts}
    known |= {"--help", "-h"}
    unknown = [word for word in rest if word.startswith("-") and word not in known]
    return f"no option {unknown[0]}" if unknown else None


def test_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    found = blocks_of(README, "python")
    assert found
    for body in found:
        exec(compile(body, "README.md", "exec"), names)  # noqa: S102 - our own README


CONSOLE = blocks_of(README, "console")


@pytest.mark.parametrize("body", CONSOLE, ids=lambda body: body.splitlines()[0][14:60])
def test_console_output_in_the_readme_is_what_the_command_prints(body: str) -> None:
    prompt, *shown = body.splitlines()
    done = CliRunner().invoke(cli.main, shlex.split(prompt)[2:])
    assert missing_lines(shown, done.output) == []


def test_the_comparison_of_output_sees_changed_moved_and_invented_lines() -> None:
    printed = "a\nb\nc\nd\n"
    assert missing_lines(["a", "...", "d"], printed) == []
    assert missing_lines(["a", "x"], printed) == ["x"]
    assert missing_lines(["a", "c"], printed) == ["c"]  # b was left out without ...
    assert missing_lines(["c", "...", "a"], printed) == ["a"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_options_on_the_page_exist(page: Path) -> None:
    faults = [(call, fault) for call in commands_in(page.read_text("utf-8")) if (fault := command_fault(call))]
    assert faults == []


def test_a_command_that_does_not_exist_is_seen() -> None:
    assert commands_in("```sh\nconvrewrite plna x\n```\nand `convrewrite plan x --ruels y`") == [
        ["plna", "x"],
        ["plan", "x", "--ruels", "y"],
    ]
    assert command_fault(["plna", "x"]) == "no such command"
    assert command_fault(["plan", "x", "--ruels", "y"]) == "no option --ruels"
    assert command_fault(["rules", "test", "mine.yaml"]) is None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_resolve(page: Path) -> None:
    text = FENCE.sub("", page.read_text("utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        other = page.parent / path if path else page
        assert other.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.+)$", FENCE.sub("", other.read_text("utf-8")), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in anchors, target


@pytest.mark.parametrize("page", [*PAGES, *sorted((ROOT / "examples").iterdir())], ids=lambda page: page.name)
def test_no_absolute_paths(page: Path) -> None:
    if page.is_file():
        assert re.findall(r"(?<![\w.:/])/(?:home|root|tmp|usr|opt|mnt|Users|work)\b", page.read_text("utf-8")) == []


def test_two_one_liners_install_run_and_test() -> None:
    lines = [line for body in blocks_of(README, "sh") for line in body.splitlines()]
    assert [line.split(" && ")[0] for line in lines] == ["python3 -m venv .venv"] * 2
    assert lines[0].endswith("convrewrite apply resnet50 --rules acmix --out resnet50-acmix")
    assert lines[1].endswith(".venv/bin/pytest")


def test_table_of_blocks_is_true_and_complete() -> None:
    table = TABLE.search(README)
    assert table
    assert table[2] == block_table(), "run: python -m tests.test_docs"


def test_the_page_of_laws_has_all_in_order_and_readme_names_them() -> None:
    page = (ROOT / "docs" / "laws.md").read_text("utf-8")
    assert tuple(re.findall(r"^\| (\w+) \|", page, re.MULTILINE))[1:] == ORDER
    section = README.split("## What is checked after every rewrite")[1].split("\n## ")[0]
    assert all(re.search(rf"\b{law}\b", section) for law in ORDER)


def test_picture_is_small_and_self_contained() -> None:
    text = (ROOT / "docs" / "resnet50-acmix.svg").read_text("utf-8")
    assert len(text) < 200_000
    assert re.findall(r"(?:href|src)=|url\(|<script|@import", text) == []
    assert text.count("~ acmix<") == 16  # one mark for each rewritten site


# The rule reference.


def as_file(text: str) -> str:
    """A whole rule file around a piece of one."""
    data = yaml.safe_load(text)
    if "version" in data:
        return text
    of_rule = {key: data.pop(key) for key in list(data) if key in Rule.model_fields}
    rule = {"id": "example", **PIECE, **of_rule}
    if "insert" in of_rule:
        del rule["replace"]
    return yaml.safe_dump({"version": 1, "rules": [rule], **data})


YAML = [(page.name, body) for page in PAGES for body in blocks_of(page.read_text("utf-8"), "yaml")]


@pytest.mark.parametrize(("page", "body"), YAML, ids=[f"{page}-{n}" for n, (page, _) in enumerate(YAML)])
def test_every_yaml_block_is_a_valid_rule_file(page: str, body: str) -> None:
    file = parse_rules(as_file(body), page)
    assert file.rules
    assert file.notes == ()


def rows_of(title: str) -> list[list[str]]:
    """The cells of all table rows in one section of the rule reference."""
    section = re.split(r"^## ", RULES, flags=re.MULTILINE)
    body = next(part for part in section if part.startswith(f"{title}\n"))
    rows = [line.strip("| ").split(" | ") for line in body.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in row] for row in rows]


def test_every_key_of_match_is_described_with_an_example_that_is_valid() -> None:
    examples = {row[0].strip("`"): row[-1].strip("`") for row in rows_of("match")}
    assert set(examples) == {*SELECTORS.names(), *WORDS}
    for key, example in examples.items():
        data = yaml.safe_load(example)
        assert list(data) == [key]
        if key != "use":
            select([], data)  # raises for a value that cannot be read


def test_keys_in_the_reference_are_those_of_the_format() -> None:
    of_files, of_rules = (
        set(re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (`.*?) \|", table, re.MULTILINE))))
        for table in RULES.split("## A whole file")[1].split("\n## ")[0].split("| key of a rule ")
    )
    assert of_files == set(RuleFile.model_fields)
    assert of_rules == set(Rule.model_fields)
    assert {name for row in rows_of("pick") for name in re.findall(r"`(\w+):", row[0])} == set(Pick.model_fields)
    assert {row[0].strip("`") for row in rows_of("expect")} == set(Expect.model_fields)
    assert set(Budget.model_fields) <= set(re.findall(r"\w+", RULES.split("## budget")[1].split("\n## ")[0]))


def test_facts_functions_and_roles_in_the_reference_are_those_of_the_language() -> None:
    assert {name for row in rows_of("Expressions") for name in re.findall(r"`(\w+)`", row[0])} == set(FACTS)
    section = RULES.split("## Expressions")[1]
    assert {"if" if name == "iff" else name for name in FUNCTIONS} <= set(re.findall(r"`(\w+)[`(]", section))
    assert all(f"`{role}`" in RULES for role in ROLES)


def test_a_wrong_block_is_seen() -> None:
    with pytest.raises(Exception, match="unknown key"):
        parse_rules(as_file("pick: {evry: 2}\n"))


if __name__ == "__main__":
    text = TABLE.sub(lambda found: found[1] + block_table() + found[3], README)
    (ROOT / "README.md").write_text(text, encoding="utf-8")
