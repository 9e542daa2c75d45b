"""`longhaul convert`: a Longformer or LED directory made of a BERT, RoBERTa or BART one."""

import sys
from pathlib import Path

import click

from jobs.options import collect, run
from jobs.report import print_conversion
from longformer_core.conversion.convert import Conversion, check_output, plan_conversion
from pipelines.errors import Refused

COUNT = click.IntRange(min=1)


@click.command(name="convert")
@click.option(
    "--model",
    required=True,
    help="A published directory, its URL, or a hub id: BERT, RoBERTa, XLM-R, CamemBERT, "
    "BART, Longformer or LED.",
)
@click.option(
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    help="A directory that does not exist yet, or is empty.",
)
@click.option(
    "--max-length",
    type=COUNT,
    metavar="TOKENS",
    help="Positions of the result. Default: 4096 for Longformer, 16384 for LED.",
)
@click.option(
    "--attention-window",
    type=COUNT,
    metavar="TOKENS",
    help="Both sides together. Default: 512 for Longformer, 1024 for LED.",
)
@click.option("--dry-run", is_flag=True, help="Check everything, print the plan, stop.")
def convert(
    model: str, output: Path, max_length: int | None, attention_window: int | None, dry_run: bool
) -> None:
    """Make a Longformer of a BERT or RoBERTa, an LED of a BART, or give either more positions.

    \b
    Example:
      longhaul convert --model roberta-base/ --output longformer/ --max-length 8192

    Position embeddings are repeated and global projections copied from the local ones: documents
    that no window cuts are answered as by the original, longer ones want training.
    """
    problems: list[str] = []
    plan: Conversion | None = None
    with collect(problems):
        plan = plan_conversion(model, max_length=max_length, attention_window=attention_window)
    with collect(problems):
        check_output(output)
    if problems or plan is None:
        raise Refused(problems)
    left_out: list[str] = []
    if not dry_run:
        with collect(problems):
            left_out = plan.write(output)
    if problems:
        raise Refused(problems)
    print_conversion(plan, output, left_out, dry_run=dry_run)


def main() -> int:
    return run(convert)


if __name__ == "__main__":
    sys.exit(main())
