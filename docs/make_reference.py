"""Writes docs/reference.md from the commands themselves: ``make docs`` (``--print`` shows it). A test holds the file to them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

from llmemb_ray import cli, config

HEAD = """# Reference of the command line

Made from the commands by `make docs`; do not edit. `jobs/embed.py` takes the arguments of `llmemb embed`, and
`llmemb_ray.embed(input, output, **settings)` the same settings with underscores. `--config FILE` reads them from YAML:

```yaml
# embed.yaml, used as: llmemb embed --config embed.yaml --limit-rows 1000
input: [s3://bucket/corpus/]
output: s3://bucket/vectors/
model: facebook/opt-125m
prompt: prompteol
storage_options: {anon: false}
```

Exit codes: 0 done and the accounts balance · 1 failed · 2 bad usage, configuration or input · 3 a check found a discrepancy.
(`ray job submit` itself exits 1 for any failed job.)
"""

SETTINGS = {
    "embed": config.EmbedSettings,
    "plan": config.PlanSettings,
    "verify": config.VerifySettings,
    "parity": config.ParitySettings,
    "search": config.SearchSettings,
    "export": config.ExportSettings,
    "report": config.ReportSettings,
    "evaluate": config.EvaluateSettings,
    "finetune": config.FinetuneSettings,
    "export-model": config.ExportModelSettings,
    "synthesize": config.SynthesizeSettings,
    "plan synthesize": config.SynthesizeSettings,
    "mine": config.MineSettings,
    "demos build": config.DemosBuildSettings,
    "demos select": config.DemosSelectSettings,
}


def reference() -> str:
    """The whole page."""
    parts = [HEAD]
    for name, command in sorted(_commands(cli.llmemb)):
        usage = " ".join(["llmemb", name, *command.collect_usage_pieces(cli.click.Context(command))])
        parts.append(f"\n## llmemb {name}\n\n{(command.help or '').strip()}\n\n`{usage}`\n")
        if name == "plan":
            parts.append("\nTakes the options of `llmemb embed`, and of its own:\n")
        panels = _panels(name)
        rows: dict[str, list[str]] = {}
        for parameter in command.params:
            if isinstance(parameter, cli.click.Option) and not (name == "plan" and parameter.name in config.EmbedSettings.model_fields):
                flags = ", ".join(f"`{flag}`" for flag in [*parameter.opts, *parameter.secondary_opts])
                choices = getattr(parameter.type, "choices", None)
                value = " " + " / ".join(choices) if choices else ""
                help_ = (parameter.help or "").replace("|", "\\|")
                rows.setdefault(panels.get(parameter.name or "", "General"), []).append(f"| {flags}{value} | {help_} |")
        for panel, lines in rows.items():
            parts.append(f"\n| {panel} | |\n|---|---|\n" + "\n".join(lines) + "\n")
    return "".join(parts)


def _commands(group: cli.click.RichGroup, before: str = "") -> Iterator[tuple[str, cli.click.Command]]:
    """Each command with its name, those of groups with the group's before it."""
    for name, command in group.commands.items():
        if isinstance(command, cli.click.RichGroup):
            yield from _commands(command, f"{before}{name} ")
        else:
            yield before + name, command


def _panels(name: str) -> dict[str, str]:
    settings = SETTINGS.get(name, cli.RunSettings)
    panels = {}
    for field, info in settings.model_fields.items():
        extra = info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}
        panels[field] = str(extra.get("panel", "General"))
        for choice in get_args(info.annotation) if extra.get("flags") else ():
            panels[choice] = panels[field]
    return panels


if __name__ == "__main__":
    if "--print" in sys.argv:
        sys.stdout.write(reference())
    else:
        (Path(__file__).parent / "reference.md").write_text(reference(), encoding="utf-8")
