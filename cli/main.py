"""`convrewrite`: the group of all commands. Each command is a module of this package, loaded when it is called."""

from __future__ import annotations

import importlib

import click

COMMANDS = {
    "inspect": "Show every convolution of a model with its role.",
    "plan": "Show what rules would change, and why not more.",
    "apply": "Rewrite a model, check it, report and save it.",
    "finetune": "Train a rewritten model on labelled images.",
    "distill": "Train a rewritten model to give the original's outputs.",
    "fuse": "Make a model ready for inference, measure the gain, export it.",
    "migrate": "Take a checkpoint of the original into the rewritten model, and back.",
    "diff": "Compare two models or saved folders.",
    "rules": "List, show, scaffold and test rule files.",
    "blocks": "List the blocks that rules can use.",
    "bench": "Measure blocks, whole networks and rewriting itself.",
    "zoo": "Try many models: capture, equal copies, every rule file, the laws.",
}


class _Lazy(click.Group):
    """Commands by name, imported only when one of them runs or shows its own help."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"convrewrite.cli.{cmd_name}_command")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            from convrewrite.errors import closest

            ctx.fail(f"no command '{args[0]}'; {closest(args[0], COMMANDS) or 'see convrewrite --help'}")
        return super().resolve_command(ctx, args)


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="convrewrite", prog_name="convrewrite")
def main() -> None:
    """Turn convolutions of trained CNNs into attention blocks, by rule files, keeping the weights.

    \b
    convrewrite inspect resnet50
    convrewrite plan resnet50 --rules acmix
    convrewrite apply resnet50 --rules acmix --out out/

    Exit codes: 0 done, 1 error, 2 wrong usage, 3 something to do (plan --exit-code).
    """


if __name__ == "__main__":
    main()
